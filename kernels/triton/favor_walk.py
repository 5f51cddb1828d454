"""FAVOR+ walks: a program carries a state over the chunks of one segment, and reads it with the rows of each.

    kernel           rows x   others y   carried       time       result
    values_kernel    q        k          [v, 1]        forward    num_i = sum_j w_ij v_j + share_i phi_i.kv, over z_i
    values_kernel    k        q          g             backward   dv_j = sum_i w_ij g_i + share_j phi_j.R
    points_kernel    q        k          [v, 1]        forward    dphi_i = sum_j (g_i.v_j + h_i) w'_ij phi_j + share_i [g, h].[kv, k_sum]
    points_kernel    k        q          [g, h]        backward   dphi_j = sum_i (g_i.v_j + h_i) w'_ij phi_i + share_j R [v, 1]

w'_ij = exp(log_i + log_j) and w_ij = w'_ij phi_i.phi_j, or with an exact diagonal w_ij = exp(s_ij - r_i) within 64 tokens;
share = exp(log of the row + log of the state). points_kernel goes on from dphi to dx through the projections.
The state, too large for registers, lies in memory that the program owns: a block of features at a time is read, used, brought
up to date and written back. Within a chunk no block is met twice, so loads may run ahead of stores; a barrier ends the chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .favor_rows import centered, features, grads, project, sealed, share, weights
from .tiles import broken, operand, product, reciprocal, span, store, tile, values

NOTHING = tl.constexpr(2.0**-100)


@triton.jit
def _scores(x_ptr, x, x_rows, x_live, x_scale, y_ptr, y, y_rows, y_live, y_scale, center, D: tl.constexpr,
            DP: tl.constexpr, BD: tl.constexpr, QUERIES: tl.constexpr, HAS_OFFSET: tl.constexpr, DOT: tl.constexpr,
            EMULATE: tl.constexpr):
    """s = x~.y~ of every pair; QUERIES: whether x are the queries, from whose partners the mean is taken."""
    s = tl.zeros([x_rows.shape[0], y_rows.shape[0]], tl.float32)
    shift = tl.zeros([x_rows.shape[0]], tl.float32)
    for block in range(DP // BD):
        d = block * BD + tl.arange(0, BD)
        a = values(x_ptr, x, x_rows, x_live, d, D, DOT, EMULATE)
        b = values(y_ptr, y, y_rows, y_live, d, D, DOT, EMULATE)
        s = product(a, tl.trans(b), s, DOT, EMULATE)
        if HAS_OFFSET:
            mean = tl.load(center + d)[None, :]
            shift += tl.sum((a if QUERIES else b).to(tl.float32) * mean, 1)
    s = s * x_scale[:, None] * y_scale[None, :]
    if HAS_OFFSET:
        if QUERIES:
            s -= (shift * x_scale)[:, None]
        else:
            s -= (shift * y_scale)[None, :]
    return s


@triton.jit
def _allowed(i, x_first, y_first, y_live, C: tl.constexpr, QUERIES: tl.constexpr):
    """Pairs in which the key is no later than the query, of tiles that start at x_first and y_first."""
    if QUERIES:
        allowed = (x_first + i)[:, None] >= tl.where(y_live, y_first + i, 0x7FFFFFFF)[None, :]
    else:
        allowed = (x_first + i)[:, None] <= tl.where(y_live, y_first + i, -1)[None, :]
    return allowed


@triton.jit
def _block(rows, inside, cols, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Where a block of a state lies, and whether it does."""
    fits = tl.full([rows.shape[0], cols.shape[0]], True, tl.int1)
    if not EVEN:
        fits = fits & inside[:, None]
    if WIDTH % BLOCK != 0:
        fits = fits & (cols < WIDTH)[None, :]
    return rows[:, None] * WIDTH + cols[None, :], fits


