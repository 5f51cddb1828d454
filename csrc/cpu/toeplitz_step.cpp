// One token of causal linear attention with relative positions: features, the ring, the sums and the result in one call.
#include <limits>

#include "favor.h"
#include "kernels.h"
#include "parallel.h"

namespace longattn::LONGATTN_ISA {

// rows of any length: whole vectors, then one by one
template <class T>
static void add_multiple(int64_t n, T a, const T* x, T* y) {
  int64_t i = 0;
  for (; i + width<T> <= n; i += width<T>) store(y + i, fma(broadcast(a), load(x + i), load(y + i)));
  for (; i < n; ++i) y[i] += a * x[i];
}
template <class T>
static T dot_any(int64_t n, const T* x, const T* y) {
  V<T> total{};
  int64_t i = 0;
  for (; i + width<T> <= n; i += width<T>) total = fma(load(x + i), load(y + i), total);
  T sum_ = sum<T>(total);
  for (; i < n; ++i) sum_ += x[i] * y[i];
  return sum_;
}

template <class T>
class RingStep {
  static constexpr int W = width<T>;
  static constexpr DType working = std::is_same_v<T, double> ? DType::f64 : DType::f32;

 public:
  explicit RingStep(const ToeplitzStep& x) : x(x) {
    for (const View* v : {&x.q, &x.k, &x.v}) expect(v->rank == 4 && v->dtype == working, "q, k and v must be 4-D, of one dtype");
    B = x.q.size[0], Hq = x.q.size[1], D = x.q.size[3], H = x.k.size[1], E = x.v.size[3];
    P = x.favor.projection ? x.favor.projection.size[0] : 0, kind = static_cast<Kind>(x.favor.kind);
    M = P ? (is_paired(kind) ? 2 * P : P) : D;
    reach = x.bias.size[1] / 2, held = x.before.mask.size[1], kept = std::min(held + 1, reach);
    Arena<T> arena{nullptr};
    take_shared(arena), shared_bytes = arena.bytes;
    scratch_bytes = Scratch(nullptr, *this).bytes;
  }
  int64_t workspace() const { return shared_bytes + x.threads * scratch_bytes + 64; }

  void run() {
    check();
    char* memory = first_line(x.workspace.data);
    Arena<T> arena{memory};
    take_shared(arena);
    load_shared();
    int64_t gone = held + 1 - kept;
    for (int64_t b = 0; b < B && kept; ++b) {
      std::copy_n(x.before.mask.as<bool>() + b * held + gone, held - gone, x.after.mask.as<bool>() + b * kept);
      x.after.mask.as<bool>()[b * kept + kept - 1] = false;
    }
    // a parallel region costs microseconds
    bool small = B * H * (M * E + held * (M + E)) < 60000;
    parallel_tasks(B * H, small ? 1 : x.threads, [&](int64_t unit, int worker) {
      Scratch s(memory + shared_bytes + worker * scratch_bytes, *this);
      step(s, unit / H, unit % H);
    });
  }

 private:
  const ToeplitzStep& x;
  int64_t B, Hq, D, H, E, P, M, reach, held, kept, shared_bytes, scratch_bytes;
  Kind kind;
  Matrix<T> projection, factors;
  T bound = 0;

