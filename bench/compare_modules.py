"""Modules as users hold them, beside torch's: overhead of a layer, an encoder whose attention is replaced, "auto".

    python bench/compare_modules.py --quick             short; to see that everything works
    python bench/compare_modules.py                     half an hour, 8 GB of free memory; quiet machine please
    python bench/compare_modules.py --parts overhead    a part of it

overhead: longattn.nn.MultiheadAttention with exact attention over torch's class, 128 tokens, batch of 8, width 512.
encoder: torch's TransformerEncoder (6 layers, width 512, 8 heads, feed-forward 2048) and the same one after
replace_attention with longattn.LSH(n_hashes=2), 16,384 tokens. auto: MultiheadAttention(mechanism=Auto(LSH)) over
exact attention of the same class, 16 to 65,536 tokens. loading: import longattn over import torch; replace_attention on
twelve layers. Asserts no time; ends with exit code 1 where exact attention's output differs from torch's.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

import _comparison
from _comparison import Run

LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
AGREEMENT = 1e-5


def module_case(n: int, **options):
    from _contenders_modules import Case

    return Case(n, **options)


def check_agreement(names: list[str]) -> list[str]:
    import _contenders_modules as contenders
    import torch

    wrong = []
    for kind in contenders.KINDS:
        case = module_case(100, H=2, D=16, hidden=64, layers=2, kind=kind)
        x = contenders.make_inputs(case)
        made = {name: contenders.build(name, case, x)() for name in ("torch", "longattn exact", "longattn auto")}
        for name, y in made.items():
            error = (y - made["torch"]).abs().max().item()
            if not error < AGREEMENT or not torch.isfinite(y).all():
                wrong.append(f"{name}, {kind}: output is off torch's by {error:.1e}")
    return wrong


def overhead_part(run: Run) -> None:
    how = {"seconds": 1 if run.options.quick else 20, "rounds": (20, 2000), "peak": False}
    for direction in ("forward", "forward+backward"):
        for n in (128,) if run.options.quick else (128, 1024):
            case = module_case(n, B=8, kind="layer", direction=direction)
            rows = run.group(f"overhead of a layer, n={n}, B=8, {direction}", case, ("torch", "longattn exact"), **how)
            share = rows[-1]["median_ms"] / rows[0]["median_ms"]
            run.findings[f"exact attention over torch's class, n={n}, B=8, {direction}"] = round(share, 3)


def encoder_part(run: Run) -> None:
    n, rounds = (1024, (1, 1)) if run.options.quick else (16384, (1, 2))
    for direction in ("forward", "forward+backward"):
        case = module_case(n, direction=direction)
        rows = run.group(f"encoder, n={n}, {direction}", case, ("longattn LSH", "torch"), seconds=0, rounds=rounds)
        share = rows[-1]["median_ms"] / rows[0]["median_ms"]
        run.findings[f"torch's encoder over the replaced one, n={n}, {direction}"] = round(share, 2)


def auto_part(run: Run) -> None:
    """Of `longattn auto` over `longattn exact`: at most 1.03 is the aim at every length."""
    worst = {}
    for direction in ("forward", "forward+backward"):
        # exact attention takes minutes beyond, and "auto" is not exact there any more
        for n in LENGTHS[:8] if run.options.quick else LENGTHS[: 13 if direction == "forward" else 11]:
            case = module_case(n, kind="layer", direction=direction)
            how = {"seconds": 0.5 if run.options.quick else 5, "rounds": (1 if n > 4096 else 7, 3000)}
            names = ("longattn exact", "longattn auto")
            rows = run.group(f"auto, {direction}", case, names, peak=False, **how)
            worst[n, direction] = rows[-1]["median_ms"] / rows[0]["median_ms"]
    n, direction = max(worst, key=worst.get)
    run.findings[f"auto over exact at the worst length, n={n}, {direction}"] = round(worst[n, direction], 3)


def loading_part(run: Run) -> None:
    import _contenders_modules as contenders

    import longattn

    code = "import time, torch; a = time.perf_counter(); import longattn; print(time.perf_counter() - a)"
    # as an installed package, whose bytecode is kept
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command, times = [sys.executable, "-c", code], 3 if run.options.quick else 9
    took = [float(subprocess.check_output(command, env=environment)) for _ in range(times)]
    run.findings["ms of import longattn after import torch, median"] = round(1e3 * statistics.median(took), 1)
    model, took = contenders.model_of("torch", module_case(128, layers=12)), []
    for _ in range(3):
        start = time.perf_counter()
        longattn.replace_attention(model, longattn.LSH(n_hashes=2), report=False)
        took.append(time.perf_counter() - start)
        longattn.restore_attention(model)
    run.findings["s of replace_attention on 12 layers, slowest of three"] = round(max(took), 3)


SCRIPT = _comparison.Script(
    file=__file__,
    doc=__doc__,
    subject="modules",
    parts={"overhead": overhead_part, "encoder": encoder_part, "auto": auto_part, "loading": loading_part},
    agree=check_agreement,
    thp=(),
    contenders="_contenders_modules",
)

if __name__ == "__main__":
    _comparison.main(SCRIPT)
