// The forward sweep: y_i = sum_{j <= i} (phi(q_i).phi(k_j)) v_j, that is   a = phi(q)   b = phi(k)   c = v   state [M][E]
#pragma once
#include "sweeps.h"

namespace longattn::LONGATTN_ISA {

template <class T, bool scaled>
class Forward : Sweeps<T, scaled> {
  using Base = Sweeps<T, scaled>;
  using Base::x, Base::B, Base::Hq, Base::L, Base::D, Base::H, Base::S, Base::E, Base::M, Base::P, Base::groups, Base::seq,
      Base::N;
  using typename Base::Saved;

 public:
  Forward(const LinearProblem& problem, const LinearForward& y) : Base(problem, true), y(y) {
    expect_shape(y.out, "out", {B, Hq, L, E});
    expect_dtype(y.out, "out", x.q.dtype);
    if (x.normalize) this->check_working(y.normalizer, "normalizer", {B, Hq, L});
    if (scaled) this->check_working(y.row_scale, "row_scale", {B, Hq, L});
    this->check_state(y.kv, y.k_sum, y.log_scale, "state");
    if (y.segment.kv || (x.is_causal && x.split)) this->check_slots(y.segment, this->saved_slots());
    if (!x.is_causal && x.split) this->check_slots(y.partial, seq.slots(S));
  }

  void run() {
    bool exact = scaled && x.favor.exact_diagonal;
    if (x.is_causal && L == 1 && !y.segment.kv && !x.cu_seqlens && !exact) step();
    else if (!x.is_causal) whole();
    else if (x.split) split();
    else serial();
  }

 private:
  const LinearForward& y;

  // ---- bfloat16 inputs multiply as bfloat16 pairs where the instruction set has them; sums stay float32

  bool in_pairs() const { return has_pairs && x.q.dtype == DType::bf16; }
  void pair_across_state(Scratch<T>& s) const {
    if constexpr (has_pairs && std::is_same_v<T, float>) pair_across(M, E, s.state.current, s.state_pairs);
  }
  void scores_in_pairs(Scratch<T>& s, int64_t rows, Matrix<T> p) const {
    if constexpr (has_pairs && std::is_same_v<T, float>) scores(rows, (M + 1) / 2, s.q_pairs, s.k_pairs_transposed, p);
  }
  void outputs_in_pairs(Scratch<T>& s, int64_t rows, Matrix<T> p, const T* share) const {
    if constexpr (has_pairs && std::is_same_v<T, float>) {
      Within<T, Pair> own{};
      if (p.p) {
        pair_along(rows, padded<T>(rows), p, s.p_pairs);
        own = {p, s.v, s.p_pairs, s.v_pairs};
      }
      outputs(rows, own, (M + 1) / 2, s.q_pairs, s.state_pairs, E, s.out, false, share);
    }
  }
  void pair_keys(Scratch<T>& s, int64_t rows) const {
    if constexpr (has_pairs && std::is_same_v<T, float>) {
      pair_along(padded<T>(rows), M, s.k, s.k_pairs);
      // a transpose of 32-bit lanes keeps the pairs together
      transpose(reinterpret_cast<float*>(s.k_pairs.p), s.k_pairs.ld, rows, (M + 1) / 2,
                reinterpret_cast<float*>(s.k_pairs_transposed.p), s.k_pairs_transposed.ld);
      pair_along(M, rows, s.k_transposed, s.key_features);
    }
  }
  void pair_values(Scratch<T>& s, int64_t rows) const {
    if constexpr (has_pairs && std::is_same_v<T, float>) pair_across(rows, E, s.v, s.v_pairs);
  }

  // ---- one chunk

