// Which tiles of tokens meet. The tokens of a sequence stand in an order (of positions, or of a round of hashing), cut
// into chunks, and a chunk into tiles of at most 64. A chunk of queries is centred on a chunk of keys and sees
// look_back chunks before it and look_ahead after it.
#pragma once
#include "sequences.h"
#include "softmax.h"

namespace longattn::LONGATTN_ISA {

constexpr int64_t tile_tokens = 64;

// tiles of one sequence; how it is cut does not depend on its length
struct Tiling {
  int64_t length, chunk, per_chunk, rows, chunks;
  Tiling(int64_t length, int64_t chunk)
      : length(length), chunk(chunk), per_chunk((chunk + tile_tokens - 1) / tile_tokens),
        rows((chunk + per_chunk - 1) / per_chunk), chunks((length + chunk - 1) / chunk) {}
  // the last chunk may have fewer
  int64_t tiles() const {
    return chunks ? (chunks - 1) * per_chunk + (length - (chunks - 1) * chunk + rows - 1) / rows : 0;
  }
  int64_t begin(int64_t tile) const { return std::min(tile / per_chunk * chunk + tile % per_chunk * rows, length); }
  int64_t size(int64_t tile) const {
    int64_t end = std::min({begin(tile) + rows, (tile / per_chunk + 1) * chunk, length});
    return std::max<int64_t>(end - begin(tile), 0);
  }
};

struct Range {
  int64_t first, last;
};

// one head of one sequence
struct Head {
  int64_t b, h, kv;  // batch entry, head of queries, head of keys
  Sequence queries, keys;
};

// a tile in a round of hashing; where windows wrap, the one that a number outside of the round stands for
struct Place {
  int64_t round, tile;
};

struct Tiles {
  const SoftmaxProblem& x;
  int64_t B, Hq, H, L, S, D, E, R, groups;
  bool shared, sorted, separate;
  Sequences sequences;

  explicit Tiles(const SoftmaxProblem& x) : x(x) {
    const View& k = x.k ? x.k : x.q;
    for (const View* v : {&x.q, &k, &x.v}) expect(v->rank == 4, "q, k and v must have 4 dimensions");
    B = x.q.size[0], Hq = x.q.size[1], L = x.q.size[2], D = x.q.size[3];
    H = k.size[1], S = k.size[2], E = x.v.size[3];
    shared = !x.k, sorted = bool(x.order_q), separate = sorted && !shared;
    R = sorted ? x.order_q.size[2] : 1;
    groups = H ? Hq / H : 1;
    sequences = {x.cu_seqlens, x.cu_seqlens ? x.cu_seqlens.size[0] - 1 : B, 1};
    check();
  }

  int64_t units() const { return sequences.N * Hq; }
  // query heads of a key head lie one after the other
  Head head(int64_t unit) const {
    int64_t n = unit / Hq, h = unit % Hq;
    Sequence queries = sequences.sequence(n, L), keys = sequences.sequence(n, S);
    return {queries.b, h, h / groups, queries, keys};
  }
  Tiling query_tiling(const Head& head) const { return Tiling(head.queries.length, x.chunk); }
  Tiling key_tiling(const Head& head) const { return Tiling(head.keys.length, x.chunk); }

  static int32_t at(const View& v, int64_t b, int64_t h, int64_t r, int64_t i) {
    return v.as<int32_t>()[b * v.stride[0] + h * v.stride[1] + r * v.stride[2] + i * v.stride[3]];
  }
  const View& order_of_keys() const { return shared ? x.order_q : x.order_k; }
  // the chunk of keys that a chunk of queries is centred on
  int64_t centre(const Head& head, int64_t round, int64_t chunk) const {
    if (!separate) return chunk;
    int64_t place = head.queries.start + chunk * x.chunk;
    int64_t position = std::clamp<int64_t>(at(x.order_q, head.b, head.h, round, place), 0, L - 1);
    return at(x.rank_q, head.b, head.h, round, position);
  }
  // the key tiles that a query tile sees; numbers outside of [0, tiles) only where windows wrap
  Range window(const Head& head, int64_t round, int64_t tile) const {
    Tiling keys = key_tiling(head);
    int64_t u = centre(head, round, tile / keys.per_chunk);
    int64_t first = u - x.look_back, last = u + x.look_ahead + 1;
    if (x.wrap) return {first * keys.per_chunk, last * keys.per_chunk};
    first = std::clamp<int64_t>(first, 0, keys.chunks), last = std::clamp<int64_t>(last, first, keys.chunks);
    return {first * keys.per_chunk, std::min(last * keys.per_chunk, keys.tiles())};
  }
  // the query tiles that see a key tile, in two runs: padded positions are sorted behind the others, and in each of the
  // two the centres never decrease
  static constexpr int runs = 2;
  Range audience(const Head& head, int64_t round, int64_t tile, int run) const {
    Tiling queries = query_tiling(head);
    int64_t chunk = (tile + shift(queries)) / queries.per_chunk - queries.chunks;
    Range seen{chunk - x.look_ahead, chunk + x.look_back + 1};
    if (separate) {
      Range all{run ? first_padded(head, round, queries.chunks) : 0, queries.chunks};
      if (!run) all.last = first_padded(head, round, queries.chunks);
      auto centred = [&](int64_t least) {
        return first_of(all, [&](int64_t t) { return centre(head, round, t) >= least; });
      };
      seen = {centred(seen.first), centred(seen.last)};
    } else if (run) {
      return {0, 0};
    } else if (!x.wrap) {
      seen.first = std::clamp<int64_t>(seen.first, 0, queries.chunks);
      seen.last = std::clamp<int64_t>(seen.last, seen.first, queries.chunks);
    }
    int64_t last = seen.last * queries.per_chunk;
    return {seen.first * queries.per_chunk, x.wrap ? last : std::min(last, queries.tiles())};
  }
  Place place(int64_t round, int64_t tile, const Tiling& tiling) const {
    int64_t all = tiling.chunks * tiling.per_chunk;
    if (tile < 0) return {(round + R - 1) % R, tile + all};
    if (tile >= all) return {(round + 1) % R, tile - all};
    return {round, tile};
  }

