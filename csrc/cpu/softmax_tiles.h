// Tiles of queries and keys in scratch memory, and which of their pairs may meet.
#pragma once
#include "products.h"
#include "rows.h"
#include "tiling.h"

namespace longattn::LONGATTN_ISA {

template <class T>
using VI = typename vector_of<Int<T>>::type;
template <class T>
using VU = typename vector_of<UInt<T>>::type;

// where each row of a tile comes from
template <class T>
struct Origin {
  Int<T>* position;   // [tile_tokens]
  Int<T>* valid;      // -1, or 0 for a padded one and past the end
  Int<T>* last;       // the position, beyond all positions where not valid
  Matrix<Int<T>> rank, bucket;  // [rounds][tile_tokens]
  bool* bad;          // holds a NaN or an infinity
  int64_t rows;
  bool any, all, any_bad;

  void take(Arena<T>& arena, int64_t rounds) {
    position = arena.template take<Int<T>>(1, tile_tokens).p, valid = arena.template take<Int<T>>(1, tile_tokens).p;
    last = arena.template take<Int<T>>(1, tile_tokens).p;
    rank = arena.template take<Int<T>>(rounds, tile_tokens), bucket = arena.template take<Int<T>>(rounds, tile_tokens);
    bad = arena.template take<bool>(1, tile_tokens).p;
  }
};

// the attributes of a tile's rows; `ranked` rounds of ranks and buckets
template <class T>
void locate(const Tiles& x, bool keys, int64_t b, int64_t h, const Sequence& sequence, const Tiling& tiling, Place place,
            bool maskable, int64_t ranked, Origin<T>& to) {
  const View &order = keys ? x.order_of_keys() : x.x.order_q, &rank = keys ? x.x.rank_k : x.x.rank_q;
  const View &bucket = keys ? x.x.bucket_k : x.x.bucket_q, &mask = x.x.mask;
  int64_t begin = sequence.start + tiling.begin(place.tile), limit = (keys ? x.S : x.L) - 1;
  to.rows = tiling.size(place.tile), to.any = false, to.all = to.rows == tile_tokens, to.any_bad = false;
  for (int64_t i = 0; i < tile_tokens; ++i) {
    int64_t at = i < to.rows ? begin + i : -1;
    if (at >= 0 && x.sorted) at = std::clamp<int64_t>(Tiles::at(order, b, h, place.round, at), 0, limit);
    bool ok = at >= 0 && !(maskable && mask && mask.as<bool>()[b * mask.stride[0] + at * mask.stride[1]]);
    to.position[i] = static_cast<Int<T>>(at), to.valid[i] = ok ? -1 : 0, to.bad[i] = false;
    to.last[i] = ok ? to.position[i] : std::numeric_limits<Int<T>>::max();
    to.any |= ok, to.all &= ok;
  }
  if (!x.sorted) return;
  for (int64_t r = 0; r < ranked; ++r)
    for (int64_t i = 0; i < to.rows; ++i) {
      if (rank) to.rank.row(r)[i] = Tiles::at(rank, b, h, r, to.position[i]);
      if (bucket) to.bucket.row(r)[i] = Tiles::at(bucket, b, h, r, to.position[i]);
    }
}

template <class T>
void mark_bad(Origin<T>& origin, int64_t n, Matrix<T> rows, bool clear) {
  for (int64_t i = 0; i < origin.rows; ++i) {
    T* row = rows.row(i);
    if (std::all_of(row, row + n, [](T x) { return std::isfinite(x); })) continue;
    origin.bad[i] = origin.any_bad = true;
    if (clear) std::fill(row, row + padded<T>(n), T(0));
  }
}

// rows of a tensor [B, heads, length, n], zero past n and where not valid. With `clear` rows that are not finite are 0
// as well; they are marked either way.
template <class T>
void gather(const View& from, int64_t b, int64_t h, Origin<T>& origin, int64_t n, Matrix<T> to, bool clear) {
  with_type(from.dtype, [&](auto type) {
    using From = decltype(type);
    if constexpr ((sizeof(T) == 8) == (sizeof(From) == 8)) {
      const From* base = from.as<From>() + b * from.stride[0] + h * from.stride[1];
      int64_t step = from.stride[2], stride = from.stride[3];
      V<T> zero{};
      for (int64_t i = 0; i < origin.rows; ++i) {
        T* row = to.row(i);
        if (!origin.valid[i]) {
          std::fill(row, row + padded<T>(n), T(0));
        } else if (stride == 1 && n % width<T> == 0) {
          const From* p = base + origin.position[i] * step;
          for (int64_t d = 0; d < n; d += width<T>) {
            V<T> x = load_as(p + d);
            store(row + d, x), zero = fma(x, V<T>{}, zero);
          }
        } else {
          load_row(base + origin.position[i] * step, stride, n, row);
          for (int64_t d = 0; d < n; d += width<T>) zero = fma(load(row + d), V<T>{}, zero);
        }
      }
      // hardly ever
      if (sum<T>(zero) != T(0)) mark_bad(origin, n, to, clear);
    }
  });
}

// rows past the end, which whole registers read
template <class T>
void clear_rows(Matrix<T> to, int64_t rows, int64_t until, int64_t n) {
  for (int64_t i = rows; i < until; ++i) std::fill(to.row(i), to.row(i) + padded<T>(n), T(0));
}

// what every row of a tile must ask
template <class T>
struct Rules {
  bool masked;        // anything at all
  bool causal, skip_self, dedupe, within, near;
  Int<T> window;      // positions apart, if near
  Int<T> back, span;  // of chunks: a window is [centre - back, centre - back + span]
  int64_t round;