  // what the keys add to the state; with scales, in units of the largest key seen
  void accumulate_keys(Scratch<T>& s, int64_t rows) const {
    Shares<T> shares{}, *weighed = nullptr;
    if (scaled) {
      shares = raise(s.state, top_of(s.log_k, rows)), weighed = &shares;
      for (int64_t r = 0; r < rows; ++r) {
        s.weight[r] = share_of(s.log_k[r], s.state.local_scale);
        this->multiply(s.v.row(r), E, s.weight[r]);
      }
      if (in_pairs()) pair_values(s, rows);
    }
    if (in_pairs()) {
      if constexpr (has_pairs && std::is_same_v<T, float>)
        accumulate((rows + 1) / 2, M, s.key_features, s.v_pairs, E, s.state, weighed);
    } else {
      accumulate(rows, M, s.k_transposed, s.v, E, s.state, weighed);
    }
    for (int64_t m = 0; m < M; m += width<T>) {
      V<T> local{}, before = load(s.local_sum + m), base = load(s.base_sum + m);
      if (scaled) {
        for (int64_t r = 0; r < rows; ++r) local = fma(broadcast(s.weight[r]), load(s.k.row(r) + m), local);
        store(s.local_sum + m, local = fma(broadcast(shares.keep), before, local));
        store(s.current_sum + m, merge<T>(base, shares.base, local, shares.local));
      } else {
        for (int64_t r = 0; r < rows; ++r) local += load(s.k.row(r) + m);
        store(s.local_sum + m, local += before);
        store(s.current_sum + m, base + local);
      }
    }
  }
  static T top_of(const T* log, int64_t rows) {
    T top = nothing<T>;
    for (int64_t r = 0; r < rows; ++r) top = log[r] > top ? log[r] : top;
    return top;
  }
  void begin_segment(Scratch<T>& s) const {
    this->clear(s.state.local, M, E);
    this->copy(s.state.base, s.state.current, M, E);
    std::fill_n(s.local_sum, padded<T>(M), T(0));
    std::copy_n(s.base_sum, padded<T>(M), s.current_sum);
    s.state.local_scale = nothing<T>, s.state.current_scale = s.state.base_scale;
  }
  void end_segment(Scratch<T>& s) const {
    Base::end_segment(s.state);
    std::swap(s.base_sum, s.current_sum);
  }

  // scores of the chunk, weighed, and the scale of each row: the largest logarithm among what it sees
  void weights(Scratch<T>& s, int64_t rows, Matrix<T> p) const {
    bool exact = x.favor.exact_diagonal;
    if (exact) scores(rows, D, s.raw_q, s.raw_k_transposed, p);
    T running = s.state.current_scale;
    for (int64_t i = 0; i < rows; ++i) {
      T top = nothing<T>;
      if (exact) {
        top = s.state.current_scale + s.log_q[i];
        for (int64_t j = 0; j <= i; ++j) top = !s.masked[j] && p.row(i)[j] > top ? p.row(i)[j] : top;
        s.weight[i] = s.masked[i] ? nothing<T> : T(0);
      } else {
        if (p.p) running = s.log_k[i] > running ? s.log_k[i] : running;
        top = running;
      }
      s.row_scale[i] = top == nothing<T> ? T(0) : -top;
      s.share[i] = share_of(s.state.current_scale, -s.row_scale[i] - s.log_q[i]);
    }
    if (exact) return this->exponentiate(rows, p, s.row_scale, s.weight);
    if (!p.p) return;
    if (in_pairs()) scores_in_pairs(s, rows, p);
    else scores(rows, M, s.q, s.k_transposed, p);
    this->weigh(rows, p, s.row_scale, s.log_k);
  }

  // the rows of one chunk of queries against the state, and against the chunk's own keys where causal
  void queries(Scratch<T>& s, int64_t b, int64_t h, int64_t first, int64_t rows) const {
    Matrix<T> p = x.is_causal ? s.p : Matrix<T>{};
    const T* share = scaled ? s.share : nullptr;
    if (in_pairs()) pair_across_state(s);
    for (int64_t head = h * groups; head < (h + 1) * groups; ++head) {
      this->load_queries(s, b, head, first, rows, false);
      if constexpr (has_pairs && std::is_same_v<T, float>)
        if (in_pairs()) pair_along(rows, M, s.q, s.q_pairs);
      if (scaled) weights(s, rows, p);
      else if (p.p && in_pairs()) scores_in_pairs(s, rows, p);
      else if (p.p) scores(rows, M, s.q, s.k_transposed, p);
      if (in_pairs()) outputs_in_pairs(s, rows, p, share);
      else outputs(rows, this->within(p, s.v), M, s.q, s.state.current, E, s.out, false, share);
      finish(s, b, head, first, rows, p);
    }
  }
  void finish(Scratch<T>& s, int64_t b, int64_t head, int64_t first, int64_t rows, Matrix<T> p) const {
    int64_t at = (b * Hq + head) * L + first;
    if (x.normalize) normalizers(rows, p, M, s.q, s.current_sum, s.z, scaled ? s.share : nullptr);
    for (int64_t r = 0; r < rows; ++r) {
      if (x.normalize) this->divide(s.out.row(r), E, y.normalizer.as<T>()[at + r] = this->resolved(s.z[r]));
      else this->multiply(s.out.row(r), E, static_cast<T>(x.scale));
      if (scaled) y.row_scale.as<T>()[at + r] = T(0) - s.row_scale[r];
    }
    this->store_rows(s.out, rows, E, y.out, b, head, first, false);
  }
  void sweep(Scratch<T>& s, const Slot& where, int64_t h, bool outputs_too) const {
    begin_segment(s);
    for (int64_t first = where.first, end = where.first + where.rows; first < end; first += chunk) {
      int64_t rows = std::min(chunk, end - first), b = where.sequence.b;
      this->load_keys(s, b, h, first, rows, false);
      transpose(s.k.p, s.k.ld, rows, M, s.k_transposed.p, s.k_transposed.ld);
      this->load_values(s, b, h, first, rows, false, false);
      if (in_pairs()) pair_keys(s, rows), pair_values(s, rows);
      if (outputs_too) queries(s, b, h, first, rows);
      accumulate_keys(s, rows);
    }
  }

