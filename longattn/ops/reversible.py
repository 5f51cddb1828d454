"""The sum of a reversible layer: contract, schema, autograd. The mathematics is in reference/reversible.py."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..native import reversible as native_reversible
from ..reference import reversible as reference
from . import _check, _dispatch, _library

OP = "reversible_add"


class _Call(NamedTuple):
    """One validated call, and where it would run."""

    x: Tensor
    f: Tensor
    grid: float
    subtract: bool
    inplace: bool
    explanation: _dispatch.Explanation


# the public door


def check_grid(op: str, grid, dtype: torch.dtype = torch.float32) -> None:
    number = isinstance(grid, (int, float)) and not isinstance(grid, bool) and math.isfinite(grid)
    if not number or grid <= 0 or math.frexp(grid)[0] != 0.5:
        _check.fail(op, f"grid must be a power of two, such as 2**-13, got {_check.describe(grid)}")
    # down to where multiples are numbers without an exponent of their own, up to where the limit overflows
    least = torch.finfo(dtype).smallest_normal
    if not least <= grid <= 2.0**100 or reference.limit(dtype, grid) > torch.finfo(dtype).max:
        _check.fail(op, f"grid {grid!r} leaves {dtype} no room; 2**-13 suits activations of ordinary size")


def _prepare(
    op: str,
    x: Tensor,
    f: Tensor,
    *,
    grid: float | None = None,
    subtract: bool = False,
    inplace: bool = False,
    impl: str = "auto",
) -> _Call:
    for name, tensor in (("x", x), ("f", f)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in _check.DTYPES:
            came = _check.describe(tensor)
            _check.fail(op, f"{name} must be a float32, bfloat16, float16 or float64 tensor, got {came}", TypeError)
    if x.shape != f.shape or x.device != f.device:
        came = f"got {list(x.shape)} on {x.device} and {list(f.shape)} on {f.device}"
        _check.fail(op, f"x and f must share shape and device, {came}; nothing is broadcast")
    if grid is not None:
        check_grid(op, grid, x.dtype)
    if inplace and torch.is_grad_enabled() and (x.requires_grad or f.requires_grad):
        remedy = "leave inplace=False, or call it under torch.no_grad()"
        _check.fail(op, f"inplace=True is for buffers outside autograd, but x or f requires grad; {remedy}")
    reasons = {name: _refuses(name, x, f) for name in _dispatch.IMPLS}
    explanation = _dispatch.Explanation(op, _choose(op, impl, reasons), reasons)
    return _Call(x, f, 0.0 if grid is None else float(grid), bool(subtract), bool(inplace), explanation)


def _choose(op: str, impl: str, reasons: dict[str, str | None]) -> str:
    if impl == "auto":
        # here the reference is no slower kind of thing, so nothing needs saying
        return next(name for name, reason in reasons.items() if reason is None)
    return _dispatch.choose(op, impl, reasons)


def _refuses(impl: str, x: Tensor, f: Tensor) -> str | None:
    return _dispatch.refuses(impl, x) or (_dispatch.refuses(impl, f) if f.dtype == torch.float64 else None)


def chosen_for(x: Tensor) -> str:
    """The engine of impl="auto" for a stream and branches of ordinary dtypes; asked once for a whole stack."""
    return _choose(OP, "auto", {name: _dispatch.refuses(name, x) for name in _dispatch.IMPLS})


# running it


def _overflow(grid: float, dtype: torch.dtype) -> str:
    most = reference.limit(dtype, grid)
    return (
        f"{OP}: a sum has reached {most:g} = grid * 2^{round(math.log2(most / grid))}, beyond which its inverse is not "
        f"exact; use a coarser grid than 2**{round(math.log2(grid))}, or scale the branches down"
    )


def _engine(impl: str):
    if impl == "triton":
        from ..kernels import reversible

        return reversible.add
    if impl == "cuda":
        from ..native import reversible_cuda

        return reversible_cuda.add
    return native_reversible.add


def add(x: Tensor, f: Tensor, grid: float, subtract: bool, impl: str, *, inplace: bool) -> Tensor:
    """x + f or x - f on the grid (0: none), into x if inplace; no autograd, nothing is checked but the range."""
    if f.dtype == torch.float64 and impl in ("cuda", "triton"):
        f = f.float()
    if impl == "reference":
        y = reference.reversible_add(x, f, grid or None, subtract=subtract)
        flag = reference.overflows(y, grid) if grid else None
        y = x.copy_(y) if inplace else y
    else:
        y, flag = _engine(impl)(x, f, grid, reference.limit(x.dtype, grid), subtract, inplace)
    if flag is not None:
        if x.device.type == "cpu":
            if flag:
                raise OverflowError(_overflow(grid, x.dtype))
        else:
            torch._assert_async(~flag if flag.dtype == torch.bool else flag == 0, _overflow(grid, x.dtype))
    return y


_library.define("_reversible_add", "(Tensor x, Tensor f, float grid, bool subtract, str impl) -> Tensor")
_library.define("_reversible_add_", "(Tensor(a!) x, Tensor f, float grid, bool subtract, str impl) -> ()")


@_library.fake("_reversible_add")
def _(x, f, grid, subtract, impl):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_library.fake("_reversible_add_")
def _(x, f, grid, subtract, impl):
    return None


def _check_memory(x: Tensor, f: Tensor) -> None:
    """Of a sum in place: what it writes must be read by no other element of it."""
    steps = sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)
    reach = 0
    for stride, size in steps if x.numel() else ():
        if stride <= reach:
            remedy = "pass a contiguous copy"
            _check.fail(OP, f"inplace=True writes into x, whose elements share memory with each other; {remedy}")
        reach += stride * (size - 1)
    # others are copied before the first write
    if x.numel() and x.is_contiguous() and f.is_contiguous():
        begins = x.data_ptr(), f.data_ptr()
        shared = begins[0] < begins[1] + f.nbytes and begins[1] < begins[0] + x.nbytes
        if shared and (begins[0] != begins[1] or x.dtype != f.dtype):
            remedy = "pass a copy of f, or leave inplace=False"
            _check.fail(OP, f"inplace=True writes into x, part of whose memory f lies in; {remedy}")


def _run(x, f, grid, subtract, impl):
    return add(x, f, grid, subtract, impl, inplace=False).contiguous()


def _run_(x, f, grid, subtract, impl):
    _check_memory(x, f)
    add(x, f, grid, subtract, impl, inplace=True)


_library.run(_reversible_add=_run, _reversible_add_=_run_)


class _ReversibleAdd(torch.autograd.Function):
    """Linear but for the rounding, whose gradient is the identity."""

    @staticmethod
    def forward(x, f, grid, subtract, impl):
        return torch.ops.longattn._reversible_add(x, f, grid, subtract, impl)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, f, _, ctx.subtract, _ = inputs
        ctx.dtype = f.dtype

    @staticmethod
    def backward(ctx, grad):
        df = grad.to(ctx.dtype)
        return grad, -df if ctx.subtract else df, None, None, None


def differentiable(x: Tensor, f: Tensor, grid: float, subtract: bool, impl: str) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or f.requires_grad):
        return _ReversibleAdd.apply(x, f, grid, subtract, impl)
    return torch.ops.longattn._reversible_add(x, f, grid, subtract, impl)


def reversible_add(
    x: Tensor,
    f: Tensor,
    *,
    grid: float | None = None,
    subtract: bool = False,
    inplace: bool = False,
    impl: str = "auto",
) -> Tensor:
    """The sum of a residual stream and a branch, which subtract=True takes back: exactly, if they stay on one grid.

        y = x + round(f / grid) grid,    x = y - round(f / grid) grid    (half to even; without a grid x + f, y - f)

    With x a multiple of the grid and |x|, |y| < grid * 2^24 (float32; 2^53 in float64, 2^11 in float16, 2^8 in
    bfloat16) neither sum rounds, so the second gives x back bit for bit.

    x, f: one shape, any strides; float32, bfloat16, float16, or float64 (CPU and reference), each with its own dtype.
    grid: a power of two.
    inplace: writes into x and returns it; only outside autograd, and where f is x itself or lies in other memory.
    impl: "auto", "reference", "cpu", "triton" or "cuda"; see `longattn.explain`.

    Returns the dtype of x; the sum is formed in float32 (float64 if x is). The gradient passes to both as it is.
    Raises OverflowError where |y| >= grid * 2^24 (on a GPU an assertion of the device, so that nothing waits), and
    ValueError or TypeError in a sentence.
    """
    call = _prepare(OP, x, f, grid=grid, subtract=subtract, inplace=inplace, impl=impl)
    if call.inplace:
        torch.ops.longattn._reversible_add_(x, f, call.grid, call.subtract, call.explanation.chosen)
        return x
    return differentiable(x, f, call.grid, call.subtract, call.explanation.chosen)


_dispatch.plan(reversible_add, lambda *args, **kwargs: _prepare(OP, *args, **kwargs).explanation)
