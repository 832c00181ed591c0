// Attributes and properties of the card, from the tables of CUDA's programming guide.
#include "card.h"
#include "errors.h"
#include "lock.h"
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>

namespace stand_in {

static long number(const char* name, long otherwise) {
  const char* text = getenv(name);
  return text ? strtol(text, nullptr, 10) : otherwise;
}

static Card read_card() {
  const char* late = getenv("STAND_IN_LATE");
  Card card;
  card.capacity = number("STAND_IN_CAPACITY", 24l << 30);
  card.context = number("STAND_IN_CONTEXT", 420 * MIB);
  card.largest_copy = number("STAND_IN_LARGEST_COPY", -1); // all of them
  card.capability = int(number("STAND_IN_CAPABILITY", 86));
  card.growing = number("STAND_IN_GROWING", 1);
  card.late = !late || !strcmp(late, "copies") ? Late::copies : !strcmp(late, "kernels") ? Late::kernels : Late::nothing;
  return card;
}

const Card& card() {
  static const Card it = read_card();
  return it;
}

// What differs between compute capabilities ("Technical specifications per compute capability").
struct Multiprocessor {
  int capability, shared_kib, block_shared_kib, threads, blocks;
};
static const Multiprocessor MULTIPROCESSORS[] = {
    {75, 64, 64, 1024, 16},  {80, 164, 163, 2048, 32},  {86, 100, 99, 1536, 16},   {89, 100, 99, 1536, 24},
    {90, 228, 227, 2048, 32}, {100, 228, 227, 2048, 32}, {120, 100, 99, 1536, 24},
};

static const Multiprocessor& multiprocessor() {
  const Multiprocessor* found = &MULTIPROCESSORS[0];
  for (auto& it : MULTIPROCESSORS)
    if (it.capability <= card().capability) found = &it;
  return *found;
}

int attribute(int which) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 2147483647;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 48 << 10;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return multiprocessor().block_shared_kib << 10;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return multiprocessor().shared_kib << 10;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return multiprocessor().threads;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return multiprocessor().blocks;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 64 << 10;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return card().capability / 10;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return card().capability % 10;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
    case CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT: return 512;
    case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY: return 64 << 10;
    // A large consumer card's: nothing is timed, but launches are sized by the number of multiprocessors.
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return 82;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 1695000;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return 9751000;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return 384;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return 6 << 20;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM:
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT:
    case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH: return 1;
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: return card().growing;
    default: return 0;
  }
}

void note(const char* kind, const char* name) {
  static std::set<std::string> told;
  Lock lock;
  const char* path = getenv("STAND_IN_REPORT");
  std::string line = std::string(kind) + " " + name + "\n";
  if (!path || !told.insert(line).second) return;
  if (FILE* file = fopen(path, "a")) { // one write of a short line: processes may share the file
    fputs(line.c_str(), file);
    fclose(file);
  }
}

} // namespace stand_in

using namespace stand_in;
static thread_local int current = 0;

extern "C" {

void stand_in_note(const char* kind, const char* name) { note(kind, name); }

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? failed(cudaErrorInvalidDevice) : cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDA_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  return *value = attribute(which), cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int) {
  return snprintf(text, length, "0000:01:00.0"), cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* it, int device) {
  if (device) return failed(cudaErrorInvalidDevice);
  memset(it, 0, sizeof *it);
  snprintf(it->name, sizeof it->name, "Stand-in driver, compute capability %d.%d", card().capability / 10,
           card().capability % 10);
  memset(&it->uuid, 1, sizeof it->uuid);
  it->totalGlobalMem = card().capacity;
  it->major = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
  it->minor = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  it->warpSize = attribute(CU_DEVICE_ATTRIBUTE_WARP_SIZE);
  it->multiProcessorCount = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  it->sharedMemPerBlock = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK);
  it->sharedMemPerBlockOptin = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
  it->sharedMemPerMultiprocessor = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR);
  it->regsPerBlock = attribute(CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK);
  it->regsPerMultiprocessor = attribute(CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR);
  it->maxThreadsPerBlock = attribute(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
  it->maxThreadsPerMultiProcessor = attribute(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR);
  it->maxBlocksPerMultiProcessor = attribute(CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR);
  it->memoryBusWidth = attribute(CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH);
  it->l2CacheSize = attribute(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
  it->totalConstMem = attribute(CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY);
  it->textureAlignment = attribute(CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT);
  it->memPitch = 2147483647;
  const int threads[] = {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X, CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y,
                         CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z};
  const int blocks[] = {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X, CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y,
                        CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z};
  for (int axis = 0; axis < 3; axis++) {
    it->maxThreadsDim[axis] = attribute(threads[axis]);
    it->maxGridSize[axis] = attribute(blocks[axis]);
  }
  it->unifiedAddressing = it->concurrentKernels = it->asyncEngineCount = it->cooperativeLaunch = 1;
  it->streamPrioritiesSupported = it->canUseHostPointerForRegisteredMem = 1;
  return cudaSuccess;
}

} // extern "C"
