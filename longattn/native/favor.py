"""Launchers of csrc/cpu/favor.cpp: they allocate the outputs and pass views. Signatures are those of every engine."""

from __future__ import annotations

import torch
from torch import Tensor

from ..features import favor_count
from . import contiguous, empty, extension
from .linear import Problem, slots_of

KINDS = {"positive": 0, "hyperbolic": 1, "relu": 2, "trig": 3}
_STATE = ("kv", "k_sum", "log_scale")


class _Favor(Problem):
    def __init__(
        self, q, k, v, mask, cu_seqlens, kv, k_sum, log_scale, projection, root, mean, *, kind, l2, exact_diagonal,
        **options,
    ):  # fmt: skip
        self.features = favor_count(projection, kind)
        self.projections = projection.shape[0]
        super().__init__(q, k, v, mask, cu_seqlens, kv, k_sum, feature="identity", normalize=True, scale=1.0, **options)
        self.tensors |= {"log_scale": contiguous(log_scale), "projection": projection, "mean": mean}
        self.options |= {"kind": KINDS[kind], "root": float(root), "l2": l2, "exact_diagonal": exact_diagonal}

    def state(self, slots: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        kv, k_sum = super().state(slots)
        return kv, k_sum, kv.new_zeros(kv.shape[:-2]) if slots and self.packed else kv.new_empty(kv.shape[:-2])


def _named(prefix: str, tensors) -> dict[str, Tensor | None]:
    return dict(zip((prefix + name for name in _STATE), tensors, strict=True))


def forward(
    q, k, v, mask, cu_seqlens, kv, k_sum, log_scale, projection, root, mean, *, save_segments: bool, **options
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> out, normalizer, row_scale, segment_kv, segment_k_sum, segment_log_scale, kv, k_sum, log_scale"""
    problem = _Favor(q, k, v, mask, cu_seqlens, kv, k_sum, log_scale, projection, root, mean, **options)
    out = empty((*q.shape[:3], v.shape[3]), q.dtype)
    normalizer, row_scale = (torch.empty(q.shape[:3], dtype=problem.acc) for _ in range(2))
    is_causal, nothing = options["is_causal"], (None, None, None)
    segments = problem.state(problem.slots) if save_segments or (problem.split and is_causal) else nothing
    partial = nothing
    if problem.split and not is_causal:
        partial = problem.state(slots_of(problem.keys, problem.packed, problem.segment))
    final = problem.state()
    results = {"out": out, "normalizer": normalizer, "row_scale": row_scale}
    states = _named("segment_", segments) | _named("partial_", partial) | _named("", final)
    problem.run(extension().linear_forward, results | states)
    saved = segments if save_segments else (normalizer.new_empty(0) for _ in range(3))
    return out, normalizer, row_scale, *saved, *final


def backward(
    grad_out, grad_kv, grad_k_sum, q, k, v, mask, cu_seqlens, kv, k_sum, log_scale, projection, root, mean, out,
    normalizer, row_scale, segment_kv, segment_k_sum, segment_log_scale, final_log_scale, *, root_grad: bool, **options,
):  # fmt: skip
    """-> dq, dk, dv, droot (0 without root_grad), dkv, dk_sum (the last two empty where no state came in)"""
    problem = _Favor(q, k, v, mask, cu_seqlens, kv, k_sum, log_scale, projection, root, mean, **options)
    dq, dk, dv = (empty(x.shape, x.dtype) for x in (q, k, v))
    root_q, root_k, droot = None, None, torch.zeros(1, dtype=problem.acc)
    if root_grad:
        root_q, root_k = (torch.empty(x.shape[:3], dtype=problem.acc) for x in (q, k))
    partial = (None, None, None)
    if problem.split:
        partial = problem.state(slots_of(problem.length, problem.packed, problem.segment))
    dkv, dk_sum, dkv_scale = problem.state()
    results = {
        "grad_out": grad_out, "grad_kv": contiguous(grad_kv), "grad_k_sum": contiguous(grad_k_sum), "out": out,
        "normalizer": normalizer, "row_scale": row_scale, "final_log_scale": final_log_scale,
        "dq": dq, "dk": dk, "dv": dv, "dkv": dkv, "dk_sum": dk_sum, "dkv_scale": dkv_scale,
        "root_q": root_q, "root_k": root_k, "droot": droot if root_grad else None,
    }  # fmt: skip
    saved = _named("segment_", (segment_kv, segment_k_sum, segment_log_scale)) | _named("partial_", partial)
    problem.run(extension().linear_backward, results | saved)
    if kv is None:
        dkv, dk_sum = (x.new_empty(0) for x in (dkv, dk_sum))
    return dq, dk, dv, droot.reshape(()), dkv, dk_sum
