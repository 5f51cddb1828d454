"""Checkpoints of `longattn train`: a folder for the newest step, there whole or not at all.

    DIR/step-00000120/config.json, model.safetensors          what `Reformer.load` reads
                      training.safetensors, training.json     the optimiser, the generators, the course of the training

Nothing is removed but files of these names, in folders that were made here.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..models import Reformer

VERSION = 1
NAME = re.compile(r"step-(\d{8,})")
PARTIAL = "longattn-partial-"
TENSORS, FACTS = "training.safetensors", "training.json"
WHOLE = ("config.json", "model.safetensors", TENSORS, FACTS)
# all that is ever written into a folder, and so all that is ever removed from one
MADE = (*WHOLE, "config.json.partial", "model.safetensors.partial")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written; the message is the sentence to print."""


def newest(folder: str | os.PathLike) -> Path | None:
    """The checkpoint of the last step in a folder."""
    try:
        found = [path for path in Path(folder).iterdir() if NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"--output {folder} cannot be read: {error.strerror or error}") from None
    return max(found, key=lambda path: int(NAME.fullmatch(path.name)[1]), default=None)


# writing


def _begin(folder: Path) -> Path:
    """A new folder for what is not whole yet; what a run that was killed has left of its own is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{PARTIAL}*"):
        _remove(path)
    partial = folder / f"{PARTIAL}{os.getpid()}"
    partial.mkdir()
    return partial


def _remove(path: Path) -> None:
    """The files that `save` makes, and the folder where it holds nothing else."""
    with contextlib.suppress(OSError):
        for name in MADE:
            (path / name).unlink(missing_ok=True)
        path.rmdir()


def check_writable(folder: str | os.PathLike) -> None:
    """Makes the folder. CheckpointError where no checkpoint could be written there."""
    try:
        partial = _begin(Path(folder))
        try:
            (partial / FACTS).touch()
        finally:
            _remove(partial)
    except OSError as error:
        raise CheckpointError(f"--output {folder} cannot be written: {error.strerror or error}") from None


def save(folder: str | os.PathLike, model: Reformer, optimizer, tensors: dict[str, Tensor], facts: dict) -> Path:
    """Writes the checkpoint of facts["step"], then removes older ones. CheckpointError leaves these as they are."""
    import safetensors

    folder = Path(folder)
    partial, final = None, folder / f"step-{facts['step']:08d}"
    try:
        partial = _begin(folder)
        _write(partial, model, optimizer, tensors, facts)
        for path in (*partial.iterdir(), partial):
            _to_disk(path)
        os.rename(partial, final)
        _to_disk(folder)
    except (OSError, safetensors.SafetensorError) as error:
        if partial is not None:
            _remove(partial)
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CheckpointError(f"a checkpoint cannot be written to {folder}: {reason}") from None
    for path in folder.iterdir():
        if _is_older(path, facts["step"]):
            _remove(path)
    return final


def _is_older(path: Path, step: int) -> bool:
    """Whether this is a checkpoint of an earlier step that `save` has written: others may call their folders alike."""
    found = NAME.fullmatch(path.name)
    if not found or int(found[1]) >= step:
        return False
    try:
        facts = json.loads((path / FACTS).read_text())
    except (OSError, ValueError):
        return False
    ours = isinstance(facts, dict) and facts.keys() >= {"version", "settings", "text", "steps"}
    return ours and facts.get("step") == int(found[1])


def _write(folder: Path, model: Reformer, optimizer, tensors: dict[str, Tensor], facts: dict) -> None:
    import safetensors.torch

    model.save(folder)
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": x.contiguous() for name, x in state.items()}
    safetensors.torch.save_file(tensors, folder / TENSORS)
    (folder / FACTS).write_text(json.dumps({"version": VERSION} | facts))


def _to_disk(path: Path) -> None:
    """A crash of the machine after the rename must not find the file empty."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# reading


@contextlib.contextmanager
def _sentences(path: Path) -> Iterator[None]:
    import safetensors

    wrong = (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, safetensors.SafetensorError)
    try:
        yield
    except wrong as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise CheckpointError(f"the checkpoint {path} cannot be read, perhaps it is truncated: {reason}") from None


def load_facts(path: Path, check: Callable[[dict], None]) -> dict:
    """What training.json says; check raises ValueError where its settings are none."""
    with _sentences(path):
        facts = json.loads((path / FACTS).read_text())
        if facts["version"] != VERSION:
            raise ValueError(f"its version is {facts['version']}, this one reads {VERSION}")
        if not all(isinstance(facts["text"][name], str) for name in ("name", "sha256")):
            raise ValueError("it does not say which text it learns")
        check(facts["settings"])
        told = [(type(step), step) for step, _, _ in facts["steps"]]
        if told != [(int, i + 1) for i in range(len(told))] or facts["step"] != len(told):
            raise ValueError(f"it does not tell of each of its {facts['step']} steps")
        if not all(type(x) in (int, float) and math.isfinite(x) for row in facts["steps"] for x in row):
            raise ValueError("what it tells of its steps are no numbers")
        return facts


def load_model(path: Path, device) -> Reformer:
    with _sentences(path):
        return Reformer.load(path, device)


def load_training(path: Path, optimizer) -> dict[str, Tensor]:
    """Puts the optimiser where it was, and returns the other tensors."""
    import safetensors.torch

    with _sentences(path):
        tensors = safetensors.torch.load_file(path / TENSORS)
        state: dict[int, dict[str, Tensor]] = {}
        for name in [name for name in tensors if name.startswith("optimizer.")]:
            _, index, what = name.split(".")
            state.setdefault(int(index), {})[what] = tensors.pop(name)
        shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
        # before the first step there is none
        found = {index: {name: x.shape for name, x in some.items()} for index, some in state.items()}
        expected = {i: {"step": torch.Size(), "exp_avg": x, "exp_avg_sq": x} for i, x in enumerate(shapes)}
        if found and found != expected:
            raise ValueError("its optimiser is of another model")
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        for name in ("generator", "windows"):
            torch.Generator().set_state(tensors[name])
        return tensors
