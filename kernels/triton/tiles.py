"""What kernels share: strided tiles, rounding of what tl.dot multiplies, feature maps at load, packed sequences.

EMULATE is set under the interpreter, whose bfloat16 arithmetic is wrong: values then stay float32 and are rounded by hand.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

import triton
import triton.language as tl
from triton.runtime import JITFunction


class Rows(NamedTuple):
    """A [B, H, L, width] tensor and its strides, as a kernel takes it."""

    ptr: Any
    b: Any
    h: Any
    l: Any  # noqa: E741
    d: Any


def rows_of(x: Tensor) -> Rows:
    return Rows(x, *x.stride())


def padded(width: int) -> int:
    """tl.dot takes powers of two from 16."""
    return max(16, triton.next_power_of_2(width))


@triton.jit
def nearest(x, BITS: tl.constexpr):
    """float32 rounded to nearest even with BITS fewer bits of mantissa."""
    bits = x.to(tl.int32, bitcast=True)
    bits = ((bits + ((bits >> BITS) & 1) + ((1 << (BITS - 1)) - 1)) >> BITS) << BITS
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), float("nan"))


@triton.jit
def operand(x, DOT: tl.constexpr, EMULATE: tl.constexpr):
    """float32 as tl.dot multiplies it ("bf16", "tf32", "ieee"). Tensor cores cut tf32 where it is not rounded first."""
    if DOT == "bf16":
        if EMULATE:
            x = nearest(x, 16)
        else:
            x = x.to(tl.bfloat16)
    elif DOT == "tf32":
        x = nearest(x, 13)
    return x


@triton.jit
def product(a, b, acc, DOT: tl.constexpr, EMULATE: tl.constexpr):
    """acc + a b of operands, summed in float32."""
    if DOT == "ieee":
        acc = tl.dot(a, b, acc, input_precision="ieee")
        if not EMULATE:
            # llvm puts scalar products off to where the sum is used, and would keep their operands in registers until then
            acc = tl.inline_asm_elementwise("mov.f32 $0, $1;", "=f,f", [acc], tl.float32, is_pure=False, pack=1)
    else:
        acc = tl.dot(a, b, acc, input_precision="tf32")
    return acc


@triton.jit
def store(ptr, x, mask, EMULATE: tl.constexpr):
    """Rounds to the dtype of the pointer."""
    if EMULATE and ptr.dtype.element_ty == tl.bfloat16:
        x = nearest(x, 16)
    tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def reciprocal(z):
    """1 / z; 0 where z is 0, finite where z is so small that it would overflow, NaN where z is NaN."""
    r = 1.0 / tl.where(z == 0.0, 1.0, z)
    r = tl.where(r > 3e38, 3e38, tl.where(r < -3e38, -3e38, r))
    return tl.where(z == 0.0, 0.0, r)


@triton.jit
def broken(x):
    """1 where x is NaN or infinite, else 0."""
    return tl.where(x - x == 0.0, 0, 1)


@triton.jit
def tile(ptr, x, rows, live, cols, WIDTH: tl.constexpr):
    """[rows, cols] of one head, 0 where a row is dead or a column beyond the width."""
    mask = live[:, None]
    if tl.constexpr(WIDTH) % cols.shape[0] != 0:
        mask = mask & (cols < WIDTH)[None, :]
    return tl.load(ptr + rows[:, None] * x.l + cols.to(tl.int64)[None, :] * x.d, mask=mask, other=0.0)


@triton.jit
def features(ptr, x, rows, live, cols, WIDTH: tl.constexpr, FEATURE: tl.constexpr, DOT: tl.constexpr,
             EMULATE: tl.constexpr):
    """phi of the rows, exactly 0 where dead: padding enters the map as what it sends to 0."""
    phi = tile(ptr, x, rows, live, cols, WIDTH).to(tl.float32)
    keep = live[:, None]
    if tl.constexpr(WIDTH) % cols.shape[0] != 0:
        keep = keep & (cols < WIDTH)[None, :]
    if FEATURE == "elu":
        phi = tl.where(keep, phi, float("-inf"))
        phi = tl.where(phi > 0, phi + 1.0, tl.exp(phi))
    elif FEATURE == "relu":
        # the comparison keeps NaN
        phi = tl.where(phi < 0, 0.0, phi) + tl.where(keep, 1e-3, 0.0)
    return operand(phi, DOT, EMULATE)


@triton.jit
def slope(ptr, x, rows, live, cols, WIDTH: tl.constexpr, FEATURE: tl.constexpr):
    """phi' of the rows."""
    raw = tile(ptr, x, rows, live, cols, WIDTH).to(tl.float32)
    if FEATURE == "elu":
        raw = tl.where(raw > 0, 1.0, tl.exp(raw))
    elif FEATURE == "relu":
        raw = tl.where(raw > 0, 1.0, 0.0)
    else:
        raw = tl.full(raw.shape, 1.0, tl.float32)
    return raw


@triton.jit
def values(ptr, x, rows, live, cols, WIDTH: tl.constexpr, DOT: tl.constexpr, EMULATE: tl.constexpr):
    """The rows as they are."""
    raw = tile(ptr, x, rows, live, cols, WIDTH)
    if DOT != "bf16" or EMULATE:
        raw = operand(raw.to(tl.float32), DOT, EMULATE)
    return raw


@triton.jit
def alive(mask, batch, S, rows, inside, HAS_MASK: tl.constexpr):
    """Rows inside the range whose key is not padded; mask [B, S] in bytes."""
    if HAS_MASK:
        live = inside & (tl.load(mask + batch * S + rows, mask=inside, other=1) == 0)
    else:
        live = inside
    return live


@triton.jit
def span(cu, slot, L, sequences, segment, PACKED: tl.constexpr):
    """Tokens [start, end) of a segment slot and its sequence; slot cu[n] // segment + n is the first of sequence n."""
    sequence = slot * 0
    start = slot * segment
    end = start + segment
    if PACKED:
        last = sequence + sequences - 1
        while sequence < last:
            middle = (sequence + last + 1) // 2
            if tl.load(cu + middle).to(tl.int64) // segment + middle <= slot:
                sequence = middle
            else:
                last = middle - 1
        first = tl.load(cu + sequence).to(tl.int64)
        start = first + (slot - first // segment - sequence) * segment
        end = tl.minimum(start + segment, tl.load(cu + sequence + 1).to(tl.int64))
    else:
        end = tl.minimum(end, L)
    return start, end, sequence


# whether kernels run in the interpreter, which is decided when they are decorated
EMULATE = not isinstance(span, JITFunction)
