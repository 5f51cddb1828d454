"""FAVOR+ features of rows of unit length as a tensor, in Triton: rows, then features; and their gradient in one pass.

    split       projections in two parts, W (t mean)                            favor_rows.py
    rows        scale, largest projection and logarithm of each row
    features    phi from these and the projections
    gradient    dx and what each row gives to the root of the temperature

As in favor_rows.py, rows are multiplied as they lie in memory and W in two parts, so that phi keeps float32's precision
for what dtype the rows have.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl

from ..features import favor_bound, favor_count
from .favor import PROJECTIONS, SPLIT_BLOCK
from .favor_rows import Points, centered, features, project, row_scale, rows_kernel, split_kernel, weights
from .softmax import guard
from .softmax import refuses as refuses_tensors
from .tiles import EMULATE, Rows, operand, padded, product, rows_of, store, tile


class Tiles(NamedTuple):
    """Rows of a tile, features of a block, columns of a block of D, warps of a program."""

    rows: int
    part: int
    inner: int
    warps: int


# how tl.dot multiplies, head_dim up to -> tiles; the first that fits is taken. Chosen for registers, not yet by time
TILES = (
    ("bf16", 128, Tiles(32, 32, 16, 8)),
    ("tf32", 128, Tiles(32, 32, 32, 4)),
    ("ieee", 64, Tiles(32, 16, 32, 4)),
    ("ieee", 128, Tiles(16, 16, 16, 4)),
    ("", 256, Tiles(16, 16, 32, 8)),
)


@triton.jit(do_not_specialize=["length"])
def features_kernel(x, phi, hi, lo, offset, bound, heads, length, P, size, D: tl.constexpr, DP: tl.constexpr,
                    BD: tl.constexpr, C: tl.constexpr, BP: tl.constexpr, KIND: tl.constexpr, HAS_OFFSET: tl.constexpr,
                    LOGS: tl.constexpr, DOT: tl.constexpr, EMULATE: tl.constexpr):
    """phi [B, heads, length, M]; LOGS: times exp(log - bound)."""
    HALVES: tl.constexpr = 2 if KIND == "hyperbolic" or KIND == "trig" else 1
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(P, BP)
    chunks = tl.cdiv(length, C)
    row = pid // blocks // chunks
    rows = pid // blocks % chunks * C + tl.arange(0, C)
    inside = rows < length
    p = (pid % blocks * BP).to(tl.int32) + tl.arange(0, BP)
    at = row * length + rows
    scale = tl.load(x.scale + at, mask=inside, other=0.0)
    top = tl.load(x.top + at, mask=inside, other=0.0)
    if HAS_OFFSET:
        offset += row % heads * size
    u = project(x.ptr + row // heads * x.b + row % heads * x.h, x, rows, inside, scale, hi, lo, offset, p, D, DP, BD,
                HAS_OFFSET, DOT, EMULATE)
    factor = tl.full([C], 1.0, tl.float32)
    if LOGS:
        factor = tl.exp(tl.load(x.log + at, mask=inside, other=0.0) - tl.load(bound))
    for half in tl.static_range(HALVES):
        part = features(u, top, inside, p, P, KIND, half, False) * factor[:, None]
        tl.store(phi + at[:, None] * (P * HALVES) + half * P + p[None, :], part, mask=inside[:, None] & (p < P)[None, :])


@triton.jit(do_not_specialize=["length"])
def gradient_kernel(grad, phi, x, root, hi, lo, center, dx, shares, heads, length, P, D: tl.constexpr, DP: tl.constexpr,
                    C: tl.constexpr, BP: tl.constexpr, KIND: tl.constexpr, HAS_OFFSET: tl.constexpr, LOGS: tl.constexpr,
                    DOT: tl.constexpr, EMULATE: tl.constexpr):
    """dx [B, heads, length, D] and, for each program, its part of the root's gradient."""
    HALVES: tl.constexpr = 2 if KIND == "hyperbolic" or KIND == "trig" else 1
    pid = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(length, C)
    row = pid // chunks
    rows = pid % chunks * C + tl.arange(0, C)
    inside = rows < length
    d = tl.arange(0, DP)
    t = tl.load(root)
    ptr = x.ptr + row // heads * x.b + row % heads * x.h
    grad_ptr = grad.ptr + row // heads * grad.b + row % heads * grad.h
    at = row * length + rows
    total = tl.zeros([C, DP], tl.float32)
    # of minus |x~|^2 / 2
    down = tl.zeros([C], tl.float32)
    for block in range(tl.cdiv(P, BP)):
        p = block * BP + tl.arange(0, BP)
        fits = inside[:, None] & (p < P)[None, :]
        here = phi + at[:, None] * (P * HALVES) + p[None, :]
        there = grad_ptr + rows[:, None] * grad.l + p.to(tl.int64)[None, :] * grad.d
        own = tl.load(here, mask=fits, other=0.0)
        g = tl.load(there, mask=fits, other=0.0)
        if KIND == "positive":
            g *= own
            down += tl.sum(g, 1)
        elif KIND == "relu":
            g = tl.where(own > 1e-3, g, 0.0)
        else:
            other = tl.load(here + P, mask=fits, other=0.0)
            other_g = tl.load(there + P * grad.d, mask=fits, other=0.0)
            if KIND == "hyperbolic":
                up = own * g
                low = other * other_g
                g = up - low
                down += tl.sum(up + low, 1)
            else:
                down -= tl.sum(own * g + other * other_g, 1)
                g = other * g - own * other_g
        g = operand(g, DOT, EMULATE)
        total = product(g, weights(hi, p, d, DP, EMULATE), total, DOT, EMULATE)
        if DOT != "ieee":
            total = product(g, weights(lo, p, d, DP, EMULATE), total, DOT, EMULATE)

    scale = row_scale(ptr, x, rows, inside, d, t, D, True)
    if HAS_OFFSET:
        center += row % heads * DP
    near = centered(ptr, x, rows, inside, scale, center, d, D, HAS_OFFSET)
    if LOGS:
        total -= down[:, None] * near
    tl.store(shares + pid, tl.sum(tl.sum(total * near, 1), 0) / t)
    # of the row over its length
    unit = tile(ptr, x, rows, inside, d, D).to(tl.float32) * (scale / t)[:, None]
    total *= t
    total = (total - tl.sum(total * unit, 1)[:, None] * unit) * (scale / t)[:, None]
    store(dx + at[:, None] * D + d[None, :], total, inside[:, None] & (d < D)[None, :], EMULATE)


