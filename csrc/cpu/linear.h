// Linear attention on the CPU: what crosses the boundary. The mathematics is in longattn/reference/{linear,favor}.py.
#pragma once
#include "common/view.h"

namespace longattn {

// FAVOR+ features of rows x: x^ = x / |x| if l2, less the mean of its head for keys, times root; see longattn/features.py
struct FavorMap {
  View projection;         // [P, D] in the working type
  View mean;               // [H, D] in the working type
  double root = 1;
  int kind = 0;            // 0 positive, 1 hyperbolic, 2 relu, 3 trig
  bool l2 = false, exact_diagonal = false;
};

// an empty view stands for an argument that is not there; states are contiguous. M counts features: D without a FavorMap
struct LinearProblem {
  View q, k, v;            // [B, Hq, L, D], [B, H, S, D], [B, H, S, E]
  View mask;               // [B, S] bool, true = padded
  View cu_seqlens;         // [N+1] int32
  View kv, k_sum;          // [B or N, H, M, E], [B or N, H, M]: incoming state
  View log_scale;          // [B or N, H], only with a FavorMap, like every *_scale below
  int feature = 0;
  FavorMap favor;
  bool is_causal = false, normalize = false;
  double scale = 1;
  int64_t segment = 1024;  // tokens, a multiple of the chunk
  bool split = false;      // segments of one head in parallel, in two passes; the same bits either way
  int threads = 1;
  View workspace;          // bytes: linear_workspace(...)
};

// states in slots: of segments, or of the totals of segments
struct StateSlots {
  View kv, k_sum, log_scale;  // [B, H, NS, M, E], [B, H, NS, M], [B, H, NS]
};

struct LinearForward {
  View out, normalizer, row_scale;    // [B, Hq, L, E], [B, Hq, L], [B, Hq, L]
  StateSlots segment;                 // states that segments start from
  StateSlots partial;                 // not causal and split: one slot for each segment of keys
  View kv, k_sum, log_scale;          // outgoing state
};

struct LinearBackward {
  View grad_out, grad_kv, grad_k_sum;
  View out, normalizer, row_scale;    // as the forward left them
  StateSlots segment;
  View final_log_scale;
  StateSlots partial;                 // split: one slot for each segment
  View dq, dk, dv, dkv, dk_sum;
  View dkv_scale;                     // [B or N, H], scratch
  View root_q, root_k;                // [B, Hq, L], [B, H, S], scratch: what each row adds to the gradient of root
  View droot;                         // []; without it that gradient is left out
};

}  // namespace longattn
