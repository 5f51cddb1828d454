// x + f and x - f of a reversible layer, with f rounded to a grid on the way: one pass, four elements of a thread at once.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/reversible.h"

namespace longattn::cuda {
namespace {

constexpr int threads = 256, lanes = 4;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void from_float(float x, float& y) { y = x; }
__device__ void from_float(float x, __half& y) { y = __float2half_rn(x); }
__device__ void from_float(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }

// four of them as one load
template <class T>
struct alignas(lanes * sizeof(T)) Pack { T lane[lanes]; };

template <class X, class F>
__global__ void __launch_bounds__(threads)
reversible_add_kernel(const X* x, const F* f, X* out, int* flag, int64_t n, bool whole, float grid, float inverse,
                      float limit, float sign) {
  int64_t first = (int64_t(blockIdx.x) * threads + threadIdx.x) * lanes;
  if (first >= n) return;
  Pack<X> left;
  Pack<F> right;
  bool full = whole && first + lanes <= n, over = false;
  if (full) {
    left = *reinterpret_cast<const Pack<X>*>(x + first), right = *reinterpret_cast<const Pack<F>*>(f + first);
  } else {
#pragma unroll
    for (int i = 0; i < lanes; ++i)
      if (first + i < n) left.lane[i] = x[first + i], right.lane[i] = f[first + i];
      else from_float(0.f, left.lane[i]), from_float(0.f, right.lane[i]);
  }
#pragma unroll
  for (int i = 0; i < lanes; ++i) {
    float branch = to_float(right.lane[i]);
    if (grid > 0.f) branch = rintf(branch * inverse) * grid;
    float y = fmaf(sign, branch, to_float(left.lane[i]));
    over |= fabsf(y) >= limit;
    from_float(y, left.lane[i]);
  }
  if (full) {
    *reinterpret_cast<Pack<X>*>(out + first) = left;
  } else {
#pragma unroll
    for (int i = 0; i < lanes; ++i)
      if (first + i < n) out[first + i] = left.lane[i];
  }
  // all who write, write the same
  if (flag && over) *flag = 1;
}

template <class X, class F>
int launch(const ReversibleAdd& x, uintptr_t stream) {
  int64_t n = x.x.size[0], blocks = (n + threads * lanes - 1) / (threads * lanes);
  if (!blocks) return cudaSuccess;
  expect(blocks < (int64_t(1) << 31), "reversible_add: more than 2^41 elements");
  auto aligned = [](const View& v, size_t size) { return reinterpret_cast<uintptr_t>(v.data) % (lanes * size) == 0; };
  bool whole = aligned(x.x, sizeof(X)) && aligned(x.out, sizeof(X)) && aligned(x.f, sizeof(F));
  reversible_add_kernel<X, F><<<static_cast<unsigned>(blocks), threads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      x.x.as<X>(), x.f.as<F>(), x.out.as<X>(), x.flag ? x.flag.as<int>() : nullptr, n, whole,
      static_cast<float>(x.grid), x.grid > 0 ? static_cast<float>(1 / x.grid) : 0.f, static_cast<float>(x.limit),
      x.subtract ? -1.f : 1.f);
  return cudaGetLastError();
}

template <class X>
int launch_with(const ReversibleAdd& x, uintptr_t stream) {
  switch (x.f.dtype) {
    case DType::f32: return launch<X, float>(x, stream);
    case DType::f16: return launch<X, __half>(x, stream);
    case DType::bf16: return launch<X, __nv_bfloat16>(x, stream);
    default: throw std::invalid_argument("longattn: reversible_add takes float32, bfloat16 or float16");
  }
}

}  // namespace

int reversible_add(const ReversibleAdd& x, uintptr_t stream) {
  expect(x.x.rank == 1, "x must be [N]");
  int64_t n = x.x.size[0];
  expect_shape(x.f, "f", {n}), expect_shape(x.out, "out", {n}), expect_dtype(x.out, "out", x.x.dtype);
  for (const View* v : {&x.x, &x.f, &x.out}) expect(n < 2 || v->stride[0] == 1, "x, f and out must be contiguous");
  if (x.flag) expect_shape(x.flag, "flag", {1}), expect_dtype(x.flag, "flag", DType::i32);
  switch (x.x.dtype) {
    case DType::f32: return launch_with<float>(x, stream);
    case DType::f16: return launch_with<__half>(x, stream);
    case DType::bf16: return launch_with<__nv_bfloat16>(x, stream);
    default: throw std::invalid_argument("longattn: reversible_add takes float32, bfloat16 or float16");
  }
}

}  // namespace longattn::cuda
