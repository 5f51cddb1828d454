"""The tile-attention engine as torch ops: exact softmax over the pairs that row orders, chunk ranks and masks allow.

Every backend (`native/softmax.py`, `kernels/triton/softmax.py`) has a `forward` and a `backward` of these tensors:

    q [B, Hq, L, D], k [B, H, S, D] or None (the keys are the rows of q), v [B, H, S, E], any strides
    mask          bool [B, S], True = padded: never seen whatever it holds; with k None no query either (0, lse -inf)
    cu_seqlens    int32 [P+1], packed sequences: chunks restart at each, nothing crosses
    key_scale     [B, H, S], only with k None: key j is x_j key_scale_j, a unit vector, and its Jacobian that of x / |x|
    order_q/_k    int32 [B, Hq or H, R, L or S]: which position has a place in round r; None: as they stand, one round
                  (order_k None beside an order_q: the same)
    rank_q/_k     int32, alike but by position: the key chunk that holds a key, that a query's chunk is centred on
    bucket_q/_k   int32, alike: a pair needs equal buckets in its round; None: it does not
    bias          [Hq, 2K+1], sums' dtype: added to the score at t = j - i, which stops at -K and K; without orders only

and the options below. Query i meets key j in round r if -look_back <= rank_k[r, j] - rank_q[r, i] <= look_ahead, j is
not padded, j <= i if is_causal, |i - j| < window if window > 0, in one sequence, with equal buckets. dedupe counts a
key met in several rounds once. Score scale q_i.k_j; lse_i is the log-sum-exp over all that i meets,
o_i = sum_j exp(s_ij - lse_i) drop_ij v_j. wrap: chunks before the first of a round are the last ones of the round
before, and so on around. drop_ij is 0 or 1 / (1 - dropout_p) by a hash of seed, head and positions
(`reference/lsh.py`, kept); lse is that before dropout. A query that meets no key gets 0. NaN reaches only rows with a
weight on it. The same bits on every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import native
from ..native import softmax as native_softmax
from . import _library
from ._autograd import tracked
from ._prefix import accumulator


class Options(NamedTuple):
    """What an engine must know beside the tensors. seed: the ops take a tensor in its place, as `draw`: in a graph that
    is compiled once it is another number each time."""

    chunk: int
    look_back: int
    look_ahead: int
    window: int
    is_causal: bool
    self_rule: int
    dedupe: bool
    wrap: bool
    scale: float
    dropout_p: float
    seed: int | Tensor
    impl: str


def draw_seed() -> int | Tensor:
    """From torch's generator, as any dropout: what restores it for a replay restores the weights that were dropped."""
    drawn = torch.randint(2**62, (), dtype=torch.int64, device="cpu")
    return drawn if torch.compiler.is_compiling() else int(drawn)


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
    "Tensor? order_k, Tensor? rank_q, Tensor? rank_k, Tensor? bucket_q, Tensor? bucket_k, Tensor? bias"
)
_OPTIONS = (
    "int chunk, int look_back, int look_ahead, int window, bool is_causal, int self_rule, bool dedupe, bool wrap, "
    "float scale, float dropout_p, int seed, str impl, Tensor? draw=None"
)
_library.define("_softmax_forward", f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)")
_library.define(
    "_softmax_backward",
    f"(Tensor grad_out, {_INPUTS}, Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
INPUTS = 13


def _fake_rows(x: torch.Tensor, width: int, impl: str) -> torch.Tensor:
    B, H, L, _ = x.shape
    if impl == "cpu" and native.tokens_first(x):
        return x.new_empty(B, L, H, width).transpose(1, 2)
    return x.new_empty(B, H, L, width)


@_library.fake("_softmax_forward")
def _(q, k, v, *rest):
    impl = Options(*rest[INPUTS - 3 :][: len(Options._fields)]).impl
    return _fake_rows(q, v.shape[3], impl), q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))


@_library.fake("_softmax_backward")
def _(grad_out, q, k, v, *rest):
    bias = rest[INPUTS - 4]
    dbias = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    impl = Options(*rest[INPUTS - 1 :][: len(Options._fields)]).impl
    dq, dk, dv = (q.new_empty(0) if x is None else _fake_rows(x, x.shape[3], impl) for x in (q, k, v))
    return dq, dk, dv, dbias


def _both(*tensors):
    """What queries and keys share, named twice, as the engines take it."""
    *others, rank_q, rank_k, bucket_q, bucket_k, bias = tensors
    rank_k, bucket_k = rank_q if rank_k is None else rank_k, bucket_q if bucket_k is None else bucket_k
    return (*others, rank_q, rank_k, bucket_q, bucket_k), {} if bias is None else {"bias": bias}


def _named(tail: tuple) -> dict:
    """Options by name, from what follows the tensors."""
    options, draw = Options(*tail[: len(Options._fields)]), tail[len(Options._fields) :]
    return (options if not draw or draw[0] is None else options._replace(seed=int(draw[0])))._asdict()


def _forward(*arguments):
    options = _named(arguments[INPUTS:])
    tensors, more = _both(*arguments[:INPUTS])
    return engine(options.pop("impl")).forward(*tensors, **options, **more)


def _backward(grad_out, *arguments):
    saved, options = arguments[INPUTS : INPUTS + 2], _named(arguments[INPUTS + 2 :])
    tensors, more = _both(*arguments[:INPUTS])
    return engine(options.pop("impl")).backward(grad_out, *tensors, *saved, **options, **more)


_library.run(_softmax_forward=_forward, _softmax_backward=_backward)


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
    """Of the tensors, draw and the options."""

    @staticmethod
    def forward(*arguments):
        *tensors, draw, options = arguments
        return torch.ops.longattn._softmax_forward(*tensors, *options, draw)

    @staticmethod
    def setup_context(ctx, inputs, output):
        out, lse = output
        ctx.options = inputs[-1]
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:-1], out, lse)

    @staticmethod
    def backward(ctx, grad_out, _lse):
        *tensors, draw, out, lse = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        dq, dk, dv, dbias = _SoftmaxBackward.apply(grad_out, *tensors, out, lse, *ctx.options, draw)
        # those of rows, then nothing for what says who meets whom
        rows, bias = (dq, None if tensors[1] is None else dk, dv), tensors[INPUTS - 1]
        return *rows, *(None,) * (INPUTS - 4), None if bias is None else dbias, None, None


def attend(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    key_scale: Tensor | None,
    orders: tuple[Tensor | None, ...],
    options: Options,
    bias: Tensor | None = None,
) -> Tensor:
    """One call of the engine, with autograd where a gradient is wanted. orders: order_q ... bucket_k. -> output"""
    order_q, order_k, rank_q, rank_k, bucket_q, bucket_k = orders
    # torch.compile takes no tensor twice
    rank_k, bucket_k = None if rank_k is rank_q else rank_k, None if bucket_k is bucket_q else bucket_k
    tensors = (q, k, v, mask, cu_seqlens, key_scale, order_q, order_k, rank_q, rank_k, bucket_q, bucket_k, bias)
    draw = options.seed if isinstance(options.seed, Tensor) else None
    options = options if draw is None else options._replace(seed=0)
    if tracked(q, k, v, bias):
        return _SoftmaxAttention.apply(*tensors, draw, options)[0]
    return torch.ops.longattn._softmax_forward(*tensors, *options, draw)[0]