  // the pairs of row i with a vector of keys
  VI<T> allowed(const Origin<T>& q, int64_t i, const Origin<T>& k, int64_t j) const {
    VI<T> ok;
    if (causal) {
      ok = load(k.last + j) <= q.position[i] - skip_self;
    } else {
      ok = load(k.valid + j);
      if (skip_self) ok &= load(k.position + j) != q.position[i];
    }
    if (near) {
      VI<T> apart = load(k.position + j) - q.position[i];
      ok &= (apart < window) & (apart > -window);
    }
    if (within) ok &= load(k.bucket.row(round) + j) == q.bucket.row(round)[i];
    if (dedupe)
      for (int64_t r = 0; r < round; ++r) {
        VU<T> distance = (VU<T>)(load(k.rank.row(r) + j) - (q.rank.row(r)[i] - back));
        VI<T> met = distance <= static_cast<UInt<T>>(span);
        if (within) met &= load(k.bucket.row(r) + j) == q.bucket.row(r)[i];
        ok &= ~met;
      }
    return ok;
  }
};

template <class T>
Rules<T> rules_of(const Tiles& x, int64_t round, const Origin<T>& q, const Origin<T>& k) {
  Rules<T> y{};
  bool touch = x.sorted || k.position[k.rows - 1] >= q.position[0];
  y.causal = x.x.is_causal && touch;
  y.skip_self = x.x.self != SelfRule::ordinary && (x.sorted || q.position[0] == k.position[0]);
  y.dedupe = x.x.dedupe && round > 0, y.within = bool(x.x.bucket_q), y.round = round;
  // centres and chunks are below 2^30
  constexpr int64_t far = int64_t(1) << 30;
  y.back = static_cast<Int<T>>(std::min(x.x.look_back, far));
  y.span = y.back + static_cast<Int<T>>(std::min(x.x.look_ahead, far));
  int64_t reach = std::max(k.position[k.rows - 1] - q.position[0], q.position[q.rows - 1] - k.position[0]);
  y.near = x.x.window > 0 && (x.sorted || reach >= x.x.window);
  y.window = static_cast<Int<T>>(std::min(x.x.window, (int64_t(1) << 31) - 1));
  y.masked = y.causal || y.near || y.skip_self || y.dedupe || y.within || !k.all;
  return y;
}

// what is added to the scores of a tile in its own order: row i starts at `bias_row`. to: [2 tile_tokens + a vector]
constexpr int64_t offsets_of_tile = 2 * tile_tokens - 1;
template <class T>
void load_bias(const View& bias, int64_t h, const Origin<T>& q, const Origin<T>& k, T* to) {
  int64_t reach = bias.size[1] / 2, least = k.position[0] - q.position[0] - (tile_tokens - 1);
  const T* from = bias.as<T>() + h * bias.stride[0] + reach * bias.stride[1];
  for (int64_t i = 0; i < offsets_of_tile; ++i) to[i] = from[std::clamp(least + i, -reach, reach) * bias.stride[1]];
  std::fill_n(to + offsets_of_tile, width<T> + 1, T(0));
}
template <class T>
inline T* bias_row(T* offsets, int64_t i) { return offsets + tile_tokens - 1 - i; }

// what a key is multiplied by before it meets a query
template <class T>
inline T factor_of(const SoftmaxProblem& x, int64_t b, int64_t kv, int64_t at) {
  T scale = static_cast<T>(x.scale);
  const View& own = x.key_scale;
  return own ? scale * own.as<T>()[b * own.stride[0] + kv * own.stride[1] + at * own.stride[2]] : scale;
}
template <class T>
inline void scale_row(T* row, int64_t n, T factor) {
  for (int64_t d = 0; d < n; d += width<T>) store(row + d, load(row + d) * factor);
}
template <class T>
inline T* row_at(const View& x, int64_t b, int64_t h, int64_t at) {
  return x.as<T>() + b * x.stride[0] + h * x.stride[1] + at * x.stride[2];
}
template <class T>
inline void row_of(const View& from, int64_t b, int64_t h, int64_t at, int64_t n, T* to) {
  with_type(from.dtype, [&](auto type) {
    using From = decltype(type);
    if constexpr ((sizeof(T) == 8) == (sizeof(From) == 8))
      load_row(row_at<From>(from, b, h, at), from.stride[3], n, to);
  });
}

// dropout by a counter: whether a pair is dropped depends on the seed, the head and the two positions alone
template <class U>
inline U mix(U x) {
  x ^= x >> 16;
  x = (x * 0x7feb352d) & 0xffffffff;
  x ^= x >> 15;
  x = (x * 0x846ca68b) & 0xffffffff;
  return x ^ x >> 16;
}

template <class T>
struct Dropout {
  bool on = false;
  uint32_t head = 0;
  UInt<T> threshold = 0;
  T keep = 1;  // 1 / (1 - p)

