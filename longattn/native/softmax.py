"""Launchers of csrc/cpu/softmax.cpp: they allocate the outputs and pass views. Signatures are those of every engine."""

from __future__ import annotations

import torch

from . import empty_like_rows, extension, view, workspace

TENSORS = (
    "q", "k", "v", "mask", "cu_seqlens", "key_scale", "order_q", "order_k", "rank_q", "rank_k", "bucket_q", "bucket_k",
)  # fmt: skip


def _run(name: str, inputs, bias, options: dict, backward: bool, results: dict) -> None:
    # held until the kernel returns: views carry bare pointers
    tensors = dict(zip(TENSORS, inputs, strict=True)) | {"bias": bias}
    problem = {name: view(x) for name, x in tensors.items() if x is not None}
    problem |= options | {"threads": torch.get_num_threads(), "seed": options["seed"] & 0xFFFF_FFFF_FFFF_FFFF}
    scratch = workspace(extension().softmax_workspace(problem, backward))
    problem["workspace"] = view(scratch)
    views = {name: view(x) for name, x in results.items() if x is not None}
    getattr(extension(), name)(problem, views)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(*inputs, bias=None, **options):
    """-> out, lse (-inf for a query that saw no key but perhaps its own)"""
    q, v = inputs[0], inputs[2]
    out = empty_like_rows(q, v.shape[3])
    lse, top = (torch.empty(q.shape[:3], dtype=_accumulator(q.dtype)) for _ in range(2))
    _run("softmax_forward", inputs, bias, options, False, {"out": out, "lse": lse, "top": top})
    return out, lse


def backward(grad_out, *arguments, bias=None, **options):
    """-> dq, dk (empty where keys are the rows of q), dv, dbias (empty without a bias)"""
    *inputs, out, lse = arguments
    q, k, v = inputs[:3]
    dbias = q.new_empty(0) if bias is None else torch.empty_like(bias)
    dq, dk, dv = (None if x is None else empty_like_rows(x, x.shape[3]) for x in (q, k, v))
    results = {"grad_out": grad_out, "out": out, "lse": lse, "delta": torch.empty_like(lse)}
    _run("softmax_backward", inputs, bias, options, True, {**results, "dq": dq, "dk": dk, "dv": dv, "dbias": dbias})
    return dq, q.new_empty(0) if dk is None else dk, dv, dbias
