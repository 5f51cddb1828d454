"""Tile attention forward: one round of online softmax for a tile of queries, on top of the rounds before it."""

from __future__ import annotations

import triton
import triton.language as tl

from .softmax_tiles import (
    BAD_FLAG,
    DEAD_FLAG,
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
from .tiles import operand, product, store


@triton.jit
def _meet(acc, m, l, held, q, k, at, i, q_live, q_inside, begin, end, order, tables, r, r_k, limits,  # noqa: E741
          bias, bad, scale, head, threshold, gain, D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
          BN: tl.constexpr, MASKED: tl.constexpr, IDENTITY: tl.constexpr, SCALED: tl.constexpr, CAUSAL: tl.constexpr,
          NEAR: tl.constexpr, SELF: tl.constexpr, BEFORE: tl.constexpr, BUCKETS: tl.constexpr, BIAS: tl.constexpr,
          DROPOUT: tl.constexpr, DOT: tl.constexpr, EMULATE: tl.constexpr):
    """The queries of a tile meet the keys at places [begin, begin + BN) before end."""
    PARTS: tl.constexpr = (D + BD - 1) // BD
    BLOCKS: tl.constexpr = (E + BE - 1) // BE
    q_at, k_at, v_at, k_row = at
    places = begin + tl.arange(0, BN)
    inside = places < end
    j = tokens(order, places, inside, IDENTITY)
    flag = tl.load(k.flags + k_row + j, mask=inside, other=DEAD_FLAG)
    v_bad = tl.load(k.y_flags + k_row + j, mask=inside, other=0) == BAD_FLAG
    live = flag == 0
    s = tl.zeros([i.shape[0], BN], tl.float32)
    for part in tl.static_range(PARTS):
        cols = part * BD + tl.arange(0, BD)
        if PARTS == 1:
            a = held
        else:
            a = rows(q.x, q_at, q.xl, q.xd, i, q_live, cols, D, DOT, EMULATE)
        b = rows(k.x, k_at, k.xl, k.xd, j, live, cols, D, DOT, EMULATE)
        s = product(a, tl.trans(b), s, DOT, EMULATE)
    # padded keys are excluded and bad ones spoil whoever may see them, in the addition that scaling has anyway
    column = tl.where(live, scale, 0.0)
    if SCALED:
        column = column * tl.load(k.scale + k_row + j, mask=live, other=0.0)
    offset = tl.where(live, 0.0, tl.where(flag == BAD_FLAG, float("nan"), float("-inf")))
    s = s * column[None, :] + offset[None, :]
    if BIAS:
        s = biased(s, i, j, bias, True)
    if MASKED:
        seen = (flag != DEAD_FLAG)[None, :] & q_inside[:, None]
        ok = allowed(i, j, seen, tables, q.length, k.length, r, r_k, limits, True, CAUSAL, NEAR, SELF, BEFORE, BUCKETS)
        s = tl.where(ok, s, float("-inf"))
    top = tl.maximum(m, tl.max(s, 1))
    safe = tl.where(top == float("-inf"), 0.0, top)
    fade = tl.exp(m - safe)
    p = tl.exp(s - safe[:, None])
    l = l * fade + tl.sum(p, 1)  # noqa: E741
    if DROPOUT:
        p = p * drops(i[:, None], j[None, :], head, threshold, gain)
    if bad != 0:
        p = tl.where((p != 0.0) & v_bad[None, :], float("nan"), p)
    p = operand(p, DOT, EMULATE)
    faded = ()
    for block in tl.static_range(BLOCKS):
        c = rows(k.y, v_at, k.yl, k.yd, j, inside & (v_bad == 0), block * BE + tl.arange(0, BE), E, DOT, EMULATE)
        faded = faded + (product(p, c, acc[block] * fade[:, None], DOT, EMULATE),)
    return faded, top, l


@triton.jit(do_not_specialize=["slots", "tiles", "k_slots", "sequences", "r", "R", "look_back", "look_ahead", "window",
                               "scale", "seed_low", "seed_high", "threshold", "gain", "table_row", "furthest"])
def forward_kernel(q, k, cu, bad, table, table_row, furthest, sum_o, sum_m, sum_l, out, lse, slots, tiles, k_slots, sequences,
                   chunk, r, R, look_back, look_ahead, window, scale, seed_low, seed_high, threshold, gain,
                   D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, IDENTITY: tl.constexpr,
                   CENTRED: tl.constexpr, PACKED: tl.constexpr, SCALED: tl.constexpr, CAUSAL: tl.constexpr,
                   NEAR: tl.constexpr, SELF: tl.constexpr, BEFORE: tl.constexpr, BUCKETS: tl.constexpr, WRAP: tl.constexpr,
                   BIAS: tl.constexpr, DROPOUT: tl.constexpr, LAST: tl.constexpr, DOT: tl.constexpr, EMULATE: tl.constexpr):
    """Round r. out [B, Hq, L, E] and lse [B, Hq, L] if LAST, else the running sums of q's heads in the same shapes.

    BIAS: table [Hq, 2 furthest + 1], rows table_row apart.
    """
    PARTS: tl.constexpr = (D + BD - 1) // BD
    BLOCKS: tl.constexpr = (E + BE - 1) // BE
    PLAIN: tl.constexpr = IDENTITY and SELF == 0 and not BUCKETS and not NEAR
    limits = (look_back, look_ahead, window)
    pid = tl.program_id(0).to(tl.int64)
    tile = slots * tiles - 1 - pid % (slots * tiles)
    row = pid // (slots * tiles)
    start, end, first, last, base = seat(cu, tile // tiles, q.length, sequences, chunk, PACKED)
    begin = start + tile % tiles * BM
    end = tl.minimum(end, begin + BM)
    if begin >= end:
        return
    if not PACKED:
        last = first + k.length

    batch = row // q.heads
    k_head = row % q.heads // (q.heads // k.heads)
    k_row = batch * k.heads + k_head
    at = (batch * q.xb + row % q.heads * q.xh, batch * k.xb + k_head * k.xh, batch * k.yb + k_head * k.yh,
          k_row * k.length)
    q_table = row * R * q.length
    k_table = k_row * R * k.length
    tables = (q.rank + q_table, k.rank + k_table, q.bucket + q_table, k.bucket + k_table)
    places = begin.to(tl.int32) + tl.arange(0, BM)
    inside = places < end
    i = tokens(q.order + q_table + r * q.length, places, inside, IDENTITY)
    flag = tl.load(q.flags + row * q.length + i, mask=inside, other=DEAD_FLAG)
    live = flag == 0
    u = (start - first) // chunk
    if CENTRED:
        opens = tl.load(q.order + q_table + r * q.length + begin)
        u = tl.load(tables[0] + r * q.length + opens).to(tl.int64)
    head = dropout_head(seed_low, seed_high, row)
    spoiled = tl.load(bad)
    bias = (table, furthest)
    if BIAS:
        bias = (table + row % q.heads * table_row + furthest, furthest)

    sums = row * q.length + i
    before = places < tl.where(r > 0, end, begin)
    acc = ()
    for block in tl.static_range(BLOCKS):
        cols = block * BE + tl.arange(0, BE)
        acc = acc + (tl.load(sum_o + sums[:, None] * E + cols[None, :],
                             mask=before[:, None] & (cols < E)[None, :], other=0.0),)
    m = tl.load(sum_m + sums, mask=before, other=float("-inf"))
    l = tl.load(sum_l + sums, mask=before, other=0.0)  # noqa: E741
    held = 0
    if PARTS == 1:
        held = rows(q.x, at[0], q.xl, q.xd, i, live, tl.arange(0, BD), D, DOT, EMULATE)

    for step in range(look_back + look_ahead + 1 if WRAP else 1):
        r_k, low, high = reach(step, r, u, first, last, begin, end, k_slots, R, chunk, look_back, look_ahead, True, WRAP,
                               PLAIN and CAUSAL)
        order = k.order + k_table + r_k * k.length
        middle = low
        if PLAIN:
            # whole tiles of keys before the first query need no look at positions
            middle = low + tl.maximum(tl.minimum(begin + 1, high) - low, 0) // BN * BN if CAUSAL else high
            for place in range(low.to(tl.int32), middle.to(tl.int32), BN):
                acc, m, l = _meet(acc, m, l, held, q, k, at, i, live, inside, place, high, order, tables, r, r_k,  # noqa: E741
                                  limits, bias, spoiled, scale, head, threshold, gain, D, BD, E, BE, BN, False,
                                  IDENTITY, SCALED, CAUSAL, NEAR, SELF, BEFORE, BUCKETS, BIAS, DROPOUT, DOT, EMULATE)
        if CAUSAL or not PLAIN:
            for place in range(middle.to(tl.int32), high.to(tl.int32), BN):
                acc, m, l = _meet(acc, m, l, held, q, k, at, i, live, inside, place, high, order, tables, r, r_k,  # noqa: E741
                                  limits, bias, spoiled, scale, head, threshold, gain, D, BD, E, BE, BN, True,
                                  IDENTITY, SCALED, CAUSAL, NEAR, SELF, BEFORE, BUCKETS, BIAS, DROPOUT, DOT, EMULATE)

    fade = tl.full([BM], 1.0, tl.float32)
    weight = tl.zeros([BM], tl.float32)
    if LAST and SELF != 0:
        known = tl.load(k.flags + at[3] + i, mask=inside & (i < k.length), other=DEAD_FLAG) != DEAD_FLAG
        own = tl.zeros([BM], tl.float32)
        for part in tl.static_range(PARTS):
            cols = part * BD + tl.arange(0, BD)
            own += tl.sum(exact_rows(q.x, at[0], q.xl, q.xd, i, known, cols, D)
                          * exact_rows(k.x, at[1], k.xl, k.xd, i, known, cols, D), 1)
        own = own * scale
        if SCALED:
            own = own * tl.load(k.scale + at[3] + i, mask=known, other=0.0)
        chosen = known & (l == 0.0) if SELF == 1 else known
        top = tl.maximum(m, tl.where(chosen, own, float("-inf")))
        safe = tl.where(top == float("-inf"), 0.0, top)
        fade = tl.exp(m - safe)
        weight = tl.where(chosen, tl.exp(own - safe), 0.0)
        l = l * fade + weight  # noqa: E741
        m = top
        if DROPOUT:
            weight = weight * drops(i, i, head, threshold, gain)
    if LAST:
        # a query that holds NaN was zeros so far
        l = tl.where(flag == DEAD_FLAG, 0.0, tl.where((flag == BAD_FLAG) & (l != 0.0), float("nan"), l))  # noqa: E741
        empty = l == 0.0
        tl.store(lse + sums, tl.where(empty, float("-inf"), m + tl.log(tl.where(empty, 1.0, l))), mask=inside)
    else:
        tl.store(sum_m + sums, m, mask=inside)
        tl.store(sum_l + sums, l, mask=inside)
    for block in tl.static_range(BLOCKS):
        cols = block * BE + tl.arange(0, BE)
        o = acc[block]
        fits = inside[:, None] & (cols < E)[None, :]
        if LAST:
            if SELF != 0:
                c = exact_rows(k.y, at[2], k.yl, k.yd, i, inside & (weight != 0.0), cols, E)
                o = o * fade[:, None] + weight[:, None] * c
            o = tl.where(empty[:, None], 0.0, o / tl.where(empty, 1.0, l)[:, None])
            store(out + sums.to(tl.int64)[:, None] * E + cols[None, :], o, fits, EMULATE)
        else:
            tl.store(sum_o + sums.to(tl.int64)[:, None] * E + cols[None, :], o, mask=fits)
