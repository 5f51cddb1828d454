// Vectors of the widest registers this translation unit may use, as GCC vector types: one source for every instruction
// set, with intrinsics only where the compiler has no word for the instruction.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace longattn::LONGATTN_ISA {

// LONGATTN_VECTOR_BYTES may be set wider than the machine's registers: the compiler then splits the vectors, which lets
// a narrow machine run the logic of the wide kernels
#if !defined(LONGATTN_VECTOR_BYTES)
#if defined(__AVX512F__)
#define LONGATTN_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define LONGATTN_VECTOR_BYTES 32
#else
#define LONGATTN_VECTOR_BYTES 16
#endif
#endif

constexpr int vector_bytes = LONGATTN_VECTOR_BYTES;
template <class T>
constexpr int width = vector_bytes / sizeof(T);

template <class T>
struct vector_of {
  typedef T type __attribute__((vector_size(vector_bytes)));
  typedef T unaligned __attribute__((vector_size(vector_bytes), aligned(sizeof(T)), may_alias));
};
template <class T>
using V = typename vector_of<T>::type;

template <class T>
inline V<T> load(const T* p) { return *reinterpret_cast<const typename vector_of<T>::unaligned*>(p); }
template <class T>
inline void store(T* p, V<T> x) { *reinterpret_cast<typename vector_of<T>::unaligned*>(p) = x; }
// whole numbers in lanes of the same size
template <class T>
using Int = typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type;
template <class T>
using UInt = typename std::make_unsigned<Int<T>>::type;

// x - 0 and not x + 0, which would lose the sign of -0
template <class T>
inline V<T> broadcast(T x) { return x - V<T>{}; }

