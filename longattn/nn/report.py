"""What another mechanism would change in a trained model, for each layer and head."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import json
import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import fidelity
from ..favor import Favor
from ..ops import _check
from . import masks
from .attention import MultiheadAttention, favor_of
from .convert import check_fits, sharing
from .mechanisms import Exact, Mechanism, resolve

OP = "fidelity_report"
# relative errors of a head's output: as good as exact; what fine-tuning makes up for
GOOD, TUNABLE = 0.1, 0.5
# of distances between weights: the estimate is good; centring is worth it where it leaves this share of the error
CLOSE, CENTRED = 0.1, 0.7


@dataclass(frozen=True)
class Row:
    """One head of one call of a layer. Numbers are None where they could not be had.

    layer: the module's name in the model, "" for the model itself; call: 0 for its first call; head: from 0.
    output_error: |o_mechanism - o_exact| / |o_exact| over the head's attention output, before out_proj.
    relative_variance, effective_features, error, averaging, exact_averaging: those of `longattn.fidelity.Fidelity`, for
        a Favor.
    centred_error: `error` as it would be with center_keys=True, where that is not on and the output error is not small.
    recommendation, why: what to do, and the reason.
    """

    layer: str
    call: int
    head: int
    output_error: float | None = None
    relative_variance: float | None = None
    effective_features: float | None = None
    error: float | None = None
    averaging: float | None = None
    exact_averaging: float | None = None
    centred_error: float | None = None
    recommendation: str = ""
    why: str = ""

    def is_noise(self) -> bool:
        # many terms of a sum make up for some noise in each, which a small error shows
        return (self.relative_variance or 0) > (fidelity.NOISE if self.output_error <= TUNABLE else 1)


# the first that holds, for a row and the map (None: the mechanism has none)
RULES = (
    ("keep exact", lambda row, favor: row.output_error is None, "it could not be measured"),
    ("use", lambda row, favor: row.output_error <= GOOD, "the output is close to exact attention's"),
    (
        "center_keys",
        lambda row, favor: row.centred_error is not None and row.centred_error <= CENTRED * row.error,
        "its keys have a mean that the softmax does not see: center_keys=True lowers the error of the weights",
    ),
    (
        "normalize",
        lambda row, favor: favor and row.is_noise() and favor.normalize is None,
        "the estimate is noise for queries and keys of this length: normalize='l2' with a temperature, and fine-tune",
    ),
    (
        "raise temperature",
        lambda row, favor: favor and row.is_noise(),
        "the estimate is noise at this temperature: raise it, and fine-tune",
    ),
    (
        "lower temperature",
        lambda row, favor: favor and row.output_error > TUNABLE and (row.averaging or 0) < fidelity.AVERAGING,
        "its weights are close to averaging: lower the temperature, and fine-tune",
    ),
    (
        "fine-tune",
        lambda row, favor: favor and row.error is not None and row.error <= CLOSE and row.output_error > GOOD,
        "its own kernel is estimated well, but is not the one this layer was trained with",
    ),
    (
        "more features",
        lambda row, favor: favor and favor.kind != "relu" and row.output_error <= TUNABLE,
        "the estimate is sound but coarse: more features, and fine-tune",
    ),
    (
        "fine-tune",
        lambda row, favor: row.output_error <= TUNABLE,
        "the output changes by no more than training makes up for",
    ),
    ("keep exact", lambda row, favor: True, "the output would be another one"),
)


def recommend(row: Row, favor: Favor | None) -> tuple[str, str]:
    """What to do about a head, and why."""
    return next((label, why) for label, holds, why in RULES if holds(row, favor))


# of the table: title, field, what it is
COLUMNS = (
    ("layer", "layer", ""),
    ("head", "head", ""),
    ("output", "output_error", "relative error of the head's output"),
    ("weights", "error", "distance from softmax's"),
    ("equal", "averaging", "distance from equal weights"),
    ("exact", "exact_averaging", "that distance of softmax's"),
    ("variance", "relative_variance", "of the estimate, over its square"),
    ("used", "effective_features", "features that count"),
    ("recommended", "recommendation", ""),
)


@dataclass(frozen=True)
class FidelityReport:
    """mechanism: its description; rows: `Row`, in the order of the model's calls."""

    mechanism: str
    rows: tuple[Row, ...]

    def _shown(self) -> tuple[list[str], list[list[str]], str]:
        """-> titles, cells, and what they mean"""
        columns = [c for c in COLUMNS if any(getattr(row, c[1]) is not None for row in self.rows)]
        legend = "; ".join(f"{title}: {meaning}" for title, _, meaning in columns if meaning)
        cells = [[_cell(row, name) for _, name, _ in columns] for row in self.rows]
        return [title for title, *_ in columns], cells, "\n".join(filter(None, [legend, *self.reasons()]))

    def reasons(self) -> list[str]:
        """What is recommended, and why: one line for each pair that occurs."""
        return list(dict.fromkeys(f"{row.recommendation}: {row.why}" for row in self.rows))

    def table(self):
        """A `rich.table.Table`; rich comes with `pip install 'longattn[cli]'`."""
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table

        titles, cells, notes = self._shown()
        table = Table(
            box=SIMPLE_HEAD,
            title=escape(self.mechanism),
            caption=escape(notes),
            caption_justify="left",
            collapse_padding=True,
            pad_edge=False,
        )
        for title in titles:
            words = title in ("layer", "recommended")
            table.add_column(title, justify="left" if words else "right", overflow="fold", no_wrap=title != "layer")
        for before, line in zip([None, *cells], cells, strict=False):
            again = before is not None and before[0] == line[0]
            table.add_row(*map(escape, ["" if again else line[0], *line[1:]]))
        return table

    def __str__(self) -> str:
        titles, cells, notes = self._shown()
        widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
        text = ["  ".join(x.ljust(n) for x, n in zip(line, widths, strict=True)).rstrip() for line in (titles, *cells)]
        return "\n".join([self.mechanism, *text, notes])

    def to_json(self) -> str:
        """One JSON document; a number beyond float64 is the largest one, one that is not there is null."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        return json.dumps({"mechanism": self.mechanism, "rows": rows}, indent=1, allow_nan=False)

    def print(self) -> None:
        """The table, or plain text where rich is not installed."""
        try:
            from rich.console import Console
        except ImportError:
            print(self)
        else:
            Console().print(self.table())


def _cell(row: Row, name: str) -> str:
    value = getattr(row, name)
    if name == "layer":
        return (value or "(model)") + (f" (call {row.call})" if row.call else "")
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def fidelity_report(
    model: nn.Module, batch, mechanism: str | Mechanism | Favor, *, quiet: bool = False
) -> FidelityReport:
    """Runs `model` once with exact attention and says, per layer and head, what `mechanism` would make of it.

    model: with torch.nn.MultiheadAttention or longattn.nn.MultiheadAttention in it (those of another mechanism compute
        exact attention for this run), in torch's encoders too.
    batch: what the model is called with: a tensor, a tuple of arguments, or a dict of keyword arguments.
    mechanism: `longattn.Favor(head_dim)`, `longattn.Linear(...)` or another description.
    quiet: do not print the report.

    The run is in eval mode without gradients; the modes are put back. Each attention is measured on the inputs that it
    gets when all of them are exact, with its own causality and padding; padded queries of self-attention do not count.
    A Favor with center_keys and without a stored mean is calibrated on each layer's own keys where the call is causal.
    The numbers of a Favor are those of `longattn.fidelity.fidelity`, on about 512 queries of a call. A head that the
    mechanism cannot take (its mask, add_bias_kv, another head_dim) has no numbers and the reason in `why`.

    Returns a `FidelityReport`: `rows`, `str()`, `table()` for rich, `to_json()`. Raises ValueError or TypeError in a
    sentence where there is nothing to measure.
    """
    if not isinstance(model, nn.Module):
        _check.fail(OP, f"model must be an nn.Module, got {_check.describe(model)}", TypeError)
    mechanism = resolve(mechanism)
    # what torch.compile made keeps the model it was made of
    model = getattr(model, "_orig_mod", model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    if not layers:
        _check.fail(OP, "the model has no torch.nn.MultiheadAttention or longattn.nn.MultiheadAttention in it")
    if all(not _fits(module, mechanism) for module in layers.values()):
        check_fits(OP, next(iter(layers.values())), mechanism)
    observers = [_Observer(name, module, mechanism) for name, module in layers.items()]
    rows: list[Row] = []
    with _exact_eval(model, layers.values()), torch.no_grad(), contextlib.ExitStack() as hooks:
        for observer in observers:
            # a hook within it is also what keeps torch's encoder layer from computing attention without calling it
            handle = observer.module.register_forward_pre_hook(observer.hook(rows), with_kwargs=True)
            hooks.callback(handle.remove)
        _call(model, batch)
    if not rows:
        names = ", ".join(repr(name) for name in layers)
        _check.fail(OP, f"the model called none of its attentions ({names}) for this batch")
    report = FidelityReport(repr(mechanism), tuple(rows))
    if not quiet:
        report.print()
    return report


def _fits(module: nn.MultiheadAttention, mechanism: Mechanism) -> bool:
    favor = favor_of(mechanism)
    return favor is None or favor.head_dim == module.head_dim


def _call(model: nn.Module, batch) -> None:
    if isinstance(batch, dict):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    elif isinstance(batch, Tensor):
        model(batch)
    else:
        expected = "a tensor, a tuple of arguments or a dict of keyword arguments"
        _check.fail(OP, f"batch must be {expected}, got {_check.describe(batch)}", TypeError)


@contextlib.contextmanager
def _exact_eval(model: nn.Module, layers) -> Iterator[None]:
    """eval mode, and exact attention in our modules."""
    training = [(module, module.training) for module in model.modules()]
    ours = [(module, module._mechanism, module._own) for module in layers if isinstance(module, MultiheadAttention)]
    try:
        model.eval()
        for module, *_ in ours:
            module._mechanism, module._own = Exact(), ()
        yield
    finally:
        for module, mechanism, own in ours:
            module._mechanism, module._own = mechanism, own
        for module, mode in training:
            module.training = mode


@dataclass(frozen=True, repr=False)
class _Probe(Exact):
    """Exact attention that hands over what it was given."""

    seen: list = dataclasses.field(default_factory=list, hash=False)

    def attend(self, q, k, v, **arguments) -> Tensor:
        output = super().attend(q, k, v, **arguments)
        self.seen.append((q, k, v, arguments, output))
        return output


class _Observer:
    """Measures the calls of one attention."""

    def __init__(self, name: str, module: nn.MultiheadAttention, mechanism: Mechanism) -> None:
        self.name, self.module, self.mechanism, self.calls = name, module, mechanism, 0

    def hook(self, rows: list[Row]):
        def observe(module, args, kwargs) -> None:
            try:
                found, why = self._measure(args, kwargs), ""
            except (ValueError, TypeError) as error:
                found, why = [{}] * self.module.num_heads, str(error)
            favor = favor_of(self.mechanism)
            for head, numbers in enumerate(found):
                row = Row(self.name, self.calls, head, **{name: _number(x) for name, x in numbers.items()})
                label, reason = recommend(row, favor)
                rows.append(dataclasses.replace(row, recommendation=label, why=why or reason))
            self.calls += 1

        return observe

    def _measure(self, args, kwargs) -> list[dict[str, float]]:
        """Numbers of each head; ValueError in a sentence where the mechanism cannot take the call."""
        if type(self.module) not in (nn.MultiheadAttention, MultiheadAttention):
            raise TypeError(f"{type(self.module).__name__} is a subclass, whose own forward may compute something else")
        check_fits(OP, self.module, self.mechanism)
        call = inspect.signature(nn.MultiheadAttention.forward).bind(self.module, *args, **kwargs)
        call.apply_defaults()
        _, *inputs = call.args
        options = dict(zip(list(call.arguments)[1:], inputs, strict=True))
        exact, arguments, tensors = self._run_exact(options)
        q, k, v = tensors
        padded = arguments["key_padding_mask"]
        if not self.mechanism.takes_attn_mask:
            # refuses a float mask that adds to scores
            masks.padding(options["key_padding_mask"], self.mechanism)
            causal = getattr(self.module, "causal", False)
            attn_mask, hint = options["attn_mask"], options["is_causal"]
            merged = masks.for_efficient(self.mechanism, attn_mask, padded, causal, hint, q.shape[2], k.shape[2])
            arguments = {**merged._asdict(), "dropout_p": 0.0}
        # in self-attention a padded key is a padded query too
        skip = padded if options["query"] is options["key"] else None
        is_causal = arguments["is_causal"]
        mechanism = self._calibrated(k, padded) if is_causal else self.mechanism
        output = mechanism.attend(q, k, v, **arguments)
        heads = [{"output_error": x} for x in _output_error(output, exact, skip)]
        favor = favor_of(mechanism)
        if favor is None:
            return heads
        found = fidelity.measure(favor, q, k, padded, is_causal, skip)
        for head, numbers in zip(heads, zip(*(x.tolist() for x in found), strict=True), strict=True):
            head.update(zip(fidelity.Fidelity._fields, numbers, strict=True))
        if not favor.center_keys and favor.kind != "relu" and any(x["output_error"] > GOOD for x in heads):
            centred = copy.deepcopy(favor)
            centred.center_keys = True
            centred.calibrate(k, padded)
            error = fidelity.measure(centred, q, k, padded, is_causal, skip).error.tolist()
            for head, centred_error in zip(heads, error, strict=True):
                head.update({"centred_error": centred_error} if head["output_error"] > GOOD else {})
        return heads

    def _run_exact(self, options: dict) -> tuple[Tensor, dict, tuple[Tensor, Tensor, Tensor]]:
        """-> the attention's output before out_proj, how it was called, and its q, k, v"""
        # torch takes the hint in place of the mask only where it forms no weights
        hint = options["is_causal"] and not (options["need_weights"] and options["attn_mask"] is not None)
        probe = _Probe()
        twin = sharing(self.module, probe)
        # hooks and adapters of out_proj are not called twice
        twin.out_proj = nn.Identity()
        with warnings.catch_warnings():
            # said once by the model's own call
            warnings.simplefilter("ignore")
            twin(**{**options, "need_weights": False, "is_causal": hint})
        q, k, v, arguments, output = probe.seen[0]
        return output, arguments, (q, k, v)

    def _calibrated(self, k: Tensor, padded: Tensor | None) -> Mechanism:
        """The mechanism, with a mean of this layer's keys if it needs one for a causal call."""
        favor = favor_of(self.mechanism)
        if favor is None or not favor.center_keys or favor.key_mean is not None:
            return self.mechanism
        favor = copy.deepcopy(favor)
        favor.calibrate(k, padded)
        return dataclasses.replace(self.mechanism, feature_map=favor)


def _output_error(output: Tensor, exact: Tensor, skip: Tensor | None) -> list[float]:
    """|output - exact| / |exact| of each head. output, exact: `[B, H, L, E]`; skip: bool `[B, L]`."""
    difference, exact = output.double() - exact.double(), exact.double()
    if skip is not None:
        difference, exact = (x.masked_fill(skip[:, None, :, None], 0) for x in (difference, exact))
    over, under = (x.square().sum((0, 2, 3)).sqrt() for x in (difference, exact))
    return torch.where(over == 0, 0, over / under).tolist()


def _number(x: float) -> float | None:
    return None if math.isnan(x) else max(-sys.float_info.max, min(x, sys.float_info.max))
