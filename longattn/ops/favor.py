"""Linear attention with FAVOR+ features: schema, autograd, states. The mathematics is in reference/favor.py; the public
door is `longattn.linear_attention(feature_map=longattn.Favor(...))`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..favor import Favor
from ..features import favor_count, favor_features, favor_norm, favor_rows, unit_rows
from ..native import favor as native_favor
from ..reference import favor as reference
from ..state import FavorState
from . import _check, _dispatch, _library
from ._autograd import FirstDerivative, tracked
from ._prefix import accumulator, aligned, segment_of, sequences, slots


class Options(NamedTuple):
    """What an engine must know beside the tensors."""

    kind: str
    l2: bool
    is_causal: bool
    exact_diagonal: bool
    segment: int
    impl: str


def engine(impl: str):
    """The module whose `forward` and `backward` run this op; they share one signature."""
    if impl == "triton":
        from ..kernels import favor as triton_favor

        return triton_favor
    return native_favor


# schema and fakes

_OPTIONS = "str kind, bool l2, bool is_causal, bool exact_diagonal, int segment, str impl"
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? cu_seqlens, Tensor? kv, Tensor? k_sum, Tensor? log_scale, "
    "Tensor projection, Tensor root, Tensor? mean"
)
_SAVED = (
    "Tensor out, Tensor normalizer, Tensor row_scale, Tensor segment_kv, Tensor segment_k_sum, "
    "Tensor segment_log_scale, Tensor final_log_scale"
)
_library.define(
    "_favor_forward", f"({_INPUTS}, {_OPTIONS}, bool save_segments) -> ({', '.join(['Tensor'] * 9)})"
)
_library.define(
    "_favor_backward",
    f"(Tensor grad_out, Tensor? grad_kv, Tensor? grad_k_sum, {_INPUTS}, {_SAVED}, {_OPTIONS}, bool root_grad) -> "
    f"({', '.join(['Tensor'] * 6)})",
)
INPUTS, SAVED, ROOT = 11, 7, 9


@_library.fake("_favor_forward")
def _(q, k, v, mask, cu_seqlens, kv, k_sum, log_scale, projection, root, mean, *rest):
    *options, save_segments = rest
    options = Options(*options)
    (B, Hq, L, _), (_, H, _, E) = q.shape, v.shape
    acc, M = accumulator(q.dtype), favor_count(projection, options.kind)
    n, ns = sequences(q, cu_seqlens), slots(q, cu_seqlens, options.is_causal, options.segment)
    saved = ((B, H, ns, M, E), (B, H, ns, M), (B, H, ns)) if save_segments else ((0,), (0,), (0,))
    shapes = ((B, Hq, L), (B, Hq, L), *saved, (n, H, M, E), (n, H, M), (n, H))
    return q.new_empty(B, Hq, L, E), *(q.new_empty(shape, dtype=acc) for shape in shapes)


@_library.fake("_favor_backward")
def _(grad_out, grad_kv, grad_k_sum, q, k, v, mask, cu_seqlens, kv, k_sum, *rest):
    acc = accumulator(q.dtype)
    states = (q.new_empty(0 if x is None else x.shape, dtype=acc) for x in (kv, k_sum))
    return *(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty((), dtype=acc), *states


def _forward(*arguments):
    tensors, (*options, save_segments) = arguments[:INPUTS], arguments[INPUTS:]
    options = Options(*options)._asdict()
    impl = options.pop("impl")
    return engine(impl).forward(*tensors, save_segments=save_segments, **options)


def _backward(*arguments):
    tensors, (*options, root_grad) = arguments[: 3 + INPUTS + SAVED], arguments[3 + INPUTS + SAVED :]
    options = Options(*options)._asdict()
    impl = options.pop("impl")
    # Triton's sums of rows are there anyway
    more = {"root_grad": root_grad} if impl == "cpu" else {}
    return engine(impl).backward(*tensors, **options, **more)


_library.run(_favor_forward=_forward, _favor_backward=_backward)


# autograd


class _FavorAttention(torch.autograd.Function):
    @staticmethod
    def forward(*arguments):
        return torch.ops.longattn._favor_forward(*arguments[:INPUTS], *arguments[INPUTS], True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        out, normalizer, row_scale, *segments, _kv, _k_sum, log_scale = output
        ctx.options = inputs[-1]
        # the scale of a state is its unit: what is differentiable is the sum it stands for
        ctx.mark_non_differentiable(normalizer, row_scale, *segments, log_scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:-1], out, normalizer, row_scale, *segments, log_scale)

    @staticmethod
    def backward(ctx, grad_out, *grads):
        grad_kv, grad_k_sum = grads[-3:-1]
        tensors = ctx.saved_tensors
        q, k, v, _, cu_seqlens, kv, _, _, projection, *_ = tensors
        out = tensors[INPUTS]
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if grad_kv is not None or grad_k_sum is not None:
            M = favor_count(projection, ctx.options.kind)
            shape, acc = (sequences(q, cu_seqlens), k.shape[1], M, v.shape[3]), accumulator(q.dtype)
            grad_kv = q.new_zeros(shape, dtype=acc) if grad_kv is None else grad_kv
            grad_k_sum = q.new_zeros(shape[:3], dtype=acc) if grad_k_sum is None else grad_k_sum
        options = (*ctx.options, ctx.needs_input_grad[ROOT])
        dq, dk, dv, droot, dkv, dk_sum = FirstDerivative.apply(
            "linear_attention: the kernels", "_favor_backward", grad_out, grad_kv, grad_k_sum, *tensors, *options
        )
        state = (None, None) if kv is None else (dkv, dk_sum)
        return dq, dk, dv, None, None, *state, None, None, droot, None, None


# a validated call


class Call(NamedTuple):
    """Tensors as the engines take them, and where the call would run."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    state: FavorState | None
    projection: Tensor
    root: Tensor
    mean: Tensor | None
    options: Options
    keeps_state: bool
    # subtract the mean of this call's own keys first
    centred: Favor | None
    explanation: _dispatch.Explanation


