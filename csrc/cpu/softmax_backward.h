// Backward: scores are computed again. A segment owns tiles of queries and of keys: it sums dQ of its queries over all
// the keys they see, and dK, dV of its keys over all the queries that see them, key tiles outermost, in ascending order.
// So nobody else writes those rows in this round, and how a head is cut into segments changes no bit.
#pragma once
#include <vector>

#include "softmax_tiles.h"

namespace longattn::LONGATTN_ISA {

template <class T>
struct QueryTile {
  Origin<T> origin;
  Matrix<T> q, g, dq;      // rows of q, of grad_out, of the gradient
  T *lse, *delta;
  bool loaded;

  void take(Arena<T>& arena, const Tiles& x) {
    origin.take(arena, x.R);
    q = arena.take(tile_tokens, padded<T>(x.D)), g = arena.take(tile_tokens, padded<T>(x.E));
    dq = arena.take(tile_tokens, padded<T>(x.D));
    lse = arena.take(1, tile_tokens).p, delta = arena.take(1, tile_tokens).p;
  }
};

template <class T>
struct BackwardScratch {
  QueryTile<T>* own;       // of the segment
  QueryTile<T> guest;      // of another segment
  Origin<T> k_origin;
  T* factor;
  Matrix<T> k, k_transposed, v, v_transposed, dk, dv, p, ds, kept, row;
  T *bias, *dbias;
  int64_t bytes;

  BackwardScratch(char* memory, const Tiles& x, int64_t segment) {
    Arena<T> arena{memory};
    int64_t D = padded<T>(x.D), E = padded<T>(x.E);
    own = reinterpret_cast<QueryTile<T>*>(arena.template take<char>(1, segment * int64_t(sizeof(QueryTile<T>))).p);
    QueryTile<T> unwritten;
    for (int64_t i = 0; i < segment; ++i) (memory ? own[i] : unwritten).take(arena, x);
    guest.take(arena, x), k_origin.take(arena, x.R);
    factor = arena.take(1, tile_tokens).p;
    k = arena.take(tile_tokens, D), k_transposed = arena.take(D, tile_tokens), dk = arena.take(tile_tokens, D);
    v = arena.take(tile_tokens, E), v_transposed = arena.take(E, tile_tokens), dv = arena.take(tile_tokens, E);
    for (Matrix<T>* m : {&p, &ds, &kept}) *m = arena.take(tile_tokens, tile_tokens);
    row = arena.take(4, std::max(D, E));
    for (T** p : {&bias, &dbias}) *p = arena.take(1, 2 * tile_tokens + width<T>).p;
    bytes = arena.bytes;
  }
};

template <class T>
struct TileBackward {
  static constexpr int64_t segment_of_windows = 32, longest_segment = 512;  // query tiles
  static constexpr int64_t biased_tasks = 16;
  const SoftmaxProblem& x;
  const SoftmaxBackward& y;
  Tiles tiles;
  using Worker = BackwardScratch<T>;

  TileBackward(const SoftmaxProblem& x, const SoftmaxBackward& y) : x(x), y(y), tiles(x) {}

  int64_t query_tiles() const { return Tiling(tiles.L, x.chunk).tiles(); }
  int64_t key_heads() const { return tiles.sequences.N * tiles.H; }
  // all queries see all keys: a segment of a whole head computes no score twice
  int64_t segment() const {
    Tiling keys(tiles.S, x.chunk);
    int64_t chunks = std::min(x.look_back, keys.chunks) + std::min(x.look_ahead, keys.chunks) + 1;
    bool windowed = chunks * keys.per_chunk <= segment_of_windows;
    int64_t all = std::max<int64_t>(query_tiles(), 1);
    if (windowed) return std::min(all, segment_of_windows);
    int64_t parts = key_heads() >= x.threads ? 1 : 2 * x.threads;
    // a segment sums the gradient of the bias, so the threads must not say how many there are
    if (x.bias) parts = (biased_tasks + key_heads() - 1) / std::max<int64_t>(key_heads(), 1);
    return std::clamp<int64_t>((all + parts - 1) / parts, 1, longest_segment);
  }
  int64_t segments() const { return std::max<int64_t>((query_tiles() + segment() - 1) / segment(), 1); }
  int64_t wave() const {
    return std::clamp<int64_t>((4 * x.threads + segments()) / segments(), 1, std::max<int64_t>(key_heads(), 1));
  }
  bool needs_sums() const { return x.q.dtype != (sizeof(T) == 8 ? DType::f64 : DType::f32); }
  // of one key head: dq of its query heads, dk and dv
  int64_t dq_size() const { return tiles.L * tiles.D; }
  int64_t dk_size() const { return tiles.shared ? 0 : tiles.S * tiles.D; }
  int64_t sums_size() const { return tiles.groups * dq_size() + dk_size() + tiles.S * tiles.E; }
  int64_t sums_bytes() const { return needs_sums() ? wave() * sums_size() * int64_t(sizeof(T)) : 0; }
  int64_t workspace() const {
    return x.threads * Worker(nullptr, tiles, segment()).bytes + round_up(sums_bytes(), 64) + dbias_bytes() + 64;
  }

