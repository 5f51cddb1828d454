"""What is not a transform of rpe_method="fft", in Triton: the stages that longattn/ops/_toeplitz_fft.py puts around cuFFT.

    spread      products of features and values, written straight into the transforms' rows
    contract    the rows that come back times what they meet, summed over features (outputs, dv) or values (dq, dk)
    correlate   the spectra of keys and of what is pulled back, multiplied and summed over all rows (factors)

Each reads its rows once and makes no other tensor of their size. Rows lie along memory, one after the other but for those of y.
What is padded came in as 0. Sums go in one order without atomics: the same bits on every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from .softmax import guard

# rows and positions of a program of `spread` and of `contract`; rows at a time and frequencies of `correlate`
SPREAD = 4, 256
CONTRACT = 4, 256
CORRELATE = 8, 64


# n and length are specialised: where they are whole vectors, as of transforms they are, stores are wide
@triton.jit(do_not_specialize=["count", "width"])
def spread_kernel(left, right, rows, count, width, length, n, R: tl.constexpr, C: tl.constexpr):
    """rows [count = F width, length], up to n: left [F, n] right [width, n]."""
    pid = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(n, C)
    row = pid // chunks * R + tl.arange(0, R)
    at = pid % chunks * C + tl.arange(0, C)
    fits = (row < count)[:, None] & (at < n)[None, :]
    x = tl.load(left + (row // width)[:, None] * n + at[None, :], mask=fits, other=0.0)
    y = tl.load(right + (row % width)[:, None] * n + at[None, :], mask=fits, other=0.0)
    tl.store(rows + row[:, None] * length + at[None, :], x * y, mask=fits)


@triton.jit(do_not_specialize=["count", "terms"])
def contract_kernel(y, y_row, y_term, weights, into, count, terms, n, R: tl.constexpr, C: tl.constexpr):
    """into [count, n] += sum_t y [count, terms, n] weights [terms, n]."""
    pid = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(n, C)
    row = pid // chunks * R + tl.arange(0, R)
    at = pid % chunks * C + tl.arange(0, C)
    inside = at < n
    fits = (row < count)[:, None] & inside[None, :]
    into += row[:, None] * n + at[None, :]
    y += row[:, None] * y_row + at[None, :]
    weights += at
    total = tl.load(into, mask=fits, other=0.0)
    for _ in range(terms):
        total += tl.load(y, mask=fits, other=0.0) * tl.load(weights, mask=inside, other=0.0)[None, :]
        y += y_term
        weights += n
    tl.store(into, total, mask=fits)


@triton.jit(do_not_specialize=["rows", "n"])
def correlate_kernel(x, y, into, rows, n, R: tl.constexpr, C: tl.constexpr):
    """into [n] += sum_r x conj(y) of [rows, n], complex numbers in pairs: float64 into, float32 x and y."""
    at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    inside = at < n
    real = tl.zeros([R, C], tl.float64)
    imag = tl.zeros([R, C], tl.float64)
    for first in range(0, rows, R):
        row = first + tl.arange(0, R)
        fits = (row < rows)[:, None] & inside[None, :]
        here = 2 * (row.to(tl.int64)[:, None] * n + at[None, :])
        a = tl.load(x + here, mask=fits, other=0.0)
        b = tl.load(x + here + 1, mask=fits, other=0.0)
        c = tl.load(y + here, mask=fits, other=0.0)
        d = tl.load(y + here + 1, mask=fits, other=0.0)
        real += (a * c + b * d).to(tl.float64)
        imag += (b * c - a * d).to(tl.float64)
    into += 2 * at
    tl.store(into, tl.load(into, mask=inside, other=0.0) + tl.sum(real, 0), mask=inside)
    tl.store(into + 1, tl.load(into + 1, mask=inside, other=0.0) + tl.sum(imag, 0), mask=inside)


def _programs(rows: int, n: int, tile: tuple[int, int]) -> tuple[int]:
    return (triton.cdiv(rows, tile[0]) * triton.cdiv(n, tile[1]),)


def spread(left: Tensor, right: Tensor, rows: Tensor) -> None:
    """left [F, n], right [e, n] -> the first n of rows [F, e, length]"""
    (width, n), count = right.shape, left.shape[0] * right.shape[0]
    with guard(rows.device):
        spread_kernel[_programs(count, n, SPREAD)](
            left, right, rows, count, width, rows.shape[2], n, R=SPREAD[0], C=SPREAD[1], num_warps=4, enable_fp_fusion=True)


def contract(y: Tensor, weights: Tensor, into: Tensor) -> None:
    """y [a, b, n], weights [b, n] -> their product summed over b, added to into [a, n]"""
    count, terms, n = y.shape
    with guard(y.device):
        contract_kernel[_programs(count, n, CONTRACT)](
            y, y.stride(0), y.stride(1), weights, into, count, terms, n, R=CONTRACT[0], C=CONTRACT[1], num_warps=4,
            enable_fp_fusion=True)


def correlate(x: Tensor, y: Tensor, into: Tensor) -> None:
    """x, y [F, e, n] complex64 -> the sum of x conj(y) over F and e, added to into [n] complex128"""
    n, (R, C) = into.shape[0], CORRELATE
    with guard(x.device):
        correlate_kernel[_programs(1, n, CORRELATE)](
            *map(torch.view_as_real, (x.contiguous(), y.contiguous(), into)), x.numel() // n, n, R=R, C=C, num_warps=4,
            enable_fp_fusion=True)
