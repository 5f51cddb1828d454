// Softmax attention over listed tiles on the CPU: what crosses the boundary. Which pairs of tokens meet is said in
// csrc/cpu/tiling.h, the mathematics in longattn/reference/{softmax,lsh}.py.
#pragma once
#include "common/view.h"

namespace longattn {

// a query and its own key
enum class SelfRule : int { ordinary = 0, fallback = 1, always = 2 };

// an empty view stands for an argument that is not there
struct SoftmaxProblem {
  View q, k, v;              // [B, Hq, L, D], [B, H, S, D], [B, H, S, E]; without k the keys are the rows of q
  View mask;                 // [B, S] bool, true = padded
  View cu_seqlens;           // [N+1] int32
  View key_scale;            // [B, H, S] in the working type: keys are k times this, and have length 1
  View order_q, order_k;     // [B, Hq, R, L], [B, H, R, S] int32: order[place] = position
  View rank_q, rank_k;       // the same shapes, by position: the key chunk a query is centred on, and the one of a key
  View bias;                 // [Hq, 2K+1] in the working type: added to the score of offset t = j - i at clamp(t, -K, K) + K
  View bucket_q, bucket_k;   // the same shapes, by position: pairs need equal ones
  int64_t chunk = 64, look_back = 0, look_ahead = 0;
  int64_t window = 0;        // pairs are fewer positions apart; 0: they need not be
  bool is_causal = false, dedupe = false, wrap = false;
  SelfRule self = SelfRule::ordinary;
  double scale = 1, dropout_p = 0;
  uint64_t seed = 0;
  int threads = 1;
  View workspace;            // bytes: softmax_workspace(...)
};

struct SoftmaxForward {
  View out, lse;             // [B, Hq, L, E], [B, Hq, L] in the working type
  View top;                  // like lse, scratch: the running maximum
};

struct SoftmaxBackward {
  View grad_out, out, lse;
  View delta;                // like lse, scratch
  View dq, dk, dv;           // contiguous; without k, dq is the whole gradient of q
  View dbias;                // [Hq, 2K+1] in the working type, with a bias
};

}  // namespace longattn
