// What the Toeplitz product by Fourier transforms works on: pieces of sequences that share a transform, rows laid out for
// it, and its memory. The mathematics is in longattn/ops/_toeplitz_fft.py.
#pragma once
#include "fft.h"
#include "matrix.h"
#include "rows.h"
#include "sequences.h"
#include "toeplitz.h"

namespace longattn::LONGATTN_ISA {

// a causal sequence is cut into spans of queries, each with eight times as many keys as the one before: see `spans` in
// longattn/ops/_toeplitz_fft.py
constexpr int64_t span_growth = 8, shortest_span = 64;
// a head's features are cut into so many parts at most, whatever the number of threads
constexpr int64_t most_parts = 4;

// queries of one sequence, and the keys that they may see
struct Piece {
  int64_t b, first_q, n_q, first_k, n_k;
  int64_t offset;          // place of the first query among the keys
};

template <class F>
void for_pieces(const ToeplitzProblem& x, F&& f) {
  int64_t L = x.q.size[2], S = x.k.size[2];
  Sequences all{x.cu_seqlens, x.cu_seqlens ? x.cu_seqlens.size[0] - 1 : x.q.size[0], 1};
  for (int64_t n = 0; n < all.N; ++n) {
    Sequence queries = all.sequence(n, L), keys = all.sequence(n, S);
    auto take = [&](int64_t low, int64_t high, int64_t n_k) {
      if (low < high && n_k > 0) f(Piece{queries.b, queries.start + low, high - low, keys.start, n_k, x.offset + low});
    };
    if (!x.is_causal || queries.length != keys.length) {
      take(0, queries.length, keys.length);
      continue;
    }
    int64_t stop = queries.length, first = 0;
    if (x.mask) {
      const bool* padded_ = x.mask.as<bool>() + keys.b * x.mask.stride[0] + keys.start * x.mask.stride[1];
      while (first < stop && padded_[first * x.mask.stride[1]]) ++first;
      if (first == stop) first = 0;
    }
    for (; stop - first > shortest_span; stop = first + (stop - first) / span_growth)
      take(first + (stop - first) / span_growth, stop, stop);
    take(0, stop, stop);
  }
}

// rows [n][width] as panels [width / W][n][W]: one panel is what the lanes of a vector take of every token
template <class T>
struct Panels {
  static constexpr int W = width<T>;
  T* p = nullptr;
  int64_t pitch = 0;       // tokens from one panel to the next
  T* vector(int64_t panel, int64_t i = 0) const { return p + (panel * pitch + i) * W; }
  // of one column, `W` apart from token to token
  const T* column(int64_t n) const { return vector(n / W) + n % W; }
  void put_row(int64_t i, int64_t width, const T* row) const {
    for (int64_t c = 0; c < width; c += W) store(vector(c / W, i), load(row + c));
  }
};

// a factor that is broadcast, times one that is not, of every token; strides may be 0
template <class T>
struct Factors {
  const T* scalar;
  int64_t scalar_stride;
  const T* row;
  int64_t row_stride;
  V<T> operator()(int64_t i) const { return broadcast(scalar[i * scalar_stride]) * load(row + i * row_stride); }
};

// walks over memory as Arena does, without the gaps between rows
struct Carver {
  char* memory;
  int64_t bytes = 0;
  template <class A>
  A* take(int64_t n) {
    A* p = reinterpret_cast<A*>(memory + bytes);
    bytes += round_up(n * static_cast<int64_t>(sizeof(A)), 64);
    return p;
  }
};

// of one head while it is worked on
template <class T>
struct FftHead {
  Panels<T> q, k, v, g;            // g: gradients of the numerator, then `down` of its weight
  T* down = nullptr;
  Panels<T> values, weights;       // sums over the features of each part: values of its panels, lanes of weights
  T *dq = nullptr, *dk = nullptr;  // [M][tokens]
  double* correlation = nullptr;   // of each part, [length] of (re, im)

  FftHead(Carver& at, int64_t M, int64_t E, int64_t n_q, int64_t n_k, int64_t length, int64_t parts, bool backward) {
    int64_t m = padded<T>(M) / width<T>, e = padded<T>(E) / width<T>;
    auto panels = [&](int64_t count, int64_t n) { return Panels<T>{at.take<T>(count * n * width<T>), n}; };
    // tokens in whole vectors, and panels an odd number of vectors apart
    n_q = padded<T>(n_q) + 1, n_k = padded<T>(n_k) + 1;
    q = panels(m, n_q), k = panels(m, n_k), v = panels(e, n_k);
    values = panels(e * parts, backward ? n_k : n_q);
    if (!backward) {
      weights = panels(parts, n_q);
      return;
    }
    g = panels(e, n_q), down = at.take<T>(n_q);
    dq = at.take<T>(m * width<T> * n_q), dk = at.take<T>(m * width<T> * n_k);
    correlation = at.take<double>(parts * 2 * length);
  }
};

template <class T>
void fft_forward(const ToeplitzProblem&, const ToeplitzForward&);
// rows: filled
template <class T>
void fft_backward(const ToeplitzProblem&, const ToeplitzBackward&);
template <class T>
int64_t fft_workspace(const ToeplitzProblem&, bool backward);

}  // namespace longattn::LONGATTN_ISA
