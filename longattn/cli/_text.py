"""The demo's input: one long byte sequence, and how hard it is to predict without looking far."""

from __future__ import annotations

import math
import os
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch

# a safety net: the library of CPython 3.11 has 13 MB outside its tests
LARGEST = 64 << 20
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


class InputError(ValueError):
    """What the user gave cannot be used; the message is the sentence to print."""


class Text(NamedTuple):
    """A name for people, and the bytes; the last tenth is held out from training."""

    name: str
    data: bytes

    @property
    def training(self) -> bytes:
        return self.data[: len(self.data) - len(self.data) // 10]

    @property
    def held_out(self) -> bytes:
        return self.data[len(self.data) - len(self.data) // 10 :]


def standard_library() -> Text:
    """The Python standard library's own sources without its tests, sorted by path, as one sequence."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    data = b"".join(map(_read, sorted(files)))[:LARGEST]
    if not data:
        raise InputError("this Python has no readable sources of its standard library; pass --text FILE")
    return Text(f"the standard library of Python {sysconfig.get_python_version()}", data)


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(LARGEST)
    except OSError:
        return b""


def load(path: str) -> Text:
    """Any file as bytes, whatever they mean; InputError with a sentence if it cannot be read or is too short."""
    file = Path(path)
    try:
        if file.is_dir():
            raise IsADirectoryError
        with file.open("rb") as stream:
            data = stream.read(LARGEST + 1)
    except FileNotFoundError:
        raise InputError(f"--text {path} does not exist") from None
    except IsADirectoryError:
        raise InputError(f"--text {path} is a folder; pass a file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"--text {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > LARGEST:
        raise InputError(f"--text {path} is larger than {LARGEST >> 20} MiB; pass a part of it")
    # a name that is not text is still printable
    return Text(file.name.encode(errors="replace").decode(), data)


def _entropy(counts: torch.Tensor) -> float:
    """Bits per draw of a distribution given by its counts."""
    p = counts[counts > 0].double()
    p = p / p.sum()
    return float(-(p * p.log2()).sum())


def byte_entropy(data: bytes) -> float:
    """Bits per byte of the best code that knows how often each byte occurs, and nothing else (order 0)."""
    if not data:
        return math.nan
    return _entropy(torch.bincount(torch.frombuffer(bytearray(data), dtype=torch.uint8), minlength=256))


def bigram_entropy(data: bytes) -> float:
    """Bits per byte of the best code that knows how often each byte follows each other one (order 1)."""
    if len(data) < 2:
        return math.nan
    x = torch.frombuffer(bytearray(data), dtype=torch.uint8).int()
    pairs = torch.bincount(x[:-1] * 256 + x[1:], minlength=256 * 256).view(256, 256)
    return _entropy(pairs.flatten()) - _entropy(pairs.sum(1))