 private:
  // tiles before the first have negative numbers, which division would round up
  static int64_t shift(const Tiling& tiling) { return tiling.chunks * tiling.per_chunk; }
  template <class F>
  static int64_t first_of(Range among, F&& holds) {
    while (among.first < among.last) {
      int64_t middle = (among.first + among.last) / 2;
      if (holds(middle)) among.last = middle;
      else among.first = middle + 1;
    }
    return among.first;
  }
  // the first chunk that starts with a padded query
  int64_t first_padded(const Head& head, int64_t round, int64_t chunks) const {
    if (!x.mask || L != S) return chunks;
    return first_of({0, chunks}, [&](int64_t chunk) {
      int64_t place = head.queries.start + chunk * x.chunk;
      int64_t at = std::clamp<int64_t>(Tiles::at(x.order_q, head.b, head.h, round, place), 0, L - 1);
      return x.mask.as<bool>()[head.b * x.mask.stride[0] + at * x.mask.stride[1]];
    });
  }

  void check() const {
    expect(x.chunk >= 1 && x.look_back >= 0 && x.look_ahead >= 0 && x.window >= 0,
           "chunk, look_back, look_ahead and window must not be negative");
    expect(H > 0 ? Hq % H == 0 : Hq == 0, "query heads must be a multiple of key heads");
    expect_shape(x.v, "v", {B, H, S, E});
    for (const View* v : {&x.q, &x.k, &x.v})
      if (*v) expect_dtype(*v, "q, k or v", x.q.dtype);
    if (!shared) expect_shape(x.k, "k", {B, H, S, D});
    else expect(L == S && Hq == H, "without k there is one key for each query");
    if (x.mask) expect_shape(x.mask, "mask", {B, S}), expect_dtype(x.mask, "mask", DType::boolean);
    if (x.cu_seqlens) sequences.check(B, L, S);
    DType acc = x.q.dtype == DType::f64 ? DType::f64 : DType::f32;
    if (x.key_scale) {
      expect_shape(x.key_scale, "key_scale", {B, H, S}), expect_dtype(x.key_scale, "key_scale", acc);
      expect(shared, "key_scale comes without k");
    }
    expect(x.self == SelfRule::ordinary || L == S, "a query's own key needs L == S");
    for (const View* v : {&x.order_q, &x.rank_q, &x.bucket_q})
      if (*v) expect_shape(*v, "order_q, rank_q or bucket_q", {B, Hq, R, L}), expect_dtype(*v, "an order", DType::i32);
    for (const View* v : {&x.order_k, &x.rank_k, &x.bucket_k})
      if (*v) expect_shape(*v, "order_k, rank_k or bucket_k", {B, H, R, S}), expect_dtype(*v, "an order", DType::i32);
    if (sorted) {
      expect(shared || (x.order_k && x.rank_q), "sorted queries need sorted keys and the chunks they are centred on");
      expect(!x.dedupe || R == 1 || (x.rank_q && x.rank_k), "dedupe needs ranks");
      expect(!x.bucket_q || x.bucket_k, "buckets of queries need buckets of keys");
    } else {
      expect(!x.order_k && !x.dedupe && !x.bucket_q, "rounds need an order of the queries");
    }
    if (x.bias) {
      expect(!sorted && x.bias.rank == 2 && x.bias.size[1] % 2 == 1, "a bias by offset needs tokens in their own order");
      expect_shape(x.bias, "bias", {Hq, x.bias.size[1]}), expect_dtype(x.bias, "bias", acc);
    }
    if (x.wrap) {
      int64_t chunks = Tiling(S, x.chunk).chunks;
      expect(shared && sorted && !x.dedupe && !x.bucket_q && !x.cu_seqlens, "wrap needs one order, windows and no dedupe");
      expect(chunks == 0 || std::max(x.look_back, x.look_ahead) <= chunks, "a window wraps no further than one round");
    }
  }
};

}  // namespace longattn::LONGATTN_ISA
