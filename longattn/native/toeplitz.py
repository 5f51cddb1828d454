"""Launchers of csrc/cpu/toeplitz.cpp: they allocate outputs and pass views. Signatures are those of every engine."""

from __future__ import annotations

import torch
from torch import Tensor

from . import empty, extension, view, workspace
from .favor import KINDS

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


def forward(q, k, v, c, mask, cu_seqlens, *, fft: bool = False, **options):
    """-> out `[B, Hq, L, E]` in v's dtype, normalizer `[B, Hq, L]`; fft: by Fourier transforms"""
    tensors = {"q": q, "k": k, "v": v, "c": c, "mask": mask, "cu_seqlens": cu_seqlens}
    out, normalizer = empty((*q.shape[:3], v.shape[3]), v.dtype), torch.empty(q.shape[:3], dtype=q.dtype)
    if fft:
        # queries of a sequence without keys belong to none of its pieces
        out.zero_(), normalizer.zero_()
    _run("toeplitz_forward", tensors, {**options, "fft": fft}, False, {"out": out, "normalizer": normalizer})
    return out, normalizer


def backward(
    grad_out, grad_normalizer, q, k, v, c, mask, cu_seqlens, out, normalizer, *, fft: bool = False, **options
):  # fmt: skip
    """-> dq, dk, dv, dc"""
    tensors = {"q": q, "k": k, "v": v, "c": c, "mask": mask, "cu_seqlens": cu_seqlens}
    (B, Hq, L, _), (H, S, M), E = q.shape, k.shape[1:], v.shape[3]
    one_each = Hq == H
    results = {
        "dq": empty(q.shape, q.dtype),
        "dk": empty((B, Hq, S, M), k.dtype),
        # pieces of a sequence add to it one after the other
        "dv": empty((B, Hq, S, E), v.dtype if one_each and not fft else q.dtype),
        "dc": torch.empty(c.shape, dtype=c.dtype),
    }
    if fft:
        for x in results.values():
            x.zero_()
    given = {"grad_out": grad_out, "grad_normalizer": grad_normalizer, "out": out, "normalizer": normalizer}
    given["rows"] = empty((B, Hq, L, E + 1), q.dtype)
    _run("toeplitz_backward", tensors, {**options, "fft": fft}, True, {**given, **results})
    dq, dk, dv, dc = results.values()
    if not one_each:
        dk, dv = (x.unflatten(1, (H, Hq // H)).sum(2) for x in (dk, dv))
    return dq, dk, dv.to(v.dtype), dc


FEATURES = {"identity": 0, "elu": 1, "relu": 2}


def step(q, k, v, bias, state, *, feature, normalize: bool, scale: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One token of a stream, without gradients: all of one dtype, float32 or float64, bias and states contiguous.

    bias: `[2K+1]` or `[Hq, 2K+1]`. feature: a name, or (projection, root, mean, kind) of a Favor map. -> out, the next
    state. Shapes of the state are the caller's to check: only its addresses cross.
    """
    (B, H, held, M), reach = state[2].shape, bias.shape[-1] // 2
    kept = min(held + 1, reach)
    kv, k_sum, keys, values, mask = state
    out = v.new_empty((B, q.shape[1], 1, v.shape[3]))
    after = (
        torch.empty_like(kv), torch.empty_like(k_sum), keys.new_empty((B, H, kept, M)),
        values.new_empty((B, H, kept, v.shape[3])), mask.new_empty((B, kept)),
    )  # fmt: skip
    problem = {"q": view(q), "k": view(k), "v": view(v), "features": M, "feature": 0}
    problem |= {"normalize": normalize, "scale": scale, "threads": torch.get_num_threads()}
    if isinstance(feature, str):
        problem["feature"] = FEATURES[feature]
    else:
        projection, root, mean, kind = feature
        problem |= {"projection": view(projection), "root": root.item(), "kind": KINDS[kind], "l2": True}
        problem |= {} if mean is None else {"mean": view(mean)}
    addresses = [x.data_ptr() for x in (bias, *state, *after, out)]
    biases = 1 if bias.dim() == 1 else bias.shape[0]
    extension().toeplitz_step(problem, addresses, biases, reach, held, lambda size: view(workspace(size)))
    return out, after
