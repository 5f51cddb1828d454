// Products of matrices of a tile's size. Every sum runs over the depth in order, from 0 before it joins what is there:
// errors then grow with the number of tiles and not of tokens.
#pragma once
#include "matrix.h"

namespace longattn::LONGATTN_ISA {

// y = a b, or y += a b, with a [rows][depth] and b [depth][columns]; whole vectors of columns are written
template <class T, class A>
void multiply(int64_t rows, int64_t depth, Matrix<A> a, Matrix<A> b, int64_t columns, Matrix<T> y, bool add) {
  for_tiles<T>(rows, padded<T>(columns), [&](auto R, auto N, int64_t row, int64_t column) {
    Tile<T, R, N> tile;
    tile.zero();
    tile.multiply_add(a.row(row), a.ld, b.p + column, b.ld, depth);
    if (add) tile.add(y.row(row) + column, y.ld);
    tile.store_to(y.row(row) + column, y.ld);
  });
}

// y += a^T b with a [depth][rows]
template <class T, class A>
void multiply_transposed(int64_t rows, int64_t depth, Matrix<A> a, Matrix<A> b, int64_t columns, Matrix<T> y) {
  for_tiles<T>(rows, padded<T>(columns), [&](auto R, auto N, int64_t row, int64_t column) {
    Tile<T, R, N> tile;
    tile.zero();
    tile.multiply_add_transposed(a.p + row, a.ld, b.p + column, b.ld, depth);
    tile.add(y.row(row) + column, y.ld);
    tile.store_to(y.row(row) + column, y.ld);
  });
}

// compiled once, in products.cpp
#define LONGATTN_MULTIPLY(extern_, T, A)                                                                           \
  extern_ template void multiply<T, A>(int64_t, int64_t, Matrix<A>, Matrix<A>, int64_t, Matrix<T>, bool);          \
  extern_ template void multiply_transposed<T, A>(int64_t, int64_t, Matrix<A>, Matrix<A>, int64_t, Matrix<T>);
LONGATTN_MULTIPLY(extern, float, float)
LONGATTN_MULTIPLY(extern, double, double)
LONGATTN_MULTIPLY(extern, float, Pair)

}  // namespace longattn::LONGATTN_ISA
