// A CUDA runtime that needs no GPU. Preloaded, it stands before NVIDIA's libcudart in a process with PyTorch.
//
// Memory of the device is memory of the host. Streams, events, captures and graphs behave as CUDA's documentation says,
// down to what a capture forbids. Work is done when somebody waits for it, or at some moment before, and what no stream
// and no event puts in order is done in any order. So a program that forgets to wait computes something else here, with
// one seed or another. What a kernel does is not known here: operations.cpp brings it.

#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <time.h>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace {

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
State& state() { return kept<State>(); }
struct Lock : std::lock_guard<std::recursive_mutex> {
  Lock() : lock_guard(state().mutex) {}
};

thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
thread_local int present_device = 0;

size_t total_memory() {
  const char* mib = std::getenv("EMULATOR_MIB");
  return size_t(mib ? std::atol(mib) : 16384) << 20;
}

cudaError_t failed(cudaError_t error) { return last_error = error; }

Stream* stream_of(cudaStream_t stream) {
  bool legacy = stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
  return legacy ? &state().legacy : reinterpret_cast<Stream*>(stream);
}

bool chance() { return state().random() % 2; }

// Do a task, and first what it waits for.
void finish(long task) {
  auto& tasks = state().tasks;
  std::vector<long> open{task};
  while (!open.empty()) {
    Task& next = tasks[open.back()];
    std::vector<long> before;
    for (long other : next.after)
      if (!tasks[other].done) before.push_back(other);
    if (next.done || before.empty()) {
      long id = open.back();
      open.pop_back();
      if (next.done) continue;
      if (next.work) next.work();
      tasks[id] = {nullptr, {}, true};
    } else {
      std::shuffle(before.begin(), before.end(), state().random);
      open.insert(open.end(), before.begin(), before.end());
    }
  }
}
void finish(const std::vector<long>& tasks) {
  for (long task : tasks) finish(task);
}
void finish_all() {
  for (size_t& task = state().oldest; task < state().tasks.size(); task++) finish(long(task));
}
bool finished(const std::vector<long>& tasks) {
  if (chance()) finish(tasks);
  return std::all_of(tasks.begin(), tasks.end(), [](long task) { return state().tasks[task].done; });
}

// Whether a stream that waits for the legacy one takes part in a capture.
bool legacy_is_captured() {
  for (Capture* capture : state().captures)
    for (Stream* member : capture->members)
      if (member->blocking) return true;
  return false;
}

// "Potentially unsafe" calls: what they do while a capture is under way depends on its mode and on the thread's.
cudaError_t unsafe() {
  for (Capture* capture : state().captures) {
    bool mine = capture->thread == std::this_thread::get_id();
    bool forbidden = false;
    if (thread_mode == cudaStreamCaptureModeGlobal)
      forbidden = capture->mode == cudaStreamCaptureModeGlobal ||
                  (mine && capture->mode == cudaStreamCaptureModeThreadLocal);
    else if (thread_mode == cudaStreamCaptureModeThreadLocal)
      forbidden = mine && capture->mode != cudaStreamCaptureModeRelaxed;
    if (forbidden) {
      capture->invalid = true;
      return failed(cudaErrorStreamCaptureUnsupported);
    }
  }
  return cudaSuccess;
}

cudaError_t give(cudaStream_t where, Work work) {
  Lock lock;
  Stream* stream = stream_of(where);
  if (stream == &state().legacy && legacy_is_captured()) return failed(cudaErrorStreamCaptureImplicit);
  if (Capture* capture = stream->capture) {
    if (capture->invalid) return failed(cudaErrorStreamCaptureInvalidated);
    capture->nodes.push_back({std::move(work), {stream->front.begin(), stream->front.end()}});
    stream->front = {int(capture->nodes.size()) - 1};
  } else {
    // A GPU goes on while the host does: something that was given before may be done by now.
    size_t open = state().tasks.size() - state().oldest;
    if (open && chance()) finish(long(state().oldest + state().random() % open));
    state().tasks.push_back({std::move(work), stream->last});
    stream->last = {long(state().tasks.size()) - 1};
  }
  return cudaSuccess;
}

