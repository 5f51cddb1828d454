"""Linear attention in Triton: segment totals, a scan over the segments, and one causal product for every output.

Forward and backward are all instances of    y_i = sum_{j before i} (a_i.b_j) c_j + a_i.State,   State += b_j c_j^T

    kind   a            b            c        time       inner  outer  w_ij
    out    phi(q)       phi(k)       [v, 1]   forward    D      E      a.b
    dq     [g, h]       [v, 1]       phi(k)   forward    E      D      a.b + h_i
    dk     [v, 1]       [g, h]       phi(q)   backward   E      D      a.b + h_j
    dv     phi(k)       phi(q)       g        backward   D      E      a.b

with g = dO/z and h = -(dO.o)/z. A sequence is cut into segments: `totals` sums each, `scan` turns the sums into the state each
segment starts from, `product` walks the chunks of a segment with its slice of the state in registers. Feature maps are computed
from the raw rows at load and never stored. Not causal is the same without the walk: y_i = a_i.State.
Accumulators and states are float32; what tl.dot multiplies is bfloat16 for bfloat16 inputs, tf32 for float16 (its precision with
the range that sums of features need), float32 for float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl

from .tiles import (
    EMULATE,
    Rows,
    alive,
    broken,
    features,
    operand,
    padded,
    product,
    reciprocal,
    rows_of,
    slope,
    span,
    store,
    tile,
    values,
)

MAX_DIM = 256
FEATURES = ("elu", "relu", "identity")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCAN_BLOCK = 256
Scan = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None, int, bool], None]


class Tiles(NamedTuple):
    """Rows of a chunk, columns of a block of the inner and of the outer dim, warps of a program, pipeline stages."""

    chunk: int
    inner: int
    outer: int
    warps: int
    stages: int


# how tl.dot multiplies, inner dim up to -> tiles; chosen to compile without a spill for sm_80, sm_90 and sm_100
TILES = {
    ("bf16", 64): Tiles(32, 64, 64, 4, 3),
    ("bf16", 128): Tiles(32, 64, 64, 8, 3),
    ("bf16", 256): Tiles(32, 64, 32, 8, 2),
    ("tf32", 64): Tiles(32, 32, 32, 4, 2),
    ("tf32", 128): Tiles(32, 32, 32, 8, 2),
    ("tf32", 256): Tiles(32, 32, 32, 8, 2),
    ("ieee", 64): Tiles(16, 16, 32, 4, 1),
    ("ieee", 128): Tiles(32, 16, 32, 8, 1),
    ("ieee", 256): Tiles(32, 16, 32, 8, 1),
}


@triton.jit
def _grads(ptr, x, z, scale, rows, inside, cols, WIDTH: tl.constexpr, NORMALIZE: tl.constexpr, DOT: tl.constexpr,
           EMULATE: tl.constexpr):
    """g = dO / z, 0 where z is 0 whatever dO holds there (scale dO when not normalised)."""
    if NORMALIZE:
        z = tl.load(z + rows, mask=inside, other=0.0)
        g = tile(ptr, x, rows, inside & (z != 0.0), cols, WIDTH).to(tl.float32) * reciprocal(z)[:, None]
    else:
        g = tile(ptr, x, rows, inside, cols, WIDTH).to(tl.float32) * scale
    return operand(g, DOT, EMULATE)


@triton.jit
def _read(NAME: tl.constexpr, q, k, v, grad, q_at, k_at, v_at, grad_at, z, scale, rows, inside, live, cols,
          D: tl.constexpr, E: tl.constexpr, FEATURE: tl.constexpr, NORMALIZE: tl.constexpr, DOT: tl.constexpr,
          EMULATE: tl.constexpr):
    """Columns of phi(q), phi(k), v or g of a chunk: what a, b and c are made of."""
    if NAME == "q":
        x = features(q.ptr + q_at, q, rows, inside, cols, D, FEATURE, DOT, EMULATE)
    elif NAME == "k":
        x = features(k.ptr + k_at, k, rows, live, cols, D, FEATURE, DOT, EMULATE)
    elif NAME == "v":
        x = values(v.ptr + v_at, v, rows, live, cols, E, DOT, EMULATE)
    else:
        x = _grads(grad.ptr + grad_at, grad, z, scale, rows, inside, cols, E, NORMALIZE, DOT, EMULATE)
    return x


@triton.jit(do_not_specialize=["L", "slots", "sequences", "segment", "scale"])
def totals_kernel(x, y, z, h, mask, cu, kv, k_sum, heads, groups, L, slots, sequences, segment, scale,
                  D: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
                  QUERIES: tl.constexpr, FEATURE: tl.constexpr, NORMALIZE: tl.constexpr, HAS_MASK: tl.constexpr,
                  PACKED: tl.constexpr, DOT: tl.constexpr, EMULATE: tl.constexpr):
    """kv [B, H, slots, D, E], k_sum [B, H, slots, D]: per segment, phi(k)^T [v, 1], or phi(q)^T [g, h] over the group."""
    BLOCKS: tl.constexpr = (E + BN - 1) // BN
    PARTS: tl.constexpr = (D + BK - 1) // BK
    pid = tl.program_id(0).to(tl.int64)
    block = (pid % BLOCKS).to(tl.int32)
    part = (pid // BLOCKS % PARTS).to(tl.int32)
    slot = pid // (BLOCKS * PARTS) % slots
    row = pid // (BLOCKS * PARTS) // slots
    batch = row // heads
    start, end, sequence = span(cu, slot, L, sequences, segment, PACKED)
    if start >= end:
        return

    inner = part * BK + tl.arange(0, BK)
    cols = block * BN + tl.arange(0, BN)
    i = tl.arange(0, C)
    state = tl.zeros([BK, BN], tl.float32)
    total = tl.zeros([BK], tl.float32)
    length = (end - start).to(tl.int32)
    for chunk in range(tl.cdiv(length, C)):
        rows = start + chunk * C + i
        inside = i < length - chunk * C
        for r in range(groups):
            head = row % heads * groups + r
            x_ptr = x.ptr + batch * x.b + head * x.h
            y_ptr = y.ptr + batch * y.b + head * y.h
            if QUERIES:
                token = (batch * heads * groups + head) * L
                a = features(x_ptr, x, rows, inside, inner, D, FEATURE, DOT, EMULATE)
                b = _grads(y_ptr, y, z + token, scale, rows, inside, cols, E, NORMALIZE, DOT, EMULATE)
                if NORMALIZE:
                    weight = tl.load(h + token + rows, mask=inside, other=0.0)
                    total += tl.sum(a.to(tl.float32) * weight[:, None], 0)
            else:
                live = alive(mask, batch, L, rows, inside, HAS_MASK)
                a = features(x_ptr, x, rows, live, inner, D, FEATURE, DOT, EMULATE)
                b = values(y_ptr, y, rows, live, cols, E, DOT, EMULATE)
                total += tl.sum(a.to(tl.float32), 0)
            state = product(tl.trans(a), b, state, DOT, EMULATE)

    at = (row * slots + slot) * D
    tl.store(kv + at * E + inner[:, None] * E + cols[None, :], state, mask=(inner < D)[:, None] & (cols < E)[None, :])
    if block == 0:
        tl.store(k_sum + at + inner, total, mask=inner < D)


@triton.jit(do_not_specialize=["slots", "segment"])
def scan_kernel(kv, k_sum, kv_in, k_sum_in, kv_out, k_sum_out, cu, heads, slots, segment, D: tl.constexpr,
                E: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, HAS_STATE: tl.constexpr,
                PACKED: tl.constexpr):
    """In place, the totals of segments become the states before them (after them if reversed); the sum goes to *_out.

    One element of the state per lane, segments one after the other: base_{s+1} = base_s + total_s.
    """
    KV_BLOCKS: tl.constexpr = (D * E + BLOCK - 1) // BLOCK
    BLOCKS: tl.constexpr = KV_BLOCKS + (D + BLOCK - 1) // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    block = pid % BLOCKS
    row = pid // BLOCKS
    if PACKED:
        sequence = row // heads
        first = tl.load(cu + sequence).to(tl.int64)
        count = tl.cdiv(tl.load(cu + sequence + 1).to(tl.int64) - first, segment)
        slot = row % heads * slots + first // segment + sequence
    else:
        count = tl.zeros([], tl.int64) + slots
        slot = row * slots

    lane = tl.arange(0, BLOCK)
    if block < KV_BLOCKS:
        at = block * BLOCK + lane
        size = tl.full([], D * E, tl.int64)
        ptr = kv + at
        if HAS_STATE:
            start = kv_in + at
        final = kv_out + at
    else:
        at = (block - KV_BLOCKS) * BLOCK + lane
        size = tl.full([], D, tl.int64)
        ptr = k_sum + at
        if HAS_STATE:
            start = k_sum_in + at
        final = k_sum_out + at
    fits = at < size
    base = tl.zeros([BLOCK], tl.float32)
    if HAS_STATE:
        base = tl.load(start + row * size, mask=fits, other=0.0)
    # four totals in flight: the additions are a chain, the loads need not be
    for s in range(0, count, 4):
        here = slot + (count - 1 - s if REVERSE else s)
        step = -size if REVERSE else size
        p = ptr + here * size
        fits1 = at < tl.where(s + 1 < count, size, 0)
        fits2 = at < tl.where(s + 2 < count, size, 0)
        fits3 = at < tl.where(s + 3 < count, size, 0)
        t0 = tl.load(p, mask=fits, other=0.0)
        t1 = tl.load(p + step, mask=fits1, other=0.0)
        t2 = tl.load(p + 2 * step, mask=fits2, other=0.0)
        t3 = tl.load(p + 3 * step, mask=fits3, other=0.0)
        tl.store(p, base, mask=fits)
        base += t0
        tl.store(p + step, base, mask=fits1)
        base += t1
        tl.store(p + 2 * step, base, mask=fits2)
        base += t2
        tl.store(p + 3 * step, base, mask=fits3)
        base += t3
    tl.store(final + row * size, base, mask=fits)


@triton.jit(do_not_specialize=["L"])
def weight_kernel(grad, out, z, h, heads, L, E: tl.constexpr, BE: tl.constexpr, C: tl.constexpr):
    """h_i = -(dO_i.o_i) / z_i   [B, H, L]"""
    pid = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(L, C)
    row = pid // chunks
    rows = pid % chunks * C + tl.arange(0, C)
    inside = rows < L
    cols = tl.arange(0, BE)
    norm = tl.load(z + row * L + rows, mask=inside, other=0.0)
    live = inside & (norm != 0.0)
    d = tile(grad.ptr + row // heads * grad.b + row % heads * grad.h, grad, rows, live, cols, E).to(tl.float32)
    o = tile(out.ptr + row // heads * out.b + row % heads * out.h, out, rows, live, cols, E).to(tl.float32)
    tl.store(h + row * L + rows, -tl.sum(d * o, 1) * reciprocal(norm), mask=inside)


@triton.jit
def _block(j: tl.constexpr, cols, E: tl.constexpr, BK: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr,
           OVER_D: tl.constexpr):
    """Block j of the inner dim: its columns, where it lies in a state [D, E], and whether it does."""
    inner = j * BK + tl.arange(0, BK)
    if OVER_D:
        at = inner[:, None] * E + cols[None, :]
    else:
        at = cols[None, :] * E + inner[:, None]
    return inner, at, (inner < INNER)[:, None] & (cols < OUTER)[None, :]


@triton.jit(do_not_specialize=["L", "slots", "sequences", "segment", "scale"])
def product_kernel(q, k, v, grad, z, h, mask, cu, kv, k_sum, y, kv_out, k_sum_out, heads, groups, L, slots, sequences,
                   segment, scale, D: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
                   BN: tl.constexpr, KIND: tl.constexpr, FEATURE: tl.constexpr, CAUSAL: tl.constexpr,
                   NORMALIZE: tl.constexpr, HAS_STATE: tl.constexpr, STORE_STATE: tl.constexpr,
                   HAS_MASK: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr,
                   EMULATE: tl.constexpr):
    """y [B, heads, L, outer] of one kind, from the states [B, H, slots, D, E] its segments start from.

    Not causal, there is one state per sequence: [sequences or B, H, D, E]. STORE_STATE: the state after a sole segment.
    The state is held as [inner, outer] in blocks of the inner dim.
    """
    OVER_D: tl.constexpr = KIND == "out" or KIND == "dv"
    QUERIES: tl.constexpr = KIND == "out" or KIND == "dq"
    A: tl.constexpr = "q" if KIND == "out" else ("grad" if KIND == "dq" else ("v" if KIND == "dk" else "k"))
    B: tl.constexpr = "k" if KIND == "out" else ("v" if KIND == "dq" else ("grad" if KIND == "dk" else "q"))
    CC: tl.constexpr = "v" if KIND == "out" else ("k" if KIND == "dq" else ("q" if KIND == "dk" else "grad"))
    INNER: tl.constexpr = D if OVER_D else E
    OUTER: tl.constexpr = E if OVER_D else D
    PARTS: tl.constexpr = (INNER + BK - 1) // BK
    BLOCKS: tl.constexpr = (OUTER + BN - 1) // BN
    pid = tl.program_id(0).to(tl.int64)
    block = (pid % BLOCKS).to(tl.int32)
    slot = pid // BLOCKS % slots
    row = pid // BLOCKS // slots
    batch = row // heads
    start, end, sequence = span(cu, slot, L, sequences, segment, PACKED)
    if start >= end:
        return

    # a row of y belongs to a query head (out, dq), or to a key head whose group of query heads it sums over (dk, dv)
    if QUERIES:
        q_head = row % heads
        k_head = q_head // groups
        k_heads = heads // groups
        token = row * L
        rounds = 1
    else:
        k_head = row % heads
        q_head = k_head * groups
        k_heads = heads
        token = row * groups * L
        rounds = groups
    q_at = batch * q.b + q_head * q.h
    k_at = batch * k.b + k_head * k.h
    v_at = batch * v.b + k_head * v.h
    grad_at = batch * grad.b + q_head * grad.h
    y += row * L * OUTER
    cols = block * BN + tl.arange(0, BN)
    i = tl.arange(0, C)

    state_row = batch * k_heads + k_head
    base = state_row * slots + slot if CAUSAL else sequence * k_heads + state_row
    state = ()
    # sums of phi(k) (out: a tuple over the inner dim; dq: over the outer) or of h phi(q) (dk)
    total = () if OVER_D else tl.zeros([BN], tl.float32)
    if HAS_STATE and not OVER_D:
        total = tl.load(k_sum + base * D + cols, mask=cols < D, other=0.0)
    for j in tl.static_range(PARTS):
        inner, at, fits = _block(j, cols, E, BK, INNER, OUTER, OVER_D)
        if HAS_STATE:
            state = state + (tl.load(kv + base * (D * E) + at, mask=fits, other=0.0),)
        else:
            state = state + (tl.zeros([BK, BN], tl.float32),)
        if KIND == "out":
            if HAS_STATE:
                total = total + (tl.load(k_sum + base * D + inner, mask=inner < D, other=0.0),)
            else:
                total = total + (tl.zeros([BK], tl.float32),)

    length = (end - start).to(tl.int32)
    chunks = tl.cdiv(length, C)
    for step in range(chunks):
        chunk = step if QUERIES else chunks - 1 - step
        rows = start + chunk * C + i
        # in 32 bits on purpose: a wide number per column of a tile costs more registers than the tile
        inside = i < length - chunk * C
        live = alive(mask, batch, L, rows, inside, HAS_MASK)

        acc = tl.zeros([C, BN], tl.float32)
        norm = tl.zeros([C], tl.float32)
        for j in tl.static_range(PARTS):
            a = _read(A, q, k, v, grad, q_at, k_at, v_at, grad_at, z + token, scale, rows, inside, live,
                      j * BK + tl.arange(0, BK), D, E, FEATURE, NORMALIZE, DOT, EMULATE)
            acc = product(a, operand(state[j], DOT, EMULATE), acc, DOT, EMULATE)         # [C, outer]
            if KIND == "out" and NORMALIZE:
                norm += tl.sum(a.to(tl.float32) * total[j][None, :], 1)
        if KIND == "dq" and NORMALIZE:
            weight = tl.load(h + token + rows, mask=inside, other=0.0)                   # [C]
            acc += weight[:, None] * total[None, :]
        elif KIND == "dk":
            acc += total[None, :]

        if CAUSAL:
            for r in range(rounds):
                w = tl.zeros([C, C], tl.float32)
                # a loop at run time where there are many blocks, so that one at a time is in registers; a sole block is
                # read once for all its uses
                for j in range(PARTS):
                    inner = j * BK + tl.arange(0, BK)
                    a = _read(A, q, k, v, grad, q_at, k_at, v_at, grad_at, z + token, scale, rows, inside, live, inner, D,
                              E, FEATURE, NORMALIZE, DOT, EMULATE)
                    b = _read(B, q, k, v, grad, q_at + r * q.h, k_at, v_at, grad_at + r * grad.h, z + token + r * L, scale,
                              rows, inside, live, inner, D, E, FEATURE, NORMALIZE, DOT, EMULATE)
                    w = product(a, tl.trans(b), w, DOT, EMULATE)
                if KIND == "dq" and NORMALIZE:
                    w += weight[:, None]
                elif KIND == "dk" and NORMALIZE:
                    weight = tl.load(h + token + r * L + rows, mask=inside, other=0.0)
                    w += weight[None, :]
                # padded keys are 0 in b and c. `inside` only makes the comparison change from chunk to chunk: a constant
                # one would be kept in registers, one per element
                if QUERIES:
                    allowed = i[:, None] >= tl.where(inside, i, C)[None, :]
                else:
                    allowed = i[:, None] <= tl.where(inside, i, -1)[None, :]
                w = operand(tl.where(allowed, w, 0.0), DOT, EMULATE)
                if KIND == "out" and NORMALIZE:
                    norm += tl.sum(w.to(tl.float32), 1)

                c = _read(CC, q, k, v, grad, q_at + r * q.h, k_at, v_at, grad_at + r * grad.h, z + token + r * L, scale,
                          rows, inside, live, cols, D, E, FEATURE, NORMALIZE, DOT, EMULATE)
                if KIND == "dq":
                    total += tl.sum(c.to(tl.float32), 0)
                elif KIND == "dk" and NORMALIZE:
                    total += tl.sum(weight[:, None] * c.to(tl.float32), 0)
                # 0 times a NaN of the future is NaN: what is not finite is left out here and put in after the walk
                clean = tl.where(broken(c.to(tl.float32)) == 0, c, 0.0)
                acc = product(w, clean, acc, DOT, EMULATE)
                after = ()
                total_after = ()
                for j in tl.static_range(PARTS):
                    inner = j * BK + tl.arange(0, BK)
                    b = _read(B, q, k, v, grad, q_at + r * q.h, k_at, v_at, grad_at + r * grad.h, z + token + r * L, scale,
                              rows, inside, live, inner, D, E, FEATURE, NORMALIZE, DOT, EMULATE)
                    after = after + (product(tl.trans(b), c, state[j], DOT, EMULATE),)
                    if KIND == "out":
                        total_after = total_after + (total[j] + tl.sum(b.to(tl.float32), 0),)
                state = after
                if KIND == "out":
                    total = total_after

        if KIND == "out":
            if NORMALIZE:
                tl.store(z + token + rows, norm, mask=inside)
                acc *= reciprocal(norm)[:, None]
            else:
                acc *= scale
        elif KIND == "dq":
            acc *= slope(q.ptr + q_at, q, rows, inside, cols, D, FEATURE)
        elif KIND == "dk":
            acc *= slope(k.ptr + k_at, k, rows, inside, cols, D, FEATURE)
        if HAS_MASK and not QUERIES:
            acc = tl.where(live[:, None], acc, 0.0)
        stored = inside[:, None]
        if OUTER % BN != 0:
            stored = stored & (cols < OUTER)[None, :]
        store(y + rows[:, None] * OUTER + cols[None, :], acc, stored, EMULATE)

    if STORE_STATE and (not QUERIES or q_head % groups == 0):
        for j in tl.static_range(PARTS):
            inner, at, fits = _block(j, cols, E, BK, INNER, OUTER, OVER_D)
            if KIND == "out" or KIND == "dv":
                tl.store(kv_out + state_row * (D * E) + at, state[j], mask=fits)
            if KIND == "out" and block == 0:
                tl.store(k_sum_out + state_row * D + inner, total[j], mask=inner < D)
        if KIND == "dk":
            tl.store(k_sum_out + state_row * D + cols, total, mask=cols < D)

    # whatever is not finite in c reaches the state, so a finite state has nothing to put right
    wrong = tl.zeros([], tl.int32)
    for j in tl.static_range(PARTS):
        wrong += tl.max(tl.max(broken(state[j]), 1), 0)
    if wrong != 0:
        # orders the stores of the walk before those that follow
        tl.debug_barrier()
        for chunk in range(chunks):
            rows = start + chunk * C + i
            inside = i < length - chunk * C
            live = alive(mask, batch, L, rows, inside, HAS_MASK)
            hit = tl.zeros([C, BN], tl.int32)
            if CAUSAL:
                for r in range(rounds):
                    c = _read(CC, q, k, v, grad, q_at + r * q.h, k_at, v_at, grad_at + r * grad.h, z + token + r * L,
                              scale, rows, inside, live, cols, D, E, FEATURE, NORMALIZE, DOT, EMULATE)
                    bad = broken(c.to(tl.float32)) != 0
                    if QUERIES:
                        first = tl.min(tl.where(bad, i[:, None], C), 0)                  # [outer]
                        hit = tl.where(i[:, None] >= first[None, :], 1, hit)
                    else:
                        last = tl.max(tl.where(bad, i[:, None], -1), 0)
                        hit = tl.where(i[:, None] <= last[None, :], 1, hit)
            value = tl.full([C, BN], float("nan"), tl.float32)
            stored = inside[:, None] & (cols < OUTER)[None, :]
            if QUERIES and NORMALIZE:
                # a query that sees no key has output and gradient 0 whatever the state holds
                empty = (tl.load(z + token + rows, mask=inside, other=0.0) == 0.0)[:, None]
                value = tl.where(empty, 0.0, value)
                stored = stored & (empty | (hit != 0))
            elif QUERIES:
                stored = stored & (hit != 0)
            else:
                stored = stored & live[:, None] & (hit != 0)
            store(y + rows[:, None] * OUTER + cols[None, :], value, stored, EMULATE)


def refuses(q: Tensor, k: Tensor, v: Tensor, *, feature: str = "elu") -> str | None:
    """Why these kernels do not take the inputs, in a sentence, or None."""
    if not EMULATE and q.device.type != "cuda":
        return f"Triton needs a CUDA device, got {q.device}"
    if q.device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(q.device)
        return f"compute capability {major}.{minor} is below 8.0"
    if q.dtype not in DTYPES:
        return f"{str(q.dtype).removeprefix('torch.')} is not float32, bfloat16 or float16"
    if q.shape[-1] > MAX_DIM or v.shape[-1] > MAX_DIM:
        name, dim = ("head_dim", q.shape[-1]) if q.shape[-1] > MAX_DIM else ("value dim", v.shape[-1])
        return f"{name} {dim} is above {MAX_DIM}"
    if feature not in FEATURES:
        return f"feature map {feature!r} is not one of {', '.join(FEATURES)}"
    return None


class _Call:
    """What the launches of one forward or backward share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, feature: str,
                 is_causal: bool, normalize: bool, scale: float, segment: int) -> None:
        self.B, self.Hq, self.L, self.D = q.shape
        self.H, self.S, self.E = v.shape[1:]
        self.q, self.k, self.v = rows_of(q), rows_of(k), rows_of(v)
        self.device, self.segment, self.scale = q.device, segment, scale
        self.packed, self.causal, self.normalize = cu_seqlens is not None, is_causal, normalize
        self.sequences = cu_seqlens.numel() - 1 if self.packed else self.B
        self.cu = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.mask = None if mask is None else mask.contiguous().view(torch.uint8)
        ieee = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
        self.dot = "bf16" if q.dtype == torch.bfloat16 else "ieee" if ieee else "tf32"
        self.flags = {"D": self.D, "E": self.E, "FEATURE": feature, "NORMALIZE": normalize, "PACKED": self.packed,
                      "DOT": self.dot, "EMULATE": EMULATE}

    def guard(self):
        """Triton launches on the current device, which need not be that of the inputs."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def slots(self, length: int) -> int:
        """How many segments the tokens are cut into; packed, an upper bound that needs no look at the device."""
        return length // self.segment + self.sequences if self.packed else triton.cdiv(length, self.segment)

    def options(self, inner: int, outer: int) -> dict[str, Any]:
        tiles = TILES[self.dot, min(width for dot, width in TILES if dot == self.dot and inner <= width)]
        return self.flags | {"C": tiles.chunk, "BK": min(tiles.inner, padded(inner)),
                             "BN": min(tiles.outer, padded(outer)), "num_warps": tiles.warps,
                             "num_stages": tiles.stages, "enable_fp_fusion": True}

    def state(self, *lead: int) -> tuple[Tensor, Tensor]:
        """-> kv [*lead, D, E], k_sum [*lead, D]; slots of packed sequences may stay unused and are zeros."""
        new = torch.zeros if self.packed and len(lead) == 3 else torch.empty
        return (new(*lead, self.D, self.E, dtype=torch.float32, device=self.device),
                new(*lead, self.D, dtype=torch.float32, device=self.device))

    def totals(self, x: Rows, y: Rows, length: int, queries: bool, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        slots = self.slots(length)
        kv, k_sum = self.state(self.B, self.H, slots)                           # [B, H, NS, D, E], [B, H, NS, D]
        options = self.options(self.D, self.E)
        groups = self.Hq // self.H if queries else 1
        parts = triton.cdiv(self.D, options["BK"]) * triton.cdiv(self.E, options["BN"])
        programs = self.B * self.H * slots * parts
        if programs:
            totals_kernel[(programs,)](x, y, z, h, self.mask, self.cu, kv, k_sum, self.H, groups, length, slots,
                                       self.sequences, self.segment, self.scale, QUERIES=queries,
                                       HAS_MASK=self.mask is not None and not queries, **options)
        return kv, k_sum

    def scan(self, kv: Tensor, k_sum: Tensor, kv_in: Tensor | None, k_sum_in: Tensor | None, reverse: bool,
             scan: Scan | None) -> tuple[Tensor, Tensor]:
        """Turns totals into the states before them, in place. -> the state after all of them."""
        kv_out, k_sum_out = self.state(self.sequences, self.H)
        if scan is not None:
            scan(kv, k_sum, kv_in, k_sum_in, kv_out, k_sum_out, self.cu, self.segment, reverse)
            return kv_out, k_sum_out
        blocks = triton.cdiv(self.D * self.E, SCAN_BLOCK) + triton.cdiv(self.D, SCAN_BLOCK)
        if self.sequences * self.H:
            scan_kernel[(self.sequences * self.H * blocks,)](
                kv, k_sum, kv_in, k_sum_in, kv_out, k_sum_out, self.cu, self.H, kv.shape[2], self.segment, D=self.D,
                E=self.E, BLOCK=SCAN_BLOCK, REVERSE=reverse, HAS_STATE=kv_in is not None, PACKED=self.packed,
                num_warps=4, enable_fp_fusion=True)
        return kv_out, k_sum_out

    def product(self, kind: str, kv: Tensor | None, k_sum: Tensor | None, y: Tensor, grad: Rows, z: Tensor, h: Tensor,
                final: tuple[Tensor, Tensor] | None = None) -> None:
        heads, length = y.shape[1:3]
        queries = kind in ("out", "dq")
        slots = self.slots(length)
        inner, outer = (self.D, self.E) if kind in ("out", "dv") else (self.E, self.D)
        options = self.options(inner, outer)
        programs = self.B * heads * slots * triton.cdiv(outer, options["BN"])
        if programs:
            product_kernel[(programs,)](
                self.q, self.k, self.v, grad, z, h, self.mask, self.cu, kv, k_sum, y, *(final or (None, None)), heads,
                self.Hq // self.H, length, slots, self.sequences, self.segment, self.scale, KIND=kind,
                CAUSAL=self.causal, HAS_STATE=kv is not None, STORE_STATE=final is not None,
                HAS_MASK=self.mask is not None and (self.causal or not queries), **options)


def forward(
    q: Tensor,                                 # [B, Hq, L, D]
    k: Tensor,                                 # [B, H, S, D]
    v: Tensor,                                 # [B, H, S, E]
    mask: Tensor | None,                       # [B, S], True = padded
    cu_seqlens: Tensor | None,                 # [N+1] int32
    kv: Tensor | None,                         # [B or N, H, D, E] float32
    k_sum: Tensor | None,                      # [B or N, H, D] float32
    *,
    feature: str,
    is_causal: bool,
    normalize: bool,
    scale: float,
    segment: int,
    save_segments: bool,
    scan: Scan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> out [B, Hq, L, E], normalizer [B, Hq, L], segment_kv [B, H, NS, D, E], segment_k_sum [B, H, NS, D], kv, k_sum

    normalizer is empty when not normalised, the segment states are when not saved. Not causal, NS counts sequences.
    scan(kv, k_sum, kv_in, k_sum_in, kv_out, k_sum_out, cu_seqlens, segment, reverse) stands in for the scan kernel.
    """
    call = _Call(q, k, v, mask, cu_seqlens, feature, is_causal, normalize, scale, segment)
    if kv is not None:
        kv, k_sum = kv.contiguous(), k_sum.contiguous()
    out = torch.empty(call.B, call.Hq, call.L, call.E, dtype=q.dtype, device=q.device)
    z = torch.empty((call.B, call.Hq, call.L) if normalize else (0,), dtype=torch.float32, device=q.device)
    with call.guard():
        if is_causal and not call.packed and call.slots(call.L) == 1:
            # a sole segment starts from the incoming state and ends in the outgoing one: one launch
            final = call.state(call.B, call.H)
            call.product("out", kv, k_sum, out, call.v, z, z, final)
            segments = call.state(call.B, call.H, 1)
            for saved, given in zip(segments, (kv, k_sum)):
                saved.zero_() if given is None else saved.copy_(given.unsqueeze(2))
        else:
            segments = call.totals(call.k, call.v, call.S, False, z, z)
            final = call.scan(*segments, kv, k_sum, False, scan)
            call.product("out", *(segments if is_causal else final), out, call.v, z, z)
            if not is_causal and save_segments:
                segments = tuple(x.unflatten(0, (call.B, call.sequences if call.packed else 1)).transpose(1, 2).clone() for x in final)
    if not save_segments:
        segments = (z.new_empty(0), z.new_empty(0))
    return out, z, *segments, *final


