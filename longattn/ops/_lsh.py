"""What stands before the tiles of LSH attention: rotations, hash, sort, lengths of rows, and which chunks face which.

Nothing here has a gradient, and nothing waits for a device.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .. import native
from ..favor import FOLD, STRIDE
from ..native import lsh as native_lsh
from . import _library
from ._prefix import accumulator

# from these numbers of buckets on, the hash takes two and three factors
FACTORED = (128, 16384)
# elements of x that are looked at in one go where lengths of rows are measured
BLOCK = {"cpu": 1 << 17, "cuda": 1 << 24}


# buckets and rotations


def default_buckets(keys: int, chunk: int) -> int:
    """The next power of two from 2 keys / chunk on: half a chunk in a bucket."""
    n = 2
    while n * chunk < 2 * keys:
        n *= 2
    return n


def _split(n: int, count: int) -> list[int] | None:
    """n as a product of `count` even numbers, the first as near the root as can be; None where there is no such one."""
    if count == 1:
        return [n] if n % 2 == 0 else None
    root = math.isqrt(n) if count == 2 else round(n ** (1 / count))
    for a in range(root - root % 2, 1, -2):
        rest = _split(n // a, count - 1) if n % a == 0 else None
        if rest is not None:
            return [a, *rest]
    return None


def factorise(n_buckets: int) -> list[int]:
    """Even factors with this product, as balanced as can be: one up to 128 buckets, two up to 16384, three above."""
    count = 1 + sum(n_buckets > limit for limit in FACTORED)
    return next(factors for c in range(count, 0, -1) if (factors := _split(n_buckets, c)))


def factors_for(n_buckets: int | None, keys: int, chunk: int) -> list[int]:
    """Of the number of buckets given, or of the default for so many keys."""
    return factorise(n_buckets or default_buckets(keys, chunk))


@functools.lru_cache(maxsize=32)
def _draw(seed: int, step: int, shape: tuple[int, ...], device: str) -> Tensor:
    # torch's generator reads the lower half of its seed only; float64, because float32 draws depend on the vector width
    seed = seed % 2**32 + (seed >> 32) % 2**32 * FOLD
    generator = torch.Generator().manual_seed((seed + step * STRIDE) % 2**32)
    # not waiting for the device: pageable memory is copied before this returns
    return torch.randn(shape, generator=generator, dtype=torch.float64).float().to(device, non_blocking=True)


def draw_rotations(
    heads: int, n_hashes: int, dim: int, columns: int, *, seed: int = 0, step: int = 0, device="cpu"
) -> Tensor:
    """Gaussian rotations float32 `[heads, n_hashes, dim, columns]`, a function of the sizes, seed and step alone."""
    return _draw(seed, step, (heads, n_hashes, dim, columns), str(device)).clone()


_library.define(
    "_lsh_rotations",
    "(Tensor like, int heads, int n_hashes, int dim, int columns, int seed, Tensor? step=None) -> Tensor",
)


@_library.fake("_lsh_rotations")
def _(like, heads, n_hashes, dim, columns, seed, step=None):
    return like.new_empty((heads, n_hashes, dim, columns), dtype=torch.float32)


def _rotations(like, heads, n_hashes, dim, columns, seed, step=None):
    # a number that changes would be a new graph each time, so it comes as a tensor, of the CPU
    step = 0 if step is None else int(step)
    return draw_rotations(heads, n_hashes, dim, columns, seed=seed, step=step, device=like.device)


# hash and sort


def sorter(device: str) -> str:
    """What sorts on a device: this package's counting sort ("cpu", "cuda"), or torch's sort."""
    missing = native.missing_cuda() if device == "cuda" else native.missing()
    return device if missing is None and device in ("cpu", "cuda") else "torch"


def sorted_by(impl: str, device: str) -> str:
    """What `explain` says of it."""
    if impl == "reference":
        return "sorted by torch (reference)"
    by = sorter(device)
    why = native.missing_cuda() if device == "cuda" else native.missing()
    return f"sorted by torch.sort(stable=True): {why}" if by == "torch" else f"sorted by the {by} counting sort"


def sort_by_torch(keys: Tensor, n_keys: int, cu_seqlens: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    """What the counting sorts compute, where the extension is not there."""
    N = keys.shape[-1]
    start, sequence = starts(cu_seqlens, N, keys.device)
    keys = keys.clamp(0, n_keys - 1)
    keys = keys if cu_seqlens is None else keys + sequence * n_keys
    order = torch.sort(keys, dim=-1, stable=True).indices
    place = torch.arange(N, device=keys.device, dtype=torch.int64) - start[sequence]
    rank = torch.empty_like(order).scatter_(-1, order, (place // chunk).expand_as(order))
    return order.int(), rank.int()


def _engine(impl: str):
    """The module whose `hash` runs this; the CPU's sorts too."""
    if impl == "triton":
        from ..kernels import lsh as triton_lsh

        return triton_lsh
    return native_lsh


