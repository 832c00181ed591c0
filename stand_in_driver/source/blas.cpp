// Handles and descriptors of cuBLAS. Its products are among what build.py adds: they succeed and compute nothing.
//
// The wheels' headers of cuBLAS include others that no wheel has, so the declarations here are by hand: handles are
// pointers, status and modes are ints, 0 is success.
#include <cstddef>
#include <cstdint>

namespace {

constexpr size_t SIZE = 512; // of a handle or descriptor: nobody looks into it

int make(void** handle) {
  *handle = new char[SIZE]();
  return 0;
}
int remove(void* handle) {
  delete[] static_cast<char*>(handle);
  return 0;
}

// cublasLtMatmulHeuristicResult_t
struct Algorithm {
  uint64_t data[8];
  size_t workspace;
  int state;
  float waves;
  int unused[4];
};

} // namespace

extern "C" {

int cublasCreate_v2(void** handle) { return make(handle); }
int cublasDestroy_v2(void* handle) { return remove(handle); }
int cublasGetMathMode(void*, int* mode) { return *mode = 0; }        // CUBLAS_DEFAULT_MATH
int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0; }  // CUBLAS_POINTER_MODE_HOST

int cublasLtCreate(void** handle) { return make(handle); }
int cublasLtDestroy(void* handle) { return remove(handle); }
int cublasLtMatmulDescCreate(void** it, int, int) { return make(it); }
int cublasLtMatmulDescDestroy(void* it) { return remove(it); }
int cublasLtMatrixLayoutCreate(void** it, int, uint64_t, uint64_t, int64_t) { return make(it); }
int cublasLtMatrixLayoutDestroy(void* it) { return remove(it); }
int cublasLtMatmulPreferenceCreate(void** it) { return make(it); }
int cublasLtMatmulPreferenceDestroy(void* it) { return remove(it); }

// One algorithm fits whatever is asked for, and needs no workspace.
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, Algorithm* found, int* count) {
  *found = {};
  *count = 1;
  return 0;
}

} // extern "C"
