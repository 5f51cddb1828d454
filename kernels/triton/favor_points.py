"""FAVOR+ gradients of queries and keys: the walk of favor_pairs.py that goes on from dphi to dx through the projections."""

from __future__ import annotations

import triton
import triton.language as tl

from .favor_pairs import block_of, in_order, scores
from .favor_rows import centered, features, grads, project, share, weights
from .tiles import broken, operand, product, span, store, tile, values


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
    """dq (QUERIES) or dk [B, heads, L, D], and of each program its share of d root. States as in favor_values.py."""
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
                w = operand(tl.where(in_order(i, first, first, y_live, C, QUERIES), w, 0.0), DOT, EMULATE)
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
                        at, fits = block_of(half * P + p, p < P, b * BE + e, E, BE, EVEN)
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
                            at, fits = block_of(half * P + p, p < P, b * BE + e, E, BE, EVEN)
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
                            pairs = scores(x_ptr, x, rows, x_live, x_scale, near_ptr, y, near, near_live, near_scale,
                                            center, D, DP, BD, QUERIES, HAS_OFFSET, DOT, EMULATE)
                            if QUERIES:
                                pairs -= tl.load(r + q_token + rows, mask=inside, other=0.0)[:, None]
                            else:
                                pairs -= tl.load(r + near_at, mask=near_inside, other=0.0)[None, :]
                        else:
                            pairs = x_log[:, None] + near_log[None, :]
                        w *= tl.exp(pairs)
                        allowed = in_order(i, first, other, near_live, C, QUERIES)
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
                    at, fits = block_of(half * P + p, p < P, piece * BE + e, E, BE, EVEN)
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
                    at, fits = block_of(half * P + p, p < P, piece * BE + e, E, BE, EVEN)
                    tl.store(kv + at, held[half], mask=fits)
                    tl.store(k_sum + half * P + p, total[half], mask=p + piece * P < P)
        if CAUSAL:
            # the next chunk reads what this one wrote
            tl.debug_barrier()

    tl.store(d_root + pid, tl.sum(temperature, 0) / t_root)
