"""Launcher of csrc/cpu/reversible.cpp: the sum of a reversible layer."""

from __future__ import annotations

import torch
from torch import Tensor

from . import empty, extension, view


def add(x: Tensor, f: Tensor, grid: float, limit: float, subtract: bool, inplace: bool) -> tuple[Tensor, bool | None]:
    """x + f or x - f -> the sum (x itself if inplace), and with a grid whether it reached the limit anywhere"""
    whole = x if x.is_contiguous() else x.contiguous()
    out = whole if inplace else empty(x.shape, x.dtype)
    # named, so that a copy outlives the call
    branch = f.contiguous()
    tensors = {"x": view(whole.view(-1)), "f": view(branch.view(-1)), "out": view(out.view(-1))}
    over = extension().reversible_add(tensors, grid, limit, subtract, torch.get_num_threads())
    if inplace:
        out = x if whole is x else x.copy_(whole)
    return out, over if grid else None