// Do a graph's nodes in some order that their dependencies allow: mostly on along one branch, so that branches drift.
void replay(const Nodes& nodes) {
  std::vector<size_t> missing(nodes.size());
  std::vector<std::vector<int>> followers(nodes.size());
  std::vector<int> ready;
  for (size_t node = 0; node < nodes.size(); node++) {
    missing[node] = nodes[node].after.size();
    for (int before : nodes[node].after) followers[before].push_back(int(node));
    if (!missing[node]) ready.push_back(int(node));
  }
  while (!ready.empty()) {
    size_t which = state().random() % 3 ? ready.size() - 1 : state().random() % ready.size();
    int node = ready[which];
    ready.erase(ready.begin() + long(which));
    if (nodes[node].work) nodes[node].work();
    for (int follower : followers[node])
      if (--missing[follower] == 0) ready.push_back(follower);
  }
}

Capture* capture_of(const Event& event) {
  for (Capture* capture : state().captures)
    if (capture->id == event.capture) return capture;
  return nullptr;
}

cudaError_t allocate(void** pointer, size_t bytes, cudaMemoryType type) {
  bytes = std::max<size_t>(bytes, 1);
  void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) return failed(cudaErrorMemoryAllocation);
  state().memory[static_cast<char*>(found)] = {bytes, type};
  if (type == cudaMemoryTypeDevice) state().used += bytes;
  *pointer = found;
  return cudaSuccess;
}
cudaError_t release(void* pointer) {
  Lock lock;
  if (cudaError_t error = unsafe()) return error;
  finish_all();
  auto found = state().memory.find(static_cast<char*>(pointer));
  if (found == state().memory.end()) return cudaSuccess;
  auto [bytes, type] = found->second;
  if (type == cudaMemoryTypeDevice) state().used -= bytes;
  munmap(pointer, bytes);
  state().memory.erase(found);
  return cudaSuccess;
}
cudaMemoryType type_of(const void* pointer) {
  auto after = state().memory.upper_bound(static_cast<char*>(const_cast<void*>(pointer)));
  if (after == state().memory.begin()) return cudaMemoryTypeUnregistered;
  auto [start, found] = *std::prev(after);
  return static_cast<const char*>(pointer) < start + found.first ? found.second : cudaMemoryTypeUnregistered;
}

}  // namespace

// ---------------------------------------------------------------- for operations.cpp

API cudaError_t emulator_give(cudaStream_t stream, Work* work) { return give(stream, std::move(*work)); }
API bool emulator_is_pinned(const void* pointer) {
  Lock lock;
  return type_of(pointer) == cudaMemoryTypeHost;
}

// ---------------------------------------------------------------- the device

API cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
API cudaError_t cudaGetDevice(int* device) { return *device = present_device, cudaSuccess; }
API cudaError_t cudaSetDevice(int device) { return present_device = device, cudaSuccess; }
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* is, int) {
  std::memset(is, 0, sizeof *is);
  std::strcpy(is->name, "emulated");
  is->totalGlobalMem = total_memory();
  is->major = 9;
  is->multiProcessorCount = 132;
  is->warpSize = 32;
  is->maxThreadsPerBlock = 1024;
  is->maxThreadsPerMultiProcessor = 2048;
  is->regsPerMultiprocessor = 65536;
  is->sharedMemPerBlock = 48 << 10;
  is->sharedMemPerBlockOptin = is->sharedMemPerMultiprocessor = 227 << 10;
  is->l2CacheSize = 50 << 20;
  std::fill(is->maxGridSize, is->maxGridSize + 3, 65535);
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 1, cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* most) { return *least = *most = 0, cudaSuccess; }
API cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* found) {
  *function = nullptr;
  if (found) *found = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
API int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { return *flags = 0, *active = 1, 0; }
API cudaError_t cudaDeviceSynchronize() {
  Lock lock;
  for (Capture* capture : state().captures)
    if (capture->thread == std::this_thread::get_id()) {
      capture->invalid = true;
      return failed(cudaErrorStreamCaptureUnsupported);
    }
  if (cudaError_t error = unsafe()) return error;
  finish_all();
  return cudaSuccess;
}
API cudaError_t cudaPeekAtLastError() { return last_error; }
API cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
API const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }
API const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNotSupported: return "operation not supported";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureMerge: return "operation would result in a merge of separate capture sequences";
    case cudaErrorStreamCaptureUnmatched: return "capture was not ended in the same stream as it began";
    case cudaErrorStreamCaptureUnjoined: return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
    case cudaErrorStreamCaptureImplicit:
      return "operation would make the legacy stream depend on a capturing blocking stream";
    case cudaErrorCapturedEvent: return "operation not permitted on an event last recorded in a capturing stream";
    case cudaErrorStreamCaptureWrongThread: return "attempt to terminate a capture from another thread";
    default: return error ? "an error of the emulated device" : "no error";
  }
}

