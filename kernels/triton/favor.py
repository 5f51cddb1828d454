"""FAVOR+ attention in Triton: rows, segment totals, a scan over the segments, and walks for every output.

    split    projections in two parts, W (t mean)                            favor_rows.py
    rows     scale, largest projection and logarithm of each query and key
    totals   the sum of each segment, in units of exp(its largest logarithm) favor_states.py
    scan     the state each segment starts from
    values   outputs, dv: read the state, add the pairs of the chunk         favor_values.py
    points   dq, dk and what they give to the temperature                    favor_points.py

Features and projections are computed at every use and never stored; beside outputs and states a call takes a few floats a
row. Accumulators and states are float32; what tl.dot multiplies is bfloat16 for bfloat16 inputs, tf32 for float16 (its
precision with the range that sums need), float32 for float32.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton

from .favor_points import points_kernel
from .favor_rows import Points, rows_kernel, split_kernel, weight_kernel
from .favor_states import scan_kernel, totals_kernel
from .favor_values import values_kernel
from .tiles import EMULATE, Rows, padded, rows_of

MAX_DIM = 256
KINDS = ("positive", "hyperbolic", "relu", "trig")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# tokens that see each other exactly with exact_diagonal
EXACT_CHUNK = 64
SCAN_BLOCK = 256
SPLIT_BLOCK = 16
# of a thread. Left to itself ptxas spills in the values kernel to halve the registers of 8 warps
MOST_REGISTERS = 255
# projections are padded to a multiple of this: no block is larger
PROJECTIONS = 128

State = tuple[Tensor, Tensor, Tensor]


class Tiles(NamedTuple):
    """Rows of a chunk, features of a block, columns of a block of D and of E, warps of a program, pipeline stages."""

    chunk: int
    part: int
    inner: int
    outer: int
    warps: int
    stages: int


# how tl.dot multiplies, what is computed, head_dim up to -> tiles; the first that fits is taken. What is computed: a kernel,
# alone or with "paired" (kinds) or "exact" (diagonal), or "" for all. Chosen for registers, not yet by time
TILES = (
    ("bf16", "points paired", 64, Tiles(32, 64, 32, 16, 8, 1)),
    ("bf16", "points exact", 64, Tiles(32, 32, 32, 32, 8, 1)),
    ("bf16", "", 64, Tiles(32, 32, 32, 32, 4, 1)),
    ("bf16", "totals", 256, Tiles(32, 16, 32, 32, 8, 1)),
    ("bf16", "", 256, Tiles(32, 32, 64, 64, 8, 1)),
    ("tf32", "points", 64, Tiles(32, 16, 32, 16, 4, 1)),
    ("tf32", "", 64, Tiles(32, 16, 32, 32, 4, 1)),
    ("tf32", "", 256, Tiles(32, 16, 32, 32, 8, 1)),
    ("ieee", "points exact", 256, Tiles(16, 16, 16, 32, 8, 1)),
    ("ieee", "values", 256, Tiles(16, 16, 16, 32, 8, 1)),
    ("ieee", "", 256, Tiles(16, 16, 16, 32, 4, 1)),
)


def refuses(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> str | None:
    """Why these kernels do not take the inputs, in a sentence, or None."""
    if not EMULATE and q.device.type != "cuda":
        return f"Triton needs a CUDA device, got {q.device}"
    if q.device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(q.device)
        return f"compute capability {major}.{minor} is below 8.0"
    if q.dtype not in DTYPES:
        return f"{str(q.dtype).removeprefix('torch.')} is not float32, bfloat16 or float16"
    if q.shape[-1] > MAX_DIM or v.shape[-1] > MAX_DIM:
        name, dim = ("head_dim", q.shape[-1]) if q.shape[-1] > MAX_DIM else ("value dim", v.shape[-1])
        return f"{name} {dim} is above {MAX_DIM}"
    return None


class _Call:
    """What the launches of one forward or backward share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None,
                 projection: Tensor, root: Tensor, mean: Tensor | None, *, kind: str, l2: bool, is_causal: bool,
                 exact_diagonal: bool, segment: int) -> None:
        self.B, self.Hq, self.L, self.D = q.shape
        self.H, self.S, self.E = v.shape[1:]
        self.P, self.kind, self.l2 = projection.shape[0], kind, l2
        self.halves = 2 if kind in ("hyperbolic", "trig") else 1
        self.M = self.P * self.halves
        self.device, self.segment = q.device, segment
        self.packed, self.causal, self.exact = cu_seqlens is not None, is_causal, exact_diagonal
        self.sequences = cu_seqlens.numel() - 1 if self.packed else self.B
        self.cu = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.root, self.v = root, rows_of(v)
        ieee = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
        self.dot = "bf16" if q.dtype == torch.bfloat16 else "ieee" if ieee else "tf32"
        self.DP, self.size = padded(self.D), triton.cdiv(self.P, PROJECTIONS) * PROJECTIONS
        self.given = (q, k, mask, projection, mean)

    def prepare(self) -> None:
        """The projections as operands, and `rows_kernel` on queries and keys."""
        q, k, mask, projection, mean = self.given
        operands = torch.bfloat16 if self.dot == "bf16" else torch.float32
        self.hi = torch.empty(self.size, self.DP, dtype=operands, device=self.device)
        self.lo = torch.empty_like(self.hi) if self.dot != "ieee" else None
        centers = 0 if mean is None else self.H
        self.offset = self.center = None
        if centers:
            self.offset = self.floats(centers, self.size)
            self.center = self.floats(centers, self.DP)
        split_kernel[(self.size // SPLIT_BLOCK * max(centers, 1),)](
            projection.contiguous(), None if mean is None else mean.contiguous(), self.root, self.hi, self.lo, self.offset,
            self.center, self.P, self.D, self.size, DP=self.DP, BLOCK=SPLIT_BLOCK, HAS_MEAN=mean is not None, DOT=self.dot,
            EMULATE=EMULATE, num_warps=4)
        norm = self.P if self.kind == "trig" else self.M
        self.q = self.measure(q, None, None, math.log(norm) if self.exact else 0.0)
        self.k = self.measure(k, mask, self.offset, 0.0)

    def measure(self, x: Tensor, mask: Tensor | None, offset: Tensor | None, shift: float) -> Points:
        B, heads, length, _ = x.shape
        points = Points(*rows_of(x), *(self.floats(B, heads, length) for _ in range(3)))
        tiles = self.tiles("rows")
        mask = None if mask is None else mask.contiguous().view(torch.uint8)
        if B * heads * length:
            rows_kernel[(B * heads * triton.cdiv(length, tiles.chunk),)](
                points, mask, self.root, self.hi, self.lo, offset, self.center, heads, length, self.P, self.size, shift,
                D=self.D, DP=self.DP, BD=min(tiles.inner, self.DP), C=tiles.chunk, BP=min(tiles.part, padded(self.P)),
                KIND=self.kind, L2=self.l2, HAS_OFFSET=offset is not None, HAS_MASK=mask is not None, DOT=self.dot,
                EMULATE=EMULATE, num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True)
        return points

    def guard(self):
        """Triton launches on the current device, which need not be that of the inputs."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=self.device)

    def slots(self, length: int) -> int:
        """How many segments the tokens are cut into; packed, an upper bound that needs no look at the device."""
        return length // self.segment + self.sequences if self.packed else triton.cdiv(length, self.segment)

    def state(self, *lead: int) -> State:
        """-> kv [*lead, M, E], k_sum [*lead, M], log [*lead]; slots of packed sequences may stay unused and are zeros."""
        new = torch.zeros if self.packed and len(lead) == 3 else torch.empty
        shapes = ((*lead, self.M, self.E), (*lead, self.M), lead)
        return tuple(new(shape, dtype=torch.float32, device=self.device) for shape in shapes)

    def tiles(self, kernel: str) -> Tiles:
        names = ["", kernel]
        names += [f"{kernel} paired"] if self.halves == 2 else []
        names += [f"{kernel} exact"] if self.exact else []
        return next(t for dot, of, width, t in TILES if dot == self.dot and of in names and width >= self.D)

    def options(self, tiles: Tiles) -> dict[str, Any]:
        part = min(max(tiles.part // self.halves, 16), padded(self.P))
        return {"D": self.D, "DP": self.DP, "BD": min(tiles.inner, self.DP), "E": self.E, "C": tiles.chunk, "BP": part,
                "KIND": self.kind, "PACKED": self.packed, "DOT": self.dot, "EMULATE": EMULATE, "num_warps": tiles.warps,
                "num_stages": tiles.stages, "enable_fp_fusion": True}

    def totals(self, queries: bool, y: Rows, z: Tensor | None, h: Tensor | None) -> State:
        x, heads, groups, length = (self.q, self.H, self.Hq // self.H, self.L) if queries else (self.k, self.H, 1, self.S)
        slots = self.slots(length)
        state = self.state(self.B, heads, slots)
        tiles = self.tiles("totals")
        options = self.options(tiles)
        columns = min(tiles.outer, padded(self.E))
        parts = triton.cdiv(self.P, options["BP"]) * triton.cdiv(self.E, columns)
        programs = self.B * heads * slots * parts
        if programs:
            totals_kernel[(programs,)](
                x, y, z, h, self.cu, self.hi, self.lo, None if queries else self.offset, *state, heads, groups, length,
                slots, self.sequences, self.segment, self.P, self.size, BN=columns,
                WIDE=min(1024, triton.next_power_of_2(self.segment)), QUERIES=queries,
                HAS_OFFSET=self.offset is not None and not queries, EVEN=self.P % options["BP"] == 0, **options)
        return state

    def scan(self, totals: State, given: State | None, reverse: bool) -> tuple[State, State]:
        """-> the states before segments (after them if reversed) in place of their totals, and the merge of all"""
        kv, k_sum, log = totals
        base, final = torch.zeros_like(log), self.state(self.sequences, self.H)
        blocks = triton.cdiv(self.M * self.E, SCAN_BLOCK) + triton.cdiv(self.M, SCAN_BLOCK)
        if self.sequences * self.H:
            scan_kernel[(self.sequences * self.H * blocks,)](
                kv, k_sum, log, base, *(given or (None,) * 3), *final, self.cu, self.H, kv.shape[2], self.segment, M=self.M,
                E=self.E, BLOCK=SCAN_BLOCK, REVERSE=reverse, HAS_STATE=given is not None, PACKED=self.packed, num_warps=4,
                enable_fp_fusion=True)
        return (kv, k_sum, base), final

    def walk(self, queries: bool, tiles: Tiles) -> dict[str, Any]:
        """Options of both walks."""
        options = self.options(tiles)
        return options | {"TILES": EXACT_CHUNK // tiles.chunk if self.exact else 1, "QUERIES": queries,
                          "CAUSAL": self.causal, "EXACT": self.exact, "GROUPED": not queries and self.Hq != self.H,
                          "HAS_OFFSET": self.offset is not None, "EVEN": self.P % options["BP"] == 0}

    def owned(self, state: State, heads: int, blocks: int) -> State:
        """The states of segments in memory that a walk may overwrite: one for each of its heads, k_sum for each program."""
        if not self.causal:
            return state
        kv, k_sum, log = state
        kv = kv.clone() if heads == self.H else kv.repeat_interleave(heads // self.H, 1)
        k_sum = k_sum if heads == self.H else k_sum.repeat_interleave(heads // self.H, 1)
        return kv, k_sum[:, :, :, None].repeat(1, 1, 1, blocks, 1), log

    def values(self, queries: bool, state: State, y: Tensor, c: Rows, z: Tensor, r: Tensor) -> None:
        """Outputs, z and r of the queries (c = v), or dv (c = grad)."""
        x, others, heads, length = (self.q, self.k, self.Hq, self.L) if queries else (self.k, self.q, self.H, self.S)
        tiles = self.tiles("values")
        columns = min(tiles.outer, padded(self.E))
        slots, blocks = self.slots(length), triton.cdiv(self.E, columns)
        programs = self.B * heads * slots * blocks
        if programs:
            values_kernel[(programs,)](
                x, others, c, z, r, self.cu, self.hi, self.lo, self.offset, self.center, *self.owned(state, heads, blocks),
                y, z if queries else None, r if queries else None, heads, self.Hq // self.H, length, slots, self.sequences,
                self.segment, self.P, self.size, BN=columns, maxnreg=MOST_REGISTERS, **self.walk(queries, tiles))

    def points(self, queries: bool, state: State, dx: Tensor, grad: Rows, z: Tensor, h: Tensor, r: Tensor) -> Tensor:
        """dq or dk; -> its part of d root"""
        x, others, heads, length = (self.q, self.k, self.Hq, self.L) if queries else (self.k, self.q, self.H, self.S)
        tiles = self.tiles("points")
        slots = self.slots(length)
        programs = self.B * heads * slots
        # a packed slot may stay unused
        shares = torch.zeros(programs, dtype=torch.float32, device=self.device)
        if programs:
            points_kernel[(programs,)](
                x, others, self.v, grad, z, h, r, self.root, self.cu, self.hi, self.lo, self.offset, self.center,
                *self.owned(state, heads, 1), dx, shares, heads, self.Hq // self.H, length, slots, self.sequences,
                self.segment, self.P, self.size, BE=min(tiles.outer, padded(self.E)), L2=self.l2,
                **self.walk(queries, tiles))
        return shares.sum()


def forward(
    q: Tensor,                                 # [B, Hq, L, D]
    k: Tensor,                                 # [B, H, S, D]
    v: Tensor,                                 # [B, H, S, E]
    mask: Tensor | None,                       # [B, S], True = padded
    cu_seqlens: Tensor | None,                 # [N+1] int32
    kv: Tensor | None,                         # [B or N, H, M, E] float32, in units of exp(log_scale)
    k_sum: Tensor | None,                      # [B or N, H, M] float32
    log_scale: Tensor | None,                  # [B or N, H] float32
    projection: Tensor,                        # [P, D] float32
    root: Tensor,                              # [] float32, temperature^-1/2
    mean: Tensor | None,                       # [H, D] float32, of the keys
    *,
    kind: str,
    l2: bool,
    is_causal: bool,
    exact_diagonal: bool,
    segment: int,
    save_segments: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> out [B, Hq, L, E], normalizer and row_scale [B, Hq, L], segment_kv [B, H, NS, M, E], segment_k_sum [B, H, NS, M],
    segment_log_scale [B, H, NS], kv, k_sum, log_scale

    The segment states are empty when not saved. Not causal, NS counts sequences.
    """
    call = _Call(q, k, v, mask, cu_seqlens, projection, root, mean, kind=kind, l2=l2, is_causal=is_causal,
                 exact_diagonal=exact_diagonal, segment=segment)
    given = None if kv is None else (kv.contiguous(), k_sum.contiguous(), log_scale.contiguous())
    out = torch.empty(call.B, call.Hq, call.L, call.E, dtype=q.dtype, device=q.device)
    z, r = call.floats(call.B, call.Hq, call.L), call.floats(call.B, call.Hq, call.L)
    with call.guard():
        call.prepare()
        segments, final = call.scan(call.totals(False, call.v, None, None), given, False)
        call.values(True, segments if is_causal else final, out, call.v, z, r)
    if not save_segments:
        segments = (z.new_empty(0),) * 3
    elif not is_causal:
        split = (call.B, call.sequences if call.packed else 1)
        segments = tuple(x.unflatten(0, split).transpose(1, 2).clone() for x in final)
    return out, z, r, *segments, *final


def backward(
    grad_out: Tensor,                          # [B, Hq, L, E]
    grad_kv: Tensor | None,                    # [B or N, H, M, E]
    grad_k_sum: Tensor | None,                 # [B or N, H, M]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kv: Tensor | None,
    k_sum: Tensor | None,
    log_scale: Tensor | None,
    projection: Tensor,
    root: Tensor,
    mean: Tensor | None,
    out: Tensor,
    normalizer: Tensor,
    row_scale: Tensor,
    segment_kv: Tensor,
    segment_k_sum: Tensor,
    segment_log_scale: Tensor,
    final_log_scale: Tensor,                   # [B or N, H]
    *,
    kind: str,
    l2: bool,
    is_causal: bool,
    exact_diagonal: bool,
    segment: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> dq [B, Hq, L, D], dk [B, H, S, D], dv [B, H, S, E], d_root [], dkv, dk_sum (empty without an incoming state)"""
    call = _Call(q, k, v, mask, cu_seqlens, projection, root, mean, kind=kind, l2=l2, is_causal=is_causal,
                 exact_diagonal=exact_diagonal, segment=segment)
    grad = rows_of(grad_out)
    h = torch.empty_like(normalizer)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    after = None
    if grad_kv is not None:
        # the state comes in units of exp(its log): as a query whose reference that was. No key, no gradient
        known = torch.where(final_log_scale == -math.inf, -math.inf, -final_log_scale)
        after = (grad_kv.contiguous(), grad_k_sum.contiguous(), known)
    with call.guard():
        call.prepare()
        if h.numel():
            chunk = 32
            weight_kernel[(call.B * call.Hq * triton.cdiv(call.L, chunk),)](
                grad, rows_of(out), normalizer, row_scale, call.q.log, h, call.Hq, call.L, E=call.E, BE=padded(call.E),
                C=chunk, EXACT=exact_diagonal, num_warps=4, enable_fp_fusion=True)
        after, whole = call.scan(call.totals(True, grad, normalizer, h), after, True)
        before = segment_kv, segment_k_sum, segment_log_scale
        if not is_causal:
            after = whole
            before = tuple(x.transpose(1, 2).flatten(0, 1).contiguous() for x in before)
        d_root = call.points(True, before, dq, grad, normalizer, h, row_scale)
        d_root = d_root + call.points(False, after, dk, grad, normalizer, h, row_scale)
        call.values(False, after, dv, grad, normalizer, row_scale)
    if kv is None:
        return dq, dk, dv, d_root, h.new_empty(0), h.new_empty(0)
    reach = torch.where(log_scale == -math.inf, 0.0, torch.exp(log_scale + whole[2]))
    return dq, dk, dv, d_root, whole[0] * reach[..., None, None], whole[1] * reach[..., None]
