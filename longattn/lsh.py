"""LSH attention beside the attention itself: its hash alone, and how much of the exact attention it finds."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import _dispatch, _lsh
from .ops._prefix import accumulator
from .ops.lsh import Call, hash_of, orders, prepare
from .reference import lsh as reference

# pairs that `lsh_recall` looks at in one go
BLOCK = 1 << 22
RECALL_OPTIONS = {
    "n_hashes", "chunk_size", "n_buckets", "look_back", "look_ahead", "within", "dedupe", "is_causal",
    "key_padding_mask", "scale", "dropout_p", "seed", "rotations", "buckets", "cu_seqlens", "enable_gqa", "attn_mask",
    "impl",
}  # fmt: skip


def lsh_buckets(
    x: Tensor,
    *,
    n_hashes: int = 4,
    n_buckets: int | None = None,
    chunk_size: int = 64,
    seed: int = 0,
    rotations: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The hash of shared queries and keys alone: buckets int32 `[B, H, n_hashes, N]` of x `[B, H, N, D]`, of any dtype
    that attention takes. Kitaev et al. 2020 (arXiv 2001.04451), section 2.

    For each even factor b of n_buckets, the index of the first maximum of `[x R, -x R]` with R of `[D, b / 2]`, in
    float32; the bucket is h_1 + b_1 h_2 + b_1 b_2 h_3. Arguments and defaults are those of `longattn.lsh_attention`,
    which takes the result as `buckets=`. A power of two as a factor of x changes nothing. NaN gives a bucket in range.
    Raises ValueError or TypeError in a sentence.
    """
    options = {"n_hashes": n_hashes, "n_buckets": n_buckets, "chunk_size": chunk_size, "seed": seed}
    return hash_of(prepare("lsh_buckets", x, None, x, rotations=rotations, impl=impl, **options))[0]


def _met(call: Call, ranks: tuple[Tensor, ...], rows: slice, r: int) -> Tensor:
    """Which keys round r lets these queries see, [B, Hq, rows, S]"""
    rank_q, rank_k, bucket_q, bucket_k = (x if x is None else x[:, :, r] for x in ranks)
    ahead = rank_k[:, :, None] - rank_q[:, :, rows, None]
    met = (ahead >= -call.rounds.look_back) & (ahead <= call.rounds.look_ahead)
    return met if bucket_q is None else met & (bucket_k[:, :, None] == bucket_q[:, :, rows, None])


@torch.no_grad()
def lsh_recall(q: Tensor, k: Tensor | None = None, **options) -> Tensor:
    """The share of the exact attention's mass that LSH attention keeps with 1, 2 .. n_hashes rounds, for each head.

    Returns `[B, Hq, n_hashes]`, float32 (float64 for float64): the mean over the queries that see a key of
    sum_{j in S_i} p_ij, where p is the softmax over all keys that padding, causality and packing allow (with k=None a
    query sees itself only where it sees no other). It answers whether hashing works on this data.

    q: `[B, Hq, L, D]`; k: `[B, H, S, D]`, or None for shared QK. options: those of `longattn.lsh_attention` (dropout
        changes nothing here).
    O(n_hashes L S) time, in torch; memory O(S) for a block of rows, beside ranks `[B, Hq, n_hashes, L]`. Raises
    ValueError or TypeError in a sentence.
    """
    unknown = ", ".join(options.keys() - RECALL_OPTIONS)
    if unknown:
        known = ", ".join(sorted(RECALL_OPTIONS))
        raise TypeError(f"lsh_recall: got {unknown}, which is none of {known}")
    call = prepare("lsh_recall", q, k, q if k is None else k, **options)
    q, k, mask, cu_seqlens, acc = call.q, call.k, call.mask, call.cu_seqlens, accumulator(call.q.dtype)
    shared, (B, Hq, L, _), S = k is None, q.shape, call.v.shape[2]
    k = reference.unit_keys(q.to(acc), call.norm_eps) if shared else k.to(acc)
    if mask is not None:
        k = k.masked_fill(mask[:, None, :, None], 0)
    rank_q, rank_k, bucket_q, bucket_k = orders(call)[2:]
    groups = Hq // max(k.shape[1], 1)
    k, rank_k, bucket_k = (x if x is None else x.repeat_interleave(groups, 1) for x in (k, rank_k, bucket_k))
    ranks = (rank_q, rank_k, bucket_q, bucket_k)
    column, sequence = torch.arange(S, device=q.device), _lsh.starts(cu_seqlens, L, q.device)[1]
    kept = torch.zeros(call.rounds.n_hashes, B, Hq, dtype=acc, device=q.device)
    seen = torch.zeros(B, Hq, dtype=acc, device=q.device)
    step = max(BLOCK // max(B * Hq * S, 1), 1)
    for start in range(0, L if S else 0, step):
        rows = slice(start, min(start + step, L))
        row = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
        allowed = torch.ones(1, 1, len(row), S, dtype=torch.bool, device=q.device)
        if call.rounds.is_causal:
            allowed = allowed & (column <= row)
        if cu_seqlens is not None:
            allowed = allowed & (sequence[rows, None] == sequence)
        if mask is not None:
            allowed = allowed & ~mask[:, None, None]
            allowed = allowed & ~mask[:, None, rows, None] if shared else allowed
        others = allowed & (row != column)
        alone = ~others.any(-1, keepdim=True)
        with _dispatch.without_autocast(q.device.type):
            s = call.scale * (q[:, :, rows].to(acc) @ k.mT)                                    # [B, Hq, rows, S]
            true = allowed & (others | alone) if shared else allowed
            p = torch.softmax(s.masked_fill(~true, torch.finfo(acc).min), -1).masked_fill(~true, 0)
        seen += true.any(-1).sum(-1)
        always = true & (row == column) if shared or call.rounds.is_causal else torch.zeros_like(true)
        for r in range(call.rounds.n_hashes):
            always = always | _met(call, ranks, rows, r)
            kept[r] += (p * always).sum((-1, -2))
    return (kept / seen.clamp(min=1)).permute(1, 2, 0)
