"""What the tests of FAVOR+ share: its maps, and small inputs."""

import pytest

from longattn.testing.cases import FavorCase, draw

MAPS = (
    FavorCase(), FavorCase("hyperbolic"), FavorCase("relu"), FavorCase("trig"), FavorCase(exact=True),
    FavorCase("hyperbolic", l2=True, center=True, exact=True),
)  # fmt: skip


def qkv(L=150, B=2, H=2, D=8, E=12, spread=0.8, **options):
    q, k, v = draw((B, H, L, D), (B, H, L, D), (B, H, L, E), **options)
    return q * spread, k * spread, v


def maps(*cases):
    return pytest.mark.parametrize("case", cases or MAPS, ids=lambda case: f"{case.kind}{'-exact' * case.exact}")
