"""Which rotations a module hashes with: fixed in evaluation, new with every training step, the same on a replay."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn

from ..ops import _library, _lsh  # noqa: F401, registers an op

# no sum of versions
NEVER = -1
# a step of a compiled graph: the state that `Draws` has, and the parameters whose versions tell
_library.define("_observe", "(Tensor(a!) step, Tensor(b!) count, Tensor(c!) seen, Tensor[] parameters) -> ()")


@_library.fake("_observe")
def _(step, count, seen, parameters):
    return None


class _Steps:
    """How many steps optimizers have taken in this process, from the first look on."""

    count: int | None = None

    @classmethod
    def now(cls) -> int:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return 0
        if cls.count is None:
            cls.count = 0
            importlib.import_module("torch.optim.optimizer").register_optimizer_step_post_hook(cls.add)
        return cls.count

    @classmethod
    def add(cls, *_) -> None:
        cls.count += 1


def _observe(step: Tensor, count: Tensor, seen: Tensor, parameters: list[Tensor]) -> None:
    # inside a backward pass, so a replay
    if torch._C._current_graph_task_id() != -1:
        return
    # fully_shard gathers parameters without a change of their versions
    versions = sum(p._version for p in parameters if not p.is_inference()) + _Steps.now()
    if versions != int(seen):
        seen.fill_(versions)
        count.add_(1)
        step.copy_(count, non_blocking=True)


_library.run(_observe=_observe)


def _are_faked() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


class Draws(nn.Module):
    """Counts the training steps of the module it belongs to; rotations are a function of its seed and this count.

    A step is over when a parameter of that module has changed (in distributed training: or an optimizer of torch.optim
    has taken a step), which is seen at the next forward in training, never in one that runs inside a backward pass. So
    all forwards between two updates (accumulated batches, shared layers, interleaved pipelines) and their
    recomputations (checkpointing, reversible blocks) meet the same rotations. A module whose parameters never change
    keeps those of its first step.

    step: int64 buffer, saved with the module, so a resumed training goes on as the uninterrupted one would. Evaluation
    uses step 0, training 1, 2 ..
    """

    step: Tensor

    def __init__(self, device=None) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))
        # what the buffer follows: it stays on the CPU, where reading it waits for nothing
        self._count = torch.zeros((), dtype=torch.int64, device="cpu")
        # the versions of the parameters at the last step, summed
        self._seen = torch.full((), NEVER, dtype=torch.int64, device="cpu")

    def observe(self, module: nn.Module, *_) -> None:
        """Before each forward of `module`: called by it, or a forward pre-hook."""
        if self.training:
            # as an op this is a part of the graph of torch.compile, and nothing for tensors without numbers
            as_op = torch.compiler.is_compiling() or _are_faked()
            observe = torch.ops.longattn._observe if as_op else _observe
            with torch.no_grad():
                observe(self.step, self._count, self._seen, list(module.parameters()))

    @property
    def count(self) -> Tensor:
        """`step` on the CPU."""
        return self._count

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # to_empty leaves anything in it
        if not (self.step.is_meta or self.step.is_inference()):
            self.step.copy_(self._count)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        # a checkpoint of another attention has no steps
        saved = state_dict.get(prefix + "step")
        if saved is None or saved.is_meta:
            saved = torch.zeros((), dtype=torch.int64, device="cpu") if self.step.is_meta else self.step
            state_dict[prefix + "step"] = saved
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._count, self._seen = saved.detach().to("cpu", copy=True), torch.full_like(self._count, NEVER)
