"""`nn.Linear` through our own tiles."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.affine import affine


class Affine(nn.Linear):
    """`nn.Linear` that computes as `longattn.ops.affine.affine` does."""

    def forward(self, x: Tensor) -> Tensor:
        return affine(x, self.weight, self.bias)
