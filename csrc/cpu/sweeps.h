// What linear attention's sweeps share: states in memory, rows of the inputs and their features.
// `scaled` sums have logarithms (FAVOR+); without them phi is elementwise and M = D.
#pragma once
#include "favor.h"
#include "scratch.h"
#include "sequences.h"

namespace longattn::LONGATTN_ISA {

template <class T, bool scaled>
class Sweeps {
 protected:
  explicit Sweeps(const LinearProblem& problem, bool forward)
      : x(problem), B(x.q.size[0]), Hq(x.q.size[1]), L(x.q.size[2]), D(x.q.size[3]), H(x.k.size[1]), S(x.k.size[2]),
        E(x.v.size[3]), P(scaled ? x.favor.projection.size[0] : 0), kind(static_cast<Kind>(x.favor.kind)),
        M(!scaled ? D : is_paired(kind) ? 2 * P : P), groups(H ? Hq / H : 0),
        seq{x.cu_seqlens, x.cu_seqlens ? x.cu_seqlens.size[0] - 1 : B, x.segment}, N(seq.N),
        feature(scaled ? Feature::identity : static_cast<Feature>(x.feature)), forward_layout(forward),
        shared(nullptr, sizes()) {
    check();
    // a parallel region costs microseconds: small problems run without one
    if (static_cast<double>(B * Hq) * static_cast<double>(L + S) * static_cast<double>(M * (E + P)) < 2e5) x.threads = 1;
    if (scaled) pack_projection();
  }

  LinearProblem x;
  int64_t B, Hq, L, D, H, S, E, P;
  Kind kind;
  int64_t M, groups;
  Sequences seq;
  int64_t N;
  Feature feature;
  bool forward_layout;
  Shared<T> shared;

  Sizes sizes() const { return {D, E, M, P}; }

  // ---- checks that memory safety rests on; the sentences for users are in Python

  void check() const {
    expect(x.q.rank == 4 && x.k.rank == 4 && x.v.rank == 4, "query, key and value must have 4 dimensions");
    expect_shape(x.k, "key", {B, H, S, D});
    expect_shape(x.v, "value", {B, H, S, E});
    expect(x.k.dtype == x.q.dtype && x.v.dtype == x.q.dtype, "query, key and value must share a dtype");
    expect((x.q.dtype == DType::f64) == std::is_same_v<T, double>, "the working type must fit the dtype");
    expect(H > 0 ? Hq % H == 0 : Hq == 0, "query heads must be a multiple of key heads");
    expect(!x.is_causal || L == S, "causal attention needs as many queries as keys");
    expect(x.segment > 0 && x.segment % chunk == 0, "segment must be a positive multiple of 64");
    expect(x.feature >= 0 && x.feature <= 2, "feature must be 0, 1 or 2");
    if (x.mask) expect_shape(x.mask, "key_padding_mask", {B, S}), expect_dtype(x.mask, "key_padding_mask", DType::boolean);
    if (scaled) {
      expect(x.favor.kind >= 0 && x.favor.kind <= 3, "kind must be 0, 1, 2 or 3");
      expect(P > 0, "there must be a projection");
      check_working(x.favor.projection, "projection", {P, D});
      if (x.favor.mean) check_working(x.favor.mean, "mean", {H, D});
      expect(!x.favor.exact_diagonal || x.is_causal, "exact_diagonal needs is_causal");
      expect(x.normalize, "FAVOR+ is normalised");
    }
    if (x.kv) check_state(x.kv, x.k_sum, x.log_scale, "state");
    if (x.cu_seqlens) seq.check(B, L, S);
    expect(x.threads >= 1 && x.workspace.elements() >= workspace_bytes<T>(sizes(), x.threads), "the workspace is too small");
  }
  // a tensor of sums, and so of the working type
  static void check_working(const View& x, const char* name, std::initializer_list<int64_t> shape) {
    expect_shape(x, name, shape);
    expect_dtype(x, name, std::is_same_v<T, double> ? DType::f64 : DType::f32);
  }
  void check_state(const View& kv, const View& sum, const View& scale, const char* name) const {
    check_working(kv, name, {N, H, M, E});
    check_working(sum, name, {N, H, M});
    if (scaled && scale) check_working(scale, name, {N, H});
  }
  void check_slots(const StateSlots& s, int64_t slots) const {
    check_working(s.kv, "segment_kv", {B, H, slots, M, E});
    check_working(s.k_sum, "segment_k_sum", {B, H, slots, M});
    if (scaled) check_working(s.log_scale, "segment_log_scale", {B, H, slots});
  }
  int64_t saved_slots() const { return x.is_causal ? seq.slots(L) : x.cu_seqlens ? N : 1; }

