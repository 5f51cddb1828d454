"""The sum of a reversible layer in Triton: one pass, f rounded to a grid on the way."""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from .softmax import guard
from .tiles import EMULATE, store

BLOCK = 1024


@triton.jit
def _nearest(x):
    """To the nearest whole number, half to even; NaN and what is whole for its size stay."""
    size = tl.abs(x)
    whole = (size + 8388608.0) - 8388608.0
    whole = tl.where(x < 0.0, -whole, whole)
    return tl.where(size < 8388608.0, whole, x)


@triton.jit(do_not_specialize=["N", "grid", "inverse", "limit"])
def add_kernel(x, f, out, flag, N, grid, inverse, limit, SUBTRACT: tl.constexpr, ROUNDS: tl.constexpr,
               BLOCK: tl.constexpr, EMULATE: tl.constexpr):
    """out [N] = x + f or x - f; where it reaches the limit, flag becomes 1."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    left = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(f + at, mask=inside, other=0.0).to(tl.float32)
    if ROUNDS:
        right = _nearest(right * inverse) * grid
    if SUBTRACT:
        y = left - right
    else:
        y = left + right
    store(out + at, y, inside, EMULATE)
    if ROUNDS:
        over = tl.max((tl.abs(y) >= limit).to(tl.int32), 0)
        # all who write, write the same
        tl.store(flag, over, mask=over > 0)


def add(x: Tensor, f: Tensor, grid: float, limit: float, subtract: bool, inplace: bool) -> tuple[Tensor, Tensor | None]:
    """x + f or x - f -> the sum (x itself if inplace), and with a grid an int32 [1]: 1 where it reached the limit"""
    whole = x.contiguous()
    out = whole if inplace else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flag = torch.zeros(1, dtype=torch.int32, device=x.device) if grid else None
    if x.numel():
        with guard(x.device):
            add_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                whole, f.contiguous(), out, flag, x.numel(), grid, 1 / grid if grid else 0.0, limit, SUBTRACT=subtract,
                ROUNDS=bool(grid), BLOCK=BLOCK, EMULATE=EMULATE, num_warps=4)
    if inplace:
        out = x if whole is x else x.copy_(whole)
    return out, flag
