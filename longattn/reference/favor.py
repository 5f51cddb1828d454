"""FAVOR+ attention, written as the formula: the oracle of every kernel.

    o_i = sum_j w_ij v_j / sum_j w_ij,    w_ij = phi(q_i).phi(k_j),  or exp(q_i.k_j / temperature) in the query's own chunk with
    `exact_diagonal`, over the keys j that query i may see (same sequence, not padded, j <= i if causal)

phi and its logarithms are those of `longattn.features`. Choromanski et al. 2021 (arXiv 2009.14794), eq. 4 and lemma 1; maxima
are subtracted in log space and cancel, so they carry no gradient. Dense, O(L S) time and memory: for truth, not for speed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..features import favor_features, favor_norm, favor_rows

# tokens, counted from the start of a sequence, that see each other exactly with exact_diagonal
CHUNK = 64


def favor_attention(
    q: Tensor,                                 # [B, Hq, L, D]
    k: Tensor,                                 # [B, H, S, D]
    v: Tensor,                                 # [B, H, S, E]
    mask: Tensor | None,                       # [B, S], True = padded
    cu_seqlens: Tensor | None,                 # [N+1], sequence boundaries, then B = 1
    kv: Tensor | None,                         # [B or N, H, M, E], incoming state in units of exp(log_scale)
    k_sum: Tensor | None,                      # [B or N, H, M]
    log_scale: Tensor | None,                  # [B or N, H]
    projection: Tensor,                        # [P, D]
    root: Tensor,                              # [], temperature^(-1/2)
    mean: Tensor | None,                       # [H, D], subtracted from the keys
    *,
    kind: str,
    l2: bool,
    is_causal: bool,
    exact_diagonal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> output [B, Hq, L, E], outgoing kv, k_sum and log_scale"""
    B, L, S, groups = q.shape[0], q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    start = torch.zeros(1, dtype=torch.int64, device=q.device) if cu_seqlens is None else cu_seqlens[:-1].long()
    rows, columns = torch.arange(L, device=q.device), torch.arange(S, device=q.device)
    row_in, key_in = (torch.searchsorted(start, x, right=True) - 1 for x in (rows, columns))   # sequence of a token
    visible = (row_in[:, None] == key_in) & (columns <= rows[:, None] if is_causal else True)  # [L, S]
    live = torch.ones(B, S, dtype=torch.bool, device=q.device) if mask is None else ~mask
    visible = (visible & live[:, None])[:, None]                                               # [B, 1, L, S]
    near = visible & ((rows - start[row_in])[:, None] // CHUNK == (columns - start[key_in]) // CHUNK)
    near = near & exact_diagonal

    q, k = favor_rows(q, root, l2), favor_rows(k, root, l2, mean)
    (phi_q, b), (phi_k, a) = favor_features(q, projection, kind), favor_features(k, projection, kind)
    b = b - math.log(favor_norm(projection, kind))                                             # [B, Hq, L]
    phi_k, v = (x.masked_fill(~live[:, None, :, None], 0) for x in (phi_k, v))
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1)                                   # [B, H, S, E+1]
    wide_k, wide_phi, wide_values = (x.repeat_interleave(groups, 1) for x in (k, phi_k, values))
    logs = b[..., None] + a.repeat_interleave(groups, 1)[:, :, None]                           # [B, Hq, L, S]
    logs = torch.where(near, q @ wide_k.mT, logs).masked_fill(~visible, -math.inf)
    top = logs.detach().amax(-1) if S else b.detach() * 0 - math.inf                           # [B, Hq, L]
    if kv is not None:
        state_in = torch.cat([kv, k_sum[..., None]], -1).repeat_interleave(groups, 1)          # [B or N, Hq, M, E+1]
        state_of = torch.arange(B, device=q.device)[:, None] if cu_seqlens is None else row_in[None]
        state_log = b + log_scale.repeat_interleave(groups, 1)[state_of].mT                    # [B, Hq, L]
        top = torch.maximum(top, state_log.detach())
    top = top.masked_fill(top == -math.inf, 0)[..., None]

    w = torch.where(near, 1, phi_q @ wide_phi.mT) * torch.exp(logs - top)
    total = w @ wide_values                                                                    # [B, Hq, L, E+1]
    if kv is not None:
        read = torch.einsum("bhlm,blhme->bhle", phi_q, state_in[state_of.expand(B, L)])
        total = total + torch.exp(state_log[..., None] - top) * read

    member = (key_in == torch.arange(len(start), device=q.device)[:, None]) & live[:, None]    # [B, N, S]
    a = a[:, None].masked_fill(~member[:, :, None], -math.inf)                                 # [B, N, H, S]
    scale = a.detach().amax(-1).flatten(0, 1) if S else a.new_full((B * len(start), a.shape[2]), -math.inf)
    scale = scale if kv is None else torch.maximum(scale, log_scale)                           # [B or N, H]
    finite = scale.masked_fill(scale == -math.inf, 0)
    share = torch.exp(a - finite.view(B, len(start), -1, 1))                                   # [B, N, H, S]
    state = torch.einsum("bnhs,bhsm,bhse->bnhme", share, phi_k, values).flatten(0, 1)
    if kv is not None:
        state = state + torch.exp(log_scale - finite)[..., None, None] * torch.cat([kv, k_sum[..., None]], -1)

    numerator, z = total[..., :-1], total[..., -1:]
    # the inner where keeps the gradient of a query that sees no key finite
    output = torch.where(z == 0, 0, numerator / torch.where(z == 0, 1, z))                     # [B, Hq, L, E]
    return output, state[..., :-1], state[..., -1], scale
