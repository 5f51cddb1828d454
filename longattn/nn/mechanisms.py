"""Mechanisms: small frozen descriptions of an attention, given to `longattn.nn.MultiheadAttention(mechanism=...)`.

A new one is a frozen dataclass here with `attend` and `weights`; the module asks for nothing else.
"""

from __future__ import annotations

import abc
import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..favor import Favor
from ..features import FUSED, FeatureMap
from ..ops import _check, _dense
from ..ops._dispatch import IMPLS, without_autocast
from ..ops.favor import weights as favor_weights
from ..ops.linear import linear_attention
from ..ops.softmax import softmax_attention


class Mechanism(abc.ABC):
    """What runs between the projections of an attention module.

    Descriptions hold data only: equal fields make equal, hashable, picklable descriptions. A field that is an nn.Module
    becomes a submodule of the attention, under the field's name: it trains, moves and is saved with it, and two
    attentions given the same one share it.
    """

    # whether any [L, S] mask can be honoured; otherwise causality and key padding only
    takes_attn_mask: ClassVar[bool] = False
    # whether keys may come from another tensor than queries
    takes_keys: ClassVar[bool] = True
    # what runs a call whose masks `chosen` cannot honour; None: it is refused
    otherwise: ClassVar[Mechanism | None] = None

    def __init_subclass__(cls, *, name: str | None = None, **kwargs) -> None:
        """name: under which `mechanism=` finds the class with its defaults."""
        super().__init_subclass__(**kwargs)
        if name is not None:
            NAMED[name] = cls

    @abc.abstractmethod
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        is_causal: bool,
        key_padding_mask: Tensor | None,
        dropout_p: float,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """q `[B, H, L, D]`, k and v `[B, H, S, D]`, key_padding_mask bool `[B, S]` -> `[B, H, L, D]`.

        attn_mask (as in F.scaled_dot_product_attention) comes only where `takes_attn_mask`, and never with is_causal.
        """

    @abc.abstractmethod
    def weights(self, q: Tensor, k: Tensor, *, is_causal: bool, key_padding_mask: Tensor | None) -> Tensor:
        """The weights `[B, H, L, S]` with which `attend` sums the values, before dropout."""

    def attend_with_weights(
        self, q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float, attn_mask: Tensor | None = None, **masks
    ) -> tuple[Tensor, Tensor]:
        """`attend` and `weights` of one call."""
        return self.attend(q, k, v, dropout_p=dropout_p, **masks), self.weights(q, k, **masks)

    def chosen(self, L: int, S: int, head_dim: int, like: Tensor, is_causal: bool) -> Mechanism:
        """What runs a call of L queries and S keys, with the dtype and device of `like`: itself, but for `Auto`."""
        return self

    def note(self, head_dim: int, like: Tensor, is_causal: bool) -> str:
        """How it chooses, for people; empty where there is no choice."""
        return ""

    def work(self, is_causal: bool) -> tuple[str, float] | None:
        """What a break-even with exact attention goes by: a name for this kind of mechanism, and a number that its time
        for a token grows with. None: nothing is known."""
        return None

    def submodules(self, num_heads: int) -> dict[str, nn.Module]:
        """What an attention of so many heads has of its own, by name of the field."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, nn.Module)}

    def with_submodules(self, own: dict[str, nn.Module]) -> Mechanism:
        """The same with these in place of `submodules`."""
        return dataclasses.replace(self, **own)

    def __repr__(self) -> str:
        shown = []
        # what does not count in a comparison is made for each attention
        for field in (x for x in dataclasses.fields(self) if x.compare):
            value = getattr(self, field.name)
            if isinstance(value, nn.Module):
                shown.append(f"{field.name}={type(value).__name__}({value.extra_repr()})")
            elif value != field.default:
                shown.append(f"{field.name}={getattr(value, '__name__', repr(value))}")
        return f"{type(self).__name__}({', '.join(shown)})"


# what `mechanism=` takes by name, beside "favor"
NAMED: dict[str, type[Mechanism]] = {}


@dataclass(frozen=True, repr=False)
class Exact(Mechanism, name="exact"):
    """Softmax attention, `longattn.softmax_attention`. Its weights are those after dropout, as torch returns them.

    nan_compat: where weights are asked for, a query that sees no key gets NaN, in its output, weights and gradients, as
        in torch.nn.MultiheadAttention; without weights both give 0.
    """

    nan_compat: bool = False

    takes_attn_mask: ClassVar[bool] = True

    def attend(self, q, k, v, **arguments) -> Tensor:
        return softmax_attention(q, k, v, **arguments)

    def weights(self, q, k, **masks) -> Tensor:
        return self.attend_with_weights(q, k, k, dropout_p=0.0, **masks)[1]

    def attend_with_weights(self, q, k, v, *, is_causal, key_padding_mask, dropout_p, attn_mask=None):
        if q.is_complex():
            _check.fail("MultiheadAttention", f"there is no softmax of complex numbers, got {q.dtype}", TypeError)
        masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask, "is_causal": is_causal}
        return _dense.attend(q, k, v, dropout_p=dropout_p, nan_compat=self.nan_compat, **masks)


@dataclass(frozen=True, repr=False)
class Linear(Mechanism, name="linear"):
    """Linear attention, `longattn.linear_attention`: a kernel in place of the softmax, linear in the length.

    feature_map: "elu", "relu", "identity", a callable `[..., D] -> [..., M]`, or an nn.Module that is one, such as
        `longattn.Favor`, which may also be given as the mechanism itself.
    normalize: divide by the sum of the weights.
    scale: multiplies the weights where normalize=False; None is 1.
    impl: the engine, as in `longattn.linear_attention`.

    Causality needs L == S. The weights are never formed, so the module's dropout acts on the attention's output (before
    out_proj); weights asked for with need_weights are formed on the side, without dropout.
    """

    feature_map: FeatureMap = "elu"
    normalize: bool = True
    scale: float | None = None
    impl: str = "auto"

    def __post_init__(self):
        named = isinstance(self.feature_map, str) and self.feature_map in FUSED
        if not callable(self.feature_map) and not named:
            known = ", ".join(FUSED)
            _check.fail("Linear", f"feature_map must be one of {known} or a callable, got {self.feature_map!r}")
        if self.impl not in ("auto", *IMPLS):
            known = ", ".join(map(repr, IMPLS))
            _check.fail("Linear", f"impl must be 'auto' or one of {known}, got {self.impl!r}")

    def attend(self, q, k, v, *, is_causal, key_padding_mask, dropout_p, attn_mask=None) -> Tensor:
        output = linear_attention(
            q,
            k,
            v,
            feature_map=self.feature_map,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            scale=self.scale,
            normalize=self.normalize,
            impl=self.impl,
        )
        return output if dropout_p == 0 else F.dropout(output, dropout_p)

    def work(self, is_causal):
        if isinstance(self.feature_map, Favor):
            return "favor", float(self.feature_map.n_features)
        return "linear", 1.0

    def weights(self, q, k, *, is_causal, key_padding_mask) -> Tensor:
        if isinstance(self.feature_map, Favor):
            return favor_weights(q, k, self.feature_map, is_causal=is_causal, key_padding_mask=key_padding_mask)
        acc = torch.float64 if q.dtype == torch.float64 else torch.float32
        if callable(self.feature_map):
            phi_q, phi_k = self.feature_map(q).to(acc), self.feature_map(k).to(acc)
        else:
            phi_q, phi_k = FUSED[self.feature_map](q.to(acc)), FUSED[self.feature_map](k.to(acc))
        if key_padding_mask is not None:
            phi_k = phi_k.masked_fill(key_padding_mask[:, None, :, None], 0)
        with without_autocast(q.device.type):
            w = phi_q @ phi_k.mT  # [B, H, L, S]
        if is_causal:
            w = w.tril()
        if not self.normalize:
            return (w if self.scale is None else self.scale * w).to(q.dtype)
        z = w.sum(-1, keepdim=True)  # [B, H, L, 1]
        return torch.where(z == 0, 0, w / torch.where(z == 0, 1, z)).to(q.dtype)


def resolve(mechanism: str | Mechanism | Favor, head_dim: int | None = None) -> Mechanism:
    """A mechanism from its name, from itself or from a Favor map; ValueError or TypeError in a sentence.

    head_dim: of the attention it is for, which "favor" needs.
    """
    if isinstance(mechanism, Mechanism):
        return mechanism
    if isinstance(mechanism, Favor):
        return Linear(feature_map=mechanism)
    examples = "or a description such as longattn.Linear() or longattn.Favor(head_dim)"
    if not isinstance(mechanism, str):
        came = _check.describe(mechanism)
        _check.fail("MultiheadAttention", f"mechanism must be a name {examples}, got {came}", TypeError)
    if mechanism == "favor" and head_dim is not None:
        return Linear(feature_map=Favor(head_dim))
    if mechanism not in NAMED:
        known = ", ".join(map(repr, [*NAMED, "favor"][: None if head_dim is not None else -1]))
        _check.fail("MultiheadAttention", f"mechanism must be one of {known} {examples}, got {mechanism!r}")
    return NAMED[mechanism]()
