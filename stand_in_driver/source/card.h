// The card that this library claims to be: what __main__.py was told, read from the environment once.
#pragma once
#include <cstddef>
#include <cstdint>

namespace stand_in {

constexpr size_t MIB = size_t(1) << 20;

enum class Late { nothing, copies, kernels };

struct Card {
  size_t capacity;     // bytes of its memory
  size_t context;      // bytes of these that CUDA's context and libraries take
  size_t largest_copy; // bytes: larger copies between host and device are left out, so that they touch no memory
  int capability;      // ten times the compute capability: 86 is 8.6
  bool growing;        // whether it has virtual memory management, which segments that grow need
  Late late;           // what runs as late as events allow; the rest runs when it is asked for
};

const Card& card();

// The value of a cudaDeviceAttr, or of the CUdevice_attribute of the same number; 0 for what the card lacks.
int attribute(int which);

// Says once per process, in the report that __main__.py reads, that `name` was asked for and how it was judged.
// kind: "missing" (not answered), "refused" (invalid, an error was returned), "value" (no value was computed).
void note(const char* kind, const char* name);

} // namespace stand_in
