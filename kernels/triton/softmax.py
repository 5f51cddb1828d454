"""Tile attention in Triton: exact softmax over the pairs that row orders, chunk windows and rules on positions allow.

    flags      which rows are padding or not finite                               softmax_tiles.py
    forward    a launch a round, on top of a running (o, m, l)                    softmax_forward.py
    delta      sum_e out dO
    gradient   dq of every query tile, then dk and dv of every key tile, likewise  softmax_backward.py
    bias       the gradient of a bias by offset                                    softmax_bias.py

A round visits a position once, so its rows have one owner: no atomics, the same bits on every run. Rows are gathered where
they lie; unit keys are columns of the scores times key_scale. Sums are float32; what tl.dot multiplies is bfloat16 for
bfloat16 inputs, tf32 for float16, float32 for float32. Dense attention is one round in the order of the rows, whose tiles
need no look at positions but on the diagonal.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton

from .diagonals import fold, walk_of
from .softmax_backward import delta_kernel, gradient_kernel
from .softmax_bias import bias_kernel
from .softmax_forward import forward_kernel
from .softmax_tiles import BAD, Side, flags_kernel
from .tiles import EMULATE, padded, rows_of

MAX_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLAG_ROWS = 32


class Tiles(NamedTuple):
    """Rows of the owner, rows it meets at a time, columns of a block of D and of E, warps of a program, pipeline stages."""

    own: int
    other: int
    inner: int
    outer: int
    warps: int
    stages: int


# how tl.dot multiplies, the kernel, head_dim up to -> tiles; the first that fits is taken, "biased" before plain. Chosen for registers, not yet by
# time: test_aot.py holds bfloat16 of head_dim 64 to no spills on sm_80, sm_90 and sm_100, of 128 and float32 of 64 on sm_90
TILES = (
    ("bf16", "forward", 64, Tiles(64, 64, 64, 64, 8, 1)),
    ("bf16", "forward", 128, Tiles(64, 64, 128, 128, 8, 1)),
    ("bf16", "forward", 256, Tiles(64, 32, 128, 256, 8, 1)),
    ("bf16", "forward biased", 64, Tiles(64, 32, 64, 64, 8, 1)),
    ("bf16", "keys biased", 64, Tiles(32, 32, 32, 64, 4, 1)),
    ("bf16", "bias", 64, Tiles(64, 64, 64, 64, 8, 1)),
    ("bf16", "", 64, Tiles(64, 32, 64, 64, 8, 1)),
    ("bf16", "", 128, Tiles(32, 32, 128, 128, 8, 1)),
    ("bf16", "", 256, Tiles(32, 32, 64, 64, 8, 1)),
    ("tf32", "forward", 64, Tiles(64, 32, 64, 64, 4, 1)),
    ("tf32", "forward", 256, Tiles(64, 32, 32, 64, 8, 1)),
    ("tf32", "", 64, Tiles(32, 32, 32, 64, 4, 1)),
    ("tf32", "", 256, Tiles(32, 32, 32, 32, 8, 1)),
    ("ieee", "forward", 64, Tiles(32, 16, 16, 32, 8, 1)),
    ("ieee", "forward", 256, Tiles(32, 16, 16, 16, 8, 1)),
    ("ieee", "keys", 64, Tiles(16, 16, 16, 32, 4, 1)),
    ("ieee", "keys", 256, Tiles(16, 16, 16, 16, 8, 1)),
    ("ieee", "", 256, Tiles(16, 16, 16, 32, 4, 1)),
)


def refuses(q: Tensor, k: Tensor | None, v: Tensor) -> str | None:
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


def guard(device: torch.device):
    """Triton launches on the current device, which need not be that of the inputs."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _signed(x: int) -> int:
    """32 bits as the int32 that a kernel takes."""
    return (x & 0xFFFFFFFF) - ((x & 0x80000000) << 1)


