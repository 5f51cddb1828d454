"""What the tests of relative positions share: the ways to compute them, and biases."""

from typing import NamedTuple

import pytest
from conftest import KERNELS, device_of

from longattn.testing.cases import draw

METHODS = ("prefix", "tiles", "fft")
# those whose rounding is each row's own
LOCAL = ("prefix", "tiles")


class Way(NamedTuple):
    """An engine and a method."""

    impl: str
    method: str

    @property
    def options(self) -> dict:
        return {"impl": self.impl, "rpe_method": self.method}

    @property
    def device(self) -> str:
        return device_of(self.impl)


def _parameters(methods):
    for parameter in KERNELS:
        for method in methods:
            way = Way(parameter.values[0], method)
            yield pytest.param(way, marks=parameter.marks, id="-".join(way))


_REFERENCE = pytest.param(Way("reference", "auto"), id="reference")
every_way = pytest.mark.parametrize("way", [_REFERENCE, *_parameters(METHODS)])
kernel_ways = pytest.mark.parametrize("way", [*_parameters(METHODS)])
local_ways = pytest.mark.parametrize("way", [*_parameters(LOCAL)])
modes = pytest.mark.parametrize("is_causal", [False, True])


def named(cases):
    return [pytest.param(case, id=case.name) for case in cases]


def bias_of(heads=2, reach=20, seed=3, **options):
    return draw((heads, 2 * reach + 1), seed=seed, **options)[0]
