// Kernels: registered, launched within the card's limits, and doing nothing. What they would compute, the Python part
// computes on the CPU and puts into the stream with stand_in_submit().
#include "card.h"
#include "errors.h"
#include "lock.h"
#include "memory.h"
#include "streams.h"
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <cstring>
#include <unordered_map>

namespace stand_in {

static std::unordered_map<const void*, const char*> names;
static std::unordered_map<const void*, size_t> shared; // bytes of shared memory that a launch may ask for

struct Configuration {
  dim3 blocks, threads;
  size_t bytes;
  void* stream;
};
static thread_local Configuration pushed;

static cudaError_t launch(const void* kernel, dim3 blocks, dim3 threads, size_t bytes, void* stream) {
  Lock lock;
  make_context();
  auto name = names.find(kernel);
  if (name == names.end()) return failed(cudaErrorInvalidDeviceFunction);
  if (!is_stream(stream)) return failed(cudaErrorInvalidResourceHandle);
  auto limit = shared.find(kernel);
  size_t most = limit == shared.end() ? attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK) : limit->second;
  bool some = blocks.x && blocks.y && blocks.z && threads.x && threads.y && threads.z;
  bool small = blocks.x <= 2147483647u && blocks.y <= 65535 && blocks.z <= 65535 && threads.z <= 64 &&
               size_t(threads.x) * threads.y * threads.z <= 1024 && bytes <= most;
  if (!some || !small) {
    note("refused", name->second);
    return failed(cudaErrorInvalidConfiguration);
  }
  if (card().late != Late::kernels) drain(stream);
  return cudaSuccess;
}

static void (*compute)(uint64_t) = nullptr;

} // namespace stand_in

using namespace stand_in;

extern "C" {

// The function that computes what stand_in_submit() named by number.
void stand_in_compute_with(void (*function)(uint64_t)) { compute = function; }

void stand_in_submit(void* stream, uint64_t number) {
  submit(stream, [number] { compute(number); }, card().late == Late::kernels);
}

void** __cudaRegisterFatBinary(void*) { return new void*[1]; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void** handle) { delete[] handle; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, void*, void*, void*, void*, int*) {
  Lock lock;
  names[kernel] = name;
}

unsigned __cudaPushCallConfiguration(dim3 blocks, dim3 threads, size_t bytes, CUstream_st* stream) {
  pushed = {blocks, threads, bytes, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* blocks, dim3* threads, size_t* bytes, void* stream) {
  *blocks = pushed.blocks;
  *threads = pushed.threads;
  *bytes = pushed.bytes;
  *static_cast<void**>(stream) = pushed.stream;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 blocks, dim3 threads, void**, size_t bytes, cudaStream_t stream) {
  return launch(kernel, blocks, threads, bytes, stream);
}
// What a launch is compiled to from CUDA 13 on; a kernel's handle is its function here.
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  return *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function)), cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 blocks, dim3 threads, void**, size_t bytes,
                               cudaStream_t stream) {
  return launch(kernel, blocks, threads, bytes, stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3 blocks, dim3 threads, void**, size_t bytes,
                                        cudaStream_t stream) {
  return launch(kernel, blocks, threads, bytes, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* it, const void* kernel, void**) {
  return launch(kernel, it->gridDim, it->blockDim, it->dynamicSmemBytes, it->stream);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* it, const void*) {
  memset(it, 0, sizeof *it);
  it->maxThreadsPerBlock = attribute(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
  it->maxDynamicSharedSizeBytes = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK);
  it->numRegs = 32;
  it->binaryVersion = it->ptxVersion = card().capability;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute which, int value) {
  Lock lock;
  if (which != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)) return failed(cudaErrorInvalidValue);
  shared[kernel] = value;
  return cudaSuccess;
}
cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  return *blocks = 2, cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  return *blocks = 2, cudaSuccess;
}
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

} // extern "C"
