"""Softmax attention, written as the formula: the oracle of every kernel.

    w_ij = exp(s_ij) / sum_j exp(s_ij),    s_ij = scale q_i.k_j + bias_ij + rpe_bias_(j-i),    o_i = sum_j w_ij v_j

over the keys j that query i may see. A query that sees no key has w_i = 0 and o_i = 0.
Vaswani et al. 2017 (arXiv 1706.03762), eq. 1. Dense: O(L S) time and memory, for truth and not for speed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_weights(
    q: Tensor,                                 # [B, Hq, L, D]
    k: Tensor,                                 # [B, H, S, D]
    attn_mask: Tensor | None,                  # to [B, Hq, L, S]: bool, True = may attend, or float, added
    key_padding_mask: Tensor | None,           # [B, S], True = padded
    *,
    is_causal: bool,
    scale: float,
    window: int | None = None,                 # |i - j| < window
    rpe_bias: Tensor | None = None,            # [Hq, 2K+1]: added at t = j - i, which stops at -K and K
) -> Tensor:
    """-> weights [B, Hq, L, S]"""
    L, S, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    allowed = torch.ones(q.shape[0], 1, L, S, dtype=torch.bool, device=q.device)               # [B, 1, L, S]
    if is_causal:
        allowed = allowed.tril()
    if window is not None:
        allowed = allowed.triu(1 - window).tril(window - 1)
    if key_padding_mask is not None:
        allowed = allowed & ~key_padding_mask[:, None, None, :]
        k = k.masked_fill(key_padding_mask[:, None, :, None], 0)
    scores = scale * q @ k.repeat_interleave(groups, 1).mT                                     # [B, Hq, L, S]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = allowed & attn_mask
    elif attn_mask is not None:
        allowed = allowed & (attn_mask != -torch.inf)
        scores = scores + attn_mask.to(scores.dtype)
    if rpe_bias is not None:
        reach = rpe_bias.shape[1] // 2
        offsets = torch.arange(S, device=q.device) - torch.arange(L, device=q.device)[:, None]
        biases = rpe_bias[:, offsets.clamp(-reach, reach) + reach]                             # [Hq, L, S]
        allowed = allowed & (biases != -torch.inf)
        scores = scores + torch.where(biases == -torch.inf, 0, biases)
    # a row that sees nothing takes the softmax of zeros, so that its gradient is finite before it is dropped
    seen = allowed.any(-1, keepdim=True)                                                       # [B, 1 or Hq, L, 1]
    scores = torch.where(allowed, scores, -torch.inf)
    return torch.where(seen, torch.softmax(torch.where(seen, scores, 0), -1), 0)               # [B, Hq, L, S]


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,                                 # [B, H, S, E]
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    *,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    window: int | None = None,
    rpe_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-> output [B, Hq, L, E], weights [B, Hq, L, S] after dropout"""
    rules = {"is_causal": is_causal, "scale": scale, "window": window, "rpe_bias": rpe_bias}
    weights = attention_weights(q, k, attn_mask, key_padding_mask, **rules)
    weights = torch.dropout(weights, dropout_p, train=True)
    if key_padding_mask is not None:
        v = v.masked_fill(key_padding_mask[:, None, :, None], 0)
    return weights @ v.repeat_interleave(q.shape[1] // k.shape[1], 1), weights
