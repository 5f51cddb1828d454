// Fourier transforms of many rows at once: every lane of a vector is a row of its own, so that a transform has no shuffles
// and any row is computed as if it were alone.
//
// A convolution goes down through the radices and up again depth first, and meets its factors where a part of the
// spectrum is in the nearest cache. The spectrum's order is the one in which the stages leave it: both directions take
// the same, so nothing is ever reordered.
#pragma once
#include <algorithm>

#include "simd.h"

namespace longattn::LONGATTN_ISA {

template <class T>
struct Point {
  V<T> re, im;
};
template <class T>
inline Point<T> load_point(const T* p) { return {load(p), load(p + width<T>)}; }
template <class T>
inline void store_point(T* p, Point<T> x) { store(p, x.re), store(p + width<T>, x.im); }
template <class T>
inline Point<T> operator+(Point<T> a, Point<T> b) { return {a.re + b.re, a.im + b.im}; }
template <class T>
inline Point<T> operator-(Point<T> a, Point<T> b) { return {a.re - b.re, a.im - b.im}; }
// a w, or a times the conjugate of w
template <bool conjugate, class T>
inline Point<T> times(Point<T> a, T re, T im) {
  V<T> r = broadcast(re), i = broadcast(im);
  if (conjugate) return {a.re * r + a.im * i, a.im * r - a.re * i};
  return {a.re * r - a.im * i, a.re * i + a.im * r};
}

// f(0), .. f(Count - 1), as constants
template <int Count, class F>
inline void each(F&& f) {
  f(std::integral_constant<int, 0>{});
  if constexpr (Count > 1) f(std::integral_constant<int, 1>{});
}

// the smallest 2^a or 3 2^a that is at least n
inline int64_t transform_length(int64_t n) {
  int64_t two = 1;
  while (two < n) two *= 2;
  return two >= 4 && two / 4 * 3 >= n ? two / 4 * 3 : two;
}

template <class T>
class Transform {
  static constexpr int W = width<T>;
  static constexpr int64_t near_bytes = 16 << 10;  // of the points that go down and up in the nearest cache

 public:
  static constexpr int64_t point = 2 * W;          // numbers in one
  static int64_t table_bytes(int64_t length) { return round_up(2 * length * static_cast<int64_t>(sizeof(T)), 64); }

  // table: whole when `fill` is done, and kept by the caller
  Transform(T* table, int64_t length) : table(table) {
    int64_t at = 0;
    for (int64_t m = length; m > 1; m /= radix[levels - 1]) {
      size[levels] = m, first[levels] = at;
      radix[levels] = m % 3 == 0 ? 3 : __builtin_ctzll(static_cast<uint64_t>(m)) % 2 ? 2 : 4;
      at += 2 * (radix[levels] - 1) * (m / radix[levels]);
      ++levels;
    }
    size[levels] = 1;
  }
  int64_t length() const { return size[0]; }
  void fill() const {
    for (int level = 0; level < levels; ++level) {
      T* w = table + first[level];
      for (int64_t k = 0; k < size[level] / radix[level]; ++k)
        for (int q = 1; q < radix[level]; ++q) {
          double angle = -6.28318530717958647692 * static_cast<double>(q * k) / static_cast<double>(size[level]);
          *w++ = static_cast<T>(std::cos(angle)), *w++ = static_cast<T>(std::sin(angle));
        }
    }
  }
  // rows get(c, i) -> their spectra, in x[c] -> meet(first, count) works on `count` points of them from `first` on -> back,
  // times the length, to put(c, i, point)
  template <int Count, class Get, class Put, class Meet>
  void convolve(T* const (&x)[Count], Get&& get, Put&& put, Meet&& meet) const {
    if (levels == 0) {
      each<Count>([&](auto c) { store_point(x[c], get(c, 0)); });
      meet(0, 1);
      return each<Count>([&](auto c) { put(c, 0, load_point(x[c])); });
    }
    each<Count>([&](auto c) {
      T* own = x[c];
      stage<false>(0, [&](int64_t i) { return get(c, i); }, [own](int64_t i, Point<T> y) { store_point(own + i * point, y); });
    });
    for (int64_t at = 0; at < size[0]; at += size[1]) within<Count>(x, 1, at, meet);
    each<Count>([&](auto c) {
      const T* own = x[c];
      stage<true>(0, [own](int64_t i) { return load_point(own + i * point); }, [&](int64_t i, Point<T> y) { put(c, i, y); });
    });
  }

