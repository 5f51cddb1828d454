"""The sentences of the public door: who, what was expected, what came, what to do.

A sentence is put together only where a check has failed: it costs more than a whole decode step.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(x) -> str:
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
    # the text of an array has many lines
    return f"{type(x).__name__} {' '.join(repr(x).split())}"


def is_finite_or_none(x) -> bool:
    # an int may be too large for a float
    return x is None or (isinstance(x, (int, float)) and abs(x) <= sys.float_info.max)


def fail(op: str, sentence: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{op}: {sentence}")


def attention_inputs(op: str, q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> None:
    """Rank, dtype, device and shape of q `[B, Hq, L, D]`, k `[B, H, S, D]`, v `[B, H, S, E]`."""
    for name, x in (("query", q), ("key", k), ("value", v)):
        if not isinstance(x, Tensor):
            fail(op, f"{name} must be a tensor, got {describe(x)}", TypeError)
        if x.dim() != 4:
            fail(op, f"{name} must be [batch, heads, length, dim], got {list(x.shape)}")
        if x.dtype not in DTYPES:
            came = f"got {x.dtype}; convert it with {name}.float()"
            fail(op, f"{name} must be float32, bfloat16, float16 or float64, {came}", TypeError)
    if not q.dtype == k.dtype == v.dtype:
        came = f"got {q.dtype}, {k.dtype} and {v.dtype}"
        fail(op, f"query, key and value must share a dtype, {came}", TypeError)
    if not q.device == k.device == v.device:
        fail(op, f"query, key and value must be on one device, got {q.device}, {k.device} and {v.device}")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        came = f"got {q.shape[0]}, {k.shape[0]} and {v.shape[0]}"
        fail(op, f"query, key and value must share the batch size, {came}")
    if k.shape[1] != v.shape[1] or k.shape[2] != v.shape[2]:
        fail(op, f"key and value must share heads and length, got {list(k.shape)} and {list(v.shape)}")
    if q.shape[3] != k.shape[3]:
        fail(op, f"query and key must share head_dim, got {q.shape[3]} and {k.shape[3]}")
    if q.shape[3] == 0 or v.shape[3] == 0:
        fail(op, f"head_dim and value dim must be positive, got {q.shape[3]} and {v.shape[3]}")
    if enable_gqa:
        if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
            fail(op, f"query heads must be a multiple of key heads, got {q.shape[1]} and {k.shape[1]}")
    elif q.shape[1] != k.shape[1]:
        remedy = "pass enable_gqa=True if query heads share keys"
        fail(op, f"query has {q.shape[1]} heads and key has {k.shape[1]}; {remedy}")


def padding_mask(op: str, mask: Tensor | None, k: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        fail(op, f"key_padding_mask must be a tensor, got {describe(mask)}", TypeError)
    fits = mask.dim() == 2 and mask.shape[0] == k.shape[0] and mask.shape[1] == k.shape[2]
    if fits and mask.dtype == torch.bool and mask.device == k.device:
        return
    expected = f"bool [B, S] = {[k.shape[0], k.shape[2]]} with True for padded keys"
    hint = "; pass mask == float('-inf')" if mask.is_floating_point() else ""
    if mask.device != k.device:
        hint = f", but key is on {k.device}"
    error = ValueError if mask.dtype == torch.bool else TypeError
    fail(op, f"key_padding_mask must be {expected}, got {describe(mask)}{hint}", error)


def packed_sequences(op: str, cu_seqlens: Tensor | None, q: Tensor, k: Tensor) -> None:
    """Shape and dtype only: reading the boundaries would wait for the device (the CPU kernels check them too)."""
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor):
        fail(op, f"cu_seqlens must be a tensor, got {describe(cu_seqlens)}", TypeError)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        error = ValueError if cu_seqlens.dtype == torch.int32 else TypeError
        fail(op, f"cu_seqlens must be int32 [N+1] with N >= 1, got {describe(cu_seqlens)}", error)
    if cu_seqlens.device != k.device:
        fail(op, f"cu_seqlens must be on {k.device}, got {cu_seqlens.device}")
    if q.shape[0] != 1:
        fail(op, f"packed sequences need batch size 1, got {q.shape[0]}; concatenate along the length")
    if q.shape[2] != k.shape[2]:
        fail(op, f"packed sequences need L == S, got {q.shape[2]} and {k.shape[2]}")


def state_tensors(op: str, state, device: torch.device, expected: dict, meaning: str = "") -> None:
    """Fields of a state. expected: name -> (shape, dtype); an empty tensor fits every dtype."""
    for name, (shape, dtype) in expected.items():
        x = getattr(state, name)
        typed = isinstance(x, Tensor) and (x.dtype == dtype or x.numel() == 0)
        if typed and x.shape == shape and x.device == device:
            continue
        sentence = f"state.{name} must be {dtype} {list(shape)} on {device}{meaning}, got {describe(x)}"
        fail(op, sentence, ValueError if typed else TypeError)
