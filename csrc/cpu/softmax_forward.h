// Forward: query tile after query tile, keys in groups of two tiles, a running maximum and sum for each row. A position
// occurs once in a round, so rounds follow each other and add to the same rows.
#pragma once
#include <vector>

#include "softmax_tiles.h"

namespace longattn::LONGATTN_ISA {

// A: what products read, T or pairs of bfloat16
template <class T, class A>
struct KeyTile {
  int64_t* tag;
  Origin<T> origin;
  T* factor;           // scale times the key's own
  Matrix<T> rows;      // [tile_tokens][D], on its way to k
  Matrix<A> k, v;      // [D][tile_tokens], [tile_tokens][E]
};

template <class T, class A>
struct QueryRows {
  Origin<T> origin, own_origin;
  Matrix<T> q, own_q, out;
  Matrix<A> factor;
  T *top, *total;
  Range window;
};

template <class T, class A>
struct ForwardScratch {
  static constexpr int64_t group = 2, block = 4;  // key tiles, and query tiles that meet them in turn
  KeyTile<T, A>* tiles;
  int64_t slots;
  QueryRows<T, A> queries[block];
  Matrix<T> scaled, scores, row, transposed, bias;
  Matrix<A> p_factor;
  T *share, *new_top;
  int64_t bytes;

  ForwardScratch(char* memory, const Tiles& x, int64_t slots) : slots(slots) {
    Arena<T> arena{memory};
    int64_t D = padded<T>(x.D), E = padded<T>(x.E), pairs = has_pairs ? padded<T>(round_up(x.D, 2 * width<T>) / 2) : 0;
    tiles = reinterpret_cast<KeyTile<T, A>*>(arena.template take<char>(1, slots * int64_t(sizeof(KeyTile<T, A>))).p);
    for (QueryRows<T, A>& q : queries) {
      q.own_origin.take(arena, x.R);
      q.own_q = arena.take(tile_tokens, D), q.out = arena.take(tile_tokens, E);
      if constexpr (per<A> == 2) q.factor = arena.template take<A>(tile_tokens, pairs);
      for (T** p : {&q.top, &q.total}) *p = arena.take(1, tile_tokens).p;
    }
    scaled = arena.take(tile_tokens, D), row = arena.take(2, std::max(D, E));
    scores = arena.take(tile_tokens, group * tile_tokens);
    if (x.x.bias) bias = arena.take(group, 2 * tile_tokens + width<T>);
    for (T** p : {&share, &new_top}) *p = arena.take(1, tile_tokens).p;
    if constexpr (per<A> == 2) {
      p_factor = arena.template take<A>(tile_tokens, group * tile_tokens / 2);
      transposed = arena.take(tile_tokens, std::max(E, pairs));
    }
    KeyTile<T, A> unwritten;
    for (int64_t i = 0; i < slots; ++i) {
      KeyTile<T, A>& k = memory ? tiles[i] : unwritten;
      k.tag = arena.template take<int64_t>(1, 1).p;
      k.origin.take(arena, x.R), k.factor = arena.take(1, tile_tokens).p;
      k.rows = arena.take(tile_tokens, D);
      k.k = arena.template take<A>(per<A> == 2 ? pairs : D, tile_tokens);
      k.v = arena.template take<A>(tile_tokens / per<A>, E);
      if (memory) *k.tag = -1;
    }
    bytes = arena.bytes;
  }
};

template <class T, class A>
struct TileForward {
  static constexpr int64_t segment = 16;        // query tiles of a task
  static constexpr int64_t most_slots = 256;    // key tiles a worker keeps
  const SoftmaxProblem& x;
  const SoftmaxForward& y;
  Tiles tiles;
  using Worker = ForwardScratch<T, A>;

  TileForward(const SoftmaxProblem& x, const SoftmaxForward& y) : x(x), y(y), tiles(x) {}

