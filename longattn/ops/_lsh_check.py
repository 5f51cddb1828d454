"""The sentences of LSH attention's public door."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check

WITHIN = ("window", "bucket")
MOST_BUCKETS = 1 << 24


def _whole(op: str, name: str, x, least: int, unit: str = "") -> None:
    if not isinstance(x, int) or isinstance(x, bool) or not least <= x < 2**31:
        bounds = f"at least {least}{unit} and below 2^31"
        _check.fail(op, f"{name} must be a whole number of {bounds}, got {_check.describe(x)}")


def options(op, n_hashes, chunk_size, n_buckets, look_back, look_ahead, within, scale, dropout_p, seed) -> None:
    _whole(op, "n_hashes", n_hashes, 1)
    _whole(op, "chunk_size", chunk_size, 1, " token")
    _whole(op, "look_back", look_back, 0, " chunks")
    if look_ahead is not None:
        _whole(op, "look_ahead", look_ahead, 0, " chunks")
    if n_buckets is not None and (not isinstance(n_buckets, int) or n_buckets < 2 or n_buckets % 2):
        why = "the hash compares projections and their negatives"
        _check.fail(op, f"n_buckets must be even and positive ({why}), got {_check.describe(n_buckets)}")
    if n_buckets is not None and n_buckets > MOST_BUCKETS:
        why = "a bucket for every token is more than sorting needs"
        _check.fail(op, f"n_buckets must be at most 2^24 ({why}), got {n_buckets}")
    if within not in WITHIN:
        _check.fail(op, f"within must be one of {', '.join(map(repr, WITHIN))}, got {within!r}")
    if not _check.is_finite_or_none(scale):
        _check.fail(op, f"scale must be a finite number or None, got {_check.describe(scale)}")
    if not (isinstance(dropout_p, (int, float)) and 0 <= dropout_p <= 1):
        _check.fail(op, f"dropout_p must be a probability from 0 to 1, got {_check.describe(dropout_p)}")
    if not isinstance(seed, int) or isinstance(seed, bool):
        _check.fail(op, f"seed must be an integer, got {_check.describe(seed)}", TypeError)


def inputs(op: str, q, k, v, mask, cu_seqlens, enable_gqa: bool, is_causal: bool) -> None:
    if k is not None:
        _check.attention_inputs(op, q, k, v, enable_gqa)
    else:
        both = isinstance(q, Tensor) and isinstance(v, Tensor) and q.dim() == v.dim() == 4
        if both and (q.shape[1:3] != v.shape[1:3]):
            came = f"got {list(q.shape)} and {list(v.shape)}"
            remedy = "queries that look elsewhere need keys of their own"
            _check.fail(op, f"k=None (shared QK) needs query and value to share heads and length, {came}; {remedy}")
        _check.attention_inputs(op, q, q, v, False)
    _check.padding_mask(op, mask, v)
    _check.packed_sequences(op, cu_seqlens, q, v)
    if is_causal and q.shape[2] != v.shape[2]:
        _check.fail(op, f"is_causal needs as many queries as keys, got {q.shape[2]} and {v.shape[2]}")


def rotations_given(op: str, rotations, heads: int, n_hashes: int, dim: int, columns: int, x: Tensor) -> None:
    shape, typed = (heads, n_hashes, dim, columns), isinstance(rotations, Tensor) and rotations.dtype == torch.float32
    if not typed or rotations.shape != shape or rotations.device != x.device:
        meaning = "[key heads, n_hashes, head_dim (with separate keys one more), half the sum of the bucket factors]"
        expected = f"float32 {list(shape)} on {x.device} ({meaning})"
        error = ValueError if typed else TypeError
        _check.fail(op, f"rotations must be {expected}, got {_check.describe(rotations)}", error)


def _readable(x: Tensor) -> bool:
    """Whether looking at a value waits for nothing."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and type(x) is Tensor


def _buckets(op: str, name: str, x, shape: tuple[int, ...], n_buckets: int, like: Tensor) -> Tensor:
    typed = isinstance(x, Tensor) and x.dtype in (torch.int32, torch.int64)
    if not typed or x.shape != shape or x.device != like.device:
        expected = f"int32 [batch, heads, n_hashes, length] = {list(shape)} on {like.device}"
        _check.fail(op, f"{name} must be {expected}, got {_check.describe(x)}", ValueError if typed else TypeError)
    inside = ((x >= 0) & (x < n_buckets)).all()
    sentence = f"{name} must be from 0 to n_buckets - 1 = {n_buckets - 1}"
    if not _readable(x):
        torch._assert_async(inside, f"{op}: {sentence}")
    elif not inside:
        _check.fail(op, f"{sentence}, got {x.min()} to {x.max()}; pass the n_buckets they were made with")
    return x.int()


def buckets_given(op: str, buckets, q, k, rounds) -> tuple[Tensor, Tensor | None]:
    shape_q = (*q.shape[:2], rounds.n_hashes, q.shape[2])
    if k is None:
        return _buckets(op, "buckets", buckets, shape_q, rounds.n_buckets, q), None
    if not isinstance(buckets, (tuple, list)) or len(buckets) != 2:
        came = _check.describe(buckets)
        _check.fail(op, f"buckets must be a pair, of queries and of keys, where keys are given, got {came}", TypeError)
    shape_k = (*k.shape[:2], rounds.n_hashes, k.shape[2])
    pair = zip(("buckets[0]", "buckets[1]"), buckets, (shape_q, shape_k), strict=True)
    return tuple(_buckets(op, name, x, shape, rounds.n_buckets, q) for name, x, shape in pair)
