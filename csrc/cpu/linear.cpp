// Linear attention: sequences, heads and segments as tasks, chunks as instances of the causal product (prefix.h).
//   forward   a = phi(q)   b = phi(k)   c = v             state [D][E]
//   dphi(q)   a = [g, h]   b = [v, 1]   c = phi(k)        state [E+1][D]      g = dO / z, h = -(dO . o) / z
//   dphi(k)   a = [v, 1]   b = [g, h]   c = phi(q)        state [E+1][D]      rows in reverse order
//   dv        a = phi(k)   b = phi(q)   c = g             state [D][E+1]      rows in reverse order
// The states of the last two are each other's transpose, so only one is accumulated.
#include "linear.h"

#include <limits>

#include "kernels.h"
#include "parallel.h"
#include "prefix.h"
#include "rows.h"

namespace longattn::LONGATTN_ISA {
namespace {

// the scratch of one worker; the same walk over no memory measures it
template <class T>
struct Scratch {
  int64_t bytes = 0;
  Matrix<T> q, q_transposed, k, k_transposed, v, v_transposed, g, g_transposed, p, out, dk, dv, reverse_transposed;
  State<T> state, reverse;
  T *base_sum, *local_sum, *current_sum, *z;
  bool* masked;
  // the forward's factors for bfloat16 inputs
  Matrix<Pair> q_pairs, k_pairs, k_pairs_transposed, key_features, v_pairs, p_pairs, state_pairs;

  Scratch(char* memory, int64_t D, int64_t E) : arena(memory) {
    int64_t M = padded<T>(D), N = padded<T>(E + 1), wide = std::max(M, N);
    for (Matrix<T>* m : {&q, &k, &dk}) *m = take(chunk, M);
    for (Matrix<T>* m : {&q_transposed, &k_transposed}) *m = take(M, chunk);
    for (Matrix<T>* m : {&v, &g, &dv}) *m = take(chunk, N);
    for (Matrix<T>* m : {&v_transposed, &g_transposed}) *m = take(N, chunk);
    p = take(chunk, chunk), out = take(chunk, wide), reverse_transposed = take(M, N);
    // square: the forward keeps the state as [D][E], the backward as [E+1][D]
    for (State<T>* s : {&state, &reverse})
      for (Matrix<T>* m : {&s->base, &s->local, &s->current}) *m = take(wide, wide);
    for (T** sum : {&base_sum, &local_sum, &current_sum}) *sum = take(1, M).p;
    z = take(1, chunk + width<T>).p;
    masked = reinterpret_cast<bool*>(take(1, chunk).p);
    if (!has_pairs) return;
    int64_t pairs = round_up(D, 2 * width<T>) / 2;
    for (Matrix<Pair>* m : {&q_pairs, &k_pairs}) *m = take<Pair>(chunk, pairs);
    k_pairs_transposed = take<Pair>(padded<T>(pairs), chunk), key_features = take<Pair>(M, chunk / 2);
    v_pairs = take<Pair>(chunk / 2, N), p_pairs = take<Pair>(chunk, chunk / 2), state_pairs = take<Pair>(M, N);
  }

 private:
  char* arena;
  template <class A = T>
  Matrix<A> take(int64_t rows, int64_t columns) {
    int64_t ld = leading<A>(columns);
    Matrix<A> m{reinterpret_cast<A*>(arena + bytes), ld};
    bytes += round_up(rows * ld * static_cast<int64_t>(sizeof(A)), 64);
    return m;
  }
};

struct Sequence {
  int64_t n, b, start, length;
};
struct Slot {
  Sequence sequence;
  int64_t index, first, rows;  // rows == 0: not in use
};

template <class T>
class Linear {
 public:
  explicit Linear(const LinearProblem& problem)
      : x(problem), B(x.q.size[0]), Hq(x.q.size[1]), L(x.q.size[2]), D(x.q.size[3]), H(x.k.size[1]), S(x.k.size[2]),
        E(x.v.size[3]), groups(H ? Hq / H : 0), N(x.cu_seqlens ? x.cu_seqlens.size[0] - 1 : B),
        feature(static_cast<Feature>(x.feature)) {
    check();
    // a parallel region costs microseconds: small problems run without one
    if (static_cast<double>(B * Hq) * static_cast<double>(L + S) * static_cast<double>(D * E) < 2e5) x.threads = 1;
  }

  void forward(const LinearForward& y) {
    check_forward(y);
    if (x.is_causal && L == 1 && !y.segment_kv && !x.cu_seqlens) return step(y);
    if (!x.is_causal) forward_total(y);
    else if (x.split) forward_split(y);
    else forward_serial(y);
  }

