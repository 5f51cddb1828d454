"""The gradient of a bias by offset in tile attention: sums of ds along diagonals between its two ends.

dq's walk adds up the ends, beyond which the bias is the same (softmax_backward.py); what lies between is one band of tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .diagonals import store_diagonals
from .softmax_backward import log_sum, weigh
from .softmax_tiles import DEAD_FLAG, STAINED_FLAG, dropout_head, rows, seat


@triton.jit(do_not_specialize=["slots", "sequences", "chunk", "look_back", "look_ahead", "window", "scale", "seed_low",
                               "seed_high", "threshold", "gain", "table_row", "furthest", "walk", "walks", "least", "most"])
def bias_kernel(q, k, cu, bad, table, table_row, furthest, sums, slots, sequences, chunk, look_back, look_ahead, window, scale,
                seed_low, seed_high, threshold, gain, walk, walks, least, most, D: tl.constexpr, BD: tl.constexpr,
                E: tl.constexpr, BE: tl.constexpr, W: tl.constexpr, PACKED: tl.constexpr, CHUNKED: tl.constexpr,
                CAUSAL: tl.constexpr, NEAR: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, EMULATE: tl.constexpr):
    """sums [B, Hq, walks, most - least + 1, 2 W] over tiles of keys that lie d = least..most tiles after those of the queries,
    by diagonal, of pairs whose offset is nearer than the furthest. A program walks over `walk` tiles. CHUNKED: a query sees
    so many chunks before its own and after it."""
    pid = tl.program_id(0).to(tl.int64)
    apart = (pid % (most - least + 1)).to(tl.int32) + least
    turn = pid // (most - least + 1) % walks
    row = pid // (most - least + 1) // walks
    batch = row // q.heads
    k_head = row % q.heads // (q.heads // k.heads)
    k_row = (batch * k.heads + k_head) * k.length
    at = (batch * q.xb + row % q.heads * q.xh, batch * q.yb + row % q.heads * q.yh, batch * k.xb + k_head * k.xh,
          batch * k.yb + k_head * k.yh, k_row)
    bias = (table + row % q.heads * table_row + furthest, furthest)
    limits = (look_back, look_ahead, window)
    tables = (q.rank, k.rank, q.bucket, k.bucket)
    head = dropout_head(seed_low, seed_high, row)
    spoiled = tl.load(bad)
    m = tl.arange(0, W)
    some = tl.zeros([W], tl.int32)
    total = tl.zeros([W, W], tl.float32)
    for step in range(walk):
        slot = tl.minimum(turn * walk + step, slots - 1)
        start, end, first, last, _base = seat(cu, slot, q.length, sequences, W, PACKED)
        if not PACKED:
            last = first + k.length
        place = start + apart * W
        if (turn * walk + step < slots) & (start < end) & (place + W > first) & (place < last):
            places = start.to(tl.int32) + m
            inside = places < end
            i = tl.where(inside, places, 0)
            flag = tl.load(q.flags + row * q.length + i, mask=inside, other=DEAD_FLAG)
            y_flag = tl.load(q.y_flags + row * q.length + i, mask=inside, other=DEAD_FLAG)
            y_live = (y_flag == 0) | (y_flag == STAINED_FLAG)
            known = flag != DEAD_FLAG
            own = (log_sum(q.scale, row * q.length + i, known),
                   tl.load(q.delta + row * q.length + i, mask=inside, other=0.0))
            held = 0
            held_y = 0
            if D <= BD:
                held = rows(q.x, at[0], q.xl, q.xd, i, flag == 0, tl.arange(0, BD), D, DOT, EMULATE)
            if E <= BE:
                held_y = rows(q.y, at[1], q.yl, q.yd, i, y_live, tl.arange(0, BE), E, DOT, EMULATE)
            j, _live, _y_live, _bad, _column, some, _w, ds = weigh(
                some, held, held_y, q, k, at, i, flag == 0, y_live, known, own, place.to(tl.int32), last, q.order, tables, 0, 0,
                q.length, k.length, limits, bias, spoiled, scale, head, threshold, gain, D, BD, E, BE, W, True, True, True,
                False, CAUSAL, NEAR, 0, 0, False, True, DROPOUT, DOT, EMULATE)
            if CHUNKED:
                ahead = ((j - first) // chunk)[None, :] - ((i - first) // chunk)[:, None]
                ds = tl.where((ahead >= -look_back) & (ahead <= look_ahead), ds, 0.0)
            total += ds
    t = apart * W + m[None, :] - m[:, None]
    total = tl.where((t > -furthest) & (t < furthest), total, 0.0)
    store_diagonals(sums + pid * (2 * W), total, W)
