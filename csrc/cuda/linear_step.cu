// One token of causal linear attention: the state is read once, updated, written and read out in registers.
// A block owns one key head of one sequence and `columns` value dims; its threads are columns x row groups.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/linear.h"

namespace longattn::cuda {
namespace {

constexpr int columns = 32, row_groups = 8;
constexpr int heads_at_once = 4;  // query heads that share one pass over the state
constexpr int64_t max_dim = 1792;  // with the parts, 46 KiB of shared memory
constexpr float relu_epsilon = 1e-3f;

enum Feature { identity = 0, elu = 1, relu = 2 };

struct Sizes {
  int64_t B, Hq, H, D, E, groups;
  int64_t q_stride[3], k_stride[3], v_stride[3];  // batch, head, dim
  int64_t mask_stride;
};

template <class T>
struct Pointers {
  const T *q, *k, *v;
  const bool* mask;
  const float *kv, *k_sum;
  T* out;
  float *normalizer, *new_kv, *new_k_sum;
};

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void from_float(float x, float& y) { y = x; }
__device__ void from_float(float x, __half& y) { y = __float2half_rn(x); }
__device__ void from_float(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }

__device__ float map(float x, int feature) {
  if (feature == elu) return x > 0.f ? x + 1.f : expf(x);
  // written so that NaN stays NaN
  if (feature == relu) return (x <= 0.f ? 0.f : x) + relu_epsilon;
  return x;
}

template <class T>
__global__ void __launch_bounds__(columns * row_groups)
linear_step_kernel(Pointers<T> x, Sizes n, int feature, bool normalize, float scale) {
  extern __shared__ float shared[];
  float *phi_k = shared, *sums = phi_k + n.D, *phi_q = sums + n.D;  // [D], [D], [heads_at_once][D]
  __shared__ float parts[heads_at_once][row_groups][columns];
  int64_t slices = (n.E + columns - 1) / columns;
  int64_t slice = blockIdx.x % slices, row = blockIdx.x / slices, b = row / n.H, h = row % n.H;
  int column = threadIdx.x % columns, group = threadIdx.x / columns, thread = threadIdx.x;
  int64_t e = slice * columns + column;
  bool padded = x.mask && x.mask[b * n.mask_stride];

  const T* k = x.k + b * n.k_stride[0] + h * n.k_stride[1];
  for (int64_t m = thread; m < n.D; m += blockDim.x) {
    float value = padded ? 0.f : map(to_float(k[m * n.k_stride[2]]), feature);
    phi_k[m] = value;
    sums[m] = x.k_sum[row * n.D + m] + value;
    if (slice == 0) x.new_k_sum[row * n.D + m] = sums[m];
  }
  float v = e < n.E && !padded ? to_float(x.v[b * n.v_stride[0] + h * n.v_stride[1] + e * n.v_stride[2]]) : 0.f;

  for (int64_t first = 0; first < n.groups; first += heads_at_once) {
    int here = static_cast<int>(min(int64_t(heads_at_once), n.groups - first));
    __syncthreads();
    for (int64_t i = thread; i < here * n.D; i += blockDim.x) {
      const T* q = x.q + b * n.q_stride[0] + (h * n.groups + first + i / n.D) * n.q_stride[1];
      phi_q[i] = map(to_float(q[i % n.D * n.q_stride[2]]), feature);
    }
    __syncthreads();
    float total[heads_at_once] = {};
    if (e < n.E)
      for (int64_t m = group; m < n.D; m += row_groups) {
        int64_t at = (row * n.D + m) * n.E + e;
        float state = first == 0 ? fmaf(phi_k[m], v, x.kv[at]) : x.new_kv[at];
        if (first == 0) x.new_kv[at] = state;
#pragma unroll
        for (int g = 0; g < heads_at_once; ++g)
          if (g < here) total[g] = fmaf(phi_q[g * n.D + m], state, total[g]);
      }
#pragma unroll
    for (int g = 0; g < heads_at_once; ++g) parts[g][group][column] = total[g];
    __syncthreads();
    // one row group per query head adds up, in a fixed order
    if (group < here) {
      int64_t head = b * n.Hq + h * n.groups + first + group;
      float sum = 0.f, z = 0.f;
      for (int r = 0; r < row_groups; ++r) sum += parts[group][r][column];
      if (normalize)
        for (int64_t m = 0; m < n.D; ++m) z = fmaf(phi_q[group * n.D + m], sums[m], z);
      float result = !normalize ? scale * sum : z == 0.f ? 0.f : sum / z;
      if (e < n.E) from_float(result, x.out[head * n.E + e]);
      if (normalize && e == 0) x.normalizer[head] = z;
    }
  }
}

template <class T>
int launch(const LinearStep& x, const Sizes& n, uintptr_t stream) {
  Pointers<T> p{x.q.as<T>(), x.k.as<T>(), x.v.as<T>(), x.mask.as<bool>(), x.kv.as<float>(), x.k_sum.as<float>(),
                x.out.as<T>(), x.normalizer.as<float>(), x.new_kv.as<float>(), x.new_k_sum.as<float>()};
  int64_t blocks = n.B * n.H * ((n.E + columns - 1) / columns);
  if (!blocks) return cudaSuccess;
  expect(blocks < (int64_t(1) << 31), "linear_step: batch times heads times value dim is above 2^36");
  size_t bytes = (2 + heads_at_once) * n.D * sizeof(float);
  linear_step_kernel<T><<<static_cast<unsigned>(blocks), columns * row_groups, bytes, reinterpret_cast<cudaStream_t>(stream)>>>(
      p, n, x.feature, x.normalize, static_cast<float>(x.scale));
  return cudaGetLastError();
}

}  // namespace

int linear_step(const LinearStep& x, uintptr_t stream) {
  expect(x.q.rank == 4 && x.k.rank == 4 && x.v.rank == 4, "query, key and value must have 4 dimensions");
  Sizes n{};
  n.B = x.q.size[0], n.Hq = x.q.size[1], n.D = x.q.size[3], n.H = x.k.size[1], n.E = x.v.size[3];
  expect_shape(x.q, "query", {n.B, n.Hq, 1, n.D});
  expect_shape(x.k, "key", {n.B, n.H, 1, n.D});
  expect_shape(x.v, "value", {n.B, n.H, 1, n.E});
  expect(n.H ? n.Hq % n.H == 0 : n.Hq == 0, "query heads must be a multiple of key heads");
  expect(n.D <= max_dim, "linear_step: head_dim is above 1792");
  expect(x.k.dtype == x.q.dtype && x.v.dtype == x.q.dtype && x.out.dtype == x.q.dtype, "dtypes must agree");
  for (const View* v : {&x.kv, &x.new_kv}) expect_shape(*v, "state", {n.B, n.H, n.D, n.E});
  for (const View* v : {&x.k_sum, &x.new_k_sum}) expect_shape(*v, "state", {n.B, n.H, n.D});
  for (const View* v : {&x.kv, &x.new_kv, &x.k_sum, &x.new_k_sum})
    expect(v->dtype == DType::f32, "states must be float32");
  expect(x.kv.data != x.new_kv.data, "linear_step: the new state needs memory of its own");
  expect_shape(x.out, "out", {n.B, n.Hq, 1, n.E});
  if (x.normalize) expect_shape(x.normalizer, "normalizer", {n.B, n.Hq, 1});
  if (x.mask) expect_shape(x.mask, "key_padding_mask", {n.B, 1});
  n.groups = n.H ? n.Hq / n.H : 0;
  const View* from[] = {&x.q, &x.k, &x.v};
  int64_t* to[] = {n.q_stride, n.k_stride, n.v_stride};
  for (int i = 0; i < 3; ++i) {
    to[i][0] = from[i]->stride[0];
    to[i][1] = from[i]->stride[1];
    to[i][2] = from[i]->stride[3];
  }
  n.mask_stride = x.mask ? x.mask.stride[0] : 0;
  switch (x.q.dtype) {
    case DType::f32: return launch<float>(x, n, stream);
    case DType::f16: return launch<__half>(x, n, stream);
    case DType::bf16: return launch<__nv_bfloat16>(x, n, stream);
    default: throw std::invalid_argument("longattn: linear_step takes float32, bfloat16 or float16");
  }
}

}  // namespace longattn::cuda
