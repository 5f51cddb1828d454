"""LSH attention, written as the formula: the oracle of every kernel.

    o_i = sum_j n_ij drop_ij exp(s_ij) v_j / sum_j n_ij exp(s_ij),    s_ij = scale q_i.k_j

n_ij counts the rounds in which query i meets key j (with `dedupe` at most 1). A round sorts positions by bucket, cuts
the order into chunks, and lets a query see the key chunks t - look_back .. t + look_ahead around its own. Shared: the
keys are the queries over their length. Kitaev et al. 2020 (arXiv 2001.04451), eq. 2-6. Dense, O(R L S): for truth.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

U32 = 0xFFFFFFFF


def hash_buckets(x: Tensor, extra: Tensor | None, rotations: Tensor, factors: list[int]) -> Tensor:
    """x [B, Hx, N, D], extra [B, Hx, N] (a last coordinate), rotations [H, R, D or D+1, C] -> int32 [B, Hx, R, N]"""
    if rotations.shape[2] > x.shape[3]:
        extra = torch.zeros_like(x[..., 0]) if extra is None else extra
        x = torch.cat([x.float(), extra[..., None].float()], -1)
    wide = rotations.repeat_interleave(x.shape[1] // rotations.shape[0], 0).double()           # [Hx, R, D', C]
    y = x.new_zeros(*x.shape[:2], wide.shape[1], x.shape[2], wide.shape[3], dtype=torch.float64)
    for d in range(x.shape[3]):
        # rounded once to float32 for each d: a fused multiply-add
        y = (y + x[:, :, None, :, d, None].double() * wide[:, :, None, d]).float().double()    # [B, Hx, R, N, C]
    bucket, stride = 0, 1
    for b, part in zip(factors, y.split([b // 2 for b in factors], -1), strict=True):
        # the first maximum wins, and NaN never does
        both = torch.cat([part, -part], -1).nan_to_num(-math.inf, math.inf, -math.inf)
        bucket, stride = bucket + stride * both.argmax(-1), stride * b
    return bucket.int()


def ranks(
    buckets_q: Tensor, buckets_k: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None, n_buckets: int, c: int
) -> tuple[Tensor, Tensor]:
    """Of each key its chunk, of each query the key chunk it is centred on, by position. -> [B, Hq, R, L], [.., S]"""
    L, S = buckets_q.shape[-1], (buckets_q if buckets_k is None else buckets_k).shape[-1]
    span, device = 2 * n_buckets, buckets_q.device
    start = torch.zeros(1, dtype=torch.int64, device=device) if cu_seqlens is None else cu_seqlens[:-1].long()

    def sort(buckets: Tensor, padded: Tensor | bool) -> tuple[Tensor, ...]:
        """Sequence by sequence, by bucket, the padded last, ties by position."""
        sequence = torch.searchsorted(start, torch.arange(buckets.shape[-1], device=device), right=True) - 1
        key = sequence * span + padded * n_buckets + buckets.long()
        order = key.argsort(dim=-1, stable=True)
        return sequence, key, order, order.argsort(-1) - start[sequence], key.gather(-1, order)

    padded = False if mask is None else mask[:, None, None]
    sequence, _, _, place_k, sorted_k = sort(buckets_q if buckets_k is None else buckets_k, padded)
    if buckets_k is None:
        return place_k // c, place_k // c
    sequence, key, order, place, sorted_q = sort(buckets_q, padded if L == S else False)
    first = order.gather(-1, place // c * c + start[sequence])                                 # opens the query chunk
    own = key.gather(-1, first)
    base = (sequence * span).expand_as(own).contiguous()
    wanted = base + (own - base) % n_buckets


    def between(keys: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return torch.searchsorted(keys, high) - torch.searchsorted(keys, low)

    # as far into the keys of the bucket as the query is into its queries
    past = place // c * c - between(sorted_q, base, own)
    share = past * between(sorted_k, wanted, wanted + 1) // between(sorted_q, own, own + 1)
    aligned = between(sorted_k, base, wanted) + share
    # counted in valid keys, so that padding does not move it
    last = (between(sorted_k, base, base + n_buckets) - 1).div(c, rounding_mode="floor").clamp(min=0)
    return torch.minimum((aligned + c // 2) // c, last), place_k // c


def pair_counts(
    buckets_q: Tensor,                         # [B, Hq, R, L]
    buckets_k: Tensor | None,                  # [B, H, R, S], None = shared
    mask: Tensor | None,                       # [B, S], True = padded
    cu_seqlens: Tensor | None,                 # [P+1], sequence boundaries, then B = 1
    *,
    n_buckets: int,
    chunk: int,
    look_back: int,
    look_ahead: int,
    same_bucket: bool,
    dedupe: bool,
    is_causal: bool,
    wrap: bool,
) -> Tensor:
    """-> n_ij, int64 [B, Hq, L, S]"""
    shared, L, device = buckets_k is None, buckets_q.shape[-1], buckets_q.device
    if not shared:
        buckets_k = buckets_k.repeat_interleave(buckets_q.shape[1] // buckets_k.shape[1], 1)
    rank_q, rank_k = ranks(buckets_q, buckets_k, mask, cu_seqlens, n_buckets, chunk)
    buckets_k = buckets_q if shared else buckets_k
    R, S = buckets_k.shape[2:]
    rows, columns = torch.arange(L, device=device)[:, None], torch.arange(S, device=device)
    visible = torch.ones(1, 1, L, S, dtype=torch.bool, device=device)                          # [B, 1, L, S]
    if is_causal:
        visible = visible & (columns <= rows)
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), columns, right=True)
        visible = visible & (sequence[:, None] == sequence)
    if mask is not None:
        visible = visible & ~mask[:, None, None] & (~mask[:, None, :, None] if shared else True)

    count, cycle = 0, R * -(-S // chunk)
    for r in range(R):
        for r_k in range(R) if wrap else (r,):
            ahead = rank_k[:, :, r_k, None] - rank_q[:, :, r, :, None]                         # [B, Hq, L, S]
            if wrap:
                ahead = ahead + (r_k - r) * (cycle // R)
                met = (look_ahead - ahead) // cycle - (-look_back - 1 - ahead) // cycle
            else:
                met = (ahead >= -look_back) & (ahead <= look_ahead)
            if same_bucket:
                met = met & (buckets_k[:, :, r_k, None] == buckets_q[:, :, r, :, None])
            count = count + met.long()
    count = (count.clamp(max=1) if dedupe else count) * visible
    itself = visible & (rows == columns)
    if shared:
        others = count.masked_fill(itself, 0)
        return others + (itself & (others.sum(-1, keepdim=True) == 0))
    return torch.where(itself, 1, count) if is_causal and L == S else count


def kept(B: int, Hq: int, L: int, S: int, p: float, seed: int, device) -> Tensor:
    """Which pairs [B, Hq, L, S] dropout keeps: a 32-bit hash of seed, batch, head and both positions, not below p."""

    def mix(x: Tensor) -> Tensor:
        x = (x ^ (x >> 16)) * 0x7FEB352D & U32
        x = (x ^ (x >> 15)) * 0x846CA68B & U32
        return x ^ (x >> 16)

    b, h, i, j = (torch.arange(n, device=device) for n in (B, Hq, L, S))
    head = mix((seed & U32) + 0x9E3779B9 * (b[:, None] * Hq + h + 1) & U32) ^ (seed >> 32 & U32)
    row = mix(mix(head)[..., None] ^ (i * 0x85EBCA6B & U32))                                   # [B, Hq, L]
    return mix(row[..., None] + j * 0xC2B2AE35 & U32) >= math.floor(p * 2**32)


def unit_keys(x: Tensor, norm_eps: float = 0.0) -> Tensor:
    """x / |x|, a zero vector stays zero; with norm_eps x / sqrt(|x|^2 + norm_eps)"""
    if norm_eps:
        return x * (x.square().sum(-1, keepdim=True) + norm_eps).rsqrt()
    peak = x.detach().abs().amax(-1, keepdim=True)
    x = x / torch.where(peak == 0, math.inf, peak)
    return x / torch.where(peak == 0, 1, x.square().sum(-1, keepdim=True)).sqrt()


def attend(
    q: Tensor,                                 # [B, Hq, L, D]
    k: Tensor | None,                          # [B, H, S, D], None = shared
    v: Tensor,                                 # [B, H, S, E]
    mask: Tensor | None,                       # [B, S], True = padded
    count: Tensor,                             # [B, Hq, L, S], n_ij
    *,
    scale: float,
    dropout_p: float,
    seed: int,
    norm_eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """-> output [B, Hq, L, E] and log-sum-exp [B, Hq, L]; 0 and -inf where a query sees no key"""
    if mask is not None:
        away = mask[:, None, :, None]
        q = q.masked_fill(away, 0) if k is None else q
        k, v = (None if x is None else x.masked_fill(away, 0) for x in (k, v))
    k = unit_keys(q, norm_eps) if k is None else k
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = torch.where(count > 0, scale * (q @ k.mT), -math.inf)                                  # [B, Hq, L, S]
    top = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -math.inf)
    w = count.to(s.dtype) * torch.exp(s - top.masked_fill(top == -math.inf, 0))
    z = w.sum(-1, keepdim=True)
    p = w / torch.where(z == 0, 1, z)
    if dropout_p:
        p = torch.where(kept(*p.shape, dropout_p, seed, p.device), p / (1 - dropout_p), 0)
    return p @ v, (top + torch.log(z)).squeeze(-1)
