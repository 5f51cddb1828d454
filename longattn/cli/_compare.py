"""Attentions side by side at growing lengths: what is measured, what is predicted, where they break even."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..lsh import lsh_recall
from . import _measure
from ._attentions import ATTENTIONS, EXACT, Attend, Shape

# what the demo shows
MECHANISMS = (EXACT, "linear", "favor", "lsh")
# of queries and keys: random features follow the softmax at such norms, and at norms of 1 they are noise
DEVIATION = 0.4
# the error is that of the last queries, which see all keys
JUDGED = 64
# recall compares all pairs: up to this length, of so many heads as keep the pairs this few
RECALL_LENGTH, RECALL_PAIRS = 2048, 1 << 22
# tokens that look for each other, and how far they are from what they have in common, which is of unit variance
CLUSTER, SPREAD = 64, 0.25


class Wanted(NamedTuple):
    """What to measure beside the time of the forward pass. quality: error and recall."""

    backward: bool
    memory: bool
    quality: bool


EVERYTHING = Wanted(True, True, True)


@dataclasses.dataclass(frozen=True)
class Point:
    """One attention at one length; None is what was not asked for. Training is forward and backward. Bytes are beyond
    the inputs.

    error: of the last queries against exact attention, |output - exact| / |exact|; None for exact itself, for a
    mechanism that does not estimate it, and for points that were not measured.
    forward_spread, training_spread: half the distance of the quartiles over the median; None for a single call.
    """

    mechanism: str
    length: int
    measured: bool
    forward_s: float
    forward_bytes: int | None
    training_s: float | None
    training_bytes: int | None
    error: float | None = None
    recall: float | None = None
    unrelated_recall: float | None = None
    forward_spread: float | None = None
    training_spread: float | None = None

    @property
    def total_s(self) -> float:
        """Of both directions where both are there."""
        return self.forward_s if self.training_s is None else self.training_s


def lengths(longest: int, shortest: int = 128) -> list[int]:
    """Halves of the longest length down to the shortest, growing; the longest alone if it is shorter."""
    found = [longest]
    while found[0] // 2 >= shortest:
        found.insert(0, found[0] // 2)
    return found


def measure_attention(
    mechanism: str, length: int, shape: Shape, threads: int, seed: int, wanted: Wanted = EVERYTHING
) -> Iterator[Point]:
    """Runs in a fresh process."""
    torch.set_num_threads(threads)
    attend, dtype = ATTENTIONS[mechanism].make(shape, length), getattr(torch, shape.dtype)
    generator = torch.Generator().manual_seed(seed)
    size = (shape.batch, shape.heads, length, shape.head_dim)
    deviations = (DEVIATION, DEVIATION, 1, 1)
    q, k, v, grad = ((x * torch.randn(size, generator=generator)).to(shape.device, dtype) for x in deviations)

    def forward(n: int | None = None) -> Tensor:
        with torch.no_grad():
            return attend(*(x[:, :, :n] for x in (q, k, v)))

    def training(n: int | None = None) -> tuple[Tensor, ...]:
        inputs = [x[:, :, :n].detach().requires_grad_() for x in (q, k, v)]
        output = attend(*inputs)
        # a mechanism of shared queries and keys has no gradient of k
        return output, *torch.autograd.grad(output, inputs, grad[:, :, :n], allow_unused=True)

    costs = []
    for function in (forward, training)[: 1 + wanted.backward]:
        # libraries load and threads start on the first call, which is no cost of the mechanism
        function(min(length, 128))
        costs.append(_measure.sample(function, memory=wanted.memory, device=shape.device))
    costs += [_measure.Cost(None, None, None)] * (2 - len(costs))
    yield Point(
        mechanism,
        length,
        True,
        *costs[0][:2],
        *costs[1][:2],
        _error(mechanism, attend, q, k, v) if wanted.quality else None,
        *(_recalls(mechanism, length, shape, seed) if wanted.quality else (None, None)),
        *(cost.spread for cost in costs),
    )


def _error(mechanism: str, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> float | None:
    if not ATTENTIONS[mechanism].estimates:
        return None
    with torch.no_grad():
        output = attend(q, k, v)[:, :, -JUDGED:]
        n, rows = k.shape[2], output.shape[2]
        hidden = torch.ones(rows, n, dtype=torch.bool).triu(n - rows + 1)  # [rows, n]
        scores = (q[:, :, -rows:] @ k.mT / q.shape[3] ** 0.5).masked_fill(hidden, -math.inf)
        exact = scores.softmax(-1) @ v
        return ((output - exact).norm() / exact.norm()).item()


def clusters(length: int, shape: Shape, seed: int) -> Tensor:
    """Rows `[1, H, length, D]` of unit variance, each near one of length / CLUSTER centres, in random order."""
    generator = torch.Generator().manual_seed(seed)
    count, size = -(-length // CLUSTER), (shape.heads, length, shape.head_dim)
    centres = torch.randn(shape.heads, count, shape.head_dim, generator=generator)
    member = torch.randint(count, (length,), generator=generator)
    rows = centres[:, member] + SPREAD * torch.randn(size, generator=generator)
    return rows[None] / math.sqrt(1 + SPREAD**2)


def _recalls(mechanism: str, length: int, shape: Shape, seed: int) -> tuple[float | None, float | None]:
    """Of all rounds, mean over heads: among rows in clusters, and among unrelated ones."""
    if not ATTENTIONS[mechanism].looks or length > RECALL_LENGTH:
        return None, None
    shape = shape._replace(heads=max(1, min(shape.heads, RECALL_PAIRS // length**2)))
    unrelated = torch.randn(1, shape.heads, length, shape.head_dim, generator=torch.Generator().manual_seed(seed))
    rows = (clusters(length, shape, seed), unrelated)
    return tuple(lsh_recall(x, is_causal=True)[..., -1].mean().item() for x in rows)


def predict(last: Point, length: int) -> Point:
    """A point that was not measured: time by the mechanism's power of the length, memory in proportion to it."""
    ratio = length / last.length
    slower = ratio ** ATTENTIONS[last.mechanism].power

    def grown(x, factor):
        return None if x is None else x * factor

    def size(x):
        return None if x is None else round(x * ratio)

    times = (grown(last.forward_s, slower), grown(last.training_s, slower))
    sizes = (size(last.forward_bytes), size(last.training_bytes))
    return Point(last.mechanism, length, False, times[0], sizes[0], times[1], sizes[1])


