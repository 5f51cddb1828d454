"""Pictures: time and memory against length, and a loss curve."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from ._attentions import ATTENTIONS, EXACT, Shape
from ._compare import BreakEven, Point, break_evens, scores_bytes
from ._train import Result, Step

INK, FAINT = "#222222", "#8a8a8a"
COLORS = (
    "#8a8a8a", "#0b6fb8", "#d1495b", "#2a9d6f", "#b07c10", "#7a4fb0", "#e07a1f", "#4d9ea8", "#9a5b4f", "#c06bb0",
)  # fmt: skip
# what the demo does not show comes after what it does
ORDER = (EXACT, "linear", "favor", "lsh", *ATTENTIONS)


def save(
    path: str,
    *,
    title: str,
    points: Sequence[Point],
    shape: Shape,
    steps: Sequence[Step],
    result: Result | None,
    entropies: tuple[float, float],
) -> None:
    """Draws what there is; entropies: of single bytes and of pairs, in bits per byte."""
    figure, ((time, memory, loss),) = _figure(title, 1, 3)
    _times(time, points, "training")
    _memory(memory, points, shape, "training")
    _loss(loss, steps, result, entropies)
    figure.savefig(path)


def save_comparison(path: str, *, title: str, points: Sequence[Point], shape: Shape) -> None:
    """Time of what was measured, and memory where it was; both axes logarithmic, break-evens marked."""
    kinds = ["forward"] + ["training"] * any(point.training_s is not None for point in points)
    with_memory = any(point.forward_bytes is not None for point in points)
    figure, axes = _figure(title, 1 + with_memory, len(kinds))
    for i, kind in enumerate(kinds):
        _times(axes[0][i], points, kind)
        if with_memory:
            _memory(axes[1][i], points, shape, kind)
    figure.savefig(path)


def _figure(title: str, rows: int, columns: int):
    """-> the figure, its axes by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14 / 3 * max(columns, 1.5), 4.6 * rows), dpi=140, layout="constrained")
    figure.suptitle(title, x=0.008, ha="left", fontsize=12, fontweight="bold", color=INK, parse_math=False)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_curve(path: str, *, title: str, steps: Sequence[Step], entropies: tuple[float, float]) -> None:
    """Bits per byte against steps alone."""
    figure, ((axis,),) = _figure(title, 1, 1)
    _loss(axis, steps, None, entropies)
    figure.savefig(path)


WHAT = {"forward": "the forward pass", "training": "forward and backward"}


def _times(axis, points: Sequence[Point], kind: str) -> None:
    _curves(axis, points, f"{kind}_s")
    exact = [p for p in points if p.mechanism == EXACT and p.measured]
    for name, kinds in break_evens(points).items():
        if kind in kinds:
            _mark(axis, kinds[kind], exact, f"{kind}_s", _color(name))
    _label(axis, f"Time of {WHAT[kind]}")
    _lengths(axis, points, "s")


def _memory(axis, points: Sequence[Point], shape: Shape, kind: str) -> None:
    _curves(axis, points, f"{kind}_bytes")
    _scores(axis, points, shape)
    _label(axis, f"Peak memory of {WHAT[kind]}")
    _lengths(axis, points, "B")


def _mark(axis, found: BreakEven, exact: Sequence[Point], field: str, color: str) -> None:
    """A ring on the curve of exact attention where another crosses it."""
    if found.length is None or found.below:
        return
    (a, b) = next((a, b) for a, b in itertools.pairwise(exact) if a.length <= found.length <= b.length)
    share = math.log(found.length / a.length) / math.log(b.length / a.length)
    at = getattr(a, field) ** (1 - share) * getattr(b, field) ** share
    axis.plot([found.length], [at], "o", ms=11, mfc="none", mec=color, mew=2, zorder=3)
    offset = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center", "fontsize": 8}
    axis.annotate(f"{found.length:,.0f}", (found.length, at), color=color, **offset)


def _color(name: str) -> str:
    return COLORS[list(dict.fromkeys(ORDER)).index(name) % len(COLORS)]


def _curves(axis, points: Sequence[Point], field: str) -> None:
    for name in dict.fromkeys(point.mechanism for point in points):
        own, color = [p for p in points if p.mechanism == name], _color(name)
        marker = "o" if ATTENTIONS[name].package is None else "s"
        measured = [p for p in own if p.measured]
        # the dashed part starts at the point it was predicted from
        predicted = measured[-1:] + [p for p in own if not p.measured]
        label = "exact (torch)" if name == EXACT else name
        found = [p for p in own if p.recall is not None]
        note = f" (recall {100 * found[-1].recall:.0f} % at {_short(found[-1].length)})" if found else ""
        _draw(axis, measured, field, color=color, marker=marker, label=label + note)
        if len(predicted) > 1:
            style = {"color": color, "marker": marker, "mfc": "white", "ls": "--"}
            _draw(axis, predicted, field, zorder=1, **style)
            axis.plot([], [], label=f"{label}, predicted", **style)


def _draw(axis, points: Sequence[Point], field: str, **style) -> None:
    # nothing measurable does not fit on a log axis
    shown = [(p.length, getattr(p, field)) for p in points if getattr(p, field)]
    axis.plot(*zip(*shown, strict=True) if shown else ([], []), lw=2, ms=5, **style)


def _scores(axis, points: Sequence[Point], shape: Shape) -> None:
    at = sorted({p.length for p in points})
    written_out = [scores_bytes(n, shape.batch * shape.heads) for n in at]
    axis.plot(at, written_out, ls=":", lw=1.5, color=INK, label="n x n scores written out (computed)")


def _lengths(axis, points: Sequence[Point], unit: str) -> None:
    from matplotlib.ticker import EngFormatter

    at = sorted({p.length for p in points})
    axis.set(xscale="log", yscale="log", xlabel="length (tokens)")
    if at:
        axis.set_xticks(at[::-2], [_short(n) for n in at[::-2]])
        axis.yaxis.set_major_formatter(EngFormatter(unit))
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=8)


def _short(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else f"{n:,}"


def _loss(axis, steps: Sequence[Step], result: Result | None, entropies: tuple[float, float]) -> None:
    _label(axis, "Training: bits per byte")
    axis.set(xlabel="step")
    axis.xaxis.get_major_locator().set_params(integer=True)
    for value, name in zip(entropies, ("entropy of single bytes", "entropy of byte pairs"), strict=True):
        axis.axhline(value, color=FAINT, ls="--", lw=1.2)
        axis.annotate(
            f"{name}: {value:.2f}",
            (1, value),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=9,
            color=INK,
            xytext=(0, 2),
            textcoords="offset points",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    if steps:
        axis.plot([s.step for s in steps], [s.bits_per_byte for s in steps], color=COLORS[1], lw=2, label="training")
    if result is not None:
        label = f"held out: {result.held_out_bits:.2f}"
        axis.plot([result.steps], [result.held_out_bits], "D", color=COLORS[2], ms=7, label=label, ls="none")
    if steps:
        axis.legend(frameon=False, fontsize=9, loc="lower left")
    axis.set_ylim(0, 8.2)


def _label(axis, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=11, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, which="major", color="#e6e6e6", lw=0.8)
    axis.set_axisbelow(True)
