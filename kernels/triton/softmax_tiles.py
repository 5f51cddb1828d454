"""What forward and backward of tile attention share: where a tile's rows lie, which pairs count, dropout, bad rows.

Flags are a byte a row: DEAD rows are padding, BAD ones hold NaN or infinity. Bad rows are loaded as zeros, for
0 NaN in a product would spoil rows that may not see them; what may is made NaN by hand.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tiles import operand, span

DEAD, BAD, STAINED = 1, 2, 3
LIVE_FLAG = tl.constexpr(0)
DEAD_FLAG = tl.constexpr(DEAD)
BAD_FLAG = tl.constexpr(BAD)
STAINED_FLAG = tl.constexpr(STAINED)


class Side(NamedTuple):
    """Queries or keys as a kernel takes them: x and y are [B, heads, N, dim] with strides, q and grad_out or k and v.

    flags of x, flags of y: [B, heads, N] bytes; scale: key_scale or lse, [B, heads, N]; delta: [B, heads, N], queries only;
    order, rank, bucket: [B, heads, R, N]. Where one is absent, any pointer stands for it.
    """

    x: Any
    xb: Any
    xh: Any
    xl: Any
    xd: Any
    y: Any
    yb: Any
    yh: Any
    yl: Any
    yd: Any
    flags: Any
    y_flags: Any
    scale: Any
    delta: Any
    order: Any
    rank: Any
    bucket: Any
    heads: Any
    length: Any


@triton.jit
def seat(cu, slot, L, sequences, chunk, PACKED: tl.constexpr):
    """A chunk slot's places [start, end), and the places [first, last) and the first slot of its sequence."""
    start, end, sequence = span(cu, slot, L, sequences, chunk, PACKED)
    first = slot * 0
    last = first + L
    base = first
    if PACKED:
        first = tl.load(cu + sequence).to(tl.int64)
        last = tl.load(cu + sequence + 1).to(tl.int64)
        base = first // chunk + sequence
    return start, end, first, last, base


@triton.jit
def tokens(order, places, inside, IDENTITY: tl.constexpr):
    """Positions of places; 0, which is safe to look up, outside."""
    if IDENTITY:
        found = tl.where(inside, places, 0)
    else:
        found = tl.load(order + places, mask=inside, other=0)
    return found


