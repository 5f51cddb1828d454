"""Draws time and memory against length from a JSON of compare_linear.py, compare_favor.py, compare_lsh.py or gpu.py,
on log-log axes.

    python bench/plot.py bench/results/linear-cpu-avx2-20260101.json [--output FILE.png]

torch's exact attention is the line to beat; the dashed line is the floor: arithmetic and memory traffic at the rates
measured on the same machine (time), the results themselves (memory). Only what was measured is drawn.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
INK, MUTED, GRID = "#1a1a1a", "#6b6b6b", "#e4e4e4"
# colour-blind safe (Okabe and Ito); ours thick and blue, exact attention black, peers thin
STYLES = {
    "longattn": {"color": "#0072b2", "linewidth": 2.6, "marker": "o", "zorder": 5},
    "torch SDPA": {"color": INK, "linewidth": 2.0, "marker": "s", "zorder": 4},
    "fast-transformers": {"color": "#d55e00", "linewidth": 1.3, "marker": "^"},
    "linear-attention-transformer": {"color": "#009e73", "linewidth": 1.3, "marker": "v"},
    "performer-pytorch + C++ product": {"color": "#009e73", "linewidth": 1.3, "marker": "v"},
    "performer-pytorch": {"color": "#cc79a7", "linewidth": 1.3, "marker": "D"},
    "longattn exact": {"color": "#56b4e9", "linewidth": 2.0, "marker": "o", "zorder": 4},
    "Hugging Face": {"color": "#d55e00", "linewidth": 1.3, "marker": "^"},
    "reformer-pytorch": {"color": "#009e73", "linewidth": 1.3, "marker": "v"},
    "torch SDPA, flash": {"color": INK, "linewidth": 2.0, "marker": "s", "zorder": 4},
    "torch SDPA, cuDNN": {"color": "#cc79a7", "linewidth": 1.3, "marker": "D"},
    "torch SDPA, efficient": {"color": INK, "linewidth": 2.0, "marker": "s", "zorder": 4},
}
FLOOR = "floor: the hardware's (time), the results alone (memory)"
NAMES = {"torch SDPA": "exact attention (torch SDPA)", "torch SDPA, flash": "exact attention (torch SDPA, flash)"}


def rows_of(report: dict) -> list[dict]:
    """The rows to draw: the sweep of the CPU, or elu+1 in bfloat16 of the GPU."""
    measured = [row for row in report["rows"] if "median_ms" in row and row["direction"] != "decode"]
    if "device" in report:
        return [row for row in measured if row["feature"] == "elu" and row["dtype"] == "bfloat16"]
    return [row for row in measured if row["group"].startswith("sweep")]


def length_name(n: int) -> str:
    return f"{n >> 20}M" if n >= 1 << 20 else f"{n >> 10}k" if n >= 1024 else str(n)


def seconds_name(ms: float, _=None) -> str:
    return f"{ms / 1e3:g} s" if ms >= 1e3 else f"{ms:g} ms" if ms >= 1 else f"{1e3 * ms:g} us"


def bytes_name(mb: float, _=None) -> str:
    return f"{mb / 1e3:g} GB" if mb >= 1e3 else f"{mb:g} MB" if mb >= 1 else f"{1e3 * mb:g} kB"


def panel(axis, rows: list[dict], value: str, floor: str) -> None:
    for name in [name for name in STYLES if any(row["contender"] == name for row in rows)]:
        points = sorted((row["n"], row[value]) for row in rows if row["contender"] == name and row.get(value, 0) > 0)
        if points:
            axis.plot(*zip(*points, strict=True), label=NAMES.get(name, name), **{"markersize": 4, **STYLES[name]})
    points = sorted({(row["n"], row[floor]) for row in rows if row["contender"] == "longattn"})
    axis.plot(*zip(*points, strict=True), color=MUTED, linewidth=1.4, linestyle=(0, (4, 3)), label=FLOOR, zorder=6)
    axis.set(xscale="log", yscale="log")
    lengths = sorted({row["n"] for row in rows})
    axis.set_xticks(lengths, [length_name(n) for n in lengths])
    axis.minorticks_off()
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(MUTED)
    axis.tick_params(colors=MUTED, labelsize=9)
    axis.yaxis.set_major_formatter(seconds_name if value == "median_ms" else bytes_name)


def draw(report: dict, path: Path) -> None:
    rows = rows_of(report)
    if not rows:
        raise ValueError(f"plot: {path.stem} has no rows of a sweep over lengths; compare with --parts sweep")
    directions = sorted({row["direction"] for row in rows}, key=lambda direction: direction != "forward")
    figure, axes = plt.subplots(2, len(directions), figsize=(6.4 * len(directions), 8.2), squeeze=False, sharex="col")
    for column, direction in enumerate(directions):
        chosen = [row for row in rows if row["direction"] == direction]
        panel(axes[0, column], chosen, "median_ms", "floor_ms")
        panel(axes[1, column], chosen, "peak_mb", "floor_mb")
        axes[0, column].set_title(direction.replace("+", " + "), loc="left", fontsize=11, color=INK)
        axes[1, column].set_xlabel("tokens", color=MUTED, fontsize=9.5)
    for line, what in zip(axes, ("time of one call", "peak memory beyond the inputs"), strict=True):
        line[0].set_ylabel(what, color=MUTED, fontsize=9.5)
        low, high = min(axis.get_ylim()[0] for axis in line), max(axis.get_ylim()[1] for axis in line)
        for axis in line:
            axis.set_ylim(low, high)
    first = rows[0]
    machine = report["machine"]
    device = f"{machine['cpu']} ({', '.join(machine['flags'])}), {report['settings']['threads']} threads"
    if "device" in report:
        device = report["device"]["name"]
    kind = "LSH" if "n_hashes" in first else "linear"
    figure.text(0.015, 0.965, f"Causal {kind} attention against exact attention", fontsize=15, color=INK)
    # peers may have a map of their own: it is ours that is named
    ours = next((row for row in rows if row["contender"] == "longattn"), first)
    feature = f"FAVOR+ M={ours['n_features']}" if ours.get("n_features") else "elu+1"
    if "n_hashes" in ours:
        feature = f"LSH R={ours['n_hashes']}, chunks of {ours['chunk']}"
    detail = f"{device}; {first['dtype']}, B={first['B']}, H={first['H']}, D=E={first['D']}, {feature}; "
    detail += f"torch {report['versions']['torch']}, {report['settings']['date'][:10]}"
    figure.text(0.015, 0.943, detail, fontsize=9.5, color=MUTED)
    handles, names = axes[0, 0].get_legend_handles_labels()
    where = {"loc": "upper left", "bbox_to_anchor": (0.008, 0.935), "ncols": 3}
    figure.legend(handles, names, **where, frameon=False, fontsize=9.5, labelcolor=INK, columnspacing=1.8)
    figure.tight_layout(rect=(0.005, 0, 0.995, 0.875))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--output", type=Path, help="default: bench/plots/ with the report's name")
    options = parser.parse_args()
    try:
        report = json.loads(options.report.read_text())
        output = options.output or HERE / "plots" / f"{options.report.stem}.png"
        draw(report, output)
    except (OSError, ValueError) as error:
        print(f"plot: cannot draw {options.report}: {error}", file=sys.stderr)
        return 2
    print(f"written: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
