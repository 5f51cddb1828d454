"""`longattn train`: a Reformer learns the bytes of a file, as one long sequence or in windows."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import sys
import time
from pathlib import Path

from . import _arguments, _model, require
from ._text import InputError

FOLDER = "longattn-train"
PICTURE = "longattn-train.png"
DEFAULTS = {"steps": 100, "rate": 1e-3, "warmup": 20, "dropout": 0.0}
# without --every: a checkpoint whenever so much work would be lost
SAVE_SECONDS = 600.0
PROMPT = 64


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "train",
        help="a Reformer learns the bytes of a file",
        description="Trains longattn.models.Reformer on windows of a file, or on the whole of it as one sequence "
        "(--length its size - 1). Keeps a checkpoint; Ctrl-C writes one, and --resume goes on from it as if nothing "
        "had been, bit for bit. What is not named again with --resume stays as it was.",
    )
    parser.add_argument("--text", metavar="FILE", help="what to learn, any file (default: Python's standard library)")
    _model.add_options(parser)
    parser.add_argument("--dropout", metavar="P", help="of embeddings and layers (default: 0)")
    parser.add_argument("--steps", metavar="N", help=f"in all, resumed or not (default: {DEFAULTS['steps']})")
    parser.add_argument("--rate", metavar="X", help=f"Adam's learning rate (default: {DEFAULTS['rate']})")
    parser.add_argument("--warmup", metavar="N", help=f"steps in which it rises (default: {DEFAULTS['warmup']})")
    parser.add_argument("--seed", metavar="N", help="of weights, windows, dropout and samples (default: 0)")
    parser.add_argument("--output", metavar="DIR", default=FOLDER, help="of the checkpoint (default: %(default)s)")
    parser.add_argument("--every", metavar="N", help="steps between checkpoints (default: what takes ten minutes)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
    parser.add_argument("--sample", metavar="N", help="write so many bytes at the end")
    parser.add_argument("--temperature", metavar="T", default="1", help="of the sample; 0 is greedy (default: 1)")
    parser.add_argument("--prompt", metavar="TEXT", help=f"before the sample (default: {PROMPT} bytes of the file)")
    parser.add_argument("--plot", metavar="FILE", help="the curve, as .png, .pdf or .svg")
    parser.add_argument("--json", metavar="FILE", help="all of it as JSON")


# what the user asked for


@dataclasses.dataclass(frozen=True)
class Wishes:
    """given: settings by name; the rest is of this run alone."""

    given: dict
    threads: int
    every: int | None
    sample: int
    temperature: float
    prompt: bytes | None
    plot: str | None
    json: str | None


def _given(args) -> dict:
    found = _model.values(args)
    whole = (("steps", 0, 10**9), ("warmup", 1, 10**9), ("seed", 0, 2**62))
    for name, lowest, highest in whole:
        if getattr(args, name) is not None:
            found[name] = _arguments.integer(f"--{name}", getattr(args, name), lowest, highest)
    if args.rate is not None:
        found["rate"] = _arguments.positive("--rate", args.rate)
    if args.dropout is not None:
        found["dropout"] = _arguments.positive("--dropout", args.dropout, "probability", zero=True)
        if found["dropout"] >= 1:
            raise InputError(f"--dropout must be below 1, got {args.dropout!r}")
    return found


def _wishes(args) -> Wishes:
    _arguments.folder("--output", args.output)
    if args.prompt == "":
        raise InputError("--prompt must be one character at least")
    return Wishes(
        given=_given(args),
        threads=_arguments.threads(args.threads),
        every=None if args.every is None else _arguments.integer("--every", args.every, 1, 10**9),
        sample=0 if args.sample is None else _arguments.integer("--sample", args.sample, 1, 10**9),
        temperature=_arguments.positive("--temperature", args.temperature, zero=True),
        prompt=None if args.prompt is None else args.prompt.encode(errors="surrogateescape"),
        plot=None if args.plot is None else _arguments.picture("--plot", args.plot, PICTURE),
        json=None if args.json is None else _arguments.writable("--json", args.json),
    )


def _settings(given: dict, facts: dict | None, folder: str) -> dict:
    """All of them; of a checkpoint where nothing else was given, which then must fit its model."""
    if facts is None:
        return _model.DEFAULTS | DEFAULTS | given
    kept, free = facts["settings"], (*_model.FREE, *DEFAULTS)
    for name, value in given.items():
        if name not in free and value != kept[name]:
            what = f"with {_model.option(name)} {kept[name]}, not {value}"
            if kept[name] is None or isinstance(kept[name], bool):
                # of the one switch there is, which takes away
                what = f"{'with' if kept[name] is False else 'without'} {_model.option(name)}"
            remedy = "leave the option out, or name a new --output"
            raise InputError(f"the checkpoint in {folder} was trained {what}; {remedy}")
    return kept | given


def _check_kept(settings: dict) -> None:
    """ValueError where the settings of a checkpoint are none of this command."""
    _model.check(settings)
    lowest = {"steps": 0, "warmup": 1, "rate": 0, "dropout": 0}
    for name, least in lowest.items():
        x, kinds = settings[name], (int,) if isinstance(DEFAULTS[name], int) else (int, float)
        # no comparison holds of NaN
        if type(x) not in kinds or not least <= x <= (1 if name == "dropout" else sys.maxsize):
            raise ValueError(f"its {name} is {x!r}")


def _check(settings: dict, wishes: Wishes, text) -> None:
    """What only the text and the checkpoint show."""
    have, length = len(text.data), settings["length"]
    if have < 2:
        raise InputError(f"{text.name} has {have} bytes, too few to learn from")
    if have <= length:
        raise InputError(f"--length {length} is beyond the {have:,} bytes of {text.name}; pass {have - 1} or less")
    prompt = len(_prompt(wishes, text, length))
    if wishes.sample and prompt + wishes.sample > length:
        fits = f"pass --sample {length - prompt} or less" if prompt < length else "pass a shorter --prompt"
        asked = f"a prompt of {prompt} bytes and --sample {wishes.sample}"
        raise InputError(f"{asked} are beyond --length {length}; {fits}")


def _prompt(wishes: Wishes, text, length: int) -> bytes:
    return text.data[: max(1, min(PROMPT, length // 2))] if wishes.prompt is None else wishes.prompt


# what happens


def _prepare(args, wishes: Wishes):
    """-> the Training; InputError or CheckpointError in a sentence."""
    from . import _checkpoint, _text
    from ._training import Training, identity

    text = _text.standard_library() if args.text is None else _text.load(args.text)
    path = _checkpoint.newest(args.output)
    if path is None and args.resume:
        raise InputError(f"--output {args.output} holds no checkpoint to --resume from")
    if path is not None and not args.resume:
        remedy = "pass --resume or name a new --output"
        raise InputError(f"--output {args.output} holds a checkpoint, {path.name}; {remedy}")
    facts = None if path is None else _checkpoint.load_facts(path, _check_kept)
    settings = _settings(wishes.given, facts, args.output)
    _check(settings, wishes, text)
    if facts is not None and facts["text"]["sha256"] != identity(text)["sha256"]:
        raise InputError(f"the checkpoint in {args.output} was trained on another text, {facts['text']['name']}")
    _checkpoint.check_writable(args.output)
    if facts is None:
        return Training.start(settings, text)
    return Training.resume(path, facts, settings, text)


def _peak() -> int:
    from .._memory import high_water

    return high_water()


def _train(training, wishes: Wishes, folder: str, display) -> None:
    """Until the last step. A checkpoint that cannot be written in between is said, and tried again."""
    from . import _units
    from ._checkpoint import CheckpointError

    settings, saved = training.settings, time.monotonic()
    tokens = settings["length"] * settings["batch"]
    with display.training(tokens, lambda: f", peak {_units.size(_peak())}") as update:
        while training.step_number < settings["steps"]:
            update(training.step())
            late = time.monotonic() - saved > SAVE_SECONDS
            if training.step_number % wishes.every == 0 if wishes.every else late:
                with contextlib.suppress(CheckpointError):
                    saved = time.monotonic()
                    _save(training, folder, display)


def _save(training, folder: str, display) -> None:
    from ._checkpoint import CheckpointError

    try:
        path = training.save(folder)
        if path is not None:
            display.line(f"checkpoint: {path}")
    except CheckpointError as error:
        display.line(f"{error}; training goes on")
        raise


def _sample(training, wishes: Wishes) -> str:
    import torch

    prompt = bytearray(_prompt(wishes, training.text, training.settings["length"]))
    prompt = torch.frombuffer(prompt, dtype=torch.uint8)[None]
    options = {"temperature": wishes.temperature, "seed": training.settings["seed"]}
    found = training.model.generate(prompt, wishes.sample, **options)[0]
    written = bytes(found.tolist()).decode(errors="replace")
    # bytes that would move a terminal's cursor are shown as what they are
    return "".join(x if x.isprintable() or x in "\n\t" else f"\\x{ord(x):02x}" for x in written)


def _document(training, ended: str, sample: str | None) -> dict:
    import torch

    import longattn

    done = training.step_number * training.settings["length"] * training.settings["batch"]
    return {
        "ended": ended,
        "longattn": longattn.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "text": training.identity,
        "settings": training.settings,
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "steps": [{k: getattr(x, k) for k in ("step", "bits_per_byte", "seconds")} for x in training.steps],
        "tokens_per_s": done / training.seconds if training.seconds else None,
        "peak_resident_bytes": _peak(),
        "sample": sample,
    }


def _write_results(training, wishes: Wishes, ended: str, sample: str | None, display) -> None:
    from . import _plot, _text

    if wishes.plot is not None:
        data = training.text.data
        title = f"{training.text.name}, sequences of {training.settings['length']:,} bytes"
        entropies = (_text.byte_entropy(data), _text.bigram_entropy(data))
        _plot.save_curve(wishes.plot, title=title, steps=training.steps, entropies=entropies)
        display.line(f"picture: {wishes.plot}")
    if wishes.json is not None:
        Path(wishes.json).write_text(json.dumps(_document(training, ended, sample), indent=1) + "\n")


def _header(training, display) -> None:
    from . import _text

    x, text = training.settings, training.text
    parameters = sum(p.numel() for p in training.model.parameters())
    low, pairs = _text.byte_entropy(text.data), _text.bigram_entropy(text.data)
    kind = "reversible layers" if x["reversible"] else "layers"
    display.line(f"text     {text.name}, {len(text.data):,} bytes, {low:.3f} bits per byte ({pairs:.3f} of pairs)")
    display.line(f"model    {x['layers']} {kind}, {x['mechanisms']}, dim {x['dim']}, {parameters:,} parameters")
    done = f"{training.step_number} of {x['steps']} done"
    display.line(f"step     {x['batch']} x {x['length']:,} bytes, {x['dtype']}; {done}")
    display.line()


def run(args) -> int:
    require("train", "rich", "matplotlib", "psutil", "safetensors")
    import torch

    from ._checkpoint import CheckpointError
    from ._measure import HUGE_PAGES

    try:
        wishes = _wishes(args)
        if not args.resume:
            # else the checkpoint has the rest of it
            _model.config(_model.DEFAULTS | DEFAULTS | wishes.given)
    except InputError as error:
        print(f"longattn train: {error}", file=sys.stderr)
        return 2
    os.environ.setdefault(HUGE_PAGES, "1")
    torch.set_num_threads(wishes.threads)
    try:
        training = _prepare(args, wishes)
    except (InputError, CheckpointError) as error:
        print(f"longattn train: {error}", file=sys.stderr)
        return 1
    return _run(training, wishes, args.output)


def _say_nothing(display) -> None:
    display.console.quiet = True
    # python would complain once more when it flushes at exit
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(training, wishes: Wishes, folder: str) -> int:
    from rich.console import Console

    from . import _show
    from ._checkpoint import CheckpointError
    from ._training import Diverged

    display, sample = _show.Display(Console()), None
    code, ended, last_words, keeps = 0, "complete", [], True
    try:
        _header(training, display)
        _train(training, wishes, folder, display)
        if wishes.sample:
            # before the sample, which takes a while
            _save(training, folder, display)
            sample = _sample(training, wishes)
            display.line()
            display.line(sample)
    except KeyboardInterrupt:
        code, ended, last_words = 130, "interrupted", [f"interrupted after step {training.step_number}"]
    except CheckpointError:
        pass
    except Diverged as error:
        # what is in memory would diverge again; what was saved before may not
        code, ended, last_words, keeps = 1, "failed", [str(error)], False
    except (MemoryError, RuntimeError) as error:
        code, ended, last_words = 1, "failed", [" ".join(str(error).split())]
    except (OSError, SystemExit) as error:
        # rich exits where the reader of a pipe has left; what was trained is not lost with what was said
        reason = getattr(error, "strerror", None) or os.strerror(errno.EPIPE)
        code, ended, last_words = 1, "failed", [f"nothing more can be printed: {reason}"]
        _say_nothing(display)
    try:
        path = training.save(folder) if keeps else None
        if path is not None:
            display.line(f"checkpoint: {path}")
    except (CheckpointError, Diverged) as error:
        code, last_words = code or 1, [*last_words, str(error)]
    try:
        _write_results(training, wishes, ended, sample, display)
    except OSError as error:
        code, last_words = code or 1, [*last_words, f"the results cannot be written: {error.strerror or error}"]
    if last_words:
        print(f"longattn train: {'; '.join(last_words)}", file=sys.stderr)
    return code
