"""Micro-benchmarks of LSH attention for pytest-benchmark; no time is asserted. bench_linear.py says what is recorded.

    pytest bench/bench_lsh.py                                everything that runs here
    pytest bench/bench_lsh.py -k "cpu and shared and 16384"  some of it
"""

import _contenders_lsh
import _micro
import pytest
from _contenders_lsh import STAGES, Case

LENGTHS = (1024, 16384)
LONGEST = {"reference": 1024}
# name -> what differs from causal shared QK with four rounds in float32
VARIANTS = {
    "shared": {},
    "one-round": {"n_hashes": 1},
    "full": {"is_causal": False},
    "bfloat16": {"dtype": "bfloat16"},
    "equal": {"content": "equal"},
}


def parameters():
    for engine in ("cpu", "triton", "reference"):
        for name, options in VARIANTS.items():
            for n in LENGTHS:
                for direction in ("forward", "forward+backward"):
                    if n > LONGEST.get(engine, n) or (engine in LONGEST and options):
                        continue
                    case = Case(n, impl=engine, direction=direction, **options)
                    yield pytest.param(engine, case, id=f"{engine}-{name}-{n}-{direction}", marks=_micro.marks(engine))


@pytest.mark.parametrize(("engine", "case"), [*parameters()])
def test_attention(benchmark, request, engine, case):
    benchmark.group = f"LSH R={case.n_hashes} n={case.n} {case.direction}"
    _micro.attention(benchmark, request, engine, case, contenders=_contenders_lsh)


@pytest.mark.parametrize("impl", [pytest.param(impl, marks=_micro.marks(impl)) for impl in ("cpu", "triton")])
@pytest.mark.parametrize("name", STAGES)
def test_stage(benchmark, request, impl, name):
    """Hash, sort or tiles alone, on what the others made before."""
    case = Case(16384, impl=impl)
    benchmark.group = f"stages of LSH R={case.n_hashes} n={case.n}"
    _micro.attention(benchmark, request, impl, case, f"longattn {name}", _contenders_lsh)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("n", [1024, 4096])
@pytest.mark.parametrize("engine", [pytest.param(engine, marks=_micro.marks(engine)) for engine in ("cpu", "exact")])
def test_dense(benchmark, request, engine, n, direction):
    """Causal attention over all keys by the same engine, and by torch."""
    case = Case(n, n_hashes=0, direction=direction)
    benchmark.group = f"exact attention n={n} {direction}"
    _micro.attention(benchmark, request, engine, case, "longattn exact", _contenders_lsh)
