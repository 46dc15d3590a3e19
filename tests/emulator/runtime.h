// What the files of the emulated runtime share: work, streams, captures, and the state of the whole.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace emulator __attribute__((visibility("hidden"))) {

using Work = std::function<void()>;

// Work that a stream was given: done once, after what it depends on.
struct Task {
  Work work;
  std::vector<long> after;
  bool done = false;
};
struct Node {
  Work work;
  std::vector<int> after;
};
using Nodes = std::vector<Node>;
struct Stream;
struct Capture {
  unsigned long long id;
  Stream* origin;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  bool invalid = false;
  Nodes nodes;
  std::set<Stream*> members;
};
struct Stream {
  bool blocking;
  std::vector<long> last;  // the tasks that the next one waits for
  Capture* capture = nullptr;
  std::set<int> front;  // the same in a capture: nodes
};
struct Event {
  bool timed, recorded = false;
  double seconds = 0;
  std::vector<long> last;
  unsigned long long capture = 0;  // the id of the capture it was recorded in
  std::set<int> front;
};

// Never destroyed: PyTorch calls until the process is gone.
template <class T>
T& kept() {
  static auto* it = new T;
  return *it;
}
struct State {
  std::recursive_mutex mutex;
  std::vector<Task> tasks;
  size_t oldest = 0;  // of those before it all are done
  std::vector<Capture*> captures;
  std::map<char*, std::pair<size_t, cudaMemoryType>> memory;
  std::map<const void*, std::string> kernels;
  size_t used = 0;
  unsigned long long next_capture = 1;
  std::mt19937 random{std::getenv("EMULATOR_SEED") ? unsigned(std::atoi(std::getenv("EMULATOR_SEED"))) : 1};
  Stream legacy{true};
};
inline State& state() { return kept<State>(); }
struct Lock : std::lock_guard<std::recursive_mutex> {
  Lock() : lock_guard(state().mutex) {}
};

// runtime.cpp: work, and when it is done.
Stream* stream_of(cudaStream_t stream);
cudaError_t give(cudaStream_t where, Work work);
void finish(const std::vector<long>& tasks);
void finish_all();

// graphs.cpp: what a capture forbids.
bool legacy_is_captured();
cudaError_t unsafe();
Capture* capture_of(const Event& event);

// device.cpp: the last error, memory, and kernels. While PyTorch's own code for an operation is looked at, it runs up to
// the device, where nothing is done; whether it has waited for the device is noted.
extern thread_local bool looking, looked_at_waits;
cudaError_t failed(cudaError_t error);
cudaMemoryType type_of(const void* pointer);

}  // namespace emulator