  // ---- scratch and tasks

  Scratch<T> scratch(int worker) const {
    int64_t bytes = Scratch<T>(nullptr, sizes(), forward_layout).bytes;
    return Scratch<T>(x.workspace.data + shared.bytes + worker * bytes, sizes(), forward_layout);
  }
  void pack_projection() {
    shared = Shared<T>(x.workspace.data, sizes());
    const View& from = x.favor.projection;
    for (int64_t p = 0; p < padded<T>(P); ++p) {
      T* row = shared.projection.row(p);
      std::fill_n(row, padded<T>(D), T(0));
      if (p < P) load_row<T>(from.as<T>() + p * from.stride[0], from.stride[1], D, row);
    }
    transpose(shared.projection.p, shared.projection.ld, P, D, shared.projection_transposed.p,
              shared.projection_transposed.ld);
  }
  template <class F>
  void for_sequences(F&& f) const {
    parallel_tasks(N * H, x.threads, [&](int64_t task, int worker) {
      Scratch<T> s = scratch(worker);
      f(s, task / H, task % H);
    });
  }
  template <class F>
  void for_slots(int64_t length, F&& f) const {
    int64_t count = seq.slots(length);
    parallel_tasks(B * H * count, x.threads, [&](int64_t task, int worker) {
      Slot where = seq.slot_at(task / (H * count), task % count, length);
      if (!where.rows) return;
      Scratch<T> s = scratch(worker);
      f(s, where, task / count % H);
    });
  }

  // ---- states in memory, [M][E], [M] and a scale, contiguous

