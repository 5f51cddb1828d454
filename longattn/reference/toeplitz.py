"""Linear attention with relative positions, written as the formula: the oracle of every engine and method.

    o_i = sum_j w_ij v_j / z_i,   z_i = sum_j w_ij,   w_ij = c_t (q_i.k_j),   t = j - (i + offset)

over the keys j that query i may see (same sequence, not padded, t <= 0 if causal). q and k are features, c the
exponential of the bias; beyond its reach an offset takes the factor at the table's end. Luo et al. 2021
(arXiv 2106.12566), eq. 8-10. Dense, O(L S) time and memory: for truth, not for speed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def toeplitz_weights(
    q: Tensor,                                 # [B, Hq, L, M], features
    k: Tensor,                                 # [B, H, S, M], features
    c: Tensor,                                 # [Hq, 2 reach + 1], factor of offset t at t + reach
    mask: Tensor | None,                       # [B, S], True = padded
    cu_seqlens: Tensor | None,                 # [N+1], sequence boundaries, then B = 1
    *,
    offset: int,
    is_causal: bool,
) -> Tensor:
    """-> w [B, Hq, L, S], 0 where a query may not see a key"""
    L, S, reach, groups = q.shape[2], k.shape[2], c.shape[1] // 2, q.shape[1] // k.shape[1]
    rows, columns = torch.arange(L, device=q.device)[:, None], torch.arange(S, device=q.device)
    t = columns - (rows + offset)                                                              # [L, S]
    visible = t <= 0 if is_causal else torch.ones_like(t, dtype=torch.bool)
    if cu_seqlens is not None:
        # how many sequences have begun is the number of a token's own
        visible = visible & ((rows[..., None] >= cu_seqlens).sum(-1) == (columns[:, None] >= cu_seqlens).sum(-1))
    if mask is not None:
        visible = visible & ~mask[:, None, None]                                               # [B, 1, L, S]
    factors = c[:, t.clamp(-reach, reach) + reach]                                             # [Hq, L, S]
    return torch.where(visible, q @ k.repeat_interleave(groups, 1).mT * factors, 0)


def toeplitz_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,                                 # [B, H, S, E]
    c: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    offset: int = 0,
    is_causal: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """-> output [B, Hq, L, E], z [B, Hq, L]"""
    w = toeplitz_weights(q, k, c, mask, cu_seqlens, offset=offset, is_causal=is_causal)        # [B, Hq, L, S]
    if mask is not None:
        v = v.masked_fill(mask[:, None, :, None], 0)
    numerator = w @ v.repeat_interleave(q.shape[1] // k.shape[1], 1)                           # [B, Hq, L, E]
    z = w.sum(-1, keepdim=True)                                                                # [B, Hq, L, 1]
    if normalize:
        # the inner where keeps the gradient of a query that sees no key finite
        numerator = torch.where(z == 0, 0, numerator / torch.where(z == 0, 1, z))
    return numerator, z[..., 0]
