"""FAVOR+ attention, written as the formula: the oracle of every kernel.

    o_i = sum_j w_ij v_j / sum_j w_ij,    w_ij = phi(q_i).phi(k_j), or exp(q_i.k_j / temperature) in the own chunk
    with `exact_diagonal`, over the keys j that query i may see (same sequence, not padded, j <= i if causal)

phi and its logarithms are those of `longattn.features`. Choromanski et al. 2021 (arXiv 2009.14794), eq. 4 and lemma 1;
maxima are subtracted in log space and cancel, so they carry no gradient. Dense, O(L S) time and memory: for truth.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..features import favor_features, favor_norm, favor_rows

# tokens, counted from the start of a sequence, that see each other exactly with exact_diagonal
CHUNK = 64


def favor_weights(
    q: Tensor,                                 # [B, Hq, L, D], rows as exp(q.k) sees them
    k: Tensor,                                 # [B, H, S, D]
    visible: Tensor,                           # [B, 1, L, S]
    near: Tensor,                              # [B, 1, L, S], visible pairs that are exact
    projection: Tensor,                        # [P, D]
    kind: str,
    least: Tensor | float = -math.inf,         # [B, Hq, L], see top
) -> tuple[Tensor, Tensor]:
    """-> w exp(-top) `[B, Hq, L, S]` and top `[B, Hq, L, 1]`, the largest logarithm of a row or `least`; no gradient"""
    groups = q.shape[1] // k.shape[1]
    (phi_q, b), (phi_k, a) = (favor_features(x, projection, kind) for x in (q, k))
    k, phi_k, a = (x.repeat_interleave(groups, 1) for x in (k, phi_k, a))
    logs = (b - math.log(favor_norm(projection, kind)))[..., None] + a[:, :, None]             # [B, Hq, L, S]
    logs = torch.where(near, q @ k.mT, logs).masked_fill(~visible, -math.inf)
    top = logs.detach().amax(-1) if k.shape[2] else b.detach() * 0 - math.inf
    top = torch.maximum(top, torch.as_tensor(least, dtype=top.dtype, device=top.device))
    top = top.masked_fill(top == -math.inf, 0)[..., None]
    return torch.where(near, 1, phi_q @ phi_k.mT) * torch.exp(logs - top), top


def pairs(
    L: int, S: int, mask: Tensor | None, cu_seqlens: Tensor | None, is_causal: bool, exact_diagonal: bool, like: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> visible and near `[B, 1, L, S]`, the sequence of a row `[L]`, live keys by sequence `[B, N, S]`"""
    B, device = like.shape[0], like.device
    start = torch.zeros(1, dtype=torch.int64, device=device) if cu_seqlens is None else cu_seqlens[:-1].long()
    rows, columns = torch.arange(L, device=device), torch.arange(S, device=device)
    row_in, key_in = (torch.searchsorted(start, x, right=True) - 1 for x in (rows, columns))
    live = torch.ones(B, S, dtype=torch.bool, device=device) if mask is None else ~mask
    visible = (row_in[:, None] == key_in) & (columns <= rows[:, None] if is_causal else True)  # [L, S]
    visible = (visible & live[:, None])[:, None]
    near = (rows - start[row_in])[:, None] // CHUNK == (columns - start[key_in]) // CHUNK
    member = (key_in == torch.arange(len(start), device=device)[:, None]) & live[:, None]
    return visible, visible & near & exact_diagonal, row_in, member


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
    B, groups = q.shape[0], q.shape[1] // k.shape[1]
    visible, near, row_in, member = pairs(q.shape[2], k.shape[2], mask, cu_seqlens, is_causal, exact_diagonal, k)
    q, k = favor_rows(q, root, l2), favor_rows(k, root, l2, mean)
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1)                                   # [B, H, S, E+1]
    values = values.masked_fill(~member.any(1)[:, None, :, None], 0)
    least, state_of = -math.inf, torch.arange(B, device=q.device)[:, None] if cu_seqlens is None else row_in[None]
    phi_q, b = favor_features(q, projection, kind)
    if kv is not None:
        incoming = torch.cat([kv, k_sum[..., None]], -1)                                       # [B or N, H, M, E+1]
        b = b - math.log(favor_norm(projection, kind))
        least = b + log_scale.repeat_interleave(groups, 1)[state_of].mT                        # [B, Hq, L]
    w, top = favor_weights(q, k, visible, near, projection, kind, least if kv is None else least.detach())
    total = w @ values.repeat_interleave(groups, 1)                                            # [B, Hq, L, E+1]
    if kv is not None:
        wide = incoming.repeat_interleave(groups, 1)[state_of.expand(B, q.shape[2])]
        total = total + torch.exp(least[..., None] - top) * torch.einsum("bhlm,blhme->bhle", phi_q, wide)

    phi_k, a = favor_features(k, projection, kind)
    a = a[:, None].masked_fill(~member[:, :, None], -math.inf)                                 # [B, N, H, S]
    nothing = a.new_full((B * member.shape[1], k.shape[1]), -math.inf)
    scale = a.detach().amax(-1).flatten(0, 1) if k.shape[2] else nothing
    scale = scale if kv is None else torch.maximum(scale, log_scale)                           # [B or N, H]
    finite = scale.masked_fill(scale == -math.inf, 0)
    share = torch.exp(a - finite.view(*a.shape[:3], 1))                                        # [B, N, H, S]
    state = torch.einsum("bnhs,bhsm,bhse->bnhme", share, phi_k, values).flatten(0, 1)
    if kv is not None:
        state = state + torch.exp(log_scale - finite)[..., None, None] * incoming

    numerator, z = total[..., :-1], total[..., -1:]
    # the inner where keeps the gradient of a query that sees no key finite
    output = torch.where(z == 0, 0, numerator / torch.where(z == 0, 1, z))                     # [B, Hq, L, E]
    return output, state[..., :-1], state[..., -1], scale
