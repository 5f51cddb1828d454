"""Exact softmax attention: contract and engines. The mathematics is in reference/softmax.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..reference import softmax as reference
from . import _check, _dispatch, _tiles, _toeplitz
from ._autograd import transformed
from ._prefix import accumulator

# tokens of a tile on the CPU
CHUNK = 64
# more chunks than there can be; not counted from the lengths, which a compiled graph leaves open
EVERY = 1 << 40


class SoftmaxAttentionOutput(NamedTuple):
    """output `[B, Hq, L, E]`, and the weights `[B, Hq, L, S]` it was summed with (after dropout)."""

    output: Tensor
    weights: Tensor


class Chunks(NamedTuple):
    """A query sees the chunk of `size` tokens it is in, and so many before and after."""

    size: int
    before: int
    after: int


class _Call(NamedTuple):
    """One validated call, and where it would run."""

    q: Tensor
    k: Tensor
    v: Tensor
    attn_mask: Tensor | None
    padding: Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float
    enable_gqa: bool
    window: int | None
    chunks: Chunks | None
    rpe_bias: Tensor | None
    explanation: _dispatch.Explanation


def _check_mask(op: str, mask: Tensor | None, q: Tensor, k: Tensor, is_causal: bool) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        _check.fail(op, f"attn_mask must be a tensor, got {_check.describe(mask)}", TypeError)
    full = (*q.shape[:3], k.shape[2])
    typed = mask.dtype == torch.bool or mask.is_floating_point()
    fits = mask.dim() <= 4 and all(
        have in (1, want) for have, want in zip(reversed(mask.shape), reversed(full), strict=False)
    )
    if not typed or not fits or mask.device != q.device:
        _check.fail(
            op,
            "attn_mask must be bool (True = may attend) or float (added to the scores), broadcast to [B, Hq, L, S] = "
            f"{list(full)} and be on {q.device}, got {_check.describe(mask)}",
            ValueError if typed else TypeError,
        )
    if is_causal:
        _check.fail(op, "attn_mask and is_causal exclude each other; put the causal part into attn_mask")


def _prepare(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    window: int | None = None,
    chunks: Chunks | None = None,
    rpe_bias: Tensor | None = None,
    impl: str = "auto",
) -> _Call:
    q, k, v = query, key, value
    _check.attention_inputs(op, q, k, v, enable_gqa)
    _check.padding_mask(op, key_padding_mask, k)
    _check_mask(op, attn_mask, q, k, is_causal)
    if not (isinstance(dropout_p, (int, float)) and 0 <= dropout_p <= 1):
        _check.fail(op, f"dropout_p must be a probability from 0 to 1, got {_check.describe(dropout_p)}")
    if not _check.is_finite_or_none(scale):
        _check.fail(op, f"scale must be a finite number or None, got {_check.describe(scale)}")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        _check.fail(op, f"window must be a positive integer or None, got {window!r}")
    if window is not None and attn_mask is not None:
        _check.fail(op, "attn_mask and window exclude each other; put the window into attn_mask")
    if rpe_bias is not None:
        _toeplitz.check_bias(op, rpe_bias, q.shape[1], q.device)
        rpe_bias = rpe_bias.to(accumulator(q.dtype)).expand(q.shape[1], -1)
    device = q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        attn_mask = attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(q.dtype)
    reasons = {
        "cpu": _refuses("cpu", q, k, v, attn_mask),
        "torch": _torch_refuses(window, chunks, rpe_bias),
        "triton": _refuses("triton", q, k, v, attn_mask),
        "reference": None,
    }
    if impl == "auto" and (dropout_p > 0 or _are_few(q.shape[2]) or transformed()):
        # torch's dropout draws torch's numbers, its kernel is ahead for a few queries and knows torch.func
        reasons = {name: reasons[name] for name in ("torch", "cpu", "triton", "reference")}
    chosen = _dispatch.choose(op, impl, reasons)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    explanation = _dispatch.Explanation(op, chosen, reasons)
    masks = (attn_mask, key_padding_mask, dropout_p, bool(is_causal))
    return _Call(q, k, v, *masks, scale, enable_gqa, window, chunks, rpe_bias, explanation)


def _are_few(tokens: int) -> bool:
    if torch.compiler.is_compiling():
        # to compare a length that is still open would tie the graph to one side; torch imports this when it compiles
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(tokens < CHUNK)
    return tokens < CHUNK


def _torch_refuses(window: int | None, chunks: Chunks | None, rpe_bias: Tensor | None) -> str | None:
    if window is not None or chunks is not None:
        return "torch's kernels know no window; as attn_mask it would take O(L S) memory"
    return None if rpe_bias is None else "torch's kernels know no rpe_bias; as attn_mask it would take O(L S) memory"


def _refuses(impl: str, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> str | None:
    reason = _dispatch.refuses(impl, q)
    if reason is None and attn_mask is not None:
        return "attn_mask runs in torch; causality, windows and key padding run here"
    return _tiles.engine(impl).refuses(q, k, v) if reason is None and impl == "triton" else reason


def _run_tiles(call: _Call) -> Tensor:
    reach = EVERY if call.window is None else -(-(call.window - 1) // CHUNK)
    size, before, after = call.chunks or (CHUNK, reach, reach)
    seed = _tiles.draw_seed() if call.dropout_p > 0 else 0
    options = _tiles.Options(
        chunk=size,
        look_back=before,
        look_ahead=0 if call.is_causal else after,
        window=call.window or 0,
        is_causal=call.is_causal,
        self_rule=_tiles.SELF_ORDINARY,
        dedupe=False,
        wrap=False,
        scale=call.scale,
        dropout_p=float(call.dropout_p),
        seed=seed,
        impl=call.explanation.chosen,
    )
    return _tiles.attend(call.q, call.k, call.v, call.padding, None, None, (None,) * 6, options, call.rpe_bias)


def _run(call: _Call) -> Tensor:
    q, k, v, mask, padding, dropout_p, is_causal, scale, enable_gqa, _, _, _, explanation = call
    if explanation.chosen == "reference":
        return _run_reference(call).output
    if explanation.chosen in ("cpu", "triton") and dropout_p < 1:
        return _run_tiles(call)
    if padding is not None:
        # a score of NaN stays NaN when -inf is added, so what padded keys hold must go first
        k, v = (x.masked_fill(padding[:, None, :, None], 0) for x in (k, v))
        if mask is None and not is_causal:
            mask, padding = ~padding[:, None, None, :], None  # [B, 1, 1, S]
        elif q.device.type != "cpu":
            mask, padding, is_causal = _merge(mask, padding, q.shape[2], is_causal), None, False
    if scale <= 0:
        # masked scores are -inf before torch's kernels scale them
        q, scale = q * scale, 1.0
    D, E = q.shape[3], v.shape[3]
    if padding is not None or (E != D and q.device.type == "cpu"):
        # torch's fused CPU kernel wants one head dim for all, else it forms the L x S scores; and the padding rides in
        # a feature of its own, 1 . -inf, where torch would need it merged with the other mask
        width = max(D + (padding is not None), E)
        width += -width % 8
        q, k, v = (F.pad(x, (0, width - x.shape[3])) for x in (q, k, v))
        if padding is not None:
            q[..., D] = 1
            k[..., D].masked_fill_(padding[:, None], -torch.inf)
    # torch's fused kernels want unit stride in the last dim, else they form the L x S scores
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    options = {"scale": scale, "enable_gqa": enable_gqa}
    output = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, **options)
    if call.rpe_bias is not None:
        # every weight is dropped, and the bias stays in the graph
        output = output + call.rpe_bias[:, :0].sum().to(output.dtype)
    return output[..., :E]


def _merge(mask: Tensor | None, padding: Tensor, L: int, is_causal: bool) -> Tensor:
    """One mask of `[B, 1 or Hq, 1 or L, S]` for kernels that take no more than one."""
    blocked = padding[:, None, None, :]
    if is_causal:
        S = padding.shape[1]
        return torch.ones(L, S, dtype=torch.bool, device=padding.device).tril() & ~blocked
    return mask & ~blocked if mask.dtype == torch.bool else torch.where(blocked, -torch.inf, mask)


def _run_reference(call: _Call) -> SoftmaxAttentionOutput:
    q, k, v, mask, padding, dropout_p, is_causal, scale, _, window, chunks, rpe_bias, _ = call
    if chunks is not None:
        at = [torch.arange(n, device=q.device) // chunks.size for n in (q.shape[2], k.shape[2])]
        ahead = at[1] - at[0][:, None]  # [L, S]
        mask = (ahead >= -chunks.before) & (ahead <= chunks.after)
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    with _dispatch.without_autocast(q.device.type):
        rules = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "window": window}
        rules["rpe_bias"] = rpe_bias
        output, weights = reference.softmax_attention(q.to(acc), k.to(acc), v.to(acc), mask, padding, **rules)
    return SoftmaxAttentionOutput(output.to(q.dtype), weights.to(q.dtype))


def attend(op: str, *arguments, **options) -> Tensor:
    """`softmax_attention` for a mechanism called `op`, with chunks too."""
    return _run(_prepare(op, *arguments, **options))


def attend_with_weights(op: str, *arguments, **options) -> SoftmaxAttentionOutput:
    """`softmax_attention_with_weights`, likewise."""
    return _run_reference(_prepare(op, *arguments, impl="reference", **options))


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    window: int | None = None,
    rpe_bias: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` with a key padding mask and a promise about masked rows.

        o_i = sum_j softmax_j(scale q_i.k_j + bias_ij) v_j

    over the keys j that are allowed, not padded and, if causal, j <= i. Vaswani et al. 2017 (arXiv 1706.03762), eq. 1.

    query: `[B, Hq, L, D]`, key: `[B, H, S, D]`, value: `[B, H, S, E]`; float32, bfloat16, float16 or float64, one dtype
        for all, any strides.
    attn_mask: broadcasts to `[B, Hq, L, S]`; bool, True = may attend (as in torch's function, the opposite of
        nn.MultiheadAttention), or float, added to the scores. Excludes is_causal.
    dropout_p: applied to the weights whenever it is positive; pass 0 in evaluation.
    is_causal: query i sees keys 0..i, also when L != S.
    scale: default 1/sqrt(D).
    enable_gqa: Hq may be a multiple of H; query head h then reads key head h // (Hq / H). Keys are not repeated where
        torch's kernel shares them.
    key_padding_mask: bool `[B, S]`, True for a padded key: ignored whatever it holds (NaN too), with gradient 0.
    window: query i sees keys j with |i - j| < window (so i and the window - 1 before it, if causal), in time
        O((L + S) window). Excludes attn_mask; torch's kernels do not know it.
    rpe_bias: `[Hq, 2K+1]`, or `[2K+1]` for all heads: bias[clamp(j - i, -K, K) + K] is added to a score; -inf hides an
        offset. By impl="cpu" and "triton" in memory of O(L + S + K), gradient included; torch does not know it.
    impl: "auto", "cpu" and "triton" (our own tiles, without attn_mask), "torch" (torch's SDPA) or "reference" (dense);
        see `longattn.explain`. "auto" takes "cpu" where it can run, from 64 queries on and without dropout, else
        "torch", and on a GPU "triton" for a window or a bias by offset.

    Returns `[B, Hq, L, E]` in the inputs' dtype (autocast's under autocast). A query that sees no key gets 0, and
    gradient 0.
    impl="cpu" or "triton": memory of O(L + S) for every argument it takes, also dropout (its own counter, seeded by
    torch's generator); the same bits for any number of threads; a future NaN stays in the future; no second derivative.
    impl="torch": torch's fused kernels need O(L + S). For key_padding_mask this function copies key and value and
    builds a mask of `[B, 1, 1, S]`. Together with is_causal or attn_mask it copies query, key and value (with up to 8
    more features) on the CPU; elsewhere it builds a mask of `[B, 1, L, S]`, or of attn_mask's shape with B. On the CPU,
    E != D copies the inputs to a common width. torch itself forms `[B, Hq, L, S]` for dropout on the CPU, for an
    attn_mask that requires grad, and where none of its fused kernels takes the call. NaN in a key that attn_mask or
    causality alone hides may reach every row.
    Raises ValueError or TypeError in a sentence.
    """
    options = {"key_padding_mask": key_padding_mask, "window": window, "rpe_bias": rpe_bias, "impl": impl}
    arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return attend("softmax_attention", *arguments, **options)


def softmax_attention_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    window: int | None = None,
) -> SoftmaxAttentionOutput:
    """`softmax_attention` that also returns its weights `[B, Hq, L, S]`, after dropout, so O(L S) time and memory.

    Arguments, dtypes and errors as in `softmax_attention`. A query that sees no key has weights 0.
    """
    arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    options = {"key_padding_mask": key_padding_mask, "window": window}
    return attend_with_weights("softmax_attention_with_weights", *arguments, **options)


_dispatch.plan(
    softmax_attention,
    lambda *args, **kwargs: _prepare("softmax_attention", *args, **kwargs).explanation,
)
