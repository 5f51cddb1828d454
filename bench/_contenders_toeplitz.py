"""Who takes part beside linear attention with relative positions: one builder each, from the same features.

q and k are features (positive numbers, M = D), b a bias of each head, with a number for every offset unless `reach` is
given. The same bias goes to all; its gradient is part of the backward pass where `learned`.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from _contenders import Contender, missing_of
from _contenders_lsh import directed
from _floors import Toeplitz
from torch import Tensor
from torch.nn import functional as F

import longattn

METHODS = ("prefix", "tiles", "fft")


class Case(NamedTuple):
    """One measurement. direction: as in `_floors.floor`. reach: of the bias; None: every offset.

    feature: "raw", q and k are features; "favor": D of q and k become n_features of unit rows, inside the call.
    """

    n: int
    B: int = 1
    H: int = 8
    D: int = 64
    E: int = 64
    feature: str = "raw"
    reach: int | None = None
    learned: bool = True
    method: str = "tiles"
    dtype: str = "float32"
    direction: str = "forward"
    impl: str = "cpu"
    is_causal: bool = True
    n_features: int = 64

    @property
    def M(self) -> int:
        return self.D if self.feature == "raw" else self.n_features

    @property
    def reaches(self) -> int:
        return self.n - 1 if self.reach is None else self.reach

    @property
    def shape(self) -> Toeplitz:
        sizes = (self.n, self.B, self.H, self.M, self.E, self.reaches, self.method)
        return Toeplitz(*sizes, self.dtype, self.is_causal)

    @property
    def drawn(self) -> tuple:
        """Cases that are alike in this have the same inputs."""
        return *self[:5], self.feature, self.reach, self.dtype


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    grad_out: Tensor


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Unit normal v and grad_out `[B, H, n, .]`, features as of positive maps, a normal bias `[H, 2 reach + 1]`."""
    generator, dtype = torch.Generator(device).manual_seed(0), getattr(torch, case.dtype)

    def draw(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device).normal_(generator=generator)

    rows = (case.B, case.H, case.n)
    q, k, v, grad_out = (draw(*rows, width) for width in (case.D, case.D, case.E, case.E))
    if case.feature == "raw":
        q, k = q.abs_(), k.abs_()
    return Inputs(q, k, v, draw(case.H, 2 * case.reaches + 1), grad_out)


def call_of(case: Case, inputs: Inputs, function):
    """The call to measure. function(q, k, v, bias) -> out"""
    q, k, v, bias, grad_out = inputs
    if case.learned:
        return directed(case, function, [q, k, v, bias], grad_out)
    return directed(case, lambda q, k, v: function(q, k, v, bias), [q, k, v], grad_out)


def factors_of(case: Case, bias: Tensor) -> Tensor:
    """`[H, 2 n - 1]`, exp(b) of every offset, 0 for the keys ahead of a causal query."""
    n, t = case.n, torch.arange(1 - case.n, case.n, device=bias.device)
    c = torch.exp(bias - bias.amax(-1, keepdim=True))[:, t.clamp(-case.reaches, case.reaches) + case.reaches]
    return torch.cat([c[:, :n], torch.zeros_like(c[:, n:])], 1) if case.is_causal else c


def dense_of(case: Case, by_offset: Tensor) -> Tensor:
    """`[H, 2 n - 1]` -> `[H, n, n]`"""
    i = torch.arange(case.n, device=by_offset.device)
    return by_offset[:, i - i[:, None] + case.n - 1]


# builders


def options_of(case: Case) -> dict:
    feature_map = "identity"
    if case.feature == "favor":
        feature_map = longattn.Favor(case.D, case.n_features, normalize="l2")
    return {"feature_map": feature_map, "rpe_method": case.method, "is_causal": case.is_causal, "impl": case.impl}


def ours(case: Case, inputs: Inputs):
    """longattn.linear_attention(rpe_bias=b) by one method."""
    options = options_of(case)
    return call_of(case, inputs, lambda q, k, v, bias: longattn.linear_attention(q, k, v, rpe_bias=bias, **options))


def straight(case: Case, inputs: Inputs):
    """torch.fft as the paper's formula says it: one transform of all products of features and values."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        n, c = case.n, factors_of(case, bias)
        # the factor of shift i - j is that of offset j - i
        column = torch.cat([c[:, :n].flip(1), c.new_zeros(case.H, 1), c[:, n:].flip(1)], 1)    # [H, 2 n]
        values = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        products = k[..., :, None] * values[..., None, :]                                      # [B, H, n, M, E + 1]
        spectrum = torch.fft.rfft(products, 2 * n, dim=2) * torch.fft.rfft(column)[:, :, None, None]
        sums = torch.fft.irfft(spectrum, 2 * n, dim=2)[:, :, :n]
        total = torch.einsum("bhnm,bhnme->bhne", q, sums)
        return total[..., :-1] / total[..., -1:]

    return call_of(case, inputs, attend)


def explicit(case: Case, inputs: Inputs):
    """The product of n x n weights."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        w = q @ k.mT * dense_of(case, factors_of(case, bias))
        return w @ v / w.sum(-1, keepdim=True)

    return call_of(case, inputs, attend)


def sdpa(case: Case, inputs: Inputs):
    """torch's exact attention with the same bias, as the mask of n x n that it takes: another function."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        t = torch.arange(1 - case.n, case.n, device=bias.device)
        by_offset = bias[:, t.clamp(-case.reaches, case.reaches) + case.reaches]
        if case.is_causal:
            by_offset = by_offset.masked_fill(t > 0, -math.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense_of(case, by_offset)[None])

    return call_of(case, inputs, attend)


CONTENDERS = {
    "longattn": Contender(ours, True, "longattn"),
    "torch.fft, straight": Contender(straight, True),
    "torch n x n": Contender(explicit, True),
    "torch SDPA": Contender(sdpa, False),
}
missing = functools.partial(missing_of, CONTENDERS)


def build(name: str, case: Case, inputs: Inputs | None = None):
    return CONTENDERS[name].build(case, make_inputs(case) if inputs is None else inputs)


# one decoding step


def decode_ours(case: Case):
    """A step after a state of 3 reach tokens."""
    q, k, v, bias, _ = make_inputs(case._replace(n=3 * case.reach))
    options = {**options_of(case), "rpe_bias": bias, "rpe_method": "prefix"}
    state = None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal state
        out, state = longattn.linear_attention_with_state(q, k, v, state=state, **options)
        return out

    step = torch.no_grad()(attend)
    step(q, k, v)
    token = [x[:, :, -1:].contiguous() for x in (q, k, v)]
    return lambda: step(*token)


DECODERS = {"longattn": decode_ours}