  // ---- sequences

  void load_base(Scratch<T>& s, Saved from) const {
    s.state.base_scale = this->load_state(from, s.state.base, s.base_sum);
  }
  void load_initial(Scratch<T>& s, int64_t n, int64_t h) const {
    if (x.kv) return load_base(s, this->saved(x.kv, x.k_sum, x.log_scale, n, h));
    clear_base(s);
  }
  void clear_base(Scratch<T>& s) const {
    this->clear(s.state.base, M, E);
    std::fill_n(s.base_sum, padded<T>(M), T(0));
    s.state.base_scale = nothing<T>;
  }
  void store_base(Scratch<T>& s, Saved to) const { this->store_state(s.state.base, s.base_sum, s.state.base_scale, to); }
  Saved final_state(int64_t n, int64_t h) const { return this->saved(y.kv, y.k_sum, y.log_scale, n, h); }

  void serial() const {
    this->for_sequences([&](Scratch<T>& s, int64_t n, int64_t h) {
      Sequence sequence = seq.sequence(n, L);
      load_initial(s, n, h);
      for (int64_t i = 0; i < seq.segments(sequence); ++i) {
        Slot where = seq.slot(sequence, i);
        if (y.segment.kv) store_base(s, this->saved(y.segment, where, h));
        sweep(s, where, h, true);
        end_segment(s);
      }
      store_base(s, final_state(n, h));
    });
  }
  // the sum over each segment's keys alone
  void partial(const StateSlots& slots) const {
    this->for_slots(S, [&](Scratch<T>& s, const Slot& where, int64_t h) {
      clear_base(s);
      sweep(s, where, h, false);
      this->store_state(s.state.local, s.local_sum, s.state.local_scale, this->saved(slots, where, h));
    });
  }
  void scan(const StateSlots& slots, int64_t length) const {
    this->for_sequences([&](Scratch<T>&, int64_t n, int64_t h) {
      Saved run = final_state(n, h);
      this->initial(x.kv, x.k_sum, x.log_scale, n, h, run);
      Base::scan(slots, seq.sequence(n, length), h, run, false);
    });
  }
  void split() const {
    partial(y.segment);
    scan(y.segment, L);
    this->for_slots(L, [&](Scratch<T>& s, const Slot& where, int64_t h) {
      load_base(s, this->saved(y.segment, where, h));
      sweep(s, where, h, true);
    });
  }
  void whole() const {
    if (x.split) {
      partial(y.partial);
      scan(y.partial, S);
    } else {
      this->for_sequences([&](Scratch<T>& s, int64_t n, int64_t h) {
        Sequence sequence = seq.sequence(n, S);
        load_initial(s, n, h);
        for (int64_t i = 0; i < seq.segments(sequence); ++i) {
          sweep(s, seq.slot(sequence, i), h, false);
          end_segment(s);
        }
        store_base(s, final_state(n, h));
      });
    }
    if (y.segment.kv)
      this->for_sequences([&](Scratch<T>&, int64_t n, int64_t h) {
        Saved from = final_state(n, h), to = this->total(y.segment, seq.sequence(n, L), h);
        std::copy_n(from.kv, M * E, to.kv), std::copy_n(from.sum, M, to.sum);
        if (scaled) *to.scale = *from.scale;
      });
    this->for_slots(L, [&](Scratch<T>& s, const Slot& where, int64_t h) {
      s.state.current_scale = this->load_state(final_state(where.sequence.n, h), s.state.current, s.current_sum);
      for (int64_t first = where.first, end = where.first + where.rows; first < end; first += chunk)
        queries(s, where.sequence.b, h, first, std::min(chunk, end - first));
    });
  }