  struct Scratch {
    T *row, *key, *query, *sum, *weight;
    int64_t bytes;
    Scratch(char* memory, const RingStep& x) {
      Arena<T> arena{memory};
      int64_t M = std::max(padded<T>(x.P), padded<T>(x.M)) + W;
      row = arena.take(1, padded<T>(x.D)).p, key = arena.take(1, M).p, query = arena.take(1, M).p;
      sum = arena.take(1, padded<T>(x.E)).p, weight = arena.take(1, std::max(x.M, x.kept)).p;
      bytes = arena.bytes;
    }
  };
  void take_shared(Arena<T>& arena) {
    projection = arena.take(P, padded<T>(D)), factors = arena.take(Hq, padded<T>(reach + 1));
  }
  void check() const {
    expect(H > 0 && Hq % H == 0, "query heads must be a multiple of key heads");
    expect_shape(x.q, "q", {B, Hq, 1, D}), expect_shape(x.k, "k", {B, H, 1, D}), expect_shape(x.v, "v", {B, H, 1, E});
    expect(x.bias.rank == 2 && x.bias.size[1] % 2 == 1, "bias must be [heads, 2 reach + 1]");
    expect_shape(x.bias, "bias", {x.bias.size[0] == 1 ? 1 : Hq, 2 * reach + 1}), expect_dtype(x.bias, "bias", working);
    expect(held <= reach, "the ring holds more keys than the bias reaches");
    for (int after : {0, 1}) {
      const RingState& s = after ? x.after : x.before;
      int64_t t = after ? kept : held;
      expect_shape(s.kv, "kv", {B, H, M, E}), expect_shape(s.k_sum, "k_sum", {B, H, M});
      expect_shape(s.keys, "ring_key", {B, H, t, M}), expect_shape(s.values, "ring_value", {B, H, t, E});
      expect_shape(s.mask, "ring_mask", {B, t}), expect_dtype(s.mask, "ring_mask", DType::boolean);
      for (const View* v : {&s.kv, &s.k_sum, &s.keys, &s.values}) expect_dtype(*v, "the state", working);
    }
    expect_shape(x.out, "out", {B, Hq, 1, E}), expect_dtype(x.out, "out", working);
    if (P) expect_shape(x.favor.projection, "projection", {P, D}), expect_dtype(x.favor.projection, "projection", working);
    if (x.favor.mean) expect_shape(x.favor.mean, "mean", {H, D}), expect_dtype(x.favor.mean, "mean", working);
    expect(x.feature >= 0 && x.feature <= 2 && x.favor.kind >= 0 && x.favor.kind <= 3, "there is no such feature map");
    expect(x.threads >= 1 && x.workspace.elements() >= workspace(), "the workspace is too small");
  }
  // the projection with room behind its rows, what a feature's logarithm is at most, and the factors of offsets up to 0
  void load_shared() {
    const View& from = x.favor.projection;
    T longest = 0;
    for (int64_t p = 0; p < P; ++p) {
      load_row(from.as<T>() + p * from.stride[0], from.stride[1], D, projection.row(p));
      longest = std::max(longest, dot(projection.row(p), projection.row(p), D));
    }
    bool grows = kind == Kind::positive || kind == Kind::hyperbolic;
    bound = grows ? static_cast<T>(x.favor.root) * std::sqrt(longest) : T(0);
    constexpr T least = std::is_same_v<T, double> ? T(-600) : T(-60);
    for (int64_t h = 0; h < Hq; ++h) {
      const T* bias = x.bias.as<T>() + (x.bias.size[0] == 1 ? 0 : h * (2 * reach + 1));
      T *row = factors.row(h), top = 0;
      // a sum, not a maximum, which would pass over a NaN
      int64_t wrong = 0;
      for (int64_t i = 0; i < 2 * reach + 1; ++i) wrong += !(bias[i] < std::numeric_limits<T>::infinity());
      if (wrong)
        throw std::invalid_argument(
            "longattn: rpe_bias must hold finite numbers, or -inf for offsets to hide; it holds NaN or +inf");
      if (!x.normalize) {
        for (int64_t i = 0; i <= reach; ++i) row[i] = std::exp(bias[i]);
        continue;
      }
      top = largest(bias, reach + 1, false);
      if (top == nothing<T>) top = 0;
      load_row(bias, 1, reach + 1, row);
      for (int64_t i = 0; i <= reach; i += W) {
        V<T> b = load(row + i) - broadcast(top);
        store(row + i, b < least ? V<T>{} : exp_nonpositive(b));
      }
    }
  }
  // as the features of many rows are: of a key times e^(a - bound), of a query up to its factor
  void features(Scratch& s, const View& from, int64_t b, int64_t h, bool keys, T* to) const {
    const T* p = from.as<T>() + b * from.stride[0] + h * from.stride[1];
    if (!P) return load_row(p, from.stride[3], D, to, static_cast<Feature>(x.feature));
    T* row = s.row;
    load_row(p, from.stride[3], D, row);
    normalize_row(row, D);
    const View& mean = x.favor.mean;
    if (keys && mean)
      for (int64_t i = 0; i < D; ++i) row[i] -= mean.as<T>()[h * mean.stride[0] + i * mean.stride[1]];
    for (int64_t i = 0; i < D; i += W) store(row + i, load(row + i) * static_cast<T>(x.favor.root));
    for (int64_t i = 0; i < P; ++i) to[i] = dot(projection.row(i), row, D);
    std::fill(to + P, to + padded<T>(P), T(0));
    T a = features_of(to, P, kind, dot(row, row, D) / 2);
    if (!keys) return;
    T factor = std::exp(a - bound);
    for (int64_t i = 0; i < M; i += W) store(to + i, load(to + i) * factor);
  }
  // out += the sum of rows [n][E] by their weights, in registers
  void add_rows(int64_t n, const T* weight, const T* rows, T* out) const {
    int64_t e = 0;
    auto columns = [&](auto N) {
      for (; e + N * W <= E; e += N * W) {
        Tile<T, 1, N> tile;
        tile.load_from(out + e, 0);
        tile.multiply_add(weight, 0, rows + e, E, n);
        tile.store_to(out + e, 0);
      }
    };
    columns(std::integral_constant<int, 4>{}), columns(std::integral_constant<int, 1>{});
    for (int64_t i = 0; i < n && e < E; ++i)
      for (int64_t last = e; last < E; ++last) out[last] += weight[i] * rows[i * E + last];
  }
  void step(Scratch& s, int64_t b, int64_t h) const {
    int64_t unit = b * H + h, gone = held + 1 - kept;
    features(s, x.k, b, h, true, s.key);
    const T* value = x.v.as<T>() + b * x.v.stride[0] + h * x.v.stride[1];
    // the oldest key, or without a ring the new one, moves into the sums
    const T *old_keys = x.before.keys.as<T>() + unit * held * M, *old_values = x.before.values.as<T>() + unit * held * E;
    T *keys = x.after.keys.as<T>() + unit * kept * M, *values = x.after.values.as<T>() + unit * kept * E;
    std::copy_n(old_keys + gone * M, std::max<int64_t>(held - gone, 0) * M, keys);
    std::copy_n(old_values + gone * E, std::max<int64_t>(held - gone, 0) * E, values);
    T* sum_value = s.sum;
    if (kept) {
      std::copy_n(s.key, M, keys + (kept - 1) * M);
      for (int64_t e = 0; e < E; ++e) values[(kept - 1) * E + e] = value[e * x.v.stride[3]];
    }
    const T* left_key = held ? old_keys : s.key;
    for (int64_t e = 0; e < E; ++e) sum_value[e] = held ? old_values[e] : value[e * x.v.stride[3]];
    bool leaves = gone > 0 && !(held && x.before.mask.as<bool>()[b * held]);
    T *kv = x.after.kv.as<T>() + unit * M * E, *k_sum = x.after.k_sum.as<T>() + unit * M;
    std::copy_n(x.before.kv.as<T>() + unit * M * E, M * E, kv), std::copy_n(x.before.k_sum.as<T>() + unit * M, M, k_sum);
    if (leaves) {
      for (int64_t m = 0; m < M; ++m) add_multiple(E, left_key[m], sum_value, kv + m * E);
      for (int64_t m = 0; m < M; ++m) k_sum[m] += left_key[m];
    }
    const bool* masked = x.after.mask.as<bool>() + b * kept;
    int64_t groups = Hq / H;
    for (int64_t head = h * groups; head < (h + 1) * groups; ++head) {
      features(s, x.q, b, head, false, s.query);
      const T* c = factors.row(head);
      T *out = x.out.as<T>() + (b * Hq + head) * E, z = c[0] * dot_any(M, s.query, k_sum);
      std::fill_n(out, E, T(0));
      for (int64_t m = 0; m < M; ++m) s.weight[m] = c[0] * s.query[m];
      add_rows(M, s.weight, kv, out);
      for (int64_t i = 0; i < kept; ++i)
        s.weight[i] = masked[i] ? T(0) : c[reach + 1 - kept + i] * dot_any(M, s.query, keys + i * M);
      for (int64_t i = 0; i < kept; ++i) z += s.weight[i];
      add_rows(kept, s.weight, values, out);
      T factor = !x.normalize ? static_cast<T>(x.scale) : z == T(0) ? T(0) : 1 / z;
      for (int64_t e = 0; e < E; ++e) out[e] = x.normalize && z == T(0) ? T(0) : out[e] * factor;
    }
  }
};

template <class F>
static auto with_step(const ToeplitzStep& x, F&& f) {
  if (x.q.dtype == DType::f64) return f(RingStep<double>(x));
  return f(RingStep<float>(x));
}
void toeplitz_step(const ToeplitzStep& x) {
  with_step(x, [](auto step) { step.run(); });
}
int64_t toeplitz_step_workspace(const ToeplitzStep& x) {
  return with_step(x, [](auto step) { return step.workspace(); });
}

}  // namespace longattn::LONGATTN_ISA