@triton.jit(do_not_specialize=["L", "slots", "sequences", "segment"])
def values_kernel(x, y, c, z, r, cu, hi, lo, offset, center, kv, k_sum, log, out, z_out, r_out, heads, groups, L, slots,
                  sequences, segment, P, size, D: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, E: tl.constexpr,
                  C: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, QUERIES: tl.constexpr,
                  CAUSAL: tl.constexpr, EXACT: tl.constexpr, GROUPED: tl.constexpr, KIND: tl.constexpr,
                  HAS_OFFSET: tl.constexpr, EVEN: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr,
                  EMULATE: tl.constexpr):
    """Output, normalizer z and reference r [B, heads, L] of the queries (QUERIES), or dv of the keys.

    Causal, kv [B, heads, slots, M, E] and k_sum [B, heads, slots, blocks of E, M] hold the states that segments start from,
    and are overwritten. Else kv [sequences or B, H, M, E] and k_sum hold one state per sequence. log has one head per key head.
    """
    PAIRED: tl.constexpr = KIND == "hyperbolic" or KIND == "trig"
    HALVES: tl.constexpr = 2 if PAIRED else 1
    # read and updated in one go: the features are computed once
    FUSED: tl.constexpr = CAUSAL and not EXACT and not GROUPED
    BLOCKS: tl.constexpr = (E + BN - 1) // BN
    pid = tl.program_id(0).to(tl.int64)
    block = (pid % BLOCKS).to(tl.int32)
    slot = pid // BLOCKS % slots
    row = pid // BLOCKS // slots
    batch = row // heads
    start, end, sequence = span(cu, slot, L, sequences, segment, PACKED)
    if start >= end:
        return

    # a query head reads one key head; a key head sums over its group of query heads
    if QUERIES:
        x_head = row % heads
        k_head = x_head // groups
        k_heads = heads // groups
        y_head = k_head
        y_token = (batch * k_heads + k_head) * L
    else:
        x_head = row % heads
        k_head = x_head
        k_heads = heads
        y_head = k_head * groups
        y_token = row * groups * L
    rounds = groups if GROUPED else 1
    x_token = row * L
    x_ptr = x.ptr + batch * x.b + x_head * x.h
    y_ptr = y.ptr + batch * y.b + y_head * y.h
    c_ptr = c.ptr + batch * c.b + y_head * c.h
    if HAS_OFFSET:
        offset += k_head * size
        center += k_head * DP
    cols = block * BN + tl.arange(0, BN)
    i = tl.arange(0, C)
    none = i < 0

    if CAUSAL:
        log += (batch * k_heads + k_head) * slots + slot
        kv += (row * slots + slot) * (HALVES * P) * E
        k_sum += ((row * slots + slot) * BLOCKS + block) * (HALVES * P)
    else:
        base = (sequence + batch) * k_heads + k_head
        log += base
        kv += base * (HALVES * P) * E
        k_sum += base * (HALVES * P)
    top = tl.load(log)
    parts = tl.cdiv(P, BP)

    length = (end - start).to(tl.int32)
    chunks = tl.cdiv(length, TILES * C)
    for step in range(chunks):
        chunk = step if QUERIES else chunks - 1 - step
        for t in range(TILES):
            first = (chunk * TILES + t) * C
            rows = start + first + i
            inside = i < length - first
            x_scale = tl.load(x.scale + x_token + rows, mask=inside, other=0.0)
            x_top = tl.load(x.top + x_token + rows, mask=inside, other=0.0)
            x_log = tl.load(x.log + x_token + rows, mask=inside, other=float("-inf"))
            x_live = inside if QUERIES else inside & (x_log != float("-inf"))

            # the others of the same tile; what the past has seen is r
            y_log = tl.full([C], float("-inf"), tl.float32)
            y_live = none
            if CAUSAL and not EXACT:
                y_log = tl.load(y.log + y_token + rows, mask=inside, other=float("-inf"))
                y_live = inside & (y_log != float("-inf"))
            if QUERIES:
                reference = tl.zeros([C], tl.float32) + top
                if EXACT:
                    reference += x_log
                if EXACT:
                    for s in range(t + 1):
                        other = (chunk * TILES + s) * C
                        near = start + other + i
                        near_inside = i < length - other
                        near_log = tl.load(y.log + y_token + near, mask=near_inside, other=float("-inf"))
                        near_live = near_inside & (near_log != float("-inf"))
                        near_scale = tl.load(y.scale + y_token + near, mask=near_inside, other=0.0)
                        pairs = _scores(x_ptr, x, rows, x_live, x_scale, y_ptr, y, near, near_live, near_scale, center, D,
                                        DP, BD, QUERIES, HAS_OFFSET, DOT, EMULATE)
                        allowed = _allowed(i, first, other, near_live, C, QUERIES)
                        reference = tl.maximum(reference, tl.max(tl.where(allowed, pairs, float("-inf")), 1))
                elif CAUSAL:
                    allowed = _allowed(i, first, first, y_live, C, QUERIES)
                    seen = tl.where(allowed, y_log[None, :], float("-inf"))
                    reference = tl.maximum(reference, tl.max(seen, 1))
                reference = tl.where(reference == float("-inf"), 0.0, reference)
                x_log = (x_log if EXACT else tl.zeros([C], tl.float32)) - reference

            # what the state gives; FUSED: pairs of features and the next state too
            acc = tl.zeros([C, BN], tl.float32)
            norm = tl.zeros([C], tl.float32)
            w = tl.zeros([C, C], tl.float32)
            if FUSED:
                y_scale = tl.load(y.scale + y_token + rows, mask=inside, other=0.0)
                y_top = tl.load(y.top + y_token + rows, mask=inside, other=0.0)
                top_after = tl.maximum(top, tl.max(y_log, 0))
                kept = share(top, top_after)
                y_share = share(y_log, top_after)
            for j in range(parts):
                p = j * BP + tl.arange(0, BP)
                u = project(x_ptr, x, rows, x_live, x_scale, hi, lo, offset, p, D, DP, BD, HAS_OFFSET and not QUERIES, DOT,
                            EMULATE)
                mapped = ()
                held = ()
                totals = ()
                for half in tl.static_range(HALVES):
                    phi = features(u, x_top, x_live, p, P, KIND, half, EVEN)
                    at, fits = _block(half * P + p, p < P, cols, E, BN, EVEN)
                    state = tl.load(kv + at, mask=fits, other=0.0)
                    a = operand(phi, DOT, EMULATE)
                    acc = product(a, operand(state, DOT, EMULATE), acc, DOT, EMULATE)
                    if QUERIES:
                        # of phi before it is rounded: its rounded form is spread over registers for tl.dot
                        total = tl.load(k_sum + half * P + p, mask=p < P, other=0.0)
                        norm += tl.sum(phi * total[None, :], 1)
                        totals = totals + (total,)
                    mapped = mapped + (a,)
                    held = held + (state,)
                if FUSED:
                    u = project(y_ptr, y, rows, y_live, y_scale, hi, lo, offset, p, D, DP, BD, HAS_OFFSET and QUERIES, DOT,
                                EMULATE)
                    c_rows = values(c_ptr, c, rows, y_live, cols, E, DOT, EMULATE) if QUERIES else grads(
                        c_ptr, c, z + y_token, rows, y_live, cols, E, DOT, EMULATE)
                    for half in tl.static_range(HALVES):
                        phi = features(u, y_top, y_live, p, P, KIND, half, EVEN)
                        w = product(mapped[half], tl.trans(operand(phi, DOT, EMULATE)), w, DOT, EMULATE)
                        phi *= y_share[:, None]
                        at, fits = _block(half * P + p, p < P, cols, E, BN, EVEN)
                        b = operand(phi, DOT, EMULATE)
                        tl.store(kv + at, product(tl.trans(b), c_rows, held[half] * kept, DOT, EMULATE), mask=fits)
                        if QUERIES:
                            tl.store(k_sum + half * P + p, totals[half] * kept + tl.sum(phi, 0), mask=p < P)
            x_share = tl.exp(x_log + top)
            acc *= x_share[:, None]
            norm *= x_share
            if FUSED:
                top = top_after

            # pairs of the chunk
            if FUSED:
                # read again: held through the loop above these would fill the registers
                y_log = tl.load(y.log + y_token + rows, mask=inside, other=float("-inf"))
                y_live = inside & (y_log != float("-inf"))
                c_rows = values(c_ptr, c, rows, y_live, cols, E, DOT, EMULATE) if QUERIES else grads(
                    c_ptr, c, z + y_token, rows, y_live, cols, E, DOT, EMULATE)
                w = w * tl.exp(x_log[:, None] + y_log[None, :])
                clean, bad = sealed(c_rows)
                allowed = _allowed(i, first, first, y_live, C, QUERIES)
                w = tl.where(allowed, tl.where(bad[None, :] != 0, float("nan"), w), 0.0)
                w = operand(w, DOT, EMULATE)
                norm += tl.sum(w.to(tl.float32), 1)
                acc = product(w, clean, acc, DOT, EMULATE)
            elif CAUSAL:
                for round in range(rounds):
                    for s in range(0 if QUERIES else t, t + 1 if QUERIES else TILES):
                        other = (chunk * TILES + s) * C
                        near = start + other + i
                        near_inside = i < length - other
                        near_at = y_token + round * L + near
                        near_log = tl.load(y.log + near_at, mask=near_inside, other=float("-inf"))
                        near_live = near_inside & (near_log != float("-inf"))
                        near_scale = tl.load(y.scale + near_at, mask=near_inside, other=0.0)
                        near_ptr = y_ptr + round * y.h
                        if EXACT:
                            pairs = _scores(x_ptr, x, rows, x_live, x_scale, near_ptr, y, near, near_live, near_scale,
                                            center, D, DP, BD, QUERIES, HAS_OFFSET, DOT, EMULATE)
                            if QUERIES:
                                pairs = tl.exp(pairs - reference[:, None])
                            else:
                                near_r = tl.load(r + near_at, mask=near_inside, other=0.0)
                                pairs = tl.exp(pairs - near_r[None, :])
                        else:
                            pairs = tl.zeros([C, C], tl.float32)
                            near_top = tl.load(y.top + near_at, mask=near_inside, other=0.0)
                            for j in range(parts):
                                p = j * BP + tl.arange(0, BP)
                                u = project(x_ptr, x, rows, x_live, x_scale, hi, lo, offset, p, D, DP, BD,
                                            HAS_OFFSET and not QUERIES, DOT, EMULATE)
                                y_u = project(near_ptr, y, near, near_live, near_scale, hi, lo, offset, p, D, DP, BD,
                                              HAS_OFFSET and QUERIES, DOT, EMULATE)
                                for half in tl.static_range(HALVES):
                                    a = operand(features(u, x_top, x_live, p, P, KIND, half, EVEN), DOT, EMULATE)
                                    b = operand(features(y_u, near_top, near_live, p, P, KIND, half, EVEN), DOT, EMULATE)
                                    pairs = product(a, tl.trans(b), pairs, DOT, EMULATE)
                            pairs = pairs * tl.exp(x_log[:, None] + near_log[None, :])
                        clean, bad = sealed(values(c_ptr, c, near, near_live, cols, E, DOT, EMULATE) if QUERIES else grads(
                            c_ptr + round * c.h, c, z + y_token + round * L, near, near_live, cols, E, DOT, EMULATE))
                        allowed = _allowed(i, first, other, near_live, C, QUERIES)
                        pairs = tl.where(allowed, tl.where(bad[None, :] != 0, float("nan"), pairs), 0.0)
                        pairs = operand(pairs, DOT, EMULATE)
                        norm += tl.sum(pairs.to(tl.float32), 1)
                        acc = product(pairs, clean, acc, DOT, EMULATE)

            at = x_token + rows
            stored = inside[:, None]
            if E % BN != 0:
                stored = stored & (cols < E)[None, :]
            part = at[:, None] * E + cols[None, :]
            if QUERIES:
                norm = tl.where(tl.abs(norm) < NOTHING, 0.0, norm)
                tl.store(z_out + at, norm, mask=inside)
                tl.store(r_out + at, tl.where(norm == 0.0, 0.0, reference), mask=inside)
                # a query that sees nothing has output 0 whatever the state holds
                acc = tl.where((norm == 0.0)[:, None], 0.0, acc * reciprocal(norm)[:, None])
            else:
                acc = tl.where(x_live[:, None], acc, 0.0)
            store(out + part, acc, stored, EMULATE)

        if CAUSAL and not FUSED:
            # the whole chunk has read the state: now it enters
            tl.debug_barrier()
            top_after = top
            for n in range(rounds * TILES):
                other = (chunk * TILES + n % TILES) * C
                near_log = tl.load(y.log + y_token + n // TILES * L + start + other + i, mask=i < length - other,
                                   other=float("-inf"))
                top_after = tl.maximum(top_after, tl.max(near_log, 0))
            kept = share(top, top_after)
            top = top_after
            for j in range(parts):
                p = j * BP + tl.arange(0, BP)
                held = ()
                total = ()
                for half in tl.static_range(HALVES):
                    at, fits = _block(half * P + p, p < P, cols, E, BN, EVEN)
                    held = held + (tl.load(kv + at, mask=fits, other=0.0) * kept,)
                    if QUERIES:
                        total = total + (tl.load(k_sum + half * P + p, mask=p < P, other=0.0) * kept,)
                for n in range(rounds * TILES):
                    round = n // TILES
                    other = (chunk * TILES + n % TILES) * C
                    near = start + other + i
                    near_inside = i < length - other
                    near_at = y_token + round * L + near
                    near_log = tl.load(y.log + near_at, mask=near_inside, other=float("-inf"))
                    near_live = near_inside & (near_log != float("-inf"))
                    near_scale = tl.load(y.scale + near_at, mask=near_inside, other=0.0)
                    near_top = tl.load(y.top + near_at, mask=near_inside, other=0.0)
                    c_rows = values(c_ptr, c, near, near_live, cols, E, DOT, EMULATE) if QUERIES else grads(
                        c_ptr + round * c.h, c, z + y_token + round * L, near, near_live, cols, E, DOT, EMULATE)
                    u = project(y_ptr + round * y.h, y, near, near_live, near_scale, hi, lo, offset, p, D, DP, BD,
                                HAS_OFFSET and QUERIES, DOT, EMULATE)
                    after = ()
                    total_after = ()
                    for half in tl.static_range(HALVES):
                        phi = features(u, near_top, near_live, p, P, KIND, half, EVEN) * share(near_log, top)[:, None]
                        b = operand(phi, DOT, EMULATE)
                        after = after + (product(tl.trans(b), c_rows, held[half], DOT, EMULATE),)
                        if QUERIES:
                            total_after = total_after + (total[half] + tl.sum(phi, 0),)
                    held = after
                    total = total_after
                for half in tl.static_range(HALVES):
                    at, fits = _block(half * P + p, p < P, cols, E, BN, EVEN)
                    tl.store(kv + at, held[half], mask=fits)
                    if QUERIES:
                        tl.store(k_sum + half * P + p, total[half], mask=p < P)
        if CAUSAL:
            # the next chunk reads what this one wrote
            tl.debug_barrier()