  void backward(const LinearBackward& y) {
    check_backward(y);
    if (!x.is_causal) backward_total(y);
    else if (x.split) backward_split(y);
    else backward_serial(y);
  }

 private:
  LinearProblem x;
  int64_t B, Hq, L, D, H, S, E, groups, N;
  Feature feature;

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
    if (x.mask) expect_shape(x.mask, "key_padding_mask", {B, S});
    if (x.kv) check_state(x.kv, x.k_sum, "state");
    if (x.cu_seqlens) {
      expect(x.cu_seqlens.rank == 1 && x.cu_seqlens.dtype == DType::i32 && N >= 1, "cu_seqlens must be int32 [N+1]");
      expect(B == 1 && L == S, "packed sequences need batch size 1 and L == S");
      bool ok = boundary(0) == 0 && boundary(N) == L;
      for (int64_t n = 0; n < N; ++n) ok = ok && boundary(n) <= boundary(n + 1);
      if (!ok)
        throw std::invalid_argument("linear_attention: cu_seqlens must start at 0, never decrease and end at the length " +
                                    std::to_string(L) + ", got " + std::to_string(boundary(0)) + " .. " +
                                    std::to_string(boundary(N)));
    }
    expect(x.threads >= 1 && x.workspace.elements() >= x.threads * Scratch<T>(nullptr, D, E).bytes,
           "the workspace is too small");
  }
  void check_state(const View& kv, const View& sum, const char* name) const {
    expect_shape(kv, name, {N, H, D, E});
    expect_shape(sum, name, {N, H, D});
  }
  void check_slots(const View& kv, const View& sum, int64_t slots) const {
    expect_shape(kv, "segment_kv", {B, H, slots, D, E});
    expect_shape(sum, "segment_k_sum", {B, H, slots, D});
  }
  void check_forward(const LinearForward& y) const {
    expect_shape(y.out, "out", {B, Hq, L, E});
    if (x.normalize) expect_shape(y.normalizer, "normalizer", {B, Hq, L});
    check_state(y.kv, y.k_sum, "state");
    if (y.segment_kv || (x.is_causal && x.split)) check_slots(y.segment_kv, y.segment_k_sum, saved_slots());
    if (!x.is_causal && x.split) check_slots(y.partial_kv, y.partial_k_sum, slots(S));
  }
  void check_backward(const LinearBackward& y) const {
    expect_shape(y.grad_out, "grad_out", {B, Hq, L, E});
    expect_shape(y.out, "out", {B, Hq, L, E});
    expect_shape(y.dq, "dq", {B, Hq, L, D});
    expect_shape(y.dk, "dk", {B, H, S, D});
    expect_shape(y.dv, "dv", {B, H, S, E});
    if (x.normalize) expect_shape(y.normalizer, "normalizer", {B, Hq, L});
    if (y.grad_kv) check_state(y.grad_kv, y.grad_k_sum, "grad of the state");
    check_state(y.dkv, y.dk_sum, "grad of the state");
    check_slots(y.segment_kv, y.segment_k_sum, saved_slots());
    if (x.split) check_slots(y.partial_kv, y.partial_k_sum, slots(L));
  }

  // ---- sequences, segments, scratch

  int64_t boundary(int64_t n) const { return x.cu_seqlens.as<int32_t>()[n * x.cu_seqlens.stride[0]]; }
  Sequence sequence(int64_t n, int64_t length) const {
    if (!x.cu_seqlens) return {n, n, 0, length};
    return {n, 0, boundary(n), boundary(n + 1) - boundary(n)};
  }
  int64_t slots(int64_t length) const {
    return x.cu_seqlens ? length / x.segment + N : (length + x.segment - 1) / x.segment;
  }
  int64_t saved_slots() const { return x.is_causal ? slots(L) : x.cu_seqlens ? N : 1; }
  int64_t segments(const Sequence& s) const { return (s.length + x.segment - 1) / x.segment; }
  int64_t first_slot(const Sequence& s) const { return x.cu_seqlens ? s.start / x.segment + s.n : 0; }
  Slot slot(const Sequence& s, int64_t number) const {
    int64_t offset = number * x.segment, rows = std::clamp<int64_t>(s.length - offset, 0, x.segment);
    return {s, first_slot(s) + number, s.start + offset, rows};
  }
  // the slot at (b, index): the last sequence that starts at or before it
  Slot slot_at(int64_t b, int64_t index, int64_t length) const {
    if (!x.cu_seqlens) return slot(sequence(b, length), index);
    int64_t low = 0, high = N;
    while (high - low > 1) {
      int64_t middle = (low + high) / 2;
      (first_slot(sequence(middle, length)) <= index ? low : high) = middle;
    }
    Sequence s = sequence(low, length);
    return slot(s, index - first_slot(s));
  }
  Scratch<T> scratch(int worker) const {
    int64_t bytes = Scratch<T>(nullptr, D, E).bytes;
    return Scratch<T>(x.workspace.data + worker * bytes, D, E);
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
    int64_t count = slots(length);
    parallel_tasks(B * H * count, x.threads, [&](int64_t task, int worker) {
      Slot where = slot_at(task / (H * count), task % count, length);
      if (!where.rows) return;
      Scratch<T> s = scratch(worker);
      f(s, where, task / count % H);
    });
  }

