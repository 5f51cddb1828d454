"""Linear attention, written as the formula: the oracle of every kernel.

    o_i = sum_j w_ij (phi(q_i).phi(k_j)) v_j / sum_j w_ij (phi(q_i).phi(k_j))

w_ij is 1 where query i may see key j (same sequence, key not padded, j <= i if causal), else 0.
Katharopoulos et al. 2020 (arXiv 2006.16236), eq. 4-5 and 8-9. Dense, O(L S) time and memory: for truth, not for speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..features import FUSED


def linear_attention(
    q: Tensor,                                 # [B, Hq, L, D]
    k: Tensor,                                 # [B, H, S, D]
    v: Tensor,                                 # [B, H, S, E]
    mask: Tensor | None,                       # [B, S], True = padded
    cu_seqlens: Tensor | None,                 # [N+1], sequence boundaries, then B = 1
    kv: Tensor | None,                         # [B or N, H, M, E], incoming state
    k_sum: Tensor | None,                      # [B or N, H, M]
    *,
    feature: str,
    is_causal: bool,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> output [B, Hq, L, E], outgoing kv [B or N, H, M, E], outgoing k_sum [B or N, H, M]"""
    B, L, S, groups = q.shape[0], q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    rows, columns = torch.arange(L, device=q.device), torch.arange(S, device=q.device)
    if cu_seqlens is None:
        member = torch.ones(B, 1, S, dtype=q.dtype, device=q.device)                           # [B, 1, S]
        query_member = torch.ones(B, 1, L, dtype=q.dtype, device=q.device)                     # [B, 1, L]
    else:
        start, stop = cu_seqlens[:-1, None], cu_seqlens[1:, None]
        member = ((columns >= start) & (columns < stop)).to(q.dtype)[None]                     # [1, N, S]
        query_member = member                                                                  # [1, N, L]
    w = torch.einsum("bnl,bns->bls", query_member, member)                                     # [B, L, S]
    if is_causal:
        w = w * (columns <= rows[:, None])

    phi_q = FUSED[feature](q)                                                                  # [B, Hq, L, M]
    phi_k = FUSED[feature](k)                                                                  # [B, H, S, M]
    if mask is not None:
        phi_k = phi_k.masked_fill(mask[:, None, :, None], 0)
        v = v.masked_fill(mask[:, None, :, None], 0)
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1)                                   # [B, H, S, E+1]
    state = torch.einsum("bns,bhsm,bhse->bnhme", member, phi_k, values).flatten(0, 1)          # [B or N, H, M, E+1]
    wide_k, wide_values = (t.repeat_interleave(groups, 1) for t in (phi_k, values))
    total = (phi_q @ wide_k.mT * w[:, None]) @ wide_values                                     # [B, Hq, L, E+1]
    if kv is not None:
        incoming = torch.cat([kv, k_sum[..., None]], -1)                                       # [B or N, H, M, E+1]
        state = state + incoming
        incoming = incoming.repeat_interleave(groups, 1).unflatten(0, member.shape[:2])        # [B, 1 or N, Hq, M, E+1]
        total = total + torch.einsum("bnl,bhlm,bnhme->bhle", query_member, phi_q, incoming)

    numerator, z = total[..., :-1], total[..., -1:]
    if normalize:
        # the inner where keeps the gradient of a query that sees no key finite
        output = torch.where(z == 0, 0, numerator / torch.where(z == 0, 1, z))                 # [B, Hq, L, E]
    else:
        output = scale * numerator
    return output, state[..., :-1], state[..., -1]