def backward(
    grad_out: Tensor,                          # [B, Hq, L, E]
    grad_kv: Tensor | None,                    # [B or N, H, D, E]
    grad_k_sum: Tensor | None,                 # [B or N, H, D]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kv: Tensor | None,
    k_sum: Tensor | None,
    out: Tensor,
    normalizer: Tensor,
    segment_kv: Tensor,
    segment_k_sum: Tensor,
    *,
    feature: str,
    is_causal: bool,
    normalize: bool,
    scale: float,
    segment: int,
    scan: Scan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> dq [B, Hq, L, D], dk [B, H, S, D], dv [B, H, S, E], dkv, dk_sum (empty without an incoming state)"""
    call = _Call(q, k, v, mask, cu_seqlens, feature, is_causal, normalize, scale, segment)
    if grad_kv is not None:
        grad_kv, grad_k_sum = grad_kv.contiguous(), grad_k_sum.contiguous()
    grad = rows_of(grad_out)
    h = torch.empty_like(normalizer)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    with call.guard():
        if normalize and h.numel():
            chunk = 32
            weight_kernel[(call.B * call.Hq * triton.cdiv(call.L, chunk),)](
                grad, rows_of(out), normalizer, h, call.Hq, call.L, E=call.E, BE=padded(call.E), C=chunk, num_warps=4,
                enable_fp_fusion=True)
        if is_causal and not call.packed and call.slots(call.L) == 1:
            final = call.state(call.B, call.H) if kv is not None else None
            after = grad_kv, grad_k_sum
            before = segment_kv, segment_k_sum
        else:
            after = call.totals(call.q, grad, call.L, True, normalizer, h)
            state = call.scan(*after, grad_kv, grad_k_sum, is_causal, scan)
            before = segment_kv, segment_k_sum
            if not is_causal:
                after = state
                before = tuple(x.transpose(1, 2).flatten(0, 1).contiguous() for x in before)
            final = None
        call.product("dq", *before, dq, grad, normalizer, h)
        call.product("dk", *after, dk, grad, normalizer, h, final)
        call.product("dv", *after, dv, grad, normalizer, h, final)
    if kv is None:
        state = (h.new_empty(0), h.new_empty(0))
    elif final is not None:
        state = final
    return dq, dk, dv, *state