@triton.jit
def _through(dphi, u, phi, KIND: tl.constexpr):
    """-> du, and sum of phi dphi over the block: what the factor exp(-|x~|^2 / 2) of every feature receives. One of the
    tuples for each half of a paired kind."""
    if KIND == "hyperbolic":
        plus = phi[0] * dphi[0]
        minus = phi[1] * dphi[1]
        du = plus - minus
        total = tl.sum(plus + minus, 1)
    elif KIND == "trig":
        du = phi[1] * dphi[0] - phi[0] * dphi[1]
        total = tl.sum(phi[0] * dphi[0] + phi[1] * dphi[1], 1)
    elif KIND == "relu":
        # beyond the last projection u is 0
        du = tl.where(u > 0, dphi[0], 0.0)
        total = tl.zeros([du.shape[0]], tl.float32)
    else:
        du = phi[0] * dphi[0]
        total = tl.sum(du, 1)
    return du, total


@triton.jit(do_not_specialize=["L", "slots", "sequences", "segment"])
def points_kernel(x, y, v, grad, z, h, r, root, cu, hi, lo, offset, center, kv, k_sum, log, dx, d_root, heads, groups, L,
                  slots, sequences, segment, P, size, D: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr,
                  E: tl.constexpr, C: tl.constexpr, BP: tl.constexpr, BE: tl.constexpr, TILES: tl.constexpr,
                  QUERIES: tl.constexpr, CAUSAL: tl.constexpr, EXACT: tl.constexpr, GROUPED: tl.constexpr,
                  KIND: tl.constexpr, L2: tl.constexpr, HAS_OFFSET: tl.constexpr, EVEN: tl.constexpr,
                  PACKED: tl.constexpr, DOT: tl.constexpr, EMULATE: tl.constexpr):
    """dq (QUERIES) or dk [B, heads, L, D], and of each program its share of d root. States as in values_kernel."""
    PAIRED: tl.constexpr = KIND == "hyperbolic" or KIND == "trig"
    HALVES: tl.constexpr = 2 if PAIRED else 1
    FUSED: tl.constexpr = CAUSAL and not EXACT and not GROUPED
    EB: tl.constexpr = (E + BE - 1) // BE
    # the norm of a query cancels against its reference, unless it meets exact scores too
    NORM: tl.constexpr = KIND != "relu" and (EXACT or not QUERIES)
    MEAN_X: tl.constexpr = HAS_OFFSET and not QUERIES
    MEAN_Y: tl.constexpr = HAS_OFFSET and QUERIES
    pid = tl.program_id(0).to(tl.int64)
    slot = pid % slots
    row = pid // slots
    batch = row // heads
    start, end, sequence = span(cu, slot, L, sequences, segment, PACKED)
    if start >= end:
        return

    x_head = row % heads
    if QUERIES:
        k_head = x_head // groups
        k_heads = heads // groups
        y_head = k_head
        q_head = x_head
        y_token = (batch * k_heads + k_head) * L
        q_token = row * L
    else:
        k_head = x_head
        k_heads = heads
        y_head = k_head * groups
        q_head = y_head
        y_token = row * groups * L
        q_token = y_token
    rounds = groups if GROUPED else 1
    x_token = row * L
    x_ptr = x.ptr + batch * x.b + x_head * x.h
    y_ptr = y.ptr + batch * y.b + y_head * y.h
    v_ptr = v.ptr + batch * v.b + k_head * v.h
    g_ptr = grad.ptr + batch * grad.b + q_head * grad.h
    if HAS_OFFSET:
        offset += k_head * size
        center += k_head * DP
    i = tl.arange(0, C)
    e = tl.arange(0, BE)
    d = tl.arange(0, DP)
    t_root = tl.load(root)

    if CAUSAL:
        log += (batch * k_heads + k_head) * slots + slot
        kv += (row * slots + slot) * (HALVES * P) * E
        k_sum += (row * slots + slot) * (HALVES * P)
    else:
        base = (sequence + batch) * k_heads + k_head
        log += base
        kv += base * (HALVES * P) * E
        k_sum += base * (HALVES * P)
    top = tl.load(log)
    parts = tl.cdiv(P, BP)

    temperature = tl.zeros([C], tl.float32)
    length = (end - start).to(tl.int32)
    chunks = tl.cdiv(length, TILES * C)
    for step in range(chunks):
        chunk = step if QUERIES else chunks - 1 - step
        for t in range(TILES):
            first = (chunk * TILES + t) * C
            rows = start + first + i
            inside = i < length - first
            x_scale = tl.load(x.scale + x_token + rows, mask=inside, other=0.0)
            x_top = tl.load(x.top + x_token + rows, mask=inside, other=0.0)
            x_log = tl.load(x.log + x_token + rows, mask=inside, other=float("-inf"))
            x_live = inside & (x_log != float("-inf"))
            x_share = tl.exp(x_log + top)
            h_rows = tl.zeros([C], tl.float32) + 1.0
            if QUERIES:
                h_rows = tl.load(h + q_token + rows, mask=inside, other=0.0)
            dots = tl.zeros([C], tl.float32)
            acc = tl.zeros([C, DP], tl.float32)

            if FUSED:
                y_log = tl.load(y.log + y_token + rows, mask=inside, other=float("-inf"))
                y_scale = tl.load(y.scale + y_token + rows, mask=inside, other=0.0)
                y_top = tl.load(y.top + y_token + rows, mask=inside, other=0.0)
                y_live = inside & (y_log != float("-inf"))
                w = tl.zeros([C, C], tl.float32)
                for piece in range(EB):
                    if QUERIES:
                        a = grads(g_ptr, grad, z + q_token, rows, x_live, piece * BE + e, E, DOT, EMULATE)
                        c = values(v_ptr, v, rows, y_live, piece * BE + e, E, DOT, EMULATE)
                    else:
                        a = values(v_ptr, v, rows, x_live, piece * BE + e, E, DOT, EMULATE)
                        c = grads(g_ptr, grad, z + q_token, rows, y_live, piece * BE + e, E, DOT, EMULATE)
                    w = product(a, tl.trans(c), w, DOT, EMULATE)
                if QUERIES:
                    w += h_rows[:, None]
                else:
                    y_h = tl.load(h + q_token + rows, mask=inside, other=0.0)
                    w += y_h[None, :]
                w *= tl.exp(x_log[:, None] + y_log[None, :])
                w = operand(tl.where(_allowed(i, first, first, y_live, C, QUERIES), w, 0.0), DOT, EMULATE)
                top_after = tl.maximum(top, tl.max(y_log, 0))
                kept = share(top, top_after)
                y_share = share(y_log, top_after)

            for j in range(parts):
                p = j * BP + tl.arange(0, BP)
                u = project(x_ptr, x, rows, x_live, x_scale, hi, lo, offset, p, D, DP, BD, MEAN_X, DOT, EMULATE)
                phi = ()
                dphi = ()
                totals = ()
                for half in tl.static_range(HALVES):
                    phi = phi + (features(u, x_top, x_live, p, P, KIND, half, EVEN),)
                    dhalf = tl.zeros([C, BP], tl.float32)
                    for b in tl.static_range(EB):
                        if QUERIES:
                            a = grads(g_ptr, grad, z + q_token, rows, x_live, b * BE + e, E, DOT, EMULATE)
                        else:
                            a = values(v_ptr, v, rows, x_live, b * BE + e, E, DOT, EMULATE)
                        at, fits = _block(half * P + p, p < P, b * BE + e, E, BE, EVEN)
                        state = tl.load(kv + at, mask=fits, other=0.0)
                        dhalf = product(a, tl.trans(operand(state, DOT, EMULATE)), dhalf, DOT, EMULATE)
                    total = tl.load(k_sum + half * P + p, mask=p < P, other=0.0)
                    dhalf += h_rows[:, None] * total[None, :]
                    dphi = dphi + (dhalf * x_share[:, None],)
                    totals = totals + (total,)
                if FUSED:
                    y_u = project(y_ptr, y, rows, y_live, y_scale, hi, lo, offset, p, D, DP, BD, MEAN_Y, DOT, EMULATE)
                    more = ()
                    for half in tl.static_range(HALVES):
                        y_phi = features(y_u, y_top, y_live, p, P, KIND, half, EVEN)
                        clean = operand(tl.where(broken(y_phi) == 0, y_phi, 0.0), DOT, EMULATE)
                        more = more + (product(w, clean, dphi[half], DOT, EMULATE),)
                        y_phi *= y_share[:, None]
                        gain = tl.sum(y_phi if QUERIES else y_phi * y_h[:, None], 0)
                        tl.store(k_sum + half * P + p, totals[half] * kept + gain, mask=p < P)
                        into = tl.trans(operand(y_phi, DOT, EMULATE))
                        for b in tl.static_range(EB):
                            if QUERIES:
                                c = values(v_ptr, v, rows, y_live, b * BE + e, E, DOT, EMULATE)
                            else:
                                c = grads(g_ptr, grad, z + q_token, rows, y_live, b * BE + e, E, DOT, EMULATE)
                            at, fits = _block(half * P + p, p < P, b * BE + e, E, BE, EVEN)
                            state = tl.load(kv + at, mask=fits, other=0.0) * kept
                            tl.store(kv + at, product(into, c, state, DOT, EMULATE), mask=fits)
                    dphi = more
                du, part_dots = _through(dphi, u, phi, KIND)
                dots += part_dots
                acc = product(operand(du, DOT, EMULATE), weights(hi, p, d, DP, EMULATE), acc, DOT, EMULATE)
            if FUSED:
                top = top_after
            elif CAUSAL:
                for round in range(rounds):
                    for s in range(0 if QUERIES else t, t + 1 if QUERIES else TILES):
                        other = (chunk * TILES + s) * C
                        near = start + other + i
                        near_inside = i < length - other
                        near_at = y_token + round * L + near
                        near_log = tl.load(y.log + near_at, mask=near_inside, other=float("-inf"))
                        near_live = near_inside & (near_log != float("-inf"))
                        near_scale = tl.load(y.scale + near_at, mask=near_inside, other=0.0)
                        near_ptr = y_ptr + round * y.h
                        w = tl.zeros([C, C], tl.float32)
                        for piece in range(EB):
                            if QUERIES:
                                a = grads(g_ptr, grad, z + q_token, rows, x_live, piece * BE + e, E, DOT, EMULATE)
                                c = values(v_ptr, v, near, near_live, piece * BE + e, E, DOT, EMULATE)
                            else:
                                a = values(v_ptr, v, rows, x_live, piece * BE + e, E, DOT, EMULATE)
                                c = grads(g_ptr + round * grad.h, grad, z + q_token + round * L, near, near_live, piece * BE + e,
                                          E, DOT, EMULATE)
                            w = product(a, tl.trans(c), w, DOT, EMULATE)
                        if QUERIES:
                            w += h_rows[:, None]
                        else:
                            w += tl.load(h + near_at, mask=near_inside, other=0.0)[None, :]
                        if EXACT:
                            pairs = _scores(x_ptr, x, rows, x_live, x_scale, near_ptr, y, near, near_live, near_scale,
                                            center, D, DP, BD, QUERIES, HAS_OFFSET, DOT, EMULATE)
                            if QUERIES:
                                pairs -= tl.load(r + q_token + rows, mask=inside, other=0.0)[:, None]
                            else:
                                pairs -= tl.load(r + near_at, mask=near_inside, other=0.0)[None, :]
                        else:
                            pairs = x_log[:, None] + near_log[None, :]
                        w *= tl.exp(pairs)
                        allowed = _allowed(i, first, other, near_live, C, QUERIES)
                        w = operand(tl.where(allowed & x_live[:, None], w, 0.0), DOT, EMULATE)
                        if EXACT:
                            c = centered(near_ptr, y, near, near_live, near_scale, center, d, D, MEAN_Y)
                            c = operand(tl.where(broken(c) == 0, c, 0.0), DOT, EMULATE)
                            acc = product(w, c, acc, DOT, EMULATE)
                        else:
                            near_top = tl.load(y.top + near_at, mask=near_inside, other=0.0)
                            for j in range(parts):
                                p = j * BP + tl.arange(0, BP)
                                u = project(x_ptr, x, rows, x_live, x_scale, hi, lo, offset, p, D, DP, BD, MEAN_X, DOT,
                                            EMULATE)
                                y_u = project(near_ptr, y, near, near_live, near_scale, hi, lo, offset, p, D, DP, BD,
                                              MEAN_Y, DOT, EMULATE)
                                phi = ()
                                dphi = ()
                                for half in tl.static_range(HALVES):
                                    phi = phi + (features(u, x_top, x_live, p, P, KIND, half, EVEN),)
                                    y_phi = features(y_u, near_top, near_live, p, P, KIND, half, EVEN)
                                    y_phi = operand(tl.where(broken(y_phi) == 0, y_phi, 0.0), DOT, EMULATE)
                                    dphi = dphi + (product(w, y_phi, tl.zeros([C, BP], tl.float32), DOT, EMULATE),)
                                du, part_dots = _through(dphi, u, phi, KIND)
                                dots += part_dots
                                acc = product(operand(du, DOT, EMULATE), weights(hi, p, d, DP, EMULATE), acc, DOT, EMULATE)

            tilde = centered(x_ptr, x, rows, x_live, x_scale, center, d, D, MEAN_X)
            if NORM:
                acc += (dots if KIND == "trig" else -dots)[:, None] * tilde
            stored = inside[:, None]
            if DP != D:
                stored = stored & (d < D)[None, :]
            part = (x_token + rows)[:, None] * D + d[None, :]
            # a padded key, or a query that saw nothing, receives exactly 0
            acc = tl.where(x_live[:, None], acc, 0.0)
            temperature += tl.sum(tl.where(x_live[:, None], tilde * acc, 0.0), 1)
            if L2:
                unit = tile(x_ptr, x, rows, x_live, d, D).to(tl.float32) * (x_scale / t_root)[:, None]
                acc -= unit * tl.sum(unit * acc, 1)[:, None]
                acc *= x_scale[:, None]
            else:
                acc *= t_root
            store(dx + part, acc, stored, EMULATE)

        if CAUSAL and not FUSED:
            # the whole chunk has read the state: now it enters
            tl.debug_barrier()
            top_after = top
            for n in range(rounds * TILES):
                other = (chunk * TILES + n % TILES) * C
                near_log = tl.load(y.log + y_token + n // TILES * L + start + other + i, mask=i < length - other,
                                   other=float("-inf"))
                top_after = tl.maximum(top_after, tl.max(near_log, 0))
            kept = share(top, top_after)
            top = top_after
            for j in range(parts * EB):
                piece = j % EB                                              # k_sum goes with the first block of E
                p = j // EB * BP + tl.arange(0, BP)
                held = ()
                total = ()
                for half in tl.static_range(HALVES):
                    at, fits = _block(half * P + p, p < P, piece * BE + e, E, BE, EVEN)
                    held = held + (tl.load(kv + at, mask=fits, other=0.0) * kept,)
                    total = total + (tl.load(k_sum + half * P + p, mask=p + piece * P < P, other=0.0) * kept,)
                for n in range(rounds * TILES):
                    round = n // TILES
                    other = (chunk * TILES + n % TILES) * C
                    near = start + other + i
                    near_inside = i < length - other
                    near_at = y_token + round * L + near
                    near_log = tl.load(y.log + near_at, mask=near_inside, other=float("-inf"))
                    near_live = near_inside & (near_log != float("-inf"))
                    near_scale = tl.load(y.scale + near_at, mask=near_inside, other=0.0)
                    near_top = tl.load(y.top + near_at, mask=near_inside, other=0.0)
                    if QUERIES:
                        c = values(v_ptr, v, near, near_live, piece * BE + e, E, DOT, EMULATE)
                    else:
                        c = grads(g_ptr + round * grad.h, grad, z + q_token + round * L, near, near_live, piece * BE + e, E, DOT,
                                  EMULATE)
                        y_h = tl.load(h + near_at, mask=near_inside, other=0.0)
                    u = project(y_ptr + round * y.h, y, near, near_live, near_scale, hi, lo, offset, p, D, DP, BD, MEAN_Y, DOT,
                                EMULATE)
                    after = ()
                    total_after = ()
                    for half in tl.static_range(HALVES):
                        y_phi = features(u, near_top, near_live, p, P, KIND, half, EVEN) * share(near_log, top)[:, None]
                        into = operand(y_phi, DOT, EMULATE)
                        after = after + (product(tl.trans(into), c, held[half], DOT, EMULATE),)
                        gain = tl.sum(y_phi if QUERIES else y_phi * y_h[:, None], 0)
                        total_after = total_after + (total[half] + gain,)
                    held = after
                    total = total_after
                for half in tl.static_range(HALVES):
                    at, fits = _block(half * P + p, p < P, piece * BE + e, E, BE, EVEN)
                    tl.store(kv + at, held[half], mask=fits)
                    tl.store(k_sum + half * P + p, total[half], mask=p + piece * P < P)
        if CAUSAL:
            # the next chunk reads what this one wrote
            tl.debug_barrier()

    tl.store(d_root + pid, tl.sum(temperature, 0) / t_root)
