// One pass of linear attention with a factor for each relative position:
//     y_a = sum_b c_{b - a} (a1_a . b1_b) b2_b
// over the band tile by tile, and through running sums for what lies `reach` or more away, where the factor is the same
// for all. Every gradient is such a sum with other operands.
//
// Running sums are kept in two levels, `local` since the segment's first and `base` before it, so that a segment computed
// on its own and one computed after its predecessors give the same bits.
#pragma once
#include "toeplitz_tiles.h"

namespace longattn::LONGATTN_ISA {

template <class T, Pass pass>
class ToeplitzSweep {
  using Scratch = ToeplitzScratch<T, pass>;
  static constexpr bool backward = pass != Pass::forward, reversed = pass == Pass::keys;
  static constexpr int W = width<T>;

 public:
  ToeplitzSweep(const ToeplitzProblem& x, const ToeplitzForward* y, const ToeplitzBackward* dy) : x(x), y(y), dy(dy) {
    B = x.q.size[0], Hq = x.q.size[1], L = x.q.size[2], M = x.q.size[3];
    H = x.k.size[1], S = x.k.size[2], E = x.v.size[3], groups = H ? Hq / H : 1;
    seq = {x.cu_seqlens, x.cu_seqlens ? x.cu_seqlens.size[0] - 1 : B, segment_tokens};
    targets = reversed ? S : L, sources = reversed ? L : S;
    units = seq.N * Hq, slots = seq.slots(targets);
    int64_t most = (targets + segment_tokens - 1) / segment_tokens;
    parts = units ? std::clamp<int64_t>((least_tasks + units - 1) / units, 1, std::max<int64_t>(most, 1)) : 1;
    Arena<T> arena{nullptr};
    Sums<T> sums;
    Scratch::take_sums(sums, arena, M, E);
    state = sums.elements;
    Band whole = band_of(x.offset, L, S);
    carries = x.is_causal && parts == 1;
    if (x.cu_seqlens || whole.has_old() || whole.has_new()) sides = x.is_causal ? 1 : 2;
    if (carries) sides = 0;
    scratch_bytes = Scratch(nullptr, M, E).bytes;
    slot_bytes = (x.cu_seqlens ? Hq : units) * slots * sides * state * static_cast<int64_t>(sizeof(T));
    if (pass == Pass::queries) dc_bytes = round_up(units * parts * (2 * x.reach + 1) * 8, 64);
  }
  int64_t workspace() const { return x.threads * scratch_bytes + slot_bytes + dc_bytes + 64; }

  void run() const {
    memory = first_line(x.workspace.data);
    state_slots = reinterpret_cast<T*>(memory + x.threads * scratch_bytes);
    dc_slots = reinterpret_cast<double*>(memory + x.threads * scratch_bytes + slot_bytes);
    if (sides) {
      // a packed sequence is one task, whatever its length
      int64_t pieces = x.cu_seqlens ? 1 : slots;
      parallel_tasks(units * pieces, x.threads, [&](int64_t task, int worker) {
        Scratch s(memory + worker * scratch_bytes, M, E);
        Head u = head(task / pieces);
        int64_t begin = task % pieces, end = x.cu_seqlens ? u.band.segments() : begin + 1;
        for (int64_t segment = begin; segment < end; ++segment) partial(s, u, segment);
      });
      parallel_tasks(units, x.threads, [&](int64_t unit, int) { scan(unit); });
    }
    parallel_tasks(units * parts, x.threads, [&](int64_t task, int worker) {
      // where causal the last parts have the most to do
      int64_t part = parts - 1 - task / units, unit = task % units;
      Scratch s(memory + worker * scratch_bytes, M, E);
      work(s, head(unit), part);
    });
    if (pass == Pass::queries) reduce();
  }

 private:
  const ToeplitzProblem& x;
  const ToeplitzForward* y;
  const ToeplitzBackward* dy;
  int64_t B, Hq, L, M, H, S, E, groups, targets, sources, units, slots, parts, state, sides = 0;
  bool carries;
  Sequences seq;
  int64_t scratch_bytes, slot_bytes, dc_bytes = 0;
  mutable char* memory;
  mutable T* state_slots;
  mutable double* dc_slots;

