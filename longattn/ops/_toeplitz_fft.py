"""Toeplitz products by torch's FFT, and linear attention with relative positions by them: rpe_method="fft" where
csrc/cpu/toeplitz_fft.cpp does not run. Stages surround the transforms: on GPUs those of kernels/triton/toeplitz_fft.py.

For features f and value columns e, sum_j c_t k_jf v_je is a Toeplitz product along the sequence, and the output
contracts it with q_if. The tensor of all n M E of them is never made: blocks of a few (f, e) at a time, rows along n,
go through the transforms and are contracted before the next. Luo et al. 2021 (arXiv 2106.12566), section 3.2.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

# of the real rows of a block: with their spectra they should stay in the caches
BLOCK_BYTES = 8 << 20
# of causal sequences: see `spans`
SPAN_GROWTH, SHORTEST_SPAN = 8, 64


def fast_length(n: int) -> int:
    """The smallest 2^a 3^b 5^c that is at least n, of those with 2^4 where n is more than 128: lengths for which
    transforms are fast. Odd ones take thrice the time."""
    return _smooth(n) if n <= 128 else 16 * _smooth(-(-n // 16))


def _smooth(n: int) -> int:
    best, five = 1 << max(n - 1, 0).bit_length(), 1
    while five < best:
        three = five
        while three < best:
            best = min(best, three << max(-(-n // three) - 1, 0).bit_length())
            three *= 3
        five *= 5
    return best


class _Circulant(NamedTuple):
    """The factors of n_q queries and n_k keys as spectra of circulant matrices, and which queries see any key."""

    length: int
    spectrum: Tensor                           # [G, length // 2 + 1]
    seen: Tensor                               # [G, n_q]


def _shifts(n_q: int, n_k: int, device: torch.device) -> Tensor:
    """i - j for all pairs, from the smallest on."""
    return torch.arange(1 - n_k, n_q, device=device)


def _circulant(c: Tensor, n_q: int, n_k: int, offset: int, is_causal: bool, padded: Tensor | None) -> _Circulant:
    """c: `[G, 2 reach + 1]`, its ends serve what is further; padded: `[n_k]`."""
    shifts, reach, length = _shifts(n_q, n_k, c.device), c.shape[1] // 2, fast_length(n_q + n_k - 1)
    t = -shifts - offset
    taken = c[:, t.clamp(-reach, reach) + reach]                                               # [G, n_q + n_k - 1]
    if is_causal:
        taken = taken.masked_fill(t > 0, 0)
    column = c.new_zeros(c.shape[0], length)
    column[:, shifts % length] = taken
    # counted, as the transforms leave rounding where the sum of no weight is 0
    keys = torch.ones(n_k, dtype=torch.float64, device=c.device) if padded is None else (~padded).double()
    count = torch.fft.irfft(torch.fft.rfft((column > 0).double()) * torch.fft.rfft(keys, length), length)
    return _Circulant(length, torch.fft.rfft(column), count[:, :n_q] > 0.5)


def _fold(d: Tensor, first: int, reach: int) -> Tensor:
    """Gradients d `[G, T]` of the offsets first, first + 1 .. -> those of factors `[G, 2 reach + 1]`."""
    T, dc = d.shape[1], d.new_zeros(d.shape[0], 2 * reach + 1)
    low, high = min(max(-reach - first, 0), T), min(max(reach + 1 - first, 0), T)
    dc[:, first + low + reach : first + high + reach] = d[:, low:high]
    dc[:, 0] += d[:, :low].sum(1)
    dc[:, -1] += d[:, high:].sum(1)
    return dc


class _Part(NamedTuple):
    """Queries of one sequence and the keys that they may see, of one key head, with length last, so that transforms run
    along memory."""

    b: int
    head: int
    heads: slice                               # its query heads, G of them
    rows: slice
    keys: slice
    q: Tensor                                  # [G, M, n_q]
    k: Tensor                                  # [M, n_k], 0 where padded
    values: Tensor                             # [E + 1, n_k], the last row 1; 0 where padded
    padded: Tensor | None                      # [n_k]


def spans(n: int, first: int = 0) -> list[tuple[int, int]]:
    """(start, stop) of queries that share a transform of the keys before stop, where keys before `first` are padded.

    Transforms round in units of the largest sums of weights, and the first queries of a causal sequence have the
    smallest. Each span goes to eight times as many keys as the one before, so that every row is rounded in units near
    its own; that makes a seventh more to transform, and a sixteenth less as there are fewer queries.
    """
    found = []
    while n - first > SHORTEST_SPAN:
        start = first + (n - first) // SPAN_GROWTH
        found.append((start, n))
        n = start
    return [*found, (0, n)]


def _places(L: int, S: int, cu_seqlens: Tensor | None, padded: Tensor | None, is_causal: bool):
    """Yields slices of queries and of the keys they may see, for one row of a batch."""
    ends = [(0, L)]
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != L or bounds != sorted(bounds):
            rule = f"must start at 0, never decrease and end at the length {L}"
            raise ValueError(f"longattn: cu_seqlens {rule}, got {bounds}")
        ends = list(pairwise(bounds))
    elif not is_causal or L != S:
        yield slice(0, L), slice(0, S)
        return
    for start, stop in ends:
        inside = spans(stop - start) if is_causal else [(0, stop - start)]
        if is_causal and padded is not None and stop > start:
            inside = spans(stop - start, int((~padded[start:stop]).int().argmax()))
        for low, high in inside:
            yield slice(start + low, start + high), slice(start, start + high)


def _parts(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, is_causal: bool):
    (B, H, S, E), G, L = v.shape, q.shape[1] // max(v.shape[1], 1), q.shape[2]
    for b in range(B):
        for rows, keys in _places(L, S, cu_seqlens, None if mask is None else mask[b], is_causal):
            if rows.start == rows.stop or keys.start == keys.stop:
                continue
            padded = None if mask is None else mask[b, keys]
            for head in range(H):
                heads = slice(head * G, (head + 1) * G)
                kt = k[b, head, keys].mT.contiguous()
                values = k.new_ones(E + 1, kt.shape[1])
                values[:E] = v[b, head, keys].mT
                if padded is not None:
                    kt, values = kt.masked_fill(padded, 0), values.masked_fill(padded, 0)
                yield _Part(b, head, heads, rows, keys, q[b, heads, rows].mT.contiguous(), kt, values, padded)


def _blocks(features: int, columns: int, row_bytes: int):
    """Yields slices of features and of value columns, so many that their rows fill a block."""
    rows = max(BLOCK_BYTES // row_bytes, 1)
    wide = min(columns, rows)
    deep = max(rows // wide, 1)
    for f in range(0, features, deep):
        for e in range(0, columns, wide):
            yield slice(f, min(f + deep, features)), slice(e, min(e + wide, columns))


class TorchStages:
    """The stages in torch's own operations, on any device and dtype, where nothing else is given."""

    @staticmethod
    def spread(left: Tensor, right: Tensor, rows: Tensor) -> None:
        """left `[F, n]`, right `[e, n]` -> the first n of rows `[F, e, length]`"""
        torch.mul(left[:, None], right, out=rows[..., : left.shape[1]])

    @staticmethod
    def contract(y: Tensor, weights: Tensor, into: Tensor) -> None:
        """y `[a, b, n]`, weights `[b, n]` -> their product summed over b, added to into `[a, n]`"""
        for weighted, row in zip(y.unbind(1), weights, strict=True):
            into.addcmul_(weighted, row)

    @staticmethod
    def correlate(x: Tensor, y: Tensor, into: Tensor) -> None:
        """x, y `[F, e, n]` -> the sum of x conj(y) over F and e, added to into `[n]`"""
        # written out: inside an op that torch.compile calls, the lazy conjugate of .conj() is lost
        into += y.conj_physical().mul_(x).sum((0, 1))


