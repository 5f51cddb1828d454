"""`longattn memory`: what a training step of a Reformer will hold in memory, by part, and what it held."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import _arguments, _model, require
from ._text import InputError

# bytes; what is freed above this leaves the process, so that its peak is what it needs and not what the heap keeps
MAPPED = 1 << 18
M_MMAP_THRESHOLD = -3
WARM_UP_LENGTH = 256
NAMES = {
    "parameters": "parameters",
    "optimiser": "optimiser",
    "gradients": "gradients",
    "streams": "streams and their gradients",
    "kept": "activations kept of layers",
    "attention": "attention's bookkeeping",
    "block": "activations of one block",
    "loss": "loss",
}


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "memory",
        help="what a training step of a Reformer needs",
        description="Predicts the peak memory of one step of `longattn train` on a CPU, by part, at its fullest "
        "moments: in the backward pass of a layer's attention and of its feed-forward layer, in the loss, and in the "
        "optimiser. Counts what tensors hold; python and torch themselves come on top.",
    )
    _model.add_options(parser)
    parser.add_argument("--measure", action="store_true", help="run one step in a fresh process, and compare")
    parser.add_argument("--json", metavar="FILE", help="all of it as JSON, in bytes")


# what was measured


def measured(settings: dict, threads: int, scratch: int) -> Iterator[int]:
    """Yields the bytes by which the resident memory of a training step exceeds that of this process with torch warm.

    Parameters, gradients and optimiser are among them.
    """
    import torch

    from .. import native
    from .._memory import PeakMemory

    torch.set_num_threads(threads)
    if sys.platform == "linux":
        # another libc than glibc has no such call
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED)
    warm = min(settings["length"], WARM_UP_LENGTH)
    layers = len(settings["mechanisms"].split(","))
    _steps(settings | {"length": warm, "batch": 1, "layers": layers}, [warm], scratch)
    # the kernels' scratch is part of what a step needs
    native._scratch.held = None
    gc.collect()
    with PeakMemory() as peak:
        # the first gives the optimiser its state, as in all steps but the first of a training
        _steps(settings, [warm, settings["length"]], scratch)
    yield peak.bytes


def _steps(settings: dict, lengths: Sequence[int], scratch: int) -> None:
    import torch

    from .. import native
    from . import _training

    model = _training.Reformer(_model.config(settings)).train()
    optimizer = _training.make_optimizer(model, 1e-3)
    generator = torch.Generator().manual_seed(settings["seed"])
    for length in lengths:
        window = torch.randint(256, (settings["batch"], length + 1), generator=generator, dtype=torch.uint8)
        _training.backward(model, window, settings["dtype"])
        torch.nn.utils.clip_grad_norm_(model.parameters(), _training.LARGEST_NORM)
        optimizer.step()
        optimizer.zero_grad()
        # the kernels keep what a whole step before has made them take
        native.workspace(scratch).zero_()


# what is said


def _document(settings: dict, threads: int, budget, found: int | None) -> dict:
    import torch

    import longattn

    moments, peak = budget.moments(), budget.peak()
    return {
        "longattn": longattn.__version__,
        "torch": torch.__version__,
        "threads": threads,
        "settings": settings,
        "parameters": budget.parameters,
        "peak": {"moment": peak.name, "bytes": peak.total, "parts": peak.parts},
        "moments": {moment.name: {"bytes": moment.total, "parts": moment.parts} for moment in moments},
        "measured_bytes": found,
        "predicted_to_measured": None if not found else peak.total / found,
    }


def _table(budget):
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from . import _units

    moments, peak = budget.moments(), budget.peak()
    view = Table(box=SIMPLE_HEAD, padding=0, show_edge=False, show_footer=True)
    view.add_column("predicted, at the fullest of", "in all", no_wrap=True)
    for moment in moments:
        style = "bold" if moment.name == peak.name else "dim"
        total = _units.size(moment.total)
        view.add_column(moment.name, total, justify="right", no_wrap=True, style=style, footer_style=style)
    for part, name in NAMES.items():
        sizes = [moment.parts[part] for moment in moments]
        if any(sizes):
            view.add_row(name, *(_units.size(x) if x else "" for x in sizes))
    return view


def _header(settings: dict, budget, display) -> None:
    x = settings
    kind = "reversible layers" if x["reversible"] else "layers"
    what = f"{x['layers']} {kind}, {x['mechanisms']}, dim {x['dim']}, {budget.parameters:,} parameters"
    display.line(f"model    {what}")
    display.line(f"step     {x['batch']} x {x['length']:,} bytes, {x['dtype']}, Adam")
    display.line()


# what happens


def run(args) -> int:
    require("memory", "rich", "psutil")
    from rich.console import Console

    from .. import native
    from . import _budget, _measure, _show, _units

    try:
        settings = _model.DEFAULTS | _model.values(args)
        config = _model.config(settings)
        threads = _arguments.threads(args.threads)
        path = None if args.json is None else _arguments.writable("--json", args.json)
    except InputError as error:
        return _fail(error, 2)
    if native.missing() is not None:
        return _fail(f"what is counted are the tensors of the compiled kernels; {native.missing()}", 1)
    budget = _budget.Budget(config, settings["length"], settings["batch"], settings["dtype"], threads)
    peak, found, display = budget.peak(), None, _show.Display(Console())
    _header(settings, budget, display)
    display.console.print(_table(budget))
    display.line()
    display.line(f"predicted  {_units.size(peak.total)}, in {peak.name}", style="bold")
    code = 0
    if args.measure:
        try:
            found = _measure.call(measured, settings, threads, budget.scratch)
        except _measure.WorkerError as error:
            code = _fail(f"the step could not be measured: {error}", 1)
        else:
            ratio = f"predicted is {100 * peak.total / found:.0f} % of it" if found else "too little to see"
            display.line(f"measured   {_units.size(found)}; {ratio}", style="bold")
    if path is not None:
        try:
            Path(path).write_text(json.dumps(_document(settings, threads, budget, found), indent=1) + "\n")
        except OSError as error:
            return _fail(f"the results cannot be written: {error.strerror or error}", 1)
    return code


def _fail(sentence, code: int) -> int:
    print(f"longattn memory: {sentence}", file=sys.stderr)
    return code
