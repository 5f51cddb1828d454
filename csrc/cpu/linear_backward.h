// The backward sweeps, instances of the causal product (prefix.h) with g = dO / z and h = -(dO . o) / z:
//   dphi(q)   a = [g, h]   b = [v, 1]   c = phi(k)        state [E+1][M]
//   dphi(k)   a = [v, 1]   b = [g, h]   c = phi(q)        state [E+1][M]      rows in reverse order
//   dv        a = phi(k)   b = phi(q)   c = g             state [M][E+1]      rows in reverse order
// The states of the last two are each other's transpose, so only one is accumulated. With scales a query counts as a row
// with the logarithm of 1 / (the unit of its z), so that the suffix states raise and merge as the prefix states do.
#pragma once
#include "sweeps.h"

namespace longattn::LONGATTN_ISA {

template <class T, bool scaled>
class Backward : Sweeps<T, scaled> {
  using Base = Sweeps<T, scaled>;
  using Base::x, Base::B, Base::Hq, Base::L, Base::D, Base::H, Base::S, Base::E, Base::M, Base::P, Base::groups, Base::seq,
      Base::N, Base::kind, Base::shared;
  using typename Base::Saved;

 public:
  Backward(const LinearProblem& problem, const LinearBackward& y) : Base(problem, false), y(y) {
    expect_shape(y.grad_out, "grad_out", {B, Hq, L, E});
    expect_shape(y.out, "out", {B, Hq, L, E});
    expect_shape(y.dq, "dq", {B, Hq, L, D});
    expect_shape(y.dk, "dk", {B, H, S, D});
    expect_shape(y.dv, "dv", {B, H, S, E});
    for (const View* v : {&y.grad_out, &y.out, &y.dq, &y.dk, &y.dv}) expect_dtype(*v, "an output or gradient", x.q.dtype);
    if (x.normalize) this->check_working(y.normalizer, "normalizer", {B, Hq, L});
    if (y.grad_kv) this->check_state(y.grad_kv, y.grad_k_sum, {}, "grad of the state");
    this->check_state(y.dkv, y.dk_sum, y.dkv_scale, "grad of the state");
    this->check_slots(y.segment, this->saved_slots());
    if (x.split) this->check_slots(y.partial, seq.slots(L));
    if (scaled) {
      this->check_working(y.row_scale, "row_scale", {B, Hq, L});
      this->check_working(y.final_log_scale, "final_log_scale", {N, H});
      if (y.droot) {
        this->check_working(y.droot, "droot", {1});
        this->check_working(y.root_q, "root_q", {B, Hq, L});
        this->check_working(y.root_k, "root_k", {B, H, S});
      }
    }
  }

  void run() {
    if (!x.is_causal) whole();
    else if (x.split) split();
    else serial();
    if (scaled && x.kv) finish_state();
    if (scaled && y.droot) y.droot.as<T>()[0] = static_cast<T>(sum_rows(y.root_q) + sum_rows(y.root_k));
  }

 private:
  const LinearBackward& y;

  bool exact() const { return scaled && x.favor.exact_diagonal; }

  // [g, h]: what reaches the numerator and the normaliser
  void load_gradients(Scratch<T>& s, int64_t b, int64_t h, int64_t first, int64_t rows, bool reverse) const {
    this->load_rows(y.grad_out, b, h, first, rows, E, s.g, reverse);
    if (x.normalize) this->load_rows(y.out, b, h, first, rows, E, s.out, reverse);
    int64_t at = (b * Hq + h) * L + first;
    const T* z = x.normalize ? y.normalizer.as<T>() + at : nullptr;
    for (int64_t r = 0; r < padded<T>(rows); ++r) {
      T* g = s.g.row(r);
      T down = 0;
      if (x.normalize && r < rows) {
        this->divide(g, E, z[reverse ? rows - 1 - r : r]);
        down = -dot(g, s.out.row(r), E);
      } else {
        this->multiply(g, E, static_cast<T>(x.scale));
      }
      for (int64_t e = E; e < padded<T>(E + 1); ++e) g[e] = e == E ? down : T(0);
      if (scaled && r < rows) s.row_scale[r] = T(0) - y.row_scale.as<T>()[at + (reverse ? rows - 1 - r : r)];
    }
  }
  // e^(log of the row + scale of the state): a row's share of what the state holds
  static void shares(const T* log, T scale, int64_t rows, T* share) {
    for (int64_t r = 0; r < rows; ++r) {
      T sum = log[r] + scale;
      share[r] = sum == nothing<T> ? T(0) : std::exp(sum);
    }
  }
  void live_logs(Scratch<T>& s, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) s.weight[r] = s.masked[r] ? nothing<T> : T(0);
  }

