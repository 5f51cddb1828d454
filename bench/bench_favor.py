"""Micro-benchmarks of FAVOR+ for pytest-benchmark; no time is asserted. bench_linear.py says what is recorded.

    pytest bench/bench_favor.py                                  everything that runs here
    pytest bench/bench_favor.py -k "cpu and positive and 16384"  some of it
"""

import _micro
import pytest
from _contenders import Case

LENGTHS = (1024, 16384)
LONGEST = {"reference": 1024}
M = 256
# name -> what differs from causal attention with positive features in float32
VARIANTS = {
    "positive": {},
    "hyperbolic": {"feature": "favor-hyperbolic"},
    "relu": {"feature": "favor-relu"},
    "trig": {"feature": "favor-trig"},
    "exact_diagonal": {"exact_diagonal": True},
    "full": {"is_causal": False},
    "bfloat16": {"dtype": "bfloat16"},
}


def favor_case(n: int, **options) -> Case:
    return Case(n, **{"feature": "favor-positive", "n_features": M, **options})


def parameters():
    for engine in ("cpu", "triton", "reference"):
        for name, options in VARIANTS.items():
            for n in LENGTHS:
                for direction in ("forward", "forward+backward"):
                    if n > LONGEST.get(engine, n) or (engine in LONGEST and options):
                        continue
                    case = favor_case(n, impl=engine, direction=direction, **options)
                    yield pytest.param(engine, case, id=f"{engine}-{name}-{n}-{direction}", marks=_micro.marks(engine))


@pytest.mark.parametrize(("engine", "case"), [*parameters()])
def test_attention(benchmark, request, engine, case):
    benchmark.group = f"FAVOR+ M={M} n={case.n} {case.direction}"
    _micro.attention(benchmark, request, engine, case)


@pytest.mark.parametrize("name", ["positive", "hyperbolic", "exact_diagonal"])
@pytest.mark.parametrize("impl", [pytest.param(impl, marks=_micro.marks(impl)) for impl in ("cpu", "triton")])
def test_decode_step(benchmark, impl, name):
    """One token with a state, B = 8, H = 8, D = E = 64, from Python."""
    benchmark.group = f"one decode step, FAVOR+ M={M}, B=8 H=8"
    _micro.decode(benchmark, favor_case(1, B=8, H=8, impl=impl, **VARIANTS[name]))
