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
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return kernels.product(x, weight.t(), bias, x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x, weight), (needs_x, needs_weight, needs_bias) = ctx.saved_tensors, ctx.needs_input_grad
        # what is to be differentiated once more, or stands for many, is torch's
        many = torch._C._functorch.is_legacy_batchedtensor(grad)
        ours = not torch.is_grad_enabled() and readable(grad) and not many
        dx, dweight, dbias = None, None, None
        if needs_x:
            dx = kernels.product(grad, weight, None, grad.dtype) if ours else grad @ weight
        if needs_weight and ours:
            # a sum over tokens stays in float32 (float64) until its end
            options = {"dtype": accumulator(grad.dtype), "split": grad.shape[1] * x.shape[1] <= SPLIT}
            dweight = kernels.product(grad.t(), x, None, **options).to(grad.dtype)
        elif needs_weight:
            dweight = grad.t() @ x
        if needs_bias:
            # torch sums an expanded gradient in an order that depends on the threads
            dbias = (grad.contiguous() if 0 in grad.stride() else grad).sum(0)
        return dx, dweight, dbias


def _ours(x: Tensor, weight: Tensor, bias: Tensor | None, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether our tiles take this call. Whatever is odd about it is torch's to compute, or to refuse."""
    if torch.jit.is_tracing() or x.is_nested or x.dim() < 2 or weight.dim() != 2:
        return False
    # of one sequence: what else is in the batch must not choose the engine
    rows = x.shape[-2]
    if rows < ROWS or rows * weight.numel() < PRODUCTS or x.device.type != "cpu":
        return False
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if not readable(*tensors) or native.missing() is not None:
        return False
    if any(t.layout != torch.strided or t.device != x.device for t in tensors):
        return False
    if x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        return False
    return all(t.dtype in dtypes for t in tensors)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)`.

    x: `[..., L, K]`, weight: `[N, K]`, bias: `[N]` -> `[..., L, N]`; one dtype, or autocast's.

    On CPUs with the compiled kernels, calls of some length run in register tiles: float32, bfloat16, float16 (summed in
    float32, also the gradients) and float64. There a row's bits depend on no other row, and none on the number of
    threads. All other calls, those that torch.compile, torch.func or a dispatch mode look into, and second derivatives
    are torch's own, errors included; a module that must compute the same bits twice, such as a branch of an exact
    `ReversibleBlock`, has to run under the same modes both times.
    """
    # asked before a size is, which would become a condition of the graph
    if torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    casts = torch.is_autocast_enabled("cpu") and x.device.type == "cpu" and x.dtype != torch.float64
    if not _ours(x, weight, bias, CAST if casts else (x.dtype,) if x.dtype in _check.DTYPES else ()):
        return F.linear(x, weight, bias)
    if casts:
        dtype = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _Affine.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))
