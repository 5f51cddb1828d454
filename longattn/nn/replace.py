"""Swapping the attention inside models that people already have, and swapping it back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ..favor import Favor
from ..ops import _check
from .attention import refusal
from .convert import KEPT, give_back, misfit, take_over
from .mechanisms import Mechanism, resolve

OP = "replace_attention"
Where = Callable[[str, nn.Module], bool] | str | Iterable[str]


class Replacement(NamedTuple):
    """name: of the module in the model, "" for the model itself, all names of a shared one joined by " = ". what: its
    class, or what it is now; why: it was not replaced, "" where it was."""

    name: str
    what: str
    why: str = ""


@dataclass(frozen=True)
class ReplacementReport:
    """rows: `Replacement`, in the order of the model; nested: encoders whose nested-tensor path was turned off."""

    mechanism: str
    rows: tuple[Replacement, ...]
    nested: tuple[str, ...]

    @property
    def replaced(self) -> list[str]:
        return [row.name for row in self.rows if not row.why]

    def __str__(self) -> str:
        cells = [(row.name or "(model)", row.what, row.why and f"not replaced: {row.why}") for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [f"{OP}: {len(self.replaced)} of {len(self.rows)} attentions now compute {self.mechanism}"]
        for row in cells:
            lines.append("  " + "  ".join(x.ljust(n) for x, n in zip(row, widths, strict=True)).rstrip())
        if self.nested:
            names = ", ".join(name or "(model)" for name in self.nested)
            lines.append(f"  nested tensors are off in {names}: padding stays a mask")
        return "\n".join(lines)


def replace_attention(
    model: nn.Module, mechanism: str | Mechanism | Favor, *, where: Where | None = None, report: bool = True
) -> ReplacementReport:
    """Gives every `torch.nn.MultiheadAttention` in a model another mechanism, in place.

    model: any nn.Module, also one that is an attention itself, or that torch.compile has wrapped.
    mechanism: as in `longattn.nn.MultiheadAttention`. By name, each attention gets one of its own; the modules of a
        description (a Favor) are shared by all.
    where: which attentions: a function of name and module, a regular expression found in the name, or names. None: all.
    report: print the table of what was and was not replaced.

    Each attention stays the object it is and becomes a `longattn.nn.MultiheadAttention`: its Parameters (an optimizer
    holds them still), parametrizations, hooks, adapters on out_proj, dtype, device and training mode are what they
    were, and a shared one is replaced once. An attention that is ours already takes the new mechanism. In each
    nn.TransformerEncoder around one the nested-tensor path is turned off.

    Left alone, with the reason in the table: subclasses of torch's class, quantised and fully-sharded ones, those that
    the mechanism does not fit (add_bias_kv, add_zero_attn, the head_dim of a Favor), other attention classes.
    Returns the table as a `ReplacementReport`. Raises ValueError or TypeError in a sentence where nothing would be
    replaced, and then changes nothing. `restore_attention` undoes it.
    """
    if not isinstance(model, nn.Module):
        _check.fail(OP, f"model must be an nn.Module, got {_check.describe(model)}", TypeError)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    attentions = [module for module in names if isinstance(module, nn.MultiheadAttention)]
    chosen = _chosen(attentions, names, where)
    rows, planned = [], []
    for module in attentions:
        name = " = ".join(names[module])
        why = "where leaves it out" if module not in chosen else misfit(module)
        found = None if why else resolve(mechanism, module.head_dim)
        why = why or refusal(module, found)
        rows.append(Replacement(name, type(module).__name__ if why else repr(found), why or ""))
        planned += [] if why else [(module, found)]
    rows += _others(names)
    if not planned:
        why = "; ".join(dict.fromkeys(f"{row.name or 'the model'}: {row.why}" for row in rows))
        why = why or "the model has no torch.nn.MultiheadAttention in it"
        _check.fail(OP, f"nothing to replace: {why}")
    for module, found in planned:
        take_over(module, found, None, OP)
    nested = [x for x in names if isinstance(x, nn.TransformerEncoder) and getattr(x, "use_nested_tensor", False)]
    nested = [x for x in nested if any(KEPT in inner.__dict__ for inner in x.modules())]
    for encoder in nested:
        encoder.__dict__[KEPT] = {"use_nested_tensor": encoder.use_nested_tensor}
        encoder.use_nested_tensor = False
    what = mechanism if isinstance(mechanism, str) else repr(resolve(mechanism))
    result = ReplacementReport(what, tuple(rows), tuple(names[x][0] for x in nested))
    if report:
        print(result)
    return result


def restore_attention(model: nn.Module) -> list[str]:
    """Undoes `replace_attention`, all of them if there were several: classes, hooks, encoders and what an attention of
    ours computed before. Returns the names of the modules that changed back; none is no error."""
    if not isinstance(model, nn.Module):
        _check.fail("restore_attention", f"model must be an nn.Module, got {_check.describe(model)}", TypeError)
    restored = []
    for name, module in model.named_modules():
        if KEPT not in module.__dict__:
            continue
        if isinstance(module, nn.MultiheadAttention):
            give_back(module)
        else:
            module.__dict__.update(module.__dict__.pop(KEPT))
        restored.append(name)
    return restored


def _chosen(attentions: list[nn.Module], names: dict[nn.Module, list[str]], where: Where | None) -> set[nn.Module]:
    if where is None:
        return set(attentions)
    if isinstance(where, str):
        try:
            pattern = re.compile(where)
        except re.error as error:
            _check.fail(OP, f"where {where!r} is no regular expression ({error}); names go into a list")
        found = [x for x in attentions if any(pattern.search(name) for name in names[x])]
    elif callable(where):
        found = [x for x in attentions if any(where(name, x) for name in names[x])]
    elif not isinstance(where, Iterable):
        expected = "a function of name and module, a regular expression or names"
        _check.fail(OP, f"where must be {expected}, got {_check.describe(where)}", TypeError)
    else:
        wanted, known = list(where), {name for x in attentions for name in names[x]}
        missing = [name for name in wanted if name not in known]
        if missing:
            have = ", ".join(map(repr, sorted(known))) or "none"
            _check.fail(OP, f"where names {missing[0]!r}, which is no attention of this model; it has {have}")
        found = [x for x in attentions if any(name in wanted for name in names[x])]
    return set(found)


def _others(names: dict[nn.Module, list[str]]) -> list[Replacement]:
    """One row for each class of attention that is not torch's: what somebody may take to be replaced."""
    classes: dict[type, list[str]] = {}
    for module, known in names.items():
        if "Attention" in type(module).__name__ and not isinstance(module, nn.MultiheadAttention):
            classes.setdefault(type(module), []).append(known[0])
    rows = []
    for cls, found in classes.items():
        why = "it is no torch.nn.MultiheadAttention"
        if cls.__module__.partition(".")[0] == "transformers":
            why += "; longattn.integrations.transformers is for these models"
        more = f" and {len(found) - 1} more" if found[1:] else ""
        rows.append(Replacement(found[0] + more, cls.__name__, why))
    return rows
