"""Relative positions' part of the table: cases of linear attention with a bias, and the check of one case.

Prefix and tiles are held to the budgets of assertions.py. The FFT, whose error is one of the largest weights of a
sequence rather than of each row's own, is held to its published bound, `fft_bound`.
"""

from __future__ import annotations

import functools
import math
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import features as maps
from ..favor import Favor
from ..ops._prefix import accumulator
from ..ops._toeplitz import factors
from ..ops._toeplitz_fft import spans
from ..ops.linear import linear_attention
from ..reference.toeplitz import toeplitz_attention
from .assertions import FORWARD_FACTOR, GRADIENT_FACTOR, HEADS, LONG, assert_within_budget, blocks
from .cases import FavorCase, LinearCase, LinearInputs, build

METHODS = ("prefix", "tiles", "fft")


@dataclass(frozen=True)
class ToeplitzCase(LinearCase):
    """A `LinearCase` with a bias [Hq, 2 reach + 1]."""

    reach: int = 20
    spread: float = 1.0                        # standard deviation of the bias
    slope: float = 0.0                         # ALiBi's: minus this for each token of distance
    shared: bool = False                       # one bias for all heads
    holes: bool = False                        # a fifth of the offsets is -inf


def _causal(name: str, **options) -> ToeplitzCase:
    return ToeplitzCase(f"causal, {name}", is_causal=True, **options)


def _full(name: str, **options) -> ToeplitzCase:
    return ToeplitzCase(f"full, {name}", **options)


def _both(name: str, **options) -> tuple[ToeplitzCase, ToeplitzCase]:
    return _causal(name, **options), _full(name, **options)


_L2 = FavorCase(n_features=32, l2=True)
TOEPLITZ = (
    # lengths around chunks, a prime, and biases from shorter than a chunk to longer than the sequence
    *(case for L, reach in ((1, 1), (2, 1), (63, 1), (64, 17), (65, 64), (100, 63), (130, 40), (130, 129), (100, 200))
      for case in _both(f"L={L}, reach {reach}", L=L, reach=reach)),
    *_both("L=1009, reach 100", L=1009, B=1, H=1, reach=100),
    _full("L=1 S=37", L=1, S=37, reach=9),
    _full("L=37 S=1", L=37, S=1, reach=9),
    _full("L=50 S=210", L=50, S=210, reach=30),
    _full("L=210 S=50", L=210, S=50, reach=70),
    # dims: 1, odd, register tile edges, wide
    *(ToeplitzCase(f"dims {D} and {E}", B=1, L=150, D=D, E=E, is_causal=D % 2 == 0, normalize=D > 1, reach=33)
      for D, E in ((1, 5), (3, 1), (16, 31), (64, 64), (31, 100), (128, 17), (256, 8))),
    # features
    *_both("Favor", L=150, favor=_L2, reach=33),
    _causal("Favor, hyperbolic, key mean", L=100, favor=FavorCase("hyperbolic", 32, l2=True, center=True)),
    _full("relu", L=70, feature="relu"),
    _causal("identity", L=70, feature="identity"),
    # unnormalised
    *_both("unnormalized", L=150, normalize=False, scale=-0.3, reach=40),
    _causal("unnormalized, one factor", L=90, normalize=False, reach=0),
    # biases
    *_both("shared by heads", L=90, H=3, shared=True),
    *_both("holes", L=150, holes=True, reach=30),
    *_both("steep", L=150, slope=0.5, reach=149),
    *_both("ALiBi, clipped", L=200, B=1, slope=0.05, spread=0.0, reach=64),
    # masks
    *(ToeplitzCase(f"{mask} masked, causal={causal}", L=150, is_causal=causal, mask=mask, reach=25)
      for mask in ("tail", "random", "one row", "all") for causal in (False, True)),
    # heads that share keys
    _causal("GQA", L=90, groups=3, mask="random"),
    _full("MQA", H=1, L=33, S=70, groups=4),
    # packed sequences, some empty
    *(ToeplitzCase(f"packed, causal={causal}", B=1, L=267, lengths=(1, 64, 0, 130, 65, 7), is_causal=causal)
      for causal in (False, True)),
    _causal("packed with everything", B=1, L=133, lengths=(40, 0, 90, 3), mask="random", groups=2, favor=_L2),
    # nothing
    _full("B=0", B=0, L=5),
    _full("L=0", L=0, S=7),
    _full("S=0", L=7, S=0),
    _causal("L=S=0", L=0),
)  # fmt: skip
BY_NAME = {case.name: case for case in TOEPLITZ}