def points(
    at: Sequence[int],
    *,
    shape: Shape,
    threads: int,
    seed: int,
    limit_s: float,
    memory: int,
    names: Sequence[str] = MECHANISMS,
    wanted: Wanted = EVERYTHING,
    failed: Callable[[str, int, str], None] | None = None,
) -> Iterator[Point]:
    """Every attention at every length, measured unless it would take more than limit_s or memory bytes.

    What would is predicted from the longest measured length of the same mechanism, and says so in `measured`.
    failed(name, length, reason): called in place of raising WorkerError; longer lengths are left out then.
    """
    last: dict[str, Point] = {}
    names, item = list(names), torch.empty(0, dtype=getattr(torch, shape.dtype)).element_size()
    for length in at:
        inputs = 4 * item * shape.batch * length * shape.heads * shape.head_dim
        for name in list(names):
            guess = predict(last[name], length) if name in last else None
            if guess and (
                guess.forward_s + (guess.training_s or 0) > limit_s
                or max(guess.forward_bytes or 0, guess.training_bytes or 0) + inputs > memory
            ):
                yield guess
                continue
            try:
                last[name] = _measure.call(measure_attention, name, length, shape, threads, seed, wanted)
            except _measure.WorkerError as error:
                if failed is None:
                    raise
                failed(name, length, str(error))
                names.remove(name)
            else:
                yield last[name]


def scores_bytes(length: int, heads: int) -> int:
    """What the float32 scores of softmax attention take when they are written out: 4 n^2 per head."""
    return 4 * heads * length**2


class BreakEven(NamedTuple):
    """The length from which on a mechanism is faster than exact attention, within what was measured.

    length: None if it is nowhere. below: it is faster at the shortest measured length already.
    """

    length: float | None
    below: bool = False


def break_even(at: Sequence[int], exact: Sequence[float], ours: Sequence[float]) -> BreakEven:
    """Where the curves cross for the last time, on straight lines between the points of a log-log plot."""
    gaps = [math.log(e / o) for e, o in zip(exact, ours, strict=True)]  # > 0: ours is faster
    if not gaps or gaps[-1] <= 0:
        return BreakEven(None)
    slower = max((i for i, gap in enumerate(gaps) if gap <= 0), default=None)
    if slower is None:
        return BreakEven(float(at[0]), below=True)
    a, b = slower, slower + 1
    share = gaps[a] / (gaps[a] - gaps[b])
    return BreakEven(math.exp(math.log(at[a]) + share * math.log(at[b] / at[a])))


def break_evens(found: Sequence[Point]) -> dict[str, dict[str, BreakEven]]:
    """{mechanism: {"forward" and "training": BreakEven}} from the lengths where it and exact were both measured."""
    exact = {point.length: point for point in found if point.mechanism == EXACT and point.measured}
    result = {}
    for name in dict.fromkeys(point.mechanism for point in found):
        both = [p for p in found if p.mechanism == name != EXACT and p.measured and p.length in exact]
        for kind in ("forward", "training"):
            times = [(p.length, getattr(exact[p.length], f"{kind}_s"), getattr(p, f"{kind}_s")) for p in both]
            if times and None not in times[0]:
                result.setdefault(name, {})[kind] = break_even(*zip(*times, strict=True))
    return result