  int64_t segments() const { return (Tiling(tiles.L, x.chunk).tiles() + segment - 1) / segment; }
  bool windowed() const { return slots_of_window() < most_slots; }
  int64_t slots_of_window() const {
    Tiling keys(tiles.S, x.chunk);
    int64_t chunks = std::min(x.look_back, keys.chunks) + std::min(x.look_ahead, keys.chunks) + 1;
    return (chunks + 1) * keys.per_chunk;
  }
  int64_t slots() const {
    int64_t all = x.wrap ? slots_of_window() : Tiling(tiles.S, x.chunk).tiles();
    return std::clamp<int64_t>(std::min(slots_of_window(), all), 2, most_slots);
  }
  // heads whose rounds go on side by side, and whose sums wait in memory meanwhile
  int64_t wave() const {
    if (tiles.R == 1) return std::max<int64_t>(tiles.units(), 1);
    int64_t n = std::max<int64_t>(segments(), 1);
    return std::clamp<int64_t>((4 * x.threads + n) / n, 1, std::max<int64_t>(tiles.units(), 1));
  }
  bool needs_sums() const { return tiles.R > 1 && x.q.dtype != (sizeof(T) == 8 ? DType::f64 : DType::f32); }
  int64_t sums_bytes() const { return needs_sums() ? wave() * tiles.L * tiles.E * int64_t(sizeof(T)) : 0; }
  int64_t workspace() const { return x.threads * Worker(nullptr, tiles, slots()).bytes + sums_bytes() + 64; }

  void run() {
    DType acc = sizeof(T) == 8 ? DType::f64 : DType::f32;
    expect_shape(y.out, "out", {tiles.B, tiles.Hq, tiles.L, tiles.E}), expect_dtype(y.out, "out", x.q.dtype);
    expect(y.out.stride[3] == 1, "out must have rows without gaps");
    for (const View* v : {&y.lse, &y.top})
      expect_shape(*v, "lse", {tiles.B, tiles.Hq, tiles.L}), expect_dtype(*v, "lse", acc);
    expect(x.threads >= 1 && x.workspace.elements() >= workspace(), "the workspace is too small");
    char* memory = first_line(x.workspace.data);
    T* sums = reinterpret_cast<T*>(memory);
    memory += round_up(sums_bytes(), 64);
    std::vector<Worker> workers;
    int64_t bytes = Worker(nullptr, tiles, slots()).bytes;
    for (int i = 0; i < x.threads; ++i) workers.emplace_back(memory + i * bytes, tiles, slots());
    int64_t all = tiles.units(), n = segments(), wave = this->wave();
    for (int64_t first = 0; first < all; first += wave)
      for (int64_t round = 0; round < tiles.R; ++round)
        parallel_tasks(std::min(wave, all - first) * n, x.threads, [&](int64_t task, int me) {
          Head head = tiles.head(first + task / n);
          int64_t begin = task % n * segment, end = std::min(begin + segment, tiles.query_tiling(head).tiles());
          T* out = needs_sums() ? sums + task / n * tiles.L * tiles.E : nullptr;
          // in an order two tiles share few keys
          int64_t step = tiles.sorted ? 1 : Worker::block;
          for (int64_t tile = begin; tile < end; tile += step)
            query_tiles(workers[me], head, round, tile, std::min(step, end - tile), out);
        });
  }

  T& of(const View& v, const Head& head, int64_t i) const {
    return v.as<T>()[head.b * v.stride[0] + head.h * v.stride[1] + i * v.stride[2]];
  }
  // where a row waits between rounds: its place in the result, or in `sums`
  T* waiting(T* sums, const Head& head, int64_t i) const {
    if (sums) return sums + i * tiles.E;
    return row_at<T>(y.out, head.b, head.h, i);
  }