class ToeplitzInputs(NamedTuple):
    """What one call takes, and the gradient that comes back to it."""

    q: Tensor                                  # [B, Hq, L, D]
    k: Tensor                                  # [B, H, S, D]
    v: Tensor                                  # [B, H, S, E]
    bias: Tensor                               # [Hq, 2 reach + 1] or [2 reach + 1]
    options: dict                              # keyword arguments of linear_attention
    grad_output: Tensor                        # [B, Hq, L, E]

    def plain(self) -> LinearInputs:
        return LinearInputs(self.q, self.k, self.v, None, self.options, self.grad_output, None)

    def double(self) -> ToeplitzInputs:
        """The clean numbers in float64: what the oracle is given."""
        plain = self.plain()._replace(grad_state=self.grad_output).double()
        return ToeplitzInputs(*plain[:3], self.bias.double(), plain.options, plain.grad_output)


def build_toeplitz(case: ToeplitzCase, dtype=torch.float32, device: str = "cpu", seed: int = 0) -> ToeplitzInputs:
    """Inputs of `case`; the bias is float32 (float64 for float64), as a parameter is."""
    plain = build(case, dtype, device, seed)
    g = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) + seed + 1)
    heads = () if case.shared else (case.H * case.groups,)
    bias = case.spread * torch.randn(*heads, 2 * case.reach + 1, generator=g, dtype=torch.float64)
    bias = bias - case.slope * (torch.arange(2 * case.reach + 1) - case.reach).abs()
    if case.holes:
        hidden = torch.rand(bias.shape, generator=g) < 0.2
        # a query still sees itself
        hidden[..., case.reach] = False
        bias = bias.masked_fill(hidden, -math.inf)
    bias = bias.to(device, accumulator(dtype))
    return ToeplitzInputs(*plain[:3], bias, plain.options, plain.grad_output)


def evaluate_toeplitz(inputs: ToeplitzInputs, call) -> dict[str, Tensor]:
    """Result and gradients of `call(q, k, v, bias) -> output` by name."""
    # detach keeps the strides: what the caller laid out is what the kernel reads
    leaves = {f"d{name}": getattr(inputs, name).detach().requires_grad_() for name in ("q", "k", "v", "bias")}
    output = call(*leaves.values())
    favor = inputs.options["feature_map"]
    if isinstance(favor, Favor):
        leaves["dlog_temperature"] = favor.log_temperature
    weight = inputs.grad_output.to(output.dtype)
    grads = torch.autograd.grad(output, list(leaves.values()), weight, allow_unused=True, materialize_grads=True)
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def run_toeplitz(inputs: ToeplitzInputs, impl: str, method: str = "auto") -> dict[str, Tensor]:
    """The public function with one engine and method."""
    names = {"impl": impl, "rpe_method": method, **inputs.options}
    return evaluate_toeplitz(inputs, lambda q, k, v, bias: linear_attention(q, k, v, rpe_bias=bias, **names))


def _map(feature_map, x: Tensor, keys: bool) -> Tensor:
    """The features in the dtype of x, all of it."""
    if not isinstance(feature_map, Favor):
        return maps.FUSED[feature_map](x)
    projection, root, kind = feature_map.projection.to(x.dtype), feature_map.root.to(x.dtype), feature_map.kind
    mean = feature_map.key_mean.to(x.dtype) if keys and feature_map.center_keys else None
    phi, a = maps.favor_features(maps.favor_rows(x, root, True, mean), projection, kind)
    return phi * torch.exp(a - maps.favor_bound(projection, root, kind))[..., None] if keys else phi


