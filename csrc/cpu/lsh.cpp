// Angular hashing and the stable counting sort of LSH attention.
#include <utility>
#include <vector>

#include "kernels.h"
#include "matrix.h"
#include "rows.h"
#include "sequences.h"

namespace longattn::LONGATTN_ISA {

namespace {

constexpr int64_t tokens = 64;     // hashed at a time
constexpr int64_t block = 1024;    // tokens of a task
using Lanes = V<int32_t>;

// a b + c with one rounding on every instruction set, so that all agree on the buckets
inline V<float> fused(V<float> a, V<float> b, V<float> c) {
#if defined(__FMA__) || defined(__aarch64__)
  return fma(a, b, c);
#else
  V<float> y;
  for (int i = 0; i < width<float>; ++i) y[i] = std::fma(a[i], b[i], c[i]);
  return y;
#endif
}

// the largest y and the largest -y of each token so far, and the columns where they first stood
struct Best {
  V<float> up, down;
  Lanes up_at, down_at;

  void meet(V<float> y, int32_t column) {
    Lanes at = column - Lanes{}, higher = y > up, lower = -y > down;
    up_at = higher ? at : up_at, up = higher ? y : up;
    down_at = lower ? at : down_at, down = lower ? -y : down;
  }
};

struct HashScratch {
  Matrix<float> rows, x;  // [tokens][D'], [D'][tokens]
  int64_t bytes;
  HashScratch(char* memory, int64_t depth) {
    Arena<float> arena{memory};
    rows = arena.take(tokens, padded<float>(depth)), x = arena.take(padded<float>(depth), tokens);
    bytes = arena.bytes;
  }
};

// one factor of one round, for two vectors of tokens: buckets += weight * argmax
void hash_factor(const float* rotation, int64_t columns, int64_t half, const float* x, int64_t ld, int64_t depth,
                 int32_t weight, int32_t* buckets) {
  constexpr int N = 2, most = 4, W = width<float>;
  Best best[N];
  for (Best& b : best) b = {broadcast(-INFINITY), broadcast(-INFINITY), Lanes{}, Lanes{}};
  for (int64_t c = 0; c < half; c += most)
    with_rows<most>(half - c, [&](auto count) {
      constexpr int R = decltype(count)::value;
      // each product is summed over the dimensions in order
      V<float> y[R][N]{};
      for (int64_t d = 0; d < depth; ++d) {
        V<float> right[N];
        for (int n = 0; n < N; ++n) right[n] = load(x + d * ld + n * W);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          V<float> left = broadcast(rotation[d * columns + c + r]);
          for (int n = 0; n < N; ++n) y[r][n] = fused(left, right[n], y[r][n]);
        }
      }
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) best[n].meet(y[r][n], static_cast<int32_t>(c + r));
    });
  for (int n = 0; n < N; ++n) {
    Lanes negative = best[n].down > best[n].up;
    Lanes at = negative ? best[n].down_at + static_cast<int32_t>(half) : best[n].up_at;
    store(buckets + n * W, load(buckets + n * W) + weight * at);
  }
}

}  // namespace

