"""Launcher of csrc/cuda/lsh.cu, on the current stream of the tensors' device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import extension, view


def sort(keys: Tensor, n_keys: int, cu_seqlens: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    """keys `[B, H, R, N]` int32 -> positions by key within each sequence, ties by position; the chunk of each."""
    keys = keys.contiguous()
    order, rank = torch.empty_like(keys), torch.empty_like(keys)
    sequences = 1 if cu_seqlens is None else cu_seqlens.numel() - 1
    size = extension().lsh_sort_cuda_workspace(math.prod(keys.shape[:3]), keys.shape[3], n_keys, sequences)
    workspace = torch.empty(size, dtype=torch.uint8, device=keys.device)
    tensors = {"keys": keys, "order": order, "rank": rank, "workspace": workspace}
    if cu_seqlens is not None:
        tensors["cu_seqlens"] = cu_seqlens.contiguous()
    with torch.cuda.device(keys.device):
        stream = torch.cuda.current_stream(keys.device).cuda_stream
        extension().lsh_sort_cuda({name: view(x) for name, x in tensors.items()}, n_keys, chunk, stream)
    return order, rank
