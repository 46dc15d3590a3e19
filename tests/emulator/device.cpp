// The device of the emulated runtime: errors, memory, and kernels, of which it has none (see runtime.cpp).

#include "runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>

namespace emulator {
namespace {

thread_local cudaError_t last_error = cudaSuccess;
thread_local int present_device = 0;

size_t total_memory() {
  const char* mib = std::getenv("EMULATOR_MIB");
  return size_t(mib ? std::atol(mib) : 16384) << 20;
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

}  // namespace

thread_local bool looking = false, looked_at_waits = false;

cudaError_t failed(cudaError_t error) { return last_error = error; }

cudaMemoryType type_of(const void* pointer) {
  auto after = state().memory.upper_bound(static_cast<char*>(const_cast<void*>(pointer)));
  if (after == state().memory.begin()) return cudaMemoryTypeUnregistered;
  auto [start, found] = *std::prev(after);
  return static_cast<const char*>(pointer) < start + found.first ? found.second : cudaMemoryTypeUnregistered;
}

}  // namespace emulator

using namespace emulator;

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
  is->maxThreadsDim[0] = is->maxThreadsDim[1] = 1024;
  is->maxThreadsDim[2] = 64;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  cudaDeviceProp is;
  cudaGetDeviceProperties(&is, device);
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor: *value = is.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = is.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = is.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = is.maxThreadsPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = int(is.sharedMemPerBlock); break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(is.sharedMemPerBlockOptin); break;
    case cudaDevAttrMaxGridDimX: case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrWarpSize: *value = is.warpSize; break;
    default: *value = 1;
  }
  return cudaSuccess;
}
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
  if (looking) return looked_at_waits = true, cudaSuccess;
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
API bool emulator_is_pinned(const void* pointer) {  // for operations.cpp
  Lock lock;
  return type_of(pointer) == cudaMemoryTypeHost;
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  Lock lock;
  if (looking) {
    if (type_of(to) != cudaMemoryTypeDevice) std::memset(to, 0, bytes);
    return cudaSuccess;
  }
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
  if (looking) looked_at_waits = true;
  if (looking) return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
  if (cudaError_t error = unsafe()) return error;
  if (cudaError_t error = cudaMemcpyAsync(to, from, bytes, kind, nullptr)) return error;
  finish(state().legacy.last);
  return cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return give(stream, [=] { std::memset(to, value, bytes); });
}

// ---------------------------------------------------------------- kernels: each is refused, by its name, or looked at

// For operations.cpp: whether PyTorch's code is looked at; that it waits; begin or end to look, which returns what was
// before.
API bool emulator_looking() { return looking; }
API void emulator_waits() { looked_at_waits = true; }
API std::pair<bool, bool> emulator_look(bool begin, bool waits) {
  std::pair<bool, bool> before(looking, looked_at_waits);
  looking = begin;
  looked_at_waits = waits;
  return before;
}

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
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* is, const void*) {
  std::memset(is, 0, sizeof *is);
  is->maxThreadsPerBlock = 1024;
  is->numRegs = 32;
  is->ptxVersion = is->binaryVersion = 90;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t,
                                                                       unsigned) {
  return *blocks = 2, cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  return *blocks = 2, cudaSuccess;
}
API cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t) {
  if (looking) return cudaSuccess;
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
