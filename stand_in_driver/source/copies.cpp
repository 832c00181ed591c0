// Copies and fills of memory.
//
// A copy from or to page-locked memory is late if the card's copies are; within the card it is a kernel's work. Copies
// from and to other host memory are done when the call returns, as CUDA's documentation has it.
#include "card.h"
#include "errors.h"
#include "memory.h"
#include "streams.h"
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <cstring>

namespace stand_in {

static bool from_card(cudaMemcpyKind kind) { return kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice; }
static bool to_card(cudaMemcpyKind kind) { return kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice; }

static cudaMemcpyKind resolve(cudaMemcpyKind kind, const void* target, const void* source) {
  if (kind != cudaMemcpyDefault) return kind;
  if (on_card(target)) return on_card(source) ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice;
  return on_card(source) ? cudaMemcpyDeviceToHost : cudaMemcpyHostToHost;
}

static cudaError_t refused(const char* what) {
  note("refused", what);
  return failed(cudaErrorInvalidValue);
}

static cudaError_t copy(void* target, const void* source, size_t size, cudaMemcpyKind kind, void* stream) {
  make_context();
  kind = resolve(kind, target, source);
  if ((to_card(kind) && !on_card(target, size)) || (from_card(kind) && !on_card(source, size)))
    return refused("a copy from or to memory that is not the card's");
  if (!is_stream(stream)) return failed(cudaErrorInvalidResourceHandle);
  bool within = kind == cudaMemcpyDeviceToDevice;
  if (!within && size > card().largest_copy) return cudaSuccess;
  bool locked = within || page_locked(to_card(kind) ? source : target);
  bool late = locked && card().late == (within ? Late::kernels : Late::copies);
  submit(stream, [=] { memmove(target, source, size); }, late);
  return cudaSuccess;
}

static cudaError_t fill(void* target, int value, size_t size, void* stream) {
  if (!on_card(target, size)) return refused("a fill of memory that is not the card's");
  if (!is_stream(stream)) return failed(cudaErrorInvalidResourceHandle);
  if (size <= card().largest_copy)
    submit(stream, [=] { memset(target, value, size); }, card().late == Late::kernels);
  return cudaSuccess;
}

} // namespace stand_in

using namespace stand_in;

extern "C" {

cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t size, cudaMemcpyKind kind, cudaStream_t stream) {
  return copy(target, source, size, kind, stream);
}
cudaError_t cudaMemcpy(void* target, const void* source, size_t size, cudaMemcpyKind kind) {
  cudaError_t error = copy(target, source, size, kind, nullptr);
  drain(nullptr);
  return error;
}
cudaError_t cudaMemcpyPeerAsync(void* target, int, const void* source, int, size_t size, cudaStream_t stream) {
  return copy(target, source, size, cudaMemcpyDeviceToDevice, stream);
}
cudaError_t cudaMemcpy2DAsync(void* target, size_t target_pitch, const void* source, size_t source_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (size_t row = 0; row < height && !error; row++)
    error = copy(static_cast<char*>(target) + row * target_pitch, static_cast<const char*>(source) + row * source_pitch,
                 width, kind, stream);
  return error;
}
cudaError_t cudaMemsetAsync(void* target, int value, size_t size, cudaStream_t stream) {
  return fill(target, value, size, stream);
}
cudaError_t cudaMemset(void* target, int value, size_t size) { return fill(target, value, size, nullptr); }

} // extern "C"
