"""Local attention in modules: each token sees those near it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..ops import _check
from ..ops.softmax import Chunks, attend, attend_with_weights
from .mechanisms import Mechanism


def _refuse(attn_mask: Tensor | None) -> None:
    if attn_mask is not None:
        _check.fail("Local", 'attn_mask is not taken; use the mechanism "exact", with the window in the mask')


@dataclass(frozen=True, repr=False)
class Local(Mechanism, name="local"):
    """Softmax attention to the tokens near the query, exact, linear in the length: time O((L + S) window).

    window: query i sees keys j with |i - j| < window, so itself and the window - 1 before it, if causal.
    chunks: None, or (before, after): instead of that, a query sees the chunk of `window` tokens it is in, with so many
        chunks before and (unless causal) after it, as the local layers of Reformer do.
    impl: as in `longattn.softmax_attention`.

    Dropout acts on the weights, and weights asked for with need_weights are those after it, in O(L S) memory. Raises
    ValueError in a sentence. Child et al. 2019 (arXiv 1904.10509), Kitaev et al. 2020 (arXiv 2001.04451).
    """

    window: int = 128
    chunks: tuple[int, int] | None = None
    impl: str = "auto"

    def __post_init__(self):
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            _check.fail("Local", f"window must be a positive integer, got {self.window!r}")
        counts = (0, 0) if self.chunks is None else self.chunks
        if not isinstance(counts, tuple) or len(counts) != 2 or not all(type(n) is int and n >= 0 for n in counts):
            _check.fail("Local", f"chunks must be None or two counts, (before, after), got {self.chunks!r}")

    @property
    def _rule(self) -> dict:
        if self.chunks is None:
            return {"window": self.window}
        return {"chunks": Chunks(self.window, *self.chunks)}

    def attend(self, q, k, v, *, is_causal, key_padding_mask, dropout_p, attn_mask=None) -> Tensor:
        _refuse(attn_mask)
        masks = {"is_causal": is_causal, "key_padding_mask": key_padding_mask}
        return attend("Local", q, k, v, dropout_p=dropout_p, impl=self.impl, **masks, **self._rule)

    def work(self, is_causal):
        if self.chunks is None:
            return "local", float(self.window * (1 if is_causal else 2))
        before, after = self.chunks
        return "local", float(self.window * (before + (0.5 if is_causal else 1 + after)))

    def weights(self, q, k, **masks) -> Tensor:
        return self.attend_with_weights(q, k, k, dropout_p=0.0, **masks)[1]

    def attend_with_weights(self, q, k, v, *, dropout_p, attn_mask=None, **masks) -> tuple[Tensor, Tensor]:
        _refuse(attn_mask)
        return attend_with_weights("Local", q, k, v, dropout_p=dropout_p, **masks, **self._rule)
