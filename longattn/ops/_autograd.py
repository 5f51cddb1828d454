"""What ops share of autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work, which only torch's own ops follow."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def tracked(*tensors: Tensor | None) -> bool:
    """Whether a call must go through its autograd.Function: a raw op would lose the derivative without a word."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
