"""`longattn demo`: exact attention against ours at growing lengths, then a Transformer learns a long text with it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys

import torch

import longattn

from .. import native
from . import _arguments, _text, require
from ._text import InputError, Text

LENGTH = 65_536
SECONDS = 70.0
PICTURE = "longattn-demo.png"
SHORTEST = 64
# the dense reference is for truth: beyond this length it takes minutes and gigabytes
REFERENCE_LENGTH = 4096
# a point that would take longer is predicted; so is one that needs most of the free memory
LIMIT_S = 6.0
MEMORY_SHARE = 0.7
# exact attention at the model's own shape is measured up to here, and predicted beyond
MODEL_LENGTH = 8192


@dataclasses.dataclass(frozen=True)
class Settings:
    length: int
    steps: int | None
    seconds: float
    seed: int
    threads: int
    picture: str


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="exact against efficient attention at growing lengths, then a Transformer learns a long text",
        description="Measures attention at growing lengths, trains a small byte-level Transformer on sequences of the "
        "longest, and saves a picture. About two minutes on two cores; downloads nothing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    # numbers stay text here: run() says in one sentence what is wrong with them
    parser.add_argument("--text", metavar="FILE", help="what to learn, any file (default: Python's standard library)")
    parser.add_argument("--length", metavar="N", default=str(LENGTH), help="bytes in one sequence")
    parser.add_argument("--steps", metavar="N", help="training steps (default: as many as fit into --seconds)")
    parser.add_argument("--seconds", metavar="S", default=str(SECONDS), help="training time where --steps is not given")
    parser.add_argument("--threads", metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--seed", metavar="N", default="0", help="of weights, windows and random inputs")
    parser.add_argument(
        "--output", metavar="FILE", default=PICTURE, help="the picture (.png, .pdf, .svg) or its folder"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout; progress goes to stderr")


# what the user asked for


def _settings(args) -> Settings:
    return Settings(
        length=_arguments.integer("--length", args.length, SHORTEST, 2**40),
        steps=None if args.steps is None else _arguments.integer("--steps", args.steps, 1, 10**9),
        seconds=_arguments.positive("--seconds", args.seconds, "number of seconds"),
        seed=_arguments.integer("--seed", args.seed, 0, 2**63 - 1),
        threads=_arguments.threads(args.threads),
        picture=_arguments.picture("--output", args.output, PICTURE),
    )


def _load_text(path: str | None, length: int) -> Text:
    text = _text.standard_library() if path is None else _text.load(path)
    source = f"--text {path}" if path is not None else text.name
    have = len(text.training)
    if have <= SHORTEST:
        raise InputError(f"{source} has {len(text.data):,} bytes, too few to learn from; pass a file of at least 100")
    if have <= length:
        raise InputError(
            f"--length {length} is beyond the {have:,} bytes of {source} that are for training (a tenth of its "
            f"{len(text.data):,} is held out); pass --length {have - 1} or less"
        )
    return text


def _engine(length: int) -> str:
    """What linear attention runs on here; InputError where that could not finish."""
    if native.missing() is None:
        return f"cpu ({native.extension().isa()})"
    if length > REFERENCE_LENGTH:
        raise InputError(
            f"the compiled kernels are not here ({native.missing()}), and the dense reference is too slow for --length "
            f"{length}; install longattn with a C++ compiler, or pass --length {REFERENCE_LENGTH} or less"
        )
    return f"reference, dense ({native.missing()})"


# what happened


class Record:
    """All that is known so far: what an interruption leaves is still printed and drawn."""

    def __init__(self, settings: Settings, text: Text, engine: str) -> None:
        from ._attentions import Shape
        from ._train import Plan

        self.settings, self.text, self.engine = settings, text, engine
        self.shape = Shape()
        self.plan = Plan(settings.length, settings.steps, settings.seconds, settings.seed, settings.threads)
        self.entropies = (_text.byte_entropy(text.data), _text.bigram_entropy(text.data))
        self.held_out_entropies = (_text.byte_entropy(text.held_out), _text.bigram_entropy(text.held_out))
        self.exact_measured_at = min(settings.length, MODEL_LENGTH)
        self.points, self.exact_in_model, self.steps, self.result = [], None, [], None
        self.picture = None

    def document(self, ended: str) -> dict:
        """Everything as JSON. ended: "complete", "interrupted" or "failed"."""
        from .._memory import PeakMemory
        from . import _compare

        def data(value):
            return None if value is None else dataclasses.asdict(value)

        plan, settings = self.plan, self.settings
        return {
            "ended": ended,
            "longattn": longattn.__version__,
            "torch": torch.__version__,
            "engine": self.engine,
            "threads": settings.threads,
            "seed": settings.seed,
            "text": {
                "name": self.text.name,
                "bytes": len(self.text.data),
                "byte_entropy_bits": self.entropies[0],
                "bigram_entropy_bits": self.entropies[1],
                "held_out_byte_entropy_bits": self.held_out_entropies[0],
                "held_out_bigram_entropy_bits": self.held_out_entropies[1],
            },
            "comparison": {
                "shape": self.shape._asdict(),
                "memory": PeakMemory.method,
                "points": [data(point) for point in self.points],
                "break_even": {
                    name: {kind: found._asdict() for kind, found in kinds.items()}
                    for name, kinds in _compare.break_evens(self.points).items()
                },
            },
            "training": {
                "length": plan.length,
                "layers": plan.layers,
                "shape": plan.shape._asdict(),
                "steps": [data(step) for step in self.steps],
                "result": data(self.result),
                "exact_attention_of_one_layer": data(self.exact_in_model),
                "scores_of_one_layer_bytes": _compare.scores_bytes(plan.length, plan.heads),
            },
            "picture": self.picture,
        }

    def save_picture(self) -> None:
        from . import _plot

        _plot.save(
            self.settings.picture,
            title=f"longattn demo: {self.text.name}, sequences of {self.settings.length:,} bytes",
            points=self.points,
            shape=self.shape,
            steps=self.steps,
            result=self.result,
            entropies=self.entropies,
        )
        self.picture = self.settings.picture


def _compare_attention(record: Record, display) -> None:
    from . import _compare, _measure

    settings, plan = record.settings, record.plan
    memory = int(MEMORY_SHARE * _measure.available_memory())
    found = _compare.points(
        _compare.lengths(settings.length),
        shape=record.shape,
        threads=settings.threads,
        seed=settings.seed,
        limit_s=LIMIT_S,
        memory=memory,
    )
    with contextlib.closing(found), display.comparison(record.points, record.shape) as update:
        for point in found:
            record.points.append(point)
            update()
    at = record.exact_measured_at
    point = _measure.call(_compare.measure_attention, _compare.EXACT, at, plan.shape, settings.threads, settings.seed)
    record.exact_in_model = point if at == plan.length else _compare.predict(point, plan.length)


def _train_model(record: Record, display) -> None:
    from . import _measure, _train

    messages = _measure.stream(_train.train, record.text.training, record.text.held_out, record.plan)
    with contextlib.closing(messages), display.training(record.plan.length) as update:
        for message in messages:
            if isinstance(message, _train.Step):
                record.steps.append(message)
                update(message)
            else:
                record.result = message


def run(args) -> int:
    require("demo", "rich", "matplotlib", "psutil")
    try:
        settings = _settings(args)
        engine = _engine(settings.length)
        text = _load_text(args.text, settings.length)
    except InputError as error:
        print(f"longattn demo: {error}", file=sys.stderr)
        return 2
    from rich.console import Console

    from . import _show
    from ._measure import WorkerError

    display = _show.Display(Console(stderr=args.json))
    record = Record(settings, text, engine)
    code, ended, last_words = 0, "complete", ""
    try:
        _show.header(display, record)
        _compare_attention(record, display)
        _show.break_even(display, record)
        _train_model(record, display)
        _show.summary(display, record)
    except KeyboardInterrupt:
        code, ended, last_words = 130, "interrupted", "interrupted"
    except WorkerError as error:
        code, ended, last_words = 1, "failed", str(error)
    kept = f"{len(record.points)} of the points and {len(record.steps)} training steps"
    try:
        if record.points:
            record.save_picture()
            display.line(f"picture: {record.picture}")
    except OSError as error:
        code, last_words = code or 1, f"the picture cannot be saved: {error.strerror or error}"
    if args.json:
        json.dump(record.document(ended), sys.stdout, indent=1)
        print()
    if last_words:
        print(f"longattn demo: {last_words}; kept {kept}", file=sys.stderr)
    return code