def engine(stages: Any) -> SimpleNamespace:
    """`forward` and `backward` with other stages."""
    return SimpleNamespace(forward=partial(forward, stages=stages), backward=partial(backward, stages=stages))


class _Rows:
    """Zero-padded products of feature and value rows, in memory that is used again, and their spectra."""

    def __init__(self, like: Tensor, length: int, stages: Any):
        self.like, self.length, self.stages, self.held = like, length, stages, like.new_zeros(0)

    def spectrum(self, left: Tensor, right: Tensor) -> Tensor:
        """left `[F, n]`, right `[e, n]` -> the spectra `[F, e, length // 2 + 1]` of their products"""
        shape = left.shape[0], right.shape[0], self.length
        size = shape[0] * shape[1] * shape[2]
        if self.held.numel() < size:
            self.held = self.like.new_zeros(size)
        # only the first n of each row are ever written: the rest stays 0
        rows = self.held[:size].view(shape)
        self.stages.spread(left, right, rows)
        return torch.fft.rfft(rows)


# what they do within is no graph of its own, also where a program calls the raw op with gradients on
@torch.no_grad()
def forward(
    q, k, v, c, mask, cu_seqlens, *, reach: int, offset: int, is_causal: bool, normalize: bool,
    stages: Any = TorchStages,
):  # fmt: skip
    """-> out `[B, Hq, L, E]` like v, normalizer `[B, Hq, L]`"""
    (B, Hq, L, M), E = q.shape, v.shape[3]
    out, normalizer = v.new_zeros(B, Hq, L, E), q.new_zeros(B, Hq, L)
    for one in _parts(q, k, v, mask, cu_seqlens, is_causal):
        n_q, n_k, at = one.q.shape[2], one.k.shape[1], (one.b, one.heads, one.rows)
        circulant = _circulant(c[one.heads], n_q, n_k, offset + one.rows.start - one.keys.start, is_causal, one.padded)
        products, total = _Rows(q, circulant.length, stages), q.new_zeros(one.q.shape[0], E + 1, n_q)
        for f, e in _blocks(M, E + 1, circulant.length * q.itemsize):
            spectrum = products.spectrum(one.k[f], one.values[e])
            for g, sums in enumerate(total):
                y = torch.fft.irfft(spectrum * circulant.spectrum[g], circulant.length)[..., :n_q]
                stages.contract(y.transpose(0, 1), one.q[g, f], sums[e])
        z = total[:, E].masked_fill_(~circulant.seen, 0)
        result = total[:, :E].masked_fill_(~circulant.seen[:, None], 0)
        if normalize:
            result = torch.where(z == 0, 0, 1 / z)[:, None] * result
        out[at], normalizer[at] = result.mT.to(v.dtype), z
    return out, normalizer


