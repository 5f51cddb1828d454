"""Linear attention with relative positions: schema, autograd, states. The mathematics is in reference/toeplitz.py; the
public door is `longattn.linear_attention(rpe_bias=...)`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..favor import Favor
from ..native import toeplitz as native_toeplitz
from ..native import toeplitz_fft as native_fft
from ..reference import toeplitz as reference
from ..state import ToeplitzState
from . import _check, _dispatch, _library, _toeplitz, _toeplitz_fft, _toeplitz_step
from ._autograd import FirstDerivative, tracked
from ._features import features
from ._prefix import accumulator
from .favor import check_map


class Options(NamedTuple):
    """What an engine must know beside the tensors."""

    is_causal: bool
    normalize: bool
    method: str
    impl: str


def engine(impl: str, method: str):
    """The module whose `forward` and `backward` run this op; they share one signature."""
    if method == "fft":
        if impl == "cpu":
            return native_fft
        from ..kernels import toeplitz_fft as stages

        return _toeplitz_fft.engine(stages)
    if impl == "triton":
        from ..kernels import toeplitz as triton_toeplitz

        return triton_toeplitz
    return native_toeplitz


# schema and fakes

_OPTIONS = "bool is_causal, bool normalize, str method, str impl"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor c, Tensor? mask, Tensor? cu_seqlens"
_library.define("_toeplitz_forward", f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)")
_library.define(
    "_toeplitz_backward",
    f"(Tensor grad_out, Tensor? grad_normalizer, {_INPUTS}, Tensor out, Tensor normalizer, {_OPTIONS}) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
)


@_library.fake("_toeplitz_forward")
def _(q, k, v, c, mask, cu_seqlens, *options):
    return v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3])


@_library.fake("_toeplitz_backward")
def _(grad_out, grad_normalizer, q, k, v, c, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, c))


def _positions(q: Tensor, k: Tensor, c: Tensor, options: Options) -> dict:
    """The offsets that c has, and where the first query stands among the keys: the last meets the last key."""
    return {
        "reach": c.shape[1] // 2,
        "offset": k.shape[2] - q.shape[2] if options.is_causal else 0,
        "is_causal": options.is_causal,
        "normalize": options.normalize,
    }


def _forward(q, k, v, c, mask, cu_seqlens, *rest):
    options = Options(*rest)
    run = engine(options.impl, options.method).forward
    return run(q, k, v, c, mask, cu_seqlens, **_positions(q, k, c, options))


def _backward(grad_out, grad_normalizer, q, k, v, c, mask, cu_seqlens, out, normalizer, *rest):
    options = Options(*rest)
    run, tensors = engine(options.impl, options.method).backward, (q, k, v, c, mask, cu_seqlens, out, normalizer)
    return run(grad_out, grad_normalizer, *tensors, **_positions(q, k, c, options))


_library.run(_toeplitz_forward=_forward, _toeplitz_backward=_backward)


# autograd


class _ToeplitzAttention(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v, c, mask, cu_seqlens, options):
        return torch.ops.longattn._toeplitz_forward(q, k, v, c, mask, cu_seqlens, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.options = inputs
        if ctx.options.normalize:
            # it is divided by inside
            ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx, grad_out, grad_normalizer):
        *tensors, out, normalizer = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grad_normalizer = None if ctx.options.normalize else grad_normalizer
        saved = (*tensors, out, normalizer)
        grads = FirstDerivative.apply(
            "linear_attention: the kernels", "_toeplitz_backward", grad_out, grad_normalizer, *saved, *ctx.options
        )
        return *grads, None, None, None


# a validated call


class Call(NamedTuple):
    """Tensors as they came, but for the dtype, what makes features of them, and where the call would run."""

    q: Tensor
    k: Tensor
    v: Tensor
    feature: str | Favor
    bias: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    state: ToeplitzState | None
    scale: float
    options: Options
    keeps_state: bool
    explanation: _dispatch.Explanation


def _check_stream(op: str, q, k, v, state, bias, n_features: int, *, method, is_causal, cu_seqlens) -> None:
    """What carrying a state asks for."""
    if not is_causal:
        _check.fail(op, "a state with rpe_bias needs is_causal=True: it is of the keys before a query")
    if cu_seqlens is not None:
        _check.fail(op, "packed sequences have no state with rpe_bias; call once for each, or without a state")
    if method not in ("auto", "prefix"):
        _check.fail(op, f"a state is carried by rpe_method='prefix', got {method!r}")
    if state is None:
        return
    if not isinstance(state, ToeplitzState):
        _check.fail(op, f"with rpe_bias, state must be a ToeplitzState, got {type(state).__name__}", TypeError)
    if not isinstance(state.ring_mask, Tensor) or state.ring_mask.dim() != 2:
        came = _check.describe(state.ring_mask)
        _check.fail(op, f"state.ring_mask must be bool [sequences, t], got {came}", TypeError)
    held, reach = state.ring_mask.shape[1], bias.shape[-1] // 2
    if held > reach:
        remedy = "one bias serves all of a stream"
        _check.fail(op, f"the state holds {held} keys and rpe_bias reaches {reach}; {remedy}")
    if q.shape[2] > k.shape[2]:
        came = f"got {q.shape[2]} and {k.shape[2]}"
        _check.fail(op, f"with rpe_bias and a state there must be as many keys as queries, or more, {came}")
    (B, H), acc, E = k.shape[:2], accumulator(k.dtype), v.shape[3]
    _check.state_tensors(op, state, k.device, {
        "kv": ((B, H, n_features, E), acc), "k_sum": ((B, H, n_features), acc),
        "ring_key": ((B, H, held, n_features), acc), "ring_value": ((B, H, held, E), v.dtype),
        "ring_mask": ((B, held), torch.bool),
    })  # fmt: skip


def prepare(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature: str | Favor,
    bias: Tensor,
    method: str,
    scale: float | None,
    state: ToeplitzState | None,
    is_causal: bool,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalize: bool,
    impl: str,
    keeps_state: bool,
) -> Call:
    """The rest of the public door with a bias; q, k and v have passed the checks that all calls share, and a callable
    map is done."""
    _toeplitz.check_bias(op, bias, q.shape[1], q.device)
    if method not in _toeplitz.METHODS:
        known = ", ".join(map(repr, _toeplitz.METHODS))
        _check.fail(op, f"rpe_method must be one of {known}, got {method!r}")
    n_features = q.shape[3]
    if isinstance(feature, Favor):
        check_map(op, q, k, feature, normalize=normalize)
        if feature.normalize != "l2":
            why = "features of rows of any length have no bound that all keys share"
            _check.fail(op, f"rpe_bias needs a Favor map with normalize='l2': {why}")
        if feature.exact_diagonal:
            _check.fail(op, "rpe_bias and exact_diagonal exclude each other: the bias has its own way of near keys")
        if feature.center_keys and feature.key_mean is None:
            _check.fail(op, "rpe_bias with center_keys needs a stored mean: call calibrate(key) once")
        n_features = feature.n_features
    if keeps_state:
        stream = {"method": method, "is_causal": is_causal, "cu_seqlens": cu_seqlens}
        _check_stream(op, q, k, v, state, bias, n_features, **stream)
    reaches = bias.shape[-1] // 2, max(q.shape[2], k.shape[2], 1) - 1
    about = {"packed": cu_seqlens is not None, "keeps_state": keeps_state}
    shape = (q.device.type, n_features, v.shape[3], is_causal)
    method, why = _toeplitz.choose(method, *reaches, shape=shape, **about)
    reasons = {name: _refuses(name, q, n_features, v.shape[3], method) for name in _dispatch.IMPLS}
    options = Options(is_causal, normalize, method, _dispatch.choose(op, impl, reasons))
    dense = "the reference forms all pairs, whatever the method"
    note = dense if options.impl == "reference" else f"method {method}: {why}"
    explanation = _dispatch.Explanation(op, options.impl, reasons, note)
    scale = 1.0 if scale is None else float(scale)
    return Call(
        q, k, v, feature, bias, key_padding_mask, cu_seqlens, state, scale, options, keeps_state, explanation
    )


def _refuses(impl: str, x: Tensor, n_features: int, value_dim: int, method: str) -> str | None:
    reason = _dispatch.refuses(impl, x)
    if reason is not None or impl in ("cpu", "reference"):
        return reason
    if impl == "cuda":
        return "linear attention with relative positions runs in Triton; CUDA C++ has no kernel of it"
    return None if method == "fft" else engine(impl, method).refuses(n_features, value_dim)


# running it


def run(call: Call) -> tuple[Tensor, ToeplitzState | None]:
    """-> output `[B, Hq, L, E]`, and with `keeps_state` the state after the last key"""
    q, k, v, mask, options = call.q, call.k, call.v, call.mask, call.options
    if call.options.impl == "cpu" and call.keeps_state and mask is None and call.cu_seqlens is None:
        how = {"normalize": options.normalize, "scale": call.scale}
        stepped = _toeplitz_step.attempt(q, k, v, call.feature, call.bias, call.state, **how)
        if stepped is not None:
            return stepped
    L, S, reach, acc = q.shape[2], k.shape[2], call.bias.shape[-1] // 2, accumulator(q.dtype)
    if mask is not None:
        # a map's own backward would make NaN of a padded key's NaN times 0
        k = k.masked_fill(mask[:, None, :, None], 0)
    # the inputs have autocast's dtype already; the sums keep theirs
    with _dispatch.without_autocast(q.device.type):
        needed = max(L, S, 1) - 1
        if call.state is None:
            # tiles have a factor for each offset, others no more than there are; of a length that a graph leaves open
            # that would tie it to one side
            if options.method == "tiles":
                reach = needed
            elif not torch.compiler.is_compiling():
                reach = min(reach, needed)
        names = {"is_causal": options.is_causal, "normalize": options.normalize, "dtype": acc}
        c = _toeplitz.factors(call.bias, q.shape[1], reach, **names)
        fused = options.impl != "reference"
        phi_q, phi_k = features(call.feature, q, False, fused), features(call.feature, k, True, fused)
        state = None
        if call.state is not None:
            output, state = _continue(call, phi_q, phi_k, c)
        else:
            output, _ = attend(phi_q, phi_k, v, c, mask, call.cu_seqlens, options)
            if call.keeps_state:
                _, state = _extend(call, phi_k, call.bias.shape[-1] // 2)
        return (output if options.normalize or call.scale == 1 else call.scale * output), state


def attend(q, k, v, c, mask, cu_seqlens, options: Options) -> tuple[Tensor, Tensor]:
    """One call of an engine on features. -> output like v, and the sums of weights"""
    if options.impl == "reference":
        if mask is not None:
            # kept out of the graph, so that NaN in a padded value does not reach its gradient as 0 * NaN
            v = v.masked_fill(mask[:, None, :, None], 0)
        names = {"is_causal": options.is_causal, "normalize": options.normalize}
        names["offset"] = k.shape[2] - q.shape[2] if options.is_causal else 0
        output, z = reference.toeplitz_attention(q, k, v.to(q.dtype), c, mask, cu_seqlens, **names)
        return output.to(v.dtype), z
    tensors = (q, k, v, c, mask, cu_seqlens)
    if tracked(*tensors):
        return _ToeplitzAttention.apply(*tensors, options)
    return torch.ops.longattn._toeplitz_forward(*tensors, *options)


# streams


def _extend(call: Call, k: Tensor, reach: int) -> tuple[tuple[Tensor, Tensor, Tensor], ToeplitzState]:
    """k: the new keys' features. -> features, values and mask of the ring's keys and the new ones, and the state after
    them: the last `reach` in the ring, those before them summed."""
    v, mask, old = call.v, call.mask, call.state
    if mask is not None:
        k, v = (x.masked_fill(mask[:, None, :, None], 0) for x in (k, v))
    else:
        mask = torch.zeros(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    if old is not None:
        # an empty ring has any dtype
        k, v = torch.cat([old.ring_key, k], 2), torch.cat([old.ring_value.to(v.dtype), v], 2)
        mask = torch.cat([old.ring_mask, mask], 1)
    leaving = max(k.shape[2] - reach, 0)
    left = k[:, :, :leaving].mT
    kv, k_sum = left @ v[:, :, :leaving].to(k.dtype), left.sum(-1)
    if old is not None:
        kv, k_sum = old.kv + kv, old.k_sum + k_sum
    # copies: the caller may write into its tensors, and a state must not keep all of them alive
    ring = (x.clone(memory_format=torch.contiguous_format) for x in (k[:, :, leaving:], v[:, :, leaving:]))
    return (k, v, mask), ToeplitzState(kv, k_sum, *ring, mask[:, leaving:].clone())


def _continue(call: Call, q: Tensor, k: Tensor, c: Tensor) -> tuple[Tensor, ToeplitzState]:
    """Queries that see the ring and the new keys one by one, and all keys before them with one factor."""
    (B, _, L, _), H, reach = q.shape, k.shape[1], c.shape[1] // 2
    seen, state = _extend(call, k, reach)
    # a single query stands at the last key: what has left the ring is as far from it as what left before
    sums = state if L == 1 else call.state
    if L == 1:
        numerator, z = _last(q, c, state)
    else:
        options = call.options._replace(normalize=False)
        keys, values, mask = seen
        # in the sums' dtype: they are divided only below
        numerator, z = attend(q, keys, values.to(q.dtype), c, mask, None, options)
    far = (q * c[:, :1, None]).reshape(B, H, -1, q.shape[3])                                      # [B, H, G L, M]
    numerator = numerator + (far @ sums.kv).view(numerator.shape)
    if call.options.normalize:
        z = (z + (far @ sums.k_sum[..., None]).view(z.shape))[..., None]
        numerator = torch.where(z == 0, 0, numerator / torch.where(z == 0, 1, z))
    return numerator.to(call.v.dtype), state


def _last(q: Tensor, c: Tensor, state: ToeplitzState) -> tuple[Tensor, Tensor]:
    """One query against the ring, whose last key is its own: too few for a kernel. -> numerator, z"""
    (B, Hq, _, M), (_, H, n, _), reach = q.shape, state.ring_key.shape, c.shape[1] // 2
    near = c[:, reach + 1 - n : reach + 1].view(H, Hq // H, n)
    w = q.reshape(B, H, Hq // H, M) @ state.ring_key.mT * near                                    # [B, H, G, n]
    w = w.masked_fill(state.ring_mask[:, None, None], 0)
    return (w @ state.ring_value.to(w.dtype)).view(B, Hq, 1, -1), w.sum(-1).view(B, Hq, 1)


def weights(q: Tensor, k: Tensor, feature, bias: Tensor, *, is_causal: bool, key_padding_mask: Tensor | None) -> Tensor:
    """The weights `[B, H, L, S]` with which the values are summed, formed densely."""
    masks = {"is_causal": is_causal, "key_padding_mask": key_padding_mask, "cu_seqlens": None}
    options = {"method": "auto", "scale": None, "state": None, "normalize": True, "impl": "reference"}
    call = prepare("weights", q, k, k, feature=feature, bias=bias, keeps_state=False, **masks, **options)
    if key_padding_mask is not None:
        k = k.masked_fill(key_padding_mask[:, None, :, None], 0)
    with _dispatch.without_autocast(q.device.type):
        names = {"is_causal": is_causal, "normalize": True, "dtype": accumulator(q.dtype)}
        c = _toeplitz.factors(bias, q.shape[1], bias.shape[-1] // 2, **names)
        phi_q, phi_k = features(feature, q, False, False), features(feature, k, True, False)
        where = {"offset": 0, "is_causal": is_causal}
        w = reference.toeplitz_weights(phi_q, phi_k, c, call.mask, None, **where)
        z = w.sum(-1, keepdim=True)                                                            # [B, H, L, 1]
        return torch.where(z == 0, 0, w / torch.where(z == 0, 1, z)).to(q.dtype)


# the product alone


def toeplitz_matvec(c: Tensor, x: Tensor, causal: bool = False) -> Tensor:
    """The product with a Toeplitz matrix by FFT, in O(n log n): y_i = sum_j c_(j-i) x_j.

    c: `[..., 2n-1]`, the factor of offset t at t + n - 1. x: `[..., n, d]`; leading dimensions broadcast.
    causal: only j <= i; what c holds for offsets above 0 is not read.

    Returns `[..., n, d]` in the wider of the two dtypes, computed in float32 (float64 if one is), rounded to about 1e-6
    of the largest |c| |x| of all. Any n; differentiable as often as you like. Raises ValueError or TypeError in a
    sentence.
    """
    op = "toeplitz_matvec"
    for name, value, dim in (("c", c, 1), ("x", x, 2)):
        if not isinstance(value, Tensor) or value.dtype not in _check.DTYPES:
            _check.fail(op, f"{name} must be a floating tensor, got {_check.describe(value)}", TypeError)
        if value.dim() < dim:
            _check.fail(op, f"{name} must have {dim} dimensions or more, got {list(value.shape)}")
    n = x.shape[-2]
    if c.shape[-1] != max(2 * n - 1, 0):
        _check.fail(op, f"c must be [..., 2n-1] = [..., {max(2 * n - 1, 0)}] for x of length {n}, got {list(c.shape)}")
    if c.device != x.device:
        _check.fail(op, f"c is on {c.device} and x on {x.device}")
    try:
        lead = torch.broadcast_shapes(c.shape[:-1], x.shape[:-2])
    except RuntimeError:
        _check.fail(op, f"leading dimensions of c and x must broadcast, got {list(c.shape)} and {list(x.shape)}")
    dtype = torch.promote_types(c.dtype, x.dtype)
    acc = accumulator(dtype)
    with _dispatch.without_autocast(x.device.type):
        c, x = c.to(acc), x.to(acc)
        if causal:
            c = torch.cat([c[..., :n], torch.zeros_like(c[..., n:])], -1)
        if 0 in lead or 0 in x.shape[-2:]:
            return (x.expand(*lead, *x.shape[-2:]) * c.sum()).to(dtype)
        return _toeplitz_fft.matvec(c, x).to(dtype)
