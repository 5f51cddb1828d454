"""What the demo prints: a live table, a progress bar, a summary; plain lines where the output is no terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .._memory import PeakMemory
from . import _table
from ._attentions import Shape
from ._compare import Point, break_evens, scores_bytes
from ._table import PREDICTED
from ._train import Step
from ._units import seconds, size

SHARE_LOGGED = 0.1


def drawn(found: _table.Table) -> Group:
    """For rich."""
    # 80 columns hold the demo's; sentences of its own would be broken at the width of the table
    view = Table(box=SIMPLE_HEAD, padding=0, show_edge=False)
    for i, name in enumerate(found.columns):
        view.add_column(name, justify="left" if i == 1 else "right", no_wrap=True)
    for cells, dim in found.rows:
        view.add_row(*cells, style="dim" if dim else "")
    return Group(Text(found.title), view, *(Text(note, style="dim") for note in found.notes))


class Display:
    """Prints to one console; on a terminal tables and bars move, elsewhere only finished lines appear."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def line(self, text: str = "", style: str = "") -> None:
        # a log keeps its lines whole; a terminal wraps them itself
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def comparison(self, points: list[Point], shape: Shape, **how) -> Iterator:
        """Yields a function to call whenever points has grown. What is there stays printed, also after an exception.

        how: as `_table.table` takes it.
        """

        def view() -> Group:
            return drawn(_table.table(points, shape, **how))

        if not self.console.is_terminal:
            self.line("measuring ...")
            try:
                yield lambda: self.line(_table.line(points[-1], points, shape))
            finally:
                self.console.print(view())
            return
        with Live(view(), console=self.console, auto_refresh=False) as live:
            yield lambda: live.update(view(), refresh=True)

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
    display.line(f"memory   {PeakMemory.method}")
    display.line()


def break_even(display: Display, record) -> None:
    for mechanism, kinds in break_evens(record.points).items():
        for kind, found in kinds.items():
            display.line(_table.break_even_sentence(mechanism, kind, found))
    recall = _table.recall_sentence(record.points)
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
