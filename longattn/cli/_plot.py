"""The demo's picture: time and memory against length, and the loss curve."""

from __future__ import annotations

from collections.abc import Sequence

from ._compare import EXACT, MECHANISMS, Point, Shape, scores_bytes
from ._train import Result, Step

INK, FAINT = "#222222", "#8a8a8a"
COLORS = ("#8a8a8a", "#0b6fb8", "#d1495b", "#2a9d6f", "#b07c10", "#7a4fb0")


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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6), dpi=140, layout="constrained")
    figure.suptitle(title, x=0.008, ha="left", fontsize=12, fontweight="bold", color=INK, parse_math=False)
    time, memory, loss = figure.subplots(1, 3)
    _curves(time, points, "training_s")
    _label(time, "Time of forward and backward")
    _curves(memory, points, "training_bytes")
    _scores(memory, points, shape)
    _label(memory, "Peak memory of the same, beyond the inputs")
    for axis, unit in ((time, "s"), (memory, "B")):
        _lengths(axis, points, unit)
    _loss(loss, steps, result, entropies)
    figure.savefig(path)


def save_curve(path: str, *, title: str, steps: Sequence[Step], entropies: tuple[float, float]) -> None:
    """Bits per byte against steps alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), dpi=140, layout="constrained")
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold", color=INK, parse_math=False)
    _loss(figure.subplots(), steps, None, entropies)
    figure.savefig(path)


def _curves(axis, points: Sequence[Point], field: str) -> None:
    for name, color in zip(MECHANISMS, COLORS, strict=False):
        own = [p for p in points if p.mechanism == name]
        measured = [p for p in own if p.measured]
        # the dashed part starts at the point it was predicted from
        predicted = measured[-1:] + [p for p in own if not p.measured]
        label = "exact (torch)" if name == EXACT else name
        found = [p for p in own if p.recall is not None]
        note = f" (recall {100 * found[-1].recall:.0f} % at {_short(found[-1].length)})" if found else ""
        _draw(axis, measured, field, color=color, marker="o", label=label + note)
        if len(predicted) > 1:
            _draw(axis, predicted, field, color=color, marker="o", mfc="white", ls="--", zorder=1)
            axis.plot([], [], color=color, marker="o", mfc="white", ls="--", label=f"{label}, predicted")


def _draw(axis, points: Sequence[Point], field: str, **style) -> None:
    # nothing measurable does not fit on a log axis
    shown = [(p.length, getattr(p, field)) for p in points if getattr(p, field) > 0]
    axis.plot(*zip(*shown, strict=True) if shown else ([], []), lw=2, ms=5, **style)


def _scores(axis, points: Sequence[Point], shape: Shape) -> None:
    at = sorted({p.length for p in points})
    written_out = [scores_bytes(n, shape.heads) for n in at]
    axis.plot(at, written_out, ls=":", lw=1.5, color=INK, label="n x n scores written out (computed)")


def _lengths(axis, points: Sequence[Point], unit: str) -> None:
    from matplotlib.ticker import EngFormatter

    at = sorted({p.length for p in points})
    axis.set(xscale="log", yscale="log", xlabel="length (tokens)")
    if at:
        axis.set_xticks(at[::-2], [_short(n) for n in at[::-2]])
        axis.yaxis.set_major_formatter(EngFormatter(unit))
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=9)


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
