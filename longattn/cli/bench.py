"""`longattn bench`: how long attentions take, and what they hold, beside torch's and those of installed packages."""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import datetime
import importlib.util
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import longattn

from .. import native
from . import _arguments
from ._attentions import ATTENTIONS, EXACT, Shape, missing
from ._text import InputError

LENGTHS = "256,1024,4096,16384"
NAMES = (EXACT, "softmax", "linear", "favor", "lsh", "local")
# what joins of itself where it is installed, beside the attention it is compared with
PEERS = {"lsh": ("hf-lsh", "reformer-pytorch"), "favor": ("performer-pytorch",)}
DTYPES = ("float32", "bfloat16", "float16", "float64")
PICTURE = "longattn-bench.png"
# a call that would take longer is predicted; so is one that needs most of the free memory
LIMIT_S = "10"
MEMORY_SHARE = 0.7
LONGEST = 1 << 26


@dataclasses.dataclass(frozen=True)
class Settings:
    names: tuple[str, ...]
    # those that must run; the others joined because they are installed
    asked: tuple[str, ...]
    lengths: tuple[int, ...]
    shape: Shape
    backward: bool
    memory: bool
    limit_s: float
    threads: int
    seed: int
    json: str | None
    csv: str | None
    plot: str | None


def add_parser(subparsers) -> None:
    known = "\n".join(f"  {name:<18}{attention.what}" for name, attention in ATTENTIONS.items())
    parser = subparsers.add_parser(
        "bench",
        help="times and memory of attentions, side by side",
        description="Measures attentions at growing lengths, each in a fresh process, beside torch's "
        "scaled_dot_product_attention and the packages that are installed. Times are medians, ± half the distance of "
        "the quartiles; what would take longer than --limit is predicted, and marked.",
        epilog=f"attentions:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # numbers stay text here: run() says in one sentence what is wrong with them
    parser.add_argument(
        "--mechanism", "--mechanisms", metavar="NAMES", help="of those below, and exact (default: all that is here)"
    )
    parser.add_argument("--length", "--lengths", metavar="NS", default=LENGTHS, help="tokens (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help=f"{', '.join(DTYPES)} (default: float32)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    causal = {"action": argparse.BooleanOptionalAction, "default": True}
    parser.add_argument("--causal", help="query i sees keys 0..i (the default)", **causal)
    parser.add_argument("--heads", metavar="N", default="8", help="(default: 8)")
    parser.add_argument("--head-dim", metavar="N", default="64", help="(default: 64)")
    parser.add_argument("--batch", metavar="N", default="1", help="(default: 1)")
    parser.add_argument("--backward", action="store_true", help="forward and backward too")
    parser.add_argument("--memory", action="store_true", help="peak memory too, beyond the inputs")
    parser.add_argument("--no-peers", action="store_true", help="leave out other packages that are not named")
    parser.add_argument("--limit", metavar="S", default=LIMIT_S, help="longest measured call (default: %(default)s)")
    parser.add_argument("--threads", metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--seed", metavar="N", default="0", help="of the inputs (default: 0)")
    parser.add_argument("--json", metavar="FILE", help="all of it as JSON")
    parser.add_argument("--csv", metavar="FILE", help="a line for each measurement")
    parser.add_argument("--plot", metavar="FILE", help="a picture, both axes logarithmic: .png, .pdf or .svg")


# what the user asked for


def _settings(args) -> Settings:
    device = _arguments.choice("--device", args.device, ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda needs a GPU, and torch finds none; pass --device cpu")
    whole = {
        name: _arguments.integer(f"--{name.replace('_', '-')}", getattr(args, name), 1, 1 << 20)
        for name in ("heads", "head_dim", "batch")
    }
    dtype = _arguments.choice("--dtype", args.dtype, DTYPES)
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib; pip install 'longattn[cli]'")
    asked = _asked(args.mechanism)
    lengths = {_arguments.integer("--length", given, 1, LONGEST) for given in args.length.split(",")}
    return Settings(
        names=tuple(dict.fromkeys([*asked, *([] if args.no_peers else _peers(asked))])),
        asked=asked,
        lengths=tuple(sorted(lengths)),
        shape=Shape(dtype=dtype, device=device, causal=args.causal, **whole),
        backward=args.backward,
        memory=args.memory,
        limit_s=_arguments.positive("--limit", args.limit, "number of seconds"),
        threads=_arguments.threads(args.threads),
        seed=_arguments.integer("--seed", args.seed, 0, 2**63 - 1),
        json=None if args.json is None else _arguments.writable("--json", args.json),
        csv=None if args.csv is None else _arguments.writable("--csv", args.csv),
        plot=None if args.plot is None else _arguments.picture("--plot", args.plot, PICTURE),
    )


def _asked(given: str | None) -> tuple[str, ...]:
    names = NAMES if given is None else given.split(",")
    for name in names:
        reason = missing(_arguments.choice("--mechanism", name, tuple(ATTENTIONS)))
        if reason is not None:
            raise InputError(reason)
    return tuple(dict.fromkeys([EXACT, *names]))


def _peers(asked: tuple[str, ...]) -> list[str]:
    return [peer for name in asked for peer in PEERS.get(name, ()) if missing(peer) is None]


# what happened


class Record:
    """All that is known so far: what an interruption leaves is still printed, drawn and written."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.points, self.failures, self.short = settings, [], [], False

    def failed(self, name: str, length: int, reason: str) -> None:
        self.failures.append(f"{name} did not run at {length:,}: {reason}")
        self.short |= name in self.settings.asked

    def document(self, ended: str) -> dict:
        """ended: "complete", "interrupted" or "failed"."""
        from . import _compare

        settings = self.settings
        return {
            "ended": ended,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": _machine(settings.shape.device),
            "threads": settings.threads,
            "seed": settings.seed,
            "shape": settings.shape._asdict(),
            "points": [dataclasses.asdict(point) for point in self.points],
            "failures": self.failures,
            "break_even": {
                name: {kind: found._asdict() for kind, found in kinds.items()}
                for name, kinds in _compare.break_evens(self.points).items()
            },
        }

    def write_csv(self, path: str) -> None:
        exact = {point.length: point for point in self.points if point.mechanism == EXACT}
        shape = self.settings.shape._asdict()
        with open(path, "w", newline="") as stream:
            fields = [field.name for field in dataclasses.fields(self.points[0])] if self.points else ["mechanism"]
            writer = csv.DictWriter(stream, [*fields, "speed_up", *shape, "threads"])
            writer.writeheader()
            for point in self.points:
                against = exact.get(point.length)
                ratio = None if against is None else against.total_s / point.total_s
                row = dataclasses.asdict(point) | shape | {"speed_up": ratio, "threads": self.settings.threads}
                writer.writerow(row)


def _machine(device: str) -> dict:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    found = {"cpu": next(iter(names), platform.processor() or platform.machine()), "system": platform.platform()}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    engine = native.missing() or native.extension().isa()
    return found | {"kernels": engine, "longattn": longattn.__version__, "torch": torch.__version__}


class Plain:
    """What `_show.Display` does, where rich is not installed."""

    def __init__(self, stream) -> None:
        self.stream = stream

    def line(self, text: str = "", style: str = "") -> None:
        print(text, file=self.stream, flush=True)

    @contextlib.contextmanager
    def comparison(self, points, shape: Shape, **how) -> Iterator:
        from . import _table

        try:
            yield lambda: self.line(_table.line(points[-1], points, shape))
        finally:
            self.line()
            self.line(_table.table(points, shape, **how).text())


def _threads(settings: Settings) -> str:
    return f"{settings.threads} thread{'' if settings.threads == 1 else 's'}"


def _display():
    if importlib.util.find_spec("rich") is None:
        return Plain(sys.stdout)
    from rich.console import Console

    from . import _show

    return _show.Display(Console())


def _header(record: Record, display) -> None:
    machine = _machine(record.settings.shape.device)
    where = machine.get("gpu") or f"{machine['cpu']}, {_threads(record.settings)}"
    display.line(f"machine  {where}")
    display.line(f"engine   {machine['kernels']}, longattn {machine['longattn']}, torch {machine['torch']}")
    display.line()


def _measure_all(record: Record, display) -> None:
    from . import _compare, _measure

    settings = record.settings
    memory = _measure.available_memory()
    if settings.shape.device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    found = _compare.points(
        settings.lengths,
        shape=settings.shape,
        threads=settings.threads,
        seed=settings.seed,
        limit_s=settings.limit_s,
        memory=int(MEMORY_SHARE * memory),
        names=settings.names,
        wanted=_compare.Wanted(settings.backward, settings.memory, False),
        failed=record.failed,
    )
    with contextlib.closing(found), display.comparison(record.points, settings.shape, spread=True) as update:
        for point in found:
            record.points.append(point)
            update()


def _write(record: Record, ended: str, display) -> None:
    settings = record.settings
    if settings.json is not None:
        Path(settings.json).write_text(json.dumps(record.document(ended), indent=1) + "\n")
    if settings.csv is not None:
        record.write_csv(settings.csv)
    if settings.plot is not None and record.points:
        from . import _plot, _table

        title = f"{_table.title(settings.shape)}, {_threads(settings)}"
        _plot.save_comparison(settings.plot, title=title, points=record.points, shape=settings.shape)
    for path in (settings.json, settings.csv, settings.plot):
        if path is not None:
            display.line(f"written: {path}")


def run(args) -> int:
    try:
        settings = _settings(args)
    except InputError as error:
        print(f"longattn bench: {error}", file=sys.stderr)
        return 2
    from . import _compare, _table

    display, record = _display(), Record(settings)
    code, ended, last_words = 0, "complete", ""
    try:
        _header(record, display)
        _measure_all(record, display)
        for sentence in record.failures:
            display.line(sentence)
        for name, kinds in _compare.break_evens(record.points).items():
            for kind, found in kinds.items():
                display.line(_table.break_even_sentence(name, kind, found))
    except KeyboardInterrupt:
        code, ended, last_words = 130, "interrupted", f"interrupted; kept {len(record.points)} points"
    if record.short and not code:
        code, ended, last_words = 1, "failed", record.failures[0]
    try:
        _write(record, ended, display)
    except OSError as error:
        reason = f"the results cannot be written: {error.strerror or error}"
        code, last_words = code or 1, "; ".join(filter(None, (last_words, reason)))
    if last_words:
        print(f"longattn bench: {last_words}", file=sys.stderr)
    return code
