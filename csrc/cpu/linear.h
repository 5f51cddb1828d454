// Linear attention on the CPU: what crosses the boundary. The mathematics is in longattn/reference/linear.py.
#pragma once
#include "common/view.h"

namespace longattn {

// an empty view stands for an argument that is not there; states are contiguous
struct LinearProblem {
  View q, k, v;            // [B, Hq, L, D], [B, H, S, D], [B, H, S, E]
  View mask;               // [B, S] bool, true = padded
  View cu_seqlens;         // [N+1] int32
  View kv, k_sum;          // [B or N, H, D, E], [B or N, H, D]: incoming state
  int feature = 0;
  bool is_causal = false, normalize = false;
  double scale = 1;
  int64_t segment = 1024;  // tokens, a multiple of the chunk
  bool split = false;      // segments of one head in parallel, in two passes; the same bits either way
  int threads = 1;
  View workspace;          // bytes: threads times linear_workspace(...)
};

struct LinearForward {
  View out, normalizer;               // [B, Hq, L, E], [B, Hq, L]
  View segment_kv, segment_k_sum;     // [B, H, NS, D, E], [B, H, NS, D]: states that segments start from
  View partial_kv, partial_k_sum;     // not causal and split: one slot for each segment of keys
  View kv, k_sum;                     // outgoing state
};

struct LinearBackward {
  View grad_out, grad_kv, grad_k_sum;
  View out, normalizer, segment_kv, segment_k_sum;   // as the forward left them
  View partial_kv, partial_k_sum;                    // split: one slot for each segment
  View dq, dk, dv, dkv, dk_sum;
};

}  // namespace longattn