  // the gradient of the bias, of each query head of each sequence and each segment
  int64_t dbias_bytes() const { return x.bias ? round_up(tiles.units() * segments() * x.bias.size[1] * 8, 64) : 0; }

  // rows of gradients in the working type
  // results may lie by heads or by tokens
  struct Rows {
    T* first = nullptr;
    int64_t step = 0;
    T* row(int64_t at) const { return first + at * step; }
  };
  struct Sums {
    Rows dq, dk, dv;
  };

  void run() {
    DType acc = sizeof(T) == 8 ? DType::f64 : DType::f32;
    for (const View* v : {&y.grad_out, &y.out})
      expect_shape(*v, "out", {tiles.B, tiles.Hq, tiles.L, tiles.E}), expect_dtype(*v, "out", x.q.dtype);
    for (const View* v : {&y.lse, &y.delta})
      expect_shape(*v, "lse", {tiles.B, tiles.Hq, tiles.L}), expect_dtype(*v, "lse", acc);
    expect_shape(y.dq, "dq", {tiles.B, tiles.Hq, tiles.L, tiles.D}), expect_dtype(y.dq, "dq", x.q.dtype);
    if (!tiles.shared)
      expect_shape(y.dk, "dk", {tiles.B, tiles.H, tiles.S, tiles.D}), expect_dtype(y.dk, "dk", x.q.dtype);
    expect_shape(y.dv, "dv", {tiles.B, tiles.H, tiles.S, tiles.E}), expect_dtype(y.dv, "dv", x.q.dtype);
    for (const View* v : {&y.dq, &y.dk, &y.dv})
      expect(!*v || v->stride[3] == 1, "results must have rows without gaps");
    expect(x.threads >= 1 && x.workspace.elements() >= workspace(), "the workspace is too small");
    char* memory = first_line(x.workspace.data);
    T* sums = reinterpret_cast<T*>(memory);
    memory += round_up(sums_bytes(), 64);
    if (x.bias) {
      expect_shape(y.dbias, "dbias", {tiles.Hq, x.bias.size[1]}), expect_dtype(y.dbias, "dbias", acc);
      biases = reinterpret_cast<double*>(memory), memory += dbias_bytes();
      std::fill_n(biases, dbias_bytes() / 8, 0.0);
    }
    std::vector<Worker> workers;
    int64_t bytes = Worker(nullptr, tiles, segment()).bytes, all = key_heads(), n = segments(), wave = this->wave();
    for (int i = 0; i < x.threads; ++i) workers.emplace_back(memory + i * bytes, tiles, segment());
    for (int64_t first = 0; first < all; first += wave) {
      int64_t tasks = std::min(wave, all - first) * n;
      auto each = [&](auto&& f) {
        parallel_tasks(tasks, x.threads, [&](int64_t task, int me) {
          f(workers[me], first + task / n, task % n, task / n);
        });
      };
      for (int64_t group = 0; group < tiles.groups; ++group) {
        each([&](Worker& w, int64_t key_head, int64_t part, int64_t place) {
          begin(w, head(key_head, group), group, part, n, sums_of(sums, key_head, group, place));
        });
        for (int64_t round = 0; round < tiles.R; ++round)
          each([&](Worker& w, int64_t key_head, int64_t part, int64_t place) {
            segment_of_round(w, head(key_head, group), round, part, n, sums_of(sums, key_head, group, place));
          });
      }
      if (needs_sums())
        each([&](Worker&, int64_t key_head, int64_t part, int64_t place) {
          for (int64_t group = 0; group < tiles.groups; ++group)
            convert_rows(head(key_head, group), group, part, n, sums_of(sums, key_head, group, place));
        });
    }
    if (x.bias) sum_biases();
  }