  // a window slides over all slots; a long row of keys keeps its first ones, and two take turns for the others
  int64_t slot(int64_t slots, int64_t tile) const {
    if (windowed()) return (tile % slots + slots) % slots;
    return tile < slots - 2 ? tile : slots - 2 + tile % 2;
  }
  const KeyTile<T, A>& key_tile(Worker& w, const Head& head, int64_t round, int64_t tile) {
    Place place = tiles.place(round, tile, tiles.key_tiling(head));
    int64_t tag = (((head.queries.n * tiles.H + head.kv) * tiles.R + place.round) << 32) + place.tile;
    KeyTile<T, A>& k = w.tiles[slot(w.slots, tile)];
    if (*k.tag == tag) return k;
    *k.tag = tag;
    // a round compares its ranks with those of the rounds before it
    locate(tiles, true, head.b, head.kv, head.keys, tiles.key_tiling(head), place, true, place.round + 1, k.origin);
    if (!k.origin.any) return k;
    const View& from = tiles.shared ? x.q : x.k;
    gather(from, head.b, head.kv, k.origin, tiles.D, k.rows, false);
    k.origin.any_bad = false;
    for (int64_t i = 0; i < tile_tokens; ++i)
      k.factor[i] = i < k.origin.rows && k.origin.valid[i] ? factor_of<T>(x, head.b, head.kv, k.origin.position[i]) : T(0);
    clear_rows(k.rows, k.origin.rows, padded<T>(k.origin.rows), tiles.D);
    if constexpr (per<A> == 2) {
      pair_along(k.origin.rows, tiles.D, k.rows, {reinterpret_cast<Pair*>(w.transposed.p), w.transposed.ld});
      int64_t pairs = round_up(tiles.D, 2 * width<T>) / 2;
      clear_rows(w.transposed, k.origin.rows, padded<T>(k.origin.rows), pairs);
      transpose(w.transposed.p, w.transposed.ld, k.origin.rows, pairs, reinterpret_cast<T*>(k.k.p), k.k.ld);
    } else {
      // the rows themselves may be queries
      for (int64_t i = 0; i < padded<T>(k.origin.rows); ++i)
        for (int64_t d = 0; d < tiles.D; d += width<T>) store(w.scaled.row(i) + d, load(k.rows.row(i) + d) * k.factor[i]);
      transpose(w.scaled.p, w.scaled.ld, k.origin.rows, tiles.D, k.k.p, k.k.ld);
    }
    std::fill(k.origin.bad, k.origin.bad + tile_tokens, false);
    Matrix<T> v = value_rows(w, k);
    gather(x.v, head.b, head.kv, k.origin, tiles.E, v, true);
    if constexpr (per<A> == 2) pair_across(k.origin.rows, tiles.E, v, k.v);
    return k;
  }
  Matrix<T> value_rows(Worker& w, KeyTile<T, A>& k) const {
    if constexpr (per<A> == 2) return w.transposed;
    else return k.v;
  }

  void query_tiles(Worker& w, const Head& head, int64_t round, int64_t tile, int64_t count, T* sums) {
    Dropout<T> dropout(x, head.b * tiles.Hq + head.h);
    Range keys{std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::min()};
    for (int64_t n = 0; n < count; ++n) {
      QueryRows<T, A>& q = w.queries[n];
      begin(w, q, head, round, tile + n, sums);
      if (q.window.first == q.window.last) continue;
      keys = {std::min(keys.first, q.window.first), std::max(keys.last, q.window.last)};
    }
    for (int64_t first = keys.first; first < keys.last; first += Worker::group)
      for (int64_t n = 0; n < count; ++n) {
        QueryRows<T, A>& q = w.queries[n];
        const KeyTile<T, A>* group[Worker::group];
        int64_t met = 0;
        for (int64_t g = std::max(first, q.window.first); g < std::min(first + Worker::group, q.window.last); ++g) {
          const KeyTile<T, A>& k = key_tile(w, head, round, g);
          if (k.origin.any) group[met++] = &k;
        }
        if (met) meet(w, head, q, round, group, met, dropout);
      }
    for (int64_t n = 0; n < count; ++n) {
      QueryRows<T, A>& q = w.queries[n];
      for (int64_t i = 0; i < q.origin.rows; ++i) {
        if (round + 1 == tiles.R) {
          finish(w, q, head, i, dropout);
        } else {
          of(y.top, head, q.origin.position[i]) = q.top[i], of(y.lse, head, q.origin.position[i]) = q.total[i];
          store_row(q.out.row(i), waiting(sums, head, q.origin.position[i]), tiles.E);
        }
      }
    }
  }

