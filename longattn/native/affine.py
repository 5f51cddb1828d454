"""Launcher of csrc/cpu/affine.cpp: a product of whole matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from . import empty, extension, view

# depth of a thread's stretch where they share it, as in csrc/cpu/affine.cpp: more threads than these have no work
STRETCH = 512
# of b: what is packed whole where sums cannot wait in the result
PACKED = 1 << 22


def product(a: Tensor, b: Tensor, bias: Tensor | None, dtype: torch.dtype, *, split: bool = False) -> Tensor:
    """a `[M, K]` b `[K, N]` + bias `[N]`, any strides -> `[M, N]` in `dtype`: that of a, or what it is summed in.

    split: the depth K is a length, and what threads share; in what it is summed in, without a bias. Takes memory for a
        result a thread.
    """
    K, N = b.shape
    # the kernel reads memory, where a lazy sign is not
    a, b, bias = a.resolve_neg(), b.resolve_neg(), None if bias is None else bias.resolve_neg()
    if K == 0:
        out = torch.zeros(len(a), N, dtype=dtype, device="cpu")
        return out if bias is None else out + bias.to(dtype)
    out = empty((len(a), N), dtype)
    step = N if dtype in (torch.float32, torch.float64) else max(PACKED // K, 64)
    for start in range(0, N, max(step, 1)):
        columns = slice(start, start + step)
        _into(out[:, columns], a, b[:, columns], None if bias is None else bias[columns], split)
    return out


def _into(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, split: bool) -> None:
    tensors = {"a": view(a), "b": view(b), "bias": view(bias), "out": view(out)}
    threads = torch.get_num_threads()
    if split:
        threads = min(threads, -(-a.shape[1] // STRETCH))
    # not what is kept for decode steps: it may be some megabytes
    scratch = torch.empty(extension().affine_workspace(tensors, split, threads), dtype=torch.uint8, device="cpu")
    extension().affine(tensors | {"workspace": view(scratch)}, split, threads)
