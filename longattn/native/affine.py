"""Launcher of csrc/cpu/affine.cpp: a product of whole matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from . import empty, extension, view


def product(a: Tensor, b: Tensor, bias: Tensor | None, dtype: torch.dtype, *, split: bool = False) -> Tensor:
    """a `[M, K]` b `[K, N]` + bias `[N]`, any strides -> `[M, N]` in `dtype`: that of a, or what it is summed in.

    split: the depth K is a length, and what threads share; in what it is summed in, without a bias.
    """
    if a.shape[1] == 0:
        out = torch.zeros(a.shape[0], b.shape[1], dtype=dtype)
        return out if bias is None else out + bias.to(dtype)
    out = empty((a.shape[0], b.shape[1]), dtype)
    tensors = {"a": view(a), "b": view(b), "bias": view(bias), "out": view(out)}
    threads = torch.get_num_threads()
    # not what is kept for decode steps: it may be some megabytes
    scratch = torch.empty(extension().affine_workspace(tensors, split, threads), dtype=torch.uint8)
    extension().affine(tensors | {"workspace": view(scratch)}, split, threads)
    return out