def _check_state(op: str, state, count: int, k: Tensor, v: Tensor, favor: Favor) -> None:
    if not isinstance(state, FavorState):
        _check.fail(op, f"with a Favor feature map, state must be a FavorState, got {type(state).__name__}", TypeError)
    if not isinstance(state.tail_mask, Tensor) or state.tail_mask.dim() != 2:
        came = _check.describe(state.tail_mask)
        _check.fail(op, f"state.tail_mask must be bool [sequences, t], got {came}", TypeError)
    lead, acc = (count, k.shape[1]), accumulator(k.dtype)
    M, E, D, t = favor.n_features, v.shape[3], k.shape[3], state.tail_mask.shape[1]
    if t >= reference.CHUNK or (t and not favor.exact_diagonal):
        who = f"only exact_diagonal=True can use, fewer than {reference.CHUNK}"
        _check.fail(op, f"the state holds {t} tokens of an unfinished chunk, which {who}")
    expected = {
        "kv": ((*lead, M, E), acc), "k_sum": ((*lead, M), acc), "log_scale": (lead, acc),
        "tail_key": ((*lead, t, D), k.dtype), "tail_value": ((*lead, t, E), k.dtype),
        "tail_mask": ((count, t), torch.bool),
    }  # fmt: skip
    _check.state_tensors(op, state, k.device, expected)


def check_map(op: str, q: Tensor, k: Tensor, favor: Favor, *, normalize: bool) -> None:
    """What every call with a Favor map must satisfy."""
    if q.shape[3] != favor.head_dim:
        _check.fail(op, f"this Favor was made for head_dim {favor.head_dim}, got query and key with {q.shape[3]}")
    if not normalize:
        remedy = "for the raw sums pass the features as a callable, feature_map=lambda x: favor(x)"
        _check.fail(op, f"a Favor map is defined up to a factor, which only normalize=True removes; {remedy}")
    if favor.projection.device != q.device:
        _check.fail(op, f"the Favor map is on {favor.projection.device} and query on {q.device}; move it with .to()")
    if favor.center_keys and favor.key_mean is not None and favor.key_mean.shape[0] != k.shape[1]:
        _check.fail(op, f"key_mean was measured for {favor.key_mean.shape[0]} heads, got keys with {k.shape[1]}")


def prepare(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    state: FavorState | None,
    favor: Favor,
    is_causal: bool,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalize: bool,
    impl: str,
    keeps_state: bool,
) -> Call:
    """The rest of the public door for a Favor map; q, k and v have passed the checks that all maps share."""
    check_map(op, q, k, favor, normalize=normalize)
    exact = favor.exact_diagonal
    if exact and not is_causal:
        _check.fail(op, "exact_diagonal needs is_causal=True: without an order there is no diagonal")
    if exact and keeps_state and (cu_seqlens is not None or q.shape[2] > k.shape[2]):
        what = "packed sequences" if cu_seqlens is not None else "more queries than keys"
        _check.fail(op, f"exact_diagonal cannot carry a state with {what}: chunks would start anywhere")
    if state is not None:
        _check_state(op, state, sequences(q, cu_seqlens), k, v, favor)
    acc, l2, mean = accumulator(q.dtype), favor.normalize == "l2", None
    root = favor.root.to(acc)
    if favor.center_keys and favor.key_mean is not None:
        mean = favor.key_mean.to(acc)
    elif favor.center_keys and (is_causal or state is not None or cu_seqlens is not None):
        why = "is_causal may not look at later keys" if is_causal else "this call sees a part of the keys"
        _check.fail(op, f"center_keys needs a stored mean here ({why}): call calibrate(key) once")
    centred = favor if favor.center_keys and mean is None else None
    reasons = {name: _refuses(name, q, k, v, favor.projection) for name in _dispatch.IMPLS}
    chosen = _dispatch.choose(op, impl, reasons)
    segment = segment_of(favor.n_features, v.shape[3])
    options = Options(favor.kind, l2, is_causal, exact, segment, chosen)
    projection, explanation = favor.projection.to(acc), _dispatch.Explanation(op, chosen, reasons)
    tensors = (q, k, v, key_padding_mask, cu_seqlens, state, projection, root, mean)
    return Call(*tensors, options, keeps_state, centred, explanation)