@torch.no_grad()
def backward(
    grad_out, grad_normalizer, q, k, v, c, mask, cu_seqlens, out, normalizer, *, reach: int, offset: int,
    is_causal: bool, normalize: bool, stages: Any = TorchStages,
):  # fmt: skip
    """-> dq, dk, dv, dc like q, k, v, c; the spectra of the forward pass are made again"""
    M, E = q.shape[3], v.shape[3]
    dq, dk, dc, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(c), v.new_zeros(v.shape, dtype=q.dtype)
    for one in _parts(q, k, v, mask, cu_seqlens, is_causal):
        n_q, n_k, at = one.q.shape[2], one.k.shape[1], (one.b, one.heads, one.rows)
        first = offset + one.rows.start - one.keys.start
        circulant = _circulant(c[one.heads], n_q, n_k, first, is_causal, one.padded)
        above = _pulled(grad_out, grad_normalizer, out, normalizer, at, circulant.seen, normalize)
        keyed, queried = (_Rows(q, circulant.length, stages) for _ in range(2))
        dq_one, dk_one, dvalues = torch.zeros_like(one.q), torch.zeros_like(one.k), torch.zeros_like(one.values)
        correlation = torch.zeros_like(circulant.spectrum, dtype=torch.complex128)
        # not the lazy one, as in `correlate`
        transposed = circulant.spectrum.conj_physical()
        for f, e in _blocks(M, E + 1, circulant.length * q.itemsize):
            spectrum = keyed.spectrum(one.k[f], one.values[e])
            for g, kernel in enumerate(circulant.spectrum):
                pulled = queried.spectrum(one.q[g, f], above[g, e])
                # sum_i P_i A_(i-s) of every shift s is the derivative of its factor
                stages.correlate(pulled, spectrum, correlation[g])
                y = torch.fft.irfft(spectrum * kernel, circulant.length)[..., :n_q]
                stages.contract(y, above[g, e], dq_one[g, f])
                y = torch.fft.irfft(pulled.mul_(transposed[g]), circulant.length)[..., :n_k]
                stages.contract(y, one.values[e], dk_one[f])
                stages.contract(y.transpose(0, 1), one.k[f], dvalues[e])
        if one.padded is not None:
            dk_one, dvalues = dk_one.masked_fill(one.padded, 0), dvalues.masked_fill(one.padded, 0)
        dq[at] = dq_one.mT
        dk[one.b, one.head, one.keys] += dk_one.mT
        dv[one.b, one.head, one.keys] += dvalues[:E].mT
        shifts = _shifts(n_q, n_k, c.device)
        by_shift = torch.fft.irfft(correlation, circulant.length)[:, shifts % circulant.length]
        if is_causal:
            by_shift = by_shift.masked_fill(-shifts - first > 0, 0)
        dc[one.heads] += _fold(by_shift.flip(1), 1 - n_q - first, reach).to(dc.dtype)
    return dq, dk, dv.to(v.dtype), dc


def _pulled(grad_out, grad_normalizer, out, normalizer, at, seen: Tensor, normalize: bool) -> Tensor:
    """What comes back to numerator and normaliser of some rows, `[G, E + 1, n_q]`."""
    z = normalizer[at]                                                                         # [G, n_q]
    weight = grad_out[at].to(z.dtype)                                                          # [G, n_q, E]
    if normalize:
        weight = weight * torch.where(z == 0, 0, 1 / z)[..., None]
        last = -(weight * out[at]).sum(-1)
    else:
        last = torch.zeros_like(z) if grad_normalizer is None else grad_normalizer[at]
    return torch.cat([weight, last[..., None]], -1).mT.masked_fill(~seen[:, None], 0).contiguous()


def matvec(c: Tensor, x: Tensor) -> Tensor:
    """y_i = sum_j c_(j-i) x_j in torch's own operations. c: `[..., 2n-1]`, x: `[..., n, d]`, of one dtype."""
    n = x.shape[-2]
    length = fast_length(2 * n - 1)
    # the factor of shift i - j is that of offset j - i
    earlier, later = c[..., :n].flip(-1), c[..., n:].flip(-1)
    column = torch.cat([earlier, c.new_zeros(*c.shape[:-1], length - 2 * n + 1), later], -1)
    spectrum = torch.fft.rfft(x.mT, length) * torch.fft.rfft(column)[..., None, :]             # [..., d, length//2 + 1]
    return torch.fft.irfft(spectrum, length)[..., :n].mT
