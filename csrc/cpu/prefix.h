// The prefix-state engine: one chunk of the causal product
//     y_i = sum_{j <= i} (a_i . b_j) c_j  +  a_i . State,        State += sum_j b_j c_j^T
// Forward and every gradient of linear attention are this product with other operands; run on rows in reverse order it
// sums over j >= i.
//
// The state is kept in two levels: `local` since the segment's start and `base` before it; `current` is their sum. So a
// segment computed on its own and one computed after its predecessors give the same bits. Each chunk is summed from 0
// before it joins `local`: the error then grows with the number of chunks and not of tokens.
//
// Sums may have logarithms: exp-like features are scaled row by row so that nothing overflows, and a state then has a
// `scale` that grows with the largest row it has seen (math of the log-space stabiliser: longattn/features.py).
#pragma once
#include "matrix.h"

namespace longattn::LONGATTN_ISA {

constexpr int64_t chunk = 64;

// p[i][j] = a_i . b_j for j <= i, with b_transposed [depth][rows]; above the diagonal p is unspecified
template <class T, class A>
void scores(int64_t rows, int64_t depth, Matrix<A> a, Matrix<A> b_transposed, Matrix<T> p) {
  for_tiles<T>(rows, padded<T>(rows), [&](auto R, auto N, int64_t row, int64_t column) {
    if (column >= row + R) return;
    Tile<T, R, N> tile;
    tile.zero();
    tile.multiply_add(a.row(row), a.ld, b_transposed.p + column, b_transposed.ld, depth);
    tile.store_to(p.row(row) + column, p.ld);
  });
}

// what a chunk's rows see of the chunk itself: whole tiles through `p` and `c`, the triangle on the diagonal through
// `exact_p` and `exact_c`, which differ where the others are pairs; all null where not causal
template <class T, class A>
struct Within {
  Matrix<T> exact_p, exact_c;
  Matrix<A> p, c;
};

// y = tril(p) c + share (a state), with state [depth][columns]; either part may be left out (null), and y may be added to.
// share: a factor for each row, or null for 1
template <class T, class A>
void outputs(int64_t rows, Within<T, A> own, int64_t depth, Matrix<A> a, Matrix<A> state, int64_t columns,
                    Matrix<T> y, bool add, const T* share = nullptr) {
  static_assert(tile_rows % per<A> == 0);
  for_tiles<T>(rows, padded<T>(columns), [&](auto R, auto N, int64_t row, int64_t column) {
    Tile<T, R, N> tile;
    if (share && state.p) {
      tile.zero();
      tile.multiply_add(a.row(row), a.ld, state.p + column, state.ld, depth);
      tile.scale_rows(share + row);
      if (add) tile.add(y.row(row) + column, y.ld);
    } else if (add) {
      tile.load_from(y.row(row) + column, y.ld);
    } else {
      tile.zero();
    }
    if (own.p.p) {
      tile.multiply_add(own.p.row(row), own.p.ld, own.c.p + column, own.c.ld, row / per<A>);
      tile.multiply_add_triangle(own.exact_p.row(row) + row, own.exact_p.ld, own.exact_c.row(row) + column,
                                 own.exact_c.ld);
    }
    if (state.p && !share) tile.multiply_add(a.row(row), a.ld, state.p + column, state.ld, depth);
    tile.store_to(y.row(row) + column, y.ld);
  });
}

template <class T>
struct State {
  Matrix<T> base, local, current;
  T base_scale = nothing<T>, local_scale = nothing<T>, current_scale = nothing<T>;
};

// how `accumulate` weighs the parts of a state whose rows have logarithms of their own
template <class T>
struct Shares {
  T keep, base, local;
};

// makes room for rows with logarithms up to `top`: the shares, and the state's scales after it
template <class T>
inline Shares<T> raise(State<T>& state, T top) {
  T local = std::max(state.local_scale, top);
  Shares<T> shares;
  shares.keep = share_of(state.local_scale, local);
  state.local_scale = local;
  state.current_scale = std::max(state.base_scale, local);
  shares.base = share_of(state.base_scale, state.current_scale);
  shares.local = share_of(local, state.current_scale);
  return shares;
}

// local += b^T c over the rows, current = base + local; with shares, each times its own
template <class T, class A>
void accumulate(int64_t rows, int64_t depth, Matrix<A> b_transposed, Matrix<A> c, int64_t columns,
                       const State<T>& state, const Shares<T>* shares = nullptr) {
  for_tiles<T>(depth, padded<T>(columns), [&](auto R, auto N, int64_t row, int64_t column) {
    Tile<T, R, N> tile;
    tile.zero();
    tile.multiply_add(b_transposed.row(row), b_transposed.ld, c.p + column, c.ld, rows);
    const T* base = state.base.row(row) + column;
    T *local = state.local.row(row) + column, *current = state.current.row(row) + column;
    if (shares) {
      tile.add_multiple(local, state.local.ld, shares->keep);
      tile.store_to(local, state.local.ld);
      tile.store_merged(base, shares->base, shares->local, current, state.base.ld);
    } else {
      tile.add(local, state.local.ld);
      tile.store_to(local, state.local.ld);
      tile.store_sum(base, current, state.base.ld);
    }
  });
}

// z_i = sum_{j <= i} p[i][j] + share_i (a_i . sums) for a square of rows at a time; p and share may be null, a is
// zero-padded
template <class T>
void normalizers(int64_t rows, Matrix<T> p, int64_t depth, Matrix<T> a, const T* sums, T* z,
                        const T* share = nullptr) {
  constexpr int W = width<T>;
  V<T> lane;
  for (int i = 0; i < W; ++i) lane[i] = T(i);
  for (int64_t first = 0; first < rows; first += W) {
    V<T> block[W];
    for (int r = 0; r < W; ++r) {
      int64_t i = std::min(first + r, rows - 1);
      V<T> total{};
      if (share) {
        for (int64_t m = 0; m < depth; m += W) total = fma(load(a.row(i) + m), load(sums + m), total);
        total *= broadcast(share[i]);
      }
      if (p.p) {
        int64_t j = 0;
        for (; j + W <= i + 1; j += W) total += load(p.row(i) + j);
        // what lies above the diagonal may hold anything
        if (j <= i) total += lane <= T(i - j) ? load(p.row(i) + j) : V<T>{};
      }
      if (!share)
        for (int64_t m = 0; m < depth; m += W) total = fma(load(a.row(i) + m), load(sums + m), total);
      block[r] = total;
    }
    transpose_square<T>(block);
    V<T> total = block[0];
    for (int r = 1; r < W; ++r) total += block[r];
    store(z + first, total);
  }
}

// compiled once, in prefix.cpp: a chunk's work is worth a call
#define LONGATTN_PRODUCTS(extern_, T, A)                                                                              \
  extern_ template void scores<T, A>(int64_t, int64_t, Matrix<A>, Matrix<A>, Matrix<T>);                              \
  extern_ template void outputs<T, A>(int64_t, Within<T, A>, int64_t, Matrix<A>, Matrix<A>, int64_t, Matrix<T>, bool, \
                                      const T*);                                                                      \
  extern_ template void accumulate<T, A>(int64_t, int64_t, Matrix<A>, Matrix<A>, int64_t, const State<T>&,            \
                                         const Shares<T>*);
#define LONGATTN_NORMALIZERS(extern_, T) \
  extern_ template void normalizers<T>(int64_t, Matrix<T>, int64_t, Matrix<T>, const T*, T*, const T*);
LONGATTN_PRODUCTS(extern, float, float)
LONGATTN_PRODUCTS(extern, double, double)
LONGATTN_PRODUCTS(extern, float, Pair)
LONGATTN_NORMALIZERS(extern, float)
LONGATTN_NORMALIZERS(extern, double)

}  // namespace longattn::LONGATTN_ISA
