"""Relative positional biases as parameters, and linear attention that takes one: kernelized attention with RPE."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..favor import Favor
from ..ops import _check
from ..ops._dispatch import IMPLS
from ..ops._toeplitz import METHODS
from ..ops.linear import linear_attention
from ..ops.toeplitz import weights
from .mechanisms import Mechanism

INITS = ("zeros", "alibi", "t5")


def alibi_slopes(num_heads: int) -> list[float]:
    """2^(-8/n), 2^(-16/n) .. for a power n of 2; the heads beyond one take every other slope of the next. Press et al.
    2022 (arXiv 2108.12409), section 3."""
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    return slopes + [2.0 ** (-4 * (2 * h + 1) / power) for h in range(num_heads - power)]


def t5_buckets(offsets: Tensor, n_buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """The bucket of each offset j - i: near ones have one each, beyond that they widen with the logarithm, up to
    max_distance. Bidirectional: the upper half is for keys ahead; else those share bucket 0. Raffel et al. 2020 (arXiv
    1910.10683), section 2.1."""
    half = n_buckets // 2 if bidirectional else n_buckets
    first = half * (offsets > 0) if bidirectional else torch.zeros_like(offsets)
    distance = offsets.abs() if bidirectional else (-offsets).clamp_min(0)
    near = half // 2
    # in float32, as T5 has it: the edges of its buckets depend on the rounding
    octaves = torch.log(distance.float().clamp_min(1) / near) / math.log(max_distance / near)
    far = (near + (octaves * (half - near)).long()).clamp_max(half - 1)
    return first + torch.where(distance < near, distance, far)


class RelativeBias(nn.Module):
    """A learnable bias of each head for each offset t = j - i from a query to a key, what `rpe_bias` takes.

    num_heads: H. max_distance: K; beyond it the bias is that at the end.
    clipped: False: K is a length, and every offset of so many tokens has a number, `[H, 2K-1]`.
    init: "zeros", free numbers that start at 0; "alibi", free ones that start at -slope |t|, with ALiBi's slopes;
        "t5", a number for each of n_buckets logarithmic buckets, starting at 0.
    n_buckets, bidirectional: of "t5"; weight `[H, n_buckets]` is the transpose of T5's embedding. bidirectional=False:
        no buckets for keys ahead, which a causal model does not see.
    trainable: False makes the weight a buffer.

    `forward()` returns `[H, 2K+1]`, offset t at t + K. Raises ValueError or TypeError in a sentence.
    """

    def __init__(
        self,
        num_heads: int,
        max_distance: int,
        clipped: bool = True,
        init: str = "zeros",
        *,
        n_buckets: int = 32,
        bidirectional: bool = True,
        trainable: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_bias_options("RelativeBias", max_distance, init, n_buckets, bidirectional)
        if type(num_heads) is not int or num_heads < 1:
            _check.fail("RelativeBias", f"num_heads must be a positive integer, got {num_heads!r}")
        if dtype is not None and dtype not in _check.DTYPES:
            _check.fail("RelativeBias", f"dtype must be float32, bfloat16, float16 or float64, got {dtype}", TypeError)
        self.num_heads, self.max_distance, self.clipped, self.init = num_heads, max_distance, bool(clipped), init
        self.n_buckets, self.bidirectional = n_buckets, bool(bidirectional)
        columns = n_buckets if init == "t5" else 2 * self.reach + 1
        weight = torch.empty(num_heads, columns, device=device, dtype=dtype)
        if trainable:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)
        self.reset_parameters()

    @property
    def reach(self) -> int:
        """The largest offset with a number of its own."""
        return self.max_distance if self.clipped else self.max_distance - 1

    def _offsets(self) -> Tensor:
        return torch.arange(-self.reach, self.reach + 1, device=self.weight.device)

    @property
    def bucket(self) -> Tensor | None:
        """Of "t5": which column of the weight an offset has. Not kept: no way to load or move weights can lose it."""
        if self.init != "t5":
            return None
        return t5_buckets(self._offsets(), self.n_buckets, self.max_distance, self.bidirectional)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.zero_()
        if self.init == "alibi":
            slopes = torch.tensor(alibi_slopes(self.num_heads), device=self.weight.device, dtype=self.weight.dtype)
            self.weight.sub_(slopes[:, None] * self._offsets().abs())

    def forward(self) -> Tensor:
        return self.weight[:, self.bucket] if self.init == "t5" else self.weight

    def extra_repr(self) -> str:
        shown = [f"{self.num_heads}, {self.max_distance}, init={self.init!r}"]
        shown += [] if self.clipped else ["clipped=False"]
        shown += [f"n_buckets={self.n_buckets}, bidirectional={self.bidirectional}"] if self.init == "t5" else []
        return ", ".join(shown + ([] if isinstance(self.weight, nn.Parameter) else ["trainable=False"]))


def check_bias_options(op: str, max_distance: int, init: str, n_buckets: int, bidirectional: bool) -> None:
    if type(max_distance) is not int or max_distance < 1:
        _check.fail(op, f"max_distance must be a positive integer, got {max_distance!r}")
    if init not in INITS:
        _check.fail(op, f"init must be one of {', '.join(map(repr, INITS))}, got {init!r}")
    if init != "t5":
        return
    least = 4 if bidirectional else 2
    if type(n_buckets) is not int or n_buckets < least or n_buckets % 2:
        _check.fail(op, f"n_buckets must be an even number, {least} or more, got {n_buckets!r}")
    near = n_buckets // 4 if bidirectional else n_buckets // 2
    if max_distance <= near:
        _check.fail(op, f"max_distance must be above {near}, where {n_buckets} buckets widen, got {max_distance}")


@dataclass(frozen=True, repr=False)
class NPRF(Mechanism):
    """Kernelized attention with relative positions: positive random features of unit rows and a learnable bias.

        o_i = sum_j exp(b_(j-i)) phi(q_i/|q_i|).phi(k_j/|k_j|) v_j / sum_j exp(b_(j-i)) phi(q_i/|q_i|).phi(k_j/|k_j|)

    Luo et al. 2021 (arXiv 2106.12566), in time linear in the length, causal too, and exact in the bias. It replaces the
    softmax by features: at lengths where softmax attention is affordable, that with the same bias costs no more and
    approximates nothing.

    head_dim, n_features, kind, temperature, learn_temperature, seed: of its `longattn.Favor` with normalize="l2".
        A lower temperature makes attention sharper, and more features are then needed.
    max_distance, clipped, init, n_buckets, bidirectional, trainable: of its `longattn.nn.RelativeBias`, which has a row
        for each head of the attention.
    rpe_method, impl: as in `longattn.linear_attention`.

    Every attention that takes this description gets a bias, and features, of its own. Causality needs L == S; between
    sequences of different lengths positions count from the start of both. The weights are never formed, so the
    module's dropout acts on the attention's output; weights asked for with need_weights are formed on the side. Raises
    ValueError or TypeError in a sentence.
    """

    head_dim: int
    n_features: int = 64
    max_distance: int = 128
    clipped: bool = True
    init: str = "zeros"
    n_buckets: int = 32
    bidirectional: bool = True
    trainable: bool = True
    kind: str = "positive"
    temperature: float | None = None
    learn_temperature: bool = False
    seed: int = 0
    rpe_method: str = "auto"
    impl: str = "auto"
    # made for each attention that takes this description
    favor: Favor | None = field(default=None, compare=False)
    rpe_bias: RelativeBias | None = field(default=None, compare=False)

    def __post_init__(self):
        check_bias_options("NPRF", self.max_distance, self.init, self.n_buckets, self.bidirectional)
        for name, x, known in (("rpe_method", self.rpe_method, METHODS), ("impl", self.impl, ("auto", *IMPLS))):
            if x not in known:
                _check.fail("NPRF", f"{name} must be one of {', '.join(map(repr, known))}, got {x!r}")
        if self.favor is None:
            # its sentences, now and not when an attention is made
            self._make_favor()

    def _make_favor(self) -> Favor:
        names = {name: getattr(self, name) for name in ("kind", "temperature", "learn_temperature", "seed")}
        return Favor(self.head_dim, self.n_features, normalize="l2", **names)

    def submodules(self, num_heads: int) -> dict[str, nn.Module]:
        names = {name: getattr(self, name) for name in ("clipped", "init", "n_buckets", "bidirectional", "trainable")}
        return {"favor": self._make_favor(), "rpe_bias": RelativeBias(num_heads, self.max_distance, **names)}

    def _parts(self) -> tuple[Favor, Tensor]:
        if self.favor is None or self.rpe_bias is None:
            _check.fail("NPRF", "this description has no parameters; MultiheadAttention(mechanism=...) makes them")
        return self.favor, self.rpe_bias()

    def attend(self, q, k, v, *, is_causal, key_padding_mask, dropout_p, attn_mask=None) -> Tensor:
        favor, bias = self._parts()
        masks = {"is_causal": is_causal, "key_padding_mask": key_padding_mask}
        bias = {"rpe_bias": bias, "rpe_method": self.rpe_method}
        output = linear_attention(q, k, v, feature_map=favor, impl=self.impl, **masks, **bias)
        return output if dropout_p == 0 else F.dropout(output, dropout_p)

    def weights(self, q, k, **masks) -> Tensor:
        return weights(q, k, *self._parts(), **masks)
