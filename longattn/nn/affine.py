"""`nn.Linear` through our own tiles."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.affine import affine


class Affine(nn.Linear):
    """`nn.Linear` that computes as `longattn.ops.affine.affine` does.

    Tools that look for the class nn.Linear itself and not for its kind, such as torch.ao's quantize_dynamic, do not
    see it.
    """

    def forward(self, x: Tensor) -> Tensor:
        return affine(x, self.weight, self.bias)
