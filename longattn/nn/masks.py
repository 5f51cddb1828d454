"""From the masks of nn.MultiheadAttention (True = forbidden, float = added) to those of `Mechanism.attend`."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import _check
from .mechanisms import Mechanism


class Masks(NamedTuple):
    """attn_mask: True = may attend, or float, `[B or 1, H or 1, L or 1, S]`, never with is_causal.
    key_padding_mask: bool `[B, S]`.
    """

    attn_mask: Tensor | None
    key_padding_mask: Tensor | None
    is_causal: bool


def check(key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> None:
    """Dtypes, in torch's words."""
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None and not torch.is_floating_point(mask) and mask.dtype != torch.bool:
            raise AssertionError(f"only bool and floating types of {name} are supported")
    if key_padding_mask is not None and attn_mask is not None and key_padding_mask.dtype != attn_mask.dtype:
        warnings.warn(
            "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead.",
            stacklevel=4,
        )


def check_shapes(key_padding_mask: Tensor | None, attn_mask: Tensor | None, B: int, H: int, L: int, S: int) -> None:
    """In torch's words. key_padding_mask: `[B, S]`, attn_mask: `[L, S]` or `[B * H, L, S]`."""
    for dim, size in ((0, B), (1, S)) if key_padding_mask is not None else ():
        if key_padding_mask.shape[dim] != size:
            raise AssertionError(
                f"Expected key_padded_mask.shape[{dim}] to be {size}, but got {key_padding_mask.shape[dim]}"
            )
    if attn_mask is not None:
        expected = (L, S) if attn_mask.dim() == 2 else (B * H, L, S)
        if attn_mask.shape != expected:
            raise RuntimeError(
                f"The shape of the {attn_mask.dim()}D attn_mask is {attn_mask.shape}, but should be {expected}."
            )


def padding(key_padding_mask: Tensor | None, mechanism: Mechanism) -> tuple[Tensor | None, Tensor | None]:
    """-> bool `[B, S]`, and what a float mask adds to the scores beside (None where it is known to be nothing)."""
    if key_padding_mask is None or key_padding_mask.dtype == torch.bool:
        return key_padding_mask, None
    padded, plain = key_padding_mask == -torch.inf, _is_plain(key_padding_mask)
    if mechanism.takes_attn_mask:
        # one that learns is added even where it is 0 yet; reading a value on a GPU waits for it, and there is nothing
        # to gain there
        fixed = not key_padding_mask.requires_grad and _readable(plain) and plain.device.type == "cpu"
        return padded, None if fixed and bool(plain) else key_padding_mask
    sentence = (
        f"{mechanism!r} takes a key_padding_mask that is bool, or float with values 0 and -inf; others, and those that "
        "require a gradient, would be added to softmax scores, for which there is mechanism='exact'"
    )
    if key_padding_mask.requires_grad:
        _check.fail("MultiheadAttention", sentence)
    elif not _readable(plain):
        torch._assert_async(plain, f"MultiheadAttention: {sentence}")
    elif not plain:
        _check.fail("MultiheadAttention", sentence)
    return padded, None


def are_plain(key_padding_mask: Tensor | None, attn_mask: Tensor | None, is_causal: bool, L: int, S: int) -> bool:
    """Whether efficient mechanisms take these, as far as can be seen; attn_mask is not the causal one."""
    if attn_mask is not None or (is_causal and L != S):
        return False
    if key_padding_mask is None or key_padding_mask.dtype == torch.bool:
        return True
    plain = _is_plain(key_padding_mask)
    if key_padding_mask.requires_grad or not _readable(plain):
        return not key_padding_mask.requires_grad
    return bool(plain)


def for_efficient(
    mechanism: Mechanism, attn_mask: Tensor | None, padded: Tensor | None, is_causal: bool, hint: bool, L: int, S: int
) -> Masks:
    """Causality and key padding; any other attn_mask is refused."""
    if attn_mask is not None and not hint and not is_the_causal_one(attn_mask, L, S):
        _check.fail(
            "MultiheadAttention",
            f"{mechanism!r} cannot honour this attn_mask ({_check.describe(attn_mask)}): it takes the causal mask "
            "(pass is_causal=True, with it or without) and key_padding_mask; other masks take mechanism='exact'",
        )
    return Masks(None, padded, is_causal or hint or attn_mask is not None)


def for_exact(
    attn_mask: Tensor | None,
    padded: Tensor | None,
    key_bias: Tensor | None,
    is_causal: bool,
    q: Tensor,
    S: int,
    extra_keys: int,
) -> Masks:
    """Every mask, merged no further than it must be. q: `[B, H, L, D]`; S counts keys without the extra ones, which all
    queries see."""
    mask = None
    if attn_mask is not None:
        mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(q.dtype)
        mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, q.shape[:2])
    if key_bias is not None:
        bias = key_bias[:, None, None, :].to(q.dtype)  # [B, 1, 1, S]
        if mask is None:
            mask = bias
        else:
            mask = torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias
    if is_causal and (mask is not None or extra_keys):
        lower = torch.ones(q.shape[2], S, dtype=torch.bool, device=q.device).tril()[None, None]
        if mask is None:
            mask = lower
        else:
            mask = mask & lower if mask.dtype == torch.bool else torch.where(lower, mask, -torch.inf)
        is_causal = False
    if extra_keys and mask is not None:
        mask = F.pad(mask, (0, extra_keys), value=mask.dtype == torch.bool)
    if extra_keys and padded is not None:
        padded = F.pad(padded, (0, extra_keys), value=False)
    return Masks(mask, padded, is_causal)


def _is_plain(mask: Tensor) -> Tensor:
    """Whether a float mask has no other values than 0 and -inf; under vmap that of all its rows."""
    if not torch.compiler.is_compiling():
        while torch._C._functorch.is_functorch_wrapped_tensor(mask):
            mask = torch._C._functorch.get_unwrapped(mask)
    return ((mask == 0) | (mask == -torch.inf)).all()


def _readable(x: Tensor) -> bool:
    """Whether a value can decide what happens next: not while tracing, without data, for many rows of vmap at once, or
    capturing a graph."""
    if torch.compiler.is_compiling() or x.is_meta or hasattr(x, "fake_mode"):
        return False
    modes = torch._C._TorchDispatchModeKey
    if any(torch._C._get_dispatch_mode(mode) is not None for mode in (modes.FAKE, modes.PROXY)):
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def is_the_causal_one(mask: Tensor, L: int, S: int) -> bool:
    """Whether an attn_mask says no more than is_causal does, as far as can be seen, and will not learn to."""
    if L != S or mask.requires_grad or not _readable(mask):
        return False
    blocked = mask if mask.dtype == torch.bool else mask == -torch.inf
    upper = torch.ones(L, S, dtype=torch.bool, device=mask.device).triu(1)
    return torch.equal(blocked, upper.expand_as(blocked)) and (mask is blocked or bool(((mask == 0) | blocked).all()))
