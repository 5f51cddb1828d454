// FAVOR+ features of a row and their pull-back, in log space: features are phi e^a with phi around 1 or below. The
// projection itself is a register-tile product; this is what happens to its result.
#pragma once
#include "prefix.h"
#include "rows.h"

namespace longattn::LONGATTN_ISA {

enum class Kind : int { positive = 0, hyperbolic = 1, relu = 2, trig = 3 };

inline bool is_paired(Kind kind) { return kind == Kind::hyperbolic || kind == Kind::trig; }

template <class T>
inline V<T> lanes() {
  V<T> lane;
  for (int i = 0; i < width<T>; ++i) lane[i] = T(i);
  return lane;
}
template <class T>
inline V<T> below(V<T> x, int64_t n) { return lanes<T>() < T(n) ? x : V<T>{}; }

template <class T>
inline T dot(const T* a, const T* b, int64_t n) {
  V<T> total{};
  for (int64_t i = 0; i < n; i += width<T>) total = fma(load(a + i), load(b + i), total);
  return sum<T>(total);
}

template <class T>
inline T largest(V<T> x) {
  T lane[width<T>];
  store(lane, x);
  for (int n = width<T> / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lane[i] = lane[i] > lane[i + n] ? lane[i] : lane[i + n];
  return lane[0];
}

// the largest of P numbers, or of their magnitudes; a NaN is passed over, for it spoils the row by itself
template <class T>
inline T largest(const T* u, int64_t P, bool magnitude) {
  constexpr int W = width<T>;
  V<T> top = broadcast(nothing<T>);
  int64_t i = 0;
  for (; i + W <= P; i += W) {
    V<T> x = load(u + i);
    if (magnitude) x = x < T(0) ? -x : x;
    top = x > top ? x : top;
  }
  T most = largest<T>(top);
  for (; i < P; ++i) {
    T x = magnitude ? std::abs(u[i]) : u[i];
    most = x > most ? x : most;
  }
  return most;
}

// x / |x|, scaled by its largest component on the way so that no square overflows or vanishes; 0 stays 0. -> 1 / |x|
template <class T>
inline T normalize_row(T* x, int64_t D) {
  constexpr int W = width<T>;
  T most = largest<T>(x, D, true);
  if (!(most > T(0))) return T(0);
  for (int64_t i = 0; i < D; i += W) store(x + i, load(x + i) / broadcast(most));
  T length = std::sqrt(dot(x, x, D));
  for (int64_t i = 0; i < D; i += W) store(x + i, load(x + i) / broadcast(length));
  return T(1) / most / length;
}

// in `f`: the projections u [P], zero-padded, become phi [M], zero-padded. half_square: |x|^2 / 2. -> a
// f has room for whole vectors past both P and M
template <class T>
inline T features_of(T* f, int64_t P, Kind kind, T half_square) {
  constexpr int W = width<T>;
  int64_t M = is_paired(kind) ? 2 * P : P;
  T a = T(0);
  switch (kind) {
    case Kind::positive: {
      T top = largest<T>(f, P, false);
      for (int64_t i = 0; i < P; i += W) store(f + i, exp_share(load(f + i) - broadcast(top)));
      a = top - half_square;
      break;
    }
    case Kind::hyperbolic: {
      T top = largest<T>(f, P, true);
      // from the back: the upper half is written over nothing that is still to be read
      for (int64_t i = (P - 1) / W * W; i >= 0; i -= W) {
        V<T> u = load(f + i);
        V<T> up = exp_share(u - broadcast(top)), down = exp_share(-u - broadcast(top));
        int64_t n = std::min<int64_t>(W, P - i);
        T lane[W];
        store(lane, down);
        std::copy_n(lane, n, f + P + i);
        store(lane, up);
        std::copy_n(lane, n, f + i);
      }
      a = top - half_square;
      break;
    }
    case Kind::relu:
      for (int64_t i = 0; i < P; i += W) store(f + i, map<T>(load(f + i), Feature::relu));
      break;
    case Kind::trig:
      for (int64_t i = P - 1; i >= 0; --i) {
        T u = f[i];
        f[P + i] = std::cos(u);
        f[i] = std::sin(u);
      }
      a = half_square;
      break;
  }
  std::fill_n(f + M, padded<T>(M) - M, T(0));
  return a;
}

// in `g`: the gradient of phi [M] becomes that of u [P], zero-padded. -> the gradient of a, sum phi g (0 for relu)
template <class T>
inline T pull_back_features(const T* phi, T* g, int64_t P, Kind kind) {
  constexpr int W = width<T>;
  T down = T(0);
  switch (kind) {
    case Kind::positive: {
      V<T> total{};
      for (int64_t i = 0; i < P; i += W) {
        V<T> x = load(phi + i) * load(g + i);
        total += x;
        store(g + i, x);
      }
      down = sum<T>(total);
      break;
    }
    case Kind::hyperbolic: {
      V<T> total{};
      for (int64_t i = 0; i < P; i += W) {
        V<T> up = load(phi + i) * load(g + i), low = load(phi + P + i) * load(g + P + i);
        total += below<T>(up + low, P - i);
        store(g + i, below<T>(up - low, P - i));
      }
      down = sum<T>(total);
      break;
    }
    case Kind::relu:
      // an input so small that adding the constant loses it counts as 0
      for (int64_t i = 0; i < P; i += W) store(g + i, load(phi + i) > T(relu_epsilon) ? load(g + i) : V<T>{});
      break;
    case Kind::trig:
      for (int64_t i = 0; i < P; ++i) {
        down += phi[i] * g[i] + phi[P + i] * g[P + i];
        g[i] = phi[P + i] * g[i] - phi[i] * g[P + i];
      }
      break;
  }
  std::fill_n(g + P, padded<T>(P) - P, T(0));
  return down;
}

}  // namespace longattn::LONGATTN_ISA