  Dropout(const SoftmaxProblem& x, int64_t head_index) {
    on = x.dropout_p > 0;
    if (!on) return;
    uint32_t low = static_cast<uint32_t>(x.seed), high = static_cast<uint32_t>(x.seed >> 32);
    head = mix<uint32_t>(mix<uint32_t>(low + 0x9e3779b9u * static_cast<uint32_t>(head_index + 1)) ^ high);
    threshold = static_cast<UInt<T>>(std::min(std::floor(x.dropout_p * 0x1p32), 0xffffffffp0));
    keep = static_cast<T>(1 / (1 - x.dropout_p));
  }
  uint32_t row(Int<T> i) const { return mix<uint32_t>(head ^ static_cast<uint32_t>(i) * 0x85ebca6bu); }
  // 0 or keep, for a vector of keys
  V<T> factor(uint32_t row, VI<T> keys) const {
    VU<T> u = ((VU<T>)keys * UInt<T>(0xc2b2ae35) + UInt<T>(row)) & UInt<T>(0xffffffff);
    VI<T> stays = mix<VU<T>>(u) >= threshold;
    return stays ? broadcast(keep) : V<T>{};
  }
  T factor(Int<T> i, Int<T> j) const {
    if (!on) return 1;
    return mix<uint32_t>(static_cast<uint32_t>(j) * 0xc2b2ae35u + row(i)) >= threshold ? keep : T(0);
  }
};

template <class T>
inline T dot(const T* a, const T* b, int64_t n) {
  V<T> total{};
  for (int64_t i = 0; i < n; i += width<T>) total = fma(load(a + i), load(b + i), total);
  return sum<T>(total);
}
template <class T>
inline T largest(V<T> x) {
  T lane[width<T>];
  store(lane, x);
  for (int n = width<T> / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lane[i] = lane[i + n] > lane[i] ? lane[i + n] : lane[i];
  return lane[0];
}

}  // namespace longattn::LONGATTN_ISA
