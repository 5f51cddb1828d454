"""Run by test_triton_reversible.py in a process of its own: the sum of a reversible layer in Triton's interpreter."""

import itertools
import re

import pytest
import torch
from longattn.kernels import reversible

from longattn import reversible_add
from longattn.ops.reversible import _overflow
from longattn.reference import reversible as reference
from longattn.testing.assertions import assert_same_bits
from longattn.testing.cases import draw

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sums_have_the_bits_of_the_formula() -> None:
    for shape, dtype, other in itertools.product(((0,), (1,), (3, 5, 63), (2500,)), DTYPES, DTYPES):
        for grid, subtract in itertools.product((0.0, 0.25), (False, True)):
            x, f = draw(shape, shape)
            x, f = x.to(dtype), (3 * f).to(other)
            expected = reference.reversible_add(x, f, grid or None, subtract=subtract)
            limit = reference.limit(dtype, grid)
            found, flag = reversible.add(x, f, grid, limit, subtract, False)
            assert_same_bits("sum", found, expected)
            assert flag is None if not grid else flag.item() == 0
            found, _ = reversible.add(x, f, grid, limit, subtract, True)
            assert found is x
            assert_same_bits("in place", x, expected)


def halves_go_to_even_and_strides_are_followed() -> None:
    x, f = draw((6, 40), (6, 40))
    f = torch.round(8 * f) / 8
    expected = reference.reversible_add(x, f, 0.25, subtract=False)
    assert (f % 0.25 == 0.125).any()
    for a, b in ((x.mT.contiguous().mT, f), (x.clone(), f.mT.contiguous().mT)):
        for inplace in (False, True):
            found, _ = reversible.add(a, b, 0.25, 2.0**22, False, inplace)
            assert_same_bits("strided", found, expected)


def reaching_the_limit_raises_the_flag() -> None:
    x = torch.zeros(5000)
    x[4321] = 2.0**11 - 2**-13
    for step, expected in ((0.0, 0), (2.0**-13, 1), (torch.inf, 1), (torch.nan, 0)):
        _, flag = reversible.add(x, torch.full_like(x, step), 2.0**-13, 2.0**11, False, False)
        assert flag.item() == expected, (step, flag)
    with pytest.raises(OverflowError, match=re.escape(_overflow(2.0**-13, torch.float32))):
        reversible_add(x, torch.full_like(x, 1.0), grid=2**-13, impl="triton")


if __name__ == "__main__":
    assert reversible.EMULATE, "set TRITON_INTERPRET=1"
    torch.set_num_threads(1)
    for law in (
        sums_have_the_bits_of_the_formula,
        halves_go_to_even_and_strides_are_followed,
        reaching_the_limit_raises_the_flag,
    ):
        law()
        print(f"{law.__name__}: kept", flush=True)
