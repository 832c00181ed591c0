// Memory of the card: allocations, and address ranges into which memory is mapped piece by piece (what PyTorch's
// segments that grow are made of). All of it is pages of this process that take no RAM before they are written.
#include "memory.h"
#include "card.h"
#include "errors.h"
#include "lock.h"
#include "streams.h"
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <cstdlib>
#include <cstring>
#include <map>

namespace stand_in {

constexpr size_t PAGE = 2 * MIB; // the driver gives and maps memory in these

using Ranges = std::map<uintptr_t, size_t>;
static Ranges allocated, mapped, reserved, locked; // sizes by first address
static std::map<CUmemGenericAllocationHandle, size_t> pieces; // of memory that may be mapped
static size_t used = 0;
static bool context = false;

void make_context() { context = true; }
bool has_context() { return context; }

static bool covers(const Ranges& ranges, const void* address, size_t size) {
  uintptr_t first = uintptr_t(address), last = first + size;
  while (first < last) { // neighbouring ranges count as one
    auto range = ranges.upper_bound(first);
    if (range == ranges.begin()) return false;
    --range;
    if (first >= range->first + range->second) return false;
    first = range->first + range->second;
  }
  return true;
}

bool on_card(const void* address, size_t size) {
  Lock lock;
  return covers(allocated, address, size) || covers(mapped, address, size);
}

bool page_locked(const void* address, size_t size) {
  Lock lock;
  return covers(locked, address, size);
}

static size_t available() {
  size_t taken = used + (context ? card().context : 0);
  return taken < card().capacity ? card().capacity - taken : 0;
}

static void* pages(size_t size, int access) {
  void* address = mmap(nullptr, size, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return address == MAP_FAILED ? nullptr : address;
}

} // namespace stand_in

using namespace stand_in;

extern "C" {

cudaError_t cudaMalloc(void** address, size_t size) {
  Lock lock;
  make_context();
  size = (size + PAGE - 1) / PAGE * PAGE;
  *address = nullptr;
  if (!size) return cudaSuccess;
  if (size > available()) return failed(cudaErrorMemoryAllocation);
  *address = pages(size, PROT_READ | PROT_WRITE);
  if (!*address) return failed(cudaErrorMemoryAllocation);
  allocated[uintptr_t(*address)] = size;
  used += size;
  return cudaSuccess;
}

cudaError_t cudaFree(void* address) {
  Lock lock;
  make_context();
  if (!address) return cudaSuccess;
  auto found = allocated.find(uintptr_t(address));
  if (found == allocated.end()) return failed(cudaErrorInvalidValue);
  drain_all();
  munmap(address, found->second);
  used -= found->second;
  allocated.erase(found);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  Lock lock;
  make_context();
  *free = available();
  *total = card().capacity;
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** address, size_t size, unsigned) {
  Lock lock;
  *address = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
  if (!*address) return failed(cudaErrorMemoryAllocation);
  locked[uintptr_t(*address)] = size;
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void** address, size_t size) { return cudaHostAlloc(address, size, 0); }
cudaError_t cudaFreeHost(void* address) {
  Lock lock;
  if (!address) return cudaSuccess;
  drain_all();
  if (!locked.erase(uintptr_t(address))) return failed(cudaErrorInvalidValue);
  return free(address), cudaSuccess;
}
cudaError_t cudaHostRegister(void* address, size_t size, unsigned) {
  Lock lock;
  if (page_locked(address)) return failed(cudaErrorHostMemoryAlreadyRegistered);
  locked[uintptr_t(address)] = size;
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* address) {
  Lock lock;
  drain_all();
  return locked.erase(uintptr_t(address)) ? cudaSuccess : failed(cudaErrorHostMemoryNotRegistered);
}
cudaError_t cudaHostGetDevicePointer(void** card, void* host, unsigned) { return *card = host, cudaSuccess; }

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* it, const void* address) {
  memset(it, 0, sizeof *it);
  bool card = on_card(address), host = page_locked(address);
  it->type = card ? cudaMemoryTypeDevice : host ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  it->device = card || host ? 0 : -1;
  it->devicePointer = card || host ? const_cast<void*>(address) : nullptr;
  it->hostPointer = card ? nullptr : const_cast<void*>(address);
  return cudaSuccess;
}

// Virtual memory management. An address range is made without access; a piece that is mapped there gets it.

CUresult cuMemGetInfo(size_t* free, size_t* total) { return cudaMemGetInfo(free, total), CUDA_SUCCESS; }
CUresult cuMemGetAllocationGranularity(size_t* size, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
  return *size = PAGE, CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr* address, size_t size, size_t, CUdeviceptr, unsigned long long) {
  Lock lock;
  if (!card().growing) return CUDA_ERROR_NOT_SUPPORTED;
  void* raw = pages(size + PAGE, PROT_NONE); // one page more, to begin at a multiple of it
  if (!raw) return CUDA_ERROR_OUT_OF_MEMORY;
  uintptr_t first = (uintptr_t(raw) + PAGE - 1) / PAGE * PAGE, end = uintptr_t(raw) + size + PAGE;
  if (first > uintptr_t(raw)) munmap(raw, first - uintptr_t(raw));
  if (end > first + size) munmap(reinterpret_cast<void*>(first + size), end - first - size);
  reserved[first] = size;
  *address = first;
  return CUDA_SUCCESS;
}
CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
  Lock lock;
  auto found = reserved.find(address);
  if (found == reserved.end() || found->second != size) return CUDA_ERROR_INVALID_VALUE;
  reserved.erase(found);
  munmap(reinterpret_cast<void*>(address), size);
  return CUDA_SUCCESS;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* piece, size_t size, const CUmemAllocationProp*, unsigned long long) {
  Lock lock;
  static CUmemGenericAllocationHandle next = 1;
  if (size % PAGE) return CUDA_ERROR_INVALID_VALUE;
  make_context();
  if (size > available()) return CUDA_ERROR_OUT_OF_MEMORY;
  pieces[*piece = next++] = size;
  used += size;
  return CUDA_SUCCESS;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle piece) {
  Lock lock;
  auto found = pieces.find(piece);
  if (found == pieces.end()) return CUDA_ERROR_INVALID_VALUE;
  used -= found->second; // PyTorch releases a piece when, and only when, it unmaps it
  pieces.erase(found);
  return CUDA_SUCCESS;
}
CUresult cuMemMap(CUdeviceptr address, size_t size, size_t, CUmemGenericAllocationHandle piece, unsigned long long) {
  Lock lock;
  auto found = pieces.find(piece);
  bool fits = found != pieces.end() && found->second == size && !mapped.count(address);
  if (!fits || !covers(reserved, reinterpret_cast<void*>(address), size)) return CUDA_ERROR_INVALID_VALUE;
  mapped[address] = size;
  return CUDA_SUCCESS;
}
CUresult cuMemSetAccess(CUdeviceptr address, size_t size, const CUmemAccessDesc*, size_t) {
  Lock lock;
  void* first = reinterpret_cast<void*>(address);
  if (!covers(mapped, first, size)) return CUDA_ERROR_INVALID_VALUE;
  return mprotect(first, size, PROT_READ | PROT_WRITE) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuMemUnmap(CUdeviceptr address, size_t size) {
  Lock lock;
  auto found = mapped.find(address);
  if (found == mapped.end() || found->second != size) return CUDA_ERROR_INVALID_VALUE;
  drain_all();
  mapped.erase(found);
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED; // fresh pages: what was there is gone
  void* fresh = mmap(reinterpret_cast<void*>(address), size, PROT_NONE, flags, -1, 0);
  return fresh == MAP_FAILED ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

} // extern "C"
