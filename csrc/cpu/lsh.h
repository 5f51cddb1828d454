// Hashing and sorting for LSH attention on the CPU: what crosses the boundary. The mathematics is in
// longattn/reference/lsh.py.
#pragma once
#include <vector>

#include "common/view.h"

namespace longattn {

struct LshHash {
  View x, extra;               // [B, Hx, N, D]; [B, Hx, N] float32 or empty: a last coordinate
  View rotations;              // [H, R, D or D+1, C] float32
  std::vector<int64_t> factors;  // even; factor f has the next factors[f] / 2 of the C columns
  int threads = 1;
  View buckets;                // [B, Hx, R, N] int32, contiguous
  View workspace;
};

struct LshSort {
  View keys, cu_seqlens;       // [B, H, R, N] int32, contiguous; [P+1] int32 or empty
  int64_t n_keys = 0, chunk = 1;
  int threads = 1;
  View order, rank;            // like keys
  View workspace;              // int32, threads * n_keys
};

}  // namespace longattn