// ---------------------------------------------------------------- memory

API cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  Lock lock;
  *pointer = nullptr;
  if (cudaError_t error = unsafe()) return error;
  if (state().used + bytes > total_memory()) return failed(cudaErrorMemoryAllocation);
  return allocate(pointer, bytes, cudaMemoryTypeDevice);
}
API cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  Lock lock;
  if (cudaError_t error = unsafe()) return error;
  return allocate(pointer, bytes, cudaMemoryTypeHost);
}
API cudaError_t cudaFree(void* pointer) { return release(pointer); }
API cudaError_t cudaFreeHost(void* pointer) { return release(pointer); }
API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  Lock lock;
  *total = total_memory();
  *free = *total - std::min(*total, state().used);
  return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* is, const void* pointer) {
  Lock lock;
  std::memset(is, 0, sizeof *is);
  is->type = type_of(pointer);
  if (is->type != cudaMemoryTypeUnregistered) is->devicePointer = const_cast<void*>(pointer);
  if (is->type == cudaMemoryTypeHost) is->hostPointer = const_cast<void*>(pointer);
  return cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  Lock lock;
  if (type_of(from) == cudaMemoryTypeUnregistered && !stream_of(stream)->capture) {
    // From memory that is not pinned: CUDA has read it when this returns.
    const char* start = static_cast<const char*>(from);
    auto read = std::make_shared<std::vector<char>>(start, start + bytes);
    return give(stream, [=] { std::memcpy(to, read->data(), bytes); });
  }
  if (cudaError_t error = give(stream, [=] { std::memmove(to, from, bytes); })) return error;
  if (type_of(to) == cudaMemoryTypeUnregistered && !stream_of(stream)->capture) finish(stream_of(stream)->last);
  return cudaSuccess;
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  Lock lock;
  if (cudaError_t error = unsafe()) return error;
  if (cudaError_t error = cudaMemcpyAsync(to, from, bytes, kind, nullptr)) return error;
  finish(state().legacy.last);
  return cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return give(stream, [=] { std::memset(to, value, bytes); });
}

// ---------------------------------------------------------------- streams and events

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  *stream = reinterpret_cast<cudaStream_t>(new Stream{!(flags & cudaStreamNonBlocking)});
  return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
API cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
static cudaError_t check(const Stream& stream) {
  if (!stream.capture) return unsafe();
  stream.capture->invalid = true;
  return failed(cudaErrorStreamCaptureUnsupported);
}
API cudaError_t cudaStreamSynchronize(cudaStream_t which) {
  Lock lock;
  Stream* stream = stream_of(which);
  if (cudaError_t error = check(*stream)) return error;
  finish(stream->last);
  return cudaSuccess;
}
API cudaError_t cudaStreamQuery(cudaStream_t which) {
  Lock lock;
  Stream* stream = stream_of(which);
  if (cudaError_t error = check(*stream)) return error;
  return finished(stream->last) ? cudaSuccess : cudaErrorNotReady;
}
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  *event = reinterpret_cast<cudaEvent_t>(new Event{!(flags & cudaEventDisableTiming)});
  return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }
API cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t which, cudaStream_t where, unsigned) {
  Lock lock;
  Event& event = *reinterpret_cast<Event*>(which);
  Stream* stream = stream_of(where);
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  event.recorded = true;
  event.seconds = double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
  event.capture = stream->capture ? stream->capture->id : 0;
  event.front = stream->front;
  event.last = stream->capture ? std::vector<long>() : stream->last;
  return stream->capture && stream->capture->invalid ? failed(cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t where, cudaEvent_t which, unsigned) {
  Lock lock;
  Event& event = *reinterpret_cast<Event*>(which);
  Stream* stream = stream_of(where);
  if (!event.recorded) return cudaSuccess;
  if (Capture* capture = capture_of(event)) {
    if (capture->invalid) return failed(cudaErrorStreamCaptureInvalidated);
    if (stream == &state().legacy || (stream->capture && stream->capture != capture)) {
      capture->invalid = true;
      if (stream->capture) stream->capture->invalid = true;
      return failed(stream->capture ? cudaErrorStreamCaptureMerge : cudaErrorStreamCaptureImplicit);
    }
    if (!stream->capture) {  // it joins
      stream->capture = capture;
      stream->front.clear();
      capture->members.insert(stream);
    }
    stream->front.insert(event.front.begin(), event.front.end());
    return cudaSuccess;
  }
  if (stream->capture) stream->capture->invalid = true;
  if (event.capture) return failed(cudaErrorCapturedEvent);
  if (stream->capture) return failed(cudaErrorStreamCaptureIsolation);
  stream->last.insert(stream->last.end(), event.last.begin(), event.last.end());
  return cudaSuccess;
}
static cudaError_t check(const Event& event) {
  if (Capture* capture = capture_of(event)) capture->invalid = true;
  return event.capture ? failed(cudaErrorCapturedEvent) : unsafe();
}
API cudaError_t cudaEventSynchronize(cudaEvent_t which) {
  Lock lock;
  Event& event = *reinterpret_cast<Event*>(which);
  if (cudaError_t error = check(event)) return error;
  finish(event.last);
  return cudaSuccess;
}
API cudaError_t cudaEventQuery(cudaEvent_t which) {
  Lock lock;
  Event& event = *reinterpret_cast<Event*>(which);
  if (cudaError_t error = check(event)) return error;
  return finished(event.last) ? cudaSuccess : cudaErrorNotReady;
}
API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t stop) {
  Event &first = *reinterpret_cast<Event*>(start), &second = *reinterpret_cast<Event*>(stop);
  bool both = first.recorded && second.recorded && first.timed && second.timed;
  if (!both) return failed(cudaErrorInvalidResourceHandle);
  if (first.capture || second.capture) return failed(cudaErrorCapturedEvent);
  *milliseconds = float(1000 * (second.seconds - first.seconds));
  return cudaSuccess;
}

// ---------------------------------------------------------------- captures and graphs

