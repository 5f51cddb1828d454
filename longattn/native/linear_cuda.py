"""Launchers of csrc/cuda/state_scan.cu and csrc/cuda/linear_step.cu, on the current stream of the tensors' device."""

from __future__ import annotations

import torch
from torch import Tensor

from . import extension, view
from .linear import FEATURES

# features of a token that fit into shared memory, as in linear_step.cu
MAX_DIM = 1792


def _views(tensors: dict[str, Tensor | None]) -> dict:
    return {name: view(x) for name, x in tensors.items() if x is not None}


def scan(kv, k_sum, kv_in, k_sum_in, kv_out, k_sum_out, cu_seqlens, segment: int, reverse: bool) -> None:
    """Turns segment totals into the states before them (after them if reversed), in place; the sum goes to *_out."""
    names = "kv", "k_sum", "initial_kv", "initial_k_sum", "final_kv", "final_k_sum", "cu_seqlens"
    tensors = dict(zip(names, (kv, k_sum, kv_in, k_sum_in, kv_out, k_sum_out, cu_seqlens), strict=True))
    with torch.cuda.device(kv.device):
        extension().state_scan(_views(tensors), segment, reverse, torch.cuda.current_stream(kv.device).cuda_stream)


def forward(
    q, k, v, mask, cu_seqlens, kv, k_sum, *, feature, is_causal, normalize, scale, segment, save_segments
):  # fmt: skip
    """One token with a state, no gradient -> out, normalizer, two empty tensors, kv, k_sum"""
    kv, k_sum = kv.contiguous(), k_sum.contiguous()
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    nothing = kv.new_empty(0)
    normalizer = kv.new_empty(q.shape[:3]) if normalize else nothing
    new_kv, new_k_sum = torch.empty_like(kv), torch.empty_like(k_sum)
    tensors = {
        "q": q, "k": k, "v": v, "mask": mask, "kv": kv, "k_sum": k_sum,
        "out": out, "normalizer": normalizer, "new_kv": new_kv, "new_k_sum": new_k_sum,
    }  # fmt: skip
    with torch.cuda.device(q.device):
        stream = torch.cuda.current_stream(q.device).cuda_stream
        extension().linear_step(_views(tensors), FEATURES[feature], normalize, scale, stream)
    return out, normalizer, nothing, nothing.clone(), new_kv, new_k_sum