void lsh_hash(const LshHash& x) {
  expect(x.x.rank == 4 && x.rotations.rank == 4, "x must be [B, H, N, D] and rotations [H, R, D', C]");
  int64_t B = x.x.size[0], Hx = x.x.size[1], N = x.x.size[2], D = x.x.size[3];
  int64_t H = x.rotations.size[0], R = x.rotations.size[1], depth = x.rotations.size[2], C = x.rotations.size[3];
  int64_t columns = 0;
  for (int64_t f : x.factors) expect(f > 0 && f % 2 == 0, "factors must be even"), columns += f / 2;
  expect(H > 0 ? Hx % H == 0 : Hx == 0, "heads must be a multiple of the rotations' heads");
  expect(columns == C && (depth == D || depth == D + 1), "rotations must be [H, R, D or D + 1, sum of factors / 2]");
  expect_dtype(x.rotations, "rotations", DType::f32), expect_dtype(x.buckets, "buckets", DType::i32);
  expect_shape(x.buckets, "buckets", {B, Hx, R, N});
  expect(x.rotations.stride[3] == 1 && x.rotations.stride[2] == C, "rotations must be contiguous");
  if (x.extra) {
    expect_shape(x.extra, "extra", {B, Hx, N}), expect_dtype(x.extra, "extra", DType::f32);
    expect(depth == D + 1, "extra needs a dimension of the rotations");
  }
  // a coordinate that is 0 adds nothing
  if (!x.extra) depth = D;
  int64_t bytes = HashScratch(nullptr, D + 1).bytes, blocks = (N + block - 1) / block;
  expect(x.threads >= 1 && x.workspace.elements() >= x.threads * bytes + 64, "the workspace is too small");
  char* memory = first_line(x.workspace.data);
  parallel_tasks(B * Hx * blocks, x.threads, [&](int64_t task, int me) {
    HashScratch w(memory + me * bytes, D + 1);
    int64_t b = task / blocks / Hx, h = task / blocks % Hx, end = std::min(N, (task % blocks + 1) * block);
    for (int64_t first = task % blocks * block; first < end; first += tokens) {
      int64_t count = std::min(tokens, end - first);
      with_type(x.x.dtype, [&](auto type) {
        using From = decltype(type);
        const From* from = x.x.as<From>() + b * x.x.stride[0] + h * x.x.stride[1];
        for (int64_t i = 0; i < tokens; ++i) {
          float* row = w.rows.row(i);
          std::fill(row, row + padded<float>(D + 1), 0.f);
          if (i >= count) continue;
          const From* at = from + (first + i) * x.x.stride[2];
          if constexpr (sizeof(From) == 8)
            for (int64_t d = 0; d < D; ++d) row[d] = static_cast<float>(at[d * x.x.stride[3]]);
          else load_row(at, x.x.stride[3], D, row);
          if (x.extra)
            row[D] = x.extra.as<float>()[b * x.extra.stride[0] + h * x.extra.stride[1] + (first + i) * x.extra.stride[2]];
        }
      });
      transpose(w.rows.p, w.rows.ld, tokens, depth, w.x.p, w.x.ld);
      const float* rotation = x.rotations.as<float>() + h / (Hx / H) * x.rotations.stride[0];
      for (int64_t r = 0; r < R; ++r, rotation += x.rotations.stride[1]) {
        alignas(64) int32_t buckets[tokens] = {};
        for (int64_t i = 0; i < count; i += 2 * width<float>) {
          int64_t column = 0;
          int32_t weight = 1;
          for (int64_t f : x.factors) {
            hash_factor(rotation + column, C, f / 2, w.x.p + i, w.x.ld, depth, weight, buckets + i);
            column += f / 2, weight *= static_cast<int32_t>(f);
          }
        }
        std::copy(buckets, buckets + count, x.buckets.as<int32_t>() + ((b * Hx + h) * R + r) * N + first);
      }
    }
  });
}

int64_t lsh_workspace(int64_t head_dim, int64_t n_keys, int threads) {
  return threads * std::max<int64_t>(HashScratch(nullptr, head_dim + 1).bytes, n_keys * int64_t(sizeof(int32_t))) + 64;
}

void lsh_sort(const LshSort& x) {
  expect(x.keys.rank == 4, "keys must be [B, H, R, N]");
  int64_t B = x.keys.size[0], lists = x.keys.size[1] * x.keys.size[2], N = x.keys.size[3];
  for (const View* v : {&x.keys, &x.order, &x.rank})
    expect_shape(*v, "order", {B, x.keys.size[1], x.keys.size[2], N}), expect_dtype(*v, "keys", DType::i32);
  expect(x.n_keys >= 1 && x.chunk >= 1 && x.threads >= 1, "n_keys and chunk must be positive");
  expect(x.workspace.elements() >= x.threads * x.n_keys * int64_t(sizeof(int32_t)) + 64, "the workspace is too small");
  Sequences sequences{x.cu_seqlens, x.cu_seqlens ? x.cu_seqlens.size[0] - 1 : B, 1};
  if (x.cu_seqlens) sequences.check(B, N, N);
  char* memory = first_line(x.workspace.data);
  // the sequences of one batch entry one after the other
  int64_t each = x.cu_seqlens ? sequences.N : 1;
  parallel_tasks(B * lists, x.threads, [&](int64_t task, int me) {
    int32_t* count = reinterpret_cast<int32_t*>(memory) + me * x.n_keys;
    const int32_t* keys = x.keys.as<int32_t>() + task * N;
    int32_t *order = x.order.as<int32_t>() + task * N, *rank = x.rank.as<int32_t>() + task * N;
    auto key = [&](int64_t i) { return std::clamp<int64_t>(keys[i], 0, x.n_keys - 1); };
    for (int64_t n = 0; n < each; ++n) {
      Sequence s = sequences.sequence(x.cu_seqlens ? n : task / lists, N);
      int32_t* places = order + s.start;
      if (s.length * 8 < x.n_keys) {
        // few tokens for so many buckets
        for (int64_t i = 0; i < s.length; ++i) places[i] = static_cast<int32_t>(s.start + i);
        std::sort(places, places + s.length, [&](int32_t a, int32_t b) {
          return key(a) != key(b) ? key(a) < key(b) : a < b;
        });
      } else {
        std::fill(count, count + x.n_keys, 0);
        for (int64_t i = 0; i < s.length; ++i) ++count[key(s.start + i)];
        int32_t before = 0;
        for (int64_t bin = 0; bin < x.n_keys; ++bin) before += std::exchange(count[bin], before);
        for (int64_t i = 0; i < s.length; ++i) places[count[key(s.start + i)]++] = static_cast<int32_t>(s.start + i);
      }
      for (int64_t i = 0; i < s.length; ++i) rank[places[i]] = static_cast<int32_t>(i / x.chunk);
    }
  });
}

}  // namespace longattn::LONGATTN_ISA