class _Call:
    """What the launches of one forward or backward share."""

    def __init__(self, q: Tensor, k: Tensor | None, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None,
                 key_scale: Tensor | None, order_q: Tensor | None, order_k: Tensor | None, rank_q: Tensor | None,
                 rank_k: Tensor | None, bucket_q: Tensor | None, bucket_k: Tensor | None, *, chunk: int, look_back: int,
                 look_ahead: int, window: int, is_causal: bool, self_rule: int, dedupe: bool, wrap: bool, scale: float,
                 dropout_p: float, seed: int, bias: Tensor | None = None) -> None:
        self.B, self.Hq, self.L, self.D = q.shape
        self.H, self.S, self.E = v.shape[1:]
        self.q, self.k, self.v, self.key_scale = q, q if k is None else k, v, key_scale
        self.shared, self.device, self.cu = k is None, q.device, None if cu_seqlens is None else cu_seqlens.contiguous()
        self.mask = None if mask is None else mask.contiguous().view(torch.uint8)
        self.identity = order_q is None
        self.centred = order_k is not None and not self.identity
        self.order_q, self.order_k = order_q, order_k if self.centred else order_q
        self.rank_q, self.rank_k = rank_q, rank_q if rank_k is None else rank_k
        self.bucket_q, self.bucket_k = bucket_q, bucket_q if bucket_k is None else bucket_k
        self.R = 1 if self.identity else order_q.shape[2]
        self.packed = cu_seqlens is not None
        self.sequences = cu_seqlens.numel() - 1 if self.packed else 1
        # one chunk of all is the largest
        self.chunk, self.look_back, self.look_ahead = max(min(chunk, max(self.L, self.S)), 1), look_back, look_ahead
        if not wrap:
            # beyond the ends there is nothing to see, and no product of these may overflow
            most = triton.cdiv(max(self.L, self.S), self.chunk)
            self.look_back, self.look_ahead = min(look_back, most), min(look_ahead, most)
            self.dense = self.identity and not window and self.look_back == most and (is_causal or self.look_ahead == most)
        else:
            self.dense = False
        self.wrap, self.scale, self.self_rule, self.near = wrap, scale, self_rule, window > 0
        # the kernels count positions in 32 bits
        self.apart = min(window, 2**31 - 1)
        self.causal, self.dedupe = is_causal, dedupe and self.R > 1
        if bias is not None and (not self.identity or self.shared or self_rule or wrap):
            raise ValueError("tile attention in Triton takes a bias with keys of their own, as they stand, and no self_rule")
        self.bias, self.furthest = bias, 0 if bias is None else bias.shape[1] // 2
        if bias is not None and bias.stride(1) != 1:
            self.bias = bias.contiguous()
        # the table, from row to row, and its reach
        self.table = (self.bias, 0 if bias is None else self.bias.stride(0), self.furthest)
        self.dropout_p = dropout_p
        gain = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
        self.random = (_signed(seed), _signed(seed >> 32), _signed(min(math.floor(dropout_p * 2**32), 2**32 - 1)), gain)
        ieee = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
        self.dot = "bf16" if q.dtype == torch.bfloat16 else "ieee" if ieee else "tf32"

    def prepare(self, grad: Tensor | None = None, out: Tensor | None = None, lse: Tensor | None = None) -> None:
        """The flags of every row, delta, and both sides."""
        sizes = [self.B * self.Hq * self.L, self.B * self.H * self.S, self.B * self.H * self.S]
        sizes = [0 if self.shared else sizes[0], *sizes[1:], 0 if grad is None else sizes[0]]
        flags = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        of_q, of_k, of_v, of_grad = flags.split(sizes)
        of_q = of_k if self.shared else self.flag(self.q, None, of_q)
        self.flag(self.k, self.mask, of_k)
        self.flag(self.v, None, of_v)
        delta = None
        if grad is not None:
            delta = torch.empty(self.B, self.Hq, self.L, dtype=torch.float32, device=self.device)
            if delta.numel():
                delta_kernel[(self.B * self.Hq * triton.cdiv(self.L, FLAG_ROWS),)](
                    out, *rows_of(grad), delta, of_grad, self.Hq, self.L, E=self.E, BE=padded(self.E), C=FLAG_ROWS, num_warps=4,
                    enable_fp_fusion=True)
        # 1 or 0, read by every program: only bad rows make the kernels look which results they reach
        self.bad = (flags.amax(keepdim=True) >= BAD).to(torch.uint8) if flags.numel() else flags.new_zeros(1)
        y = self.v if grad is None else grad
        nothing = self.bad
        self.queries = Side(*rows_of(self.q), *rows_of(y), of_q, of_grad, nothing if lse is None else lse,
                            nothing if delta is None else delta, *self.tables(self.order_q, self.rank_q, self.bucket_q),
                            self.Hq, self.L)
        self.keys = Side(*rows_of(self.k), *rows_of(self.v), of_k, of_v,
                         nothing if self.key_scale is None else self.key_scale.contiguous(), nothing,
                         *self.tables(self.order_k, self.rank_k, self.bucket_k), self.H, self.S)

    def flag(self, x: Tensor, mask: Tensor | None, flags: Tensor) -> Tensor:
        B, heads, N, dim = x.shape
        if flags.numel():
            flags_kernel[(B * heads * triton.cdiv(N, FLAG_ROWS),)](
                *rows_of(x), mask, flags, heads, N, D=dim, BD=padded(dim), C=FLAG_ROWS, HAS_MASK=mask is not None, num_warps=4,
                enable_fp_fusion=True)
        return flags

    def tables(self, *given: Tensor | None) -> list[Tensor]:
        return [self.bad if x is None else x.contiguous() for x in given]

    def tiles(self, kernel: str) -> Tiles:
        width = max(self.D, self.E)
        names = (kernel, "") if self.bias is None else (f"{kernel} biased", kernel, "")
        fits = [(names.index(of), t) for dot, of, most, t in TILES if dot == self.dot and of in names and most >= width]
        tiles = min(fits, key=lambda fit: fit[0])[1]
        own = tiles.own if self.dense else min(tiles.own, padded(self.chunk))
        window = max(self.L, self.S) if self.dense else self.chunk * (1 if self.wrap else self.look_back + self.look_ahead + 1)
        return tiles._replace(own=own, other=min(tiles.other, padded(window)))

    def cut(self, tiles: Tiles) -> tuple[int, int, int, int]:
        """Rows of a chunk, its tiles, and how many chunks queries and keys make; packed, bounds that need no look."""
        chunk = tiles.own if self.dense else self.chunk
        slots = [n // chunk + self.sequences if self.packed else triton.cdiv(n, chunk) for n in (self.L, self.S)]
        return chunk, triton.cdiv(chunk, tiles.own), *slots

    def limits(self, chunk: int) -> tuple[int, int, int]:
        """Chunks before and after, and how far apart positions may be."""
        if not self.dense:
            return self.look_back, self.look_ahead, self.apart
        most = triton.cdiv(max(self.L, self.S), chunk)
        return most, 0 if self.causal else most, 0

    def options(self, tiles: Tiles) -> dict[str, Any]:
        return self.common(tiles) | {
            "BM": tiles.own, "BN": tiles.other, "IDENTITY": self.identity, "CENTRED": self.centred,
            "SCALED": self.key_scale is not None, "SELF": self.self_rule, "BEFORE": self.R - 1 if self.dedupe else 0,
            "BUCKETS": self.bucket_q is not None, "WRAP": self.wrap, "BIAS": self.bias is not None}

    def common(self, tiles: Tiles) -> dict[str, Any]:
        return {"D": self.D, "BD": min(tiles.inner, padded(self.D)), "E": self.E, "BE": min(tiles.outer, padded(self.E)),
                "PACKED": self.packed, "CAUSAL": self.causal, "NEAR": self.near, "DROPOUT": self.dropout_p > 0, "DOT": self.dot,
                "EMULATE": EMULATE, "num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True}

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=self.device)

    def forward(self, out: Tensor, lse: Tensor) -> None:
        tiles = self.tiles("forward")
        chunk, per_chunk, slots, k_slots = self.cut(tiles)
        lead = (self.B, self.Hq, self.L)
        sums = (self.floats(*lead, self.E), self.floats(*lead), self.floats(*lead)) if self.R > 1 else (lse,) * 3
        for r in range(self.R):
            forward_kernel[(self.B * self.Hq * slots * per_chunk,)](
                self.queries, self.keys, self.cu, self.bad, *self.table, *sums, out, lse, slots, per_chunk, k_slots, self.sequences, chunk,
                r, self.R, *self.limits(chunk), self.scale, *self.random, LAST=r == self.R - 1, **self.options(tiles))

    def centres(self, chunk: int, slots: int, k_slots: int) -> tuple[Tensor, Tensor]:
        """The chunks of queries of all rounds, ordered by the key chunk they are centred on, and where each begins.

        -> [B, Hq, R slots], [B, Hq, R k_slots + 1]
        """
        slot = torch.arange(slots, device=self.device)
        first, there, base = slot * chunk, torch.ones_like(slot, dtype=torch.bool), torch.zeros_like(slot)
        if self.packed:
            starts, stops = self.cu[:-1].long(), self.cu[1:].long()
            bases = starts // chunk + torch.arange(self.sequences, device=self.device)
            sequence = torch.searchsorted(bases, slot, right=True) - 1
            base = bases[sequence]
            first = starts[sequence] + (slot - base) * chunk
            there = first < stops[sequence]
        opens = self.order_q[..., first.clamp(max=self.L - 1)].long()                          # [B, Hq, R, slots]
        turn = torch.arange(self.R, device=self.device)[:, None] * k_slots
        centre = torch.where(there, self.rank_q.gather(-1, opens) + base + turn, self.R * k_slots)
        ordered, entries = centre.flatten(2).sort(dim=-1, stable=True)
        wanted = torch.arange(self.R * k_slots + 1, device=self.device).expand(*ordered.shape[:2], -1)
        return entries, torch.searchsorted(ordered, wanted.contiguous())

    def gradients(self, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
        """Shared, dq is the whole gradient of the rows: what they get as queries, then as keys. -> dbias"""
        more = self.R > 1
        x_sum = self.floats(*dq.shape) if more or self.shared else self.bad
        seen = self.bad
        if self.self_rule == 1:
            seen = torch.empty(self.B, self.Hq, self.L, dtype=torch.uint8, device=self.device)
        far = self.bad if self.bias is None else self.floats(self.B, self.Hq, self.L, 2)
        self.walk(True, seen, (self.bad, self.bad), x_sum, self.bad, dq, self.bad, far)
        if not self.shared:
            x_sum = self.floats(*dk.shape) if more else self.bad
        self.walk(False, seen, None, x_sum, self.floats(*dv.shape) if more else self.bad, dq if self.shared else dk, dv, self.bad)
        return dq.new_empty(0) if self.bias is None else self.bias_gradient(far)

    def bias_gradient(self, far: Tensor) -> Tensor:
        """From the sums over offsets at the ends and beyond, [B, Hq, L, 2]."""
        tiles = self.tiles("bias")
        W = min(tiles.own, tiles.other)
        # offsets before the ends that any pair has
        nearest = self.furthest - 1
        if self.near:
            nearest = min(nearest, self.apart - 1)
        low, high = -min(nearest, self.L - 1), 0 if self.causal else min(nearest, self.S - 1)
        if not self.dense:
            low, high = max(low, 1 - (self.look_back + 1) * self.chunk), min(high, (self.look_ahead + 1) * self.chunk - 1)
        least, most = -((-low - 1) // W) - 1, (high + W - 1) // W
        apart, slots = most - least + 1, self.L // W + self.sequences if self.packed else triton.cdiv(self.L, W)
        walk, walks = walk_of(slots, apart)
        dbias, programs = self.floats(self.Hq, 2 * self.furthest + 1).zero_(), self.B * self.Hq * walks * apart
        if self.furthest and programs:
            sums = self.floats(self.B, self.Hq, walks, apart, 2 * W)
            bias_kernel[(programs,)](
                self.queries, self.keys, self.cu, self.bad, *self.table, sums, slots, self.sequences, self.chunk, self.look_back,
                self.look_ahead, self.apart, self.scale, *self.random, walk, walks, least, most, W=W, CHUNKED=not self.dense,
                **self.common(tiles))
            dbias = fold(sums.sum((0, 2)), (least - 1) * W, self.furthest)
        ends = far.sum((0, 2))                                                  # [Hq, 2]
        dbias[:, 0] += ends[:, 0]
        dbias[:, -1] += ends[:, 1]
        return dbias

    def walk(self, queries: bool, seen: Tensor, met: tuple[Tensor, Tensor] | None, x_sum: Tensor, y_sum: Tensor, dx: Tensor,
             dy: Tensor, far: Tensor) -> None:
        """Every round of one owner."""
        tiles = self.tiles("queries" if queries else "keys")
        chunk, per_chunk, *slots = self.cut(tiles)
        sides, heads = (self.queries, self.keys), self.Hq
        if not queries:
            if met is None:
                met = self.centres(chunk, *slots) if self.centred and slots[0] else (self.bad, self.bad)
            slots, sides, heads = slots[::-1], sides[::-1], self.H
        programs = self.B * heads * slots[0] * per_chunk
        for r in range(self.R if programs else 0):
            last = r == self.R - 1
            begun = r > 0 or (self.shared and not queries)
            gradient_kernel[(programs,)](
                *sides, self.cu, self.bad, *self.table, far, seen, *met, x_sum, y_sum, dx, dy, slots[0], per_chunk, slots[1], self.sequences,
                chunk, r, self.R, int(begun), *self.limits(chunk), self.scale, *self.random, QUERIES=queries, LAST=last,
                FINAL=last and not (self.shared and queries), **self.options(tiles))


def forward(
    q: Tensor,                                 # [B, Hq, L, D]
    k: Tensor | None,                          # [B, H, S, D], None = the rows of q
    v: Tensor,                                 # [B, H, S, E]
    mask: Tensor | None,                       # [B, S], True = padded
    cu_seqlens: Tensor | None,                 # [P+1] int32
    key_scale: Tensor | None,                  # [B, H, S] float32
    order_q: Tensor | None,                    # [B, Hq, R, L] int32, positions by place; None = as they are, one round
    order_k: Tensor | None,                    # [B, H, R, S], None = order_q
    rank_q: Tensor | None,                     # [B, Hq, R, L], key chunk a query is centred on, by position
    rank_k: Tensor | None,                     # [B, H, R, S], chunk of a key
    bucket_q: Tensor | None,                   # [B, Hq, R, L], None = all alike
    bucket_k: Tensor | None,                   # [B, H, R, S]
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """-> out [B, Hq, L, E], lse [B, Hq, L]

    Options: chunk, look_back, look_ahead, window (0: any distance), is_causal, self_rule (0 ordinary, 1 fallback, 2 always and
    once), dedupe, wrap, scale, dropout_p, seed, bias [Hq, 2K+1] float32.
    """
    call = _Call(q, k, v, mask, cu_seqlens, key_scale, order_q, order_k, rank_q, rank_k, bucket_q, bucket_k, **options)
    out = torch.empty(call.B, call.Hq, call.L, call.E, dtype=q.dtype, device=q.device)
    lse = call.floats(call.B, call.Hq, call.L)
    if not call.S:
        return out.zero_(), lse.fill_(-math.inf)
    if lse.numel():
        with guard(q.device):
            call.prepare()
            call.forward(out, lse)
    return out, lse


def backward(
    grad_out: Tensor,                          # [B, Hq, L, E]
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    key_scale: Tensor | None,
    order_q: Tensor | None,
    order_k: Tensor | None,
    rank_q: Tensor | None,
    rank_k: Tensor | None,
    bucket_q: Tensor | None,
    bucket_k: Tensor | None,
    out: Tensor,                               # [B, Hq, L, E]
    lse: Tensor,                               # [B, Hq, L]
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dq [B, Hq, L, D], dk [B, H, S, D] (empty when k is None: dq is the gradient of both), dv [B, H, S, E], dbias
    [Hq, 2K+1] (empty without a bias)"""
    call = _Call(q, k, v, mask, cu_seqlens, key_scale, order_q, order_k, rank_q, rank_k, bucket_q, bucket_k, **options)
    dq, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, v))
    dk = dq.new_empty(0) if k is None else torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dbias = dq.new_empty(0) if call.bias is None else call.floats(*call.bias.shape).zero_()
    if not call.S or not call.L:
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias
    if call.B * call.H:
        with guard(q.device):
            call.prepare(grad_out, out.contiguous(), lse.contiguous())
            dbias = call.gradients(dq, dk, dv)
    return dq, dk, dv, dbias
