"""A comparison as text: its table, what it says in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ._attentions import EXACT, Shape
from ._compare import CLUSTER, DEVIATION, BreakEven, Point
from ._units import digits, seconds, size

PREDICTED = "~"


class Table(NamedTuple):
    """rows: cells, and whether they are no measurement. The first two columns are length and name."""

    title: str
    columns: list[str]
    rows: list[tuple[list[str], bool]]
    notes: list[str]

    def text(self) -> str:
        """Without a terminal's means."""
        cells = [self.columns, *(row for row, _ in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(x.ljust(w) if i == 1 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True)))
            for row in cells
        ]
        return "\n".join([self.title, *(line.rstrip() for line in lines), *self.notes])


def table(points: Sequence[Point], shape: Shape, *, spread: bool = False) -> Table:
    """One row for each mechanism and length; what was predicted is marked, what was not asked for has no column."""
    exact = {point.length: point for point in points if point.mechanism == EXACT}

    def cost(point: Point, what: str) -> str:
        value = getattr(point, what)
        if value is None:
            return ""
        return ("" if point.measured else PREDICTED) + (size(value) if what.endswith("bytes") else seconds(value))

    def share(what: str, decimals: int = 0):
        return lambda point: percent(getattr(point, what), decimals)

    def field(what: str):
        return lambda point: cost(point, what)

    columns = [
        ("length", "length", lambda point: f"{point.length:,}" if point.mechanism == EXACT else ""),
        ("attention", "mechanism", lambda point: point.mechanism),
        ("forward", "forward_s", field("forward_s")),
        ("±", "forward_spread", share("forward_spread")),
        ("memory", "forward_bytes", field("forward_bytes")),
        ("+ backward", "training_s", field("training_s")),
        ("±", "training_spread", share("training_spread")),
        ("memory", "training_bytes", field("training_bytes")),
        ("speed-up", "forward_s", lambda point: _speed_up(exact.get(point.length), point)),
        ("error", "error", share("error", 1)),
        ("recall", "recall", share("recall")),
    ]
    shown = [
        (title, show)
        for title, what, show in columns
        if (spread or title != "±") and any(getattr(point, what) is not None for point in points)
    ]
    both = any(point.training_s is not None for point in points)
    notes = [f"Speed-up: of {'forward and backward' if both else 'the forward pass'}, over {EXACT}."]
    if any(point.forward_bytes is not None for point in points):
        notes[0] = f"Memory: beyond the inputs. {notes[0]}"
    if any(point.error is not None for point in points):
        what = f"queries and keys have a standard deviation of {DEVIATION}"
        notes.append(f"Error: of the last queries against exact; {what}.")
    if any(point.recall is not None for point in points):
        notes.append(f"Recall: share of exact attention's mass found, of rows in clusters of {CLUSTER}.")
    if not all(point.measured for point in points):
        notes.insert(0, f"{PREDICTED} not measured: predicted from the longest measured length.")
    return Table(
        title(shape),
        [name for name, _ in shown] or ["length", "attention"],
        [([show(point) for _, show in shown], not point.measured) for point in points],
        notes,
    )


def title(shape: Shape) -> str:
    kind = "Causal attention" if shape.causal else "Attention"
    batch = "" if shape.batch == 1 else f", batch {shape.batch}"
    where = "" if shape.device == "cpu" else f", {shape.device}"
    return f"{kind}, {shape.dtype}, {shape.heads} heads of {shape.head_dim}{batch}{where}"


def line(point: Point, points: Sequence[Point], shape: Shape) -> str:
    """One point, for a log."""
    exact = next((x for x in points if x.mechanism == EXACT and x.length == point.length), None)
    found = [f"n = {point.length:,}", point.mechanism]
    for kind in ("forward", "training"):
        time, memory = (getattr(point, f"{kind}_{unit}") for unit in ("s", "bytes"))
        if time is not None:
            mark = "" if point.measured else PREDICTED
            peak = "" if memory is None else f", {mark}{size(memory)}"
            found.append(f"{'forward' if kind == 'forward' else '+ backward'} {mark}{seconds(time)}{peak}")
    ratio = _speed_up(exact, point)
    return "  ".join(found + ([f"{ratio} exact"] if ratio else []))


def percent(share: float | None, decimals: int = 0) -> str:
    return "" if share is None else f"{100 * share:.{decimals}f} %"


def _speed_up(exact: Point | None, point: Point) -> str:
    if exact is None or point is exact:
        return ""
    return f"{'' if exact.measured and point.measured else PREDICTED}{digits(exact.total_s / point.total_s)}x"


def recall_sentence(points: Sequence[Point]) -> str | None:
    """Of the longest length for which there is a recall."""
    found = [point for point in points if point.recall is not None]
    if not found:
        return None
    at = max(found, key=lambda point: point.length)
    return (
        f"{at.mechanism}, recall at {at.length:,} tokens: {percent(at.recall)} in clusters of {CLUSTER}, "
        f"{percent(at.unrelated_recall)} of unrelated rows, where there is nothing to look for"
    )


def break_even_sentence(mechanism: str, kind: str, found: BreakEven) -> str:
    what = f"{mechanism}, {'forward' if kind == 'forward' else 'forward and backward'}:"
    if found.length is None:
        return f"{what} slower than exact at the longest length measured"
    how = "the shortest measured" if found.below else "where the measured curves cross"
    return f"{what} faster than exact from {found.length:,.0f} tokens on ({how})"