  // ---- queries, in order

  // dq of one chunk against state [E+1][M], and against the chunk's own keys where causal
  void queries(Scratch<T>& s, int64_t b, int64_t h, int64_t first, int64_t rows) const {
    Matrix<T> p = x.is_causal ? s.p : Matrix<T>{};
    for (int64_t head = h * groups; head < (h + 1) * groups; ++head) {
      load_gradients(s, b, head, first, rows, false);
      if (p.p) scores(rows, E + 1, s.g, s.v_transposed, p);
      if constexpr (!scaled) {
        outputs(rows, this->within(p, s.k), E + 1, s.g, s.state.current, M, s.out, false);
        this->load_rows(x.q, b, head, first, rows, D, s.q, false);
        pull_back_rows(s, s.q, s.out, rows, false);
        this->store_rows(s.out, rows, D, y.dq, b, head, first, false);
      } else {
        this->load_queries(s, b, head, first, rows, false);
        if (p.p && !exact()) this->weigh(rows, p, s.row_scale, s.log_k);
        if (exact()) {
          scores(rows, D, s.raw_q, s.raw_k_transposed, s.w);
          live_logs(s, rows);
          this->exponentiate(rows, s.w, s.row_scale, s.weight);
          multiply_below(rows, p, s.w);
          outputs(rows, this->within(p, s.raw_k), 0, {}, {}, D, s.dx, false);
          for (int64_t r = 0; r < rows; ++r) s.row_scale[r] += s.log_q[r];
        }
        shares(s.row_scale, s.state.current_scale, rows, s.share);
        outputs(rows, exact() ? this->within({}, {}) : this->within(p, s.k), E + 1, s.g, s.state.current, M, s.out, false,
                s.share);
        pull_back_favor(s, rows, s.q, s.out, s.raw_q, s.dx, exact(), exact());
        finish_favor(s, rows, s.raw_q, s.inverse_q, {}, 0, s.dx, y.root_q, (b * Hq + head) * L + first, false, false);
        this->store_rows(s.dx, rows, D, y.dq, b, head, first, false);
      }
    }
  }
  static void multiply_below(int64_t rows, Matrix<T> p, Matrix<T> factor) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j <= i; j += width<T>) store(p.row(i) + j, load(p.row(i) + j) * load(factor.row(i) + j));
  }
  void pull_back_rows(Scratch<T>& s, Matrix<T> raw, Matrix<T> gradient, int64_t rows, bool keys) const {
    for (int64_t r = 0; r < rows; ++r) {
      T* g = gradient.row(r);
      if (keys && x.mask && s.masked[r]) std::fill_n(g, padded<T>(D), T(0));
      else
        for (int64_t m = 0; m < D; m += width<T>)
          store(g + m, pull_back<T>(load(raw.row(r) + m), load(g + m), this->feature));
    }
  }
  // the gradient of phi to that of the scaled rows. log_too: through the logarithm a as well, which cancels for a query
  void pull_back_favor(Scratch<T>& s, int64_t rows, Matrix<T> phi, Matrix<T> gradient, Matrix<T> raw, Matrix<T> dx, bool add,
                       bool log_too) const {
    T sign = kind == Kind::trig ? T(1) : T(-1);
    for (int64_t r = 0; r < rows; ++r) s.share[r] = sign * pull_back_features(phi.row(r), gradient.row(r), P, kind);
    outputs(rows, this->within({}, {}), P, gradient, shared.projection, D, dx, add);
    if (!log_too) return;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < D; i += width<T>)
        store(dx.row(r) + i, fma(broadcast(s.share[r]), load(raw.row(r) + i), load(dx.row(r) + i)));
  }
  // from the scaled rows to the inputs: mean, length and root; root_at: where the rows' part of root's gradient goes
  void finish_favor(Scratch<T>& s, int64_t rows, Matrix<T> raw, const T* inverse, const View& mean, int64_t h, Matrix<T> dx,
                    const View& root_rows, int64_t root_at, bool keys, bool reverse) const {
    T root = static_cast<T>(x.favor.root);
    auto center = [&](int64_t i) { return mean ? mean.as<T>()[h * mean.stride[0] + i * mean.stride[1]] : T(0); };
    for (int64_t r = 0; r < rows; ++r) {
      T *g = dx.row(r), *row = raw.row(r);
      if (keys && s.masked[r]) std::fill_n(g, padded<T>(D), T(0));
      if (y.droot)
        root_rows.as<T>()[root_at + (reverse ? rows - 1 - r : r)] = dot(g, row, D) / root;
      this->multiply(g, D, root);
      if (!x.favor.l2) continue;
      // the unit row again, from the scaled one
      for (int64_t i = 0; i < D; ++i) row[i] = row[i] / root + center(i);
      T along = dot(g, row, D);
      for (int64_t i = 0; i < D; i += width<T>)
        store(g + i, (load(g + i) - broadcast(along) * load(row + i)) * broadcast(inverse[r]));
      if (keys && s.masked[r]) std::fill_n(g, padded<T>(D), T(0));
    }
  }
  void query_sweep(Scratch<T>& s, const Slot& where, int64_t h) const {
    s.state.base_scale = this->load_transposed(this->saved(y.segment, where, h), s.state.base);
    begin(s.state);
    for (int64_t first = where.first, end = where.first + where.rows; first < end; first += chunk) {
      int64_t rows = std::min(chunk, end - first), b = where.sequence.b;
      this->load_keys(s, b, h, first, rows, false);
      this->load_values(s, b, h, first, rows, true, false);
      transpose(s.v.p, s.v.ld, rows, E + 1, s.v_transposed.p, s.v_transposed.ld);
      queries(s, b, h, first, rows);
      if (first + rows < end) add(s, rows, s.v_transposed, s.log_k, s.k, s.state);
    }
  }
  void begin(State<T>& state) const {
    this->clear(state.local, E + 1, M);
    this->copy(state.base, state.current, E + 1, M);
    state.local_scale = nothing<T>, state.current_scale = state.base_scale;
  }
  // state += b^T c for rows with logarithms; b is scaled in place
  void add(Scratch<T>& s, int64_t rows, Matrix<T> b_transposed, const T* log, Matrix<T> c, State<T>& state) const {
    if constexpr (!scaled) return accumulate(rows, E + 1, b_transposed, c, M, state);
    T top = nothing<T>;
    for (int64_t r = 0; r < rows; ++r) top = log[r] > top ? log[r] : top;
    Shares<T> shares = raise(state, top);
    for (int64_t r = 0; r < rows; ++r) s.share[r] = share_of(log[r], state.local_scale);
    for (int64_t e = 0; e <= E; ++e)
      for (int64_t r = 0; r < rows; r += width<T>)
        store(b_transposed.row(e) + r, load(b_transposed.row(e) + r) * load(s.share + r));
    accumulate(rows, E + 1, b_transposed, c, M, state, &shares);
  }

  // ---- keys, in reverse

  // dk and dv of one chunk against the reverse state, and against the chunk's own queries where causal
  void key_sweep(Scratch<T>& s, const Slot& where, int64_t h, bool outputs_too) const {
    begin(s.reverse);
    int64_t b = where.sequence.b, chunks = (where.rows + chunk - 1) / chunk;
    for (int64_t i = chunks - 1; i >= 0; --i) {
      int64_t first = where.first + i * chunk, rows = std::min(chunk, where.first + where.rows - first);
      if (outputs_too) {
        this->load_keys(s, b, h, first, rows, true);
        this->load_values(s, b, h, first, rows, true, true);
        transpose(s.reverse.current.p, s.reverse.current.ld, E + 1, M, s.reverse_transposed.p, s.reverse_transposed.ld);
      }
      for (int64_t head = h * groups; head < (h + 1) * groups; ++head) {
        load_gradients(s, b, head, first, rows, true);
        transpose(s.g.p, s.g.ld, rows, E + 1, s.g_transposed.p, s.g_transposed.ld);
        this->load_queries(s, b, head, first, rows, true);
        if (outputs_too) keys(s, rows, head > h * groups);
        if (exact())
          for (int64_t r = 0; r < rows; ++r) s.row_scale[r] += s.log_q[r];
        add(s, rows, s.g_transposed, s.row_scale, s.q, s.reverse);
      }
      if (outputs_too) store_keys(s, b, h, first, rows, true);
    }
  }
  // one head's part of dk and dv; the first head's holds what the state gives
  void keys(Scratch<T>& s, int64_t rows, bool more) const {
    const T* share = nullptr;
    if (scaled && !more) shares(s.log_k, s.reverse.current_scale, rows, s.share), share = s.share;
    Matrix<T> state = more ? Matrix<T>{} : s.reverse.current, transposed = more ? Matrix<T>{} : s.reverse_transposed;
    scores(rows, E + 1, s.v, s.g_transposed, s.p);
    if (exact()) {
      scores(rows, D, s.raw_k, s.raw_q_transposed, s.w);
      live_logs(s, rows);
      this->exponentiate(rows, s.w, s.weight, s.row_scale);
      multiply_below(rows, s.p, s.w);
      outputs(rows, this->within(s.p, s.raw_q), 0, {}, {}, D, s.dx_k, more);
      if (!more) outputs(rows, this->within({}, {}), E + 1, s.v, state, M, s.dk, false, share);
      outputs(rows, this->within(s.w, s.g), M, s.k, transposed, E, s.dv, more, share);
      return;
    }
    if (scaled) this->weigh(rows, s.p, s.log_k, s.row_scale);
    outputs(rows, this->within(s.p, s.q), E + 1, s.v, state, M, s.dk, more, share);
    transpose(s.q.p, s.q.ld, rows, M, s.q_transposed.p, s.q_transposed.ld);
    scores(rows, M, s.k, s.q_transposed, s.p);
    if (scaled) this->weigh(rows, s.p, s.log_k, s.row_scale);
    outputs(rows, this->within(s.p, s.g), M, s.k, transposed, E, s.dv, more, share);
  }
  void store_keys(Scratch<T>& s, int64_t b, int64_t h, int64_t first, int64_t rows, bool reverse) const {
    this->clear_masked(s, rows, s.dv, E);
    this->store_rows(s.dv, rows, E, y.dv, b, h, first, reverse);
    if constexpr (!scaled) {
      this->load_rows(x.k, b, h, first, rows, D, s.k, reverse);
      pull_back_rows(s, s.k, s.dk, rows, true);
      this->store_rows(s.dk, rows, D, y.dk, b, h, first, reverse);
    } else {
      pull_back_favor(s, rows, s.k, s.dk, s.raw_k, s.dx_k, exact(), kind != Kind::relu);
      finish_favor(s, rows, s.raw_k, s.inverse_k, x.favor.mean, h, s.dx_k, y.root_k, (b * H + h) * S + first, true, reverse);
      this->store_rows(s.dx_k, rows, D, y.dk, b, h, first, reverse);
    }
  }

  // ---- sequences

  // where the reverse state starts: the gradient of the outgoing state, in units of that state
  Saved running(int64_t n, int64_t h) const { return this->saved(y.dkv, y.dk_sum, y.dkv_scale, n, h); }
  T final_scale(int64_t n, int64_t h) const {
    T scale = y.final_log_scale.as<T>()[n * H + h];
    return scale == nothing<T> ? nothing<T> : -scale;
  }
  void load_final(Scratch<T>& s, int64_t n, int64_t h) const {
    s.reverse.base_scale = nothing<T>;
    if (!y.grad_kv) return this->clear(s.reverse.base, E + 1, M);
    Saved from{y.grad_kv.as<T>() + (n * H + h) * M * E, y.grad_k_sum.as<T>() + (n * H + h) * M, nullptr};
    this->load_transposed(from, s.reverse.base);
    if (scaled) s.reverse.base_scale = final_scale(n, h);
  }
  void serial() const {
    this->for_sequences([&](Scratch<T>& s, int64_t n, int64_t h) {
      Sequence sequence = seq.sequence(n, L);
      load_final(s, n, h);
      for (int64_t i = seq.segments(sequence) - 1; i >= 0; --i) {
        Slot where = seq.slot(sequence, i);
        query_sweep(s, where, h);
        key_sweep(s, where, h, true);
        this->end_segment(s.reverse);
      }
      this->store_transposed(s.reverse.base, s.reverse.base_scale, running(n, h));
    });
  }
  // the sum over each segment's queries alone
  void partial() const {
    this->for_slots(L, [&](Scratch<T>& s, const Slot& where, int64_t h) {
      this->clear(s.reverse.base, E + 1, M);
      s.reverse.base_scale = nothing<T>;
      key_sweep(s, where, h, false);
      this->store_transposed(s.reverse.local, s.reverse.local_scale, this->saved(y.partial, where, h));
    });
    this->for_sequences([&](Scratch<T>& s, int64_t n, int64_t h) {
      Saved run = running(n, h);
      load_final(s, n, h);
      this->store_transposed(s.reverse.base, s.reverse.base_scale, run);
      this->scan(y.partial, seq.sequence(n, L), h, run, true);
    });
  }
  void split() const {
    partial();
    this->for_slots(L, [&](Scratch<T>& s, const Slot& where, int64_t h) {
      query_sweep(s, where, h);
      s.reverse.base_scale = this->load_transposed(this->saved(y.partial, where, h), s.reverse.base);
      key_sweep(s, where, h, true);
    });
  }
  void whole() const {
    if (x.split) partial();
    else
      this->for_sequences([&](Scratch<T>& s, int64_t n, int64_t h) {
        Sequence sequence = seq.sequence(n, L);
        load_final(s, n, h);
        for (int64_t i = seq.segments(sequence) - 1; i >= 0; --i) {
          key_sweep(s, seq.slot(sequence, i), h, false);
          this->end_segment(s.reverse);
        }
        this->store_transposed(s.reverse.base, s.reverse.base_scale, running(n, h));
      });
    this->for_slots(L, [&](Scratch<T>& s, const Slot& where, int64_t h) {
      s.state.current_scale = this->load_transposed(this->total(y.segment, where.sequence, h), s.state.current);
      for (int64_t first = where.first, end = where.first + where.rows; first < end; first += chunk)
        queries(s, where.sequence.b, h, first, std::min(chunk, end - first));
    });
    this->for_slots(S, [&](Scratch<T>& s, const Slot& where, int64_t h) {
      s.reverse.current_scale = this->load_transposed(running(where.sequence.n, h), s.reverse.current);
      transpose(s.reverse.current.p, s.reverse.current.ld, E + 1, M, s.reverse_transposed.p, s.reverse_transposed.ld);
      for (int64_t first = where.first, end = where.first + where.rows; first < end; first += chunk) {
        int64_t rows = std::min(chunk, end - first), b = where.sequence.b;
        this->load_keys(s, b, h, first, rows, false);
        this->load_values(s, b, h, first, rows, true, false);
        const T* share = scaled ? s.share : nullptr;
        if (scaled) shares(s.log_k, s.reverse.current_scale, rows, s.share);
        outputs(rows, this->within({}, {}), E + 1, s.v, s.reverse.current, M, s.dk, false, share);
        outputs(rows, this->within({}, {}), M, s.k, s.reverse_transposed, E, s.dv, false, share);
        store_keys(s, b, h, first, rows, false);
      }
    });
  }
  // in one order, whatever the threads
  static double sum_rows(const View& rows) {
    double total = 0;
    const T* p = rows.as<T>();
    for (int64_t i = 0, n = rows.elements(); i < n; ++i) total += p[i];
    return total;
  }
  // the suffix state in units of the incoming state is that state's gradient
  void finish_state() const {
    this->for_sequences([&](Scratch<T>&, int64_t n, int64_t h) {
      Saved run = running(n, h);
      T sum = *run.scale + x.log_scale.template as<T>()[n * H + h];
      T factor = sum == nothing<T> ? T(0) : std::exp(sum);
      for (int64_t i = 0; i < M * E; ++i) run.kv[i] *= factor;
      for (int64_t m = 0; m < M; ++m) run.sum[m] *= factor;
    });
  }
};

}  // namespace longattn::LONGATTN_ISA