def _centre(call: Call) -> Call:
    """The mean of a call's own keys is part of its graph, so it is not left to the kernels."""
    q, k, v, mask, l2 = call.q, call.k, call.v, call.mask, call.options.l2
    acc = accumulator(q.dtype)
    if mask is not None:
        k = k.masked_fill(mask[:, None, :, None], 0)
    own = call.centred.mean(k, mask)[:, :, None]                                               # [B, H, 1, D]
    q, k = ((unit_rows(x.to(acc)) if l2 else x.to(acc)) for x in (q, k))
    options = call.options._replace(l2=False)
    return call._replace(q=q.to(v.dtype), k=(k - own).to(v.dtype), options=options, centred=None)


def _refuses(impl: str, q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> str | None:
    reason = _dispatch.refuses(impl, q)
    if reason is not None or impl in ("cpu", "reference"):
        return reason
    if impl == "cuda":
        return "FAVOR+ runs in Triton; CUDA C++ has no kernel of it"
    return engine(impl).refuses(q, k, v, projection)


# running it


def run(call: Call) -> tuple[Tensor, FavorState]:
    """-> output `[B, Hq, L, E]`, and the state after the last key"""
    if call.centred is not None:
        call = _centre(call)
    if call.options.exact_diagonal and call.keeps_state:
        return _run_in_chunks(call)
    if call.options.is_causal and call.q.shape[2] != call.k.shape[2]:
        return aligned(call, run)
    output, kv, k_sum, log_scale = _attend(call)
    return output, _state(call, kv, k_sum, log_scale)


def _state(call: Call, kv, k_sum, log_scale, tail=None) -> FavorState:
    """tail: key, value and mask of the unfinished chunk."""
    if tail is None or tail[0].shape[2] == 0:
        (n, H), D, E = log_scale.shape, call.k.shape[3], call.v.shape[3]
        tail = call.k.new_empty(n, H, 0, D), call.v.new_empty(n, H, 0, E), kv.new_empty((n, 0), dtype=torch.bool)
    else:
        # copies: the caller may write into its tensors, and a state must not keep all of them alive
        tail = (x.clone(memory_format=torch.contiguous_format) for x in tail)
    return FavorState(kv, k_sum, log_scale, *tail)


def _attend(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One call of the engine. -> output, kv, k_sum, log_scale"""
    q, k, v, mask, cu_seqlens, state, projection, root, mean, options, *_ = call
    kv, k_sum, log_scale = (None, None, None) if state is None else state[:3]
    if options.impl == "reference":
        acc = accumulator(q.dtype)
        if mask is not None:
            # kept out of the graph, so that NaN in a padded key does not reach its gradient as 0 * NaN
            k, v = (x.masked_fill(mask[:, None, :, None], 0) for x in (k, v))
        names = {name: getattr(options, name) for name in ("kind", "l2", "is_causal", "exact_diagonal")}
        tensors = (q.to(acc), k.to(acc), v.to(acc), mask, cu_seqlens, kv, k_sum, log_scale, projection, root, mean)
        # the inputs have autocast's dtype already; the sums keep theirs
        with _dispatch.without_autocast(q.device.type):
            output, *sums = reference.favor_attention(*tensors, **names)
        return output.to(q.dtype), *(x.contiguous() for x in sums)
    tensors = (q, k, v, mask, cu_seqlens, kv, k_sum, log_scale, projection, root, mean)
    if tracked(*tensors):
        results = _FavorAttention.apply(*tensors, options)
    else:
        results = torch.ops.longattn._favor_forward(*tensors, *options, False)
    return results[0], *results[-3:]


def _run_in_chunks(call: Call) -> tuple[Tensor, FavorState]:
    """exact_diagonal with a state: chunks are counted from the start of the sequence, so the state ends with the last
    whole chunk, and the keys after it travel with it as they are."""
    q, k, v, mask, state = call.q, call.k, call.v, call.mask, call.state
    if state is None:
        state = FavorState.zeros(
            *k.shape[:2], favor_count(call.projection, call.options.kind), v.shape[3], k.shape[3], device=k.device,
            dtype=accumulator(k.dtype),
        )  # fmt: skip
    if mask is None:
        mask = torch.zeros(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    t, S, L = state.tail_mask.shape[1], k.shape[2], q.shape[2]
    sums, tail, parts = state[:3], state[3:], []
    # what fills the open chunk, the whole chunks after it, and what opens the next
    first = min(reference.CHUNK - t, S) if t else 0
    whole = first + (S - first) // reference.CHUNK * reference.CHUNK
    for start, stop in ((0, first), (first, whole), (whole, S)):
        if start == stop and (parts or stop < S):
            continue
        rows = [k[:, :, start:stop], v[:, :, start:stop], mask[:, start:stop]]
        if t and start == 0:
            rows = [torch.cat(pair, 1 if pair[0].dim() == 2 else 2) for pair in zip(tail, rows, strict=True)]
        query = q[:, :, max(start - S + L, 0) : max(stop - S + L, 0)]
        piece = call._replace(k=rows[0], v=rows[1], mask=rows[2], state=FavorState(*sums, *tail))
        length, closed = rows[0].shape[2], rows[0].shape[2] % reference.CHUNK == 0
        if query.shape[2] == 1 and length < reference.CHUNK:
            parts.append(_step(piece._replace(q=query), *rows))
        elif query.shape[2] or closed or (stop == S and not parts):
            padded = F.pad(query, (0, 0, length - query.shape[2], 0)) if query.shape[2] < length else query
            output, *after = _attend(piece._replace(q=padded))
            parts.append(output[:, :, length - query.shape[2] :])
            sums = after if closed else sums
        tail = [x[:, :0] if x.dim() == 2 else x[:, :, :0] for x in rows] if closed else rows
        t = 0
    output = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    return output, _state(call, *sums, tail)


def _step(call: Call, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """One query against the state and, exactly, against the keys of its own chunk: at most 64, too few for a kernel."""
    B, Hq, _, D = call.q.shape
    H, acc, options = k.shape[1], accumulator(k.dtype), call.options
    with _dispatch.without_autocast(k.device.type):
        q = favor_rows(call.q.to(acc), call.root, options.l2).reshape(B, H, Hq // H, D)        # [B, H, G, D]
        if mask is not None:
            k, v = (x.masked_fill(mask[:, None, :, None], 0) for x in (k, v))
        logs = q @ favor_rows(k.to(acc), call.root, options.l2, call.mean).mT                  # [B, H, G, t]
        if mask is not None:
            logs = logs.masked_fill(mask[:, None, None], -math.inf)
        top = logs.detach().amax(-1, keepdim=True)
        if call.state is not None:
            kv, k_sum, log_scale = call.state[:3]
            phi, b = favor_features(q, call.projection, options.kind)                          # [B, H, G, M]
            state_log = (b - math.log(favor_norm(call.projection, options.kind)) + log_scale[..., None])[..., None]
            top = torch.maximum(top, state_log.detach())
        top = top.masked_fill(top == -math.inf, 0)
        w = torch.exp(logs - top)
        total, z = w @ v.to(acc), w.sum(-1, keepdim=True)
        if call.state is not None:
            share = torch.exp(state_log - top)
            total, z = total + share * (phi @ kv), z + share * (phi @ k_sum[..., None])
        output = torch.where(z == 0, 0, total / torch.where(z == 0, 1, z))
    return output.reshape(B, Hq, 1, -1).to(call.q.dtype)


def weights(q: Tensor, k: Tensor, favor: Favor, *, is_causal: bool, key_padding_mask: Tensor | None) -> Tensor:
    """The weights `[B, H, L, S]` with which a Favor map sums the values, formed densely."""
    masks = {"is_causal": is_causal, "key_padding_mask": key_padding_mask, "cu_seqlens": None}
    options = {"state": None, "favor": favor, "normalize": True, "impl": "reference", "keeps_state": False}
    call = prepare("weights", q, k, k, **masks, **options)
    acc, options = accumulator(q.dtype), call.options
    if key_padding_mask is not None:
        call = call._replace(k=call.k.masked_fill(key_padding_mask[:, None, :, None], 0))
    L, S = q.shape[2], k.shape[2]
    visible, near, _, _ = reference.pairs(L, S, key_padding_mask, None, is_causal, options.exact_diagonal, k)
    with _dispatch.without_autocast(q.device.type):
        rows = favor_rows(call.q.to(acc), call.root, options.l2)
        columns = favor_rows(call.k.to(acc), call.root, options.l2, call.mean)
        w, _ = reference.favor_weights(rows, columns, visible, near, call.projection, options.kind)
        z = w.sum(-1, keepdim=True)                                                            # [B, H, L, 1]
        return torch.where(z == 0, 0, w / torch.where(z == 0, 1, z)).to(q.dtype)