_library.define("_lsh_hash", "(Tensor x, Tensor? extra, Tensor rotations, int[] factors, str impl) -> Tensor")
_library.define("_lsh_sort", "(Tensor keys, int n_keys, Tensor? cu_seqlens, int chunk) -> (Tensor, Tensor)")
_library.define("_lsh_lengths", "(Tensor x) -> Tensor")


@_library.fake("_lsh_hash")
def _(x, extra, rotations, factors, impl):
    B, H, N, _ = x.shape
    return x.new_empty((B, H, rotations.shape[1], N), dtype=torch.int32)


@_library.fake("_lsh_sort")
def _(keys, n_keys, cu_seqlens, chunk):
    return keys.new_empty(keys.shape), keys.new_empty(keys.shape)


@_library.fake("_lsh_lengths")
def _(x):
    return x.new_empty(x.shape[:3], dtype=accumulator(x.dtype))


def _hash(x, extra, rotations, factors, impl):
    return _engine(impl).hash(x, extra, rotations, factors)


def _sort(keys, n_keys, cu_seqlens, chunk):
    by = sorter(keys.device.type)
    if by == "torch":
        return sort_by_torch(keys, n_keys, cu_seqlens, chunk)
    if by == "cuda":
        from ..native import lsh_cuda as engine
    else:
        engine = native_lsh
    return engine.sort(keys, n_keys, cu_seqlens, chunk)


def _lengths_of(rows: Tensor) -> Tensor:
    """|x| of rows `[.., D]`, divided by a power of two first: nothing overflows or underflows, and nothing rounds."""
    peak = rows.abs().amax(-1, keepdim=True)
    power = torch.where((peak > 0) & (peak < math.inf), peak / torch.frexp(peak).mantissa, 1)
    return torch.linalg.vector_norm(rows / power, dim=-1) * power[..., 0]


