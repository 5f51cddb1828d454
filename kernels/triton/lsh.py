"""The hash of LSH in Triton: projection and argmax in one pass over the rows, no projection ever in memory."""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from .softmax import guard
from .tiles import EMULATE, product

ROWS, COLUMNS, INNER = 32, 32, 16


@triton.jit
def _digit(x, xn, xd, last, rotation, token, inside, C, D: tl.constexpr, HALF: tl.constexpr, BM: tl.constexpr,
           BC: tl.constexpr, BD: tl.constexpr, HAS_EXTRA: tl.constexpr, EMULATE: tl.constexpr):
    """The first maximum of [y, -y], y = x R for HALF columns of R; NaN is never the largest."""
    up = tl.full([BM], float("-inf"), tl.float32)
    down = tl.full([BM], float("-inf"), tl.float32)
    up_at = tl.zeros([BM], tl.int32)
    down_at = tl.zeros([BM], tl.int32)
    for c in range(0, HALF, BC):
        cols = c + tl.arange(0, BC)
        fits = cols < HALF
        y = tl.zeros([BM, BC], tl.float32)
        for d in range(0, D, BD):
            inner = d + tl.arange(0, BD)
            a = tl.load(x + token[:, None] * xn + inner.to(tl.int64)[None, :] * xd,
                        mask=inside[:, None] & (inner < D)[None, :], other=0.0).to(tl.float32)
            b = tl.load(rotation + inner[:, None] * C + cols[None, :], mask=(inner < D)[:, None] & fits[None, :], other=0.0)
            y = product(a, b, y, "ieee", EMULATE)
        if HAS_EXTRA:
            y = tl.fma(last[:, None], tl.load(rotation + D * C + cols, mask=fits, other=0.0)[None, :], y)
        fair = (y == y) & fits[None, :]
        worth = tl.where(fair, y, float("-inf"))
        top = tl.max(worth, 1)
        at = tl.min(tl.where(worth == top[:, None], cols[None, :], HALF - 1), 1)
        up_at = tl.where(top > up, at, up_at)
        up = tl.maximum(top, up)
        worth = tl.where(fair, -y, float("-inf"))
        top = tl.max(worth, 1)
        at = tl.min(tl.where(worth == top[:, None], cols[None, :], HALF - 1), 1)
        down_at = tl.where(top > down, at, down_at)
        down = tl.maximum(top, down)
    return tl.where(down > up, down_at + HALF, up_at)


@triton.jit(do_not_specialize=["N", "R", "C"])
def hash_kernel(x, xb, xh, xn, xd, extra, rotations, buckets, heads, groups, N, R, C, D: tl.constexpr, WIDE: tl.constexpr,
                FACTORS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, HAS_EXTRA: tl.constexpr,
                EMULATE: tl.constexpr):
    """buckets [B, heads, R, N] of rows x, whose last coordinate of WIDE is extra or 0 if they have only D."""
    pid = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(N, BM)
    row = pid // chunks
    x += row // heads * xb + row % heads * xh
    token = pid % chunks * BM + tl.arange(0, BM)
    inside = token < N
    last = tl.zeros([BM], tl.float32)
    if HAS_EXTRA:
        last = tl.load(extra + row * N + token, mask=inside, other=0.0)
    for r in range(R):
        rotation = rotations + (row % heads // groups * R + r) * WIDE * C
        bucket = tl.zeros([BM], tl.int32)
        stride = 1
        for f in tl.static_range(len(FACTORS)):
            digit = _digit(x, xn, xd, last, rotation, token, inside, C, D, FACTORS[f] // 2, BM, BC, BD, HAS_EXTRA, EMULATE)
            bucket += digit * stride
            rotation += FACTORS[f] // 2
            stride *= FACTORS[f]
        tl.store(buckets + (row * R + r) * N + token, bucket, mask=inside)


def hash(x: Tensor, extra: Tensor | None, rotations: Tensor, factors: tuple[int, ...]) -> Tensor:
    """x [B, Hx, N, D], extra [B, Hx, N] or None, rotations [H, R, D or D+1, C] -> buckets [B, Hx, R, N] int32"""
    B, heads, N, D = x.shape
    H, R, wide, C = rotations.shape
    buckets = torch.empty(B, heads, R, N, dtype=torch.int32, device=x.device)
    if buckets.numel():
        extra = None if extra is None or wide == D else extra.contiguous()
        with guard(x.device):
            hash_kernel[(B * heads * triton.cdiv(N, ROWS),)](
                x, *x.stride(), extra, rotations.contiguous(), buckets, heads, heads // H, N, R, C, D=D, WIDE=wide,
                FACTORS=tuple(factors), BM=ROWS, BC=COLUMNS, BD=INNER, HAS_EXTRA=extra is not None, EMULATE=EMULATE,
                num_warps=4, enable_fp_fusion=True)
    return buckets
