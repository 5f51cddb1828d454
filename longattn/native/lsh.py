"""Launchers of csrc/cpu/lsh.cpp: hashing and sorting of LSH attention."""

from __future__ import annotations

import torch
from torch import Tensor

from . import extension, view, workspace


def hash(x: Tensor, extra: Tensor | None, rotations: Tensor, factors: tuple[int, ...]) -> Tensor:
    """-> buckets int32 [B, Hx, R, N]"""
    threads = torch.get_num_threads()
    buckets = torch.empty(*x.shape[:2], rotations.shape[1], x.shape[2], dtype=torch.int32)
    rotations = rotations.contiguous()
    tensors = {"x": x, "extra": extra, "rotations": rotations, "buckets": buckets}
    tensors["workspace"] = workspace(extension().lsh_workspace(x.shape[3], 1, threads))
    extension().lsh_hash({name: view(x) for name, x in tensors.items() if x is not None}, list(factors), threads)
    return buckets


def sort(keys: Tensor, n_keys: int, cu_seqlens: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    """-> order, rank, both int32 [B, H, R, N]"""
    threads, keys = torch.get_num_threads(), keys.contiguous()
    order, rank = torch.empty_like(keys), torch.empty_like(keys)
    tensors = {"keys": keys, "cu_seqlens": cu_seqlens, "order": order, "rank": rank}
    tensors["workspace"] = workspace(extension().lsh_workspace(1, n_keys, threads))
    extension().lsh_sort({name: view(x) for name, x in tensors.items() if x is not None}, n_keys, chunk, threads)
    return order, rank
