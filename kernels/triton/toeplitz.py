"""Linear attention with relative positions in Triton: segments of sources summed, scanned, and read beside the near tiles.

    totals, scan   what is far from a tile, segment by segment, before it and after it    linear.py
    sweep          outputs, dq, dk, dv                                                    toeplitz_sweep.py
    factors        the gradient of the factors along diagonals of tiles
    gradients      of the sums of weighted values and of weights, row by row

A table that reaches over the whole sequence leaves nothing far: no state is made, every pair is met in a tile. Features are
float32; what tl.dot multiplies is bfloat16 for values in bfloat16, tf32 for float16, float32 for float32, as in linear.py.
No atomics: the same bits on every run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton

from .diagonals import fold, walk_of
from .linear import SCAN_BLOCK, scan_kernel, totals_kernel
from .linear import TILES as LINEAR_TILES
from .softmax import guard
from .tiles import EMULATE, Rows, padded, rows_of
from .toeplitz_sweep import factors_kernel, gradients_kernel, sweep_kernel

MAX_DIM = 256
# sources of one state: few, so that a tile meets few more one by one than it must; many, so that states stay few. A multiple
# of every tile of rows
SEGMENT = {"small": 128, "large": 512}
LARGE_STATE = 64 * 128
GRADIENT_ROWS = 32

State = tuple[Tensor, Tensor]


class Gradients(NamedTuple):
    """Of the sums of weighted values, G [B, Hq, L, E] as tl.dot multiplies it, and of weights, h [B, Hq, L]; G = dO / z."""

    g: Rows
    h: Tensor
    grad: Rows
    z: Tensor


class Tiles(NamedTuple):
    """Rows of a tile, sources it meets at a time, columns of a block of what is compared and of what is summed, warps of a program, pipeline stages."""

    own: int
    other: int
    inner: int
    outer: int
    warps: int
    stages: int


# how tl.dot multiplies, the kind of sweep or "factors", widest dim up to -> tiles; the first that fits is taken. dq and
# factors must agree on rows: they cut the same tiles into near and far. Chosen for registers, not yet by time
TILES = (
    ("bf16", "", 64, Tiles(64, 32, 64, 64, 4, 2)),
    ("bf16", "", 128, Tiles(64, 32, 64, 64, 4, 1)),
    ("bf16", "", 256, Tiles(32, 32, 64, 64, 8, 1)),
    ("tf32", "", 64, Tiles(64, 32, 32, 64, 4, 1)),
    ("tf32", "", 256, Tiles(32, 16, 32, 64, 8, 1)),
    ("ieee", "", 64, Tiles(32, 16, 16, 32, 8, 1)),
    ("ieee", "", 256, Tiles(16, 16, 16, 32, 4, 1)),
)
# with four warps rows read as they are, not through a map, spill on sm_100
TOTALS_TILES = LINEAR_TILES | {("bf16", 64): LINEAR_TILES["bf16", 64]._replace(warps=8, stages=2)}


def refuses(n_features: int, value_dim: int) -> str | None:
    """Why these kernels do not take these widths on this machine, in a sentence, or None."""
    if not EMULATE and torch.cuda.is_available() and torch.version.cuda:
        major, minor = torch.cuda.get_device_capability()
        if (major, minor) < (8, 0):
            return f"compute capability {major}.{minor} is below 8.0"
    if max(n_features, value_dim) > MAX_DIM:
        name, dim = ("n_features", n_features) if n_features > MAX_DIM else ("value dim", value_dim)
        return f"{name} {dim} is above {MAX_DIM}"
    return None


class _Call:
    """What the launches of one forward or backward share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, c: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, *,
                 reach: int, offset: int, is_causal: bool, normalize: bool) -> None:
        self.B, self.Hq, self.L, self.M = q.shape
        self.H, self.S, self.E = v.shape[1:]
        self.groups = self.Hq // max(self.H, 1)
        self.device, self.reach, self.offset, self.causal, self.normalize = q.device, reach, offset, is_causal, normalize
        self.packed = cu_seqlens is not None
        self.sequences = cu_seqlens.numel() - 1 if self.packed else self.B
        self.cu = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.mask = None if mask is None else mask.contiguous().view(torch.uint8)
        self.segment = SEGMENT["large" if self.M * self.E > LARGE_STATE else "small"]
        ieee = v.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
        self.dot = "bf16" if v.dtype == torch.bfloat16 else "ieee" if ieee else "tf32"
        if self.dot == "bf16":
            # each row is read by many tiles, and rounded while it is, it would stay in registers at full width
            q, k = q.bfloat16(), k.bfloat16()
        self.q, self.k, self.v, self.c = rows_of(q), rows_of(k), rows_of(v), c.contiguous()

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=self.device)

    def slots(self, length: int, rows: int) -> int:
        """How many tiles or segments of so many rows; packed, an upper bound that needs no look at the device."""
        return length // rows + self.sequences if self.packed else triton.cdiv(length, rows)

    def tiles(self, kind: str) -> Tiles:
        width = max(self.M, self.E)
        return next(t for dot, of, most, t in TILES if dot == self.dot and of in ("", kind) and most >= width)

    def options(self, tiles: Tiles, queries: bool) -> dict[str, Any]:
        return {"BM": tiles.own, "SEGMENT": self.segment, "CAUSAL": self.causal, "HAS_MASK": self.mask is not None,
                **self.sides(queries), "PACKED": self.packed, "DOT": self.dot, "EMULATE": EMULATE,
                "num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True}

    def lengths(self, queries: bool) -> tuple[int, int, int]:
        """Rows, sources, and where the first source would stand among the rows' own positions if it met the first."""
        return (self.L, self.S, self.offset) if queries else (self.S, self.L, -self.offset)

    def sides(self, queries: bool) -> dict[str, bool]:
        """Whether any tile has far sources before it, and after it."""
        length, sources, lead = self.lengths(queries)
        old = sources > self.segment and length + lead - self.reach > self.segment
        near = triton.cdiv(max(lead + self.reach, 1), self.segment) * self.segment
        return {"HAS_OLD": old and not (self.causal and not queries),
                "HAS_NEW": near < sources and not (self.causal and queries)}

    def gradients(self, grad_out: Tensor, grad_normalizer: Tensor | None, out: Tensor, normalizer: Tensor) -> Gradients:
        operands = torch.bfloat16 if self.dot == "bf16" else torch.float32
        g = torch.empty(self.B, self.Hq, self.L, self.E, dtype=operands, device=self.device)
        h = self.floats(self.B, self.Hq, self.L)
        z = normalizer.contiguous() if self.normalize else torch.ones_like(h)
        own = None if grad_normalizer is None else grad_normalizer.contiguous()
        if h.numel():
            gradients_kernel[(self.B * self.Hq * triton.cdiv(self.L, GRADIENT_ROWS),)](
                rows_of(grad_out), rows_of(out), z, own, g, h, self.Hq, self.L, E=self.E, BE=padded(self.E), C=GRADIENT_ROWS,
                NORMALIZE=self.normalize, HAS_OWN=own is not None, EMULATE=EMULATE, num_warps=4, enable_fp_fusion=True)
        return Gradients(rows_of(g), h, rows_of(grad_out), z)

    def states(self, queries: bool, rows: Gradients | None) -> tuple[State, State]:
        """The sums of the segments of keys (of queries) before each segment, and after it; where they are needed."""
        sides = self.sides(not queries)
        x, y, heads, length = (self.q, rows.grad, self.Hq, self.L) if queries else (self.k, self.v, self.H, self.S)
        z, h = (rows.z, rows.h) if queries else (None, None)
        nothing = self.floats(0)
        if not any(sides.values()) or not self.B * heads:
            return (nothing, nothing), (nothing, nothing)
        # one more, whose state before it is the sum of all
        slots = self.slots(length, self.segment) + (not self.packed)
        lead = (self.B, heads, slots)
        kv, k_sum = self.floats(*lead, self.M, self.E), self.floats(*lead, self.M)
        # slots without a token are left unwritten; of packed sequences no one here knows which
        for sums in (kv, k_sum):
            (sums if self.packed else sums[:, :, -1]).zero_()
        tiles = TOTALS_TILES[self.dot, min(most for dot, most in TOTALS_TILES if dot == self.dot and most >= self.M)]
        inner, outer = min(tiles.inner, padded(self.M)), min(tiles.outer, padded(self.E))
        parts = triton.cdiv(self.M, inner) * triton.cdiv(self.E, outer)
        totals_kernel[(self.B * heads * slots * parts,)](
            x, y, z, h, self.mask, self.cu, kv, k_sum, heads, 1, length, slots, self.sequences, self.segment, 1.0, D=self.M,
            E=self.E, C=tiles.chunk, BK=inner, BN=outer, QUERIES=queries, FEATURE="identity", NORMALIZE=queries,
            HAS_MASK=self.mask is not None and not queries, PACKED=self.packed, DOT=self.dot, EMULATE=EMULATE,
            num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True)
        old = (kv, k_sum) if sides["HAS_OLD"] else (nothing, nothing)
        new = (nothing, nothing) if not sides["HAS_NEW"] else (kv.clone(), k_sum.clone()) if sides["HAS_OLD"] else (kv, k_sum)
        final = self.floats(self.sequences, heads, self.M, self.E), self.floats(self.sequences, heads, self.M)
        blocks = triton.cdiv(self.M * self.E, SCAN_BLOCK) + triton.cdiv(self.M, SCAN_BLOCK)
        for (kv, k_sum), reverse in ((old, False), (new, True)):
            if kv.numel():
                scan_kernel[(self.sequences * heads * blocks,)](
                    kv, k_sum, None, None, *final, self.cu, heads, slots, self.segment, D=self.M, E=self.E, BLOCK=SCAN_BLOCK,
                    REVERSE=reverse, HAS_STATE=False, PACKED=self.packed, num_warps=4, enable_fp_fusion=True)
        if self.dot == "bf16":
            old, new = ((kv.bfloat16(), k_sum) for kv, k_sum in (old, new))
        return old, new

    def sweep(self, kind: str, states: tuple[State, State], rows: Gradients | None, y: Tensor,
              norms: Tensor | None = None) -> Tensor:
        """-> the gradients of the first and the last factor through the states, [B, Hq, slots, 2] (dq)"""
        queries = kind in ("out", "dq")
        length, sources, lead = self.lengths(queries)
        inner, outer = (self.M, self.E) if kind in ("out", "dv") else (self.E, self.M)
        g, h = (None, None) if rows is None else (rows.g, rows.h)
        a, b, x = {"out": (self.q, self.k, self.v), "dq": (g, self.v, self.k), "dk": (self.v, g, self.q),
                   "dv": (self.k, self.q, g)}[kind]
        tiles = self.tiles(kind)
        slots = self.slots(length, tiles.own)
        edges = torch.zeros(self.B, self.Hq, slots if kind == "dq" else 0, 2, dtype=torch.float32, device=self.device)
        if self.B * self.Hq * slots:
            states_of = self.slots(sources, self.segment) + (not self.packed)
            sweep_kernel[(self.B * self.Hq * slots,)](
                a, b, x, self.q, self.c, h, self.mask, self.cu, *states[0], *states[1], y, norms, edges, self.Hq, self.groups, length,
                sources, slots, states_of, self.sequences, self.reach, lead, INNER=inner, BI=min(tiles.inner, padded(inner)),
                OUTER=outer, BO=min(tiles.outer, padded(outer)), BN=tiles.other, KIND=kind, NORMALIZE=self.normalize,
                **self.options(tiles, queries))
        return edges

    def factors(self, rows: Gradients, edges: Tensor) -> Tensor:
        """dc, of near tiles by diagonals and of far ones from the sweep of dq."""
        tiles = self.tiles("factors")
        options, W = self.options(tiles, True), tiles.own
        assert self.tiles("dq").own == W
        slots, others = self.slots(self.L, W), self.slots(self.S, W)
        # how many tiles after a tile of queries a near tile of keys may lie
        least, most = 1 - slots, others - 1
        if options["HAS_OLD"]:
            least = max(least, triton.cdiv(self.offset - self.reach + 2 - self.segment, W))
        if options["HAS_NEW"]:
            most = min(most, max((self.offset + self.reach + self.segment + W) // W, self.segment // W))
        if self.causal:
            most = min(most, (self.offset + W - 1) // W)
        apart = most - least + 1
        walk, walks = walk_of(slots, apart)
        dc, programs = torch.zeros_like(self.c), self.B * self.Hq * walks * max(apart, 0)
        if programs:
            sums = self.floats(self.B, self.Hq, walks, apart, 2 * W)
            factors_kernel[(programs,)](
                self.q, rows.g, self.k, self.v, rows.h, self.mask, self.cu, sums, self.Hq, self.groups, self.L, self.S, slots,
                self.sequences, self.reach, self.offset, walk, walks, least, most, M=self.M,
                BI=min(tiles.inner, padded(self.M)), E=self.E, BO=min(tiles.outer, padded(self.E)), **options)
            dc = fold(sums.sum((0, 2)), (least - 1) * W - self.offset, self.reach)
        far = edges.sum((0, 2))                                                 # [Hq, 2]
        dc[:, 0] += far[:, 0]
        dc[:, -1] += far[:, 1]
        return dc


def forward(
    q: Tensor,                                 # [B, Hq, L, M] float32, features
    k: Tensor,                                 # [B, H, S, M] float32, features
    v: Tensor,                                 # [B, H, S, E]
    c: Tensor,                                 # [Hq, 2 reach + 1] float32
    mask: Tensor | None,                       # [B, S], True = padded
    cu_seqlens: Tensor | None,                 # [N+1] int32
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """-> out [B, Hq, L, E] in v's dtype, normalizer [B, Hq, L]

    Options: reach, offset (of the first query among the keys), is_causal, normalize.
    """
    call = _Call(q, k, v, c, mask, cu_seqlens, **options)
    out = torch.empty(call.B, call.Hq, call.L, call.E, dtype=v.dtype, device=q.device)
    z = call.floats(call.B, call.Hq, call.L)
    if z.numel():
        with guard(q.device):
            call.sweep("out", call.states(False, None), None, out, z)
    return out, z


def backward(
    grad_out: Tensor,                          # [B, Hq, L, E]
    grad_normalizer: Tensor | None,            # [B, Hq, L], not normalised
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    normalizer: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dq, dk, dv, dc"""
    call = _Call(q, k, v, c, mask, cu_seqlens, **options)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    one_each = call.groups == 1
    # of each query head, also where they share a key head
    dk = call.floats(call.B, call.Hq, call.S, call.M)
    dv = torch.empty(call.B, call.Hq, call.S, call.E, dtype=v.dtype if one_each else q.dtype, device=q.device)
    with guard(q.device):
        rows = call.gradients(grad_out, grad_normalizer, out, normalizer)
        edges = call.sweep("dq", call.states(False, None), rows, dq)
        states = call.states(True, rows)
        call.sweep("dk", states, rows, dk)
        call.sweep("dv", states, rows, dv)
        dc = call.factors(rows, edges)
    if not one_each:
        dk, dv = (x.unflatten(1, (call.H, call.groups)).sum(2) for x in (dk, dv))
    return dq, dk, dv.to(v.dtype), dc
