"""The compiled extension `longattn._C`: loaded on first use, spoken to in pointers, sizes and strides."""

from __future__ import annotations

import functools
import importlib
import json
import os
import threading
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.bool: 4,
    torch.int32: 5,
    torch.uint8: 6,
}


@functools.cache
def _load():
    try:
        return importlib.import_module("longattn._C"), None
    except ImportError as error:
        return None, str(error)


def extension():
    """The module `longattn._C`; RuntimeError with the reason where it was not built."""
    module, _ = _load()
    if module is None:
        raise RuntimeError(f"longattn: {missing()}")
    return module


def build_summary() -> dict:
    """What setup.py built and why something was not; empty where the package was never installed."""
    try:
        return json.loads((Path(__file__).parent.parent / "_build.json").read_text())
    except (OSError, ValueError):
        return {}


def missing() -> str | None:
    """Why the compiled CPU kernels are not here; None if they are."""
    module, error = _load()
    if module is not None:
        return None
    reason = build_summary().get("why_no_extension")
    return f"the extension was not built: {reason}" if reason else f"the extension does not load: {error}"


def missing_cuda() -> str | None:
    """Why the compiled CUDA kernels are not here; None if they are."""
    module, _ = _load()
    if module is None:
        return missing()
    if not module.cuda_built():
        return "the extension was built without CUDA (nvcc was not found, or LONGATTN_CUDA=0)"
    return None


def view(x: Tensor | None):
    """A tensor as the extension takes it: (pointer, dtype, sizes, strides)."""
    return None if x is None else (x.data_ptr(), DTYPES[x.dtype], x.shape, x.stride())


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


# below this the allocator keeps freed memory, whose pages are there already
HUGE_PAGE_BYTES = 8 << 20


def empty(shape, dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor for a kernel to write; large ones ask for huge pages (LONGATTN_HUGE_PAGES=0: not)."""
    # whatever the default device is
    x = torch.empty(shape, dtype=dtype, device="cpu")
    if x.nbytes >= HUGE_PAGE_BYTES and os.environ.get("LONGATTN_HUGE_PAGES", "1") != "0":
        extension().advise_huge_pages(x.data_ptr(), x.nbytes)
    return x


def tokens_first(x: Tensor) -> bool:
    """Whether rows `[B, H, L, D]` lie in memory as projections leave them, `[B, L, H, D]`."""
    return x.stride(1) < x.stride(2) and x.shape[1] > 1


def empty_like_rows(x: Tensor, width: int) -> Tensor:
    """`[B, H, L, width]` in the order in memory of x `[B, H, L, D]`, so that heads join again without a copy."""
    B, H, L, _ = x.shape
    if tokens_first(x):
        return empty((B, L, H, width), x.dtype).transpose(1, 2)
    return empty((B, H, L, width), x.dtype)


_scratch = threading.local()


def workspace(size: int) -> Tensor:
    """This thread's scratch of at least so many bytes; kept, for a decode step would pay more for fresh pages."""
    held = getattr(_scratch, "held", None)
    if held is None or held.nbytes < size:
        held = _scratch.held = torch.empty(size, dtype=torch.uint8)
    return held
