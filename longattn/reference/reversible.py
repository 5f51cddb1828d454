"""The sum of a reversible layer, written as the formula: the oracle of every kernel.

    y = x + round(f / g) g    and its inverse    x = y - round(f / g) g,    half to even

without a grid y = x + f. While x and y are multiples of g below g 2^p (p bits of mantissa), both sums are exact, so the
inverse gives x back bit for bit. Gomez et al. 2017 (arXiv 1707.04585), eq. 6-8, are those without a grid.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reversible_add(
    x: Tensor,                                 # [...]
    f: Tensor,                                 # [...]
    grid: float | None,
    *,
    subtract: bool,
) -> Tensor:
    """-> [...], in the dtype of x; the sum is formed in float32, or in float64 where x is"""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    f = f.to(acc)
    if grid is not None:
        f = torch.round(f / grid) * grid
    return (x.to(acc) - f if subtract else x.to(acc) + f).to(x.dtype)


def overflows(y: Tensor, grid: float) -> Tensor:
    """-> a bool: whether a result is too large for all multiples of the grid to be told apart"""
    return (y.abs() >= limit(y.dtype, grid)).any()


def limit(dtype: torch.dtype, grid: float) -> float:
    # 2^p: above it a number of p bits steps by more than one
    return 2 * grid / torch.finfo(dtype).eps
