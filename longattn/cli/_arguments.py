"""Options of the commands: each is text until here, where one sentence says what is wrong with it."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from ._text import InputError

FORMATS = (".png", ".pdf", ".svg")


def integer(option: str, given: str, lowest: int, highest: int) -> int:
    try:
        value = int(given)
    except ValueError:
        value = lowest - 1
    if not lowest <= value <= highest:
        raise InputError(f"{option} must be a whole number from {lowest} to {highest}, got {given!r}")
    return value


def positive(option: str, given: str, what: str = "number", zero: bool = False) -> float:
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf or (zero and value == 0)):
        raise InputError(f"{option} must be a positive {what}{' or 0' if zero else ''}, got {given!r}")
    return value


def choice(option: str, given: str, known: tuple[str, ...]) -> str:
    if given not in known:
        raise InputError(f"{option} must be one of {', '.join(known)}, got {given!r}")
    return given


def threads(given: str | None) -> int:
    default = torch.get_num_threads()
    return default if given is None else integer("--threads", given, 1, max(default, os.cpu_count() or 1))


@contextlib.contextmanager
def _paths(option: str, given: str) -> Iterator[None]:
    """What the system says of a name that cannot be one, such as one too long."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{option} {given} cannot be used: {getattr(error, 'strerror', None) or error}") from None


def writable(option: str, given: str) -> str:
    """A file that can be written."""
    with _paths(option, given):
        path = Path(given)
        if path.is_dir():
            raise InputError(f"{option} {given} is a folder; name a file")
        if not path.parent.is_dir():
            raise InputError(f"{option} {given} lies in a folder that does not exist")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise InputError(f"{option} {given} cannot be written")
    return str(path)


def folder(option: str, given: str) -> str:
    """A folder, or what may become one."""
    with _paths(option, given):
        if Path(given).exists() and not Path(given).is_dir():
            raise InputError(f"{option} {given} is a file; name a folder")
    return given


def picture(option: str, given: str, name: str) -> str:
    """The file of a picture; in a folder it is called `name`."""
    path = Path(given)
    with _paths(option, given):
        path = path / name if path.is_dir() else path
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{option} {given} must end in {', '.join(FORMATS)} or be a folder that exists")
    return writable(option, str(path))
