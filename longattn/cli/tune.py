"""`longattn tune`: from which length on each mechanism is faster than exact attention on this machine."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import datetime
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..favor import Favor
from ..nn.auto import EXACT, Row, read, users_table, write
from ..nn.mechanisms import NAMED, Linear, Mechanism, resolve
from . import _arguments
from ._text import InputError

DEFAULT = ("lsh", "lsh:n_hashes=1", "linear", "favor", "local")
# lengths are multiples of this, from the shortest on
GRAIN, SHORTEST = 16, 64
# of two lengths that enclose a break-even; of a length that must win too, so that a lucky one does not count
CLOSE, BEYOND = 1.04, 1.5
# calls of each side of a comparison, and the share of exact attention's time that counts as no slower
REPEATS, FASTER = (3, 40), 1.0
DTYPES = ("float32", "bfloat16", "float16", "float64")


class Case(NamedTuple):
    """One row to be measured."""

    name: str
    head_dim: int
    is_causal: bool

    @property
    def mechanism(self) -> Mechanism:
        return described(self.name, self.head_dim)

    def __str__(self) -> str:
        return f"{self.name}, head_dim {self.head_dim}{', causal' if self.is_causal else ''}"


@dataclasses.dataclass(frozen=True)
class Settings:
    cases: tuple[Case, ...]
    dtype: str
    device: str
    heads: int
    longest: int
    seconds: float
    threads: int
    output: Path


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "tune",
        help="from which length on each mechanism is faster than exact attention here",
        description="Measures break-even lengths with exact attention, for mechanism='auto', and keeps them in this "
        "user's cache directory, where they go before those of the package. A mechanism has broken even where neither "
        "a forward pass nor a training step takes longer than exact attention's; calls of both take turns.",
        epilog="examples:\n  longattn tune\n  longattn tune lsh lsh:n_hashes=2 favor:n_features=128 --head-dim 64,128",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # numbers stay text here: run() says in one sentence what is wrong with them
    names = ", ".join([*(name for name in NAMED if name not in ("exact", "auto")), "favor"])
    parser.add_argument(
        "mechanisms", nargs="*", metavar="NAME[:field=value,..]", help=f"{names} (default: {' '.join(DEFAULT)})"
    )
    parser.add_argument("--head-dim", metavar="NS", default="64,128", help="(default: %(default)s)")
    parser.add_argument("--causal", default="both", help="yes, no or both (default: both)")
    parser.add_argument("--dtype", default="float32", help=f"{', '.join(DTYPES)} (default: float32)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--heads", metavar="N", default="8", help="(default: 8)")
    parser.add_argument("--longest", metavar="N", default="16384", help="tokens to look up to (default: %(default)s)")
    parser.add_argument("--seconds", metavar="S", default="0.5", help="for each comparison (default: %(default)s)")
    parser.add_argument("--threads", metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--output", metavar="FILE", help=f"(default: {users_table()})")


# what the user asked for


def described(name: str, head_dim: int) -> Mechanism:
    """From `name` or `name:field=value,..`; InputError in a sentence."""
    kind, _, fields = name.partition(":")
    if kind in ("exact", "auto"):
        raise InputError(f"{kind!r} is what mechanisms are held against; name another")
    try:
        given = {
            word.arg: ast.literal_eval(word.value) for word in ast.parse(f"f({fields})", mode="eval").body.keywords
        }
        if kind == "favor":
            return Linear(Favor(head_dim, **given))
        return dataclasses.replace(resolve(kind, head_dim), **given)
    except (ValueError, TypeError, SyntaxError, AttributeError) as error:
        raise InputError(f"{name!r} describes no mechanism: {error}") from None


def _settings(args) -> Settings:
    device = _arguments.choice("--device", args.device, ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda needs a GPU, and torch finds none; pass --device cpu")
    causal = {"yes": (True,), "no": (False,), "both": (False, True)}
    asked = causal[_arguments.choice("--causal", args.causal, tuple(causal))]
    head_dims = [_arguments.integer("--head-dim", given, 1, 1 << 12) for given in args.head_dim.split(",")]
    cases = [Case(name, d, c) for name in args.mechanisms or DEFAULT for d in head_dims for c in asked]
    for case in cases:
        if case.mechanism.work(False) is None:
            raise InputError(f"{case.name!r} has no measure of its work, so no row can be kept for it")
    output = users_table() if args.output is None else Path(_arguments.writable("--output", args.output))
    try:
        # rows go beside those that are there
        read(output)
    except ValueError as error:
        raise InputError(str(error)) from None
    return Settings(
        cases=tuple(dict.fromkeys(cases)),
        dtype=_arguments.choice("--dtype", args.dtype, DTYPES),
        device=device,
        heads=_arguments.integer("--heads", args.heads, 1, 1 << 12),
        longest=_arguments.integer("--longest", args.longest, SHORTEST, 1 << 24),
        seconds=_arguments.positive("--seconds", args.seconds, "number of seconds"),
        threads=_arguments.threads(args.threads),
        output=output,
    )


# measuring


def _calls(mechanism: Mechanism, case: Case, settings: Settings, n: int) -> tuple[Callable, Callable]:
    """A forward pass and a training step of `mechanism` on n tokens."""
    generator = torch.Generator().manual_seed(n)
    # as projections leave them
    shape = (1, n, settings.heads, case.head_dim)
    dtype = getattr(torch, settings.dtype)
    drawn = [torch.randn(shape, generator=generator).to(settings.device, dtype).transpose(1, 2) for _ in range(4)]
    *inputs, grad = drawn
    masks = {"is_causal": case.is_causal, "key_padding_mask": None, "dropout_p": 0.0}

    def forward() -> Tensor:
        with torch.no_grad():
            return mechanism.attend(*inputs, **masks)

    def training() -> tuple:
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(mechanism.attend(*leaves, **masks), leaves, grad)

    return forward, training


def _seconds(function: Callable, device: str) -> float:
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _ratio(ours: Callable, exact: Callable, settings: Settings) -> float:
    """Median of the times of `ours` over those of `exact`, which take turns."""
    ratios, began = [], time.perf_counter()
    for turn in range(REPEATS[1] + 1):
        pair = (ours, exact) if turn % 2 else (exact, ours)
        found = [_seconds(function, settings.device) for function in pair]
        # the first pair warms up
        if turn:
            ratios.append(found[0] / found[1] if turn % 2 else found[1] / found[0])
        if len(ratios) >= REPEATS[0] and time.perf_counter() - began > settings.seconds:
            break
    return statistics.median(ratios)


def compare(case: Case, settings: Settings, n: int) -> float:
    """The time of a mechanism over exact attention's at n tokens: of a forward pass or a training step, whichever is
    worse for it."""
    own = case.mechanism.submodules(settings.heads)
    mechanism = case.mechanism.with_submodules({name: module.to(settings.device) for name, module in own.items()})
    pairs = zip(_calls(mechanism, case, settings, n), _calls(EXACT, case, settings, n), strict=True)
    return max(_ratio(ours, exact, settings) for ours, exact in pairs)


def search(slower: Callable[[int], bool], longest: int) -> int | None:
    """The first length, to a few percent, from which on a mechanism is not slower; None: not up to `longest`.

    slower: of a length. Doubles the length until it is not, halves the gap by bisection, and looks a little beyond.
    """

    def grain(n: float) -> int:
        return min(max(round(n / GRAIN) * GRAIN, SHORTEST), longest)

    low, n = 0, SHORTEST
    while True:
        while slower(n):
            if n >= longest:
                return None
            low, n = n, grain(2 * n)
        high = n
        while low and high / low > CLOSE and grain(math.sqrt(low * high)) not in (low, high):
            middle = grain(math.sqrt(low * high))
            low, high = (middle, high) if slower(middle) else (low, middle)
        low = grain(high * BEYOND)
        if low <= high or not slower(low):
            return high
        # it won by luck, or where the mechanism does less: on from there
        n = grain(2 * low)


def measure(settings: Settings, tell: Callable[[str], None]) -> Iterator[tuple[Case, Row]]:
    for case in settings.cases:
        known: dict[int, float] = {}

        def slower(n: int, case=case, known=known) -> bool:
            if n not in known:
                known[n] = compare(case, settings, n)
                tell(f"{case}: {known[n]:.2f}x the time of exact at {n:,} tokens")
            return known[n] > FASTER

        kind, work = case.mechanism.work(case.is_causal)
        length = search(slower, settings.longest)
        yield (
            case,
            Row(settings.device, kind, case.head_dim, case.is_causal, settings.dtype, work, length, settings.longest),
        )


# showing


def result(case: Case, row: Row) -> str:
    found = f"not up to {row.limit:,} tokens" if row.length is None else f"from {row.length:,} tokens on"
    return f"{case!s:<40} {found}"


@contextlib.contextmanager
def _display(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """-> says what is measured now, and what was found; a live line where rich is there and the output a terminal."""
    if not sys.stdout.isatty():
        yield lambda text: None, lambda text: print(text, flush=True)
        return
    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda text: print(f"  {text}", flush=True), lambda text: print(text, flush=True)
        return
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns) as progress:
        task = progress.add_task("", total=total)

        def found(text: str) -> None:
            progress.console.print(text, markup=False, highlight=False)
            progress.advance(task)

        yield lambda text: progress.update(task, description=text), found


def _about(settings: Settings) -> dict:
    from .doctor import report

    facts = report()
    gpus = [gpu["name"] for gpu in facts["gpus"]] if settings.device == "cuda" else []
    return {
        "machine": gpus[0] if gpus else facts["cpu"]["model"],
        "isa": facts["cpu"]["isa"],
        "threads": settings.threads,
        "heads": settings.heads,
        "torch": facts["versions"]["torch"],
        "longattn": facts["versions"]["longattn"],
        "date": datetime.date.today().isoformat(),
    }


def run(args) -> int:
    try:
        settings = _settings(args)
    except InputError as error:
        print(f"longattn tune: {error}", file=sys.stderr)
        return 2
    kept, about = torch.get_num_threads(), _about(settings)
    torch.set_num_threads(settings.threads)
    print(f"faster than exact attention ({settings.dtype}, {settings.heads} heads, {settings.device}):")
    try:
        with _display(len(settings.cases)) as (tell, found):
            for case, row in measure(settings, tell):
                # each as it comes, so that an interruption keeps what was measured
                write(settings.output, [row], about)
                found(result(case, row))
    except OSError as error:
        print(f"longattn tune: {settings.output} cannot be written: {error.strerror or error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(kept)
    print(f"mechanism='auto' goes by {settings.output}")
    return 0
