// The runtime's last error, one for each thread.
#pragma once
#include <driver_types.h>

namespace stand_in {

// Remembers an error for cudaGetLastError(), and returns it.
cudaError_t failed(cudaError_t error);

} // namespace stand_in
