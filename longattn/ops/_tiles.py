"""The tile-attention engine as torch ops: exact softmax over the pairs that row orders, chunk ranks and masks allow.

What the tensors and options mean is said by `native/softmax.py`, whose signature every backend shares.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..native import softmax as native_softmax
from ._prefix import accumulator


class Options(NamedTuple):
    """What an engine must know beside the tensors."""

    chunk: int
    look_back: int
    look_ahead: int
    is_causal: bool
    self_rule: int
    dedupe: bool
    wrap: bool
    scale: float
    dropout_p: float
    seed: int
    impl: str


# an ordinary pair, only where a query has no other key, always and once
SELF_ORDINARY, SELF_FALLBACK, SELF_ALWAYS = range(3)


def engine(impl: str):
    """The module whose `forward` and `backward` run this op; they share one signature."""
    if impl == "triton":
        from ..kernels import softmax as triton_softmax

        return triton_softmax
    return native_softmax


# schema and fakes

_INPUTS = (
    "Tensor q, Tensor? k, Tensor v, Tensor? mask, Tensor? cu_seqlens, Tensor? key_scale, Tensor? order_q, "
    "Tensor? order_k, Tensor? rank_q, Tensor? rank_k, Tensor? bucket_q, Tensor? bucket_k"
)
_OPTIONS = (
    "int chunk, int look_back, int look_ahead, bool is_causal, int self_rule, bool dedupe, bool wrap, float scale, "
    "float dropout_p, int seed, str impl"
)
torch.library.define("longattn::_softmax_forward", f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)")
torch.library.define(
    "longattn::_softmax_backward",
    f"(Tensor grad_out, {_INPUTS}, Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
INPUTS = 12


@torch.library.register_fake("longattn::_softmax_forward")
def _(q, k, v, *rest):
    lead = q.shape[:3]
    return q.new_empty(*lead, v.shape[3]), q.new_empty(lead, dtype=accumulator(q.dtype))


@torch.library.register_fake("longattn::_softmax_backward")
def _(grad_out, q, k, v, *rest):
    return q.new_empty(q.shape), q.new_empty(0 if k is None else k.shape), q.new_empty(v.shape)


def _both(*tensors):
    """What queries and keys share, named twice, as the engines take it."""
    *others, rank_q, rank_k, bucket_q, bucket_k = tensors
    return *others, rank_q, rank_q if rank_k is None else rank_k, bucket_q, bucket_q if bucket_k is None else bucket_k


def _forward(*arguments):
    tensors, options = arguments[:INPUTS], Options(*arguments[INPUTS:])._asdict()
    return engine(options.pop("impl")).forward(*_both(*tensors), **options)


def _backward(grad_out, *arguments):
    tensors, saved, options = arguments[:INPUTS], arguments[INPUTS : INPUTS + 2], Options(*arguments[INPUTS + 2 :])
    options = options._asdict()
    return engine(options.pop("impl")).backward(grad_out, *_both(*tensors), *saved, **options)


for _device in ("cpu", "cuda"):
    torch.library.impl("longattn::_softmax_forward", _device, _forward)
    torch.library.impl("longattn::_softmax_backward", _device, _backward)


# autograd


class _SoftmaxBackward(torch.autograd.Function):
    """The first derivative as a node of its own, so that asking for the second gets a sentence."""

    # torch.compile does not take a setup_context here
    @staticmethod
    def forward(ctx, *arguments):
        return torch.ops.longattn._softmax_backward(*arguments)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "longattn: the tile-attention kernels have no second derivative; use impl='reference' for double backward"
        )


class _SoftmaxAttention(torch.autograd.Function):
    @staticmethod
    def forward(*arguments):
        return torch.ops.longattn._softmax_forward(*arguments[:INPUTS], *arguments[INPUTS])

    @staticmethod
    def setup_context(ctx, inputs, output):
        out, lse = output
        ctx.options = inputs[-1]
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:-1], out, lse)

    @staticmethod
    def backward(ctx, grad_out, _lse):
        tensors = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(tensors[INPUTS])
        dq, dk, dv = _SoftmaxBackward.apply(grad_out, *tensors, *ctx.options)
        return dq, None if tensors[1] is None else dk, dv, *(None,) * (INPUTS - 2)


def attend(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    key_scale: Tensor | None,
    orders: tuple[Tensor | None, ...],
    options: Options,
) -> Tensor:
    """One call of the engine, with autograd where a gradient is wanted. orders: order_q ... bucket_k. -> output"""
    order_q, order_k, rank_q, rank_k, bucket_q, bucket_k = orders
    # torch.compile takes no tensor twice
    rank_k, bucket_k = None if rank_k is rank_q else rank_k, None if bucket_k is bucket_q else bucket_k
    tensors = (q, k, v, mask, cu_seqlens, key_scale, order_q, order_k, rank_q, rank_k, bucket_q, bucket_k)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v)):
        return _SoftmaxAttention.apply(*tensors, options)[0]
    return torch.ops.longattn._softmax_forward(*tensors, *options)[0]
