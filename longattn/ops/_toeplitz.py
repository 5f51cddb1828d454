"""What comes before the engines of linear attention with relative positions: factors, and the method."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from . import _check
from ._autograd import readable

METHODS = ("auto", "prefix", "tiles", "fft")
# logarithm below the largest of a head under which a factor counts as 0, so that no sum of weights is so small that its
# inverse overflows
SMALLEST = {torch.float32: -60.0, torch.float64: -600.0}


# factors


def check_bias(op: str, bias: Tensor, heads: int, device: torch.device) -> None:
    """Shape, dtype and device; values where reading them waits for nothing."""
    if not isinstance(bias, Tensor) or bias.dtype not in _check.DTYPES:
        came = _check.describe(bias)
        _check.fail(op, f"rpe_bias must be a tensor of float32, bfloat16, float16 or float64, got {came}", TypeError)
    if bias.dim() not in (1, 2) or bias.shape[-1] % 2 == 0 or (bias.dim() == 2 and bias.shape[0] != heads):
        shape = f"[{heads}, 2K+1], or [2K+1] for all heads: an odd number of offsets, the middle one being 0"
        _check.fail(op, f"rpe_bias must be {shape}, got {list(bias.shape)}")
    if bias.device != device:
        _check.fail(op, f"rpe_bias is on {bias.device} and query on {device}; move it with .to()")
    if bias.layout != torch.strided:
        _check.fail(op, f"rpe_bias must be dense, got {bias.layout}; pass rpe_bias.to_dense()", TypeError)
    if bias.device.type == "cpu" and bias.numel() > 0 and readable(bias) and not bias.detach().amax() < math.inf:
        _check.fail(op, "rpe_bias must hold finite numbers, or -inf for offsets to hide; it holds NaN or +inf")


def factors(bias: Tensor, heads: int, reach: int, *, is_causal: bool, normalize: bool, dtype: torch.dtype) -> Tensor:
    """exp(bias) `[heads, 2 reach + 1]` of the offsets -reach to reach; those beyond the bias take its ends.

    With normalize the largest of a head is 1: what it is divided by cancels, and depends on the bias alone, not on the
    length; those below e^-60 (float64: e^-600) are 0. With is_causal the offsets above 0 get 0.
    """
    bias = bias.to(dtype).expand(heads, -1)
    middle = bias.shape[1] // 2
    if is_causal:
        bias = bias[:, : middle + 1]
    if normalize:
        top = bias.detach().amax(-1, keepdim=True)
        # a head whose offsets are all -inf
        bias = bias - top.masked_fill(top == -math.inf, 0)
        bias = bias.masked_fill(bias < SMALLEST.get(dtype, -math.inf), -math.inf)
    c = torch.exp(bias)
    if is_causal:
        c = torch.cat([c, c.new_zeros(heads, middle)], 1)
    if reach <= middle:
        return c[:, middle - reach : middle + reach + 1].contiguous()
    # expand, not replicate padding: its backward is a plain sum, on every device the same each time
    before, after = (end.expand(-1, reach - middle) for end in (c[:, :1], c[:, -1:]))
    return torch.cat([before, c, after], 1)


# the method


# lengths from which the FFT is faster than tiles, [features, tokens] by device and direction; see its "how"
CROSSOVER = json.loads((Path(__file__).parent.parent / "data" / "toeplitz_crossover.json").read_text())
MEASURED_VALUE_DIM = 64


def prefers_fft(reach: int, device: str, features: int, value_dim: int, is_causal: bool) -> bool:
    """Whether the FFT is faster than tiles of so many offsets.

    A pair costs tiles M + E, and a token costs the FFT M (E + 1) transforms: between and beyond what was measured the
    length goes with M E / (M + E).
    """
    table = CROSSOVER["cpu" if device == "cpu" else "cuda"]["causal" if is_causal else "full"]
    M, tokens = table[0]
    for entry in table[1:]:
        if features >= entry[0]:
            M, tokens = entry
    E = MEASURED_VALUE_DIM
    # in integers, which torch.compile follows with any of them open
    return reach * (features + value_dim) * M * E >= tokens * features * value_dim * (M + E)


def choose(
    method: str, bias_reach: int, needed: int, *, shape: tuple[str, int, int, bool], packed: bool, keeps_state: bool
) -> tuple[str, str]:
    """-> the method, and why. needed: the largest offset of the call; shape: the rest of `prefers_fft`'s arguments."""
    if method != "auto":
        return method, "as asked for"
    if keeps_state:
        return "prefix", "the method that carries a state"
    # one after the other: a graph of any length is not tied to a side of it where the bias alone says no
    if not packed and prefers_fft(bias_reach, *shape) and prefers_fft(needed, *shape):
        return "fft", "the bias reaches further than tiles are faster"
    if torch.compiler.is_compiling():
        return "prefix", "in a graph of any length; with a number for every offset it is the same as tiles"
    if bias_reach < needed:
        return "prefix", "the bias is clipped short of the length"
    return "tiles", "the bias has a number for every offset, and tiles are faster than the FFT at this length"
