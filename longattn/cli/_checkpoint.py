"""Checkpoints of `longattn train`: a folder for the newest step, there whole or not at all.

    DIR/step-00000120/config.json, model.safetensors          what `Reformer.load` reads
                      training.safetensors, training.json     the optimiser, the generators, the course of the training
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor

from ..models import Reformer

VERSION = 1
NAME = re.compile(r"step-(\d{8,})")
PARTIAL = "partial"


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


def save(folder: str | os.PathLike, model: Reformer, optimizer, tensors: dict[str, Tensor], facts: dict) -> Path:
    """Writes the checkpoint of facts["step"], then removes older ones. CheckpointError leaves these as they are."""
    import safetensors

    folder = Path(folder)
    partial, final = folder / PARTIAL, folder / f"step-{facts['step']:08d}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(partial, model, optimizer, tensors, facts)
        for path in (*partial.iterdir(), partial):
            _to_disk(path)
        os.rename(partial, final)
        _to_disk(folder)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CheckpointError(f"a checkpoint cannot be written to {folder}: {reason}") from None
    for path in folder.iterdir():
        if NAME.fullmatch(path.name) and path != final:
            shutil.rmtree(path, ignore_errors=True)
    return final


def _write(folder: Path, model: Reformer, optimizer, tensors: dict[str, Tensor], facts: dict) -> None:
    import safetensors.torch

    model.save(folder)
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": x.contiguous() for name, x in state.items()}
    safetensors.torch.save_file(tensors, folder / "training.safetensors")
    (folder / "training.json").write_text(json.dumps({"version": VERSION} | facts))


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
def _sentences(path: Path):
    import safetensors

    wrong = (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, safetensors.SafetensorError)
    try:
        yield
    except wrong as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the checkpoint {path} cannot be read, perhaps it is truncated: {reason}") from None


def load_facts(path: Path, names: set[str]) -> dict:
    """What training.json says, with settings of these names at least."""
    with _sentences(path):
        facts = json.loads((path / "training.json").read_text())
        if facts["version"] != VERSION:
            raise ValueError(f"its version is {facts['version']}, this one reads {VERSION}")
        for name in ("step", "seconds", "steps"):
            facts[name]
        facts["text"]["name"], facts["text"]["sha256"]
        missing = names - facts["settings"].keys()
        if missing:
            raise ValueError(f"its settings lack {', '.join(sorted(missing))}")
        return facts


def load_model(path: Path, device) -> Reformer:
    with _sentences(path):
        return Reformer.load(path, device)


def load_training(path: Path, optimizer) -> dict[str, Tensor]:
    """Puts the optimiser where it was, and returns the other tensors."""
    import safetensors.torch

    with _sentences(path):
        tensors = safetensors.torch.load_file(path / "training.safetensors")
        state: dict[int, dict[str, Tensor]] = {}
        for name in [name for name in tensors if name.startswith("optimizer.")]:
            _, index, what = name.split(".")
            state.setdefault(int(index), {})[what] = tensors.pop(name)
        shapes = [list(p.shape) for group in optimizer.param_groups for p in group["params"]]
        for index, found in state.items():
            if any(x.dim() and list(x.shape) != shapes[index] for x in found.values()):
                raise ValueError("its optimiser is of another model")
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        for name in ("generator", "windows"):
            torch.Generator().set_state(tensors[name])
        return tensors
