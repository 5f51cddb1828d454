"""FAVOR+ rows at load: projections, features, and the numbers of each row that have to be known before its features.

With t = temperature^-1/2 and x~ = t (x / |x| - mean) the projections are u = W x~ = s (W x) - W (t mean), s = t / |x|: W meets
the rows as they lie in memory. bfloat16 and float16 rows are exact operands of tl.dot but W is not, and an error of u is a
relative error of exp(u): W is therefore multiplied in two parts, hi + lo, which keep 16 (bfloat16) or 22 (tf32) bits of it.
Features are never stored: one pass of `rows_kernel` leaves three floats a row, and every later kernel can then compute any
block of features by itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tiles import alive, broken, nearest, operand, product, reciprocal, tile, values


class Points(NamedTuple):
    """Queries or keys [B, H, L, D] with their strides, and what `rows_kernel` found of them: [B, H, L] each."""

    ptr: Any
    b: Any
    h: Any
    l: Any  # noqa: E741
    d: Any
    scale: Any                                 # s: u = s (W x) - offset
    top: Any                                   # the largest u (|u| if hyperbolic)
    log: Any                                   # weights of pairs are exp(log of the query + log of the key); -inf: no weight


@triton.jit
def split_kernel(w, mean, root, hi, lo, offset, center, P, D, size, DP: tl.constexpr, BLOCK: tl.constexpr,
                 HAS_MEAN: tl.constexpr, DOT: tl.constexpr, EMULATE: tl.constexpr):
    """hi + lo = W, padded with zeros to [size, DP]; offset = W (t mean) [H, size], center = t mean [H, DP]."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(size, BLOCK)
    p = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DP)
    part = tl.load(w + p[:, None] * D + d[None, :], mask=(p < P)[:, None] & (d < D)[None, :], other=0.0)
    at = p[:, None] * DP + d[None, :]
    if pid < blocks:
        fits = (p < size)[:, None] & (d < DP)[None, :]
        if DOT == "bf16":
            high = nearest(part, 16)
            low = nearest(part - high, 16)
        elif DOT == "tf32":
            high = nearest(part, 13)
            low = nearest(part - high, 13)
        else:
            high = part
        tl.store(hi + at, high.to(hi.dtype.element_ty), mask=fits)
        if DOT != "ieee":
            tl.store(lo + at, low.to(lo.dtype.element_ty), mask=fits)
    if HAS_MEAN:
        head = (pid // blocks).to(tl.int64)
        middle = tl.load(mean + head * D + d, mask=d < D, other=0.0) * tl.load(root)
        tl.store(offset + head * size + p, tl.sum(part * middle[None, :], 1), mask=p < size)
        if pid % blocks == 0:
            tl.store(center + head * DP + d, middle)


@triton.jit
def weights(ptr, rows, cols, WIDTH: tl.constexpr, EMULATE: tl.constexpr):
    """A block of padded W as an operand."""
    part = tl.load(ptr + rows[:, None] * WIDTH + cols[None, :])
    if EMULATE:
        part = part.to(tl.float32)
    return part


@triton.jit
def project(ptr, x, rows, live, scale, hi, lo, offset, p, D: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr,
            HAS_OFFSET: tl.constexpr, DOT: tl.constexpr, EMULATE: tl.constexpr):
    """u [rows, p] of one head."""
    u = tl.zeros([rows.shape[0], p.shape[0]], tl.float32)
    for block in range(DP // BD):
        d = block * BD + tl.arange(0, BD)
        raw = values(ptr, x, rows, live, d, D, DOT, EMULATE)
        u = product(raw, tl.trans(weights(hi, p, d, DP, EMULATE)), u, DOT, EMULATE)
        if DOT != "ieee":
            u = product(raw, tl.trans(weights(lo, p, d, DP, EMULATE)), u, DOT, EMULATE)
    u *= scale[:, None]
    if HAS_OFFSET:
        u -= tl.load(offset + p)[None, :]
    return u


@triton.jit
def features(u, top, live, p, P, KIND: tl.constexpr, HALF: tl.constexpr, EVEN: tl.constexpr):
    """phi of a block of projections (paired kinds: one of its halves), exactly 0 where dead or beyond the last."""
    if KIND == "positive":
        phi = tl.exp(u - top[:, None])
    elif KIND == "hyperbolic":
        phi = tl.exp((-u if HALF else u) - top[:, None])
    elif KIND == "relu":
        # the comparison keeps NaN
        phi = tl.where(u < 0, 0.0, u) + 1e-3
    else:
        phi = tl.cos(u) if HALF else tl.sin(u)
    keep = live[:, None]
    if not EVEN:
        keep = keep & (p < P)[None, :]
    return tl.where(keep, phi, 0.0)


@triton.jit
def share(log, reference):
    """exp(log - reference), 0 where log is -inf."""
    return tl.where(log == float("-inf"), 0.0, tl.exp(log - reference))


@triton.jit
def sealed(c):
    """c with 0 for what is not finite, and which rows that was: 0 times a NaN of the future is NaN."""
    bad = broken(c.to(tl.float32))
    return tl.where(bad == 0, c, 0.0).to(c.dtype), tl.max(bad, 1)


@triton.jit
def row_scale(ptr, x, rows, live, d, t, D: tl.constexpr, L2: tl.constexpr):
    """s of the rows: t, with L2 over their length; d are all columns."""
    scale = tl.zeros([rows.shape[0]], tl.float32) + t
    if L2:
        # the largest component first: its square must neither overflow nor vanish
        raw = tile(ptr, x, rows, live, d, D).to(tl.float32)
        largest = tl.max(tl.abs(raw), 1)
        unit = raw * reciprocal(largest)[:, None]
        scale = t * reciprocal(largest * tl.sqrt_rn(tl.sum(unit * unit, 1)))
    return scale


@triton.jit
def centered(ptr, x, rows, live, scale, center, d, D: tl.constexpr, HAS_OFFSET: tl.constexpr):
    """x~ [rows, d] in float32."""
    raw = tile(ptr, x, rows, live, d, D).to(tl.float32) * scale[:, None]
    if HAS_OFFSET:
        raw -= tl.load(center + d)[None, :]
    return raw


@triton.jit
def grads(ptr, x, z, rows, inside, cols, WIDTH: tl.constexpr, DOT: tl.constexpr, EMULATE: tl.constexpr):
    """g = dO / z, 0 where z is 0 whatever dO holds there."""
    z = tl.load(z + rows, mask=inside, other=0.0)
    g = tile(ptr, x, rows, inside & (z != 0.0), cols, WIDTH).to(tl.float32) * reciprocal(z)[:, None]
    return operand(g, DOT, EMULATE)


@triton.jit(do_not_specialize=["L", "shift"])
def rows_kernel(x, mask, root, hi, lo, offset, center, heads, L, P, size, shift, D: tl.constexpr, DP: tl.constexpr,
                BD: tl.constexpr, C: tl.constexpr, BP: tl.constexpr, KIND: tl.constexpr, L2: tl.constexpr,
                HAS_OFFSET: tl.constexpr, HAS_MASK: tl.constexpr, DOT: tl.constexpr, EMULATE: tl.constexpr):
    """scale, top and log = a - shift of every row, [B, heads, L] each; log = -inf for a padded key."""
    pid = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(L, C)
    row = pid // chunks
    batch = row // heads
    head = row % heads
    ptr = x.ptr + batch * x.b + head * x.h
    rows = pid % chunks * C + tl.arange(0, C)
    inside = rows < L
    live = alive(mask, batch, L, rows, inside, HAS_MASK)
    d = tl.arange(0, DP)
    t = tl.load(root)
    if HAS_OFFSET:
        offset += head * size
        center += head * DP

    scale = row_scale(ptr, x, rows, live, d, t, D, L2)
    near = centered(ptr, x, rows, live, scale, center, d, D, HAS_OFFSET)
    # a row that is not finite must not pass for one of no weight
    log = tl.where(broken(tl.sum(tl.abs(near), 1)) != 0, float("nan"), 0.0)
    if KIND != "relu":
        log += tl.sum(near * near, 1) * (0.5 if KIND == "trig" else -0.5)

    top = tl.zeros([C], tl.float32)
    if KIND == "positive" or KIND == "hyperbolic":
        top = tl.full([C], float("-inf"), tl.float32)
        for block in range(tl.cdiv(P, BP)):
            p = block * BP + tl.arange(0, BP)
            u = project(ptr, x, rows, live, scale, hi, lo, offset, p, D, DP, BD, HAS_OFFSET, DOT, EMULATE)
            if KIND == "hyperbolic":
                u = tl.abs(u)
            top = tl.maximum(top, tl.max(tl.where((p < P)[None, :], u, float("-inf")), 1))
        # a sum, so that NaN stays
        log += top
    log = tl.where(live, log - shift, float("-inf"))
    at = row * L + rows
    tl.store(x.scale + at, scale, mask=inside)
    tl.store(x.top + at, top, mask=inside)
    tl.store(x.log + at, log, mask=inside)


@triton.jit(do_not_specialize=["L"])
def weight_kernel(grad, out, z, r, log, h, heads, L, E: tl.constexpr, BE: tl.constexpr, C: tl.constexpr,
                  EXACT: tl.constexpr):
    """h_i = -(dO_i.o_i) / z_i and, in place, log_i = [b_i] - r_i, -inf for a query that saw nothing   [B, heads, L]"""
    pid = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(L, C)
    row = pid // chunks
    rows = pid % chunks * C + tl.arange(0, C)
    inside = rows < L
    cols = tl.arange(0, BE)
    at = row * L + rows
    norm = tl.load(z + at, mask=inside, other=0.0)
    live = inside & (norm != 0.0)
    d = tile(grad.ptr + row // heads * grad.b + row % heads * grad.h, grad, rows, live, cols, E).to(tl.float32)
    o = tile(out.ptr + row // heads * out.b + row % heads * out.h, out, rows, live, cols, E).to(tl.float32)
    tl.store(h + at, -tl.sum(d * o, 1) * reciprocal(norm), mask=inside)
    reference = -tl.load(r + at, mask=inside, other=0.0)
    if EXACT:
        reference += tl.load(log + at, mask=inside, other=0.0)
    tl.store(log + at, tl.where(live, reference, float("-inf")), mask=inside)
