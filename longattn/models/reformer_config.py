"""What a Reformer is made of, as data."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from ..favor import Favor
from ..nn.local import Local
from ..nn.lsh import LSH
from ..nn.mechanisms import Exact, Linear, Mechanism
from ..ops import _check, _lsh

NAMES = ("exact", "favor", "linear", "local", "lsh")
POSITIONS = ("axial", "rotary", "learned", None)
MERGES = ("mean", "cat")
KINDS = {kind.__name__: kind for kind in (Exact, Linear, Local, LSH)}
FAVOR_ARGUMENTS = (
    "head_dim", "n_features", "kind", "orthogonal", "scaling", "normalize", "seed", "center_keys", "exact_diagonal",
)  # fmt: skip


def _grid(length: int) -> tuple[int, int]:
    inner = 2 ** math.ceil(math.log2(max(length, 1)) / 2)
    return -(-length // inner), inner


@dataclass(frozen=True)
class ReformerConfig:
    """What a `Reformer` is made of. Data only: `to_json` and `from_json` keep it.

    vocab: tokens. dim: of each of the two streams. depth: layers. heads, head_dim (default dim / heads). hidden: of the
        feed-forward layers, default 4 dim.
    mechanisms: of the layers in turn, over and over: "lsh" (`longattn.nn.LSHSelfAttention`), "local", "exact",
        "linear", "favor", or descriptions such as `longattn.Local(256)`, around queries, keys and values.
    causal: each token sees those up to itself; else an encoder.
    max_length: longest input of axial and learned positions; the default number of buckets is made for it.
    positions: "axial", "rotary" (queries and keys), "learned" or None.
    axial_shape, axial_dims: of `longattn.nn.AxialPositionalEmbedding`; default a grid of max_length positions, summed.
    window: of "local". chunk_size, n_hashes, n_buckets: of "lsh". n_buckets is a number, even factors, or None for the
        default of max_length, whatever the length of an input. lsh: further arguments of LSHSelfAttention.
    reversible: keep no activations of the layers; the numbers are the same without. exact: the backward pass rebuilds
        them bit for bit. merge: how the two streams end, "mean" or "cat".
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
    lsh: Mapping = field(default_factory=dict)
    reversible: bool = True
    exact: bool = False
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
        for name in ("vocab", "dim", "depth", "heads", "max_length"):
            n = getattr(self, name)
            if not isinstance(n, int) or isinstance(n, bool) or n < 1:
                _check.fail("ReformerConfig", f"{name} must be a positive whole number, got {n!r}")
        if self.head_dim is None and self.dim % self.heads:
            _check.fail("ReformerConfig", f"dim {self.dim} is no multiple of heads {self.heads}; pass head_dim")
        for name, known in (("positions", POSITIONS), ("merge", MERGES)):
            if getattr(self, name) not in known:
                found = f"{', '.join(map(repr, known))}, got {getattr(self, name)!r}"
                _check.fail("ReformerConfig", f"{name} must be one of {found}")
        if self.tied and self.merge == "cat":
            _check.fail("ReformerConfig", "merge='cat' ends in 2 dim features, which a tied embedding cannot read")
        set_ = object.__setattr__
        for name in ("mechanisms", "axial_shape", "axial_dims", "n_buckets"):
            x = getattr(self, name)
            set_(self, name, tuple(x) if isinstance(x, list) else x)
        if not isinstance(self.mechanisms, tuple) or not self.mechanisms:
            _check.fail("ReformerConfig", f"mechanisms must be a list of at least one, got {self.mechanisms!r}")
        for x in self.mechanisms:
            if x not in NAMES and not isinstance(x, Mechanism):
                known = f"{', '.join(map(repr, NAMES))} or a description such as longattn.Local(256)"
                _check.fail("ReformerConfig", f"a mechanism must be one of {known}, got {x!r}")
        set_(self, "head_dim", self.head_dim or self.dim // self.heads)
        set_(self, "hidden", self.hidden or 4 * self.dim)
        if self.positions == "axial":
            set_(self, "axial_shape", self.axial_shape or _grid(self.max_length))
            set_(self, "max_length", math.prod(self.axial_shape))
        if self.n_buckets is None:
            set_(self, "n_buckets", _lsh.default_buckets(self.max_length, self.chunk_size))

    def to_json(self) -> str:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return json.dumps(fields | {"mechanisms": [_describe(x) for x in self.mechanisms]}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> ReformerConfig:
        fields = json.loads(text)
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or not fields.keys() <= known:
            _check.fail("ReformerConfig.from_json", "this is no configuration of a Reformer")
        return cls(**fields | {"mechanisms": [_mechanism(x) for x in fields["mechanisms"]]})


def _describe(mechanism: str | Mechanism):
    if isinstance(mechanism, str):
        return mechanism
    fields = {f.name: getattr(mechanism, f.name) for f in dataclasses.fields(mechanism) if f.compare}
    favor = fields.get("feature_map")
    if isinstance(favor, Favor):
        learned = isinstance(favor.log_temperature, nn.Parameter)
        arguments = {name: getattr(favor, name) for name in FAVOR_ARGUMENTS}
        fields["feature_map"] = arguments | {"learn_temperature": learned}
    elif type(mechanism) is not KINDS.get(type(mechanism).__name__) or callable(favor):
        _check.fail("ReformerConfig.to_json", f"{mechanism!r} holds code, which JSON does not; build the model by hand")
    return {"kind": type(mechanism).__name__} | fields


def _mechanism(x: str | dict) -> str | Mechanism:
    if isinstance(x, str):
        return x
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in x.items() if name != "kind"}
    if isinstance(fields.get("feature_map"), dict):
        # its temperature is among the tensors
        fields["feature_map"] = Favor(**fields["feature_map"])
    return KINDS[x["kind"]](**fields)
