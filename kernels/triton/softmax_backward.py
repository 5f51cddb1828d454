"""Tile attention backward: one kernel for both owners. With a (q or k) and c (dO or v) of the own and of the other side

    s = a a'^T,  dP = c c'^T,  p = exp(s - lse),  ds = p (drop dP - delta),  da = ds a',  dv = (drop p) c'  (keys only)

A tile has one owner, which walks the tiles it meets, round after round: no atomics, and a fixed order of every sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .softmax_tiles import (
    BAD_FLAG,
    DEAD_FLAG,
    STAINED_FLAG,
    allowed,
    biased,
    dropout_head,
    drops,
    exact_rows,
    reach,
    rows,
    seat,
    tokens,
)
from .tiles import operand, product, span, store


@triton.jit(do_not_specialize=["N"])
def delta_kernel(out, grad, gb, gh, gl, gd, delta, flags, heads, N, E: tl.constexpr, BE: tl.constexpr, C: tl.constexpr):
    """delta_i = sum_e out dO and the flags of dO, [B, heads, N]."""
    pid = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(N, C)
    row = pid // chunks
    token = pid % chunks * C + tl.arange(0, C)
    inside = token < N
    cols = tl.arange(0, BE)
    d = exact_rows(grad, row // heads * gb + row % heads * gh, gl, gd, token, inside, cols, E)
    o = exact_rows(out, row * N * E, E, 1, token, inside, cols, E)
    total = tl.sum(d * o, 1)
    flag = tl.where(total - total == 0.0, 0, STAINED_FLAG)
    bad = tl.max(tl.where(d - d == 0.0, 0, 1), 1) != 0
    tl.store(delta + row * N + token, tl.where(bad, float("nan"), total), mask=inside)
    tl.store(flags + row * N + token, tl.where(bad, BAD_FLAG, flag).to(tl.uint8), mask=inside)


@triton.jit
def log_sum(ptr, at, inside):
    """lse of queries; +inf, whose weights are 0, where there is no query or it has no key."""
    lse = tl.load(ptr + at, mask=inside, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def weigh(some, held, held_y, a, b, at, i, live, y_live, known, own, begin, end, order, tables, r, r_b, L, S, limits, bias, bad,
          scale, head, threshold, gain, D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
          BN: tl.constexpr, QUERIES: tl.constexpr, MASKED: tl.constexpr, IDENTITY: tl.constexpr, SCALED: tl.constexpr,
          CAUSAL: tl.constexpr, NEAR: tl.constexpr, SELF: tl.constexpr, BEFORE: tl.constexpr, BUCKETS: tl.constexpr,
          BIAS: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, EMULATE: tl.constexpr):
    """Weights and ds of a tile of the own side a and the rows of the other side b at places [begin, begin + BN) before end.

    own: lse and delta, or the factor of the scores of each key. known: own rows that are there.
    -> the rows' positions, which of them and of their y are sound and which y are not, factors of the keys, some, w, ds
    """
    PARTS: tl.constexpr = (D + BD - 1) // BD
    BLOCKS: tl.constexpr = (E + BE - 1) // BE
    x_at, y_at, bx_at, by_at, b_row = at
    places = begin + tl.arange(0, BN)
    inside = places < end
    j = tokens(order, places, inside, IDENTITY)
    flag = tl.load(b.flags + b_row + j, mask=inside, other=DEAD_FLAG)
    b_live = flag == 0
    b_bad = tl.load(b.y_flags + b_row + j, mask=inside, other=0) == BAD_FLAG
    by_live = inside & (b_bad == 0)
    s = tl.zeros([i.shape[0], BN], tl.float32)
    for part in tl.static_range(PARTS):
        cols = part * BD + tl.arange(0, BD)
        if PARTS == 1:
            left = held
        else:
            left = rows(a.x, x_at, a.xl, a.xd, i, live, cols, D, DOT, EMULATE)
        s = product(left, tl.trans(rows(b.x, bx_at, b.xl, b.xd, j, b_live, cols, D, DOT, EMULATE)), s, DOT, EMULATE)
    column = tl.where(b_live, scale, 0.0)
    if QUERIES:
        if SCALED:
            column = column * tl.load(b.scale + b_row + j, mask=b_live, other=0.0)
        offset = tl.where(b_live, 0.0, tl.where(flag == BAD_FLAG, float("nan"), float("-inf")))
        s = s * column[None, :] + offset[None, :] - own[0][:, None]
        if BIAS:
            s = biased(s, i, j, bias, True)
        delta = own[1][:, None]
    else:
        lse = log_sum(b.scale, b_row + j, flag != DEAD_FLAG)
        s = s * own[0][:, None] - lse[None, :]
        if BIAS:
            s = biased(s, j, i, bias, False)
        delta = tl.load(b.delta + b_row + j, mask=inside, other=0.0)[None, :]
    p = tl.exp(s)
    if MASKED:
        seen = known[:, None] & (flag != DEAD_FLAG)[None, :]
        ok = allowed(i if QUERIES else j, j if QUERIES else i, seen, tables, L, S, r if QUERIES else r_b,
                     r_b if QUERIES else r, limits, QUERIES, CAUSAL, NEAR, SELF, BEFORE, BUCKETS)
        p = tl.where(ok, p, 0.0)
        if QUERIES and SELF == 1:
            some = some | tl.max(ok.to(tl.int32), 1)
    dp = tl.zeros([i.shape[0], BN], tl.float32)
    for block in tl.static_range(BLOCKS):
        cols = block * BE + tl.arange(0, BE)
        if BLOCKS == 1:
            left = held_y
        else:
            left = rows(a.y, y_at, a.yl, a.yd, i, y_live, cols, E, DOT, EMULATE)
        dp = product(left, tl.trans(rows(b.y, by_at, b.yl, b.yd, j, by_live, cols, E, DOT, EMULATE)), dp, DOT, EMULATE)
    w = p
    if DROPOUT:
        if QUERIES:
            kept = drops(i[:, None], j[None, :], head, threshold, gain)
        else:
            kept = drops(j[None, :], i[:, None], head, threshold, gain)
        w = p * kept
        dp = dp * kept
    ds = p * (dp - delta)
    if bad != 0:
        ds = tl.where(p == 0.0, 0.0, ds)
    return j, b_live, by_live, b_bad, column, some, w, ds


@triton.jit
def _meet(x_sum, y_sum, ends, some, held, held_y, a, b, at, i, live, y_live, known, own, begin, end, order, tables, r, r_b, L,
          S, limits, bias, bad, scale, head, threshold, gain, D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr,
          BE: tl.constexpr, BN: tl.constexpr, QUERIES: tl.constexpr, MASKED: tl.constexpr, IDENTITY: tl.constexpr,
          SCALED: tl.constexpr, CAUSAL: tl.constexpr, NEAR: tl.constexpr, SELF: tl.constexpr, BEFORE: tl.constexpr,
          BUCKETS: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, EMULATE: tl.constexpr):
    """Adds what a tile of the own side gets from those rows."""
    PARTS: tl.constexpr = (D + BD - 1) // BD
    BLOCKS: tl.constexpr = (E + BE - 1) // BE
    _x_at, _y_at, bx_at, by_at, _b_row = at
    j, b_live, by_live, b_bad, column, some, w, ds = weigh(
        some, held, held_y, a, b, at, i, live, y_live, known, own, begin, end, order, tables, r, r_b, L, S, limits, bias, bad,
        scale, head, threshold, gain, D, BD, E, BE, BN, QUERIES, MASKED, IDENTITY, SCALED, CAUSAL, NEAR, SELF, BEFORE, BUCKETS,
        BIAS, DROPOUT, DOT, EMULATE)
    if QUERIES and BIAS:
        t = j[None, :] - i[:, None]
        ends = (ends[0] + tl.sum(tl.where(t <= -bias[1], ds, 0.0), 1),
                ends[1] + tl.sum(tl.where(t >= tl.maximum(bias[1], 1), ds, 0.0), 1))
    if not QUERIES:
        if bad != 0:
            w = tl.where((w != 0.0) & b_bad[None, :], float("nan"), w)
        w = operand(w, DOT, EMULATE)
        summed = ()
        for block in tl.static_range(BLOCKS):
            right = rows(b.y, by_at, b.yl, b.yd, j, by_live, block * BE + tl.arange(0, BE), E, DOT, EMULATE)
            summed = summed + (product(w, right, y_sum[block], DOT, EMULATE),)
        y_sum = summed
    elif SCALED:
        ds = ds * column[None, :]
    ds = operand(ds, DOT, EMULATE)
    moved = ()
    for part in tl.static_range(PARTS):
        right = rows(b.x, bx_at, b.xl, b.xd, j, b_live, part * BD + tl.arange(0, BD), D, DOT, EMULATE)
        moved = moved + (product(ds, right, x_sum[part], DOT, EMULATE),)
    return moved, y_sum, ends, some


@triton.jit(do_not_specialize=["slots", "tiles", "b_slots", "sequences", "r", "R", "begun", "look_back", "look_ahead", "window",
                               "scale", "seed_low", "seed_high", "threshold", "gain", "table_row", "furthest"])
def gradient_kernel(a, b, cu, bad, table, table_row, furthest, far, seen, entries, bounds, x_sum, y_sum, dx, dy, slots, tiles,
                    b_slots, sequences, chunk, r, R, begun, look_back, look_ahead, window, scale, seed_low, seed_high, threshold, gain,
                    D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                    QUERIES: tl.constexpr, IDENTITY: tl.constexpr, CENTRED: tl.constexpr, PACKED: tl.constexpr,
                    SCALED: tl.constexpr, CAUSAL: tl.constexpr, NEAR: tl.constexpr, SELF: tl.constexpr, BEFORE: tl.constexpr,
                    BUCKETS: tl.constexpr, WRAP: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
                    LAST: tl.constexpr, FINAL: tl.constexpr, DOT: tl.constexpr, EMULATE: tl.constexpr):
    """Round r of dq (QUERIES; a is q, dO) or of dk and dv (a is k, v), [B, heads, N, dim].

    x_sum, y_sum: what came before (if begun, dv: if r > 0), and what comes out unless FINAL (dv: LAST), which is dx, dy. LAST is
    the last round: it adds the pairs (i, i) that the tiles leave out. seen: whether a query has another key. Of separate
    keys, entries are the chunks of queries ordered by the key chunk they are centred on, bounds where each begins.
    SCALED, dx is the gradient of rows whose unit vectors are the keys. BIAS: table [Hq, 2 furthest + 1], rows table_row apart;
    of QUERIES, far [B, Hq, L, 2] are sums of ds over offsets of -furthest and below, and of furthest (but 0) and above.
    """
    PARTS: tl.constexpr = (D + BD - 1) // BD
    BLOCKS: tl.constexpr = (E + BE - 1) // BE
    PLAIN: tl.constexpr = IDENTITY and SELF == 0 and not BUCKETS and not NEAR
    limits = (look_back, look_ahead, window)
    pid = tl.program_id(0).to(tl.int64)
    tile = pid % (slots * tiles)
    if QUERIES:
        tile = slots * tiles - 1 - tile
    row = pid // (slots * tiles)
    slot = tile // tiles
    start, end, first, last, base = seat(cu, slot, a.length, sequences, chunk, PACKED)
    begin = start + tile % tiles * BM
    end = tl.minimum(end, begin + BM)
    if begin >= end:
        return
    if not PACKED:
        last = first + b.length

    batch = row // a.heads
    x_at = batch * a.xb + row % a.heads * a.xh
    y_at = batch * a.yb + row % a.heads * a.yh
    a_row = row * a.length
    a_table = row * R * a.length
    places = begin.to(tl.int32) + tl.arange(0, BM)
    inside = places < end
    i = tokens(a.order + a_table + r * a.length, places, inside, IDENTITY)
    flag = tl.load(a.flags + a_row + i, mask=inside, other=DEAD_FLAG)
    y_flag = tl.load(a.y_flags + a_row + i, mask=inside, other=DEAD_FLAG)
    live = flag == 0
    known = flag != DEAD_FLAG
    y_live = (y_flag == 0) | (y_flag == STAINED_FLAG)
    u = (start - first) // chunk
    groups = 1 if QUERIES else b.heads // a.heads
    spoiled = tl.load(bad)
    if QUERIES:
        L = a.length
        S = b.length
        if CENTRED:
            opens = tl.load(a.order + a_table + r * L + begin)
            u = tl.load(a.rank + a_table + r * L + opens).to(tl.int64)
        own = (log_sum(a.scale, a_row + i, known), tl.load(a.delta + a_row + i, mask=inside, other=0.0))
    else:
        L = b.length
        S = a.length
        column = tl.where(live, scale, tl.where(flag == BAD_FLAG, float("nan"), 0.0))
        if SCALED:
            column = column * tl.load(a.scale + a_row + i, mask=live, other=1.0)
        own = (column,)

    x_part = ()
    for _ in tl.static_range(PARTS):
        x_part = x_part + (tl.zeros([BM, BD], tl.float32),)
    y_part = ()
    if not QUERIES:
        for _ in tl.static_range(BLOCKS):
            y_part = y_part + (tl.zeros([BM, BE], tl.float32),)
    ends = ()
    if QUERIES and BIAS:
        ends = (tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32))
    some = tl.zeros([BM], tl.int32)
    bias = (table, furthest)
    held = 0
    held_y = 0
    if PARTS == 1:
        held = rows(a.x, x_at, a.xl, a.xd, i, live, tl.arange(0, BD), D, DOT, EMULATE)
    if BLOCKS == 1:
        held_y = rows(a.y, y_at, a.yl, a.yd, i, y_live, tl.arange(0, BE), E, DOT, EMULATE)

    for turn in range(groups * (look_back + look_ahead + 1) if WRAP else groups):
        if QUERIES:
            b_head = row % a.heads // (a.heads // b.heads)
        else:
            b_head = row % a.heads * groups + turn % groups
        b_line = batch * b.heads + b_head
        b_row = b_line * b.length
        b_table = b_row * R
        at = (x_at, y_at, batch * b.xb + b_head * b.xh, batch * b.yb + b_head * b.yh, b_row)
        if QUERIES:
            tables = (a.rank + a_table, b.rank + b_table, a.bucket + a_table, b.bucket + b_table)
            head = dropout_head(seed_low, seed_high, row)
        else:
            tables = (b.rank + b_table, a.rank + a_table, b.bucket + b_table, a.bucket + a_table)
            head = dropout_head(seed_low, seed_high, b_line)
        if BIAS:
            bias = (table + (row % a.heads if QUERIES else b_head) * table_row + furthest, furthest)
        r_b, low, high = reach(turn // groups, r, u, first, last, begin, end, b_slots if QUERIES else slots, R, chunk,
                               look_back, look_ahead, QUERIES, WRAP, PLAIN and CAUSAL)
        entry = row * 0
        stop = entry + 1
        if CENTRED and not QUERIES:
            # the centres from which a window holds this chunk, as slots of keys
            least = slot + r * slots - look_ahead
            most = slot + r * slots + look_back
            if WRAP:
                least = r_b * slots + low // chunk
                most = least
            else:
                least = tl.maximum(least, base + r * slots)
                most = tl.minimum(most, base + r * slots + tl.cdiv(last - first if PACKED else S, chunk) - 1)
            entry = tl.load(bounds + b_line * (R * slots + 1) + least)
            stop = tl.load(bounds + b_line * (R * slots + 1) + most + 1)
        for e in range(entry, stop):
            if CENTRED and not QUERIES:
                met = tl.load(entries + b_line * R * b_slots + e)
                r_b = (met // b_slots).to(tl.int32)
                low, high, _sequence = span(cu, met % b_slots, L, sequences, chunk, PACKED)
            order = b.order + b_table + r_b * b.length
            middle = low
            if PLAIN:
                # whole tiles of keys before the first query, or of queries after the last key, need no look at positions
                if CAUSAL and QUERIES:
                    middle = low + tl.maximum(tl.minimum(begin + 1, high) - low, 0) // BN * BN
                elif CAUSAL:
                    middle = tl.minimum(low + tl.cdiv(tl.maximum(end - 1 - low, 0), BN) * BN, tl.maximum(high, low))
                elif QUERIES:
                    middle = high
            if PLAIN and (QUERIES or CAUSAL):
                for place in range(low.to(tl.int32), middle.to(tl.int32), BN):
                    x_part, y_part, ends, some = _meet(
                        x_part, y_part, ends, some, held, held_y, a, b, at, i, live, y_live, known, own, place, high, order, tables,
                        r, r_b, L, S, limits, bias, spoiled, scale, head, threshold, gain, D, BD, E, BE, BN, QUERIES,
                        not QUERIES, IDENTITY, SCALED, CAUSAL, NEAR, SELF, BEFORE, BUCKETS, BIAS, DROPOUT, DOT,
                        EMULATE)
            if CAUSAL or not PLAIN or not QUERIES:
                for place in range(middle.to(tl.int32), high.to(tl.int32), BN):
                    x_part, y_part, ends, some = _meet(
                        x_part, y_part, ends, some, held, held_y, a, b, at, i, live, y_live, known, own, place, high, order, tables,
                        r, r_b, L, S, limits, bias, spoiled, scale, head, threshold, gain, D, BD, E, BE, BN, QUERIES,
                        not PLAIN or QUERIES, IDENTITY, SCALED, CAUSAL, NEAR, SELF, BEFORE, BUCKETS, BIAS, DROPOUT, DOT,
                        EMULATE)

    if QUERIES and BIAS:
        tl.store(far + (a_row + i) * 2, tl.where(known, ends[0], 0.0), mask=inside)
        tl.store(far + (a_row + i) * 2 + 1, tl.where(known, ends[1], 0.0), mask=inside)
    if QUERIES and SELF == 1:
        known = places < tl.where(r > 0, end, begin)
        some = some | tl.load(seen + a_row + i, mask=known, other=0).to(tl.int32)
        tl.store(seen + a_row + i, some.to(tl.uint8), mask=inside)
    _finish(x_part, y_part, a, b, x_sum, y_sum, dx, dy, seen, i, inside, flag, row, batch, L, groups, r, begun, scale, seed_low,
            seed_high, threshold, gain, D, BD, E, BE, QUERIES, SCALED, SELF, DROPOUT, LAST, FINAL, EMULATE)


@triton.jit
def _itself(q, k, batch, q_head, k_head, i, known, seen, scale, low, high, threshold, gain, D: tl.constexpr,
            BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, SCALED: tl.constexpr, SELF: tl.constexpr,
            DROPOUT: tl.constexpr):
    """The pairs (i, i) the tiles leave out -> ds, scaled, and drop p of each."""
    line = batch * q.heads + q_head
    weight = tl.zeros([i.shape[0]], tl.float32) + 1.0
    if DROPOUT:
        weight = drops(i, i, dropout_head(low, high, line), threshold, gain)
    if SELF == 1:
        # the only key has the weight 1 whatever its score
        other = tl.load(seen + line * q.length + i, mask=known, other=1)
        ds = tl.zeros([i.shape[0]], tl.float32)
        weight = tl.where(other == 0, weight, 0.0)
    else:
        s = tl.zeros([i.shape[0]], tl.float32)
        dp = tl.zeros([i.shape[0]], tl.float32)
        for part in tl.static_range((D + BD - 1) // BD):
            cols = part * BD + tl.arange(0, BD)
            s += tl.sum(exact_rows(q.x, batch * q.xb + q_head * q.xh, q.xl, q.xd, i, known, cols, D)
                        * exact_rows(k.x, batch * k.xb + k_head * k.xh, k.xl, k.xd, i, known, cols, D), 1)
        for block in tl.static_range((E + BE - 1) // BE):
            cols = block * BE + tl.arange(0, BE)
            dp += tl.sum(exact_rows(q.y, batch * q.yb + q_head * q.yh, q.yl, q.yd, i, known, cols, E)
                         * exact_rows(k.y, batch * k.yb + k_head * k.yh, k.yl, k.yd, i, known, cols, E), 1)
        s = s * scale
        if SCALED:
            s = s * tl.load(k.scale + (batch * k.heads + k_head) * k.length + i, mask=known, other=0.0)
        p = tl.where(known, tl.exp(s - log_sum(q.scale, line * q.length + i, known)), 0.0)
        ds = p * (weight * dp - tl.load(q.delta + line * q.length + i, mask=known, other=0.0)) * scale
        ds = tl.where(p == 0.0, 0.0, ds)
        weight = weight * p
    return ds, weight


@triton.jit
def _finish(x_part, y_part, a, b, x_sum, y_sum, dx, dy, seen, i, inside, flag, row, batch, L, groups, r, begun, scale, low,
            high, threshold, gain, D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
            QUERIES: tl.constexpr, SCALED: tl.constexpr, SELF: tl.constexpr, DROPOUT: tl.constexpr, LAST: tl.constexpr,
            FINAL: tl.constexpr, EMULATE: tl.constexpr):
    """Adds the pairs (i, i) and what came before, and stores."""
    PARTS: tl.constexpr = (D + BD - 1) // BD
    BLOCKS: tl.constexpr = (E + BE - 1) // BE
    known = inside & (flag != DEAD_FLAG)
    unit = tl.zeros([i.shape[0]], tl.float32) + 1.0
    if SCALED:
        # the mask keeps the scale of a bad row, NaN itself, from a gradient that is 0
        keys = b.scale if QUERIES else a.scale
        unit = tl.load(keys + row * a.length + i, mask=inside & (flag == 0), other=0.0)
    moved = ()
    for part in tl.static_range(PARTS):
        x = x_part[part]
        if not (QUERIES and SCALED):
            x = x * scale
        moved = moved + (tl.where(known[:, None], x, 0.0),)
    summed = ()
    if not QUERIES:
        for block in tl.static_range(BLOCKS):
            summed = summed + (tl.where(known[:, None], y_part[block], 0.0),)
    if LAST and SELF != 0:
        for g in range(groups):
            if QUERIES:
                b_head = row % a.heads // (a.heads // b.heads)
                key = known & (i < b.length)
                key = key & (tl.load(b.flags + (batch * b.heads + b_head) * b.length + i, mask=key, other=DEAD_FLAG)
                             != DEAD_FLAG)
                ds, weight = _itself(a, b, batch, row % a.heads, b_head, i, key, seen, scale, low, high, threshold, gain, D, BD,
                                     E, BE, SCALED, SELF, DROPOUT)
                ds = ds * unit
            else:
                b_head = row % a.heads * groups + g
                key = known & (i < L)
                ds, weight = _itself(b, a, batch, b_head, row % a.heads, i, key, seen, scale, low, high, threshold, gain, D, BD,
                                     E, BE, SCALED, SELF, DROPOUT)
                added = ()
                for block in tl.static_range(BLOCKS):
                    c = exact_rows(b.y, batch * b.yb + b_head * b.yh, b.yl, b.yd, i, key & (weight != 0.0),
                                   block * BE + tl.arange(0, BE), E)
                    added = added + (summed[block] + weight[:, None] * c,)
                summed = added
            if SELF == 2:
                extra = ()
                for part in tl.static_range(PARTS):
                    c = exact_rows(b.x, batch * b.xb + b_head * b.xh, b.xl, b.xd, i, key & (ds != 0.0),
                                   part * BD + tl.arange(0, BD), D)
                    extra = extra + (moved[part] + ds[:, None] * c,)
                moved = extra
    at = (row * a.length + i).to(tl.int64)
    x_at = batch * a.xb + row % a.heads * a.xh
    if SCALED and not QUERIES:
        along = tl.zeros([i.shape[0]], tl.float32)
        for part in tl.static_range(PARTS):
            own = exact_rows(a.x, x_at, a.xl, a.xd, i, flag == 0, part * BD + tl.arange(0, BD), D)
            along += tl.sum(moved[part] * own * unit[:, None], 1)
    for part in tl.static_range(PARTS):
        cols = part * BD + tl.arange(0, BD)
        fits = inside[:, None] & (cols < D)[None, :]
        x = moved[part]
        if SCALED and not QUERIES:
            own = exact_rows(a.x, x_at, a.xl, a.xd, i, flag == 0, cols, D)
            x = unit[:, None] * (x - along[:, None] * unit[:, None] * own)
        here = at[:, None] * D + cols[None, :]
        x += tl.load(x_sum + here, mask=inside[:, None] & (cols < tl.where(begun != 0, D, 0))[None, :], other=0.0)
        if FINAL:
            store(dx + here, x, fits, EMULATE)
        else:
            tl.store(x_sum + here, x, mask=fits)
    if not QUERIES:
        for block in tl.static_range(BLOCKS):
            cols = block * BE + tl.arange(0, BE)
            fits = inside[:, None] & (cols < E)[None, :]
            here = at[:, None] * E + cols[None, :]
            before = inside[:, None] & (cols < tl.where(r > 0, E, 0))[None, :]
            y = summed[block] + tl.load(y_sum + here, mask=before, other=0.0)
            if LAST:
                store(dy + here, y, fits, EMULATE)
            else:
                tl.store(y_sum + here, y, mask=fits)
