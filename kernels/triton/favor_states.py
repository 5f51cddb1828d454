"""FAVOR+ states: sums of features over segments, in units of exp(their largest logarithm), and the scan over segments.

A state is (kv [M, E], k_sum [M], log): sums of exp(log_j - log) phi_j [y_j, 1] over rows j. Keys bring log_j = a_j and y = v.
Backwards, queries bring log_i = -r_i (plus b_i with an exact diagonal) and [y, 1] = [g, h]; a pair then weighs
exp(log_i + log_j) <= 1, whichever side sits in the state. Two states merge at the larger of their logs, which is associative.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .favor_rows import features, grads, project, share
from .tiles import operand, product, span, values


@triton.jit(do_not_specialize=["L", "slots", "sequences", "segment"])
def totals_kernel(x, y, z, h, cu, hi, lo, offset, kv, k_sum, log, heads, groups, L, slots, sequences, segment, P, size,
                  D: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
                  BP: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr, QUERIES: tl.constexpr, KIND: tl.constexpr,
                  HAS_OFFSET: tl.constexpr, EVEN: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr,
                  EMULATE: tl.constexpr):
    """kv [B, H, slots, M, E], k_sum [B, H, slots, M], log [B, H, slots] of each segment's keys, or of its queries over
    the group."""
    HALVES: tl.constexpr = 2 if KIND == "hyperbolic" or KIND == "trig" else 1
    BLOCKS: tl.constexpr = (E + BN - 1) // BN
    parts = tl.cdiv(P, BP)
    pid = tl.program_id(0).to(tl.int64)
    block = (pid % BLOCKS).to(tl.int32)
    part = (pid // BLOCKS % parts).to(tl.int32)
    slot = pid // (BLOCKS * parts) % slots
    row = pid // (BLOCKS * parts) // slots
    batch = row // heads
    start, end, sequence = span(cu, slot, L, sequences, segment, PACKED)
    if start >= end:
        return
    at = row * slots + slot
    length = (end - start).to(tl.int32)
    first = row % heads * groups
    token = (batch * heads * groups + first) * L

    # the largest logarithm first: then no sum is ever rescaled
    top = tl.full([], float("-inf"), tl.float32)
    for r in range(groups):
        for s in range(0, length, WIDE):
            wide = s + tl.arange(0, WIDE)
            some = tl.load(x.log + token + r * L + start + wide, mask=wide < length, other=float("-inf"))
            top = tl.maximum(top, tl.max(some, 0))
    if HAS_OFFSET:
        offset += first * size
    p = part * BP + tl.arange(0, BP)
    cols = block * BN + tl.arange(0, BN)
    i = tl.arange(0, C)
    state = ()
    total = ()
    for _ in tl.static_range(HALVES):
        state = state + (tl.zeros([BP, BN], tl.float32),)
        total = total + (tl.zeros([BP], tl.float32),)
    for chunk in range(tl.cdiv(length, C)):
        rows = start + chunk * C + i
        inside = i < length - chunk * C
        for r in range(groups):
            at_x = token + r * L + rows
            logs = tl.load(x.log + at_x, mask=inside, other=float("-inf"))
            live = inside & (logs != float("-inf"))
            scale = tl.load(x.scale + at_x, mask=inside, other=0.0)
            peak = tl.load(x.top + at_x, mask=inside, other=0.0)
            u = project(x.ptr + batch * x.b + (first + r) * x.h, x, rows, live, scale, hi, lo, offset, p, D, DP, BD,
                        HAS_OFFSET, DOT, EMULATE)
            y_ptr = y.ptr + batch * y.b + (first + r) * y.h
            if QUERIES:
                b = grads(y_ptr, y, z + token + r * L, rows, live, cols, E, DOT, EMULATE)
                weight = tl.load(h + at_x, mask=inside, other=0.0)
            else:
                b = values(y_ptr, y, rows, live, cols, E, DOT, EMULATE)
            after = ()
            total_after = ()
            for half in tl.static_range(HALVES):
                phi = features(u, peak, live, p, P, KIND, half, EVEN) * share(logs, top)[:, None]
                a = operand(phi, DOT, EMULATE)
                after = after + (product(tl.trans(a), b, state[half], DOT, EMULATE),)
                if QUERIES:
                    total_after = total_after + (total[half] + tl.sum(phi * weight[:, None], 0),)
                else:
                    total_after = total_after + (total[half] + tl.sum(phi, 0),)
            state = after
            total = total_after

    fits = p < P
    for half in tl.static_range(HALVES):
        to = at * (HALVES * P) + half * P + p
        tl.store(kv + to[:, None] * E + cols[None, :], state[half], mask=fits[:, None] & (cols < E)[None, :])
        if block == 0:
            tl.store(k_sum + to, total[half], mask=fits)
    if block == 0 and part == 0:
        tl.store(log + at, top)


@triton.jit(do_not_specialize=["slots", "segment"])
def scan_kernel(kv, k_sum, log, log_base, kv_in, k_sum_in, log_in, kv_out, k_sum_out, log_out, cu, heads, slots, segment,
                M: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
                HAS_STATE: tl.constexpr, PACKED: tl.constexpr):
    """In place, the totals of segments become the states before them (after them if reversed); the merge of all goes to
    *_out. The logs of totals stay, those of the states go to log_base: every block reads the former.

    One element of the state per lane, segments one after the other.
    """
    KV_BLOCKS: tl.constexpr = (M * E + BLOCK - 1) // BLOCK
    BLOCKS: tl.constexpr = KV_BLOCKS + (M + BLOCK - 1) // BLOCK
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
        size = tl.full([], M * E, tl.int64)
        ptr = kv + at
        if HAS_STATE:
            start = kv_in + at
        final = kv_out + at
    else:
        at = (block - KV_BLOCKS) * BLOCK + lane
        size = tl.full([], M, tl.int64)
        ptr = k_sum + at
        if HAS_STATE:
            start = k_sum_in + at
        final = k_sum_out + at
    fits = at < size
    base = tl.zeros([BLOCK], tl.float32)
    top = tl.full([], float("-inf"), tl.float32)
    if HAS_STATE:
        top = tl.load(log_in + row)
        base = tl.load(start + row * size, mask=fits, other=0.0)
        # a state of no key counts as 0 whatever it holds
        base = tl.where(top == float("-inf"), 0.0, base)
    # two totals in flight: the merges are a chain, the loads need not be
    for s in range(0, count, 2):
        here = slot + (count - 1 - s if REVERSE else s)
        next = here + (-1 if REVERSE else 1)
        fits1 = at < tl.where(s + 1 < count, size, 0)
        t0 = tl.load(ptr + here * size, mask=fits, other=0.0)
        t1 = tl.load(ptr + next * size, mask=fits1, other=0.0)
        log0 = tl.load(log + here)
        # the last merge of an odd count is with nothing, and reads what it may
        log1 = tl.where(s + 1 < count, tl.load(log + tl.where(s + 1 < count, next, here)), float("-inf"))
        tl.store(ptr + here * size, base, mask=fits)
        top0 = tl.maximum(top, log0)
        base = base * share(top, top0) + t0 * share(log0, top0)
        tl.store(ptr + next * size, base, mask=fits1)
        top1 = tl.maximum(top0, log1)
        base = base * share(top0, top1) + t1 * share(log1, top1)
        if block == 0:
            tl.store(log_base + here, top)
            tl.store(log_base + next + lane, tl.zeros([BLOCK], tl.float32) + top0, mask=(lane == 0) & fits1)
        top = top1
    tl.store(final + row * size, base, mask=fits)
    if block == 0:
        tl.store(log_out + row, top)
