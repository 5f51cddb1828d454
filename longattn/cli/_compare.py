"""Attention mechanisms side by side at growing lengths: what is measured, what is predicted, where they break even."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..favor import Favor
from ..lsh import lsh_recall
from ..ops.linear import linear_attention
from ..ops.lsh import lsh_attention
from ..ops.softmax import softmax_attention
from . import _measure


class Mechanism(NamedTuple):
    """attend(q, k, v) on `[B, H, L, D]`, the power of the length by which its time grows, whether it is meant to give
    what exact attention gives, and whether it looks for the keys that matter, so that there is a recall."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    power: int
    estimates: bool = False
    looks: bool = False


@functools.cache
def _favor(head_dim: int) -> Favor:
    return Favor(head_dim, FEATURES, exact_diagonal=True)


def _attend_favor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return linear_attention(q, k, v, feature_map=_favor(q.shape[3]), is_causal=True)


def _attend_lsh(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # the Reformer's: queries are keys too, so k is left unread
    return lsh_attention(q, None, v, is_causal=True)


# the first is what the others are held against; a new mechanism is one line
MECHANISMS = {
    "exact": Mechanism(functools.partial(softmax_attention, is_causal=True, impl="torch"), 2),
    "linear": Mechanism(functools.partial(linear_attention, is_causal=True), 1),
    "favor": Mechanism(_attend_favor, 1, estimates=True),
    "lsh": Mechanism(_attend_lsh, 1, looks=True),
}
EXACT = "exact"
FEATURES = 256
# of queries and keys: random features follow the softmax at such norms, and at norms of 1 they are noise
DEVIATION = 0.4
# the error is that of the last queries, which see all keys
JUDGED = 64
# recall compares all pairs: up to this length, of so many heads as keep the pairs this few
RECALL_LENGTH, RECALL_PAIRS = 2048, 1 << 22
# tokens that look for each other, and how far they are from what they have in common, which is of unit variance
CLUSTER, SPREAD = 64, 0.25


class Shape(NamedTuple):
    """Of one attention call, beside its length; batch 1, float32, causal."""

    heads: int = 8
    head_dim: int = 64


@dataclasses.dataclass(frozen=True)
class Point:
    """One mechanism at one length. Training is forward and backward. Bytes are beyond the inputs.

    error: of the last queries against exact attention, |output - exact| / |exact|; None for exact itself, for a
    mechanism that does not estimate it, and for points that were not measured.
    """

    mechanism: str
    length: int
    measured: bool
    forward_s: float
    forward_bytes: int
    training_s: float
    training_bytes: int
    error: float | None = None
    recall: float | None = None
    unrelated_recall: float | None = None


def lengths(longest: int, shortest: int = 128) -> list[int]:
    """Halves of the longest length down to the shortest, growing; the longest alone if it is shorter."""
    found = [longest]
    while found[0] // 2 >= shortest:
        found.insert(0, found[0] // 2)
    return found


def measure_attention(mechanism: str, length: int, shape: Shape, threads: int, seed: int) -> Iterator[Point]:
    """Runs in a fresh process."""
    torch.set_num_threads(threads)
    attend = MECHANISMS[mechanism].attend
    generator = torch.Generator().manual_seed(seed)
    size = (1, shape.heads, length, shape.head_dim)
    q, k, v, grad = (torch.randn(size, generator=generator) for _ in range(4))
    q *= DEVIATION
    k *= DEVIATION

    def forward(n: int | None = None) -> Tensor:
        with torch.no_grad():
            return attend(*(x[:, :, :n] for x in (q, k, v)))

    def training(n: int | None = None) -> tuple[Tensor, ...]:
        inputs = [x[:, :, :n].detach().requires_grad_() for x in (q, k, v)]
        output = attend(*inputs)
        # a mechanism of shared queries and keys has no gradient of k
        return output, *torch.autograd.grad(output, inputs, grad[:, :, :n], allow_unused=True)

    # libraries load and threads start on the first call, which is no cost of the mechanism
    for warm in (forward, training):
        warm(min(length, 128))
    costs = *_measure.sample(forward), *_measure.sample(training)
    yield Point(mechanism, length, True, *costs, _error(mechanism, q, k, v), *_recalls(mechanism, length, shape, seed))


def _error(mechanism: str, q: Tensor, k: Tensor, v: Tensor) -> float | None:
    if not MECHANISMS[mechanism].estimates:
        return None
    with torch.no_grad():
        output = MECHANISMS[mechanism].attend(q, k, v)[:, :, -JUDGED:]
        n, rows = k.shape[2], output.shape[2]
        hidden = torch.ones(rows, n, dtype=torch.bool).triu(n - rows + 1)                      # [rows, n]
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
    if not MECHANISMS[mechanism].looks or length > RECALL_LENGTH:
        return None, None
    shape = shape._replace(heads=max(1, min(shape.heads, RECALL_PAIRS // length**2)))
    unrelated = torch.randn(1, shape.heads, length, shape.head_dim, generator=torch.Generator().manual_seed(seed))
    rows = (clusters(length, shape, seed), unrelated)
    return tuple(lsh_recall(x, is_causal=True)[..., -1].mean().item() for x in rows)


def predict(last: Point, length: int) -> Point:
    """A point that was not measured: time by the mechanism's power of the length, memory in proportion to it."""
    ratio = length / last.length
    slower = ratio ** MECHANISMS[last.mechanism].power
    return Point(
        last.mechanism,
        length,
        False,
        last.forward_s * slower,
        round(last.forward_bytes * ratio),
        last.training_s * slower,
        round(last.training_bytes * ratio),
    )


def points(at: Sequence[int], *, shape: Shape, threads: int, seed: int, limit_s: float, memory: int) -> Iterator[Point]:
    """Every mechanism at every length, measured unless it would take more than limit_s or memory bytes.

    What would is predicted from the longest measured length of the same mechanism, and says so in `measured`.
    """
    last: dict[str, Point] = {}
    for length in at:
        inputs = 4 * 4 * length * shape.heads * shape.head_dim
        for name in MECHANISMS:
            guess = predict(last[name], length) if name in last else None
            if guess and (guess.forward_s + guess.training_s > limit_s or guess.training_bytes + inputs > memory):
                yield guess
                continue
            last[name] = _measure.call(measure_attention, name, length, shape, threads, seed)
            yield last[name]


def scores_bytes(length: int, heads: int) -> int:
    """What the float32 scores of softmax attention take when they are written out: 4 n^2 per head."""
    return 4 * heads * length * length


@dataclasses.dataclass(frozen=True)
class BreakEven:
    """From which length on a mechanism is faster than exact attention.

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
    for name in MECHANISMS:
        both = [p for p in found if p.mechanism == name != EXACT and p.measured and p.length in exact]
        if both:
            at = [p.length for p in both]
            result[name] = {
                kind: break_even(
                    at,
                    [getattr(exact[n], f"{kind}_s") for n in at],
                    [getattr(p, f"{kind}_s") for p in both],
                )
                for kind in ("forward", "training")
            }
    return result
