"""FAVOR+ pairs: exact scores, the order of keys and queries, and where a block of a state lies.

What both walks share, and how they walk: a program carries a state over the chunks of one segment, and reads it with the
rows of each.

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

from .tiles import product, values


@triton.jit
def scores(x_ptr, x, x_rows, x_live, x_scale, y_ptr, y, y_rows, y_live, y_scale, center, D: tl.constexpr,
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
def in_order(i, x_first, y_first, y_live, C: tl.constexpr, QUERIES: tl.constexpr):
    """Pairs in which the key is no later than the query, of tiles that start at x_first and y_first."""
    if QUERIES:
        allowed = (x_first + i)[:, None] >= tl.where(y_live, y_first + i, 0x7FFFFFFF)[None, :]
    else:
        allowed = (x_first + i)[:, None] <= tl.where(y_live, y_first + i, -1)[None, :]
    return allowed


@triton.jit
def block_of(rows, inside, cols, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Where a block of a state lies, and whether it does."""
    fits = tl.full([rows.shape[0], cols.shape[0]], True, tl.int1)
    if not EVEN:
        fits = fits & inside[:, None]
    if WIDTH % BLOCK != 0:
        fits = fits & (cols < WIDTH)[None, :]
    return rows[:, None] * WIDTH + cols[None, :], fits
