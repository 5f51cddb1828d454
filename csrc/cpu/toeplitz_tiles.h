// Which chunks of targets and sources meet in a product with a factor for each relative position, and the memory of it.
//
// Targets are the rows that a pass computes and sources what they sum over: queries over keys, or, for the gradients of
// keys and values, keys over queries with both in reverse order. Then the offset j - i of a pair is always the place of
// the source less that of the target, and causal always means that it is not above 0. In reverse order the places before
// the first token fill a segment or chunk, so that those are cut from the start of a sequence whatever is behind its end.
#pragma once
#include "products.h"
#include "rows.h"
#include "sequences.h"
#include "toeplitz.h"

namespace longattn::LONGATTN_ISA {

enum class Pass { forward, queries, keys };

constexpr int64_t band = 64;                   // tokens in a chunk
constexpr int64_t segment_chunks = 8;          // chunks of targets whose sums a worker keeps at a time
constexpr int64_t segment_tokens = band * segment_chunks;
// work is cut into at least so many tasks where the sequences allow it, whatever the number of threads
constexpr int64_t least_tasks = 16;

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// one head of one sequence
struct Band {
  int64_t targets, sources;  // places: tokens, and `lead` targets and fewer than a chunk of sources that are none
  int64_t lead;
  int64_t shift;             // offset of the pair of the first source with the first target
  int64_t reach;
  bool causal;

  int64_t first_chunk() const { return lead / band; }
  int64_t target_chunks() const { return (targets + band - 1) / band; }
  int64_t source_chunks() const { return (sources + band - 1) / band; }
  int64_t segments() const { return (targets + segment_tokens - 1) / segment_tokens; }
  int64_t clamp(int64_t chunk) const { return std::clamp<int64_t>(chunk, 0, source_chunks()); }
  // chunks of sources before it lie at least `reach` before every target of the chunk
  int64_t old_end(int64_t chunk) const { return clamp(floor_div(chunk * band - reach - shift - band + 1, band) + 1); }
  // chunks from it on lie at least `reach` after every target, or are hidden from all of them
  int64_t new_begin(int64_t chunk) const {
    int64_t least = causal ? 1 : reach;
    return clamp(floor_div(chunk * band + band - 1 + least - shift + band - 1, band));
  }
  // where the states of a segment start: sources before this chunk, and from this chunk on, belong to earlier and later
  // segments
  int64_t old_start(int64_t segment) const { return segment ? old_end(segment * segment_chunks) : 0; }
  int64_t new_start(int64_t segment) const {
    return segment < segments() ? new_begin(segment * segment_chunks) : source_chunks();
  }
  bool has_old() const { return target_chunks() > first_chunk() && old_end(target_chunks() - 1) > 0; }
  bool has_new() const { return !causal && target_chunks() > first_chunk() && new_begin(first_chunk()) < source_chunks(); }
};

// the sum over sources of b1 b2^T, [M][E], with the sum of b1; in the backward of b2 b1^T, [E + 1][M]
template <class T>
struct Sums {
  Matrix<T> matrix;
  T* vector = nullptr;  // [M], in the forward
  int64_t elements = 0;

  void take(Arena<T>& arena, int64_t rows, int64_t columns, int64_t features) {
    int64_t before = arena.bytes;
    matrix = arena.take(rows, padded<T>(columns));
    if (features) vector = arena.take(1, padded<T>(features)).p;
    elements = (arena.bytes - before) / static_cast<int64_t>(sizeof(T));
  }
  T* begin() const { return matrix.p; }
  void clear() const { std::fill_n(begin(), elements, T(0)); }
  void set(const T* from) const { std::copy_n(from, elements, begin()); }
  void add(const T* from) const {
    T* to = begin();
    for (int64_t i = 0; i < elements; ++i) to[i] += from[i];
  }
  void set_sum(const Sums& a, const Sums& b) const {
    T* to = begin();
    for (int64_t i = 0; i < elements; ++i) to[i] = a.begin()[i] + b.begin()[i];
  }
};

template <class T, Pass pass>
struct ToeplitzScratch {
  static constexpr bool backward = pass != Pass::forward;
  // of a segment: targets, their second factors, what they sum to, and that with a second factor
  Matrix<T> a1, a2, y1, y2, z;
  bool *poisoned, *padded_target;
  // of a chunk of sources
  Matrix<T> b1, b1_transposed, b2, b2_transposed;
  bool bad[band];
  bool any_bad;
  // of a tile
  Matrix<T> s, g, far;
  T *factors, *diagonals;
  Sums<T> base, local, current;
  Matrix<T> current_transposed;
  int64_t bytes;

  ToeplitzScratch(char* memory, int64_t M, int64_t E) {
    Arena<T> arena{memory};
    int64_t wide = padded<T>(E + 1), features = padded<T>(M), widest = std::max(wide, features);
    a1 = arena.take(segment_tokens, features), b1 = arena.take(band, features);
    b1_transposed = arena.take(features, band), b2 = arena.take(band, wide);
    y1 = arena.take(segment_tokens, widest), s = arena.take(band, band), far = arena.take(band, widest);
    if constexpr (backward) {
      a2 = arena.take(segment_tokens, wide), b2_transposed = arena.take(wide, band), g = arena.take(band, band);
      diagonals = arena.take(1, 2 * band + width<T>).p;
      if (pass == Pass::keys) y2 = arena.take(segment_tokens, wide), current_transposed = arena.take(features, wide);
    } else {
      z = arena.take(segment_tokens, width<T>);
    }
    poisoned = reinterpret_cast<bool*>(arena.take(1, segment_tokens).p);
    padded_target = reinterpret_cast<bool*>(arena.take(1, segment_tokens).p);
    factors = arena.take(1, 2 * band + width<T>).p;
    for (Sums<T>* sums : {&base, &local, &current}) take_sums(*sums, arena, M, E);
    bytes = arena.bytes;
  }
  static void take_sums(Sums<T>& sums, Arena<T>& arena, int64_t M, int64_t E) {
    // rows in whole squares, as transposes read them
    if constexpr (backward) sums.take(arena, padded<T>(E + 1), M, 0);
    else sums.take(arena, M, E, M);
  }
};

}  // namespace longattn::LONGATTN_ISA
