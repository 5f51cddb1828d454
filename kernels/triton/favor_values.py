"""FAVOR+ outputs and dv: the walk of favor_pairs.py whose result has the columns of the values."""

from __future__ import annotations

import triton
import triton.language as tl

from .favor_pairs import block_of, in_order, scores
from .favor_rows import features, grads, project, sealed, share
from .tiles import operand, product, reciprocal, span, store, values

NOTHING = tl.constexpr(2.0**-100)


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
                        pairs = scores(x_ptr, x, rows, x_live, x_scale, y_ptr, y, near, near_live, near_scale, center, D,
                                        DP, BD, QUERIES, HAS_OFFSET, DOT, EMULATE)
                        allowed = in_order(i, first, other, near_live, C, QUERIES)
                        reference = tl.maximum(reference, tl.max(tl.where(allowed, pairs, float("-inf")), 1))
                elif CAUSAL:
                    allowed = in_order(i, first, first, y_live, C, QUERIES)
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
                    at, fits = block_of(half * P + p, p < P, cols, E, BN, EVEN)
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
                        at, fits = block_of(half * P + p, p < P, cols, E, BN, EVEN)
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
                allowed = in_order(i, first, first, y_live, C, QUERIES)
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
                            pairs = scores(x_ptr, x, rows, x_live, x_scale, near_ptr, y, near, near_live, near_scale,
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
                        allowed = in_order(i, first, other, near_live, C, QUERIES)
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
                    at, fits = block_of(half * P + p, p < P, cols, E, BN, EVEN)
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
                    at, fits = block_of(half * P + p, p < P, cols, E, BN, EVEN)
                    tl.store(kv + at, held[half], mask=fits)
                    if QUERIES:
                        tl.store(k_sum + half * P + p, total[half], mask=p < P)
        if CAUSAL:
            # the next chunk reads what this one wrote
            tl.debug_barrier()