  void begin(Worker& w, QueryRows<T, A>& q, const Head& head, int64_t round, int64_t tile, T* sums) {
    Origin<T>& from = q.origin;
    if (tiles.shared && windowed()) {
      // the rows of a tile are queries and keys, and stay while its window is met
      const KeyTile<T, A>& k = key_tile(w, head, round, tile);
      from = k.origin, q.q = k.rows;
    } else {
      from = q.own_origin, q.q = q.own_q;
      locate(tiles, false, head.b, head.h, head.queries, tiles.query_tiling(head), {round, tile}, tiles.shared,
             round + 1, from);
      gather(x.q, head.b, head.h, from, tiles.D, q.q, false);
    }
    if constexpr (per<A> == 2) pair_along(from.rows, tiles.D, q.q, q.factor);
    for (int64_t i = 0; i < from.rows; ++i) {
      q.top[i] = round ? of(y.top, head, from.position[i]) : nothing<T>;
      q.total[i] = round ? of(y.lse, head, from.position[i]) : T(0);
      if (round) load_row(waiting(sums, head, from.position[i]), 1, tiles.E, q.out.row(i));
      else std::fill(q.out.row(i), q.out.row(i) + padded<T>(tiles.E), T(0));
    }
    q.window = from.any || !tiles.shared ? tiles.window(head, round, tile) : Range{0, 0};
  }

  void meet(Worker& w, const Head& head, QueryRows<T, A>& q, int64_t round, const KeyTile<T, A>* const* group, int64_t count,
            const Dropout<T>& dropout) {
    constexpr int W = width<T>;
    int64_t rows = q.origin.rows, vectors[Worker::group];
    Rules<T> rules[Worker::group];
    for (int64_t g = 0; g < count; ++g) {
      const KeyTile<T, A>& k = *group[g];
      Matrix<T> s{w.scores.p + g * tile_tokens, w.scores.ld};
      if constexpr (per<A> == 2)
        multiply<T, A>(rows, round_up(tiles.D, 2 * W) / 2, q.factor, k.k, k.origin.rows, s, false);
      else multiply<T, A>(rows, tiles.D, q.q, k.k, k.origin.rows, s, false);
      rules[g] = rules_of(tiles, round, q.origin, k.origin), vectors[g] = padded<T>(k.origin.rows) / W;
      if (x.bias) load_bias(x.bias, head.h, q.origin, k.origin, w.bias.row(g));
    }
    for (int64_t i = 0; i < rows; ++i) {
      V<T> top = broadcast(nothing<T>);
      for (int64_t g = 0; g < count; ++g) {
        T* s = w.scores.row(i) + g * tile_tokens;
        const KeyTile<T, A>& k = *group[g];
        for (int64_t j = 0; j < vectors[g]; ++j) {
          V<T> value = load(s + j * W);
          if (per<A> == 2) value *= load(k.factor + j * W);
          if (x.bias) value += load(bias_row(w.bias.row(g), i) + j * W);
          if (rules[g].masked) value = rules[g].allowed(q.origin, i, k.origin, j * W) ? value : broadcast(nothing<T>);
          if (per<A> == 2 || rules[g].masked || x.bias) store(s + j * W, value);
          top = larger(value, top);
        }
      }
      w.new_top[i] = std::max(q.top[i], largest<T>(top));
    }
    for (int64_t i = 0; i < rows; i += W) {
      // a row that has seen nothing keeps its sum of 0
      V<T> old = load(q.top + i), now = load(w.new_top + i);
      V<T> share = exp_share(old - now);
      store(w.share + i, old == now ? broadcast(T(1)) : old == nothing<T> ? V<T>{} : share);
    }
    for (int64_t i = 0; i < rows; ++i) {
      T top = w.new_top[i];
      if (top == nothing<T>) top = 0;
      uint32_t row = dropout.on ? dropout.row(q.origin.position[i]) : 0;
      V<T> total{};
      for (int64_t g = 0; g < count; ++g) {
        T* s = w.scores.row(i) + g * tile_tokens;
        for (int64_t j = 0; j < vectors[g]; ++j) {
          V<T> value = load(s + j * W);
          V<T> p = exp_share(value - top);
          p = value == nothing<T> ? V<T>{} : p;
          total += p;
          if (dropout.on) p *= dropout.factor(row, load(group[g]->origin.position + j * W));
          store(s + j * W, p);
        }
      }
      q.total[i] = q.total[i] * w.share[i] + sum<T>(total), q.top[i] = w.new_top[i];
      if (w.share[i] != T(1)) scale_row(q.out.row(i), tiles.E, w.share[i]);
    }
    for (int64_t g = 0; g < count; ++g) {
      const KeyTile<T, A>& k = *group[g];
      Matrix<T> p{w.scores.p + g * tile_tokens, w.scores.ld};
      if constexpr (per<A> == 2) {
        pair_along(rows, padded<T>(k.origin.rows), p, w.p_factor);
        multiply<T, A>(rows, (k.origin.rows + 1) / 2, w.p_factor, k.v, tiles.E, q.out, true);
      } else {
        multiply<T, A>(rows, k.origin.rows, p, k.v, tiles.E, q.out, true);
      }
      if (k.origin.any_bad) spoil(q, p, k.origin);
    }
  }

