// A CUDA runtime that needs no GPU. Preloaded, it stands before NVIDIA's libcudart in a process with PyTorch.
//
// Memory of the device is memory of the host. Streams, events, captures and graphs behave as CUDA's documentation says,
// down to what a capture forbids. Work is done when somebody waits for it, or at some moment before, and what no stream
// and no event puts in order is done in any order. So a program that forgets to wait computes something else here, with
// one seed or another. What a kernel does is not known here: operations.cpp brings it.
//
// This file: work, streams and events. graphs.cpp: captures and graphs. device.cpp: the device, memory and kernels.

#include "runtime.h"

#include <time.h>

#include <algorithm>

namespace emulator {
namespace {

bool chance() { return state().random() % 2; }

// Do a task, and first what it waits for.
void finish_task(long task) {
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

bool finished(const std::vector<long>& tasks) {
  if (chance()) finish(tasks);
  return std::all_of(tasks.begin(), tasks.end(), [](long task) { return state().tasks[task].done; });
}

}  // namespace

Stream* stream_of(cudaStream_t stream) {
  bool legacy = stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
  return legacy ? &state().legacy : reinterpret_cast<Stream*>(stream);
}

void finish(const std::vector<long>& tasks) {
  for (long task : tasks) finish_task(task);
}
void finish_all() {
  for (size_t& task = state().oldest; task < state().tasks.size(); task++) finish_task(long(task));
}

cudaError_t give(cudaStream_t where, Work work) {
  if (looking) return cudaSuccess;
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
    if (open && chance()) finish_task(long(state().oldest + state().random() % open));
    state().tasks.push_back({std::move(work), stream->last});
    stream->last = {long(state().tasks.size()) - 1};
  }
  return cudaSuccess;
}

}  // namespace emulator

using namespace emulator;

// ---------------------------------------------------------------- for operations.cpp

API cudaError_t emulator_give(cudaStream_t stream, Work* work) { return give(stream, std::move(*work)); }

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
  if (looking) return looked_at_waits = true, cudaSuccess;
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
  if (looking) return looked_at_waits = true, cudaSuccess;
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