inline V<float> fma(V<float> a, V<float> b, V<float> c) {
#if defined(__AVX512F__) && LONGATTN_VECTOR_BYTES == 64
  return (V<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && LONGATTN_VECTOR_BYTES == 32
  return (V<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
inline V<double> fma(V<double> a, V<double> b, V<double> c) {
#if defined(__AVX512F__) && LONGATTN_VECTOR_BYTES == 64
  return (V<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__) && LONGATTN_VECTOR_BYTES == 32
  return (V<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

typedef uint32_t Bits __attribute__((vector_size(vector_bytes)));
typedef uint16_t HalfBits __attribute__((vector_size(vector_bytes / 2)));

// bfloat16, to nearest and ties to even, in the low half of each lane; NaN stays NaN
inline Bits round_to_bf16(V<float> x) {
  Bits bits = (Bits)x, number = (Bits)(x == x);
  return (((bits + 0x7fff + (bits >> 16 & 1)) >> 16) & number) | ((bits >> 16 | 0x40) & ~number);
}

// Two bfloat16 in 32 bits: what the dot product instructions multiply and add to a float32 lane. LONGATTN_BF16_PAIRS
// turns them on without the instruction, so that any machine can run the logic.
struct Pair { uint32_t bits; };
#if (defined(__AVX512BF16__) && LONGATTN_VECTOR_BYTES == 64) || defined(LONGATTN_BF16_PAIRS)
constexpr bool has_pairs = true;
#else
constexpr bool has_pairs = false;
#endif
inline Bits load(const Pair* p) {
  Bits x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(Pair* p, Bits x) { std::memcpy(static_cast<void*>(p), &x, sizeof x); }
inline Bits broadcast(Pair x) { return x.bits - Bits{}; }
inline V<float> fma(Bits a, Bits b, V<float> c) {
#if defined(__AVX512BF16__) && LONGATTN_VECTOR_BYTES == 64
  return (V<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
  V<float> low_a = (V<float>)(a << 16), low_b = (V<float>)(b << 16);
  V<float> high_a = (V<float>)(a & 0xffff0000), high_b = (V<float>)(b & 0xffff0000);
  return fma(low_a, low_b, fma(high_a, high_b, c));
#endif
}

// the lanes in a fixed order, halves first
template <class T>
inline T sum(V<T> x) {
  T lane[width<T>];
  store(lane, x);
  for (int n = width<T> / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lane[i] += lane[i + n];
  return lane[0];
}

// a where a > b, else b: so b where one is NaN
inline V<float> larger(V<float> a, V<float> b) {
#if defined(__AVX512F__) && LONGATTN_VECTOR_BYTES == 64
  return (V<float>)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__) && LONGATTN_VECTOR_BYTES == 32
  return (V<float>)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
inline V<double> larger(V<double> a, V<double> b) { return a > b ? a : b; }

// e^r 2^-n of x = r + n log 2 with |r| <= log(2)/2, and n as a float and with the bits of a shifted one
struct Reduced {
  V<float> p, n, shifted;
};
inline __attribute__((always_inline)) Reduced reduced_exp(V<float> x) {
  V<float> shifted = fma(x, broadcast(1.44269504f), broadcast(12582912.f));  // 1.5 * 2^23 rounds to the nearest integer
  V<float> n = shifted - 12582912.f;
  V<float> r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  V<float> p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  return {fma(p, r * r, r + 1.f), n, shifted};
}

// e^x for x <= 0, NaN stays NaN, gradual underflow; error below 2 ulp
inline __attribute__((always_inline)) V<float> exp_nonpositive(V<float> x) {
  // NaN fails the comparison and passes through
  Reduced e = reduced_exp(x < -104.f ? broadcast(-104.f) : x);
#if defined(__AVX512F__) && LONGATTN_VECTOR_BYTES == 64
  return (V<float>)_mm512_scalef_ps((__m512)e.p, (__m512)e.n);
#else
  // 2^n in two factors, so that n below -126 reaches the subnormals
  typedef int32_t I __attribute__((vector_size(vector_bytes)));
  I whole = (I)e.shifted - (I)broadcast(12582912.f), half = whole >> 1;
  V<float> low = (V<float>)((half + 127) << 23), high = (V<float>)((whole - half + 127) << 23);
  return e.p * low * high;
#endif
}
// the same down to e^-86 and never below: for what is a share of something near 1
inline __attribute__((always_inline)) V<float> exp_share(V<float> x) {
#if defined(__AVX512F__) && LONGATTN_VECTOR_BYTES == 64
  return exp_nonpositive(x);
#else
  x = larger(broadcast(-86.f), x);
  Reduced e = reduced_exp(x);
  // a NaN's payload would reach the exponent
  return fma(x, V<float>{}, (V<float>)((Bits)e.p + ((Bits)e.shifted << 23)));
#endif
}
inline V<double> exp_nonpositive(V<double> x) {
  double lane[width<double>];
  store(lane, x);
  for (double& value : lane) value = std::exp(value);
  return load(lane);
}
inline V<double> exp_share(V<double> x) { return exp_nonpositive(x); }

// transposes a square of vectors in log2(width) rounds of exchanging halves
template <class T, int Half>
inline void exchange(V<T> (&x)[width<T>]) {
  typedef typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type Index;
  typedef Index I __attribute__((vector_size(vector_bytes)));
  constexpr int W = width<T>;
  I low, high;
  for (int i = 0; i < W; ++i) {
    bool upper = i & Half;
    low[i] = upper ? W + i - Half : i;
    high[i] = upper ? W + i : i + Half;
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & Half) continue;
    V<T> a = x[i], b = x[i + Half];
    x[i] = __builtin_shuffle(a, b, low);
    x[i + Half] = __builtin_shuffle(a, b, high);
  }
}
template <class T>
inline void transpose_square(V<T> (&x)[width<T>]) {
  if constexpr (width<T> >= 16) exchange<T, 8>(x);
  if constexpr (width<T> >= 8) exchange<T, 4>(x);
  if constexpr (width<T> >= 4) exchange<T, 2>(x);
  exchange<T, 1>(x);
}

// [rows][n] -> [n][rows]; both leading dimensions leave room for whole vectors, and what lies past `rows` and `n` is
// carried along (zeros stay zeros)
template <class T>
inline void transpose(const T* from, int64_t ld_from, int64_t rows, int64_t n, T* to, int64_t ld_to) {
  constexpr int W = width<T>;
  for (int64_t i = 0; i < rows; i += W)
    for (int64_t j = 0; j < n; j += W) {
      V<T> block[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) block[r] = load(from + (i + r) * ld_from + j);
      transpose_square<T>(block);
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) store(to + (j + r) * ld_to + i, block[r]);
    }
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
template <class T>
inline int64_t padded(int64_t n) { return round_up(n, width<T>); }

}  // namespace longattn::LONGATTN_ISA