 private:
  T* table;
  int levels = 0;
  int radix[64];
  int64_t size[65], first[64];

  template <int Count, class Meet>
  void within(T* const (&x)[Count], int level, int64_t at, Meet&& meet) const {
    int64_t m = size[level];
    if (m * point * static_cast<int64_t>(sizeof(T)) <= near_bytes) {
      for (int c = 0; c < Count; ++c)
        for (int l = level; l < levels; ++l)
          for (int64_t i = at; i < at + m; i += size[l]) in_place<false>(x[c] + i * point, l);
      meet(at, m);
      for (int c = 0; c < Count; ++c)
        for (int l = levels - 1; l >= level; --l)
          for (int64_t i = at; i < at + m; i += size[l]) in_place<true>(x[c] + i * point, l);
      return;
    }
    for (int c = 0; c < Count; ++c) in_place<false>(x[c] + at * point, level);
    for (int64_t i = at; i < at + m; i += size[level + 1]) within<Count>(x, level + 1, i, meet);
    for (int c = 0; c < Count; ++c) in_place<true>(x[c] + at * point, level);
  }
  template <bool inverse>
  void in_place(T* x, int level) const {
    stage<inverse>(level, [x](int64_t i) { return load_point(x + i * point); },
                   [x](int64_t i, Point<T> y) { store_point(x + i * point, y); });
  }

  static Point<T> turned(Point<T> a, bool inverse) { return inverse ? Point<T>{-a.im, a.re} : Point<T>{a.im, -a.re}; }
  template <bool inverse>
  static void cross(Point<T>& x0, Point<T>& x1, Point<T>& x2, Point<T>& x3) {
    Point<T> a = x0 + x2, b = x0 - x2, c = x1 + x3, d = turned(x1 - x3, inverse);
    x0 = a + c, x1 = b + d, x2 = a - c, x3 = b - d;
  }
  // one stage on the points of its size: down, its twiddles come after the sums, up before them
  template <bool inverse, class Get, class Put>
  __attribute__((always_inline)) void stage(int level, Get&& get, Put&& put) const {
    int64_t h = size[level] / radix[level];
    const T* w = table + first[level];
    if (radix[level] == 4) {
      if (h == 1) {
        Point<T> x0 = get(0), x1 = get(1), x2 = get(2), x3 = get(3);
        cross<inverse>(x0, x1, x2, x3);
        return put(0, x0), put(1, x1), put(2, x2), put(3, x3);
      }
      for (int64_t k = 0; k < h; ++k, w += 6) {
        Point<T> x0 = get(k), x1 = get(k + h), x2 = get(k + 2 * h), x3 = get(k + 3 * h);
        if (inverse) x1 = times<true>(x1, w[0], w[1]), x2 = times<true>(x2, w[2], w[3]), x3 = times<true>(x3, w[4], w[5]);
        cross<inverse>(x0, x1, x2, x3);
        if (!inverse) x1 = times<false>(x1, w[0], w[1]), x2 = times<false>(x2, w[2], w[3]), x3 = times<false>(x3, w[4], w[5]);
        put(k, x0), put(k + h, x1), put(k + 2 * h, x2), put(k + 3 * h, x3);
      }
    } else if (radix[level] == 2) {
      for (int64_t k = 0; k < h; ++k, w += 2) {
        Point<T> x0 = get(k), x1 = get(k + h);
        if (inverse) x1 = times<true>(x1, w[0], w[1]);
        Point<T> difference = x0 - x1;
        put(k, x0 + x1), put(k + h, inverse ? difference : times<false>(difference, w[0], w[1]));
      }
    } else {
      const V<T> half = broadcast(T(0.5)), root = broadcast(T(0.86602540378443864676));
      for (int64_t k = 0; k < h; ++k, w += 4) {
        Point<T> x0 = get(k), x1 = get(k + h), x2 = get(k + 2 * h);
        if (inverse) x1 = times<true>(x1, w[0], w[1]), x2 = times<true>(x2, w[2], w[3]);
        Point<T> both = x1 + x2, apart = turned(x1 - x2, inverse);
        Point<T> rest{x0.re - half * both.re, x0.im - half * both.im}, side{root * apart.re, root * apart.im};
        x1 = rest + side, x2 = rest - side;
        if (!inverse) x1 = times<false>(x1, w[0], w[1]), x2 = times<false>(x2, w[2], w[3]);
        put(k, x0 + both), put(k + h, x1), put(k + 2 * h, x2);
      }
    }
  }
};

}  // namespace longattn::LONGATTN_ISA
