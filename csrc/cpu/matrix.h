// Matrices in scratch memory, and bfloat16 pairs of their elements.
#pragma once
#include "tile.h"

namespace longattn::LONGATTN_ISA {

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

// A product reads its factors as T or, for bfloat16 inputs, as pairs (then A is Pair and depths count pairs).
template <class A>
constexpr int64_t per = std::is_same_v<A, Pair> ? 2 : 1;

// the first whole cache line of memory that callers make 64 bytes longer than what is asked for
inline char* first_line(char* memory) { return memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64; }

template <class T>
struct Arena {
  char* memory;
  int64_t bytes = 0;
  template <class A = T>
  Matrix<A> take(int64_t rows, int64_t columns) {
    int64_t ld = leading<A>(columns);
    Matrix<A> m{reinterpret_cast<A*>(memory + bytes), ld};
    bytes += round_up(rows * ld * static_cast<int64_t>(sizeof(A)), 64);
    return m;
  }
};

// rows of T as pairs along the row (zero from n on, whole vectors of pairs), and pairs of two successive rows
inline void pair_along(int64_t rows, int64_t n, Matrix<float> from, Matrix<Pair> to) {
  constexpr int W = width<float>;
  for (int64_t r = 0; r < rows; ++r) {
    uint16_t* row = reinterpret_cast<uint16_t*>(to.row(r));
    for (int64_t i = 0; i < round_up(n, 2 * W); i += W) {
      HalfBits x = __builtin_convertvector(i < n ? round_to_bf16(load(from.row(r) + i)) : Bits{}, HalfBits);
      std::memcpy(row + i, &x, sizeof x);
    }
  }
}
inline void pair_across(int64_t rows, int64_t n, Matrix<float> from, Matrix<Pair> to) {
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t i = 0; i < n; i += width<float>) {
      Bits second = r + 1 < rows ? round_to_bf16(load(from.row(r + 1) + i)) : Bits{};
      store(to.row(r / 2) + i, round_to_bf16(load(from.row(r) + i)) | second << 16);
    }
}

}  // namespace longattn::LONGATTN_ISA
