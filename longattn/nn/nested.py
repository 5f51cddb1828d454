"""Nested tensors around an attention of padded ones: the lengths become a key padding mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def check(
    batch_first: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> None:
    """torch takes nested tensors on its inference path only; here in any mode, and in cross-attention."""
    if query.dim() not in (2, 3):
        F._mha_shape_check(query, key, value, None, None, 1)
    why = ""
    if not all(x.is_nested and x.dim() == 3 for x in (query, key, value)):
        why = "query, key and value are not all nested tensors of three dimensions"
    elif not batch_first:
        why = "batch_first was not True"
    elif key_padding_mask is not None or attn_mask is not None:
        why = "masks were supplied beside the lengths it has"
    elif any(x.layout != torch.strided and x.lengths() is not None for x in (query, key, value)):
        why = "it has holes, which its contiguous() has not"
    elif not torch.equal(_lengths(key), _lengths(value)):
        why = "key and value have other lengths"
    if why:
        raise AssertionError(
            f"MultiheadAttention does not support this NestedTensor: {why}; pass a padded tensor and key_padding_mask"
        )


def padded(attend: Callable, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
    """`attend(query, key, value, key_padding_mask)` of the padded tensors; its output as nested as query is."""
    # what is one tensor stays one, so that it is projected once
    dense = {id(x): x.to_padded_tensor(0.0) for x in (query, key, value)}  # [B, L or S, E]
    hidden = _hidden(key, dense[id(key)].shape[1])
    output, weights = attend(*(dense[id(x)] for x in (query, key, value)), hidden)
    valid = ~(hidden if key is query else _hidden(query, output.shape[1]))  # [B, L]
    if query.layout == torch.strided:
        return torch._nested_tensor_from_mask(output, valid, mask_check=False), weights
    return torch.nested.nested_tensor_from_jagged(output[valid], query.offsets()), weights


def _lengths(x: Tensor) -> Tensor:
    """int64 `[B]`, on its device."""
    if x.layout == torch.strided:
        return x._nested_tensor_size()[:, 0].to(x.device)
    return x.offsets().diff()


def _hidden(x: Tensor, length: int) -> Tensor:
    return torch.arange(length, device=x.device) >= _lengths(x)[:, None]
