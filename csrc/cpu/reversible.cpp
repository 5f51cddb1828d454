// x + f and x - f of a reversible layer, with f rounded to a grid on the way.
#include <atomic>

#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace longattn::LONGATTN_ISA {

namespace {

constexpr int64_t block = 1 << 14;  // elements of a task

template <class T>
inline V<T> magnitude(V<T> x) {
  typedef UInt<T> Lanes __attribute__((vector_size(vector_bytes)));
  return (V<T>)((Lanes)x & (std::numeric_limits<UInt<T>>::max() >> 1));
}

// to the nearest whole number, half to even; NaN and what is whole for its size stay
template <class T>
inline V<T> nearest(V<T> x) {
  constexpr T shift = sizeof(T) == 4 ? T(1 << 23) : T(int64_t(1) << 52);
  V<T> size = magnitude<T>(x), whole = (size + shift) - shift;
  whole = x < T(0) ? -whole : whole;
  return size < shift ? whole : x;
}

template <class T>
struct Rounding {
  T grid, inverse, limit;
  bool subtract;

  V<T> operator()(V<T> x, V<T> f, V<T>& largest) const {
    if (grid > 0) f = nearest<T>(f * inverse) * grid;
    V<T> y = subtract ? x - f : x + f, size = magnitude<T>(y);
    // NaN is never the larger
    largest = size > largest ? size : largest;
    return y;
  }
};

template <class T, class From>
inline V<T> load_to(const From* p) {
  if constexpr (sizeof(T) == 4 && sizeof(From) <= 4) return load_as(p);
  V<T> x;
  for (int i = 0; i < width<T>; ++i) x[i] = static_cast<T>(convert(p[i]));
  return x;
}
template <class T, class To>
inline void store_to(To* p, V<T> x) {
  if constexpr (sizeof(T) == 4) store_as(p, x);
  else store(p, x);
}

// whether a result reaches the limit
template <class X, class F>
bool add(const X* x, const F* f, X* out, int64_t n, const ReversibleAdd& how) {
  using T = std::conditional_t<std::is_same_v<X, double>, double, float>;
  constexpr int W = width<T>;
  Rounding<T> sum{T(how.grid), how.grid > 0 ? T(1 / how.grid) : T(0), T(how.limit), how.subtract};
  V<T> largest{};
  int64_t i = 0;
  for (; i + W <= n; i += W) store_to<T>(out + i, sum(load_to<T>(x + i), load_to<T>(f + i), largest));
  if (i < n) {
    V<T> left{}, right{};
    for (int64_t j = 0; i + j < n; ++j) left[j] = convert(x[i + j]), right[j] = static_cast<T>(convert(f[i + j]));
    V<T> y = sum(left, right, largest);
    for (int64_t j = 0; i + j < n; ++j) convert_to(y[j], out[i + j]);
  }
  T most = 0;
  for (int j = 0; j < W; ++j) most = std::max<T>(most, largest[j]);
  return how.grid > 0 && most >= sum.limit;
}

}  // namespace

bool reversible_add(const ReversibleAdd& how) {
  expect(how.x.rank == 1, "x must be [N]");
  int64_t n = how.x.size[0];
  expect_shape(how.f, "f", {n}), expect_shape(how.out, "out", {n}), expect_dtype(how.out, "out", how.x.dtype);
  for (const View* v : {&how.x, &how.f, &how.out}) {
    expect(n < 2 || v->stride[0] == 1, "x, f and out must be contiguous");
    expect(v->dtype <= DType::f16, "x, f and out must be floating point");
  }
  expect(how.threads >= 1, "threads must be positive");
  std::atomic<bool> over{false};
  parallel_tasks((n + block - 1) / block, how.threads, [&](int64_t task, int) {
    int64_t first = task * block, count = std::min(block, n - first);
    with_type(how.x.dtype, [&](auto x) {
      with_type(how.f.dtype, [&](auto f) {
        using X = decltype(x);
        using F = decltype(f);
        if (add(how.x.as<X>() + first, how.f.as<F>() + first, how.out.as<X>() + first, count, how)) over = true;
      });
    });
  });
  return over;
}

}  // namespace longattn::LONGATTN_ISA