  double* biases = nullptr;
  double* bias_of(const Head& head, int64_t part) const {
    return biases + ((head.queries.n * tiles.Hq + head.h) * segments() + part) * x.bias.size[1];
  }
  // in one order, whatever the threads
  void sum_biases() const {
    int64_t n = x.bias.size[1], parts = segments();
    parallel_tasks(tiles.Hq, x.threads, [&](int64_t h, int) {
      for (int64_t i = 0; i < n; ++i) {
        double total = 0;
        for (int64_t s = 0; s < tiles.sequences.N; ++s)
          for (int64_t part = 0; part < parts; ++part) total += biases[((s * tiles.Hq + h) * parts + part) * n + i];
        y.dbias.template as<T>()[h * n + i] = static_cast<T>(total);
      }
    });
  }

  Head head(int64_t key_head, int64_t group) const {
    return tiles.head(key_head / tiles.H * tiles.Hq + key_head % tiles.H * tiles.groups + group);
  }
  // indexed by position; packed sequences share the batch entry's axis
  Sums sums_of(T* sums, int64_t key_head, int64_t group, int64_t place) const {
    Head h = head(key_head, group);
    Sums y;
    if (needs_sums()) {
      T* base = sums + place * sums_size();
      y.dq = {base + group * dq_size(), tiles.D}, base += tiles.groups * dq_size();
      y.dk = {base, tiles.D}, y.dv = {base + dk_size(), tiles.E};
    } else {
      auto rows = [&](const View& v, int64_t head) { return Rows{row_at<T>(v, h.b, head, 0), v.stride[2]}; };
      y.dq = rows(this->y.dq, h.h), y.dv = rows(this->y.dv, h.kv);
      if (!tiles.shared) y.dk = rows(this->y.dk, h.kv);
    }
    if (tiles.shared) y.dk = y.dq;
    return y;
  }
  static Range share_of_rows(int64_t length, int64_t part, int64_t parts) {
    return {length * part / parts, length * (part + 1) / parts};
  }
  T& of(const View& v, const Head& head, int64_t i) const {
    return v.as<T>()[head.b * v.stride[0] + head.h * v.stride[1] + i * v.stride[2]];
  }
  bool padded_key(const Head& head, int64_t at) const {
    return x.mask && x.mask.as<bool>()[head.b * x.mask.stride[0] + at * x.mask.stride[1]];
  }
  // delta of every query, and gradients at first: 0, and what a row has of its own key
  void begin(Worker& w, const Head& head, int64_t group, int64_t part, int64_t parts, const Sums& sums) const {
    Range keys = share_of_rows(head.keys.length, part, parts), queries = share_of_rows(head.queries.length, part, parts);
    if (group == 0)
      for (int64_t i = keys.first; i < keys.last; ++i) {
        int64_t at = head.keys.start + i;
        if (!tiles.shared) std::fill_n(sums.dk.row(at), tiles.D, T(0));
        std::fill_n(sums.dv.row(at), tiles.E, T(0));
      }
    Dropout<T> dropout(x, head.b * tiles.Hq + head.h);
    for (int64_t i = queries.first; i < queries.last; ++i) {
      int64_t at = head.queries.start + i;
      T *g = w.row.row(0), *o = w.row.row(1), lse = of(y.lse, head, at);
      std::fill_n(sums.dq.row(at), tiles.D, T(0));
      if (lse == nothing<T>) {
        of(y.delta, head, at) = 0;
        if (x.self != SelfRule::fallback || padded_key(head, at)) continue;
        // all this row had was its own value
        row_of(y.grad_out, head.b, head.h, at, tiles.E, g);
        T kept = dropout.factor(at, at);
        T* value = sums.dv.row(at);
        for (int64_t e = 0; e < tiles.E; ++e) value[e] += kept == 0 ? 0 : kept * g[e];
        continue;
      }
      row_of(y.grad_out, head.b, head.h, at, tiles.E, g), row_of(y.out, head.b, head.h, at, tiles.E, o);
      T delta = of(y.delta, head, at) = dot(g, o, tiles.E);
      if (x.self != SelfRule::always || padded_key(head, at)) continue;
      T *q = w.row.row(2), *k = w.row.row(3), factor = factor_of<T>(x, head.b, head.kv, at);
      row_of(x.q, head.b, head.h, at, tiles.D, q), row_of(tiles.shared ? x.q : x.k, head.b, head.kv, at, tiles.D, k);
      T score = dot(q, k, tiles.D) * factor;
      T p = std::exp(score - lse), kept = dropout.factor(at, at);
      // what has no weight hands nothing on, whatever it holds
      if (p == 0) continue;
      T *dq = sums.dq.row(at), *dk = sums.dk.row(at), *dv = sums.dv.row(at);
      for (int64_t e = 0; e < tiles.E; ++e) dv[e] += p * kept * g[e];
      row_of(x.v, head.b, head.kv, at, tiles.E, o);
      T ds = p * (kept * dot(g, o, tiles.E) - delta) * factor;
      for (int64_t d = 0; d < tiles.D; ++d) dq[d] += ds * k[d], dk[d] += ds * q[d];
    }
  }

