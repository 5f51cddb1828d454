// The sort of LSH attention in CUDA C++. Launches on `stream` (a cudaStream_t) of the current device, waits for nothing, and
// returns the launch's cudaError_t.
#pragma once
#include "common/view.h"

namespace longattn::cuda {

struct LshSort {
  View keys;         // [B, H, R, N] int32, contiguous; what is outside [0, n_keys) counts as the nearest key
  View cu_seqlens;   // [P+1] int32 on the device, or empty: one sequence
  View order, rank;  // [B, H, R, N] int32, contiguous: positions by place, chunk by position
  View workspace;    // bytes on the device
  int64_t n_keys = 0;
  int64_t chunk = 0;
};

// bytes of workspace for so many rows (B H R) of N keys
int64_t lsh_sort_workspace(int64_t rows, int64_t N, int64_t n_keys, int64_t sequences);
int lsh_sort(const LshSort& x, uintptr_t stream);

}  // namespace longattn::cuda
