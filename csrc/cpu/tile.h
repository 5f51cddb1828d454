// Register tiles: small matrix products whose accumulators never leave the registers. The left factor is broadcast
// element by element, the right one is read in whole vectors.
#pragma once
#include <algorithm>
#include <limits>

#include "simd.h"

namespace longattn::LONGATTN_ISA {

// accumulators fill most of the registers and leave room for the right factor and one broadcast
#if LONGATTN_VECTOR_BYTES == 64
constexpr int tile_rows = 8, tile_vectors = 2;
#elif LONGATTN_VECTOR_BYTES == 32
constexpr int tile_rows = 6, tile_vectors = 2;
#else
constexpr int tile_rows = 4, tile_vectors = 2;
#endif

// two sums in units of their own: every merge of states goes through here, so that all give the same bits
template <class T>
inline V<T> merge(V<T> a, T a_share, V<T> b, T b_share) {
  return fma(broadcast(a_share), a, broadcast(b_share) * b);
}

// `scale` of a sum: the sum itself is what is stored times e^scale; -infinity for a sum of nothing
template <class T>
constexpr T nothing = -std::numeric_limits<T>::infinity();
// e^(log - scale) for log <= scale, 0 for nothing
template <class T>
inline T share_of(T log, T scale) { return log == nothing<T> ? T(0) : std::exp(log - scale); }

template <class T, int R, int N>
struct Tile {
  V<T> acc[R][N];

  void zero() {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] = V<T>{};
  }
  void load_from(const T* p, int64_t ld) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] = load(p + r * ld + n * width<T>);
  }
  void add(const T* p, int64_t ld) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] += load(p + r * ld + n * width<T>);
  }
  void store_to(T* p, int64_t ld) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) store(p + r * ld + n * width<T>, acc[r][n]);
  }
  // acc += factor * what is there
  void add_multiple(const T* p, int64_t ld, T factor) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] = fma(broadcast(factor), load(p + r * ld + n * width<T>), acc[r][n]);
  }
  void scale_rows(const T* factor) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] *= broadcast(factor[r]);
  }
  // to = from_share * from + own_share * acc
  void store_merged(const T* from, T from_share, T own_share, T* to, int64_t ld) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        int64_t at = r * ld + n * width<T>;
        store(to + at, merge<T>(load(from + at), from_share, acc[r][n], own_share));
      }
  }
  // to = from + acc
  void store_sum(const T* from, T* to, int64_t ld) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        int64_t at = r * ld + n * width<T>;
        store(to + at, load(from + at) + acc[r][n]);
      }
  }
  // acc += a b with a [R][depth] and b [depth][N vectors], in float or in pairs of bfloat16
  template <class A>
  void multiply_add(const A* a, int64_t lda, const A* b, int64_t ldb, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k) {
      decltype(load(b)) right[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) right[n] = load(b + k * ldb + n * width<T>);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        auto left = broadcast(a[r * lda + k]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[r][n] = fma(left, right[n], acc[r][n]);
      }
    }
  }
  // acc += a^T b with a [depth][R]
  template <class A>
  void multiply_add_transposed(const A* a, int64_t lda, const A* b, int64_t ldb, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k) {
      decltype(load(b)) right[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) right[n] = load(b + k * ldb + n * width<T>);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        auto left = broadcast(a[k * lda + r]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[r][n] = fma(left, right[n], acc[r][n]);
      }
    }
  }
  // acc[r] += sum over k <= r of a[r][k] b[k]: what lies above the diagonal is never read, so its NaN cannot leak
  void multiply_add_triangle(const T* a, int64_t lda, const T* b, int64_t ldb) {
#pragma GCC unroll 16
    for (int k = 0; k < R; ++k) {
      V<T> right[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) right[n] = load(b + k * ldb + n * width<T>);
#pragma GCC unroll 16
      for (int r = k; r < R; ++r) {
        V<T> left = broadcast(a[r * lda + k]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[r][n] = fma(left, right[n], acc[r][n]);
      }
    }
  }
};

template <int R, class F>
inline void with_rows(int64_t rows, F&& f) {
  if constexpr (R == 1) f(std::integral_constant<int, 1>{});
  else if (rows >= R) f(std::integral_constant<int, R>{});
  else with_rows<R - 1>(rows, f);
}

// calls f(R, N, row, column) for tiles that cover rows x columns (columns a multiple of the vector width), column blocks
// outermost so that the right factor's block stays in the nearest cache
template <class T, class F>
inline void for_tiles(int64_t rows, int64_t columns, F&& f) {
  constexpr int W = width<T>;
  auto column_block = [&](auto N, int64_t column) {
    for (int64_t row = 0; row < rows; row += tile_rows)
      with_rows<tile_rows>(rows - row, [&](auto R) { f(R, N, row, column); });
  };
  int64_t column = 0;
  for (; column + tile_vectors * W <= columns; column += tile_vectors * W)
    column_block(std::integral_constant<int, tile_vectors>{}, column);
  for (; column < columns; column += W) column_block(std::integral_constant<int, 1>{}, column);
}

}  // namespace longattn::LONGATTN_ISA