  struct Head {
    int64_t unit, h, kv;
    Sequence queries, keys;
    Band band;
    const T* c;
  };

  Band band_of(int64_t offset, int64_t n_queries, int64_t n_keys) const {
    if (!reversed) return {n_queries, n_keys, 0, -offset, x.reach, x.is_causal};
    // key j is target T - 1 - j and query i source Q - 1 - i, with T whole segments and Q whole chunks
    int64_t all_keys = round_up(n_keys, segment_tokens), all_queries = round_up(n_queries, band);
    return {all_keys, all_queries, all_keys - n_keys, all_keys - all_queries - offset, x.reach, x.is_causal};
  }
  Head head(int64_t unit) const {
    int64_t n = unit / Hq, h = unit % Hq;
    Sequence queries = seq.sequence(n, L), keys = seq.sequence(n, S);
    return {unit, h, h / groups, queries, keys, band_of(x.offset, queries.length, keys.length), x.c.as<T>() + h * x.c.stride[0]};
  }
  T factor(const Head& u, int64_t offset) const {
    if (x.is_causal && offset > 0) return T(0);
    return u.c[(std::clamp(offset, -x.reach, x.reach) + x.reach) * x.c.stride[1]];
  }

  // ---- rows

  // rows of a tensor [B, heads, length, n], zero past n; `skip`: rows that are left 0. Reversed, `first` counts from the last
  // token and is below 0 before it
  void load_rows(const View& from, const Sequence& sequence, int64_t h, int64_t first, int64_t rows, int64_t n, Matrix<T> to,
                 const bool* skip) const {
    with_type(from.dtype, [&](auto type) {
      using From = decltype(type);
      if constexpr ((sizeof(T) == 8) == (sizeof(From) == 8)) {
        const From* base = from.as<From>() + sequence.b * from.stride[0] + h * from.stride[1];
        for (int64_t r = 0; r < rows; ++r) {
          if (skip && skip[r]) std::fill_n(to.row(r), padded<T>(n), T(0));
          else load_row(base + place(sequence, first + r) * from.stride[2], from.stride[3], n, to.row(r));
        }
      }
    });
  }
  static int64_t place(const Sequence& sequence, int64_t i) {
    return sequence.start + (reversed ? sequence.length - 1 - i : i);
  }
  // values with a 1 behind them, which stands for the normalizer
  void append_one(Matrix<T> rows, int64_t count, const bool* skip) const {
    for (int64_t r = 0; r < count; ++r) {
      T* row = rows.row(r);
      std::fill(row + E, row + padded<T>(E + 1), T(0));
      row[E] = skip[r] ? T(0) : T(1);
    }
  }
  void find_padded(const Sequence& keys, int64_t first, int64_t rows, bool* to) const {
    const View& mask = x.mask;
    for (int64_t r = 0; r < rows; ++r)
      to[r] = first + r < 0 || (mask && mask.as<bool>()[keys.b * mask.stride[0] + place(keys, first + r) * mask.stride[1]]);
  }
  // a chunk of sources; rows past its end are 0. `isolate`: rows that are not finite are marked and 0, so that they
  // reach only the targets that see them
  int64_t load_sources(Scratch& s, const Head& u, int64_t chunk, bool isolate) const {
    int64_t first = chunk * band, rows = std::min(band, u.band.sources - first);
    bool skip[band];
    if (reversed) {
      first -= u.band.sources - u.queries.length;
      for (int64_t r = 0; r < rows; ++r) skip[r] = first + r < 0;
      load_rows(x.q, u.queries, u.h, first, rows, M, s.b1, skip);
      load_rows(dy->rows, u.queries, u.h, first, rows, E + 1, s.b2, skip);
    } else {
      find_padded(u.keys, first, rows, skip);
      load_rows(x.k, u.keys, u.kv, first, rows, M, s.b1, skip);
      load_rows(x.v, u.keys, u.kv, first, rows, E, s.b2, skip);
      if (backward) append_one(s.b2, rows, skip);
    }
    int64_t columns = padded<T>(backward ? E + 1 : E);
    for (int64_t r = rows; r < band; ++r)
      std::fill_n(s.b1.row(r), padded<T>(M), T(0)), std::fill_n(s.b2.row(r), columns, T(0));
    s.any_bad = false;
    if (!isolate) return rows;
    for (int64_t r = 0; r < band; ++r) {
      V<T> zero{};
      for (int64_t i = 0; i < M; i += W) zero = fma(load(s.b1.row(r) + i), V<T>{}, zero);
      for (int64_t i = 0; i < columns; i += W) zero = fma(load(s.b2.row(r) + i), V<T>{}, zero);
      s.bad[r] = sum<T>(zero) != T(0);
      if (!s.bad[r]) continue;
      s.any_bad = true;
      std::fill_n(s.b1.row(r), padded<T>(M), T(0)), std::fill_n(s.b2.row(r), columns, T(0));
    }
    transpose(s.b1.p, s.b1.ld, band, M, s.b1_transposed.p, s.b1_transposed.ld);
    if (backward) transpose(s.b2.p, s.b2.ld, band, E + 1, s.b2_transposed.p, s.b2_transposed.ld);
    return rows;
  }
  void load_targets(Scratch& s, const Head& u, int64_t first, int64_t rows) const {
    std::fill_n(s.poisoned, rows, false);
    if (reversed) {
      first -= u.band.lead;
      find_padded(u.keys, first, rows, s.padded_target);
      load_rows(x.k, u.keys, u.kv, first, rows, M, s.a1, s.padded_target);
      load_rows(x.v, u.keys, u.kv, first, rows, E, s.a2, s.padded_target);
      append_one(s.a2, rows, s.padded_target);
    } else {
      load_rows(x.q, u.queries, u.h, first, rows, M, s.a1, nullptr);
      if (backward) load_rows(dy->rows, u.queries, u.h, first, rows, E + 1, s.a2, nullptr);
    }
    int64_t columns = padded<T>(pass == Pass::forward ? E : M);
    for (int64_t r = 0; r < rows; ++r) {
      std::fill_n(s.y1.row(r), columns, T(0));
      if (pass == Pass::keys) std::fill_n(s.y2.row(r), padded<T>(E), T(0));
      if (!backward) std::fill_n(s.z.row(r), W, T(0));
    }
  }