API cudaError_t cudaStreamBeginCapture(cudaStream_t where, cudaStreamCaptureMode mode) {
  Lock lock;
  Stream* stream = stream_of(where);
  if (stream == &state().legacy) return failed(cudaErrorStreamCaptureUnsupported);
  if (stream->capture) return failed(cudaErrorIllegalState);
  stream->capture = new Capture{state().next_capture++, stream, mode, std::this_thread::get_id()};
  stream->capture->members.insert(stream);
  stream->front.clear();
  state().captures.push_back(stream->capture);
  return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t where, cudaGraph_t* graph) {
  Lock lock;
  Stream* stream = stream_of(where);
  Capture* capture = stream->capture;
  *graph = nullptr;
  if (!capture) return failed(cudaErrorIllegalState);
  if (capture->origin != stream) return failed(cudaErrorStreamCaptureUnmatched);
  bool elsewhere = capture->thread != std::this_thread::get_id() && capture->mode != cudaStreamCaptureModeRelaxed;
  if (elsewhere) return failed(cudaErrorStreamCaptureWrongThread);
  std::vector<bool> joined(capture->nodes.size());
  std::vector<int> open(stream->front.begin(), stream->front.end());
  while (!open.empty()) {
    int node = open.back();
    open.pop_back();
    if (joined[node]) continue;
    joined[node] = true;
    open.insert(open.end(), capture->nodes[node].after.begin(), capture->nodes[node].after.end());
  }
  for (Stream* member : capture->members) {
    member->capture = nullptr;
    member->front.clear();
  }
  auto& captures = state().captures;
  captures.erase(std::find(captures.begin(), captures.end(), capture));
  std::unique_ptr<Capture> ended(capture);
  if (ended->invalid) return failed(cudaErrorStreamCaptureInvalidated);
  if (!std::all_of(joined.begin(), joined.end(), [](bool is) { return is; }))
    return failed(cudaErrorStreamCaptureUnjoined);
  *graph = reinterpret_cast<cudaGraph_t>(new Nodes(std::move(ended->nodes)));
  return cudaSuccess;
}
static cudaStreamCaptureStatus status_of(const Stream& stream) {
  if (!stream.capture) return cudaStreamCaptureStatusNone;
  return stream.capture->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t where, cudaStreamCaptureStatus* status) {
  Lock lock;
  Stream* stream = stream_of(where);
  if (stream == &state().legacy && legacy_is_captured()) return failed(cudaErrorStreamCaptureImplicit);
  *status = status_of(*stream);
  return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t where, cudaStreamCaptureStatus* status, unsigned long long* id,
                                         cudaGraph_t* graph, const cudaGraphNode_t** nodes,
                                         const cudaGraphEdgeData** edges, size_t* count) {
  Lock lock;
  static thread_local std::vector<cudaGraphNode_t> front;
  Stream* stream = stream_of(where);
  *status = status_of(*stream);
  if (!stream->capture) return cudaSuccess;
  front.clear();
  for (int node : stream->front) front.push_back(reinterpret_cast<cudaGraphNode_t>(size_t(node) + 1));
  if (id) *id = stream->capture->id;
  if (graph) *graph = nullptr;
  if (nodes) *nodes = front.data();
  if (edges) *edges = nullptr;
  if (count) *count = front.size();
  return cudaSuccess;
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  size_t all = reinterpret_cast<Nodes*>(graph)->size();
  for (size_t node = 0; nodes && node < std::min(all, *count); node++)
    nodes[node] = reinterpret_cast<cudaGraphNode_t>(node + 1);
  *count = all;
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  Lock lock;
  if (cudaError_t error = unsafe()) return error;
  auto* nodes = new std::shared_ptr<Nodes>(new Nodes(*reinterpret_cast<Nodes*>(graph)));
  *executable = reinterpret_cast<cudaGraphExec_t>(nodes);
  return cudaSuccess;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  std::shared_ptr<Nodes> nodes = *reinterpret_cast<std::shared_ptr<Nodes>*>(executable);
  return give(stream, [nodes] { replay(*nodes); });
}
API cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Nodes*>(graph);
  return cudaSuccess;
}
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete reinterpret_cast<std::shared_ptr<Nodes>*>(executable);
  return cudaSuccess;
}

// ---------------------------------------------------------------- kernels: each is refused, by its name

API void** __cudaRegisterFatBinary(void*) { return &kept<void*>(); }
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                                int*) {
  Lock lock;
  state().kernels[host] = name;
}
API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
API cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t) {
  Lock lock;
  std::fprintf(stderr, "emulator: operations.cpp does not replace %s\n", state().kernels[kernel].c_str());
  return failed(cudaErrorNotSupported);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* kernel, void** arguments) {
  return cudaLaunchKernel(kernel, how->gridDim, how->blockDim, arguments, 0, how->stream);
}
API cudaError_t __cudaGetKernel(cudaKernel_t* found, const void* kernel) {
  *found = reinterpret_cast<cudaKernel_t>(const_cast<void*>(kernel));
  return cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                   cudaStream_t stream) {
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared, stream);
}
API unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
API cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
