// Sequences, packed or not, and the segments they are cut into: which tokens a task works on.
#pragma once
#include <algorithm>

#include "common/view.h"
#include "parallel.h"

namespace longattn::LONGATTN_ISA {

struct Sequence {
  int64_t n, b, start, length;
};
struct Slot {
  Sequence sequence;
  int64_t index, first, rows;  // rows == 0: not in use
};

struct Sequences {
  View cu_seqlens;
  int64_t N, segment;  // sequences, tokens in a segment

  int64_t boundary(int64_t n) const { return cu_seqlens.as<int32_t>()[n * cu_seqlens.stride[0]]; }
  Sequence sequence(int64_t n, int64_t length) const {
    if (!cu_seqlens) return {n, n, 0, length};
    return {n, 0, boundary(n), boundary(n + 1) - boundary(n)};
  }
  int64_t slots(int64_t length) const {
    return cu_seqlens ? length / segment + N : (length + segment - 1) / segment;
  }
  int64_t segments(const Sequence& s) const { return (s.length + segment - 1) / segment; }
  int64_t first_slot(const Sequence& s) const { return cu_seqlens ? s.start / segment + s.n : 0; }
  Slot slot(const Sequence& s, int64_t number) const {
    int64_t offset = number * segment, rows = std::clamp<int64_t>(s.length - offset, 0, segment);
    return {s, first_slot(s) + number, s.start + offset, rows};
  }
  // the slot at (b, index): the last sequence that starts at or before it
  Slot slot_at(int64_t b, int64_t index, int64_t length) const {
    if (!cu_seqlens) return slot(sequence(b, length), index);
    int64_t low = 0, high = N;
    while (high - low > 1) {
      int64_t middle = (low + high) / 2;
      (first_slot(sequence(middle, length)) <= index ? low : high) = middle;
    }
    Sequence s = sequence(low, length);
    return slot(s, index - first_slot(s));
  }
  void check(int64_t B, int64_t L, int64_t S) const {
    expect(cu_seqlens.rank == 1 && cu_seqlens.dtype == DType::i32 && N >= 1, "cu_seqlens must be int32 [N+1]");
    expect(B == 1 && L == S, "packed sequences need batch size 1 and L == S");
    bool ok = boundary(0) == 0 && boundary(N) == L;
    for (int64_t n = 0; n < N; ++n) ok = ok && boundary(n) <= boundary(n + 1);
    if (!ok)
      throw std::invalid_argument("longattn: cu_seqlens must start at 0, never decrease and end at the length " +
                                  std::to_string(L) + ", got " + std::to_string(boundary(0)) + " .. " +
                                  std::to_string(boundary(N)));
  }
};

}  // namespace longattn::LONGATTN_ISA
