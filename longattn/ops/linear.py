"""Linear attention: contract, schema, autograd. The mathematics is in reference/linear.py."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..favor import Favor
from ..features import FeatureMap
from ..native import linear as native_linear
from ..native import linear_cuda as native_cuda
from ..reference import linear as reference
from ..state import LinearState, State, ToeplitzState
from . import _check, _dispatch, _library, _toeplitz_step, favor, toeplitz
from ._autograd import FirstDerivative, tracked
from ._features import map_rows
from ._prefix import accumulator, aligned, hooks, segment_of, sequences, slots


class LinearAttentionOutput(NamedTuple):
    """output `[B, Hq, L, E]` in the inputs' dtype, and the state after the last key."""

    output: Tensor
    state: State


class Options(NamedTuple):
    """What an engine must know beside the tensors."""

    feature: str
    is_causal: bool
    normalize: bool
    scale: float
    segment: int
    impl: str


def engine(impl: str):
    """The module whose `forward` and `backward` run this op; they share one signature."""
    if impl == "triton":
        from ..kernels import linear as triton_linear

        return triton_linear
    return {"cpu": native_linear, "cuda": native_cuda}[impl]


# schema and fakes

_OPTIONS = "str feature, bool is_causal, bool normalize, float scale, int segment, str impl"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? cu_seqlens, Tensor? kv, Tensor? k_sum"
_library.define(
    "_linear_forward",
    f"({_INPUTS}, {_OPTIONS}, bool save_segments) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_library.define(
    "_linear_backward",
    f"(Tensor grad_out, Tensor? grad_kv, Tensor? grad_k_sum, {_INPUTS}, Tensor out, Tensor normalizer, "
    f"Tensor segment_kv, Tensor segment_k_sum, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_library.fake("_linear_forward")
def _(q, k, v, mask, cu_seqlens, kv, k_sum, feature, is_causal, normalize, scale, segment, impl, save_segments):
    (B, Hq, L, D), (_, H, _, E) = q.shape, v.shape
    acc = accumulator(q.dtype)
    n, ns = sequences(q, cu_seqlens), slots(q, cu_seqlens, is_causal, segment)
    return (
        q.new_empty(B, Hq, L, E),
        q.new_empty((B, Hq, L) if normalize else (0,), dtype=acc),
        q.new_empty((B, H, ns, D, E) if save_segments else (0,), dtype=acc),
        q.new_empty((B, H, ns, D) if save_segments else (0,), dtype=acc),
        q.new_empty(n, H, D, E, dtype=acc),
        q.new_empty(n, H, D, dtype=acc),
    )


@_library.fake("_linear_backward")
def _(grad_out, grad_kv, grad_k_sum, q, k, v, mask, cu_seqlens, kv, k_sum, *rest):
    def like(x):
        return q.new_empty(x.shape, dtype=x.dtype)

    acc = accumulator(q.dtype)
    dkv, dk_sum = (q.new_empty(0, dtype=acc) if x is None else like(x) for x in (kv, k_sum))
    return like(q), like(k), like(v), dkv, dk_sum


def _forward(q, k, v, mask, cu_seqlens, kv, k_sum, *rest):
    *options, save_segments = rest
    arguments = Options(*options)._asdict()
    impl = arguments.pop("impl")
    tensors = (q, k, v, mask, cu_seqlens, kv, k_sum)
    return engine(impl).forward(*tensors, save_segments=save_segments, **arguments, **hooks(impl, q))


def _backward(*arguments):
    tensors, options = arguments[:14], Options(*arguments[14:])._asdict()
    impl = options.pop("impl")
    return engine(impl).backward(*tensors, **options, **hooks(impl, tensors[0]))


_library.run(_linear_forward=_forward, _linear_backward=_backward)


# autograd


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v, mask, cu_seqlens, kv, k_sum, options):
        return torch.ops.longattn._linear_forward(q, k, v, mask, cu_seqlens, kv, k_sum, *options, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        out, normalizer, segment_kv, segment_k_sum, _, _ = output
        ctx.options = inputs[-1]
        ctx.mark_non_differentiable(normalizer, segment_kv, segment_k_sum)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:-1], out, normalizer, segment_kv, segment_k_sum)

    @staticmethod
    def backward(ctx, grad_out, _z, _segment_kv, _segment_k_sum, grad_kv, grad_k_sum):
        q, k, v, mask, cu_seqlens, kv, k_sum, out, *saved = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if grad_kv is not None or grad_k_sum is not None:
            B, H = sequences(q, cu_seqlens), k.shape[1]
            shape, acc = (B, H, k.shape[3], v.shape[3]), accumulator(q.dtype)
            grad_kv = q.new_zeros(shape, dtype=acc) if grad_kv is None else grad_kv
            grad_k_sum = q.new_zeros(shape[:3], dtype=acc) if grad_k_sum is None else grad_k_sum
        tensors = (q, k, v, mask, cu_seqlens, kv, k_sum, out, *saved)
        dq, dk, dv, dkv, dk_sum = FirstDerivative.apply(
            "linear_attention: the kernels", "_linear_backward", grad_out, grad_kv, grad_k_sum, *tensors, *ctx.options
        )
        return dq, dk, dv, None, None, *((None, None) if kv is None else (dkv, dk_sum)), None


