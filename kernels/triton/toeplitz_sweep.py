"""Linear attention with relative positions: one sweep for every result but the gradient of the factors, and that one.

    kind   tile of   over      result                        a    b    x
    out    queries   keys      sum_j c (q_i.k_j) v_j         q    k    v
    dq     queries   keys      sum_j c (G_i.v_j + h_i) k_j   G    v    k
    dk     keys      queries   sum_i c (G_i.v_j + h_i) q_i   v    G    q
    dv     keys      queries   sum_i c (q_i.k_j) G_i         k    q    G

q and k are features, G = dO / z and h = -(dO.o) / z, c the factor of t = j - (i + offset); out sums its weights too. What a
tile sums over are its sources. Near ones come tile by tile, each pair with its own factor. Of the segments of sources that
lie `reach` or further from every row of a tile, whose factor is the same for all, it reads a state: the sum over them of
features times values, and of features (times h). u = source - (row of the tile + lead) is t where the tile is of queries and
-t where it is of keys.

The gradient of the factors sums (q_i.k_j) (G_i.v_j + h_i) along diagonals. `factors_kernel` has a program for each diagonal
of tiles: pairs at the same place of two of its tiles have the same t, so it adds tiles up and takes diagonals apart once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .diagonals import store_diagonals
from .tiles import alive, broken, operand, product, reciprocal, span, store, tile, values


@triton.jit(do_not_specialize=["length"])
def gradients_kernel(grad, out, z, own, g, h, heads, length, E: tl.constexpr, BE: tl.constexpr, C: tl.constexpr,
                     NORMALIZE: tl.constexpr, HAS_OWN: tl.constexpr, EMULATE: tl.constexpr):
    """G [B, heads, length, E] and h [B, heads, length]: gradients of the sums of weighted values, and of weights.

    G = dO / z and h = -(dO.o) / z; not normalised dO, and the normalizer's own gradient or 0.
    """
    pid = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(length, C)
    row = pid // chunks
    rows = pid % chunks * C + tl.arange(0, C)
    inside = rows < length
    cols = tl.arange(0, BE)
    at = row * length + rows
    live = inside
    scale = tl.full([C], 1.0, tl.float32)
    if NORMALIZE:
        norm = tl.load(z + at, mask=inside, other=0.0)
        # where z is 0, 0 whatever dO holds
        live = inside & (norm != 0.0)
        scale = reciprocal(norm)
    part = tile(grad.ptr + row // heads * grad.b + row % heads * grad.h, grad, rows, live, cols, E).to(tl.float32)
    part *= scale[:, None]
    store(g + at[:, None] * E + cols[None, :], part, inside[:, None] & (cols < E)[None, :], EMULATE)
    down = tl.zeros([C], tl.float32)
    if NORMALIZE:
        o = tile(out.ptr + row // heads * out.b + row % heads * out.h, out, rows, live, cols, E).to(tl.float32)
        down = -tl.sum(part * o, 1)
    elif HAS_OWN:
        down = tl.load(own + at, mask=inside, other=0.0)
    tl.store(h + at, down, mask=inside)


@triton.jit
def _places(cu, start, end, sequence, sources, PACKED: tl.constexpr):
    """Rows [begin, stop) in their sequence, its first token, and how many sources it has."""
    first = start * 0
    if PACKED:
        first = tl.load(cu + sequence).to(tl.int64)
        count = (tl.load(cu + sequence + 1).to(tl.int64) - first).to(tl.int32)
    else:
        count = sources
    return (start - first).to(tl.int32), (end - first).to(tl.int32), first, count


@triton.jit
def _segments(begin, stop, count, lead, reach, SEGMENT: tl.constexpr, PACKED: tl.constexpr, HAS_OLD: tl.constexpr,
              HAS_NEW: tl.constexpr):
    """Segments [0, old) and from `new` on are far from every row in [begin, stop)."""
    all = tl.cdiv(count, SEGMENT)
    old = count * 0
    if HAS_OLD:
        seen = tl.minimum(tl.maximum(begin + lead - reach + 1, 0), count)
        old = seen // SEGMENT
        if not PACKED:
            old = tl.where(seen == count, all, old)
    new = all
    if HAS_NEW:
        # the sum from segment s on is kept by the segment before it
        new = tl.minimum(tl.cdiv(tl.maximum(stop - 1 + lead + reach, 1), SEGMENT), all)
    return old, tl.maximum(old, new)


@triton.jit
def _dots(held, a_ptr, a, rows, live, b_ptr, b, b_rows, b_live, acc, WIDTH: tl.constexpr, BW: tl.constexpr,
          DOT: tl.constexpr, EMULATE: tl.constexpr):
    """acc + a.b of rows and sources; held: the rows of a, where they are one block wide."""
    # a loop at run time: unrolled, the loads of all blocks would come first and wait in registers
    for block in range((WIDTH + BW - 1) // BW):
        cols = block * BW + tl.arange(0, BW)
        if WIDTH <= BW:
            left = held
        else:
            left = values(a_ptr, a, rows, live, cols, WIDTH, DOT, EMULATE)
        right = values(b_ptr, b, b_rows, b_live, cols, WIDTH, DOT, EMULATE)
        acc = product(left, tl.trans(right), acc, DOT, EMULATE)
    return acc


@triton.jit
def _meet(total, norm, held, a_ptr, a, b_ptr, b, x_ptr, x, table, h, down, mask, batch, sources, rows, live, i, first, place,
          end, lead, reach, INNER: tl.constexpr, BI: tl.constexpr, OUTER: tl.constexpr, BO: tl.constexpr, BN: tl.constexpr,
          KIND: tl.constexpr, DIAGONAL: tl.constexpr, HAS_MASK: tl.constexpr, DOT: tl.constexpr,
          EMULATE: tl.constexpr):
    """The rows of a tile meet sources [place, place + BN) before `end`. DIAGONAL: causality hides some pairs."""
    QUERIES: tl.constexpr = KIND == "out" or KIND == "dq"
    j = place + tl.arange(0, BN)
    b_rows = first + j
    b_live = alive(mask, batch, sources, b_rows, j < end, HAS_MASK and QUERIES)
    w = _dots(held, a_ptr, a, rows, live, b_ptr, b, b_rows, b_live, tl.zeros([rows.shape[0], BN], tl.float32), INNER, BI,
              DOT, EMULATE)
    if KIND == "dq":
        w += down[:, None]
    elif KIND == "dk":
        w += tl.load(h + b_rows, mask=b_live, other=0.0)[None, :]
    u = j[None, :] - (i + lead)[:, None]
    t = u if QUERIES else -u
    w *= tl.load(table + tl.minimum(tl.maximum(t, -reach), reach))
    if DIAGONAL:
        w = tl.where(t <= 0, w, 0.0)
    if KIND == "out":
        norm += tl.sum(operand(w, DOT, EMULATE).to(tl.float32), 1)
    after = ()
    for block in tl.static_range((OUTER + BO - 1) // BO):
        cols = block * BO + tl.arange(0, BO)
        left = w
        right = values(x_ptr, x, b_rows, b_live, cols, OUTER, DOT, EMULATE)
        if DIAGONAL:
            # 0 times a NaN of the future is NaN: a row that is not finite spoils by hand who may see it. It is read again
            # without, because zeros put into it would hold the tile in registers
            bad = tl.max(broken(right.to(tl.float32)), 1) != 0
            left = tl.where((t <= 0) & bad[None, :], float("nan"), w)
            right = values(x_ptr, x, b_rows, b_live & (bad == 0), cols, OUTER, DOT, EMULATE)
        after = after + (product(operand(left, DOT, EMULATE), right, total[block], DOT, EMULATE),)
    return after, norm


@triton.jit
def _read(total, norm, held, a_ptr, a, e_ptr, e, down, rows, live, state, sums, factor, INNER: tl.constexpr,
          BI: tl.constexpr, OUTER: tl.constexpr, BO: tl.constexpr, KIND: tl.constexpr, DOT: tl.constexpr,
          EMULATE: tl.constexpr):
    """Adds factor times what the rows of a tile get from a state [M, E]; with the factor's gradient (of dq, e being q)."""
    OVER_M: tl.constexpr = KIND == "out" or KIND == "dv"
    edge = tl.zeros([], tl.float32)
    after = ()
    for block in tl.static_range((OUTER + BO - 1) // BO):
        cols = block * BO + tl.arange(0, BO)
        far = tl.zeros([rows.shape[0], BO], tl.float32)
        for part in range((INNER + BI - 1) // BI):
            inner = part * BI + tl.arange(0, BI)
            if INNER <= BI:
                left = held
            else:
                left = values(a_ptr, a, rows, live, inner, INNER, DOT, EMULATE)
            if OVER_M:
                at = inner[:, None] * OUTER + cols[None, :]
            else:
                at = cols[None, :] * INNER + inner[:, None]
            right = tl.load(state + at, mask=(inner < INNER)[:, None] & (cols < OUTER)[None, :], other=0.0)
            if DOT != "bf16" or EMULATE:
                right = operand(right.to(tl.float32), DOT, EMULATE)
            far = product(left, right, far, DOT, EMULATE)
            if KIND == "out" and block == 0:
                norm += factor * tl.sum(left.to(tl.float32) * tl.load(sums + inner, mask=inner < INNER, other=0.0)[None, :], 1)
        if KIND == "dq":
            far += down[:, None] * tl.load(sums + cols, mask=cols < OUTER, other=0.0)[None, :]
            edge += tl.sum(tl.sum(far * tile(e_ptr, e, rows, live, cols, OUTER).to(tl.float32), 1), 0)
        elif KIND == "dk":
            far += tl.load(sums + cols, mask=cols < OUTER, other=0.0)[None, :]
        after = after + (total[block] + factor * far,)
    return after, norm, edge


@triton.jit(do_not_specialize=["length", "sources", "slots", "states", "sequences", "reach", "lead"])
def sweep_kernel(a, b, x, e, table, h, mask, cu, old_state, old_sums, new_state, new_sums, y, norms, edges, heads, groups,
                 length, sources, slots, states, sequences, reach, lead, INNER: tl.constexpr, BI: tl.constexpr,
                 OUTER: tl.constexpr, BO: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SEGMENT: tl.constexpr,
                 KIND: tl.constexpr, CAUSAL: tl.constexpr, NORMALIZE: tl.constexpr, HAS_OLD: tl.constexpr,
                 HAS_NEW: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr,
                 EMULATE: tl.constexpr):
    """y [B, Hq, length, OUTER] of one kind, also where rows belong to H key heads, and of out norms [B, Hq, length].

    table [Hq, 2 reach + 1], h [B, Hq, L]. States [B, heads of sources, states, M, E] and [.., states, M]: sums of the segments
    before each (old) and after it (new). edges [B, Hq, slots, 2]: the gradient of the first and of the last factor through
    them (dq).
    """
    QUERIES: tl.constexpr = KIND == "out" or KIND == "dq"
    STATE: tl.constexpr = INNER * OUTER
    M: tl.constexpr = INNER if KIND == "out" or KIND == "dv" else OUTER
    BLOCKS: tl.constexpr = (OUTER + BO - 1) // BO
    pid = tl.program_id(0).to(tl.int64)
    slot = pid % slots
    if CAUSAL and QUERIES:
        # those with the most to do first
        slot = slots - 1 - slot
    row = pid // slots
    start, end, sequence = span(cu, slot, length, sequences, BM, PACKED)
    if start >= end:
        return
    begin, stop, first, count = _places(cu, start, end, sequence, sources, PACKED)
    old, new = _segments(begin, stop, count, lead, reach, SEGMENT, PACKED, HAS_OLD, HAS_NEW)
    low = old * SEGMENT
    high = tl.minimum(new * SEGMENT, count)
    # of the tiles in [whole, rest) no pair is hidden
    whole = low
    rest = high
    if CAUSAL and QUERIES:
        high = tl.minimum(high, stop + lead)
        rest = low + tl.maximum(tl.minimum(begin + lead + 1, high) - low, 0) // BN * BN
    elif CAUSAL:
        low = tl.maximum(low, begin + lead)
        whole = tl.minimum(low + tl.cdiv(tl.maximum(stop - 1 + lead - low, 0), BN) * BN, tl.maximum(high, low))

    batch = row // heads
    head = row % heads
    i = begin + tl.arange(0, BM)
    rows = start + tl.arange(0, BM)
    inside = i < stop
    live = alive(mask, batch, length, rows, inside, HAS_MASK and not QUERIES)
    # the heads of rows and of sources
    a_head = head if QUERIES else head // groups
    b_head = head // groups if QUERIES else head
    a_ptr = a.ptr + batch * a.b + a_head * a.h
    b_ptr = b.ptr + batch * b.b + b_head * b.h
    x_ptr = x.ptr + batch * x.b + b_head * x.h
    e_ptr = e.ptr + batch * e.b + head * e.h
    table += head * (2 * reach + 1) + reach
    held = 0
    down = 0
    if INNER <= BI:
        held = values(a_ptr, a, rows, live, tl.arange(0, BI), INNER, DOT, EMULATE)
    if KIND == "dq":
        down = tl.load(h + row * length + rows, mask=inside, other=0.0)
    elif KIND == "dk":
        h += row * sources
    norm = tl.zeros([BM], tl.float32)
    total = ()
    for _ in tl.static_range(BLOCKS):
        total = total + (tl.zeros([BM, BO], tl.float32),)

    base = row * states
    if QUERIES:
        base = (batch * (heads // groups) + head // groups) * states
    if PACKED:
        base += first // SEGMENT + sequence
    if HAS_OLD:
        factor = tl.load(table + (-reach if QUERIES else reach))
        total, norm, edge = _read(total, norm, held, a_ptr, a, e_ptr, e, down, rows, live, old_state + (base + old) * STATE,
                                  old_sums + (base + old) * M, factor, INNER, BI, OUTER, BO, KIND, DOT, EMULATE)
        if KIND == "dq":
            tl.store(edges + (row * slots + slot) * 2, edge)
    if HAS_NEW:
        # the sum from segment s on is kept by the segment before it
        at = base + new - 1
        factor = tl.load(table + (reach if QUERIES else -reach))
        total, norm, edge = _read(total, norm, held, a_ptr, a, e_ptr, e, down, rows, live, new_state + at * STATE,
                                  new_sums + at * M, factor, INNER, BI, OUTER, BO, KIND, DOT, EMULATE)
        if KIND == "dq":
            tl.store(edges + (row * slots + slot) * 2 + 1, edge)
    if CAUSAL and not QUERIES:
        for place in range(low, whole, BN):
            total, norm = _meet(total, norm, held, a_ptr, a, b_ptr, b, x_ptr, x, table, h, down, mask, batch, sources, rows,
                                live, i, first, place, high, lead, reach, INNER, BI, OUTER, BO, BN, KIND, True, HAS_MASK, DOT,
                                EMULATE)
    for place in range(whole, rest, BN):
        total, norm = _meet(total, norm, held, a_ptr, a, b_ptr, b, x_ptr, x, table, h, down, mask, batch, sources, rows, live,
                            i, first, place, high, lead, reach, INNER, BI, OUTER, BO, BN, KIND, False, HAS_MASK, DOT, EMULATE)
    if CAUSAL and QUERIES:
        for place in range(rest, high, BN):
            total, norm = _meet(total, norm, held, a_ptr, a, b_ptr, b, x_ptr, x, table, h, down, mask, batch, sources, rows,
                                live, i, first, place, high, lead, reach, INNER, BI, OUTER, BO, BN, KIND, True, HAS_MASK, DOT,
                                EMULATE)

    at = row * length + rows
    if KIND == "out":
        tl.store(norms + at, norm, mask=inside)
    for block in tl.static_range(BLOCKS):
        cols = block * BO + tl.arange(0, BO)
        part = total[block]
        if KIND == "out" and NORMALIZE:
            # a query that sees no key gets 0 whatever the state holds
            part = tl.where((norm == 0.0)[:, None], 0.0, part * reciprocal(norm)[:, None])
        if HAS_MASK and not QUERIES:
            part = tl.where(live[:, None], part, 0.0)
        store(y + at[:, None] * OUTER + cols[None, :], part, inside[:, None] & (cols < OUTER)[None, :], EMULATE)


@triton.jit(do_not_specialize=["length", "sources", "slots", "sequences", "reach", "lead", "walk", "walks", "least", "most"])
def factors_kernel(q, g, k, v, h, mask, cu, sums, heads, groups, length, sources, slots, sequences, reach, lead, walk, walks,
                   least, most, M: tl.constexpr, BI: tl.constexpr, E: tl.constexpr, BO: tl.constexpr, BM: tl.constexpr,
                   SEGMENT: tl.constexpr, CAUSAL: tl.constexpr, HAS_OLD: tl.constexpr, HAS_NEW: tl.constexpr,
                   HAS_MASK: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr, EMULATE: tl.constexpr):
    """sums [B, heads, walks, most - least + 1, 2 BM] over near tiles of keys that lie d = least..most tiles after those of the
    queries, by diagonal: BM more than the key's place in its tile less the query's. A program walks over `walk` tiles."""
    pid = tl.program_id(0).to(tl.int64)
    apart = (pid % (most - least + 1)).to(tl.int32) + least
    turn = pid // (most - least + 1) % walks
    row = pid // (most - least + 1) // walks
    batch = row // heads
    head = row % heads
    k_head = head // groups
    q_ptr = q.ptr + batch * q.b + head * q.h
    g_ptr = g.ptr + batch * g.b + head * g.h
    k_ptr = k.ptr + batch * k.b + k_head * k.h
    v_ptr = v.ptr + batch * v.b + k_head * v.h
    total = tl.zeros([BM, BM], tl.float32)
    m = tl.arange(0, BM)
    for step in range(walk):
        slot = tl.minimum(turn * walk + step, slots - 1)
        start, end, sequence = span(cu, slot, length, sequences, BM, PACKED)
        begin, stop, first, count = _places(cu, start, end, sequence, sources, PACKED)
        old, new = _segments(begin, stop, count, lead, reach, SEGMENT, PACKED, HAS_OLD, HAS_NEW)
        place = begin + apart * BM
        near = (place >= old * SEGMENT) & (place < tl.minimum(new * SEGMENT, count))
        if (turn * walk + step < slots) & (start < end) & near:
            rows = start + m
            inside = begin + m < stop
            b_rows = first + place + m
            live = alive(mask, batch, sources, b_rows, place + m < count, HAS_MASK)
            held = 0
            if M <= BI:
                held = values(q_ptr, q, rows, inside, tl.arange(0, BI), M, DOT, EMULATE)
            s = _dots(held, q_ptr, q, rows, inside, k_ptr, k, b_rows, live, tl.zeros([BM, BM], tl.float32), M, BI, DOT,
                      EMULATE)
            if E <= BO:
                held = values(g_ptr, g, rows, inside, tl.arange(0, BO), E, DOT, EMULATE)
            down = tl.load(h + row * length + rows, mask=inside, other=0.0)
            ds = _dots(held, g_ptr, g, rows, inside, v_ptr, v, b_rows, live, tl.zeros([BM, BM], tl.float32), E, BO, DOT,
                       EMULATE)
            total += s * (ds + down[:, None])
    if CAUSAL:
        total = tl.where(apart * BM + (m[None, :] - m[:, None]) <= lead, total, 0.0)
    store_diagonals(sums + pid * (2 * BM), total, BM)