  // values that are not finite stood out of the product: they reach the rows that give them a weight
  void spoil(QueryRows<T, A>& q, Matrix<T> p, const Origin<T>& k) const {
    for (int64_t i = 0; i < q.origin.rows; ++i)
      for (int64_t j = 0; j < k.rows; ++j)
        if (k.bad[j] && p.row(i)[j] != 0)
          std::fill(q.out.row(i), q.out.row(i) + padded<T>(tiles.E), std::numeric_limits<T>::quiet_NaN());
  }

  // a row after its last round: its own key, the quotient, the logarithm
  void finish(Worker& w, QueryRows<T, A>& q, const Head& head, int64_t i, const Dropout<T>& dropout) const {
    int64_t at = q.origin.position[i];
    T *out = q.out.row(i), top = q.top[i], total = q.total[i];
    // the backward knows a row that fell back on its own key by an lse of nothing
    bool fell_back = x.self == SelfRule::fallback && total == 0, own = x.self == SelfRule::always || fell_back;
    if (own && !(x.mask && x.mask.as<bool>()[head.b * x.mask.stride[0] + at * x.mask.stride[1]])) {
      T *key = w.row.row(0), *value = w.row.row(1), factor = factor_of<T>(x, head.b, head.kv, at);
      row_of(tiles.shared ? x.q : x.k, head.b, head.kv, at, tiles.D, key);
      row_of(x.v, head.b, head.kv, at, tiles.E, value);
      T score = dot(q.q.row(i), key, tiles.D) * factor, now = std::max(top, score);
      // a NaN stays one
      if (score != score) now = score;
      T old_share = share_of(top, now), share = std::exp(score - now), kept = share * dropout.factor(at, at);
      for (int64_t e = 0; e < tiles.E; e += width<T>) {
        V<T> sum = load(out + e) * old_share;
        store(out + e, kept == 0 ? sum : fma(broadcast(kept), load(value + e), sum));
      }
      total = total * old_share + share, top = now;
    }
    bool hidden = tiles.shared && !q.origin.valid[i];
    if (hidden) std::fill(out, out + padded<T>(tiles.E), T(0));
    else scale_row(out, tiles.E, total == 0 ? T(0) : 1 / total);
    of(y.lse, head, at) = hidden || fell_back || total == 0 ? nothing<T> : top + std::log(total);
    with_type(y.out.dtype, [&](auto type) {
      using To = decltype(type);
      if constexpr ((sizeof(T) == 8) == (sizeof(To) == 8))
        store_row(out, row_at<To>(y.out, head.b, head.h, at), tiles.E);
    });
  }
};

}  // namespace longattn::LONGATTN_ISA
