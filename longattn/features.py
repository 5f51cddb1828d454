"""Feature maps phi of linear attention: the fused names, and any callable of the user's.

`elu`       elu(x) + 1                (Katharopoulos et al. 2020, eq. 7)
`relu`      max(x, 0) + 1e-3          (Choromanski et al. 2021, generalised attention)
`identity`  x, for features that are already mapped
A callable maps `[..., D] -> [..., M]`; it runs eagerly, with autograd.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

RELU_EPSILON = 1e-3

FeatureMap = str | Callable[[Tensor], Tensor]


def elu(x: Tensor) -> Tensor:
    """elu(x) + 1, written so that a very negative x keeps its relative precision."""
    # the inner where keeps exp of a large x, and so an infinite times zero gradient, out of the graph
    return torch.where(x > 0, x + 1, torch.exp(torch.where(x > 0, 0, x)))


def relu(x: Tensor) -> Tensor:
    return F.relu(x) + RELU_EPSILON


def identity(x: Tensor) -> Tensor:
    return x


FUSED: dict[str, Callable[[Tensor], Tensor]] = {"elu": elu, "relu": relu, "identity": identity}
