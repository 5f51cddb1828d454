"""Sums over pairs of rows by offset: a program adds up the tiles of one diagonal of tiles, then takes diagonals apart once."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

import triton
import triton.language as tl

# tiles of queries that a program walks over, at least
LEAST_WALK = 16


@triton.jit
def store_diagonals(to, total, W: tl.constexpr):
    """to [2 W]: sums of the diagonals of a [W, W] tile, W more than the column less the row."""
    m = tl.arange(0, W)
    # column n of row i becomes diagonal n, or n - W where that is a column of the tile
    place = m[None, :] + m[:, None]
    total = tl.gather(total, place % W, 1)
    tl.store(to + m, tl.sum(tl.where(place < W, 0.0, total), 0))
    tl.store(to + W + m, tl.sum(tl.where(place < W, total, 0.0), 0))


def walk_of(slots: int, apart: int) -> tuple[int, int]:
    """Tiles of a walk and walks: as long as there are diagonals, so that sums take no more memory than a few columns of q."""
    walk = max(LEAST_WALK, apart)
    return walk, triton.cdiv(slots, walk)


def fold(sums: Tensor, first: int, reach: int) -> Tensor:
    """Sums `[Hq, D, 2 W]` of diagonals, column n of tile d that of offset first + d W + n -> `[Hq, 2 reach + 1]`, where
    offsets beyond the reach are added to its ends."""
    W = sums.shape[2] // 2
    early, late = sums.split(W, 2)
    whole = F.pad(early.flatten(1), (0, W)) + F.pad(late.flatten(1), (W, 0))
    # offsets `first` and after: those at -reach or before, those between, those at reach or after
    low = max(-reach + 1 - first, 0)
    high = max(reach - first, low)
    middle = whole[:, low:high]
    rest = 2 * reach + 1 - middle.shape[1]
    before = min(max(first + low + reach, 0), rest)
    dc = F.pad(middle, (before, rest - before))
    dc[:, 0] += whole[:, :low].sum(1)
    dc[:, -1] += whole[:, high:].sum(1)
    return dc