def run_eager(inputs: ToeplitzInputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """The reference's formula with every tensor in `dtype`, the sums included: what plain PyTorch gives."""
    o = inputs.options
    names = {"is_causal": o["is_causal"], "normalize": o["normalize"]}

    def call(q, k, v, bias):
        c = factors(bias, q.shape[1], bias.shape[-1] // 2, dtype=dtype, **names)
        phi_q, phi_k = _map(o["feature_map"], q, False), _map(o["feature_map"], k, True)
        output, _ = toeplitz_attention(phi_q, phi_k, v, c, o["key_padding_mask"], o["cu_seqlens"], **names)
        return output if o["scale"] is None else o["scale"] * output

    return evaluate_toeplitz(inputs, call)


def _matrix(name: str, x: Tensor) -> Tensor:
    """A bias is judged in runs of 64 offsets, a scalar as one row."""
    return x.reshape(1, 1, -1, x.shape[-1] if x.dim() else 1).mT if name in ("dbias", "dlog_temperature") else x


@functools.cache
def oracle(case: ToeplitzCase, dtype: torch.dtype) -> dict[str, Tensor]:
    """The reference's results in float64 for the inputs of seed 0, once for all engines and methods."""
    return run_toeplitz(build_toeplitz(case, dtype).double(), "reference")


@functools.cache
def _eager_errors(case: ToeplitzCase, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of each result, the error of eager PyTorch in each block, the worst of a dozen heads.

    In float64, where the oracle rounds no less and in shorter vectors, it is four times float32's in float64's units.
    """
    eager_dtype = torch.float32 if dtype == torch.float64 else dtype
    shrink = 1 if eager_dtype == dtype else 4 * torch.finfo(dtype).eps / torch.finfo(eager_dtype).eps
    errors: dict[str, Tensor] = {}
    draws = 2 if case.L * (case.S or case.L) >= LONG else -(-HEADS // max(case.B * case.H, 1))
    for seed in range(draws):
        inputs = build_toeplitz(case, eager_dtype, seed=seed)
        known = seed == 0 and eager_dtype == dtype
        exact = oracle(case, dtype) if known else run_toeplitz(inputs.double(), "reference")
        clean = inputs.plain()._replace(grad_state=None).clean()
        eager = run_eager(inputs._replace(q=clean.q, k=clean.k, v=clean.v), eager_dtype)
        for name, x in exact.items():
            error = eager[name].double() - x
            error = shrink * blocks(_matrix(name, error)).amax((0, 1)) if x.numel() else x
            errors[name] = torch.maximum(errors.get(name, error), error)
    return errors


def check_toeplitz(case: ToeplitzCase, dtype: torch.dtype, impl: str, method: str, device: str = "cpu") -> None:
    """One case on one engine by prefix or tiles, result and gradients, within the budgets."""
    inputs = build_toeplitz(case, dtype, device)
    actual = run_toeplitz(inputs, impl, method)
    for name, x in actual.items():
        kept = accumulator(dtype) if name in ("dbias", "dlog_temperature") else dtype
        assert x.dtype == kept, f"{name} of {case.name!r} ({impl}, {method}): dtype {x.dtype}, expected {kept}"
    if case.sees_nothing or case.L == 0:
        for name, x in actual.items():
            assert (x == 0).all(), f"{name} of {case.name!r} ({dtype}, {impl}, {method}) must be 0: there is no pair"
        return
    expected, eager = oracle(case, dtype), _eager_errors(case, dtype)
    for name, x in actual.items():
        what = f"{name} of {case.name!r} ({dtype}, {impl}, {method})"
        if x.numel() and name != "output" and expected[name].abs().max() < 1e-12:
            # what is left of terms that cancel is rounding
            assert x.abs().max() <= 64 * torch.finfo(dtype).eps * inputs.grad_output.abs().sum(), what
            continue
        factor = GRADIENT_FACTOR if name.startswith("d") else FORWARD_FACTOR
        assert_within_budget(what, _matrix(name, x), _matrix(name, expected[name]), eager[name], factor=factor)


def fft_bound(inputs: ToeplitzInputs) -> Tensor:
    """How far `rpe_method="fft"` may be from the sum, for each row `[B, Hq, L, 1]` of the output, in float64.

    A circular product of c and a_f rounds to eps |c|_2 |a_f|_2 for each of its rows; the features of the query add
    those up, and the sum of its weights divides: 2 eps |c|_2 sum_f |q_f| |k_f|_2 (largest |v| + |o|) / z. If causal,
    the norms are those of the keys before the end of the row's span.
    """
    exact = inputs.double()
    o = exact.options
    names = {"is_causal": o["is_causal"], "normalize": o["normalize"]}
    q, k = _map(o["feature_map"], exact.q, False), _map(o["feature_map"], exact.k, True)
    mask, cu_seqlens = o["key_padding_mask"], o["cu_seqlens"]
    if mask is not None:
        k = k.masked_fill(mask[:, None, :, None], 0)
    L, S, G = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    c = factors(exact.bias, q.shape[1], max(L, S) - 1, dtype=torch.float64, **names)
    out, z = toeplitz_attention(q, k, exact.v, c, mask, cu_seqlens, **names)
    noise, middle = torch.zeros_like(z)[..., None], c.shape[1] // 2                            # [B, Hq, L, 1]
    plain = o["is_causal"] and mask is None and cu_seqlens is None
    for start, stop in spans(L) if plain else [(0, L)]:
        seen = stop if plain else max(L, S)
        lengths = k[:, :, :seen].norm(dim=2).repeat_interleave(G, 1)[..., None]                # [B, Hq, M, 1]
        near = c[:, middle + 1 - seen : middle + seen].norm(dim=1)[:, None, None]
        noise[:, :, start:stop] = near * (q[:, :, start:stop].abs() @ lengths)
    values = exact.v.abs().amax((2, 3)).repeat_interleave(G, 1)[..., None, None]
    noise = 2 * torch.finfo(inputs.q.dtype).eps * noise
    if not o["normalize"]:
        return noise * values * (1 if o["scale"] is None else abs(o["scale"]))
    return noise * (values + out.abs().amax(-1, keepdim=True)) / z[..., None].clamp_min(1e-300)
