// Captures and graphs of the emulated runtime (see runtime.cpp).

#include "runtime.h"

#include <algorithm>
#include <memory>

namespace emulator {
namespace {

thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

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

}  // namespace

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

Capture* capture_of(const Event& event) {
  for (Capture* capture : state().captures)
    if (capture->id == event.capture) return capture;
  return nullptr;
}

}  // namespace emulator

using namespace emulator;

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
