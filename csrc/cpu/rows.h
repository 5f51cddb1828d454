// Rows of a tensor to and from the working type: any dtype, any strides, feature maps on the way in.
#pragma once
#include <algorithm>

#include "common/view.h"
#include "simd.h"

namespace longattn::LONGATTN_ISA {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

inline float from_f16(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023, bits;
  if (exponent == 31) bits = sign | 0x7f800000 | fraction << 13;
  else if (exponent) bits = sign | (exponent + 112) << 23 | fraction << 13;
  else {
    float tiny = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -tiny : tiny;
  }
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint16_t to_f16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // subnormal in half: adding 0.5 lets the float unit round to 2^-24
    float shifted;
    std::memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;
    std::memcpy(&magnitude, &shifted, 4);
    return static_cast<uint16_t>(sign | (magnitude - 0x3f000000));
  }
  magnitude += 0xfff + (magnitude >> 13 & 1);  // to nearest, ties to even
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000) >> 13);
}

inline float convert(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float convert(f16 x) { return from_f16(x.bits); }
inline float convert(float x) { return x; }
inline double convert(double x) { return x; }

inline void convert_to(float x, float& y) { y = x; }
inline void convert_to(double x, double& y) { y = x; }
inline void convert_to(float x, f16& y) { y.bits = to_f16(x); }
inline void convert_to(float x, bf16& y) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  y.bits = static_cast<uint16_t>(x != x ? (bits >> 16 | 0x40) : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// one vector of the working type from contiguous memory of another type
template <class From>
inline V<float> load_as(const From* p) {
  constexpr int W = width<float>;
  if constexpr (std::is_same_v<From, bf16>) {
    HalfBits narrow;
    std::memcpy(&narrow, p, sizeof narrow);
    return (V<float>)(__builtin_convertvector(narrow, Bits) << 16);
#if defined(__F16C__) && LONGATTN_VECTOR_BYTES == 32
  } else if constexpr (std::is_same_v<From, f16>) {
    return (V<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
#if defined(__AVX512F__) && LONGATTN_VECTOR_BYTES == 64
  } else if constexpr (std::is_same_v<From, f16>) {
    return (V<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#endif
  } else {
    V<float> x;
    for (int i = 0; i < W; ++i) x[i] = convert(p[i]);
    return x;
  }
}
template <>
inline V<float> load_as<float>(const float* p) { return load(p); }
inline V<double> load_as(const double* p) { return load(p); }

template <class To>
inline void store_as(To* p, V<float> x) {
  constexpr int W = width<float>;
  if constexpr (std::is_same_v<To, bf16>) {
    HalfBits narrow = __builtin_convertvector(round_to_bf16(x), HalfBits);
    std::memcpy(static_cast<void*>(p), &narrow, sizeof narrow);
#if defined(__F16C__) && LONGATTN_VECTOR_BYTES == 32
  } else if constexpr (std::is_same_v<To, f16>) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
#if defined(__AVX512F__) && LONGATTN_VECTOR_BYTES == 64
  } else if constexpr (std::is_same_v<To, f16>) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  } else {
    for (int i = 0; i < W; ++i) convert_to(x[i], p[i]);
  }
}
template <>
inline void store_as<float>(float* p, V<float> x) { store(p, x); }
inline void store_as(double* p, V<double> x) { store(p, x); }

// feature maps and their derivatives

enum class Feature : int { identity = 0, elu = 1, relu = 2 };
constexpr double relu_epsilon = 1e-3;

template <class T>
inline V<T> map(V<T> x, Feature feature) {
  switch (feature) {
    case Feature::elu: return x > T(0) ? x + T(1) : exp_nonpositive(x > T(0) ? V<T>{} : x);
    case Feature::relu: return (x <= T(0) ? V<T>{} : x) + T(relu_epsilon);
    default: return x;
  }
}

// the derivative times g
template <class T>
inline V<T> pull_back(V<T> x, V<T> g, Feature feature) {
  switch (feature) {
    case Feature::elu: return x > T(0) ? g : g * exp_nonpositive(x > T(0) ? V<T>{} : x);
    case Feature::relu: return x <= T(0) ? V<T>{} : g;
    default: return g;
  }
}

// one row, [n] with a stride, through a feature map to `to`, zero up to the next whole vector (a map of 0 is not 0)
template <class T, class From>
inline void load_row(const From* p, int64_t stride, int64_t n, T* to, Feature feature = Feature::identity) {
  constexpr int W = width<T>;
  int64_t i = 0;
  if (stride == 1) {
    if (feature == Feature::elu)
      for (; i + W <= n; i += W) store(to + i, map<T>(load_as(p + i), Feature::elu));
    else
      for (; i + W <= n; i += W) store(to + i, map<T>(load_as(p + i), feature));
  }
  for (; i < n; i += W) {
    V<T> x{};
    int64_t count = std::min<int64_t>(W, n - i);
    for (int64_t j = 0; j < count; ++j) x[j] = convert(p[(i + j) * stride]);
    x = map<T>(x, feature);
    for (int64_t j = count; j < W; ++j) x[j] = T(0);
    store(to + i, x);
  }
}

template <class T, class To>
inline void store_row(const T* from, To* p, int64_t n) {
  constexpr int W = width<T>;
  int64_t i = 0;
  for (; i + W <= n; i += W) store_as(p + i, load(from + i));
  for (; i < n; ++i) convert_to(from[i], p[i]);
}

// runs f with the C++ type of a dtype
template <class F>
inline void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
    default: return;
  }
}

}  // namespace longattn::LONGATTN_ISA
