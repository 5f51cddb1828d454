"""The sentences of the public door: who, what was expected, what came, what to do."""

from __future__ import annotations

from torch import Tensor


def describe(x) -> str:
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
    return f"{type(x).__name__} {x!r}"


def require(ok: bool, op: str, sentence: str, error: type[Exception] = ValueError) -> None:
    if not ok:
        raise error(f"{op}: {sentence}")


def attention_inputs(op: str, q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> None:
    """Rank, dtype, device and shape of q `[B, Hq, L, D]`, k `[B, H, S, D]`, v `[B, H, S, E]`."""
    for name, x in (("query", q), ("key", k), ("value", v)):
        require(isinstance(x, Tensor), op, f"{name} must be a tensor, got {describe(x)}", TypeError)
        require(x.dim() == 4, op, f"{name} must be [batch, heads, length, dim], got {list(x.shape)}")
        require(
            x.is_floating_point(),
            op,
            f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}; convert it with {name}.float()",
            TypeError,
        )
    require(
        q.dtype == k.dtype == v.dtype,
        op,
        f"query, key and value must share a dtype, got {q.dtype}, {k.dtype} and {v.dtype}",
        TypeError,
    )
    require(
        q.device == k.device == v.device,
        op,
        f"query, key and value must be on one device, got {q.device}, {k.device} and {v.device}",
    )
    require(
        q.shape[0] == k.shape[0] == v.shape[0],
        op,
        f"query, key and value must share the batch size, got {q.shape[0]}, {k.shape[0]} and {v.shape[0]}",
    )
    require(
        k.shape[1] == v.shape[1] and k.shape[2] == v.shape[2],
        op,
        f"key and value must share heads and length, got {list(k.shape)} and {list(v.shape)}",
    )
    require(q.shape[3] == k.shape[3], op, f"query and key must share head_dim, got {q.shape[3]} and {k.shape[3]}")
    require(q.shape[3] > 0 and v.shape[3] > 0, op, f"head_dim and value dim must be positive, got {list(v.shape)}")
    if enable_gqa:
        require(
            k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0,
            op,
            f"query heads must be a multiple of key heads, got {q.shape[1]} and {k.shape[1]}",
        )
    else:
        require(
            q.shape[1] == k.shape[1],
            op,
            f"query has {q.shape[1]} heads and key has {k.shape[1]}; pass enable_gqa=True if query heads share keys",
        )


def padding_mask(op: str, mask: Tensor | None, k: Tensor) -> None:
    if mask is None:
        return
    expected = [k.shape[0], k.shape[2]]
    require(isinstance(mask, Tensor), op, f"key_padding_mask must be a tensor, got {describe(mask)}", TypeError)
    came = f"key_padding_mask must be bool [B, S] = {expected} with True for padded keys, got {describe(mask)}"
    hint = "; pass mask == float('-inf')" if mask.is_floating_point() else ""
    require("bool" in str(mask.dtype), op, came + hint, TypeError)
    require(list(mask.shape) == expected, op, came)
    require(mask.device == k.device, op, f"{came}, but key is on {k.device}")


def packed_sequences(op: str, cu_seqlens: Tensor | None, q: Tensor, k: Tensor) -> None:
    """Shape and dtype only: reading the boundaries would wait for the device (the CPU kernels check them too)."""
    if cu_seqlens is None:
        return
    require(isinstance(cu_seqlens, Tensor), op, f"cu_seqlens must be a tensor, got {describe(cu_seqlens)}", TypeError)
    came = f"cu_seqlens must be int32 [N+1] with N >= 1, got {describe(cu_seqlens)}"
    require("int32" in str(cu_seqlens.dtype), op, came, TypeError)
    require(cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 2, op, came)
    require(cu_seqlens.device == k.device, op, f"cu_seqlens must be on {k.device}, got {cu_seqlens.device}")
    require(q.shape[0] == 1, op, f"packed sequences need batch size 1, got {q.shape[0]}; concatenate along the length")
    require(q.shape[2] == k.shape[2], op, f"packed sequences need L == S, got {q.shape[2]} and {k.shape[2]}")
