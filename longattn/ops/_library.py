"""Raw ops of the dispatcher, `torch.ops.longattn.*`: their schemas, what they return without computing, what runs.

They are registered from here alone: torch notes where each comes from, and looks through all modules for a new place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("longattn", "FRAGMENT")


def define(name: str, schema: str) -> None:
    _LIBRARY.define(name + schema)


def fake(name: str) -> Callable[[Callable], Callable]:
    """A decorator: shapes, dtypes and strides of the results for tensors without memory."""

    def register(function: Callable) -> Callable:
        torch.library.register_fake(f"longattn::{name}", function, lib=_LIBRARY)
        return function

    return register


def run(**functions: Callable) -> None:
    """op=function: the launchers choose their engine by themselves."""
    for name, function in functions.items():
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, function, key)
