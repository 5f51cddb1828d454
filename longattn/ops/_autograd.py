"""What ops share of autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work: tensors may stand for many."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def differentiated() -> bool:
    """Whether torch.func's derivatives or forward-mode AD are at work, which only torch's own ops follow.

    torch.func.vmap alone runs any op, row by row.
    """
    if forward_ad._current_level >= 0:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    levels = torch._C._functorch.get_interpreter_stack()
    return any(level.key() != torch._C._functorch.TransformType.Vmap for level in levels)


def readable(*tensors: Tensor) -> bool:
    """Whether the numbers of tensors may be read here and now: not while torch traces, transforms or fakes them."""
    if torch.compiler.is_compiling() or transformed() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return all(type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta for x in tensors)


def tracked(*tensors: Tensor | None) -> bool:
    """Whether a call must go through its autograd.Function: a raw op would lose the derivative without a word."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


class FirstDerivative(torch.autograd.Function):
    """The raw op `longattn::name` as a node of its own, so that asking for the second derivative gets a sentence."""

    # torch.compile does not take a setup_context here
    @staticmethod
    def forward(ctx, kernels, name, *arguments):
        ctx.kernels = kernels
        return getattr(torch.ops.longattn, name)(*arguments)

    @staticmethod
    def backward(ctx, *grads):
        remedy = "use impl='reference' for double backward"
        raise RuntimeError(f"{ctx.kernels} have no second derivative; {remedy}")
