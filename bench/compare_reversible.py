"""Reversible layers beside plain autograd, torch's checkpoint and other packages: one process, in turns, same weights.

    python bench/compare_reversible.py --quick             short and shallow; to see that everything works
    python bench/compare_reversible.py                     the whole, quiet machine please
    python bench/compare_reversible.py --parts depth       memory against depth alone

A training step (forward and backward) of 12 layers, width 256, feed-forward 1024, at 4096 tokens, with torch's softmax
attention and with longattn's linear attention, which leaves less to hide behind. Prints time, its ratio to plain
autograd, the floor of the arithmetic, and the growth of memory in the step, which includes the gradients of the
parameters. It asserts no time; it ends with exit code 1, before any timing, where gradients differ.
"""

from __future__ import annotations

import _comparison
from _comparison import Run

# float32 sums in another order, through six layers
AGREEMENT = 1e-4
OTHERS = ("checkpoint", "reformer-pytorch", "revlib", "memcnn")
NAMES = ("plain", "longattn", "longattn chunked", "longattn exact", *OTHERS)
DEPTHS = (6, 12, 24)


def stack_case(n: int, **options):
    from _contenders_reversible import Case

    return Case(n, **options)


def check_agreement(names: list[str]) -> list[str]:
    """Output and gradients of every contender from those of plain autograd in float64."""
    import _contenders_reversible as contenders
    import torch

    wrong = []
    case = stack_case(100, H=2, D=16, hidden=64, layers=6)
    x = contenders.make_inputs(case)
    expected = contenders.gradients("plain", case, x.detach().double().requires_grad_())
    for name in names:
        # the grid is coarser than float32
        tolerance = 1e-2 if name == "longattn exact" else AGREEMENT
        found = contenders.gradients(name, case, x)
        pairs = zip(found, expected, strict=True)
        error = max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)
        if not error < tolerance or not all(torch.isfinite(a).all() for a in found):
            wrong.append(f"{name}: output and gradients are off by {error:.1e}")
    return wrong


def how(run: Run) -> dict:
    return {"seconds": 0, "rounds": (2, 2)} if run.options.quick else {"seconds": 30, "rounds": (2, 7)}


def table_part(run: Run) -> None:
    n, layers = (1024, 3) if run.options.quick else (4096, 12)
    for attention in ("softmax", "linear"):
        case = stack_case(n, layers=layers, attention=attention)
        title = f"step of {layers} layers, {attention} attention, n={n}"
        rows = {row["label"]: row for row in run.group(title, case, NAMES, **how(run))}
        others = [row["peak_mb"] for label, row in rows.items() if "longattn" not in label and "peak_mb" in row]
        if others and "peak_mb" in rows["longattn chunked"]:
            share = rows["longattn chunked"]["peak_mb"] / min(others)
            run.findings[f"memory with chunks over the least of the others, {attention} attention"] = round(share, 3)


def depth_part(run: Run) -> None:
    """Growth of memory for each layer more, without the gradients of its parameters, in activations [n, D]."""
    n, depths = (1024, (2, 4)) if run.options.quick else (4096, DEPTHS)
    for name in NAMES:
        peaks = []
        for layers in depths:
            case = stack_case(n, layers=layers, attention="linear")
            added = run.group(f"depth, {name}", case, [name], seconds=0, rounds=(1, 1))
            peaks += [(layers, row["peak_mb"]) for row in added if "peak_mb" in row]
            for row in added:
                row["ratio"] = None
        if len(peaks) > 1:
            (few, low), (many, high) = peaks[0], peaks[-1]
            each = (high - low) / (many - few) - case.shape.parameter_bytes / case.layers / 1e6
            share = each / (4e-6 * n * case.H * case.D)
            run.findings[f"activations kept for a layer more, {name}"] = round(share, 3)


SCRIPT = _comparison.Script(
    file=__file__,
    doc=__doc__,
    subject="reversible",
    parts={"table": table_part, "depth": depth_part},
    agree=check_agreement,
    thp=(),
    contenders="_contenders_reversible",
)

if __name__ == "__main__":
    _comparison.main(SCRIPT)
