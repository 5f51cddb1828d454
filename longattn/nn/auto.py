"""Exact attention where it is faster, another mechanism from a measured length on."""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..favor import Favor
from ..ops import _check
from .lsh import LSH
from .mechanisms import Exact, Mechanism, resolve

EXACT = Exact()
MEASURED = Path(__file__).parent.parent / "data" / "break_even.json"


# the tables


class Row(NamedTuple):
    """One measurement: from `length` tokens on, a mechanism takes no more time than exact attention, in a forward and
    in a training step.

    device: "cpu", "cuda"; kind, work: of `Mechanism.work`; dtype: "float32", ...; length None: not up to `limit`.
    """

    device: str
    kind: str
    head_dim: int
    is_causal: bool
    dtype: str
    work: float
    length: int | None
    limit: int

    @property
    def key(self) -> tuple:
        return self[:6]


class BreakEven(NamedTuple):
    """length: the first at which the mechanism runs, None where none is known. source: for people."""

    length: int | None
    source: str


def cache_folder() -> Path:
    """Of this user: LONGATTN_CACHE, else longattn in XDG_CACHE_HOME, else in ~/.cache."""
    given = os.environ.get("LONGATTN_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longattn"


def users_table() -> Path:
    """Where `longattn tune` writes."""
    return cache_folder() / "break_even.json"


def read(path: Path) -> list[Row]:
    """Rows of a table; empty where there is none, ValueError in a sentence where it is no table."""
    try:
        text = path.read_bytes()
    except OSError:
        return []
    try:
        rows = [Row(**row) for row in json.loads(text)["rows"]]
        for row in rows:
            types = (str, str, int, bool, str, (int, float), (int, type(None)), int)
            if not all(map(isinstance, row, types)) or row.work <= 0 or row.head_dim < 1 or (row.length or 1) < 1:
                raise ValueError(row)
    except (ValueError, TypeError, KeyError) as error:
        remedy = "remove it, and `longattn tune` writes one"
        raise ValueError(f"{path} is no table of break-even lengths: {error}; {remedy}") from None
    return rows


@functools.cache
def _tables() -> tuple[tuple[str, tuple[Row, ...]], ...]:
    """The user's first; read once."""
    tables = []
    for source, path in (("measured on this machine", users_table()), ("measured for this package", MEASURED)):
        try:
            tables.append((source, tuple(read(path))))
        except ValueError as error:
            warnings.warn(f"longattn: {error}; it is not used", UserWarning, stacklevel=2)
    return tuple(tables)


def forget() -> None:
    """Reads the tables again when they are needed next."""
    _tables.cache_clear()
    _measured.cache_clear()


def predicted(rows: Sequence[Row], head_dim: int, is_causal: bool, dtype: str, work: float) -> int | None:
    """The length for so much work, from the rows of one kind that are nearest in dtype, causality and head_dim.

    Between two amounts of work that were measured it is on the line through them; beyond the largest it grows with the
    work; below the smallest it stays, to be on the safe side.
    """

    def distance(row: Row) -> tuple:
        return row.dtype != dtype, row.is_causal != is_causal, abs(math.log(row.head_dim / head_dim)), row.head_dim

    best = min(map(distance, rows))
    alike = sorted((row for row in rows if distance(row) == best), key=lambda row: row.work)
    less = next((row for row in reversed(alike) if row.work <= work), alike[0])
    more = next((row for row in alike if row.work >= work), alike[-1])
    if less.length is None or more.length is None:
        return None
    if less.work == more.work:
        return math.ceil(less.length * max(work / less.work, 1))
    share = (work - less.work) / (more.work - less.work)
    return math.ceil(less.length + share * (more.length - less.length))


@functools.cache
def _measured(device: str, kind: str, head_dim: int, is_causal: bool, dtype: str, work: float) -> BreakEven:
    for source, table in _tables():
        rows = [row for row in table if row.device == device and row.kind == kind]
        if rows:
            return BreakEven(predicted(rows, head_dim, is_causal, dtype, work), source)
    warnings.warn(
        f"mechanism='auto': no break-even length of {kind} is known on {device}, so exact attention runs at every "
        "length; `longattn tune` measures it, Auto(..., break_even=...) sets it",
        UserWarning,
        stacklevel=2,
    )
    return BreakEven(None, f"not measured on {device}; `longattn tune` does")


def measured(*key) -> BreakEven:
    """From the tables, by (device, kind, head_dim, is_causal, dtype, work), under torch.compile too."""
    return _measured(*key)


# a table does not change while a graph lives, so torch.compile takes the answer as it is
measured._dynamo_marked_constant = True


# the mechanism


@dataclass(frozen=True, repr=False)
class Auto(Mechanism, name="auto"):
    """Exact attention below a break-even length, where it is faster, and another mechanism from there on.

    mechanism: what runs long sequences, as in `longattn.nn.MultiheadAttention`; default `LSH()`.
    break_even: the first length at which it runs. None takes it from a measured table, by device, kind of mechanism,
        head_dim, causality and dtype: that of the user's cache directory, which `longattn tune` writes, else the
        package's. A number makes the model compute the same on every machine.

    Where L != S, the length is 2 L S / (L + S). Calls that the mechanism cannot honour (an attn_mask that is not the
    causal one, a key_padding_mask that biases scores, causality with L != S) are exact at any length. Exact attention
    and the mechanism are different functions: near each other for LSH and for a Favor that follows the softmax, far
    for others. `longattn.explain(module, query, key, value)` and the module's repr say what runs.

    Raises ValueError or TypeError in a sentence: for "exact" or another Auto, which leave nothing to choose, and for
    shared queries and keys, which exact attention does not have.
    """

    mechanism: Mechanism | Favor | str = field(default_factory=LSH)
    break_even: int | None = None

    otherwise: ClassVar[Mechanism] = EXACT

    def __post_init__(self):
        mechanism = resolve(self.mechanism)
        if mechanism.takes_attn_mask or isinstance(mechanism, Auto):
            _check.fail("Auto", f"mechanism must be an efficient one, such as longattn.LSH(), got {mechanism!r}")
        if not mechanism.takes_keys:
            _check.fail("Auto", f"exact attention has keys of its own, {mechanism!r} has not; take share_qk=False")
        n = self.break_even
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 0):
            _check.fail("Auto", f"break_even must be a length or None, got {n!r}")
        object.__setattr__(self, "mechanism", mechanism)

    def __repr__(self) -> str:
        return f"Auto({self.mechanism!r}{'' if self.break_even is None else f', break_even={self.break_even}'})"

    def submodules(self, num_heads):
        return self.mechanism.submodules(num_heads)

    def with_submodules(self, own):
        return Auto(self.mechanism.with_submodules(own), self.break_even)

    def break_even_for(self, head_dim: int, like: Tensor, is_causal: bool) -> BreakEven:
        """Of tensors with the dtype (autocast's under autocast) and on the device of `like`."""
        if self.break_even is not None:
            return BreakEven(self.break_even, "as given")
        device, dtype, work = like.device.type, like.dtype, self.mechanism.work(is_causal)
        if work is None:
            return BreakEven(None, f"{self.mechanism!r} says nothing of its work; pass break_even")
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        kind, amount = work
        return measured(device, kind, head_dim, is_causal, str(dtype).removeprefix("torch."), amount)

    def chosen(self, L, S, head_dim, like, is_causal):
        n = self.break_even_for(head_dim, like, is_causal).length
        # 2 L S / (L + S) < n, in whole numbers
        is_short = n is None or (n - 1) * (L + S) >= 2 * L * S
        return EXACT if is_short else self.mechanism

    def note(self, head_dim, like, is_causal):
        n, source = self.break_even_for(head_dim, like, is_causal)
        return f"exact at every length, {source}" if n is None else f"exact below {n} tokens, {source}"

    def attend(self, q, k, v, *, is_causal, **arguments) -> Tensor:
        chosen = self.chosen(q.shape[2], k.shape[2], q.shape[3], q, is_causal)
        return chosen.attend(q, k, v, is_causal=is_causal, **arguments)

    def weights(self, q, k, *, is_causal, **arguments) -> Tensor:
        chosen = self.chosen(q.shape[2], k.shape[2], q.shape[3], q, is_causal)
        return chosen.weights(q, k, is_causal=is_causal, **arguments)


def write(path: Path, rows: Sequence[Row], about: dict) -> None:
    """Puts rows in place of those of the same key, all at once: a reader sees the old table or the new one.

    about: the machine and the day, kept beside those of earlier runs.
    """
    kept = {row.key: row for row in read(path)} | {row.key: row for row in rows}
    runs = [run for run in (json.loads(path.read_bytes()).get("about", []) if path.exists() else []) if run != about]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    lines = ",\n".join(f"  {json.dumps(row._asdict())}" for row in sorted(kept.values(), key=lambda row: row.key))
    abouts = ",\n".join(f"  {json.dumps(run)}" for run in [*runs, about])
    part.write_text(f'{{"about": [\n{abouts}\n ],\n "rows": [\n{lines}\n ]}}\n')
    os.replace(part, path)
    forget()