  // ---- states in memory, [D][E] and [D], contiguous

  struct Saved {
    T *kv, *sum;
  };
  Saved saved(const View& kv, const View& sum, int64_t n, int64_t h) const {
    return {kv.as<T>() + (n * H + h) * D * E, sum.as<T>() + (n * H + h) * D};
  }
  Saved saved(const View& kv, const View& sum, const Slot& where, int64_t h) const {
    int64_t at = (where.sequence.b * H + h) * kv.size[2] + where.index;
    return {kv.as<T>() + at * D * E, sum.as<T>() + at * D};
  }
  Saved total(const View& kv, const View& sum, const Sequence& s, int64_t h) const {
    int64_t at = (s.b * H + h) * kv.size[2] + (x.cu_seqlens ? s.n : 0);
    return {kv.as<T>() + at * D * E, sum.as<T>() + at * D};
  }
  void load_state(Saved from, Matrix<T> state, T* sum) const {
    for (int64_t m = 0; m < D; ++m) load_row<T>(from.kv + m * E, 1, E, state.row(m));
    load_row<T>(from.sum, 1, D, sum);
  }
  void store_state(Matrix<T> state, const T* sum, Saved to) const {
    for (int64_t m = 0; m < D; ++m) store_row<T>(state.row(m), to.kv + m * E, E);
    store_row<T>(sum, to.sum, D);
  }
  // as [E+1][D], the sums in the last row
  void load_transposed(Saved from, Matrix<T> state) const {
    for (int64_t e = 0; e < E; ++e) load_row<T>(from.kv + e, E, D, state.row(e));
    load_row<T>(from.sum, 1, D, state.row(E));
  }
  void store_transposed(Matrix<T> state, Saved to) const {
    for (int64_t m = 0; m < D; ++m)
      for (int64_t e = 0; e < E; ++e) to.kv[m * E + e] = state.row(e)[m];
    store_row<T>(state.row(E), to.sum, D);
  }
  static void clear(Matrix<T> m, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i) std::fill_n(m.row(i), padded<T>(columns), T(0));
  }
  static void copy(Matrix<T> from, Matrix<T> to, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i) std::copy_n(from.row(i), padded<T>(columns), to.row(i));
  }
  // partial states to the states that segments start from, in order or in reverse; `run` ends as the state after all
  void scan(const View& kv, const View& sum, const Sequence& s, int64_t h, Saved run, bool reverse) const {
    int64_t count = segments(s);
    for (int64_t i = 0; i < count; ++i) {
      Saved here = saved(kv, sum, slot(s, reverse ? count - 1 - i : i), h);
      auto step = [](T* state, T* running, int64_t n) {
        for (int64_t j = 0; j < n; ++j) {
          T part = state[j];
          state[j] = running[j];
          running[j] += part;
        }
      };
      step(here.kv, run.kv, D * E);
      step(here.sum, run.sum, D);
    }
  }
  void initial(const View& kv, const View& sum, int64_t n, int64_t h, Saved to) const {
    if (kv) {
      Saved from = saved(kv, sum, n, h);
      std::copy_n(from.kv, D * E, to.kv), std::copy_n(from.sum, D, to.sum);
    } else {
      std::fill_n(to.kv, D * E, T(0)), std::fill_n(to.sum, D, T(0));
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
          for (int64_t i = 0; i < n; i += 64 / sizeof(From)) __builtin_prefetch(row + next + i, 0, 2);
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
  void load_queries(int64_t b, int64_t h, int64_t first, int64_t rows, Matrix<T> to, bool reverse) const {
    load_rows(x.q, b, h, first, rows, D, to, reverse, feature);
  }
  void load_keys(Scratch<T>& s, int64_t b, int64_t h, int64_t first, int64_t rows, bool reverse) const {
    load_mask(s, b, first, rows, reverse);
    load_rows(x.k, b, h, first, rows, D, s.k, reverse, feature);
    clear_masked(s, rows, s.k, D);
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
  // [g, h]: what reaches the numerator and the normaliser
  void load_gradients(Scratch<T>& s, const LinearBackward& y, int64_t b, int64_t h, int64_t first, int64_t rows,
                      bool reverse) const {
    load_rows(y.grad_out, b, h, first, rows, E, s.g, reverse);
    if (x.normalize) load_rows(y.out, b, h, first, rows, E, s.out, reverse);
    const T* z = x.normalize ? y.normalizer.as<T>() + (b * Hq + h) * L : nullptr;
    for (int64_t r = 0; r < padded<T>(rows); ++r) {
      T* g = s.g.row(r);
      T down = 0;
      if (x.normalize && r < rows) {
        T zr = z[first + (reverse ? rows - 1 - r : r)];
        divide(g, E, zr);
        V<T> dot{};
        for (int64_t e = 0; e < E; e += width<T>) dot = fma(load(g + e), load(s.out.row(r) + e), dot);
        down = -sum<T>(dot);
      } else {
        multiply(g, E, static_cast<T>(x.scale));
      }
      for (int64_t e = E; e < padded<T>(E + 1); ++e) g[e] = e == E ? down : T(0);
    }
  }

  // ---- forward

  // bfloat16 inputs multiply as bfloat16 pairs where the instruction set has them; sums stay float32
  bool in_pairs() const { return has_pairs && x.q.dtype == DType::bf16; }
  static Within<T, T> within(Matrix<T> p, Matrix<T> c) { return {p, c, p, c}; }
  void pair_across_state(Scratch<T>& s) const {
    if constexpr (std::is_same_v<T, float>) pair_across(D, E, s.state.current, s.state_pairs);
  }
  void query_products_in_pairs(Scratch<T>& s, int64_t rows, Matrix<T> p) const {
    if constexpr (std::is_same_v<T, float>) {
      int64_t pairs = (D + 1) / 2;
      pair_along(rows, D, s.q, s.q_pairs);
      Within<T, Pair> own{};
      if (p.p) {
        scores(rows, pairs, s.q_pairs, s.k_pairs_transposed, p);
        pair_along(rows, padded<T>(rows), p, s.p_pairs);
        own = {p, s.v, s.p_pairs, s.v_pairs};
      }
      outputs(rows, own, pairs, s.q_pairs, s.state_pairs, E, s.out, false);
    }
  }
  void pair_keys(Scratch<T>& s, int64_t rows) const {
    if constexpr (std::is_same_v<T, float>) {
      pair_along(padded<T>(rows), D, s.k, s.k_pairs);
      // a transpose of 32-bit lanes keeps the pairs together
      transpose(reinterpret_cast<float*>(s.k_pairs.p), s.k_pairs.ld, rows, (D + 1) / 2,
                reinterpret_cast<float*>(s.k_pairs_transposed.p), s.k_pairs_transposed.ld);
      pair_along(D, rows, s.k_transposed, s.key_features);
      pair_across(rows, E, s.v, s.v_pairs);
    }
  }
  void accumulate_pairs(Scratch<T>& s, int64_t rows) const {
    if constexpr (std::is_same_v<T, float>) accumulate((rows + 1) / 2, D, s.key_features, s.v_pairs, E, s.state);
  }
  void accumulate_keys(Scratch<T>& s, int64_t rows) const {
    if (in_pairs()) accumulate_pairs(s, rows);
    else accumulate(rows, D, s.k_transposed, s.v, E, s.state);
    for (int64_t m = 0; m < D; m += width<T>) {
      V<T> local{};
      for (int64_t r = 0; r < rows; ++r) local += load(s.k.row(r) + m);
      local += load(s.local_sum + m);
      store(s.local_sum + m, local);
      store(s.current_sum + m, load(s.base_sum + m) + local);
    }
  }
  void begin_segment(Scratch<T>& s) const {
    clear(s.state.local, D, E);
    copy(s.state.base, s.state.current, D, E);
    std::fill_n(s.local_sum, padded<T>(D), T(0));
    std::copy_n(s.base_sum, padded<T>(D), s.current_sum);
  }
  void end_segment(Scratch<T>& s) const {
    std::swap(s.state.base, s.state.current);
    std::swap(s.base_sum, s.current_sum);
  }
  // the rows of one chunk of queries against the state, and against the chunk's own keys where causal
  void forward_queries(Scratch<T>& s, const LinearForward& y, int64_t b, int64_t h, int64_t first, int64_t rows) const {
    Matrix<T> p = x.is_causal ? s.p : Matrix<T>{};
    if (in_pairs()) pair_across_state(s);
    for (int64_t head = h * groups; head < (h + 1) * groups; ++head) {
      load_queries(b, head, first, rows, s.q, false);
      if (in_pairs()) {
        query_products_in_pairs(s, rows, p);
      } else {
        if (p.p) scores(rows, D, s.q, s.k_transposed, p);
        outputs(rows, within(p, s.v), D, s.q, s.state.current, E, s.out, false);
      }
      if (x.normalize) normalizers(rows, p, D, s.q, s.current_sum, s.z);
      T* z = x.normalize ? y.normalizer.as<T>() + (b * Hq + head) * L + first : nullptr;
      for (int64_t r = 0; r < rows; ++r) {
        if (z) divide(s.out.row(r), E, z[r] = s.z[r]);
        else multiply(s.out.row(r), E, static_cast<T>(x.scale));
      }
      store_rows(s.out, rows, E, y.out, b, head, first, false);
    }
  }
  void forward_segment(Scratch<T>& s, const LinearForward* y, const Slot& where, int64_t h) const {
    begin_segment(s);
    for (int64_t first = where.first, end = where.first + where.rows; first < end; first += chunk) {
      int64_t rows = std::min(chunk, end - first), b = where.sequence.b;
      load_keys(s, b, h, first, rows, false);
      transpose(s.k.p, s.k.ld, rows, D, s.k_transposed.p, s.k_transposed.ld);
      load_values(s, b, h, first, rows, false, false);
      if (in_pairs()) pair_keys(s, rows);
      if (y) forward_queries(s, *y, b, h, first, rows);
      accumulate_keys(s, rows);
    }
  }
  void load_initial(Scratch<T>& s, int64_t n, int64_t h) const {
    if (x.kv) return load_state(saved(x.kv, x.k_sum, n, h), s.state.base, s.base_sum);
    clear(s.state.base, D, E);
    std::fill_n(s.base_sum, padded<T>(D), T(0));
  }
  void forward_serial(const LinearForward& y) const {
    for_sequences([&](Scratch<T>& s, int64_t n, int64_t h) {
      Sequence sequence = this->sequence(n, L);
      load_initial(s, n, h);
      for (int64_t i = 0; i < segments(sequence); ++i) {
        Slot where = slot(sequence, i);
        if (y.segment_kv) store_state(s.state.base, s.base_sum, saved(y.segment_kv, y.segment_k_sum, where, h));
        forward_segment(s, &y, where, h);
        end_segment(s);
      }
      store_state(s.state.base, s.base_sum, saved(y.kv, y.k_sum, n, h));
    });
  }
  // the sum over each segment's keys alone
  void forward_partial(const View& kv, const View& sum) const {
    for_slots(S, [&](Scratch<T>& s, const Slot& where, int64_t h) {
      clear(s.state.base, D, E);
      std::fill_n(s.base_sum, padded<T>(D), T(0));
      forward_segment(s, nullptr, where, h);
      store_state(s.state.local, s.local_sum, saved(kv, sum, where, h));
    });
  }
  void forward_split(const LinearForward& y) const {
    forward_partial(y.segment_kv, y.segment_k_sum);
    for_sequences([&](Scratch<T>&, int64_t n, int64_t h) {
      Saved run = saved(y.kv, y.k_sum, n, h);
      initial(x.kv, x.k_sum, n, h, run);
      scan(y.segment_kv, y.segment_k_sum, sequence(n, L), h, run, false);
    });
    for_slots(L, [&](Scratch<T>& s, const Slot& where, int64_t h) {
      load_state(saved(y.segment_kv, y.segment_k_sum, where, h), s.state.base, s.base_sum);
      forward_segment(s, &y, where, h);
    });
  }
  void forward_total(const LinearForward& y) const {
    if (x.split) {
      forward_partial(y.partial_kv, y.partial_k_sum);
      for_sequences([&](Scratch<T>&, int64_t n, int64_t h) {
        Saved run = saved(y.kv, y.k_sum, n, h);
        initial(x.kv, x.k_sum, n, h, run);
        scan(y.partial_kv, y.partial_k_sum, sequence(n, S), h, run, false);
      });
    } else {
      for_sequences([&](Scratch<T>& s, int64_t n, int64_t h) {
        Sequence sequence = this->sequence(n, S);
        load_initial(s, n, h);
        for (int64_t i = 0; i < segments(sequence); ++i) {
          forward_segment(s, nullptr, slot(sequence, i), h);
          end_segment(s);
        }
        store_state(s.state.base, s.base_sum, saved(y.kv, y.k_sum, n, h));
      });
    }
    if (y.segment_kv)
      for_sequences([&](Scratch<T>&, int64_t n, int64_t h) {
        Saved from = saved(y.kv, y.k_sum, n, h), to = total(y.segment_kv, y.segment_k_sum, sequence(n, L), h);
        std::copy_n(from.kv, D * E, to.kv), std::copy_n(from.sum, D, to.sum);
      });
    for_slots(L, [&](Scratch<T>& s, const Slot& where, int64_t h) {
      load_state(saved(y.kv, y.k_sum, where.sequence.n, h), s.state.current, s.current_sum);
      for (int64_t first = where.first, end = where.first + where.rows; first < end; first += chunk)
        forward_queries(s, y, where.sequence.b, h, first, std::min(chunk, end - first));
    });
  }

  // ---- one token: the state is read once, and updated and read out in registers

  // new = old + k v^T and out = q new for N vectors of columns; `old` may be `state`, and k null where it is up to date
  template <int N>
  void step_columns(const T* old, T* state, const T* k, const T* v, const T* q, T* out) const {
    constexpr int W = width<T>;
    V<T> total[N] = {}, value[N] = {};
    for (int n = 0; n < N; ++n)
      if (k) value[n] = load(v + n * W);
    for (int64_t m = 0; m < D; ++m) {
      V<T> qm = broadcast(q[m]), km = broadcast(k ? k[m] : T(0));
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        V<T> row = load(old + m * E + n * W);
        if (k) store(state + m * E + n * W, row = fma(km, value[n], row));
        total[n] = fma(qm, row, total[n]);
      }
    }
    for (int n = 0; n < N; ++n) store(out + n * W, total[n]);
  }
  void step_head(const T* old, T* state, const T* k, const T* v, const T* q, T* out) const {
    constexpr int W = width<T>;
    int64_t e = 0;
    for (; e + 4 * W <= E; e += 4 * W) step_columns<4>(old + e, state + e, k, v + e, q, out + e);
    for (; e + W <= E; e += W) step_columns<1>(old + e, state + e, k, v + e, q, out + e);
    for (; e < E; ++e) {
      out[e] = 0;
      for (int64_t m = 0; m < D; ++m) {
        if (k) state[m * E + e] = old[m * E + e] + k[m] * v[e];
        out[e] += q[m] * state[m * E + e];
      }
    }
  }
  void step(const LinearForward& y) const {
    for_sequences([&](Scratch<T>& s, int64_t n, int64_t h) {
      load_keys(s, n, h, 0, 1, false);
      load_values(s, n, h, 0, 1, false, false);
      Saved to = saved(y.kv, y.k_sum, n, h), from = to;
      if (x.kv) from = saved(x.kv, x.k_sum, n, h);
      else initial(x.kv, x.k_sum, n, h, to);
      for (int64_t m = 0; m < D; ++m) to.sum[m] = from.sum[m] + s.k.p[m];
      for (int64_t head = h * groups; head < (h + 1) * groups; ++head) {
        bool first = head == h * groups;
        load_queries(n, head, 0, 1, s.q, false);
        step_head(first ? from.kv : to.kv, to.kv, first ? s.k.p : nullptr, s.v.p, s.q.p, s.out.p);
        T z = 0;
        for (int64_t m = 0; m < D; ++m) z += s.q.p[m] * to.sum[m];
        if (x.normalize) {
          y.normalizer.as<T>()[n * Hq + head] = z;
          divide(s.out.p, E, z);
        } else {
          multiply(s.out.p, E, static_cast<T>(x.scale));
        }
        store_rows(s.out, 1, E, y.out, n, head, 0, false);
      }
    });
  }

  // ---- backward

  // dq of one chunk against state [E+1][D], and against the chunk's own keys where causal
  void backward_queries(Scratch<T>& s, const LinearBackward& y, int64_t b, int64_t h, int64_t first, int64_t rows) const {
    Matrix<T> p = x.is_causal ? s.p : Matrix<T>{};
    for (int64_t head = h * groups; head < (h + 1) * groups; ++head) {
      load_gradients(s, y, b, head, first, rows, false);
      if (p.p) scores(rows, E + 1, s.g, s.v_transposed, p);
      outputs(rows, within(p, s.k), E + 1, s.g, s.state.current, D, s.out, false);
      load_rows(x.q, b, head, first, rows, D, s.q, false);
      pull_back_rows(s, s.q, s.out, rows, false);
      store_rows(s.out, rows, D, y.dq, b, head, first, false);
    }
  }
  void pull_back_rows(Scratch<T>& s, Matrix<T> raw, Matrix<T> gradient, int64_t rows, bool keys) const {
    for (int64_t r = 0; r < rows; ++r) {
      T* g = gradient.row(r);
      if (keys && x.mask && s.masked[r]) std::fill_n(g, padded<T>(D), T(0));
      else
        for (int64_t m = 0; m < D; m += width<T>) store(g + m, pull_back<T>(load(raw.row(r) + m), load(g + m), feature));
    }
  }
  void query_segment(Scratch<T>& s, const LinearBackward& y, const Slot& where, int64_t h) const {
    load_transposed(saved(y.segment_kv, y.segment_k_sum, where, h), s.state.base);
    begin_transposed(s.state);
    for (int64_t first = where.first, end = where.first + where.rows; first < end; first += chunk) {
      int64_t rows = std::min(chunk, end - first), b = where.sequence.b;
      load_keys(s, b, h, first, rows, false);
      load_values(s, b, h, first, rows, true, false);
      transpose(s.v.p, s.v.ld, rows, E + 1, s.v_transposed.p, s.v_transposed.ld);
      backward_queries(s, y, b, h, first, rows);
      if (first + rows < end) accumulate(rows, E + 1, s.v_transposed, s.k, D, s.state);
    }
  }
  void begin_transposed(State<T>& state) const {
    clear(state.local, E + 1, D);
    copy(state.base, state.current, E + 1, D);
  }
  // dk and dv of one chunk against the reverse state, and against the chunk's own queries where causal
  void key_segment(Scratch<T>& s, const LinearBackward& y, const Slot& where, int64_t h, bool outputs_too) const {
    begin_transposed(s.reverse);
    int64_t b = where.sequence.b, chunks = (where.rows + chunk - 1) / chunk;
    for (int64_t i = chunks - 1; i >= 0; --i) {
      int64_t first = where.first + i * chunk, rows = std::min(chunk, where.first + where.rows - first);
      if (outputs_too) {
        load_keys(s, b, h, first, rows, true);
        load_values(s, b, h, first, rows, true, true);
        transpose(s.reverse.current.p, s.reverse.current.ld, E + 1, D, s.reverse_transposed.p, s.reverse_transposed.ld);
      }
      for (int64_t head = h * groups; head < (h + 1) * groups; ++head) {
        load_gradients(s, y, b, head, first, rows, true);
        transpose(s.g.p, s.g.ld, rows, E + 1, s.g_transposed.p, s.g_transposed.ld);
        load_queries(b, head, first, rows, s.q, true);
        if (outputs_too) {
          bool more = head > h * groups;
          scores(rows, E + 1, s.v, s.g_transposed, s.p);
          outputs(rows, within(s.p, s.q), E + 1, s.v, more ? Matrix<T>{} : s.reverse.current, D, s.dk, more);
          transpose(s.q.p, s.q.ld, rows, D, s.q_transposed.p, s.q_transposed.ld);
          scores(rows, D, s.k, s.q_transposed, s.p);
          outputs(rows, within(s.p, s.g), D, s.k, more ? Matrix<T>{} : s.reverse_transposed, E, s.dv, more);
        }
        accumulate(rows, E + 1, s.g_transposed, s.q, D, s.reverse);
      }
      if (outputs_too) store_keys(s, y, b, h, first, rows, true);
    }
  }
  void store_keys(Scratch<T>& s, const LinearBackward& y, int64_t b, int64_t h, int64_t first, int64_t rows,
                  bool reverse) const {
    load_rows(x.k, b, h, first, rows, D, s.k, reverse);
    pull_back_rows(s, s.k, s.dk, rows, true);
    clear_masked(s, rows, s.dv, E);
    store_rows(s.dk, rows, D, y.dk, b, h, first, reverse);
    store_rows(s.dv, rows, E, y.dv, b, h, first, reverse);
  }
  void load_final(Scratch<T>& s, const LinearBackward& y, int64_t n, int64_t h) const {
    if (y.grad_kv) load_transposed(saved(y.grad_kv, y.grad_k_sum, n, h), s.reverse.base);
    else clear(s.reverse.base, E + 1, D);
  }
  void backward_serial(const LinearBackward& y) const {
    for_sequences([&](Scratch<T>& s, int64_t n, int64_t h) {
      Sequence sequence = this->sequence(n, L);
      load_final(s, y, n, h);
      for (int64_t i = segments(sequence) - 1; i >= 0; --i) {
        Slot where = slot(sequence, i);
        query_segment(s, y, where, h);
        key_segment(s, y, where, h, true);
        std::swap(s.reverse.base, s.reverse.current);
      }
      store_transposed(s.reverse.base, saved(y.dkv, y.dk_sum, n, h));
    });
  }
  // the sum over each segment's queries alone
  void backward_partial(const LinearBackward& y) const {
    for_slots(L, [&](Scratch<T>& s, const Slot& where, int64_t h) {
      clear(s.reverse.base, E + 1, D);
      key_segment(s, y, where, h, false);
      store_transposed(s.reverse.local, saved(y.partial_kv, y.partial_k_sum, where, h));
    });
    for_sequences([&](Scratch<T>&, int64_t n, int64_t h) {
      Saved run = saved(y.dkv, y.dk_sum, n, h);
      initial(y.grad_kv, y.grad_k_sum, n, h, run);
      scan(y.partial_kv, y.partial_k_sum, sequence(n, L), h, run, true);
    });
  }
  void backward_split(const LinearBackward& y) const {
    backward_partial(y);
    for_slots(L, [&](Scratch<T>& s, const Slot& where, int64_t h) {
      query_segment(s, y, where, h);
      load_transposed(saved(y.partial_kv, y.partial_k_sum, where, h), s.reverse.base);
      key_segment(s, y, where, h, true);
    });
  }
  void backward_total(const LinearBackward& y) const {
    if (x.split) backward_partial(y);
    else
      for_sequences([&](Scratch<T>& s, int64_t n, int64_t h) {
        Sequence sequence = this->sequence(n, L);
        load_final(s, y, n, h);
        for (int64_t i = segments(sequence) - 1; i >= 0; --i) {
          key_segment(s, y, slot(sequence, i), h, false);
          std::swap(s.reverse.base, s.reverse.current);
        }
        store_transposed(s.reverse.base, saved(y.dkv, y.dk_sum, n, h));
      });
    for_slots(L, [&](Scratch<T>& s, const Slot& where, int64_t h) {
      load_transposed(total(y.segment_kv, y.segment_k_sum, where.sequence, h), s.state.current);
      for (int64_t first = where.first, end = where.first + where.rows; first < end; first += chunk)
        backward_queries(s, y, where.sequence.b, h, first, std::min(chunk, end - first));
    });
    for_slots(S, [&](Scratch<T>& s, const Slot& where, int64_t h) {
      load_transposed(saved(y.dkv, y.dk_sum, where.sequence.n, h), s.reverse.current);
      transpose(s.reverse.current.p, s.reverse.current.ld, E + 1, D, s.reverse_transposed.p, s.reverse_transposed.ld);
      for (int64_t first = where.first, end = where.first + where.rows; first < end; first += chunk) {
        int64_t rows = std::min(chunk, end - first), b = where.sequence.b;
        load_keys(s, b, h, first, rows, false);
        load_values(s, b, h, first, rows, true, false);
        outputs(rows, within({}, {}), E + 1, s.v, s.reverse.current, D, s.dk, false);
        outputs(rows, within({}, {}), D, s.k, s.reverse_transposed, E, s.dv, false);
        store_keys(s, y, b, h, first, rows, false);
      }
    });
  }
};

template <class F>
void with_working_type(const LinearProblem& x, F&& f) {
  if (x.q.dtype == DType::f64) f(Linear<double>(x));
  else f(Linear<float>(x));
}

}  // namespace

void linear_forward(const LinearProblem& x, const LinearForward& y) {
  with_working_type(x, [&](auto&& op) { op.forward(y); });
}
void linear_backward(const LinearProblem& x, const LinearBackward& y) {
  with_working_type(x, [&](auto&& op) { op.backward(y); });
}
int64_t linear_workspace(int64_t D, int64_t E, bool float64) {
  return float64 ? Scratch<double>(nullptr, D, E).bytes : Scratch<float>(nullptr, D, E).bytes;
}

}  // namespace longattn::LONGATTN_ISA
