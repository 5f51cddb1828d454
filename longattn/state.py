"""The running state of linear attention, carried between calls."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LinearState(NamedTuple):
    """What causal linear attention remembers of the tokens it has seen. Tensors only, so it saves with safetensors:
    `save_file(state._asdict(), path)` and `LinearState(**load_file(path))`.

    kv: `[B, H, M, E]`, sum of phi(k) v^T; float32 (float64 for float64 inputs) whatever the inputs.
    k_sum: `[B, H, M]`, sum of phi(k).
    B counts sequences (those of `cu_seqlens` when packed), H key/value heads, M features, E value dim.
    """

    kv: Tensor
    k_sum: Tensor

    @classmethod
    def zeros(cls, batch: int, num_heads: int, n_features: int, value_dim: int, *, device=None, dtype=torch.float32):
        """The state before the first token."""
        kv = torch.zeros(batch, num_heads, n_features, value_dim, device=device, dtype=dtype)
        return cls(kv, torch.zeros(batch, num_heads, n_features, device=device, dtype=dtype))

    def detach(self) -> LinearState:
        """The same values without their history (truncated back-propagation through time)."""
        return LinearState(self.kv.detach(), self.k_sum.detach())

    def to(self, *args, **kwargs) -> LinearState:
        """`Tensor.to` on both tensors."""
        return LinearState(self.kv.to(*args, **kwargs), self.k_sum.to(*args, **kwargs))

    def reset(self, rows: Tensor) -> LinearState:
        """A copy in which the chosen sequences start afresh. rows: indices (int64) or a bool mask `[B]`."""
        keep = torch.ones(self.kv.shape[0], dtype=torch.bool, device=self.kv.device)
        keep[rows] = False
        return LinearState(
            self.kv.where(keep[:, None, None, None], 0),
            self.k_sum.where(keep[:, None, None], 0),
        )

    def select(self, rows: Tensor) -> LinearState:
        """The state of the chosen sequences, in that order (beam search). rows: indices or a bool mask."""
        return LinearState(self.kv[rows], self.k_sum[rows])
