"""Launcher of csrc/cuda/reversible.cu, on the current stream of the tensors' device."""

from __future__ import annotations

import torch
from torch import Tensor

from . import extension, view


def add(x: Tensor, f: Tensor, grid: float, limit: float, subtract: bool, inplace: bool) -> tuple[Tensor, Tensor | None]:
    """x + f or x - f -> the sum (x itself if inplace), and with a grid an int32 [1]: 1 where it reached the limit"""
    whole = x if x.is_contiguous() else x.contiguous()
    out = whole if inplace else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # named, so that a copy outlives the call
    branch, flag = f.contiguous(), torch.zeros(1, dtype=torch.int32, device=x.device) if grid else None
    tensors = {"x": whole.view(-1), "f": branch.view(-1), "out": out.view(-1)}
    if flag is not None:
        tensors["flag"] = flag
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream(x.device).cuda_stream
        views = {name: view(tensor) for name, tensor in tensors.items()}
        extension().reversible_add_cuda(views, grid, limit, subtract, stream)
    if inplace:
        out = x if whole is x else x.copy_(whole)
    return out, flag