  // ---- one token: the state is read once, and updated and read out in registers

  // new = keep old + k v^T and out = q new for N vectors of columns; `old` may be `state`, and k null where it is up to
  // date
  template <int W_>
  void step_columns(const T* old, T* state, T keep, const T* k, const T* v, const T* q, T* out) const {
    constexpr int W = width<T>;
    V<T> total[W_] = {}, value[W_] = {};
    for (int n = 0; n < W_; ++n)
      if (k) value[n] = load(v + n * W);
    for (int64_t m = 0; m < M; ++m) {
      V<T> qm = broadcast(q[m]), km = broadcast(k ? k[m] : T(0));
#pragma GCC unroll 4
      for (int n = 0; n < W_; ++n) {
        V<T> row = load(old + m * E + n * W);
        if (k) {
          if (scaled) row *= broadcast(keep);
          store(state + m * E + n * W, row = fma(km, value[n], row));
        }
        total[n] = fma(qm, row, total[n]);
      }
    }
    for (int n = 0; n < W_; ++n) store(out + n * W, total[n]);
  }
  void step_head(const T* old, T* state, T keep, const T* k, const T* v, const T* q, T* out) const {
    constexpr int W = width<T>;
    int64_t e = 0;
    for (; e + 4 * W <= E; e += 4 * W) step_columns<4>(old + e, state + e, keep, k, v + e, q, out + e);
    for (; e + W <= E; e += W) step_columns<1>(old + e, state + e, keep, k, v + e, q, out + e);
    for (; e < E; ++e) {
      out[e] = 0;
      for (int64_t m = 0; m < M; ++m) {
        if (k) state[m * E + e] = (scaled ? keep * old[m * E + e] : old[m * E + e]) + k[m] * v[e];
        out[e] += q[m] * state[m * E + e];
      }
    }
  }
  void step() const {
    this->for_sequences([&](Scratch<T>& s, int64_t n, int64_t h) {
      this->load_keys(s, n, h, 0, 1, false);
      this->load_values(s, n, h, 0, 1, false, false);
      Saved to = final_state(n, h), from = to;
      if (x.kv) from = this->saved(x.kv, x.k_sum, x.log_scale, n, h);
      else this->initial(x.kv, x.k_sum, x.log_scale, n, h, to);
      T keep = 1, scale = 0;
      if (scaled) {
        T before = from.scale_or_nothing();
        scale = s.log_k[0] > before ? s.log_k[0] : before;
        keep = share_of(before, scale);
        this->multiply(s.k.p, M, share_of(s.log_k[0], scale));
        *to.scale = scale;
        s.row_scale[0] = scale == nothing<T> ? T(0) : -scale;
      }
      for (int64_t m = 0; m < M; ++m) to.sum[m] = (scaled ? keep * from.sum[m] : from.sum[m]) + s.k.p[m];
      for (int64_t head = h * groups; head < (h + 1) * groups; ++head) {
        bool first = head == h * groups;
        this->load_queries(s, n, head, 0, 1, false);
        step_head(first ? from.kv : to.kv, to.kv, keep, first ? s.k.p : nullptr, s.v.p, s.q.p, s.out.p);
        T z = 0;
        for (int64_t m = 0; m < M; ++m) z += s.q.p[m] * to.sum[m];
        if (x.normalize) this->divide(s.out.p, E, y.normalizer.as<T>()[n * Hq + head] = this->resolved(z));
        else this->multiply(s.out.p, E, static_cast<T>(x.scale));
        if (scaled) y.row_scale.as<T>()[n * Hq + head] = T(0) - s.row_scale[0];
        this->store_rows(s.out, 1, E, y.out, n, head, 0, false);
      }
    });
  }
};

}  // namespace longattn::LONGATTN_ISA
