// Linear attention with a factor for each relative position, on the CPU: what crosses the boundary. The mathematics is in
// longattn/reference/toeplitz.py.
#pragma once
#include "linear.h"

namespace longattn {

// an empty view stands for an argument that is not there
struct ToeplitzProblem {
  View q, k;               // features [B, Hq, L, M], [B, H, S, M] in the working type
  View v;                  // [B, H, S, E]
  View c;                  // [Hq, 2 reach + 1] in the working type: the factor of offset t = j - (i + offset) at t + reach
  View mask;               // [B, S] bool, true = padded
  View cu_seqlens;         // [N+1] int32
  int64_t reach = 0;       // offsets beyond it have the factor at the end
  int64_t offset = 0;      // position of the first query among the keys
  bool is_causal = false, normalize = false;
  bool fft = false;        // by Fourier transforms; results then hold 0 before
  int threads = 1;
  View workspace;          // bytes: toeplitz_workspace(...)
};

struct ToeplitzForward {
  View out, normalizer;    // [B, Hq, L, E], [B, Hq, L]
};

struct ToeplitzBackward {
  View grad_out, grad_normalizer, out, normalizer;
  View rows;               // [B, Hq, L, E + 1] in the working type, scratch: gradients of the numerator and of its weight
  View dq, dk, dv;         // of each query head, dk and dv too: [B, Hq, S, M], [B, Hq, S, E]
  View dc;                 // [Hq, 2 reach + 1] in the working type
};

// what a causal stream remembers: sums over the keys that have left the ring, and the last ones as they are
struct RingState {
  View kv, k_sum;          // [B, H, M, E], [B, H, M] in the working type
  View keys, values, mask; // features [B, H, t, M], [B, H, t, E], [B, t] bool
};

// one token of a stream; everything in the working type, contiguous
struct ToeplitzStep {
  View q, k, v;            // [B, Hq, 1, D], [B, H, 1, D], [B, H, 1, E]
  FavorMap favor;          // of rows of unit length; without a projection:
  int feature = 0;         // of linear.h
  View bias;               // [1 or Hq, 2 reach + 1], contiguous
  RingState before;
  bool normalize = false;
  double scale = 1;
  int threads = 1;
  View workspace;          // bytes: toeplitz_step_workspace(...)
  RingState after;         // t + 1 keys, or reach
  View out;                // [B, Hq, 1, E]
};

}  // namespace longattn
