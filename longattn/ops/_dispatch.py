"""The only place that chooses an engine. `impl="auto"` takes the first that can; an explicit one never falls back."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import native
from ._autograd import differentiated

IMPLS = ("cuda", "triton", "cpu", "reference")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def missing(impl: str) -> str | None:
    """Why an engine cannot run on this machine at all; None if it can."""
    if impl == "cpu":
        return native.missing()
    if impl == "cuda":
        return native.missing_cuda() or (None if _has_gpu() else "torch sees no NVIDIA GPU")
    if impl == "triton":
        if not _has_triton():
            return "Triton is not installed; pip install triton"
        if not _has_gpu() and not _interpreting():
            return "torch sees no NVIDIA GPU"
    return None


# what is installed does not change while a graph lives: torch.compile may take the answer as it is, and need not look
# into module loading (its decorator for this would import Triton)
missing._dynamo_marked_constant = True


def backends() -> list[tuple[str, bool, str]]:
    """(name, usable, reason) of every engine on this machine."""
    return [(impl, missing(impl) is None, missing(impl) or "") for impl in IMPLS]


def refuses(impl: str, x: Tensor) -> str | None:
    """What an engine refuses whatever the op: a missing build, a device, a dtype."""
    reason = missing(impl)
    if reason is not None or impl == "reference":
        return reason
    if differentiated():
        return "torch.func's derivatives and forward-mode AD take torch's own operations alone"
    device = x.device.type
    if impl == "cpu":
        return None if device == "cpu" else f"tensors are on {x.device}"
    if device != "cuda" and not (impl == "triton" and _interpreting()):
        return f"tensors are on {x.device}"
    return "float64 runs on cpu and reference only" if x.dtype == torch.float64 else None


class Explanation(NamedTuple):
    """op, the engine that runs, for each engine why it cannot (None: it can), and what else runs beside it."""

    op: str
    chosen: str
    reasons: dict[str, str | None]
    beside: str = ""

    def __str__(self) -> str:
        lines = [self.op]
        for impl, reason in self.reasons.items():
            verdict = "yes" if reason is None else f"no    {reason}"
            lines.append(f"  {impl:<10} {verdict}{'   <- chosen' if impl == self.chosen else ''}")
        return "\n".join([*lines, f"  {self.beside}"] if self.beside else lines)


def choose(op: str, impl: str, reasons: dict[str, str | None]) -> str:
    """The engine for this call, from why each cannot take it; raises a sentence when an explicit one cannot."""
    if impl == "auto":
        chosen = next(name for name, reason in reasons.items() if reason is None)
        if chosen == "reference":
            _warn_reference(op, "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason))
        return chosen
    if impl not in reasons:
        raise ValueError(f"{op}: impl must be 'auto' or one of {', '.join(map(repr, reasons))}, got {impl!r}")
    if reasons[impl] is not None:
        raise ValueError(f"{op}: impl={impl!r} cannot run this call: {reasons[impl]}; impl='auto' would choose")
    return impl


@functools.cache
def _warn_reference(op: str, why: str) -> None:
    warnings.warn(
        f"{op}: only the dense reference can run here ({why}). It is for truth, not for speed: O(L S) time and memory. "
        "Install the kernels: `pip install longattn` with a C++ compiler on PATH for CPU, Triton for NVIDIA GPUs.",
        UserWarning,
        stacklevel=5,
    )


_plans: dict[Callable, Callable[..., Explanation]] = {}


def plan(op: Callable, explain_call: Callable[..., Explanation]) -> None:
    """Registers how a public function decides, as a function of the same arguments."""
    _plans[op] = explain_call


def explain(op: Callable, *args, **kwargs) -> Explanation:
    """Says for every engine whether it could run `op(*args, **kwargs)` and why not, and which one would.

    op: a public function of this package, e.g. `longattn.linear_attention`, or a `longattn.nn.MultiheadAttention`, for
        which it says which mechanism would run. Runs nothing.
    Raises what the call itself would raise for bad arguments, TypeError for a function that has no engines.
    """
    if hasattr(op, "_explain"):
        return op._explain(*args, **kwargs)
    if op not in _plans:
        known = ", ".join(sorted(f.__name__ for f in _plans))
        raise TypeError(f"explain: expected one of {known}, got {op!r}")
    return _plans[op](*args, **kwargs)


def without_autocast(device: str):
    """A context in which sums keep the dtype they are given."""
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else contextlib.nullcontext()
