"""Which rotations a module hashes with: fixed in evaluation, new with every training step, the same on a replay."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import _lsh  # noqa: F401, registers the op


class Draws(nn.Module):
    """Counts the training steps of the module it belongs to; rotations are a function of its seed and this count.

    A step is over when a parameter of that module has changed, which is seen at the next forward in training, never in
    one that runs inside a backward pass. So all forwards between two updates (accumulated batches, shared layers,
    interleaved pipelines) and their recomputations (checkpointing, reversible blocks) meet the same rotations. A module
    whose parameters never change keeps those of its first step.

    step: int64 buffer, saved with the module, so a resumed training goes on as the uninterrupted one would. Evaluation
    uses step 0, training 1, 2 ..
    """

    step: Tensor

    def __init__(self, device=None) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))
        # what the buffer follows: it stays on the CPU, where reading it waits for nothing
        self._count, self._seen = torch.zeros((), dtype=torch.int64, device="cpu"), None

    def observe(self, module: nn.Module, *_) -> None:
        """Before each forward of `module`: a forward pre-hook."""
        if self.training:
            self._observe(module)

    def _observe(self, module: nn.Module) -> None:
        # inside a backward pass, so a replay
        if torch._C._current_graph_task_id() != -1:
            return
        versions = sum(p._version for p in module.parameters() if not p.is_inference())
        if versions != self._seen:
            self._count, self._seen = self._count + 1, versions
            self.step.copy_(self._count, non_blocking=True)

    # no part of a graph of torch.compile
    _observe._torchdynamo_disable = True

    def rotations(self, like: Tensor, heads: int, n_hashes: int, dim: int, columns: int, seed: int) -> Tensor:
        """Those of the present step, on the device of `like`."""
        step = self._count if self.training else None
        return torch.ops.longattn._lsh_rotations(like, heads, n_hashes, dim, columns, seed, step)

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        # a checkpoint of another attention has no steps
        none = torch.zeros((), dtype=torch.int64, device="cpu")
        saved = state_dict.setdefault(prefix + "step", none if self.step.is_meta else self.step)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._count, self._seen = saved.detach().to("cpu", copy=True), None

