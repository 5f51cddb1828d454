"""One token of a stream with relative positions, by one kernel instead of a dozen of torch's.

Decoding calls this once a layer and token: it looks whether all is as the kernel needs it and says nothing. Whatever is
not goes to the general path, which has the sentences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..favor import Favor
from ..features import FUSED
from ..native import toeplitz as native_toeplitz
from ..state import ToeplitzState
from ._autograd import readable, tracked


def attempt(
    q: Tensor, k: Tensor, v: Tensor, feature: str | Favor, bias: Tensor, state: ToeplitzState, *, normalize: bool, scale
) -> tuple[Tensor, ToeplitzState] | None:
    """-> output and the next state, or None. The call is causal, without a mask and not packed."""
    if type(state) is not ToeplitzState or not readable(q, k, v, bias, *state) or tracked(q, k, v, bias, *state):
        return None
    dtype, device = q.dtype, q.device
    if device.type != "cpu" or dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return None
    if any(x.dtype is not dtype or x.device != device for x in (k, v, bias, *state[:4])):
        return None
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or bias.dim() not in (1, 2) or state.ring_mask.dim() != 2:
        return None
    (B, Hq, L, D), (_, H, _, E), M = q.shape, v.shape, q.shape[3]
    if isinstance(feature, Favor):
        M = feature.n_features
        if not _fits(feature, H, D, normalize):
            return None
    elif feature not in FUSED:
        return None
    held, width = state.ring_mask.shape[1], bias.shape[-1]
    fits = (
        L == 1 and B > 0 and 0 < H <= Hq and Hq % H == 0 and D > 0 and E > 0
        and k.shape == (B, H, 1, D) and v.shape == (B, H, 1, E)
        and width % 2 == 1 and held <= width // 2 and bias.shape[:-1] in ((), (Hq,))
        and state.kv.shape == (B, H, M, E) and state.k_sum.shape == (B, H, M)
        and state.ring_key.shape == (B, H, held, M) and state.ring_value.shape == (B, H, held, E)
        and state.ring_mask.shape == (B, held) and state.ring_mask.dtype is torch.bool
    )  # fmt: skip
    if not fits or not bias.is_contiguous() or not all(x.is_contiguous() for x in state):
        return None
    if native.missing() is not None:
        return None
    if isinstance(feature, Favor):
        mean = feature.key_mean.to(dtype) if feature.center_keys else None
        feature = feature.projection.to(dtype), feature.root.to(dtype), mean, feature.kind
    out, after = native_toeplitz.step(q, k, v, bias, state, feature=feature, normalize=normalize, scale=scale)
    return out, ToeplitzState(*after)


def _fits(favor: Favor, heads: int, head_dim: int, normalize: bool) -> bool:
    if favor.head_dim != head_dim or not normalize or favor.normalize != "l2" or favor.exact_diagonal:
        return False
    if favor.projection.device.type != "cpu" or tracked(favor.log_temperature):
        return False
    return not favor.center_keys or (favor.key_mean is not None and favor.key_mean.shape[0] == heads)
