"""Softmax attention with its weights written out: the reference's formula in as few passes over them as can be."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._dispatch import without_autocast
from ._prefix import accumulator


def _bias(
    q: Tensor, S: int, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool, nan_compat: bool
) -> tuple[Tensor | None, Tensor | None]:
    """-> what is added to the scores, -inf where a key is hidden, to [B, H, L, S], and which queries see a key, to
    [B, H, L, 1] (None: it does not matter). A query that sees none has a bias of 0, so that its gradient is finite
    before it is dropped."""
    hidden, bias = None, torch.zeros((), dtype=q.dtype, device=q.device)
    if is_causal:
        hidden = torch.ones(q.shape[2], S, dtype=torch.bool, device=q.device).triu(1)[None, None]
    if key_padding_mask is not None:
        padded = key_padding_mask[:, None, None]
        hidden = padded if hidden is None else hidden | padded
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            masked = ~attn_mask
        else:
            bias, masked = attn_mask.to(q.dtype), attn_mask == -torch.inf
        hidden = masked if hidden is None else hidden | masked
    if hidden is None:
        return None, None
    if nan_compat:
        return torch.where(hidden, -torch.inf, bias), None
    seen = ~hidden.all(-1, keepdim=True)
    return torch.where(hidden, torch.where(seen, -torch.inf, 0), bias), seen


def attend(
    q: Tensor,                                 # [B, H, L, D]
    k: Tensor,                                 # [B, H, S, D]
    v: Tensor,                                 # [B, H, S, E]
    *,
    attn_mask: Tensor | None,                  # to [B, H, L, S]: bool, True = may attend, or float, added
    key_padding_mask: Tensor | None,           # [B, S], True = padded: ignored whatever it holds
    is_causal: bool,
    dropout_p: float,
    nan_compat: bool = False,
) -> tuple[Tensor, Tensor]:
    """-> output [B, H, L, E], weights [B, H, L, S] after dropout; both 0 for a query that sees no key.

    nan_compat: there both are NaN, and the gradients, and what padded keys hold counts if it is NaN: a plain softmax.
    """
    dtype, acc = q.dtype, accumulator(q.dtype)
    bias, seen = _bias(q.to(acc), k.shape[2], attn_mask, key_padding_mask, is_causal, nan_compat)
    if key_padding_mask is not None and not nan_compat:
        k, v = (x.masked_fill(key_padding_mask[:, None, :, None], 0) for x in (k, v))
    with without_autocast(q.device.type):
        scores = (q.to(acc) * q.shape[3] ** -0.5) @ k.to(acc).mT                               # [B, H, L, S]
        weights = torch.softmax(scores if bias is None else scores.add_(bias), -1)
        if seen is not None:
            weights = torch.where(seen, weights, 0)
        weights = F.dropout(weights, dropout_p, training=dropout_p > 0)
        return (weights @ v.to(acc)).to(dtype), weights.to(dtype)
