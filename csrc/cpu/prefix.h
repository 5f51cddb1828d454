// The prefix-state engine: one chunk of the causal product
//     y_i = sum_{j <= i} (a_i . b_j) c_j  +  a_i . State,        State += sum_j b_j c_j^T
// Forward and every gradient of linear attention are this product with other operands; run on rows in reverse order it
// sums over j >= i.
//
// The state is kept in two levels: `local` since the segment's start and `base` before it; `current` is their sum. So a
// segment computed on its own and one computed after its predecessors give the same bits.
#pragma once
#include "tile.h"

namespace longattn::LONGATTN_ISA {

constexpr int64_t chunk = 64;

// a leading dimension of whole cache lines, an odd number of them: columns then spread over all sets of the cache
template <class T>
inline int64_t leading(int64_t n) {
  constexpr int64_t line = 64 / sizeof(T);
  int64_t lines = (n + line - 1) / line;
  return (lines | 1) * line;
}

template <class T>
struct Matrix {
  T* p = nullptr;
  int64_t ld = 0;
  T* row(int64_t i) const { return p + i * ld; }
};

// p[i][j] = a_i . b_j for j <= i, with b_transposed [depth][rows]; above the diagonal p is unspecified
template <class T>
inline void scores(int64_t rows, int64_t depth, Matrix<T> a, Matrix<T> b_transposed, Matrix<T> p) {
  for_tiles<T>(rows, padded<T>(rows), [&](auto R, auto N, int64_t row, int64_t column) {
    if (column >= row + R) return;
    Tile<T, R, N> tile;
    tile.zero();
    tile.multiply_add(a.row(row), a.ld, b_transposed.p + column, b_transposed.ld, depth);
    tile.store_to(p.row(row) + column, p.ld);
  });
}

// y = tril(p) c + a state, with state [depth][columns]; either part may be left out (null), and y may be added to
template <class T>
inline void outputs(int64_t rows, Matrix<T> p, Matrix<T> c, int64_t depth, Matrix<T> a, Matrix<T> state, int64_t columns,
                    Matrix<T> y, bool add) {
  for_tiles<T>(rows, padded<T>(columns), [&](auto R, auto N, int64_t row, int64_t column) {
    Tile<T, R, N> tile;
    if (add) tile.load_from(y.row(row) + column, y.ld);
    else tile.zero();
    if (p.p) {
      tile.multiply_add(p.row(row), p.ld, c.p + column, c.ld, row);
      tile.multiply_add_triangle(p.row(row) + row, p.ld, c.row(row) + column, c.ld);
    }
    if (state.p) tile.multiply_add(a.row(row), a.ld, state.p + column, state.ld, depth);
    tile.store_to(y.row(row) + column, y.ld);
  });
}

template <class T>
struct State {
  Matrix<T> base, local, current;
};

// local += b^T c over the rows, current = base + local
template <class T>
inline void accumulate(int64_t rows, int64_t depth, Matrix<T> b_transposed, Matrix<T> c, int64_t columns, State<T> state) {
  for_tiles<T>(depth, padded<T>(columns), [&](auto R, auto N, int64_t row, int64_t column) {
    Tile<T, R, N> tile;
    tile.load_from(state.local.row(row) + column, state.local.ld);
    tile.multiply_add(b_transposed.row(row), b_transposed.ld, c.p + column, c.ld, rows);
    tile.store_to(state.local.row(row) + column, state.local.ld);
    tile.store_sum(state.base.row(row) + column, state.current.row(row) + column, state.base.ld);
  });
}

// z_i = sum_{j <= i} p[i][j] + a_i . sums for a square of rows at a time; p may be null, a is zero-padded
template <class T>
inline void normalizers(int64_t rows, Matrix<T> p, int64_t depth, Matrix<T> a, const T* sums, T* z) {
  constexpr int W = width<T>;
  V<T> lane;
  for (int i = 0; i < W; ++i) lane[i] = T(i);
  for (int64_t first = 0; first < rows; first += W) {
    V<T> block[W];
    for (int r = 0; r < W; ++r) {
      int64_t i = std::min(first + r, rows - 1);
      V<T> total{};
      if (p.p) {
        int64_t j = 0;
        for (; j + W <= i + 1; j += W) total += load(p.row(i) + j);
        // what lies above the diagonal may hold anything
        if (j <= i) total += lane <= T(i - j) ? load(p.row(i) + j) : V<T>{};
      }
      for (int64_t m = 0; m < depth; m += W) total = fma(load(a.row(i) + m), load(sums + m), total);
      block[r] = total;
    }
    transpose_square<T>(block);
    V<T> total = block[0];
    for (int r = 1; r < W; ++r) total += block[r];
    store(z + first, total);
  }
}

}  // namespace longattn::LONGATTN_ISA