  void load_queries(QueryTile<T>& t, const Head& head, int64_t round, int64_t tile) const {
    Tiling queries = tiles.query_tiling(head);
    Place place = tiles.place(round, tile, queries);
    Origin<T>& q = t.origin;
    locate(tiles, false, head.b, head.h, head.queries, queries, place, tiles.shared, round + 1, q);
    // what is not finite reaches the gradients through lse and delta
    gather(x.q, head.b, head.h, q, tiles.D, t.q, true);
    std::fill(q.bad, q.bad + tile_tokens, q.any_bad = false);
    gather(y.grad_out, head.b, head.h, q, tiles.E, t.g, true);
    for (int64_t i = 0; i < q.rows; ++i)
      t.lse[i] = of(y.lse, head, q.position[i]), t.delta[i] = of(y.delta, head, q.position[i]);
    for (int64_t i = 0; i < q.rows; ++i) std::fill(t.dq.row(i), t.dq.row(i) + padded<T>(tiles.D), T(0));
    t.loaded = true;
  }

  void segment_of_round(Worker& w, const Head& head, int64_t round, int64_t part, int64_t parts, const Sums& sums) {
    Tiling queries = tiles.query_tiling(head), keys = tiles.key_tiling(head);
    int64_t q_tiles = queries.tiles(), k_tiles = keys.tiles(), step = segment();
    // tiles of queries in segments of one size, keys in as many parts
    Range own_q{std::min(part * step, q_tiles), std::min((part + 1) * step, q_tiles)};
    Range own_k = tiles.shared ? own_q : share_of_rows(k_tiles, part, parts);
    for (int64_t t = own_q.first; t < own_q.last; ++t) w.own[t - own_q.first].loaded = false;
    Range all = own_k;
    for (int64_t t = own_q.first; t < own_q.last; ++t) {
      Range seen = tiles.window(head, round, t);
      if (seen.first >= seen.last) continue;
      if (all.first >= all.last) all = seen;
      all = {std::min(all.first, seen.first), std::max(all.last, seen.last)};
    }
    Dropout<T> dropout(x, head.b * tiles.Hq + head.h);
    for (int64_t tile = all.first; tile < all.last; ++tile) {
      bool own_key = own_k.first <= tile && tile < own_k.last;
      bool loaded = false;
      for (int run = 0; run < Tiles::runs; ++run) {
        Range audience = tiles.audience(head, round, tile, run);
        if (!own_key) audience = {std::max(audience.first, own_q.first), std::min(audience.last, own_q.last)};
        if (audience.first >= audience.last) continue;
        if (!loaded && !load_keys(w, head, round, tile)) break;
        loaded = true;
        for (int64_t t = audience.first; t < audience.last; ++t) {
          bool own_query = own_q.first <= t && t < own_q.last;
          QueryTile<T>& q = own_query ? w.own[t - own_q.first] : w.guest;
          if (!own_query || !q.loaded) load_queries(q, head, round, t);
          if (q.origin.any) meet(w, head, round, part, q, dropout, own_query, own_key);
        }
      }
      if (!loaded) continue;
      const Origin<T>& k = w.k_origin;
      if (!own_key) continue;
      for (int64_t j = 0; j < k.rows; ++j)
        if (k.valid[j]) add_key(w, j, sums);
    }
    for (int64_t t = own_q.first; t < own_q.last; ++t) {
      QueryTile<T>& q = w.own[t - own_q.first];
      if (!q.loaded) continue;
      for (int64_t i = 0; i < q.origin.rows; ++i) {
        T *to = sums.dq.row(q.origin.position[i]), *from = q.dq.row(i);
        if (q.origin.valid[i])
          for (int64_t d = 0; d < tiles.D; ++d) to[d] += from[d];
      }
    }
  }
  bool load_keys(Worker& w, const Head& head, int64_t round, int64_t tile) const {
    Tiling keys = tiles.key_tiling(head);
    Place place = tiles.place(round, tile, keys);
    Origin<T>& k = w.k_origin;
    locate(tiles, true, head.b, head.kv, head.keys, keys, place, true, round + 1, k);
    if (!k.any) return false;
    gather(tiles.shared ? x.q : x.k, head.b, head.kv, k, tiles.D, w.k, true);
    gather(x.v, head.b, head.kv, k, tiles.E, w.v, true);
    // with its factor a key is what the scores and dQ multiply
    for (int64_t j = 0; j < k.rows; ++j) {
      w.factor[j] = k.valid[j] ? factor_of<T>(x, head.b, head.kv, k.position[j]) : T(0);
      scale_row(w.k.row(j), tiles.D, w.factor[j]);
    }
    clear_rows(w.k, k.rows, padded<T>(k.rows), tiles.D), clear_rows(w.v, k.rows, padded<T>(k.rows), tiles.E);
    transpose(w.k.p, w.k.ld, k.rows, tiles.D, w.k_transposed.p, w.k_transposed.ld);
    transpose(w.v.p, w.v.ld, k.rows, tiles.E, w.v_transposed.p, w.v_transposed.ld);
    for (int64_t j = 0; j < k.rows; ++j) {
      std::fill(w.dk.row(j), w.dk.row(j) + padded<T>(tiles.D), T(0));
      std::fill(w.dv.row(j), w.dv.row(j) + padded<T>(tiles.E), T(0));
    }
    return true;
  }

