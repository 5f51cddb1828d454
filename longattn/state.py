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


class FavorState(NamedTuple):
    """What causal linear attention with a `longattn.Favor` map remembers. Tensors only, as `LinearState`.

    kv: `[B, H, M, E]`, sum of phi(k) v^T in units of exp(log_scale), without the features' factor M^(-1/2).
    k_sum: `[B, H, M]`, sum of phi(k), likewise.
    log_scale: `[B, H]`, the largest logarithm of a feature so far; -infinity before the first key. It is a unit:
        gradients pass through kv and k_sum, which stand for the sums only together with it.
    tail_key `[B, H, t, D]`, tail_value `[B, H, t, E]`, tail_mask bool `[B, t]`: with exact_diagonal the t < 64 keys of
        the unfinished chunk, in the inputs' dtype; t = 0 otherwise.
    B counts sequences (those of `cu_seqlens` when packed), H key/value heads, M features, E value dim, D head dim.
    """

    kv: Tensor
    k_sum: Tensor
    log_scale: Tensor
    tail_key: Tensor
    tail_value: Tensor
    tail_mask: Tensor

    @classmethod
    def zeros(
        cls,
        batch: int,
        num_heads: int,
        n_features: int,
        value_dim: int,
        head_dim: int,
        *,
        device=None,
        dtype=torch.float32,
    ):
        """The state before the first token."""
        kv, k_sum = LinearState.zeros(batch, num_heads, n_features, value_dim, device=device, dtype=dtype)
        log_scale = torch.full((batch, num_heads), -torch.inf, device=device, dtype=dtype)
        tails = (torch.zeros(batch, num_heads, 0, n, device=device, dtype=dtype) for n in (head_dim, value_dim))
        return cls(kv, k_sum, log_scale, *tails, torch.zeros(batch, 0, dtype=torch.bool, device=device))

    def detach(self) -> FavorState:
        """The same values without their history (truncated back-propagation through time)."""
        return FavorState(*(x.detach() for x in self))

    def to(self, *args, **kwargs) -> FavorState:
        """`Tensor.to` on the tensors; the mask follows to the device and stays bool."""
        moved = [x.to(*args, **kwargs) for x in self[:5]]
        return FavorState(*moved, self.tail_mask.to(moved[0].device))

    def reset(self, rows: Tensor) -> FavorState:
        """A copy in which the chosen sequences start afresh; their chunks stay in step with the others'. rows: indices
        (int64) or a bool mask `[B]`."""
        chosen = torch.zeros(self.kv.shape[0], dtype=torch.bool, device=self.kv.device)
        chosen[rows] = True
        kv, k_sum = (x.masked_fill(chosen[(..., *[None] * (x.dim() - 1))], 0) for x in self[:2])
        log_scale = self.log_scale.masked_fill(chosen[:, None], -torch.inf)
        return FavorState(kv, k_sum, log_scale, self.tail_key, self.tail_value, self.tail_mask | chosen[:, None])

    def select(self, rows: Tensor) -> FavorState:
        """The state of the chosen sequences, in that order (beam search). rows: indices or a bool mask."""
        return FavorState(*(x[rows] for x in self))


class ToeplitzState(NamedTuple):
    """What causal linear attention with a relative positional bias remembers. Tensors only, as `LinearState`.

    The last t <= K keys, whose factors still depend on how far they are, as they are; all before them, which have one
    factor, as sums:
    kv: `[B, H, M, E]`, sum of phi(k) v^T over the keys that have left the ring; float32 (float64 for float64 inputs).
    k_sum: `[B, H, M]`, sum of phi(k), likewise.
    ring_key `[B, H, t, M]`: features phi(k), dtype of the sums. ring_value `[B, H, t, E]`: in the inputs' dtype.
    ring_mask: bool `[B, t]`, True for a padded key.
    """

    kv: Tensor
    k_sum: Tensor
    ring_key: Tensor
    ring_value: Tensor
    ring_mask: Tensor

    @classmethod
    def zeros(cls, batch: int, num_heads: int, n_features: int, value_dim: int, *, device=None, dtype=torch.float32):
        """The state before the first token."""
        sums = LinearState.zeros(batch, num_heads, n_features, value_dim, device=device, dtype=dtype)
        ring = (torch.zeros(batch, num_heads, 0, n, device=device, dtype=dtype) for n in (n_features, value_dim))
        return cls(*sums, *ring, torch.zeros(batch, 0, dtype=torch.bool, device=device))

    def detach(self) -> ToeplitzState:
        """The same values without their history (truncated back-propagation through time)."""
        return ToeplitzState(*(x.detach() for x in self))

    def to(self, *args, **kwargs) -> ToeplitzState:
        """`Tensor.to` on the tensors; the mask follows to the device and stays bool."""
        moved = [x.to(*args, **kwargs) for x in self[:4]]
        return ToeplitzState(*moved, self.ring_mask.to(moved[0].device))

    def reset(self, rows: Tensor) -> ToeplitzState:
        """A copy in which the chosen sequences start afresh. rows: indices (int64) or a bool mask `[B]`."""
        chosen = torch.zeros(self.kv.shape[0], dtype=torch.bool, device=self.kv.device)
        chosen[rows] = True
        cleared = (x.masked_fill(chosen[(..., *[None] * (x.dim() - 1))], 0) for x in self[:4])
        return ToeplitzState(*cleared, self.ring_mask | chosen[:, None])

    def select(self, rows: Tensor) -> ToeplitzState:
        """The state of the chosen sequences, in that order (beam search). rows: indices or a bool mask."""
        return ToeplitzState(*(x[rows] for x in self))


State = LinearState | FavorState | ToeplitzState