@triton.jit
def reach(step, r, u, first, last, begin, end, slots, R, chunk, look_back, look_ahead, QUERIES: tl.constexpr,
          WRAP: tl.constexpr, CLIP: tl.constexpr):
    """The round and places [low, high) that chunk u of round r meets, its own rows being [begin, end).

    With WRAP in that step of its window, over one cycle of the chunks of all rounds. Not QUERIES: keys with u(t) = t. CLIP:
    places are positions, and what comes after a query is left out.
    """
    r_other = r * 1
    if WRAP:
        shift = step - look_back if QUERIES else look_back - step
        cycle = R * slots
        target = ((r * slots + u + shift) % cycle + cycle) % cycle
        r_other = (target // slots).to(tl.int32)
        low = target % slots * chunk
        high = tl.minimum(low + chunk, last)
    else:
        before = look_back if QUERIES else look_ahead
        after = look_ahead if QUERIES else look_back
        low = first + tl.maximum(u - before, 0) * chunk
        high = tl.minimum(first + (u + after + 1) * chunk, last)
        if CLIP:
            if QUERIES:
                high = tl.minimum(high, end)
            else:
                low = tl.maximum(low, begin)
    return r_other, low, high


@triton.jit
def rows(x, at, l, d, tokens, live, cols, WIDTH: tl.constexpr, DOT: tl.constexpr, EMULATE: tl.constexpr):  # noqa: E741
    """[rows, cols] of one head as tl.dot multiplies them; 0 where a row is not live or a column beyond the width."""
    mask = live[:, None]
    if tl.constexpr(WIDTH) % cols.shape[0] != 0:
        mask = mask & (cols < WIDTH)[None, :]
    raw = tl.load(x + at + tokens.to(tl.int64)[:, None] * l + cols.to(tl.int64)[None, :] * d, mask=mask, other=0.0)
    if DOT != "bf16" or EMULATE:
        raw = operand(raw.to(tl.float32), DOT, EMULATE)
    return raw


@triton.jit
def exact_rows(x, at, l, d, tokens, live, cols, WIDTH: tl.constexpr):  # noqa: E741
    """The same in float32, unrounded."""
    mask = live[:, None] & (cols < WIDTH)[None, :]
    raw = tl.load(x + at + tokens.to(tl.int64)[:, None] * l + cols.to(tl.int64)[None, :] * d, mask=mask, other=0.0)
    return raw.to(tl.float32)


@triton.jit
def across(q, k, QUERIES: tl.constexpr):
    """A vector of queries and one of keys, broadcast to the tile of an owner: QUERIES, or keys."""
    if QUERIES:
        query = q[:, None]
        key = k[None, :]
    else:
        query = q[None, :]
        key = k[:, None]
    return query, key


@triton.jit
def biased(s, i, j, bias, QUERIES: tl.constexpr):
    """Adds to the scores of queries i and keys j what belongs to their offset; -inf hides a pair whatever its score.

    bias: where the offset 0 stands, and the furthest offset.
    """
    middle, furthest = bias
    query, key = across(i, j, QUERIES)
    added = tl.load(middle + tl.minimum(tl.maximum(key - query, -furthest), furthest))
    return tl.where(added == float("-inf"), float("-inf"), s + added)


@triton.jit
def allowed(i, j, seen, tables, L, S, r, r_k, limits, QUERIES: tl.constexpr, CAUSAL: tl.constexpr, NEAR: tl.constexpr,
            SELF: tl.constexpr, BEFORE: tl.constexpr, BUCKETS: tl.constexpr):
    """Which pairs of queries i and keys j count, of those that are `seen`. limits: look_back, look_ahead, window."""
    q_rank, k_rank, q_bucket, k_bucket = tables
    look_back, look_ahead, window = limits
    ok = seen
    query, key = across(i, j, QUERIES)
    if CAUSAL:
        ok = ok & (key <= query)
    if NEAR:
        ok = ok & (key - query < window) & (query - key < window)
    if SELF != 0:
        ok = ok & (key != query)
    if BUCKETS:
        query, key = across(tl.load(q_bucket + r * L + i), tl.load(k_bucket + r_k * S + j), QUERIES)
        ok = ok & (query == key)
    for e in tl.static_range(BEFORE):
        query, key = across(tl.load(q_rank + e * L + i), tl.load(k_rank + e * S + j), QUERIES)
        ahead = key - query
        met = (ahead >= -look_back) & (ahead <= look_ahead)
        if BUCKETS:
            query, key = across(tl.load(q_bucket + e * L + i), tl.load(k_bucket + e * S + j), QUERIES)
            met = met & (query == key)
        ok = ok & ((met == 0) | (e >= r))
    return ok


@triton.jit
def mix(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def dropout_head(low, high, row):
    """What a head's pairs are hashed with; row counts (batch, query head)."""
    first = low.to(tl.uint32, bitcast=True) + (row + 1).to(tl.uint32) * 0x9E3779B9
    return mix(mix(first) ^ high.to(tl.uint32, bitcast=True))


@triton.jit
def drops(i, j, head, threshold, gain):
    """What the weights of pairs are multiplied by: 0 or 1 / (1 - p)."""
    row = mix(head ^ (i.to(tl.uint32, bitcast=True) * 0x85EBCA6B))
    drawn = mix(row + j.to(tl.uint32, bitcast=True) * 0xC2B2AE35)
    return tl.where(drawn < threshold.to(tl.uint32, bitcast=True), 0.0, gain)


@triton.jit(do_not_specialize=["N"])
def flags_kernel(x, xb, xh, xl, xd, mask, flags, heads, N, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr,
                 HAS_MASK: tl.constexpr):
    """flags [B, heads, N] of the rows of x."""
    pid = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(N, C)
    row = pid // chunks
    batch = row // heads
    token = pid % chunks * C + tl.arange(0, C)
    inside = token < N
    cols = tl.arange(0, BD)
    at = batch * xb + row % heads * xh
    size = exact_rows(x, at, xl, xd, token, inside, cols, D)
    bad = tl.max(tl.where(size - size == 0.0, 0, 1), 1)
    flag = tl.where(bad != 0, BAD_FLAG, LIVE_FLAG)
    if HAS_MASK:
        flag = tl.where(tl.load(mask + batch * N + token, mask=inside, other=0) != 0, DEAD_FLAG, flag)
    tl.store(flags + row * N + token, flag.to(tl.uint8), mask=inside)