  void meet(Worker& w, const Head& head, int64_t round, int64_t part, QueryTile<T>& q, const Dropout<T>& dropout,
            bool own_query, bool own_key) {
    constexpr int W = width<T>;
    const Origin<T>& k = w.k_origin;
    int64_t rows = q.origin.rows, n = k.rows;
    Rules<T> rules = rules_of(tiles, round, q.origin, k);
    multiply<T, T>(rows, tiles.D, q.q, w.k_transposed, n, w.p, false);
    multiply<T, T>(rows, tiles.E, q.g, w.v_transposed, n, w.ds, false);
    if (x.bias) load_bias(x.bias, head.h, q.origin, k, w.bias);
    for (int64_t i = 0; i < rows; ++i) {
      T *p = w.p.row(i), *ds = w.ds.row(i), *kept = w.kept.row(i), lse = q.lse[i], delta = q.delta[i];
      uint32_t row = dropout.on ? dropout.row(q.origin.position[i]) : 0;
      // a row that sees nothing gives nothing
      if (lse == nothing<T>) lse = std::numeric_limits<T>::max();
      for (int64_t j = 0; j < n; j += W) {
        V<T> s = load(p + j);
        if (x.bias) s += load(bias_row(w.bias, i) + j);
        if (rules.masked) s = rules.allowed(q.origin, i, k, j) ? s : broadcast(nothing<T>);
        V<T> weight = exp_share(s - lse), dp = load(ds + j);
        weight = s == nothing<T> ? V<T>{} : weight;
        V<T> sum = weight;
        if (dropout.on) {
          V<T> stays = dropout.factor(row, load(k.position + j));
          dp *= stays, sum *= stays;
        }
        store(kept + j, sum);
        // 0 times what is not finite
        store(ds + j, weight != T(0) ? weight * (dp - delta) : V<T>{});
      }
    }
    if (own_key) {
      multiply_transposed<T, T>(n, rows, w.kept, q.g, tiles.E, w.dv);
      multiply_transposed<T, T>(n, rows, w.ds, q.q, tiles.D, w.dk);
      if (q.origin.any_bad)
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < n; ++j)
            if (q.origin.bad[i] && w.kept.row(i)[j] != 0)
              std::fill(w.dv.row(j), w.dv.row(j) + padded<T>(tiles.E), std::numeric_limits<T>::quiet_NaN());
    }
    if (own_query) multiply<T, T>(rows, n, w.ds, w.k, tiles.D, q.dq, true);
    if (own_query && x.bias) add_bias(w, q.origin, bias_of(head, part));
  }