  struct Saved {
    T *kv, *sum, *scale;
    T scale_or_nothing() const { return scale ? *scale : nothing<T>; }
  };
  Saved saved(const View& kv, const View& sum, const View& scale, int64_t at) const {
    return {kv.as<T>() + at * M * E, sum.as<T>() + at * M, scaled ? scale.as<T>() + at : nullptr};
  }
  Saved saved(const View& kv, const View& sum, const View& scale, int64_t n, int64_t h) const {
    return saved(kv, sum, scale, n * H + h);
  }
  Saved saved(const StateSlots& s, const Slot& where, int64_t h) const {
    return saved(s.kv, s.k_sum, s.log_scale, (where.sequence.b * H + h) * s.kv.size[2] + where.index);
  }
  Saved total(const StateSlots& s, const Sequence& of, int64_t h) const {
    return saved(s.kv, s.k_sum, s.log_scale, (of.b * H + h) * s.kv.size[2] + (x.cu_seqlens ? of.n : 0));
  }
  T load_state(Saved from, Matrix<T> state, T* sum) const {
    for (int64_t m = 0; m < M; ++m) load_row<T>(from.kv + m * E, 1, E, state.row(m));
    load_row<T>(from.sum, 1, M, sum);
    return from.scale_or_nothing();
  }
  void store_state(Matrix<T> state, const T* sum, T scale, Saved to) const {
    for (int64_t m = 0; m < M; ++m) store_row<T>(state.row(m), to.kv + m * E, E);
    store_row<T>(sum, to.sum, M);
    if (scaled) *to.scale = scale;
  }
  // as [E+1][M], the sums in the last row
  T load_transposed(Saved from, Matrix<T> state) const {
    for (int64_t e = 0; e < E; ++e) load_row<T>(from.kv + e, E, M, state.row(e));
    load_row<T>(from.sum, 1, M, state.row(E));
    return from.scale_or_nothing();
  }
  void store_transposed(Matrix<T> state, T scale, Saved to) const {
    for (int64_t m = 0; m < M; ++m)
      for (int64_t e = 0; e < E; ++e) to.kv[m * E + e] = state.row(e)[m];
    store_row<T>(state.row(E), to.sum, M);
    if (scaled) *to.scale = scale;
  }
  static void clear(Matrix<T> m, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i) std::fill_n(m.row(i), padded<T>(columns), T(0));
  }
  static void copy(Matrix<T> from, Matrix<T> to, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i) std::copy_n(from.row(i), padded<T>(columns), to.row(i));
  }
  static void end_segment(State<T>& state) {
    std::swap(state.base, state.current);
    state.base_scale = state.current_scale;
  }
  // state = running, running = running + state, each in its own units
  static void scan_step(T* state, T* running, int64_t n, T state_share, T running_share) {
    constexpr int W = width<T>;
    for (int64_t j = 0; j < n; j += W) {
      T part[W] = {}, sum[W] = {};
      int64_t count = std::min<int64_t>(W, n - j);
      std::copy_n(state + j, count, part), std::copy_n(running + j, count, sum);
      std::copy_n(sum, count, state + j);
      V<T> both = scaled ? merge<T>(load(sum), running_share, load(part), state_share) : load(sum) + load(part);
      store(sum, both);
      std::copy_n(sum, count, running + j);
    }
  }
  // partial states to the states that segments start from, in order or in reverse; `run` ends as the state after all
  void scan(const StateSlots& slots, const Sequence& s, int64_t h, Saved run, bool reverse) const {
    int64_t count = seq.segments(s);
    for (int64_t i = 0; i < count; ++i) {
      Saved here = saved(slots, seq.slot(s, reverse ? count - 1 - i : i), h);
      T part = 1, running = 1;
      if (scaled) {
        T before = *run.scale, own = *here.scale, after = std::max(before, own);
        part = share_of(own, after), running = share_of(before, after);
        *here.scale = before, *run.scale = after;
      }
      scan_step(here.kv, run.kv, M * E, part, running);
      scan_step(here.sum, run.sum, M, part, running);
    }
  }
  void initial(const View& kv, const View& sum, const View& scale, int64_t n, int64_t h, Saved to) const {
    if (kv) {
      Saved from = saved(kv, sum, scale, n, h);
      std::copy_n(from.kv, M * E, to.kv), std::copy_n(from.sum, M, to.sum);
      if (scaled) *to.scale = *from.scale;
    } else {
      std::fill_n(to.kv, M * E, T(0)), std::fill_n(to.sum, M, T(0));
      if (scaled) *to.scale = nothing<T>;
    }
  }

  // ---- rows of the inputs; in a reverse sweep row r is token first + rows - 1 - r

  void load_rows(const View& from, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t n, Matrix<T> to,
                 bool reverse, Feature map = Feature::identity) const {
    with_type(from.dtype, [&](auto tag) {
      using From = decltype(tag);
      if constexpr (std::is_same_v<From, double> == std::is_same_v<T, double>) {
        const From* p = from.as<From>() + b * from.stride[0] + h * from.stride[1];
        // the next chunk of the sweep travels while this one is computed
        int64_t next = (reverse ? -chunk : chunk) * from.stride[2];
        for (int64_t r = 0; r < rows; ++r) {
          const From* row = p + (first + (reverse ? rows - 1 - r : r)) * from.stride[2];
          // as a number: it may lie outside the tensor, where a pointer must not
          uintptr_t ahead = reinterpret_cast<uintptr_t>(row) + static_cast<uintptr_t>(next) * sizeof(From);
          for (int64_t i = 0; i < n; i += 64 / sizeof(From))
            __builtin_prefetch(reinterpret_cast<const char*>(ahead + static_cast<uintptr_t>(i) * sizeof(From)), 0, 2);
          load_row<T>(row, from.stride[3], n, to.row(r), map);
        }
      }
    });
    // whole squares are transposed: what lies past the rows must be finite
    for (int64_t r = rows; r < padded<T>(rows); ++r) std::fill_n(to.row(r), padded<T>(n), T(0));
  }
  void store_rows(Matrix<T> from, int64_t rows, int64_t n, const View& to, int64_t b, int64_t h, int64_t first,
                  bool reverse) const {
    with_type(to.dtype, [&](auto tag) {
      using To = decltype(tag);
      if constexpr (std::is_same_v<To, double> == std::is_same_v<T, double>) {
        To* p = to.as<To>() + b * to.stride[0] + h * to.stride[1];
        for (int64_t r = 0; r < rows; ++r)
          store_row<T>(from.row(r), p + (first + (reverse ? rows - 1 - r : r)) * to.stride[2], n);
      }
    });
  }
  void load_mask(Scratch<T>& s, int64_t b, int64_t first, int64_t rows, bool reverse) const {
    const bool* p = x.mask.as<bool>() + b * x.mask.stride[0];
    for (int64_t r = 0; r < rows; ++r)
      s.masked[r] = x.mask ? p[(first + (reverse ? rows - 1 - r : r)) * x.mask.stride[1]] : false;
  }
  void clear_masked(Scratch<T>& s, int64_t rows, Matrix<T> m, int64_t n) const {
    if (!x.mask) return;
    for (int64_t r = 0; r < rows; ++r)
      if (s.masked[r]) std::fill_n(m.row(r), padded<T>(n), T(0));
  }
  // FAVOR+: rows as the kernel exp(q.k) sees them, in `raw`, and phi and a of them
  void load_favor(const View& from, const View& mean, int64_t b, int64_t h, int64_t first, int64_t rows, Matrix<T> raw,
                  T* inverse, Matrix<T> phi, T* log, bool reverse) const {
    load_rows(from, b, h, first, rows, D, raw, reverse);
    const T* center = mean ? mean.as<T>() + h * mean.stride[0] : nullptr;
    for (int64_t r = 0; r < rows; ++r) {
      T* row = raw.row(r);
      if (x.favor.l2) inverse[r] = normalize_row(row, D);
      if (center)
        for (int64_t i = 0; i < D; ++i) row[i] -= center[i * mean.stride[1]];
      multiply(row, D, static_cast<T>(x.favor.root));
    }
    outputs(rows, within({}, {}), D, raw, shared.projection_transposed, P, phi, false);
    for (int64_t r = 0; r < rows; ++r) log[r] = features_of(phi.row(r), P, kind, dot(raw.row(r), raw.row(r), D) / 2);
    clear_rows(phi, rows, padded<T>(rows), M);
  }
  static void clear_rows(Matrix<T> m, int64_t first, int64_t last, int64_t n) {
    for (int64_t r = first; r < last; ++r) std::fill_n(m.row(r), padded<T>(n), T(0));
  }
  // queries need only the logarithm of the weight that their features have beside an exact score
  void load_queries(Scratch<T>& s, int64_t b, int64_t h, int64_t first, int64_t rows, bool reverse) const {
    if constexpr (!scaled) return load_rows(x.q, b, h, first, rows, D, s.q, reverse, feature);
    load_favor(x.q, {}, b, h, first, rows, s.raw_q, s.inverse_q, s.q, s.log_q, reverse);
    T norm = std::log(static_cast<T>(kind == Kind::trig ? P : M));
    for (int64_t r = 0; r < rows; ++r) s.log_q[r] = x.favor.exact_diagonal ? s.log_q[r] - norm : T(0);
    if (x.favor.exact_diagonal) transpose(s.raw_q.p, s.raw_q.ld, rows, D, s.raw_q_transposed.p, s.raw_q_transposed.ld);
  }
  void load_keys(Scratch<T>& s, int64_t b, int64_t h, int64_t first, int64_t rows, bool reverse) const {
    load_mask(s, b, first, rows, reverse);
    if constexpr (!scaled) {
      load_rows(x.k, b, h, first, rows, D, s.k, reverse, feature);
      return clear_masked(s, rows, s.k, D);
    }
    load_favor(x.k, x.favor.mean, b, h, first, rows, s.raw_k, s.inverse_k, s.k, s.log_k, reverse);
    clear_masked(s, rows, s.raw_k, D), clear_masked(s, rows, s.k, M);
    for (int64_t r = 0; r < rows; ++r)
      if (s.masked[r]) s.log_k[r] = nothing<T>;
    if (x.favor.exact_diagonal) transpose(s.raw_k.p, s.raw_k.ld, rows, D, s.raw_k_transposed.p, s.raw_k_transposed.ld);
  }
  // v, and [v, 1] with `ones`
  void load_values(Scratch<T>& s, int64_t b, int64_t h, int64_t first, int64_t rows, bool ones, bool reverse) const {
    load_rows(x.v, b, h, first, rows, E, s.v, reverse);
    if (ones)
      for (int64_t r = 0; r < padded<T>(rows); ++r)
        for (int64_t e = E; e < padded<T>(E + 1); ++e) s.v.row(r)[e] = e == E && r < rows ? T(1) : T(0);
    clear_masked(s, rows, s.v, ones ? E + 1 : E);
  }
  static void multiply(T* row, int64_t n, T factor) {
    for (int64_t i = 0; i < n; i += width<T>) store(row + i, load(row + i) * factor);
  }
  // row / z, and 0 where z is 0: a query that sees no key, whatever its numerator holds
  static void divide(T* row, int64_t n, T z) {
    if (z == T(0)) return void(std::fill_n(row, padded<T>(n), T(0)));
    T factor = T(1) / z;
    if (std::abs(factor) <= std::numeric_limits<T>::max() || z != z) return multiply(row, n, factor);
    // the reciprocal of a subnormal overflows where the quotient need not
    for (int64_t i = 0; i < n; i += width<T>) store(row + i, load(row + i) / z);
  }
  // where features underflow against each other, what is left is no weight at all and its gradient would overflow
  static T resolved(T z) {
    constexpr T least = sizeof(T) == 4 ? T(0x1p-100) : T(0x1p-900);
    return scaled && std::abs(z) < least ? T(0) : z;
  }
  static Within<T, T> within(Matrix<T> p, Matrix<T> c) { return {p, c, p, c}; }

  // p[i][j] *= e^(log_j - row_scale_i), with keys along the columns, or along the rows with queries along the columns;
  // where j comes after i the factor may be anything
  void weigh(int64_t rows, Matrix<T> p, const T* row_log, const T* column_log) const {
    constexpr int W = width<T>;
    for (int64_t i = 0; i < rows; ++i) {
      V<T> own = broadcast(row_log[i]);
      for (int64_t j = 0; j <= i; j += W) {
        V<T> f = exp_share(own + load(column_log + j));
        store(p.row(i) + j, load(p.row(i) + j) * f);
      }
    }
  }
  // s[i][j] becomes e^(s - log_i - log_j), 0 for a padded key
  void exponentiate(int64_t rows, Matrix<T> s, const T* row_log, const T* column_log) const {
    constexpr int W = width<T>;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j <= i; j += W)
        store(s.row(i) + j, exp_nonpositive(load(s.row(i) + j) + broadcast(row_log[i]) + load(column_log + j)));
  }
};

}  // namespace longattn::LONGATTN_ISA
