"""Launchers of csrc/cpu/toeplitz.cpp: they allocate outputs and pass views. Signatures are those of every engine."""

from __future__ import annotations

import torch

from . import empty, extension, view, workspace

# what a thread may keep of its scratch between calls; running sums of long sequences are larger
KEPT_BYTES = 32 << 20


def _run(name: str, tensors: dict, options: dict, backward: bool, results: dict) -> None:
    # held until the kernel returns: views carry bare pointers
    problem = {name: view(x) for name, x in tensors.items() if x is not None}
    problem |= options | {"threads": torch.get_num_threads()}
    size = extension().toeplitz_workspace(problem, backward)
    scratch = workspace(size) if size <= KEPT_BYTES else empty(size, torch.uint8)
    problem["workspace"] = view(scratch)
    getattr(extension(), name)(problem, {name: view(x) for name, x in results.items() if x is not None})


def forward(q, k, v, c, mask, cu_seqlens, **options):
    """-> out `[B, Hq, L, E]` in v's dtype, normalizer `[B, Hq, L]`"""
    tensors = {"q": q, "k": k, "v": v, "c": c, "mask": mask, "cu_seqlens": cu_seqlens}
    out, normalizer = empty((*q.shape[:3], v.shape[3]), v.dtype), torch.empty(q.shape[:3], dtype=q.dtype)
    _run("toeplitz_forward", tensors, options, False, {"out": out, "normalizer": normalizer})
    return out, normalizer


def backward(grad_out, grad_normalizer, q, k, v, c, mask, cu_seqlens, out, normalizer, **options):
    """-> dq, dk, dv, dc"""
    tensors = {"q": q, "k": k, "v": v, "c": c, "mask": mask, "cu_seqlens": cu_seqlens}
    (B, Hq, L, _), (H, S, M), E = q.shape, k.shape[1:], v.shape[3]
    one_each = Hq == H
    results = {
        "dq": empty(q.shape, q.dtype),
        "dk": empty((B, Hq, S, M), k.dtype),
        "dv": empty((B, Hq, S, E), v.dtype if one_each else q.dtype),
        "dc": torch.empty_like(c),
    }
    given = {"grad_out": grad_out, "grad_normalizer": grad_normalizer, "out": out, "normalizer": normalizer}
    given["rows"] = empty((B, Hq, L, E + 1), q.dtype)
    _run("toeplitz_backward", tensors, options, True, {**given, **results})
    dq, dk, dv, dc = results.values()
    if not one_each:
        dk, dv = (x.unflatten(1, (H, Hq // H)).sum(2) for x in (dk, dv))
    return dq, dk, dv.to(v.dtype), dc
