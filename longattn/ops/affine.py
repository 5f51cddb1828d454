"""x W^T + b of rows: `torch.nn.functional.linear` in our own tiles where they are faster, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import native
from ..native import affine as kernels
from . import _check
from ._autograd import readable
from ._prefix import accumulator

# rows, and multiplications, below which torch's call is over sooner than ours begins
ROWS, PRODUCTS = 1024, 1 << 27
# numbers of a weight up to which each thread may have its gradient over some of the rows
SPLIT = 1 << 20
# what autocast turns into its own
CAST = (torch.float32, torch.bfloat16, torch.float16)


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return kernels.product(x, weight.t(), bias, x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x, weight), (needs_x, needs_weight, needs_bias) = ctx.saved_tensors, ctx.needs_input_grad
        # what is to be differentiated once more is torch's; sums over tokens are kept in float32
        again = torch.is_grad_enabled()
        acc, dx, dweight, dbias = accumulator(x.dtype), None, None, None
        if needs_x:
            dx = grad @ weight if again else kernels.product(grad, weight, None, x.dtype)
        if needs_weight and again:
            dweight = grad.t() @ x
        elif needs_weight:
            split = weight.numel() <= SPLIT
            dweight = kernels.product(grad.t(), x, None, acc, split=split).to(weight.dtype)
        if needs_bias:
            dbias = grad.sum(0, dtype=acc).to(grad.dtype)
        return dx, dweight, dbias


def _ours(x: Tensor, weight: Tensor, bias: Tensor | None, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether our tiles take this call. Whatever is odd about it is torch's to compute, or to refuse."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    # asked first: it is what most small calls fail
    rows = x.numel() // max(weight.shape[-1], 1)
    if rows < ROWS or rows * weight.numel() < PRODUCTS or x.device.type != "cpu":
        return False
    if not readable(*tensors) or native.missing() is not None:
        return False
    if any(t.layout != torch.strided or t.device != x.device for t in tensors):
        return False
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        return False
    if bias is not None and bias.shape != weight.shape[:1]:
        return False
    return all(t.dtype in dtypes for t in tensors)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)`.

    x: `[..., K]`, weight: `[N, K]`, bias: `[N]` -> `[..., N]`; one dtype, or autocast's.

    On CPUs with the compiled kernels, calls of some size run in register tiles: float32, bfloat16, float16 (summed in
    float32, also the gradients) and float64. A row's bits depend on no other row, and no bits on the number of threads.
    All others, those that torch.compile or torch.func look into, and second derivatives are torch's own, errors
    included.
    """
    casts = torch.is_autocast_enabled("cpu") and x.device.type == "cpu" and x.dtype != torch.float64
    if not _ours(x, weight, bias, CAST if casts else (x.dtype,) if x.dtype in _check.DTYPES else ()):
        return F.linear(x, weight, bias)
    if casts:
        dtype = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _Affine.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))