  // diagonal sums of a tile
  void add_bias(Worker& w, const Origin<T>& q, double* to) const {
    constexpr int W = width<T>;
    const Origin<T>& k = w.k_origin;
    std::fill_n(w.dbias, 2 * tile_tokens + W, T(0));
    for (int64_t i = 0; i < q.rows; ++i) {
      T* sums = bias_row(w.dbias, i);
      int64_t j = 0;
      for (; j + W <= k.rows; j += W) store(sums + j, load(sums + j) + load(w.ds.row(i) + j));
      for (; j < k.rows; ++j) sums[j] += w.ds.row(i)[j];
    }
    int64_t reach = x.bias.size[1] / 2, least = k.position[0] - q.position[0] - (tile_tokens - 1);
    for (int64_t i = 0; i < offsets_of_tile; ++i) to[std::clamp(least + i, -reach, reach) + reach] += w.dbias[i];
  }

  // what a round adds to the gradients of a key and its value
  void add_key(Worker& w, int64_t j, const Sums& sums) const {
    int64_t at = w.k_origin.position[j];
    T *dk = w.dk.row(j), *k = w.k.row(j), *to = sums.dk.row(at), factor = w.factor[j], along = 0;
    // the length of a unit key does not change
    if (x.key_scale && x.scale != 0) along = dot(dk, k, tiles.D) / static_cast<T>(x.scale) / static_cast<T>(x.scale);
    for (int64_t d = 0; d < tiles.D; ++d) to[d] += factor * (dk[d] - along * k[d]);
    T *dv = w.dv.row(j), *value = sums.dv.row(at);
    for (int64_t e = 0; e < tiles.E; ++e) value[e] += dv[e];
  }

  void convert_rows(const Head& head, int64_t group, int64_t part, int64_t parts, const Sums& sums) const {
    Range queries = share_of_rows(head.queries.length, part, parts), keys = share_of_rows(head.keys.length, part, parts);
    rows_out(sums.dq, y.dq, head.b, head.h, head.queries.start, queries, tiles.D);
    if (group) return;
    if (!tiles.shared) rows_out(sums.dk, y.dk, head.b, head.kv, head.keys.start, keys, tiles.D);
    rows_out(sums.dv, y.dv, head.b, head.kv, head.keys.start, keys, tiles.E);
  }
  void rows_out(const Rows& from, const View& to, int64_t b, int64_t h, int64_t start, Range rows, int64_t n) const {
    with_type(to.dtype, [&](auto type) {
      using To = decltype(type);
      if constexpr ((sizeof(T) == 8) == (sizeof(To) == 8))
        for (int64_t i = start + rows.first; i < start + rows.last; ++i)
          store_row(from.row(i), row_at<To>(to, b, h, i), n);
    });
  }
};

}  // namespace longattn::LONGATTN_ISA
