"""What the ops of the prefix-state engine share: segments, dtypes of sums, shapes of states."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..native import linear_cuda as native_cuda

# tokens between two saved states: few enough to split long sequences over cores, many enough that the states
# are a small share of the inputs
SEGMENT = {"small": 1024, "large": 4096}
LARGE_STATE = 64 * 128


def segment_of(features: int, value_dim: int) -> int:
    return SEGMENT["large" if features * value_dim > LARGE_STATE else "small"]


def hooks(impl: str, x: Tensor) -> dict:
    """What Triton's launchers take from the compiled extension where it has CUDA."""
    return {"scan": native_cuda.scan} if impl == "triton" and x.is_cuda and native.missing_cuda() is None else {}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def slots(q: Tensor, cu_seqlens: Tensor | None, is_causal: bool, segment: int) -> int:
    """How many segment states one (batch, head) saves."""
    packed = 1 if cu_seqlens is None else sequences(q, cu_seqlens)
    if not is_causal:
        return packed
    return (q.shape[2] + segment - 1) // segment if cu_seqlens is None else q.shape[2] // segment + packed


def aligned(call, run):
    """Causal with a state and L != S: the last query meets the last key, so one part sees only the state.

    call: a validated call with q, k, v, mask, state and options; run: what runs one, -> (output, state).
    """
    q, k, v, mask = call.q, call.k, call.v, call.mask
    L, S = q.shape[2], k.shape[2]
    old = max(S - L, 0)
    early = max(L - S, 0)
    first_mask, last_mask = (None, None) if mask is None else (mask[:, :old], mask[:, old:])
    whole = call.options._replace(is_causal=False)
    before = call._replace(q=q[:, :, :early], k=k[:, :, :old], v=v[:, :, :old], mask=first_mask, options=whole)
    first, state = run(before)
    after = call._replace(q=q[:, :, early:], k=k[:, :, old:], v=v[:, :, old:], mask=last_mask, state=state)
    last, state = run(after)
    return torch.cat([first, last], 2), state