def _lengths(x: Tensor) -> Tensor:
    """|x| `[B, H, N]` in the accumulator's dtype, the same bits whatever the strides and the other rows."""
    acc, (B, H, N, D) = accumulator(x.dtype), x.shape
    on_cpu, tiny = x.device.type == "cpu", torch.finfo(acc).tiny
    whole = on_cpu and x.dtype == acc and x.stride(3) == 1
    step = max(N, 1) if whole else max(BLOCK.get(x.device.type, BLOCK["cpu"]) // max(B * H * D, 1), 1)
    parts = []
    for start in range(0, N, step):
        rows = x[:, :, start : start + step]
        rows = rows if whole else rows.to(acc).contiguous()
        if not on_cpu:
            parts.append(_lengths_of(rows))
            continue
        part = torch.linalg.vector_norm(rows, dim=-1)
        # squares are normal numbers between these, so dividing by a power of two would change no bit
        safe = (part > tiny**0.5 * 2**24) & (part < tiny**-0.5 / 2**24)
        if not safe.all():
            part[~safe] = _lengths_of(rows[~safe])
        parts.append(part)
    return torch.cat(parts, -1) if parts else x.new_empty((B, H, 0), dtype=acc)


_library.run(_lsh_rotations=_rotations, _lsh_hash=_hash, _lsh_sort=_sort, _lsh_lengths=_lengths)


# lengths of rows


def key_scale(lengths: Tensor, norm_eps: float) -> Tensor:
    """What shared keys are multiplied by: 1 / |x|, 0 for a zero vector; (|x|^2 + norm_eps)^(-1/2) with norm_eps."""
    if norm_eps:
        return (lengths.square() + norm_eps).rsqrt()
    # below the smallest normal number the inverse overflows
    return torch.where(lengths < torch.finfo(lengths.dtype).tiny, 0, 1 / lengths)


def last_coordinate(lengths: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """sqrt(max |k|^2 - |k|^2) `[B, H, S]`, float32, the maximum over the valid keys of a head and sequence."""
    valid = lengths.isfinite() if mask is None else lengths.isfinite() & ~mask[:, None]
    lengths = torch.where(valid, lengths, 0)
    if cu_seqlens is None:
        longest = torch.linalg.vector_norm(lengths, math.inf, -1, keepdim=True) if lengths.shape[-1] else lengths
    else:
        sequence = starts(cu_seqlens, lengths.shape[-1], lengths.device)[1].expand(lengths.shape)
        longest = lengths.new_zeros(*lengths.shape[:2], cu_seqlens.shape[0] - 1)
        longest = longest.scatter_reduce(-1, sequence, lengths, "amax").gather(-1, sequence)
    return ((longest - lengths) * (longest + lengths)).sqrt().float()


# chunks


def starts(cu_seqlens: Tensor | None, N: int, device) -> tuple[Tensor, Tensor]:
    """-> first position of each sequence [P], sequence of each position [N]; int64"""
    if cu_seqlens is None:
        return torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(N, dtype=torch.int64, device=device)
    position = torch.arange(N, device=device, dtype=torch.int32)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)
    return cu_seqlens[:-1].long(), sequence.clamp(max=cu_seqlens.shape[0] - 2)


def sort_keys(buckets: Tensor, mask: Tensor | None, n_buckets: int, *, are_queries: bool) -> tuple[Tensor, int]:
    """-> keys int32 and their number. Padded positions go last: keys as one bucket, queries in the order of theirs."""
    if mask is None:
        return buckets, n_buckets
    padded = mask[:, None, None]
    if are_queries:
        return torch.where(padded, buckets + n_buckets, buckets), 2 * n_buckets
    return torch.where(padded, n_buckets, buckets), n_buckets + 1


def _sorted(keys: Tensor, order: Tensor, base: Tensor | None) -> Tensor:
    """Ascending along the whole axis. base: what sets sequences apart [N]"""
    keys = keys.gather(-1, order.long())
    return keys if base is None else keys + base


def align(
    keys_q: Tensor,                            # [B, Hq, R, L]
    order_q: Tensor,                           # [B, Hq, R, L]
    rank_q: Tensor,                            # [B, Hq, R, L], a query's own chunk
    keys_k: Tensor,                            # [B, H, R, S]
    order_k: Tensor,                           # [B, H, R, S]
    cu_seqlens: Tensor | None,
    *,
    n_buckets: int,
    chunk: int,
) -> Tensor:
    """The key chunk that a query's chunk is centred on, int32 [B, Hq, R, L].

    The first query of a chunk is as far into the keys of its bucket as it is into the queries of it.
    """
    (Hq, L), H, device = keys_q.shape[1::2], keys_k.shape[1], keys_q.device
    if rank_q.numel() == 0:
        return rank_q
    start, sequence = starts(cu_seqlens, L, device)
    span, packed = 2 * n_buckets, cu_seqlens is not None
    if packed:
        opened = ((cu_seqlens[1:] - cu_seqlens[:-1]).long() + chunk - 1) // chunk
        behind = opened.cumsum(0)
        slot = torch.arange((L + chunk - 1) // chunk + start.shape[0], device=device)
        owner = torch.searchsorted(behind, slot, right=True).clamp(max=start.shape[0] - 1)
        # slots that no chunk fills are computed like the last position's and never read
        place = (start[owner] + (slot - (behind - opened)[owner]) * chunk).clamp(max=L - 1)
        base, begin, apart = owner * span, start[owner], sequence * span
        own_slot = (behind - opened)[sequence] + rank_q
    else:
        place = torch.arange(0, L, chunk, device=device)
        base, begin, apart, own_slot = 0, 0, None, rank_q.long()

    sorted_q, sorted_k = _sorted(keys_q, order_q, apart), _sorted(keys_k, order_k, apart)
    own = sorted_q[..., place].contiguous()                                                    # [B, Hq, R, chunks]
    low, high = (torch.searchsorted(sorted_q, own, right=right) for right in (False, True))
    # the query heads of a group search one array of keys: where the bucket begins, where it ends, where keys are padded
    wanted = base + (own - base) % n_buckets
    sought = torch.stack([wanted, wanted + 1, base + torch.full_like(own, n_buckets)], -2)     # [B, Hq, R, 3, chunks]
    sought = sought.unflatten(1, (H, Hq // H)).movedim(2, 3).flatten(3)                        # [B, H, R, G 3 chunks]
    found = torch.searchsorted(sorted_k, sought).unflatten(3, (Hq // H, 3, -1)).movedim(3, 2).flatten(1, 2)
    low_k, high_k, end = found.unbind(-2)                                                      # [B, Hq, R, chunks]
    aligned = low_k - begin + (place - low) * (high_k - low_k) // (high - low)
    last = (end - begin - 1) // chunk
    centre = torch.minimum((aligned + chunk // 2) // chunk, last).clamp(min=0)
    return centre.int().gather(-1, own_slot)
