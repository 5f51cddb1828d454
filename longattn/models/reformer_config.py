"""What a Reformer is made of, as data."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..favor import Favor
from ..nn.chunked import ACTIVATIONS
from ..nn.local import Local
from ..nn.lsh import LSH, LSHSelfAttention
from ..nn.mechanisms import Exact, Linear, Mechanism
from ..ops import _check, _lsh
from ..ops.reversible import check_grid

NAMES = ("exact", "favor", "linear", "local", "lsh")
POSITIONS = ("axial", "rotary", "learned", None)
MERGES = ("mean", "cat")
WHOLE = (
    "vocab", "dim", "depth", "heads", "head_dim", "hidden", "max_length", "window", "chunk_size", "n_hashes",
    "feed_forward_chunk", "loss_chunk",
)  # fmt: skip
# of these, those with a default that follows from others, or with none
DERIVED = ("head_dim", "hidden", "feed_forward_chunk")
KINDS = {kind.__name__: kind for kind in (Exact, Linear, Local, LSH)}
FAVOR_ARGUMENTS = (
    "head_dim", "n_features", "kind", "orthogonal", "scaling", "normalize", "seed", "center_keys", "exact_diagonal",
)  # fmt: skip


def _grid(length: int) -> tuple[int, int]:
    inner = 2 ** math.ceil(math.log2(max(length, 1)) / 2)
    return -(-length // inner), inner


def _is_whole(x) -> bool:
    return type(x) is int and x >= 1


def _frozen(x):
    """Lists, as JSON has them, become tuples, which can be hashed."""
    return tuple(map(_frozen, x)) if isinstance(x, (list, tuple)) else x


@dataclass(frozen=True)
class ReformerConfig:
    """What a `Reformer` is made of. Data only: `to_json` and `from_json` keep it, and equal fields make equal ones.
    Defaults that follow from other fields stay None here, so that `dataclasses.replace` is right; `filled` has them.

    vocab: tokens. dim: of each of the two streams. depth: layers. heads, head_dim (default dim / heads). hidden: of the
        feed-forward layers, default 4 dim.
    mechanisms: of the layers in turn, over and over: "lsh" (`longattn.nn.LSHSelfAttention`), "local", "exact",
        "linear", "favor", or descriptions such as `longattn.Local(256)`, around queries, keys and values.
    causal: each token sees those up to itself; else an encoder.
    max_length: longest input of axial and learned positions; the default number of buckets is made for it.
    positions: "axial", "rotary" (queries and keys), "learned" or None.
    axial_shape, axial_dims: of `longattn.nn.AxialPositionalEmbedding`; default a grid of at least max_length positions,
        summed. axial_dims are as many as axes, and their sum is dim.
    window: of "local". chunk_size, n_hashes, n_buckets: of "lsh". n_buckets is a number, even factors, or None for the
        default of max_length, whatever the length of an input. lsh: a mapping of further arguments of LSHSelfAttention,
        kept as sorted pairs.
    reversible: keep no activations of the layers; the numbers are the same without. exact, grid: as in
        `longattn.nn.ReversibleBlock`: the backward pass rebuilds them bit for bit. merge: how the two streams end,
        "mean" or "cat".
    tied: the embedding is the head too.
    activation, feed_forward_chunk: of `longattn.nn.ChunkedFeedForward`. loss_chunk: tokens whose logits exist at once.
    dropout: of embeddings and layers; attention_dropout: of the weights.
    seed: layer i draws its rotations or features from seed + i.
    """

    vocab: int = 256
    dim: int = 256
    depth: int = 6
    heads: int = 4
    head_dim: int | None = None
    hidden: int | None = None
    mechanisms: tuple[str | Mechanism, ...] = ("local", "lsh")
    causal: bool = True
    max_length: int = 4096
    positions: str | None = "axial"
    axial_shape: tuple[int, ...] | None = None
    axial_dims: tuple[int, ...] | None = None
    window: int = 128
    chunk_size: int = 64
    n_hashes: int = 1
    n_buckets: int | tuple[int, ...] | None = None
    lsh: Mapping | tuple[tuple[str, object], ...] = ()
    reversible: bool = True
    exact: bool = False
    grid: float = 2**-13
    merge: str = "mean"
    tied: bool = True
    activation: str = "gelu"
    feed_forward_chunk: int | None = None
    loss_chunk: int = 8192
    dropout: float = 0.0
    attention_dropout: float = 0.0
    norm_eps: float = 1e-5
    seed: int = 0

    def __post_init__(self):
        set_ = object.__setattr__
        for name in ("mechanisms", "axial_shape", "axial_dims", "n_buckets"):
            set_(self, name, _frozen(getattr(self, name)))
        try:
            set_(self, "lsh", tuple(sorted((name, _frozen(x)) for name, x in dict(self.lsh).items())))
        except (TypeError, ValueError):
            self._fail("lsh", "a mapping of arguments of LSHSelfAttention")
        for name in WHOLE:
            x = getattr(self, name)
            if not _is_whole(x) and (x is not None or name not in DERIVED):
                self._fail(name, f"a positive whole number{' or None' if name in DERIVED else ''}")
        self._check_numbers()
        self._check_names()
        if self.head_dim is None and self.dim % self.heads:
            _check.fail("ReformerConfig", f"dim {self.dim} is no multiple of heads {self.heads}; pass head_dim")
        if self.tied and self.merge == "cat":
            _check.fail("ReformerConfig", "merge='cat' ends in 2 dim features, which a tied embedding cannot read")
        if self.positions == "axial":
            self._check_axes()

    def _fail(self, name: str, expected: str):
        _check.fail("ReformerConfig", f"{name} must be {expected}, got {getattr(self, name)!r}")

    def _check_numbers(self) -> None:
        for name in ("dropout", "attention_dropout", "norm_eps"):
            x, most = getattr(self, name), math.inf if name == "norm_eps" else 1
            if isinstance(x, bool) or not isinstance(x, (int, float)) or not 0 <= x <= most or x == math.inf:
                self._fail(name, "a number from 0 on" if name == "norm_eps" else "a probability from 0 to 1")
        buckets = self.n_buckets if isinstance(self.n_buckets, tuple) else (self.n_buckets,)
        if self.n_buckets is not None and not (buckets and all(_is_whole(x) and x % 2 == 0 for x in buckets)):
            self._fail("n_buckets", "None, an even number or a list of them, whose product it is")
        if type(self.seed) is not int:
            self._fail("seed", "a whole number")
        check_grid("ReformerConfig", self.grid)

    def _check_names(self) -> None:
        for name, known in (("positions", POSITIONS), ("merge", MERGES), ("activation", tuple(ACTIVATIONS))):
            if getattr(self, name) not in known:
                self._fail(name, f"one of {', '.join(map(repr, known))}")
        if not isinstance(self.mechanisms, tuple) or not self.mechanisms:
            self._fail("mechanisms", "a list of at least one")
        for x in self.mechanisms:
            if not (x in NAMES if isinstance(x, str) else isinstance(x, Mechanism)):
                known = f"{', '.join(map(repr, NAMES))} or a description such as longattn.Local(256)"
                _check.fail("ReformerConfig", f"a mechanism must be one of {known}, got {x!r}")
        unknown = dict(self.lsh).keys() - inspect.signature(LSHSelfAttention).parameters.keys()
        if unknown:
            came = ", ".join(map(str, unknown))
            _check.fail("ReformerConfig", f"lsh must hold arguments of LSHSelfAttention, which has no {came}")

    def _check_axes(self) -> None:
        for name in ("axial_shape", "axial_dims"):
            x = getattr(self, name)
            if x is not None and not (isinstance(x, tuple) and x and all(map(_is_whole, x))):
                self._fail(name, "None or a list of positive whole numbers")
        shape = self.axial_shape or _grid(self.max_length)
        if math.prod(shape) < self.max_length:
            has = f"{' x '.join(map(str, shape))} = {math.prod(shape)} positions"
            _check.fail("ReformerConfig", f"axial_shape has {has}, which max_length {self.max_length} is beyond")
        if self.axial_dims is not None and (len(self.axial_dims) != len(shape) or sum(self.axial_dims) != self.dim):
            self._fail("axial_dims", f"{len(shape)} numbers, one for each axis, whose sum is dim = {self.dim}")

    def filled(self) -> ReformerConfig:
        """The same, with head_dim, hidden, axial_shape and n_buckets where they were None."""
        defaults = {
            "head_dim": self.dim // self.heads,
            "hidden": 4 * self.dim,
            "axial_shape": _grid(self.max_length),
            "n_buckets": _lsh.default_buckets(self.max_length, self.chunk_size),
        }
        return dataclasses.replace(self, **{name: x for name, x in defaults.items() if getattr(self, name) is None})

    def to_json(self) -> str:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        mechanisms = [_describe(x, self.mechanisms[:i]) for i, x in enumerate(self.mechanisms)]
        return json.dumps(fields | {"mechanisms": mechanisms, "lsh": dict(self.lsh)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> ReformerConfig:
        """What `to_json` wrote; fields that are not there have their defaults."""
        sentence = "this is no configuration of a Reformer"
        try:
            fields = json.loads(text)
            if not isinstance(fields, dict) or not fields.keys() <= {f.name for f in dataclasses.fields(cls)}:
                _check.fail("ReformerConfig.from_json", sentence)
            if "mechanisms" in fields:
                mechanisms = []
                for x in fields["mechanisms"]:
                    mechanisms.append(_mechanism(x, mechanisms))
                fields["mechanisms"] = mechanisms
        except (json.JSONDecodeError, LookupError, TypeError, AttributeError) as error:
            _check.fail("ReformerConfig.from_json", f"{sentence}: {type(error).__name__} {error}")
        return cls(**fields)


def _describe(mechanism: str | Mechanism, before: tuple[str | Mechanism, ...]):
    """before: the mechanisms in front of it, one of which may hold the same features."""
    if isinstance(mechanism, str):
        return mechanism
    fields = {f.name: getattr(mechanism, f.name) for f in dataclasses.fields(mechanism) if f.compare}
    favor = fields.get("feature_map")
    if isinstance(favor, Favor):
        same = [i for i, x in enumerate(before) if getattr(x, "feature_map", None) is favor]
        arguments = {name: getattr(favor, name) for name in FAVOR_ARGUMENTS}
        arguments |= {"learn_temperature": isinstance(favor.log_temperature, nn.Parameter)}
        fields["feature_map"] = {"of_mechanism": same[0]} if same else arguments
    elif type(mechanism) is not KINDS.get(type(mechanism).__name__) or callable(favor):
        _check.fail("ReformerConfig.to_json", f"{mechanism!r} holds code, which JSON does not; build the model by hand")
    return {"kind": type(mechanism).__name__} | fields


def _mechanism(x: str | dict, before: list[str | Mechanism]) -> str | Mechanism:
    if isinstance(x, str):
        return x
    fields = {name: _frozen(v) for name, v in x.items() if name != "kind"}
    favor = fields.get("feature_map")
    if isinstance(favor, dict):
        # its temperature is among the tensors
        shared = "of_mechanism" in favor
        fields["feature_map"] = before[favor["of_mechanism"]].feature_map if shared else Favor(**favor)
    return KINDS[x["kind"]](**fields)
