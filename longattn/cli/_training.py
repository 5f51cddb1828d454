"""Training of a Reformer on the bytes of a text: a run that stops and goes on bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..models import Reformer, ReformerConfig
from . import _checkpoint, _model
from ._checkpoint import CheckpointError
from ._text import Text
from ._train import Step

# of the gradient, in all
LARGEST_NORM = 1.0
BETAS = (0.9, 0.98)


class Diverged(RuntimeError):
    """The loss, its gradient or the parameters are no numbers any more: from here no training goes on."""


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C is heard at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = []
    handler = signal.signal(signal.SIGINT, lambda *_: heard.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if heard:
        raise KeyboardInterrupt


def identity(text: Text) -> dict:
    """What tells a text from others."""
    return {"name": text.name, "bytes": len(text.data), "sha256": hashlib.sha256(text.data).hexdigest()}


def make_optimizer(model: Reformer, rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=rate, betas=BETAS)


def _reconfigured(model: Reformer, config: ReformerConfig) -> Reformer:
    """The same weights under a configuration that asks for the same ones."""
    with torch.random.fork_rng(devices=[]):
        changed = Reformer(config)
    changed.load_state_dict(model.state_dict())
    return changed


def backward(model: Reformer, window: Tensor, dtype: str) -> float:
    """One forward and backward of the loss of windows `[B, N + 1]`; -> the loss, in nats."""
    with torch.autocast(window.device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = model.loss(window)
    loss.backward()
    return loss.item()


class Training:
    """A model on its way: step() after step(), and save(). settings: of `_model` and of train; steps: what was."""

    def __init__(self, settings: dict, text: Text) -> None:
        self.settings, self.text, self.identity = settings, text, identity(text)
        self.data = torch.frombuffer(bytearray(text.data), dtype=torch.uint8)
        self.steps: list[Step] = []
        self.windows = torch.Generator().manual_seed(settings["seed"])
        self.saved_at, self.before = None, None
        # False where the optimiser has failed among the parameters
        self.whole = True

    @classmethod
    def start(cls, settings: dict, text: Text) -> Training:
        self = cls(settings, text)
        torch.manual_seed(settings["seed"])
        self._take(Reformer(_model.config(settings)))
        return self

    @classmethod
    def resume(cls, path: Path, facts: dict, settings: dict, text: Text) -> Training:
        """Goes on from a checkpoint; CheckpointError in a sentence. settings: its own, some replaced."""
        self = cls(settings, text)
        # what is computed from it, as the number of buckets, is part of the model
        was, now = (_model.config(x) for x in (facts["settings"], settings))
        model = _checkpoint.load_model(path, "cpu")
        if model.config.filled() != was.filled():
            raise CheckpointError(f"the checkpoint {path} holds another model than its training.json speaks of")
        self._take(model if now == was else _reconfigured(model, now))
        tensors = _checkpoint.load_training(path, self.optimizer)
        torch.set_rng_state(tensors["generator"])
        self.windows.set_state(tensors["windows"])
        self.steps = [Step(step, bits, seconds, 0.0) for step, bits, seconds in facts["steps"]]
        self.saved_at = self.step_number
        return self

    def _take(self, model: Reformer) -> None:
        self.model = model.train()
        self.optimizer = make_optimizer(model, self.settings["rate"])

    @property
    def step_number(self) -> int:
        return self.steps[-1].step if self.steps else 0

    @property
    def seconds(self) -> float:
        return self.steps[-1].seconds if self.steps else 0.0

    def _window(self) -> Tensor:
        length = self.settings["length"]
        firsts = torch.randint(len(self.data) - length, (self.settings["batch"],), generator=self.windows)
        return torch.stack([self.data[first : first + length + 1] for first in firsts.tolist()])

    def step(self) -> Step:
        """KeyboardInterrupt and Diverged leave what save() writes as it was before the step."""
        start, number = time.perf_counter(), self.step_number + 1
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        self.before = torch.get_rng_state(), self.windows.get_state(), buffers
        loss = backward(self.model, self._window(), self.settings["dtype"])
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_NORM).item()
        for what, found in (("loss", loss), ("gradient", norm)):
            if not math.isfinite(found):
                raise self._diverged(f"the {what} of step {number} is {found}")
        with uninterrupted():
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings["rate"] * min(1.0, number / self.settings["warmup"])
            self.whole = False
            self.optimizer.step()
            self.whole = True
            self.optimizer.zero_grad()
            seconds = self.seconds + time.perf_counter() - start
            done = min(1.0, number / max(self.settings["steps"], 1))
            self.steps.append(Step(number, loss / math.log(2), seconds, done))
            self.before = None
        return self.steps[-1]

    @property
    def _kept(self) -> str:
        return "no checkpoint was written" if self.saved_at is None else f"the checkpoint of step {self.saved_at} stays"

    def _diverged(self, what: str) -> Diverged:
        return Diverged(f"{what}; pass a lower --rate than {self.settings['rate']:g}; {self._kept}")

    def save(self, folder: str) -> Path | None:
        """-> the checkpoint; None where there is nothing new to write. Diverged before it would replace a good one."""
        if self.step_number == self.saved_at:
            return None
        if not self.whole:
            raise CheckpointError(f"step {self.step_number + 1} has changed some parameters alone; {self._kept}")
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise self._diverged(f"the parameters after step {self.step_number} are no finite numbers")
        with uninterrupted():
            if self.before is not None:
                generator, windows, buffers = self.before
                torch.set_rng_state(generator)
                self.windows.set_state(windows)
                for buffer, was in buffers:
                    buffer.copy_(was)
            facts = {
                "step": self.step_number,
                "seconds": self.seconds,
                "settings": self.settings,
                "text": self.identity,
                "steps": [(x.step, x.bits_per_byte, x.seconds) for x in self.steps],
            }
            tensors = {"generator": torch.get_rng_state(), "windows": self.windows.get_state()}
            path = _checkpoint.save(folder, self.model, self.optimizer, tensors, facts)
            self.saved_at = self.step_number
        return path
