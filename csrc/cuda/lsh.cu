// Stable counting sort of every row of keys within each packed sequence, by digits of up to 9 bits, lowest first: one pass up
// to 512 keys, two up to 2^18. A pass counts the digits of each tile, scans the counts over tiles and digits, and scatters.
// Ranks within a warp come from matching lanes, so that a row of equal keys takes no longer than any other.
#include <cuda_runtime.h>

#include "cuda/lsh.h"

namespace longattn::cuda {
namespace {

constexpr int lanes = 32, warps = 8, threads = lanes * warps;
constexpr int per_lane = 16;                         // keys of a lane in one tile
constexpr int per_warp = per_lane * lanes, tile = per_warp * warps;
constexpr int max_bits = 9, max_bins = 1 << max_bits;
constexpr unsigned all_lanes = 0xffffffffu;

struct Plan {
  int64_t rows, N, sequences, slots;  // slots: tiles of a row; packed, a bound that needs no look at the boundaries
  int passes, bits, bins;
};

Plan plan_of(int64_t rows, int64_t N, int64_t n_keys, int64_t sequences, bool packed) {
  int total = 1;
  while (total < 31 && (int64_t{1} << total) < n_keys) ++total;
  Plan p{rows, N, sequences, 0, (total + max_bits - 1) / max_bits, 0, 0};
  p.bits = (total + p.passes - 1) / p.passes;
  p.bins = 1 << p.bits;
  p.slots = packed ? N / tile + sequences : (N + tile - 1) / tile;
  return p;
}

struct Job {
  const int32_t *keys, *cu_seqlens, *from;  // from: order of the pass before, or null
  int32_t *to, *rank, *counts;              // rank: null but in the last pass; counts [rows, slots, bins]
  Plan plan;
  int32_t last_key;
  int64_t chunk;
  int shift;
};

struct Span {
  int64_t start, stop;   // places of the sequence
  int64_t begin, end;    // places of the tile
};

__host__ __device__ inline int64_t clipped(int64_t x, int64_t N) { return x < 0 ? 0 : x > N ? N : x; }

// boundaries live on the device, where no one has checked them: what comes from them stays inside the row
__host__ __device__ inline Span span_of(const Job& job, int64_t slot) {
  int64_t N = job.plan.N, start = 0, stop = N, within = slot;
  if (job.cu_seqlens) {
    int64_t sequence = 0, last = job.plan.sequences - 1;
    while (sequence < last) {
      int64_t middle = (sequence + last + 1) / 2;
      if (clipped(job.cu_seqlens[middle], N) / tile + middle <= slot) sequence = middle;
      else last = middle - 1;
    }
    start = clipped(job.cu_seqlens[sequence], N);
    stop = clipped(job.cu_seqlens[sequence + 1], N);
    within = slot - start / tile - sequence;
  }
  int64_t begin = start + within * tile, end = begin + tile < stop ? begin + tile : stop;
  return {start, stop, begin, begin < end && within >= 0 ? end : begin};
}

__device__ inline int32_t position(const Job& job, int64_t row, int64_t place) {
  return job.from ? static_cast<int32_t>(clipped(job.from[row * job.plan.N + place], job.plan.N - 1))
                  : static_cast<int32_t>(place);
}

__device__ inline int digit(const Job& job, int64_t row, int32_t position) {
  int32_t key = job.keys[row * job.plan.N + position];
  key = key < 0 ? 0 : key > job.last_key ? job.last_key : key;
  return key >> job.shift & (job.plan.bins - 1);
}

__global__ void __launch_bounds__(threads) count_kernel(Job job) {
  __shared__ int32_t bins[max_bins];
  int64_t row = blockIdx.x / job.plan.slots, slot = blockIdx.x % job.plan.slots;
  Span span = span_of(job, slot);
  if (span.begin >= span.end) return;
  for (int b = threadIdx.x; b < job.plan.bins; b += threads) bins[b] = 0;
  __syncthreads();
  // whole warps enter every step: all lanes take part in the match
  for (int64_t base = span.begin; base < span.end; base += threads) {
    int64_t place = base + threadIdx.x;
    int d = place < span.end ? digit(job, row, position(job, row, place)) : -1;
    unsigned peers = __match_any_sync(all_lanes, d);
    if (d >= 0 && static_cast<int>(threadIdx.x) % lanes == __ffs(peers) - 1) atomicAdd(&bins[d], __popc(peers));
  }
  __syncthreads();
  int32_t* counts = job.counts + blockIdx.x * int64_t(job.plan.bins);
  for (int b = threadIdx.x; b < job.plan.bins; b += threads) counts[b] = bins[b];
}

// counts of the tiles of a sequence become the places, from its start, where their digits go
__global__ void __launch_bounds__(max_bins) scan_kernel(Job job) {
  __shared__ int32_t sums[max_bins / lanes];
  int64_t row = blockIdx.x / job.plan.sequences, sequence = blockIdx.x % job.plan.sequences;
  int64_t N = job.plan.N, first = 0, stop = N, slot = 0;
  if (job.cu_seqlens) {
    first = clipped(job.cu_seqlens[sequence], N), stop = clipped(job.cu_seqlens[sequence + 1], N);
    slot = first / tile + sequence;
  }
  int64_t tiles = stop > first ? (stop - first + tile - 1) / tile : 0;
  if (slot + tiles > job.plan.slots) tiles = job.plan.slots - slot;
  int bin = threadIdx.x, lane = bin % lanes, warp = bin / lanes, bins = job.plan.bins;
  int32_t* p = job.counts + (row * job.plan.slots + slot) * bins + bin;
  int32_t total = 0;
  if (bin < bins)
    for (int64_t t = 0; t < tiles; ++t) total += p[t * bins];
  int32_t sum = total;  // over the lanes up to this one
  for (int step = 1; step < lanes; step *= 2) {
    int32_t before = __shfl_up_sync(all_lanes, sum, step);
    if (lane >= step) sum += before;
  }
  if (lane == lanes - 1) sums[warp] = sum;
  __syncthreads();
  int32_t base = sum - total;
  for (int w = 0; w < warp; ++w) base += sums[w];
  if (bin < bins)
    for (int64_t t = 0; t < tiles; ++t) {
      int32_t here = p[t * bins];
      p[t * bins] = base;
      base += here;
    }
}

__global__ void __launch_bounds__(threads) scatter_kernel(Job job) {
  __shared__ int32_t next[warps][max_bins];
  int64_t N = job.plan.N, row = blockIdx.x / job.plan.slots, slot = blockIdx.x % job.plan.slots;
  Span span = span_of(job, slot);
  if (span.begin >= span.end) return;
  int warp = threadIdx.x / lanes, lane = threadIdx.x % lanes, bins = job.plan.bins;
  for (int b = lane; b < bins; b += lanes) next[warp][b] = 0;
  __syncwarp();
  int32_t positions[per_lane];
  int digits[per_lane];
  int64_t begin = span.begin + int64_t(warp) * per_warp;
#pragma unroll
  for (int k = 0; k < per_lane; ++k) {
    int64_t place = begin + k * lanes + lane;
    bool there = place < span.end;
    positions[k] = there ? position(job, row, place) : 0;
    digits[k] = there ? digit(job, row, positions[k]) : -1;
  }
#pragma unroll
  for (int k = 0; k < per_lane; ++k) {
    unsigned peers = __match_any_sync(all_lanes, digits[k]);
    if (digits[k] >= 0 && lane == __ffs(peers) - 1) next[warp][digits[k]] += __popc(peers);
    // the next step's leader of the same digit may be another lane
    __syncwarp();
  }
  __syncthreads();
  const int32_t* counts = job.counts + blockIdx.x * int64_t(bins);
  for (int b = threadIdx.x; b < bins; b += threads) {
    int32_t at = counts[b];
    for (int w = 0; w < warps; ++w) {
      int32_t here = next[w][b];
      next[w][b] = at;
      at += here;
    }
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < per_lane; ++k) {
    int d = digits[k];
    unsigned peers = __match_any_sync(all_lanes, d);
    int32_t at = d >= 0 ? next[warp][d] : 0;
    // every lane has read before the first of the peers writes, and has written before any reads again
    __syncwarp();
    if (d >= 0 && lane == __ffs(peers) - 1) next[warp][d] = at + __popc(peers);
    __syncwarp();
    at += __popc(peers & ((1u << lane) - 1));
    if (d >= 0 && at >= 0 && span.start + at < N) {
      job.to[row * N + span.start + at] = positions[k];
      if (job.rank) job.rank[row * N + positions[k]] = static_cast<int32_t>(at / job.chunk);
    }
  }
}

int64_t count_bytes(const Plan& p) { return p.rows * p.slots * p.bins * int64_t(sizeof(int32_t)); }

}  // namespace

int64_t lsh_sort_workspace(int64_t rows, int64_t N, int64_t n_keys, int64_t sequences) {
  // packed rows have the most slots
  Plan p = plan_of(rows, N, n_keys, sequences, true);
  return count_bytes(p) + (p.passes > 1 ? rows * N * int64_t(sizeof(int32_t)) : 0);
}

int lsh_sort(const LshSort& x, uintptr_t stream) {
  expect(x.keys.rank == 4, "lsh_sort: keys must be [B, H, R, N]");
  int64_t N = x.keys.size[3], rows = x.keys.size[0] * x.keys.size[1] * x.keys.size[2];
  for (const View* v : {&x.order, &x.rank})
    expect_shape(*v, "order", {x.keys.size[0], x.keys.size[1], x.keys.size[2], N});
  for (const View* v : {&x.keys, &x.order, &x.rank}) expect_dtype(*v, "keys, order or rank", DType::i32);
  expect(x.n_keys > 0 && x.n_keys <= INT32_MAX && x.chunk > 0 && N <= INT32_MAX,
         "lsh_sort: n_keys and chunk must be positive and fit into 32 bits, as must the length");
  if (x.cu_seqlens) expect(x.cu_seqlens.rank == 1 && x.cu_seqlens.dtype == DType::i32, "cu_seqlens must be int32 [P+1]");
  int64_t sequences = x.cu_seqlens ? x.cu_seqlens.size[0] - 1 : 1;
  if (!rows || !N || sequences < 1) return cudaSuccess;
  Plan p = plan_of(rows, N, x.n_keys, sequences, bool(x.cu_seqlens));
  expect(x.workspace && x.workspace.elements() >= lsh_sort_workspace(rows, N, x.n_keys, sequences),
         "lsh_sort: the workspace is too small");
  expect(rows * p.slots <= INT32_MAX && rows * sequences <= INT32_MAX, "lsh_sort: there are too many rows");
  int32_t *counts = x.workspace.as<int32_t>(), *spare = counts + count_bytes(p) / int64_t(sizeof(int32_t));
  int32_t *order = x.order.as<int32_t>(), *from = nullptr;
  auto on = reinterpret_cast<cudaStream_t>(stream);
  auto tiles = static_cast<unsigned>(rows * p.slots), segments = static_cast<unsigned>(rows * sequences);
  int width = p.bins < lanes ? lanes : p.bins;
  for (int pass = 0; pass < p.passes; ++pass) {
    bool last = pass == p.passes - 1;
    int32_t* to = (p.passes - pass) % 2 ? order : spare;
    Job job{x.keys.as<int32_t>(), x.cu_seqlens.as<int32_t>(), from, to, last ? x.rank.as<int32_t>() : nullptr, counts, p,
            static_cast<int32_t>(x.n_keys - 1), x.chunk, pass * p.bits};
    count_kernel<<<tiles, threads, 0, on>>>(job);
    scan_kernel<<<segments, width, 0, on>>>(job);
    scatter_kernel<<<tiles, threads, 0, on>>>(job);
    if (cudaError_t error = cudaGetLastError()) return error;
    from = to;
  }
  return cudaSuccess;
}

}  // namespace longattn::cuda
