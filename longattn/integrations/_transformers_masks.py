"""What the mask functions of transformers allow, as far as the mechanisms can follow it without an `[L, S]` mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

from ..ops import _check
from ._engines import Engine


class Rules(NamedTuple):
    """A mask that a bool `[B, n]` alone cannot say.

    keys: that one, or None. window: keys that a causal query looks back on, itself included; any other on either side.
    starts: int32 boundaries of packed sequences, the rows of the batch end to end.
    """

    keys: Tensor | None
    window: int | None
    starts: Tensor | None

    # generate() prepares the mask of a static cache before the model does, and treats it as the tensor it expects
    ndim = 0

    def contiguous(self) -> Rules:
        return self


class Pattern(NamedTuple):
    """What a mask function says: segments, `[B, L]`, number the packed sequences."""

    is_causal: bool
    window: int | None = None
    segments: Tensor | None = None


_AND = masking_utils.and_masks(masking_utils.causal_mask_function).__code__
_REMAP = masking_utils.remap_positions_for_packed_sequence(None, None).__code__
_PACKED = masking_utils.packed_sequence_mask_function(None).__code__
_BEFORE = masking_utils.sliding_window_overlay(1).__code__
_AROUND = masking_utils.sliding_window_bidirectional_overlay(1).__code__


def _told(function) -> bool | None:
    """Whether it is plain causality (True) or all keys (False); None for any other."""
    if function is masking_utils.causal_mask_function:
        return True
    return False if function is masking_utils.bidirectional_mask_function else None


def _parts(function) -> list:
    """The functions whose conjunction this one is; positions that were renumbered keep their differences."""
    code = getattr(function, "__code__", None)
    if code is _AND:
        return [part for inner in _closure(function)["mask_functions"] for part in _parts(inner)]
    return _parts(_closure(function)["mask_function"]) if code is _REMAP else [function]


def _closure(function) -> dict:
    return dict(zip(function.__code__.co_freevars, (x.cell_contents for x in function.__closure__), strict=True))


def read(function) -> Pattern | None:
    """The pattern of a mask function; None for one that is more than causality, windows and packed sequences."""
    told, before, around, segments = None, None, None, None
    for part in _parts(function):
        code = getattr(part, "__code__", None)
        if _told(part) is not None:
            told = _told(part)
        elif code is _BEFORE:
            before = _closure(part)["sliding_window"]
        elif code is _AROUND:
            around = _closure(part)["sliding_window"] + 1
        elif code is _PACKED:
            segments = _closure(part)["packed_sequence_mask"]
        else:
            return None
    if told is None or (before is not None and (around is not None or not told)):
        return None
    return Pattern(told, around if before is None else before, segments)


def _traced(name: str, function, batch: int, length: int, offset, window: int | None, device) -> Pattern:
    """The same where closures cannot be read: causal is assumed, and asserted on the diagonals next to its edges."""
    told = _told(function)
    if told is not None:
        return Pattern(told)
    rows = torch.arange(batch, device=device)[:, None]
    at = torch.arange(length, device=device)[None] + offset
    # (steps from key to query, whether it is seen)
    edges = [(1, True), (-1, False)] + ([] if window is None else [(window - 1, True), (window, False)])
    for step, seen in edges:
        q, k = at[:, max(step, 0) :], at[:, max(-step, 0) :]
        n = max(length - abs(step), 0)
        found = function(rows, torch.zeros_like(rows), q[:, :n], k[:, :n])
        sentence = "while compiling, packed sequences and patterns but causality cannot be read"
        torch._assert_async((found == seen).all(), f"{name}: {sentence}; pass attention_mask, or run it eagerly")
    return Pattern(True, window)


def mask(
    engine: Engine,
    name: str,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=masking_utils.causal_mask_function,
    attention_mask: Tensor | Rules | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others,
) -> Tensor | Rules | None:
    """As AttentionMaskInterface has it. Returns what `transformers._attention` reads:

    None: the queries are the last of the keys. Bool `[B, n]`: of the first n keys those that are True, the queries the
    last of them; for a single query all keys it sees, by the window of `local` too. Rules. For `exact` bool
    `[B, 1, L, S]`, where there is no other way.
    """
    if isinstance(attention_mask, Rules):
        return attention_mask
    if attention_mask is not None and (attention_mask.dim() != 2 or attention_mask.dtype != torch.bool):
        expected = "[B, S] with 1 for a token and 0 for padding"
        _check.fail(name, f"the attention mask must be {expected}, got {_check.describe(attention_mask)}")
    sizes = (batch_size, q_length, kv_length, q_offset, kv_offset, mask_function)
    how = {"allow_is_causal_skip": False, "use_vmap": use_vmap, "device": device}
    tracing, static = is_tracing(attention_mask), isinstance(q_offset, Tensor)
    given = attention_mask
    if given is not None:
        # a sliding cache holds the last keys, and a static one some that are not written yet
        given = given[:, kv_offset : kv_offset + kv_length] if given.shape[1] > kv_length else given
        given = F.pad(given, (0, kv_length - given.shape[1]))
    if q_length == 1:
        # whatever the pattern is, it is one of keys
        seen = masking_utils.sdpa_mask(*sizes, None, **how)[:, 0, 0]  # [B, S]
        if engine.window is not None:
            seen = seen & (torch.arange(kv_length, device=device) > q_offset - kv_offset - engine.window)
        return _unless_all(seen if given is None else seen & given, tracing or static)
    if tracing and engine.takes_dense and (static or _told(mask_function) is None):
        return masking_utils.sdpa_mask(*sizes, attention_mask, **how)
    if tracing and static:
        remedy = "compile the model for one token at a time, as generate does"
        _check.fail(name, f"{q_length} tokens into a static cache cannot be compiled; {remedy}")
    if tracing and not use_vmap:
        window = None if local_size is None or local_size >= kv_length else int(local_size)
        pattern = _traced(name, mask_function, batch_size, q_length, q_offset, window, device)
    else:
        pattern = None if use_vmap else read(mask_function)
    if pattern is None and engine.takes_dense:
        return masking_utils.sdpa_mask(*sizes, attention_mask, **how)
    if pattern is None:
        remedy = "attn_implementation='longattn_exact' takes any"
        _check.fail(name, f"the model's mask is more than causality, padding, windows and packed sequences; {remedy}")
    end = int(q_offset) - kv_offset + q_length if pattern.is_causal else kv_length
    if end < kv_length:
        given = torch.ones(batch_size, end, dtype=torch.bool, device=device) if given is None else given[:, :end]
    elif given is not None:
        given = _unless_all(given, tracing)
    window = pattern.window if pattern.window is not None and pattern.window < end else None
    if window is not None and not engine.takes_window:
        remedy = "take attn_implementation='longattn_exact' or 'longattn_local'"
        _check.fail(name, f"a sliding window of {window} keys is shorter than the {end} there are; {remedy}")
    starts = None if pattern.segments is None else _starts(pattern.segments)
    return given if window is None and starts is None else Rules(given, window, starts)


def _unless_all(keys: Tensor, unread: bool) -> Tensor | None:
    return keys if unread or not bool(keys.all()) else None


def _starts(segments: Tensor) -> Tensor:
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    found = first.flatten().nonzero().flatten()
    return F.pad(found, (0, 1), value=segments.numel()).int()
