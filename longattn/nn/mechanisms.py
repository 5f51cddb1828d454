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
from ..ops import _check
from ..ops._dispatch import IMPLS, without_autocast
from ..ops.favor import weights as favor_weights
from ..ops.linear import linear_attention
from ..ops.softmax import softmax_attention, softmax_attention_with_weights


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

    def submodules(self) -> dict[str, nn.Module]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, nn.Module)}

    def __repr__(self) -> str:
        shown = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, nn.Module):
                shown.append(f"{field.name}={type(value).__name__}({value.extra_repr()})")
            elif value != field.default:
                shown.append(f"{field.name}={getattr(value, '__name__', repr(value))}")
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class Exact(Mechanism):
    """Softmax attention, `longattn.softmax_attention`. Its weights are those after dropout, as torch returns them."""

    takes_attn_mask: ClassVar[bool] = True

    def attend(self, q, k, v, **arguments) -> Tensor:
        return softmax_attention(q, k, v, **arguments)

    def weights(self, q, k, **masks) -> Tensor:
        return softmax_attention_with_weights(q, k, k, dropout_p=0.0, **masks).weights

    def attend_with_weights(self, q, k, v, **arguments):
        return softmax_attention_with_weights(q, k, v, **arguments)


@dataclass(frozen=True, repr=False)
class Linear(Mechanism):
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
        return F.dropout(output, dropout_p) if dropout_p > 0 else output

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


NAMED = {"exact": Exact, "linear": Linear}


def resolve(mechanism: str | Mechanism | Favor) -> Mechanism:
    """A mechanism from its name, from itself or from a Favor map; ValueError or TypeError in a sentence."""
    examples = "or a description such as longattn.Linear() or longattn.Favor(head_dim)"
    if isinstance(mechanism, Favor):
        return Linear(feature_map=mechanism)
    if isinstance(mechanism, str):
        if mechanism not in NAMED:
            known = ", ".join(map(repr, NAMED))
            _check.fail("MultiheadAttention", f"mechanism must be one of {known} {examples}, got {mechanism!r}")
        return NAMED[mechanism]()
    if not isinstance(mechanism, Mechanism):
        came = _check.describe(mechanism)
        _check.fail("MultiheadAttention", f"mechanism must be a name {examples}, got {came}", TypeError)
    return mechanism
