// The exclusive scan of segment states, in order or in reverse: base_{s+1} = base_s + total_s, one after the other, so
// that the bits are those of every other engine. One element of the state per thread; memory is touched once.
#include <cuda_runtime.h>

#include "cuda/linear.h"

namespace longattn::cuda {
namespace {

constexpr int threads = 256;
constexpr int in_flight = 4;  // the additions are a chain, the loads need not be

struct Tensor {
  float* states;
  const float* initial;
  float* final_state;
  int64_t size;  // elements of one state
};

__device__ void scan_element(const Tensor& x, int64_t row, int64_t element, int64_t first, int64_t count, bool reverse) {
  float base = x.initial ? x.initial[row * x.size + element] : 0.f;
  float* p = x.states + (reverse ? first + count - 1 : first) * x.size + element;
  int64_t step = reverse ? -x.size : x.size;
  for (int64_t s = 0; s < count; s += in_flight) {
    float total[in_flight];
#pragma unroll
    for (int i = 0; i < in_flight; ++i) total[i] = s + i < count ? p[i * step] : 0.f;
#pragma unroll
    for (int i = 0; i < in_flight; ++i) {
      if (s + i >= count) break;
      p[i * step] = base;
      base += total[i];
    }
    p += in_flight * step;
  }
  x.final_state[row * x.size + element] = base;
}

__global__ void state_scan_kernel(Tensor kv, Tensor k_sum, const int32_t* cu_seqlens, int64_t heads, int64_t slots,
                                  int64_t segment, bool reverse, int64_t elements) {
  int64_t size = kv.size + k_sum.size;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < elements; i += int64_t(gridDim.x) * blockDim.x) {
    int64_t row = i / size, element = i % size, first = row * slots, count = slots;
    if (cu_seqlens) {
      int64_t sequence = row / heads, start = cu_seqlens[sequence], stop = cu_seqlens[sequence + 1];
      int64_t offset = start / segment + sequence;
      // boundaries live on the device, where no one has checked them: stay inside the head's slots
      count = start >= 0 && stop > start ? (stop - start + segment - 1) / segment : 0;
      if (offset + count > slots) count = offset < slots ? slots - offset : 0;
      first = row % heads * slots + offset;
    }
    if (element < kv.size) scan_element(kv, row, element, first, count, reverse);
    else scan_element(k_sum, row, element - kv.size, first, count, reverse);
  }
}

}  // namespace

int state_scan(const StateScan& x, uintptr_t stream) {
  expect(x.kv.rank == 5, "segment states must be [B, H, NS, D, E]");
  int64_t B = x.kv.size[0], H = x.kv.size[1], slots = x.kv.size[2], D = x.kv.size[3], E = x.kv.size[4];
  int64_t sequences = x.cu_seqlens ? x.cu_seqlens.size[0] - 1 : B;
  expect_shape(x.k_sum, "segment_k_sum", {B, H, slots, D});
  expect_shape(x.final_kv, "state", {sequences, H, D, E});
  expect_shape(x.final_k_sum, "state", {sequences, H, D});
  if (x.initial_kv) {
    expect_shape(x.initial_kv, "state", {sequences, H, D, E});
    expect_shape(x.initial_k_sum, "state", {sequences, H, D});
  }
  expect(x.segment > 0 && (!x.cu_seqlens || (B == 1 && x.cu_seqlens.dtype == DType::i32)),
         "packed sequences need batch size 1, int32 boundaries and a positive segment");
  for (const View* v : {&x.kv, &x.k_sum, &x.final_kv, &x.final_k_sum})
    expect(v->dtype == DType::f32, "states must be float32");
  Tensor kv{x.kv.as<float>(), x.initial_kv.as<float>(), x.final_kv.as<float>(), D * E};
  Tensor k_sum{x.k_sum.as<float>(), x.initial_k_sum.as<float>(), x.final_k_sum.as<float>(), D};
  int64_t elements = sequences * H * (kv.size + k_sum.size);
  if (!elements) return cudaSuccess;
  int64_t blocks = (elements + threads - 1) / threads;
  int grid = static_cast<int>(blocks < (1 << 20) ? blocks : 1 << 20);
  state_scan_kernel<<<grid, threads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      kv, k_sum, x.cu_seqlens.as<int32_t>(), H, slots, x.segment, x.reverse, elements);
  return cudaGetLastError();
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace longattn::cuda
