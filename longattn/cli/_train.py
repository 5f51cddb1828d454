"""Training of the demo's byte-level Transformer, in a process of its own."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from .._memory import PeakMemory
from ..models import ByteLM
from ._attentions import Shape

WARM_UP_STEPS = 4
# from here on blocks are run again in the backward pass, for memory
RECOMPUTE_LENGTH = 200_000
HELD_OUT_WINDOWS = 4


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long to train on what: `steps` of them, or as many as start within `seconds`."""

    length: int
    steps: int | None
    seconds: float
    seed: int
    threads: int
    width: int = 96
    heads: int = 3
    layers: int = 2

    @property
    def shape(self) -> Shape:
        return Shape(self.heads, self.width // self.heads)


@dataclasses.dataclass(frozen=True)
class Step:
    """After `step` steps: bits per byte of the last one, seconds since the start, share of the plan done."""

    step: int
    bits_per_byte: float
    seconds: float
    done: float


@dataclasses.dataclass(frozen=True)
class Result:
    """peak_bytes: of the whole training beyond the text and the parameters. held_out_bits: bits per held-out byte."""

    parameters: int
    steps: int
    seconds: float
    tokens_per_s: float
    peak_bytes: int
    held_out_bits: float
    held_out_bytes: int


def rate_factor(step: int, done: float) -> float:
    """Learning rate over its highest: a short rise, a plateau, then down to 0 in the last 60%."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * min(1.0, (1 - done) / 0.6)


def train(training: bytes, held_out: bytes, plan: Plan) -> Iterator[Step | Result]:
    """Yields a Step after each step and the Result at the end. Runs in a fresh process."""
    torch.set_num_threads(plan.threads)
    torch.manual_seed(plan.seed)
    text, later = (torch.frombuffer(bytearray(x), dtype=torch.uint8) for x in (training, held_out))
    recompute = plan.length >= RECOMPUTE_LENGTH
    model = ByteLM(plan.width, plan.heads, plan.layers, recompute=recompute)
    optimizers = model.optimizers()
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]

    with PeakMemory() as peak:
        start, step, done = time.perf_counter(), 0, 0.0
        while done < 1:
            for group, highest in groups:
                group["lr"] = highest * rate_factor(step, done)
            first = int(torch.randint(text.numel() - plan.length, ()))
            loss = model.loss(text[None, first : first + plan.length + 1])
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step, seconds = step + 1, time.perf_counter() - start
            done = step / plan.steps if plan.steps else min(1.0, seconds / plan.seconds)
            yield Step(step, loss.item() / math.log(2), seconds, done)
    bits, count = held_out_bits(model, later, plan.length)
    parameters = sum(p.numel() for p in model.parameters())
    yield Result(parameters, step, seconds, step * plan.length / seconds, peak.bytes, bits, count)


@torch.no_grad()
def held_out_bits(model: ByteLM, text: Tensor, length: int) -> tuple[float, int]:
    """(bits per byte, bytes predicted) on the first windows of a text the model has not seen."""
    total = count = 0
    for window in text.split(length)[:HELD_OUT_WINDOWS]:
        if window.numel() > 1:
            total += model.loss(window[None]).item() * (window.numel() - 1)
            count += window.numel() - 1
    return total / count / math.log(2), count