# the public door


class _Call(NamedTuple):
    """One validated call: tensors as the engines take them, and where it would run."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    state: LinearState | None
    options: Options
    explanation: _dispatch.Explanation


def _check_state(op: str, state, call_sequences: int, k: Tensor, v: Tensor) -> None:
    if not isinstance(state, LinearState):
        _check.fail(op, f"state must be a LinearState, got {type(state).__name__}", TypeError)
    shape, acc = (call_sequences, k.shape[1], k.shape[3], v.shape[3]), accumulator(k.dtype)
    meaning = " ([sequences, key heads, features, value dim])"
    _check.state_tensors(op, state, k.device, {"kv": (shape, acc), "k_sum": (shape[:3], acc)}, meaning)


def _prepare(
    op: str,
    keeps_state: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    state: State | None = None,
    feature_map: FeatureMap = "elu",
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = True,
    enable_gqa: bool = False,
    rpe_bias: Tensor | None = None,
    rpe_method: str = "auto",
    impl: str = "auto",
) -> _Call | favor.Call | toeplitz.Call:
    _check.attention_inputs(op, q, k, v, enable_gqa)
    _check.padding_mask(op, key_padding_mask, k)
    _check.packed_sequences(op, cu_seqlens, q, k)
    if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale)):
        _check.fail(op, f"scale must be a finite number or None, got {_check.describe(scale)}")
    L, S = q.shape[2], k.shape[2]
    if is_causal and L != S and (state is None or cu_seqlens is not None):
        remedy = "carry a state with linear_attention_with_state, which then aligns the last query with the last key"
        _check.fail(op, f"is_causal needs as many queries as keys, got {L} and {S}; {remedy}")
    device = q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    shared = {
        "state": state, "is_causal": is_causal, "key_padding_mask": key_padding_mask, "cu_seqlens": cu_seqlens,
        "normalize": normalize, "impl": impl, "keeps_state": keeps_state,
    }  # fmt: skip
    if isinstance(feature_map, Favor):
        feature = feature_map
    else:
        q, k, v, feature = map_rows(op, feature_map, q, k, v, key_padding_mask)
    if rpe_bias is not None:
        bias = {"feature": feature, "bias": rpe_bias, "method": rpe_method, "scale": scale}
        return toeplitz.prepare(op, q, k, v, **bias, **shared)
    if rpe_method != "auto":
        _check.fail(op, f"rpe_method is for calls with an rpe_bias, got {rpe_method!r} without one")
    if isinstance(feature, Favor):
        return favor.prepare(op, q, k, v, favor=feature, **shared)
    if state is not None:
        _check_state(op, state, sequences(q, cu_seqlens), k, v)
    reasons = {name: _refuses(name, q, k, v, cu_seqlens, is_causal, state) for name in _dispatch.IMPLS}
    chosen = _dispatch.choose(op, impl, reasons)
    segment = segment_of(q.shape[3], v.shape[3])
    options = Options(feature, is_causal, normalize, 1.0 if scale is None else float(scale), segment, chosen)
    return _Call(q, k, v, key_padding_mask, cu_seqlens, state, options, _dispatch.Explanation(op, chosen, reasons))


def _refuses(impl, q, k, v, cu_seqlens, is_causal, state) -> str | None:
    reason = _dispatch.refuses(impl, q)
    if reason is not None or impl in ("cpu", "reference"):
        return reason
    if impl == "cuda":
        one_token = q.shape[2] == 1 and k.shape[2] == 1 and is_causal and state is not None and cu_seqlens is None
        if not one_token:
            return "the CUDA C++ kernel decodes one token with a state; longer inputs run in Triton"
        if q.shape[3] > native_cuda.MAX_DIM:
            return f"head_dim {q.shape[3]} is above {native_cuda.MAX_DIM}"
        grads = tracked(q, k, v, *state)
        return "the CUDA C++ decode step has no backward; longer inputs and gradients run in Triton" if grads else None
    return engine(impl).refuses(q, k, v)


def _run(call: _Call | favor.Call | toeplitz.Call) -> LinearAttentionOutput:
    if isinstance(call, (favor.Call, toeplitz.Call)):
        return LinearAttentionOutput(*(favor if isinstance(call, favor.Call) else toeplitz).run(call))
    q, k, v, mask, cu_seqlens, state, options, _ = call
    kv, k_sum = (None, None) if state is None else state
    if options.impl == "reference":
        return _run_reference(call)
    L, S = q.shape[2], k.shape[2]
    if options.is_causal and L != S:
        return LinearAttentionOutput(*aligned(call, _run))
    tensors = (q, k, v, mask, cu_seqlens, kv, k_sum)
    if tracked(*tensors):
        output, _, _, _, kv, k_sum = _LinearAttention.apply(*tensors, options)
    else:
        output, _, _, _, kv, k_sum = torch.ops.longattn._linear_forward(*tensors, *options, False)
    return LinearAttentionOutput(output, LinearState(kv, k_sum))


def _run_reference(call: _Call) -> LinearAttentionOutput:
    q, k, v, mask, cu_seqlens, state, options, _ = call
    if options.is_causal and q.shape[2] != k.shape[2]:
        return LinearAttentionOutput(*aligned(call, _run))
    acc, (kv, k_sum) = accumulator(q.dtype), (None, None) if state is None else state
    names = {name: getattr(options, name) for name in ("feature", "is_causal", "normalize", "scale")}
    if mask is not None:
        # kept out of the graph, so that NaN in a padded key does not reach its gradient as 0 * NaN
        k, v = (x.masked_fill(mask[:, None, :, None], 0) for x in (k, v))
    tensors = (q.to(acc), k.to(acc), v.to(acc), mask, cu_seqlens, kv, k_sum)
    # the inputs have autocast's dtype already; the sums keep theirs
    with _dispatch.without_autocast(q.device.type):
        output, kv, k_sum = reference.linear_attention(*tensors, **names)
    return LinearAttentionOutput(output.to(q.dtype), LinearState(kv.contiguous(), k_sum.contiguous()))


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: FeatureMap = "elu",
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = True,
    enable_gqa: bool = False,
    rpe_bias: Tensor | None = None,
    rpe_method: str = "auto",
    impl: str = "auto",
) -> Tensor:
    """Attention with a kernel in place of the softmax, in time and memory linear in the length.

        o_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j)

    over the keys j that are not padded and, if causal, j <= i. Katharopoulos et al. 2020 (arXiv 2006.16236), eq. 4-5
    and 8-9.

    query: `[B, Hq, L, D]`, key: `[B, H, S, D]`, value: `[B, H, S, E]`; float32, bfloat16, float16, or float64 (CPU and
        reference), one dtype for all, any strides. Sums are float32 (float64 for float64).
    feature_map: phi, "elu" (elu(x)+1), "relu" (max(x, 0) + 1e-3), "identity", or a callable `[..., D] -> [..., M]`, run
        eagerly with autograd. With normalize=True features should be positive: the result divides by their sum.
        A `longattn.Favor` estimates the softmax kernel, fused in every engine; it needs normalize=True, and its own
        `temperature` takes the place of a softmax's scale.
    is_causal: query i sees keys 0..i; needs L == S.
    key_padding_mask: bool `[B, S]`, True for a padded key. It leaves numerator and denominator, whatever it holds, NaN
        too.
    cu_seqlens: int32 `[N+1]`, boundaries of N sequences packed along the length, from 0 to L; then B = 1 and L = S.
    scale: multiplies phi(q).phi(k), default 1; cancels when normalize=True.
    normalize: divide by the sum of the weights. False returns the numerator.
    enable_gqa: Hq may be a multiple of H; query head h reads key head h // (Hq / H).
    rpe_bias: b `[Hq, 2K+1]`, or `[2K+1]` for all heads: weights become exp(b_(j-i)) phi(q_i).phi(k_j), exactly and
        differentiably in b (Luo et al. 2021, arXiv 2106.12566). Offset t is at t + K, and an offset further than K
        reads the end that is nearer, so [Hq, 2N-1] holds every offset of N tokens. -inf hides an offset, and with
        normalize so does b more than 60 (float64: 600) below a head's largest. NaN and +inf are refused on a CPU, where
        looking waits for nothing. A Favor map must have normalize="l2". It is not softmax attention with this bias.
    rpe_method: how, not what: "prefix" (time n (K + M)), "tiles" (time n^2), "fft" (time n M log n; float32 rounds to
        about 1e-6, to 1e-4 where the factors of a head are e^10 apart), or "auto"; see `longattn.explain`.
    impl: "auto", "cpu", "triton", "cuda", "reference". See `longattn.explain`.

    Returns `[B, Hq, L, E]` in the inputs' dtype (autocast's under autocast; that of a callable map's features). A query
    that sees no key, and one whose weights sum to exactly 0, gets 0. Same inputs, same bits, for any number of threads.
    Raises ValueError or TypeError in a sentence; RuntimeError for a second derivative (impl="reference" has one).
    """
    return _run(
        _prepare(
            "linear_attention",
            False,
            query,
            key,
            value,
            feature_map=feature_map,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            scale=scale,
            normalize=normalize,
            enable_gqa=enable_gqa,
            rpe_bias=rpe_bias,
            rpe_method=rpe_method,
            impl=impl,
        )
    ).output


def linear_attention_with_state(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    state: State | None = None,
    feature_map: FeatureMap = "elu",
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = True,
    enable_gqa: bool = False,
    rpe_bias: Tensor | None = None,
    rpe_method: str = "auto",
    impl: str = "auto",
) -> LinearAttentionOutput:
    """`linear_attention` that starts from a state and returns the one after its last key; differentiable through both.

    Splitting a sequence anywhere and carrying the state equals one call; so does feeding it token by token.
    state: what all queries see beside the keys given here; None is the empty state. `[B, ...]`, or one row for each
        packed sequence; a FavorState with a `longattn.Favor` map, with rpe_bias a ToeplitzState (causal only, not
        packed, never more queries than keys, one bias size for all of a stream), else a LinearState. Causal calls may
        have L != S: the last query is aligned with the last key, so L < S prefills and reads out only the last L, and
        L > S lets the first L - S queries see the state alone.
    Other arguments, dtypes and errors as in `linear_attention`.
    """
    plain = is_causal is True and key_padding_mask is None and cu_seqlens is None and isinstance(rpe_bias, Tensor)
    if plain and type(state) is ToeplitzState and impl in ("auto", "cpu") and rpe_method in ("auto", "prefix"):
        # one token of a stream: the checks below cost more than it does
        named = isinstance(feature_map, (str, Favor)) and all(isinstance(x, Tensor) for x in (query, key, value))
        if named and (enable_gqa or query.shape[1:2] == key.shape[1:2]) and (scale is None or type(scale) is float):
            how = {"normalize": normalize, "scale": 1.0 if scale is None else scale}
            if type(normalize) is bool and math.isfinite(how["scale"]):
                stepped = _toeplitz_step.attempt(query, key, value, feature_map, rpe_bias, state, **how)
                if stepped is not None:
                    return LinearAttentionOutput(*stepped)
    return _run(
        _prepare(
            "linear_attention_with_state",
            True,
            query,
            key,
            value,
            state=state,
            feature_map=feature_map,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            scale=scale,
            normalize=normalize,
            enable_gqa=enable_gqa,
            rpe_bias=rpe_bias,
            rpe_method=rpe_method,
            impl=impl,
        )
    )


def _plan(op, keeps_state: bool) -> None:
    _dispatch.plan(op, lambda *args, **kwargs: _prepare(op.__name__, keeps_state, *args, **kwargs).explanation)


_plan(linear_attention, False)
_plan(linear_attention_with_state, True)
