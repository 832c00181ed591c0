#include "errors.h"
#include "card.h"
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <cstring>

namespace stand_in {

static thread_local cudaError_t last = cudaSuccess;

cudaError_t failed(cudaError_t error) { return last = error; }

// Those that this library returns, as CUDA's documentation names and describes them. The driver's have the numbers of
// the runtime's.
struct Description {
  cudaError_t error;
  const char *name, *text;
};
static const Description DESCRIPTIONS[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorHostMemoryAlreadyRegistered, "cudaErrorHostMemoryAlreadyRegistered", "memory is already registered"},
    {cudaErrorHostMemoryNotRegistered, "cudaErrorHostMemoryNotRegistered", "memory is not registered"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "not supported by the stand-in driver"},
};

static const Description& describe(int error) {
  for (auto& it : DESCRIPTIONS)
    if (it.error == error) return it;
  static const Description unknown = {cudaErrorUnknown, "cudaErrorUnknown", "unknown error"};
  return unknown;
}

} // namespace stand_in

using namespace stand_in;

extern "C" {

cudaError_t cudaPeekAtLastError() { return last; }
cudaError_t cudaGetLastError() {
  cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
const char* cudaGetErrorName(cudaError_t error) { return describe(error).name; }
const char* cudaGetErrorString(cudaError_t error) { return describe(error).text; }
CUresult cuGetErrorName(CUresult error, const char** name) { return *name = describe(error).name, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char** text) { return *text = describe(error).text, CUDA_SUCCESS; }

// What a function does that PyTorch's libraries name and this library lacks (build.py writes them). cuBLAS' products
// succeed and compute nothing, as kernels do.
int stand_in_missing(const char* name) {
  if (!strncmp(name, "cublas", 6)) return 0;
  note("missing", name);
  return strncmp(name, "cuda", 4) ? int(CUDA_ERROR_NOT_SUPPORTED) : int(failed(cudaErrorNotSupported));
}

} // extern "C"
