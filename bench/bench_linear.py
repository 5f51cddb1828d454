"""Micro-benchmarks of linear attention for pytest-benchmark; no time is asserted.

    pytest bench                                         everything that runs here
    pytest bench -k "cpu and 16384 and not backward"     some of it
    pytest bench --benchmark-json=bench/results/x.json   kept, with the machine and the peak memory

extra_info of each: ns per token and head, MB of the results, and peak_mb, the growth of the resident set (of the GPU's
allocations) during one call in a fresh process (see README.md). Exact attention of torch is one of the engines, as the
line to beat; the dense reference runs at small lengths only.
"""

import itertools

import _micro
import pytest
from _contenders import Case

LENGTHS = (1024, 16384, 65536)
LONGEST = {"reference": 1024, "exact": 16384}
ENGINES = ("cpu", "triton", "reference", "exact")
# (feature map or raw features, head dim)
FEATURES = (("elu", 64), ("relu", 64), ("raw", 256))


def parameters():
    """Every combination that means something; those this machine cannot run are skipped with the reason."""
    for (feature, D), dtype, engine, n, direction, is_causal in itertools.product(
        FEATURES, ("float32", "bfloat16"), ENGINES, LENGTHS, ("forward", "forward+backward"), (True, False)
    ):
        if n > LONGEST.get(engine, n) or (engine in LONGEST and (feature, dtype) != ("elu", "float32")):
            continue
        # one map and one dtype tell about the rest of the non-causal path, one dtype about the other map
        if ((not is_causal or feature == "relu") and dtype != "float32") or (not is_causal and feature != "elu"):
            continue
        case = Case(n, D=D, feature=feature, normalize=feature != "raw", dtype=dtype, direction=direction)
        case = case._replace(is_causal=is_causal, impl="cpu" if engine == "exact" else engine)
        mode = "causal" if is_causal else "full"
        name = f"{engine}-{feature}-{dtype}-{mode}-{n}-{direction}"
        yield pytest.param(engine, case, id=name, marks=_micro.marks(engine))


@pytest.mark.parametrize(("engine", "case"), [*parameters()])
def test_attention(benchmark, request, engine, case):
    benchmark.group = f"{case.feature} D={case.D} {case.dtype} n={case.n} {case.direction}"
    _micro.attention(benchmark, request, engine, case)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("impl", [pytest.param(impl, marks=_micro.marks(impl)) for impl in ("cpu", "cuda")])
def test_decode_step(benchmark, impl, dtype):
    """One token with a state, B = 8, H = 8, D = E = 64, from Python."""
    benchmark.group = "one decode step, B=8 H=8"
    _micro.decode(benchmark, Case(1, B=8, H=8, dtype=dtype, impl=impl))
