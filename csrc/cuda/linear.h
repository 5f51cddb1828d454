// Linear attention in CUDA C++: the scan of segment states and the one-token decode step. Launches on `stream` (a
// cudaStream_t) of the current device, waits for nothing, and returns the launch's cudaError_t.
#pragma once
#include "common/view.h"

namespace longattn::cuda {

// states are float32 and contiguous; an empty view stands for one that is not there
struct StateScan {
  View kv, k_sum;                      // [B, H, NS, D, E], [B, H, NS, D]: sums of segments in, states before them out
  View initial_kv, initial_k_sum;      // [B or N, H, D, E], [B or N, H, D]
  View final_kv, final_k_sum;
  View cu_seqlens;                     // [N+1] int32, on the device
  int64_t segment = 0;                 // tokens
  bool reverse = false;                // states after them
};

struct LinearStep {
  View q, k, v;                        // [B, Hq, 1, D], [B, H, 1, D], [B, H, 1, E], any strides
  View mask;                           // [B, 1] bool, true = padded
  View kv, k_sum;                      // incoming state
  View out, normalizer;                // [B, Hq, 1, E], [B, Hq, 1], contiguous
  View new_kv, new_k_sum;              // outgoing state, other memory than the incoming one
  int feature = 0;
  bool normalize = false;
  double scale = 1;
};

int state_scan(const StateScan& x, uintptr_t stream);
int linear_step(const LinearStep& x, uintptr_t stream);
const char* error_string(int error);

}  // namespace longattn::cuda
