// The memory of a call: what each worker writes, and what all of them read.
#pragma once
#include "prefix.h"

namespace longattn::LONGATTN_ISA {

struct Sizes {
  int64_t D, E, M, P;  // P projections, 0 without
};

// the scratch of one worker; the same walk over no memory measures it. `forward` keeps the state as [M][E], the backward
// as [E+1][M]
template <class T>
struct Scratch {
  Matrix<T> q, q_transposed, k, k_transposed, v, v_transposed, g, g_transposed, p, out, dk, dv, reverse_transposed;
  State<T> state, reverse;
  T *base_sum, *local_sum, *current_sum, *z;
  bool* masked;
  // FAVOR+: rows before the projection, their gradients, products of scores, logarithms and shares of rows
  Matrix<T> raw_q, raw_k, raw_q_transposed, raw_k_transposed, dx, dx_k, w;
  T *inverse_q, *inverse_k, *log_q, *log_k, *row_scale, *share, *weight;
  // the forward's factors for bfloat16 inputs
  Matrix<Pair> q_pairs, k_pairs, k_pairs_transposed, key_features, v_pairs, p_pairs, state_pairs;
  int64_t bytes;

  Scratch(char* memory, const Sizes& n, bool forward) {
    Arena<T> arena{memory};
    int64_t D = padded<T>(n.D), M = padded<T>(n.M), N = padded<T>(n.E + 1);
    // features are written a vector past both halves of paired kinds
    int64_t slack = n.P ? width<T> : 0;
    for (Matrix<T>* m : {&q, &k, &dk}) *m = arena.take(chunk, M + slack);
    for (Matrix<T>* m : {&q_transposed, &k_transposed}) *m = arena.take(M, chunk);
    for (Matrix<T>* m : {&v, &g, &dv}) *m = arena.take(chunk, N);
    for (Matrix<T>* m : {&v_transposed, &g_transposed}) *m = arena.take(N, chunk);
    p = arena.take(chunk, chunk), out = arena.take(chunk, std::max(M, N) + slack);
    if (!forward) reverse_transposed = arena.take(M, N);
    for (State<T>* s : {&state, &reverse}) {
      if (forward && s == &reverse) continue;
      for (Matrix<T>* m : {&s->base, &s->local, &s->current}) *m = forward ? arena.take(M, N) : arena.take(N, M);
    }
    for (T** sum : {&base_sum, &local_sum, &current_sum}) *sum = arena.take(1, M).p;
    z = arena.take(1, chunk + width<T>).p;
    masked = reinterpret_cast<bool*>(arena.take(1, chunk).p);
    if (n.P) {
      for (Matrix<T>* m : {&raw_q, &raw_k, &dx, &dx_k}) *m = arena.take(chunk, D);
      for (Matrix<T>* m : {&raw_q_transposed, &raw_k_transposed}) *m = arena.take(D, chunk);
      w = arena.take(chunk, chunk);
      for (T** row : {&inverse_q, &inverse_k, &log_q, &log_k, &row_scale, &share, &weight}) *row = arena.take(1, chunk).p;
    }
    if (has_pairs && forward) {
      int64_t pairs = round_up(n.M, 2 * width<T>) / 2;
      for (Matrix<Pair>* m : {&q_pairs, &k_pairs}) *m = arena.template take<Pair>(chunk, pairs);
      k_pairs_transposed = arena.template take<Pair>(padded<T>(pairs), chunk);
      key_features = arena.template take<Pair>(M, chunk / 2);
      v_pairs = arena.template take<Pair>(chunk / 2, N), p_pairs = arena.template take<Pair>(chunk, chunk / 2);
      state_pairs = arena.template take<Pair>(M, N);
    }
    bytes = arena.bytes;
  }
};

// what all workers read: the projection as [P][D] and [D][P]
template <class T>
struct Shared {
  Matrix<T> projection, projection_transposed;
  int64_t bytes;
  Shared(char* memory, const Sizes& n) {
    Arena<T> arena{memory};
    int64_t P = padded<T>(n.P), D = padded<T>(n.D);
    if (P) projection = arena.take(P, D), projection_transposed = arena.take(D, P);
    bytes = arena.bytes;
  }
};

template <class T>
inline int64_t workspace_bytes(const Sizes& n, int threads) {
  int64_t worker = std::max(Scratch<T>(nullptr, n, true).bytes, Scratch<T>(nullptr, n, false).bytes);
  return threads * worker + Shared<T>(nullptr, n).bytes;
}

}  // namespace longattn::LONGATTN_ISA
