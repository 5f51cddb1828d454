"""Feature maps phi of linear attention: the fused names, any callable of the user's, and the mathematics of FAVOR+.

`elu`       elu(x) + 1                (Katharopoulos et al. 2020, eq. 7)
`relu`      max(x, 0) + 1e-3          (Choromanski et al. 2021, generalised attention)
`identity`  x, for features that are already mapped
A callable maps `[..., D] -> [..., M]`; it runs eagerly, with autograd. `longattn.Favor` is one that the kernels know.
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

# FAVOR+ (Choromanski et al. 2021, arXiv 2009.14794)

FAVOR_KINDS = ("positive", "hyperbolic", "relu", "trig")
# each projection gives two features
FAVOR_PAIRED = ("hyperbolic", "trig")


def favor_count(projection: Tensor, kind: str) -> int:
    """M, how many features the projections make."""
    return projection.shape[0] * (2 if kind in FAVOR_PAIRED else 1)


def favor_norm(projection: Tensor, kind: str) -> int:
    """phi.phi is divided by this number to be a mean: of all features, or of trig's pairs."""
    return projection.shape[0] * (2 if kind == "hyperbolic" else 1)


def unit_rows(x: Tensor) -> Tensor:
    """x / |x| along the last dimension; a zero row stays 0, with gradient 0."""
    # the largest component first: its square must neither overflow nor vanish
    largest = x.detach().abs().amax(-1, keepdim=True)
    x = x / torch.where(largest == 0, 1, largest)
    squares = (x * x).sum(-1, keepdim=True)
    return torch.where(squares == 0, 0, x / torch.where(squares == 0, 1, squares).sqrt())


def favor_rows(x: Tensor, root: Tensor | float, l2: bool, mean: Tensor | None = None) -> Tensor:
    """Rows `[B, H, n, D]` as the kernel exp(q.k) sees them: of unit length with `l2`, less the mean `[H, D]`, times
    root = temperature^(-1/2)."""
    x = unit_rows(x) if l2 else x
    return root * (x if mean is None else x - mean[:, None])


def favor_features(x: Tensor, projection: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """x `[..., D]`, projection `[P, D]` -> phi `[..., M]` with values around 1 or below, and logarithms a `[...]`.

    The features are phi exp(a) favor_norm^(-1/2). For positive ones phi = exp(u - max u) and a = max u - |x|^2/2 with
    u = projection x (eq. 4 with lemma 1); the maximum cancels, so it carries no gradient.
    """
    u = x @ projection.mT                                                                      # [..., P]
    g = (x * x).sum(-1) / 2
    if kind == "relu":
        return relu(u), torch.zeros_like(g)
    if kind == "trig":
        return torch.cat([u.sin(), u.cos()], -1), g
    if kind == "hyperbolic":
        u = torch.cat([u, -u], -1)
    top = u.detach().amax(-1, keepdim=True)
    return torch.exp(u - top), top[..., 0] - g


def favor_bound(projection: Tensor, root: Tensor, kind: str) -> Tensor:
    """What the logarithm of a feature of a unit row is at most: w.x of such a row is at most the length of w."""
    if kind not in ("positive", "hyperbolic"):
        return root.new_zeros(())
    return (root * projection.norm(dim=1).amax()).detach()
