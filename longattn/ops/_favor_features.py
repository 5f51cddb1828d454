"""FAVOR+ features as a tensor, for attentions that read a row's features more than once: schema, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import features as maps
from ..favor import Favor
from ..native import features as native_features
from . import _dispatch, _library
from ._autograd import FirstDerivative, tracked
from ._prefix import accumulator

_INPUTS = "Tensor x, Tensor projection, Tensor root, Tensor? mean, str kind, bool logs"
_library.define("_favor_features", f"({_INPUTS}) -> Tensor")
_library.define("_favor_features_backward", f"(Tensor grad, Tensor phi, {_INPUTS}) -> (Tensor, Tensor)")


@_library.fake("_favor_features")
def _(x, projection, root, mean, kind, logs):
    return projection.new_empty(*x.shape[:3], maps.favor_count(projection, kind))


@_library.fake("_favor_features_backward")
def _(grad, phi, x, projection, *rest):
    return x.new_empty(x.shape), projection.new_empty(())


def _engine(device: torch.device):
    """The module whose `forward` and `backward` run this op; they share one signature."""
    if device.type == "cpu":
        return native_features
    from ..kernels import features as triton_features

    return triton_features


def _has_kernel(x: Tensor) -> bool:
    if _dispatch.refuses("cpu" if x.device.type == "cpu" else "triton", x) is not None:
        return False
    return x.device.type == "cpu" or _engine(x.device).refuses(x) is None


def _forward(x, projection, root, mean, kind, logs):
    return _engine(x.device).forward(x, projection, root, mean, kind=kind, logs=logs)


def _backward(grad, phi, x, projection, root, mean, kind, logs):
    return _engine(x.device).backward(grad, phi, x, projection, root, mean, kind=kind, logs=logs)


_library.run(_favor_features=_forward, _favor_features_backward=_backward)


class _Features(torch.autograd.Function):
    @staticmethod
    def forward(x, projection, root, mean, *options):
        return torch.ops.longattn._favor_features(x, projection, root, mean, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options = inputs[4:]
        ctx.save_for_backward(output, *inputs[:4])

    @staticmethod
    def backward(ctx, grad):
        phi, x, projection, root, mean = ctx.saved_tensors
        tensors = (phi, x, projection, root, mean)
        dx, droot = FirstDerivative.apply(
            "linear_attention: the kernels", "_favor_features_backward", grad, *tensors, *ctx.options
        )
        return dx, None, droot, None, *[None] * len(ctx.options)


def favor_features(x: Tensor, favor: Favor, keys: bool, fused: bool = True) -> Tensor:
    """The features `[B, H, n, M]` of rows `[B, H, n, D]`, float32 (float64 for float64), up to a factor that quotients
    lose; of rows of unit length, normalize="l2", alone: there they stay at 1 or below.

    keys: their factor is one for all, a function of the map alone, so it is the same for any part of a sequence; that
    of a query is its own. fused: by the compiled kernel where there is one; else by torch, in float64 too for second
    derivatives.
    """
    acc = accumulator(x.dtype)
    root, projection = favor.root.to(acc), favor.projection.to(acc)
    mean = favor.key_mean.to(acc) if keys and favor.center_keys else None
    if fused and _has_kernel(x):
        inputs = (x, projection, root, mean)
        if tracked(*inputs):
            return _Features.apply(*inputs, favor.kind, keys)
        return torch.ops.longattn._favor_features(*inputs, favor.kind, keys)
    phi, a = maps.favor_features(maps.favor_rows(x.to(acc), root, True, mean), projection, favor.kind)
    if not keys:
        return phi
    return phi * torch.exp(a - maps.favor_bound(projection, root, favor.kind))[..., None]