def refuses(x: Tensor) -> str | None:
    """Why these kernels do not take the rows, in a sentence, or None."""
    return refuses_tensors(x, None, x)


class _Call:
    """What forward and backward share: the projections as operands."""

    def __init__(self, x: Tensor, projection: Tensor, root: Tensor, mean: Tensor | None, kind: str, logs: bool) -> None:
        self.B, self.H, self.n, self.D = x.shape
        self.x, self.root, self.device = rows_of(x), root, x.device
        self.P, self.M = projection.shape[0], favor_count(projection, kind)
        ieee = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
        self.dot = "bf16" if x.dtype == torch.bfloat16 else "ieee" if ieee else "tf32"
        self.tiles = next(tiles for dot, most, tiles in TILES if dot in ("", self.dot) and most >= self.D)
        self.DP, self.size = padded(self.D), triton.cdiv(self.P, PROJECTIONS) * PROJECTIONS
        self.hi = self.empty(self.size, self.DP, dtype=torch.bfloat16 if self.dot == "bf16" else torch.float32)
        self.lo = torch.empty_like(self.hi) if self.dot != "ieee" else None
        self.offset = self.center = None
        if mean is not None:
            self.offset, self.center, mean = self.empty(self.H, self.size), self.empty(self.H, self.DP), mean.contiguous()
        split_kernel[(self.size // SPLIT_BLOCK * (1 if mean is None else self.H),)](
            projection.contiguous(), mean, root, self.hi, self.lo, self.offset, self.center, self.P, self.D, self.size,
            DP=self.DP, BLOCK=SPLIT_BLOCK, HAS_MEAN=mean is not None, DOT=self.dot, EMULATE=EMULATE, num_warps=4,
            enable_fp_fusion=True)
        self.part = min(self.tiles.part, padded(self.P))
        self.chunks = self.B * self.H * triton.cdiv(self.n, self.tiles.rows)
        self.options = {"D": self.D, "DP": self.DP, "C": self.tiles.rows, "BP": self.part, "KIND": kind,
                        "HAS_OFFSET": mean is not None, "DOT": self.dot, "EMULATE": EMULATE, "num_warps": self.tiles.warps,
                        "num_stages": 1, "enable_fp_fusion": True}
        self.inner, self.logs = min(self.tiles.inner, self.DP), logs

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.device)

    def forward(self, bound: Tensor) -> Tensor:
        phi = self.empty(self.B, self.H, self.n, self.M)
        points = Points(*self.x, *(self.empty(self.B, self.H, self.n) for _ in range(3)))
        if self.chunks:
            rows_kernel[(self.chunks,)](
                points, None, self.root, self.hi, self.lo, self.offset, self.center, self.H, self.n, self.P, self.size, 0.0,
                BD=self.inner, L2=True, HAS_MASK=False, **self.options)
            features_kernel[(self.chunks * triton.cdiv(self.P, self.part),)](
                points, phi, self.hi, self.lo, self.offset, bound, self.H, self.n, self.P, self.size, BD=self.inner,
                LOGS=self.logs, **self.options)
        return phi

    def backward(self, grad: Rows, phi: Tensor, dx: Tensor) -> Tensor:
        """-> the gradient of the root"""
        shares = self.empty(self.chunks)
        if self.chunks:
            gradient_kernel[(self.chunks,)](
                grad, phi, self.x, self.root, self.hi, self.lo, self.center, dx, shares, self.H, self.n, self.P,
                LOGS=self.logs, **self.options)
        return shares.sum()


def forward(
    x: Tensor,                                 # [B, H, n, D]
    projection: Tensor,                        # [P, D] float32
    root: Tensor,                              # [] float32, temperature^-1/2
    mean: Tensor | None,                       # [H, D] float32
    *,
    kind: str,
    logs: bool,
) -> Tensor:
    """-> phi [B, H, n, M] float32; logs: times e^(a - favor_bound)"""
    with guard(x.device):
        return _Call(x, projection, root, mean, kind, logs).forward(favor_bound(projection, root, kind))


def backward(
    grad: Tensor,                              # [B, H, n, M]
    phi: Tensor,                               # [B, H, n, M]
    x: Tensor,
    projection: Tensor,
    root: Tensor,
    mean: Tensor | None,
    *,
    kind: str,
    logs: bool,
) -> tuple[Tensor, Tensor]:
    """-> dx [B, H, n, D], droot []"""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with guard(x.device):
        return dx, _Call(x, projection, root, mean, kind, logs).backward(rows_of(grad), phi.contiguous(), dx)