  // ---- running sums

  void accumulate(Scratch& s, const Head& u, int64_t chunk) const {
    int64_t rows = load_sources(s, u, chunk, false);
    if constexpr (backward) {
      multiply_transposed<T, T>(E + 1, rows, s.b2, s.b1, M, s.local.matrix);
    } else {
      multiply_transposed<T, T>(M, rows, s.b1, s.b2, E, s.local.matrix);
      for (int64_t i = 0; i < M; i += W) {
        V<T> total{};
        for (int64_t r = 0; r < rows; ++r) total += load(s.b1.row(r) + i);
        store(s.local.vector + i, load(s.local.vector + i) + total);
      }
    }
  }
  // sums of a segment, before (0) or after (1) it
  T* slot(const Head& u, int64_t segment, int side) const {
    const Sequence& sequence = reversed ? u.keys : u.queries;
    // packed sequences share the slots of a head, others have their own
    int64_t row = x.cu_seqlens ? u.h : u.unit;
    return state_slots + ((row * slots + seq.first_slot(sequence) + segment) * sides + side) * state;
  }
  // what each segment adds to the running sums of those after it, and of those before it
  void partial(Scratch& s, const Head& u, int64_t segment) const {
    s.local.clear();
    for (int64_t chunk = u.band.old_start(segment), end = u.band.old_start(segment + 1); chunk < end; ++chunk)
      accumulate(s, u, chunk);
    std::copy_n(s.local.begin(), state, slot(u, segment, 0));
    if (sides < 2) return;
    s.local.clear();
    for (int64_t chunk = u.band.new_start(segment + 1) - 1, end = u.band.new_start(segment); chunk >= end; --chunk)
      accumulate(s, u, chunk);
    std::copy_n(s.local.begin(), state, slot(u, segment, 1));
  }
  void scan(int64_t unit) const {
    Head u = head(unit);
    for (int side = 0; side < sides; ++side)
      for (int64_t i = 0, n = u.band.segments(); i < state; i += W) {
        V<T> run{};
        int64_t count = std::min<int64_t>(W, state - i);
        for (int64_t step = 0; step < n; ++step) {
          T* at = slot(u, side ? n - 1 - step : step, side) + i;
          V<T> own{};
          std::memcpy(&own, at, count * sizeof(T)), std::memcpy(at, &run, count * sizeof(T));
          run += own;
        }
      }
  }
  // y += factor * what a chunk of targets gets from the running sums
  void far(Scratch& s, const Head& u, int64_t chunk, int64_t first, T factor, double* edge) const {
    int64_t from = chunk * band - first, rows = std::min(band, u.band.targets - chunk * band);
    s.current.set_sum(s.base, s.local);
    Matrix<T> a1{s.a1.row(from), s.a1.ld}, y1{s.y1.row(from), s.y1.ld};
    if constexpr (!backward) {
      multiply<T, T>(rows, M, a1, s.current.matrix, E, s.far, false);
      add_scaled(rows, E, s.far, factor, y1);
      for (int64_t r = 0; r < rows; ++r) {
        V<T> total{};
        for (int64_t i = 0; i < M; i += W) total = fma(load(a1.row(r) + i), load(s.current.vector + i), total);
        T* z = s.z.row(from + r);
        store(z, fma(broadcast(factor), total, load(z)));
      }
    } else {
      Matrix<T> a2{s.a2.row(from), s.a2.ld};
      multiply<T, T>(rows, E + 1, a2, s.current.matrix, M, s.far, false);
      if (pass == Pass::queries) {
        for (int64_t r = 0; r < rows; ++r) {
          V<T> total{};
          for (int64_t i = 0; i < M; i += W) total = fma(load(s.far.row(r) + i), load(a1.row(r) + i), total);
          *edge += sum<T>(total);
        }
      }
      add_scaled(rows, M, s.far, factor, y1);
      if (pass == Pass::keys) {
        transpose(s.current.matrix.p, s.current.matrix.ld, E + 1, M, s.current_transposed.p, s.current_transposed.ld);
        multiply<T, T>(rows, M, a1, s.current_transposed, E, s.far, false);
        add_scaled(rows, E, s.far, factor, {s.y2.row(from), s.y2.ld});
      }
    }
  }
  static void add_scaled(int64_t rows, int64_t columns, Matrix<T> from, T factor, Matrix<T> to) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < columns; i += W)
        store(to.row(r) + i, fma(broadcast(factor), load(from.row(r) + i), load(to.row(r) + i)));
  }

  // ---- tiles

  // p *= the factors of the tile's offsets; where the factor is 0, 0 whatever p is
  static void weigh(int64_t rows, const T* factors, Matrix<T> p) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* f = factors + band - 1 - r;
      for (int64_t j = 0; j < band; j += W) {
        V<T> c = load(f + j);
        store(p.row(r) + j, c == T(0) ? V<T>{} : c * load(p.row(r) + j));
      }
    }
  }
  static void weigh_and_sum(int64_t rows, const T* factors, Matrix<T> p, Matrix<T> z) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* f = factors + band - 1 - r;
      V<T> total{};
      for (int64_t j = 0; j < band; j += W) {
        V<T> c = load(f + j), w = c == T(0) ? V<T>{} : c * load(p.row(r) + j);
        store(p.row(r) + j, w), total += w;
      }
      store(z.row(r), load(z.row(r)) + total);
    }
  }
  static void add_diagonals(int64_t rows, Matrix<T> s, Matrix<T> g, T* diagonals) {
    std::fill_n(diagonals, 2 * band + W, T(0));
    for (int64_t r = 0; r < rows; ++r) {
      T* to = diagonals + band - 1 - r;
      for (int64_t j = 0; j < band; j += W) store(to + j, fma(load(s.row(r) + j), load(g.row(r) + j), load(to + j)));
    }
  }
  // s.factors[i]: of the offset `least` + i
  void load_factors(Scratch& s, const Head& u, int64_t least) const {
    bool inside = least >= -x.reach && least + 2 * band - 2 <= (x.is_causal ? std::min<int64_t>(0, x.reach) : x.reach);
    if (inside && x.c.stride[1] == 1) std::copy_n(u.c + least + x.reach, 2 * band - 1, s.factors);
    else
      for (int64_t i = 0; i < 2 * band - 1; ++i) s.factors[i] = factor(u, least + i);
    std::fill_n(s.factors + 2 * band - 1, 1 + W, T(0));
  }
  void tile(Scratch& s, const Head& u, int64_t target, int64_t source, int64_t first, double* dc) const {
    int64_t from = target * band - first, rows = std::min(band, u.band.targets - target * band);
    int64_t least = u.band.shift + (source - target) * band - (band - 1);
    Matrix<T> a1{s.a1.row(from), s.a1.ld}, y1{s.y1.row(from), s.y1.ld};
    load_factors(s, u, least);
    multiply<T, T>(rows, M, a1, s.b1_transposed, band, s.s, false);
    if constexpr (!backward) {
      weigh_and_sum(rows, s.factors, s.s, {s.z.row(from), s.z.ld});
      multiply<T, T>(rows, band, s.s, s.b2, E, y1, true);
    } else {
      multiply<T, T>(rows, E + 1, {s.a2.row(from), s.a2.ld}, s.b2_transposed, band, s.g, false);
      if (pass == Pass::queries) {
        add_diagonals(rows, s.s, s.g, s.diagonals);
        for (int64_t i = 0; i < 2 * band - 1; ++i) {
          int64_t offset = least + i;
          if (x.is_causal && offset > 0) break;
          dc[std::clamp(offset, -x.reach, x.reach) + x.reach] += s.diagonals[i];
        }
      }
      weigh(rows, s.factors, s.g);
      multiply<T, T>(rows, band, s.g, s.b1, M, y1, true);
      if (pass == Pass::keys) {
        weigh(rows, s.factors, s.s);
        multiply<T, T>(rows, band, s.s, s.b2, E, {s.y2.row(from), s.y2.ld}, true);
      }
    }
    if (!s.any_bad) return;
    for (int64_t j = 0; j < band; ++j)
      for (int64_t r = 0; s.bad[j] && r < rows; ++r)
        if (!x.is_causal || least + band - 1 + j - r <= 0) s.poisoned[from + r] = true;
  }

  // ---- segments

  void work(Scratch& s, const Head& u, int64_t part) const {
    int64_t all = u.band.segments(), n_factors = 2 * x.reach + 1;
    double* dc = pass == Pass::queries ? dc_slots + (u.unit * parts + part) * n_factors : nullptr;
    if (dc) std::fill_n(dc, n_factors, 0.0);
    s.base.clear();
    for (int64_t i = all * part / parts, end = all * (part + 1) / parts; i < end; ++i) segment(s, u, i, dc);
  }
  void segment(Scratch& s, const Head& u, int64_t index, double* dc) const {
    const Band& x_ = u.band;
    int64_t begin = index * segment_chunks, end = std::min(begin + segment_chunks, x_.target_chunks());
    begin = std::max(begin, x_.first_chunk());
    int64_t first = begin * band, rows = std::min((end - begin) * band, x_.targets - first);
    load_targets(s, u, first, rows);
    if (sides == 2) {
      s.base.set(slot(u, index, 1)), s.local.clear();
      int64_t done = x_.new_start(index + 1);
      for (int64_t target = end - 1; target >= begin; --target) {
        for (int64_t least = x_.new_begin(target); done > least;) accumulate(s, u, --done);
        if (done < x_.source_chunks()) far(s, u, target, first, u.c[2 * x.reach * x.c.stride[1]], dc ? dc + 2 * x.reach : nullptr);
      }
    }
    if (sides || carries) {
      if (sides) s.base.set(slot(u, index, 0));
      s.local.clear();
      int64_t done = x_.old_start(index);
      for (int64_t target = begin; target < end; ++target) {
        for (int64_t most = x_.old_end(target); done < most; ++done) accumulate(s, u, done);
        if (done > 0) far(s, u, target, first, u.c[0], dc);
      }
      if (carries) {
        for (int64_t most = x_.old_start(index + 1); done < most; ++done) accumulate(s, u, done);
        s.base.add(s.local.begin());
      }
    }
    for (int64_t source = x_.old_end(begin), last = x_.new_begin(end - 1); source < last; ++source) {
      load_sources(s, u, source, true);
      for (int64_t target = begin; target < end; ++target)
        if (x_.old_end(target) <= source && source < x_.new_begin(target)) tile(s, u, target, source, first, dc);
    }
    store_targets(s, u, first, rows);
  }

  // ---- results

  template <class F>
  void store_rows(const View& to, const Sequence& sequence, int64_t h, int64_t first, int64_t rows, F&& row) const {
    with_type(to.dtype, [&](auto type) {
      using To = decltype(type);
      if constexpr ((sizeof(T) == 8) == (sizeof(To) == 8)) {
        To* base = to.as<To>() + sequence.b * to.stride[0] + h * to.stride[1];
        for (int64_t r = std::max<int64_t>(0, -first); r < rows; ++r)
          store_row(row(r), base + place(sequence, first + r) * to.stride[2], to.size[3]);
      }
    });
  }
  void store_targets(Scratch& s, const Head& u, int64_t first, int64_t rows) const {
    int64_t columns = padded<T>(pass == Pass::forward ? E : M);
    for (int64_t r = 0; r < rows; ++r) {
      if (!s.poisoned[r]) continue;
      std::fill_n(s.y1.row(r), columns, std::numeric_limits<T>::quiet_NaN());
      if (pass == Pass::keys) std::fill_n(s.y2.row(r), padded<T>(E), std::numeric_limits<T>::quiet_NaN());
      if (!backward) std::fill_n(s.z.row(r), W, std::numeric_limits<T>::quiet_NaN());
    }
    if constexpr (pass == Pass::forward) {
      T* z = y->normalizer.as<T>() + (u.queries.b * Hq + u.h) * L + u.queries.start + first;
      for (int64_t r = 0; r < rows; ++r) {
        z[r] = sum<T>(load(s.z.row(r)));
        if (!x.normalize) continue;
        V<T> inverse = broadcast(z[r] == T(0) ? T(0) : 1 / z[r]);
        for (int64_t i = 0; i < E; i += W) store(s.y1.row(r) + i, load(s.y1.row(r) + i) * inverse);
      }
      store_rows(y->out, u.queries, u.h, first, rows, [&](int64_t r) { return s.y1.row(r); });
    } else if constexpr (pass == Pass::queries) {
      store_rows(dy->dq, u.queries, u.h, first, rows, [&](int64_t r) { return s.y1.row(r); });
    } else {
      first -= u.band.lead;
      for (int64_t r = 0; r < rows; ++r)
        if (s.padded_target[r]) std::fill_n(s.y1.row(r), columns, T(0)), std::fill_n(s.y2.row(r), padded<T>(E), T(0));
      store_rows(dy->dk, u.keys, u.h, first, rows, [&](int64_t r) { return s.y1.row(r); });
      store_rows(dy->dv, u.keys, u.h, first, rows, [&](int64_t r) { return s.y2.row(r); });
    }
  }
  // in one order, whatever the threads
  void reduce() const {
    int64_t n_factors = 2 * x.reach + 1;
    parallel_tasks(Hq, x.threads, [&](int64_t h, int) {
      T* dc = dy->dc.as<T>() + h * n_factors;
      for (int64_t i = 0; i < n_factors; ++i) {
        double total = 0;
        for (int64_t n = 0; n < seq.N; ++n)
          for (int64_t part = 0; part < parts; ++part) total += dc_slots[((n * Hq + h) * parts + part) * n_factors + i];
        dc[i] = static_cast<T>(total);
      }
    });
  }
};

}  // namespace longattn::LONGATTN_ISA
