"""What the demo prints: a live table, a progress bar, a summary; plain lines where the output is no terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import _measure
from ._compare import CLUSTER, DEVIATION, EXACT, BreakEven, Point, Shape, break_evens, scores_bytes
from ._train import Step
from ._units import digits, seconds, size

PREDICTED = "~"
SHARE_LOGGED = 0.1


def table(points: Sequence[Point], shape: Shape) -> Table:
    """One row for each mechanism and length; what was predicted is marked."""
    notes = [
        "Memory: beyond the inputs. Speed-up: of forward and backward.",
        f"Error: of the last queries against exact; queries and keys have a standard deviation of {DEVIATION}.",
        f"Recall: share of exact attention's mass found, of rows in clusters of {CLUSTER}.",
    ]
    if not all(point.measured for point in points):
        notes.insert(0, f"{PREDICTED} not measured: predicted from the longest measured length.")
    view = Table(
        box=SIMPLE_HEAD,
        # 80 columns hold it all
        padding=0,
        show_edge=False,
        title=f"Causal attention, float32, {shape.heads} heads of {shape.head_dim}",
        title_justify="left",
        caption="\n".join(notes),
        caption_justify="left",
    )
    view.add_column("length", justify="right", no_wrap=True)
    view.add_column("attention", no_wrap=True)
    for name in ("forward", "memory", "+ backward", "memory", "speed-up", "error", "recall"):
        view.add_column(name, justify="right", no_wrap=True)
    exact = {point.length: point for point in points if point.mechanism == EXACT}
    for point in points:
        mark, style = ("", "") if point.measured else (PREDICTED, "dim")
        costs = (seconds(point.forward_s), size(point.forward_bytes))
        costs += (seconds(point.training_s), size(point.training_bytes))
        length = f"{point.length:,}" if point.mechanism == EXACT else ""
        row = (length, point.mechanism, *(mark + cost for cost in costs), _speed_up(exact[point.length], point))
        row += (_percent(point.error, 1), _percent(point.recall))
        view.add_row(*row, style=style)
    return view


def _percent(share: float | None, decimals: int = 0) -> str:
    return "" if share is None else f"{100 * share:.{decimals}f} %"


def _speed_up(exact: Point, point: Point) -> str:
    if point is exact:
        return ""
    return f"{'' if exact.measured and point.measured else PREDICTED}{digits(exact.training_s / point.training_s)}x"


def recall_sentence(points: Sequence[Point]) -> str | None:
    """Of the longest length for which there is a recall."""
    found = [point for point in points if point.recall is not None]
    if not found:
        return None
    at = max(found, key=lambda point: point.length)
    return (
        f"{at.mechanism}, recall at {at.length:,} tokens: {_percent(at.recall)} in clusters of {CLUSTER}, "
        f"{_percent(at.unrelated_recall)} of unrelated rows, where there is nothing to look for"
    )


def break_even_sentence(mechanism: str, kind: str, found: BreakEven) -> str:
    what = f"{mechanism}, {'forward' if kind == 'forward' else 'forward and backward'}:"
    if found.length is None:
        return f"{what} slower than exact at the longest length measured"
    how = "the shortest measured" if found.below else "where the measured curves cross"
    return f"{what} faster than exact from {found.length:,.0f} tokens on ({how})"


class Display:
    """Prints to one console; on a terminal tables and bars move, elsewhere only finished lines appear."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def line(self, text: str = "", style: str = "") -> None:
        # a log keeps its lines whole; a terminal wraps them itself
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def comparison(self, points: list[Point], shape: Shape) -> Iterator:
        """Yields a function to call whenever points has grown. What is there stays printed, also after an exception."""
        if not self.console.is_terminal:
            self.line("measuring ...")
            try:
                yield lambda: None
            finally:
                self.console.print(table(points, shape))
            return
        with Live(table(points, shape), console=self.console, auto_refresh=False) as live:
            yield lambda: live.update(table(points, shape), refresh=True)

    @contextlib.contextmanager
    def training(self, length: int, note: Callable[[], str] = str) -> Iterator:
        """Yields a function to call with each Step. length: bytes of a step. note: what else to say beside it."""
        if not self.console.is_terminal:
            logged = 0.0

            def log(step: Step) -> None:
                nonlocal logged
                if step.step == 1 or step.done >= min(1.0, logged + SHARE_LOGGED):
                    logged = step.done
                    self.line(f"step {step.step:>4}  {step.seconds:6.1f} s  {_progress_text(step, length)}{note()}")

            yield log
            return
        columns = (TextColumn("training"), BarColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task("", total=1.0, text="")
            yield lambda step: progress.update(
                task, completed=step.done, text=f"step {step.step}, {_progress_text(step, length)}{note()}"
            )


def _progress_text(step: Step, length: int) -> str:
    return f"{step.bits_per_byte:.3f} bits per byte, {step.step * length / step.seconds:,.0f} bytes/s"


# the story around them; record is a demo.Record


def header(display: Display, record) -> None:
    text, settings = record.text, record.settings
    low, pairs = record.entropies
    display.line(f"text     {text.name}, {len(text.data):,} bytes; the last tenth is held out")
    display.line(f"entropy  {low:.3f} bits per byte of single bytes (the line to beat), {pairs:.3f} of pairs")
    display.line(f"engine   linear attention on {record.engine}, {settings.threads} threads")
    display.line(f"memory   {_measure.PeakMemory.method}")
    display.line()


def break_even(display: Display, record) -> None:
    for mechanism, kinds in break_evens(record.points).items():
        for kind, found in kinds.items():
            display.line(break_even_sentence(mechanism, kind, found))
    recall = recall_sentence(record.points)
    if recall is not None:
        display.line(recall)
    plan = record.plan
    display.line()
    display.line(
        f"Training: {plan.layers} layers of linear attention, {plan.heads} heads of {plan.shape.head_dim}, "
        f"sequences of {plan.length:,} bytes"
    )


def summary(display: Display, record) -> None:
    result, plan, exact = record.result, record.plan, record.exact_in_model
    low, pairs = record.held_out_entropies
    steps = f"{result.steps} steps of {seconds(result.seconds / result.steps)}"
    guessed = "" if exact.measured else PREDICTED
    attention = f"{guessed}{seconds(plan.layers * exact.training_s)} of each step" + (
        "" if exact.measured else f" (predicted from {record.exact_measured_at:,} bytes)"
    )
    scores = f"4 bytes x {plan.heads} heads x {plan.length:,}^2 = {size(scores_bytes(plan.length, plan.heads))}"
    display.line()
    display.line(f"held out {result.held_out_bits:.3f} bits per byte, {result.held_out_bytes:,} bytes", style="bold")
    display.line(f"         to beat: {low:.3f}, the entropy of its single bytes; pairs: {pairs:.3f}")
    display.line(f"speed    {steps}, {result.tokens_per_s:,.0f} bytes/s, {result.parameters:,} parameters")
    display.line(f"         exact attention of torch alone would take {attention}")
    display.line(f"memory   {size(result.peak_bytes)} at the peak of training: activations, gradients, optimizer")
    display.line(f"         softmax written out: {scores} of scores per layer")
    display.line(f"         torch's fused softmax writes none: {guessed}{size(exact.training_bytes)} per layer")
