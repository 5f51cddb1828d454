"""Positions for long sequences: axial embeddings, whose tables stay small, and rotary ones, which have none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import _check
from ..ops._prefix import accumulator


def _whole(op: str, name: str, x, least: int = 1) -> int:
    if not isinstance(x, int) or isinstance(x, bool) or x < least:
        _check.fail(op, f"{name} must be a whole number of at least {least}, got {_check.describe(x)}")
    return x


def _numbers(op: str, name: str, given) -> tuple[int, ...]:
    if not isinstance(given, Sequence) or isinstance(given, str):
        _check.fail(op, f"{name} must be a list of whole numbers, got {_check.describe(given)}")
    return tuple(_whole(op, f"each number of {name}", n) for n in given)


class AxialPositionalEmbedding(nn.Module):
    """Position n of a grid, counted row by row: one table for each axis in place of one row for each position.

    shape: of the grid; its product is the longest length. dims: the width of each axis, concatenated as Hugging Face
    and trax have it; or one width for all axes, which then are summed.

    weights: for each axis a table `[shape[axis], width]`, normal with standard deviation `std`.
    Raises ValueError or TypeError in a sentence. Kitaev et al. 2020 (arXiv 2001.04451), appendix B.
    """

    def __init__(
        self, shape: Sequence[int], dims: int | Sequence[int], *, std: float = 0.02, device=None, dtype=None
    ) -> None:
        super().__init__()
        op = type(self).__name__
        self.shape = _numbers(op, "shape", shape)
        self.summed = isinstance(dims, int)
        self.dims = _numbers(op, "dims", (dims,) * len(self.shape) if self.summed else dims)
        if not self.shape or len(self.shape) != len(self.dims):
            _check.fail(op, f"shape and dims must name the same axes, got {list(self.shape)} and {list(self.dims)}")
        made = {"device": device, "dtype": dtype}
        self.weights = nn.ParameterList(torch.empty(*x, **made) for x in zip(self.shape, self.dims, strict=True))
        for weight in self.weights:
            nn.init.normal_(weight, std=std)

    @property
    def max_length(self) -> int:
        return math.prod(self.shape)

    def forward(self, length: int, offset: int = 0) -> Tensor:
        """The positions offset .. offset + length - 1: `[length, dim]`, dim the sum of dims (their one width where they
        are summed)."""
        op, end = type(self).__name__, offset + length
        _whole(op, "length", length, 0)
        _whole(op, "offset", offset, 0)
        if end > self.max_length:
            grid = " x ".join(map(str, self.shape))
            _check.fail(op, f"{end} positions are more than the {grid} = {self.max_length} of its shape; enlarge it")
        inner = math.prod(self.shape[1:])
        if length <= inner // 2:
            parts, rest = [], torch.arange(offset, end, device=self.weights[0].device)
            for n, weight in zip(self.shape[::-1], reversed(self.weights), strict=True):
                parts.append(F.embedding(rest % n, weight))
                rest = rest // n
            return self._join(parts[::-1])
        # many positions: broadcasting needs no index, and its gradient is a plain sum
        first, last = offset // inner, -(-end // inner)
        grid = (last - first, *self.shape[1:])
        tables = [self.weights[0][first:last], *self.weights[1:]]
        parts = []
        for axis, table in enumerate(tables):
            around = [table.shape[0] if a == axis else 1 for a in range(len(grid))]
            parts.append(table.view(*around, -1).expand(*grid, -1))
        return self._join(parts).flatten(0, -2)[offset - first * inner : end - first * inner]

    def _join(self, parts: list[Tensor]) -> Tensor:
        return sum(parts[1:], parts[0]) if self.summed else torch.cat(parts, -1)

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.dims[0] if self.summed else list(self.dims)}"


class Rotary(nn.Module):
    """Turns queries and keys (or the shared rows of both) by their position: their products then depend on distances.

    Pair (d, d + D / 2) of the row at position n turns by n base^(-2 d / D). Su et al. 2021 (arXiv 2104.09864), eq. 34,
    with the halves paired, as in most checkpoints. No parameters, no longest length.

    head_dim: D, even. Raises ValueError or TypeError in a sentence.
    """

    def __init__(self, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        if _whole("Rotary", "head_dim", head_dim, 2) % 2:
            _check.fail("Rotary", f"head_dim must be even, for it turns pairs, got {head_dim}")
        self.head_dim, self.base = head_dim, float(base)

    def forward(self, x: Tensor, offset: int = 0, *, dim: int = -2) -> Tensor:
        """x: `[..., L, ..., D]`, positions offset .. offset + L - 1 along `dim`. Returns as much, in x's dtype; float32
        inside (float64 for float64), angles from float64."""
        if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[-1] != self.head_dim:
            _check.fail("Rotary", f"x must be [..., length, {self.head_dim}], got {_check.describe(x)}")
        acc, length, half = accumulator(x.dtype), x.shape[dim], self.head_dim // 2
        position = torch.arange(offset, offset + length, device=x.device, dtype=torch.float64)
        d = torch.arange(half, device=x.device, dtype=torch.float64)
        # within a turn before the rounding to float32, which far positions would not survive
        angle = (position[:, None] * self.base ** (-d / half) % (2 * math.pi)).to(acc)  # [L, D/2]
        shape = [1] * (x.dim() - 1) + [half]
        shape[dim] = length
        cos, sin = angle.cos().view(shape), angle.sin().view(shape)
        a, b = x.to(acc).chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base:g}"
