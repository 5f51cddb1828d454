"""Micro-benchmarks of linear attention for pytest-benchmark; no time is asserted.

    pytest bench                                         everything that runs here
    pytest bench -k "cpu and 16384 and not backward"     some of it
    pytest bench --benchmark-json=bench/results/x.json   kept, with the machine and the peak memory

extra_info of each: ns per token and head, MB of the results, and peak_mb, the growth of the resident set (of the GPU's
allocations) during one call in a fresh process (see README.md). Exact attention of torch is one of the engines, as the
line to beat; the dense reference runs at small lengths only.
"""

import itertools

import _contenders
import _floors
import _measure
import pytest
import torch
from _contenders import Case

from longattn.ops import _dispatch

LENGTHS = (1024, 16384, 65536)
LONGEST = {"reference": 1024, "exact": 16384}
ENGINES = ("cpu", "triton", "reference", "exact")
# (feature map or raw features, head dim)
FEATURES = (("elu", 64), ("relu", 64), ("raw", 256))


def device(engine: str) -> str:
    return "cuda" if engine == "triton" or (engine == "exact" and torch.cuda.is_available()) else "cpu"


def reason_missing(engine: str) -> str | None:
    return None if engine == "exact" else _dispatch.missing(engine)


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
        marks = [pytest.mark.gpu] if device(engine) == "cuda" else []
        if reason_missing(engine):
            marks.append(pytest.mark.skip(reason=reason_missing(engine)))
        mode = "causal" if is_causal else "full"
        name = f"{engine}-{feature}-{dtype}-{mode}-{n}-{direction}"
        yield pytest.param(engine, case, id=name, marks=marks)


@pytest.mark.parametrize(("engine", "case"), [*parameters()])
def test_attention(benchmark, request, engine, case):
    contender = "torch SDPA" if engine == "exact" else "longattn"
    call = _contenders.build(contender, case, _contenders.make_inputs(case, device(engine)))
    if device(engine) == "cuda":
        measured, call = call, lambda: (measured(), torch.cuda.synchronize())
    benchmark.group = f"{case.feature} D={case.D} {case.dtype} n={case.n} {case.direction}"
    rounds = 3 if case.n > 1024 else 10
    benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)
    extra = {"ns_per_token_head": 1e9 * benchmark.stats.stats.median / case.shape.token_heads}
    extra["results_mb"] = _floors.output_bytes(case.shape, case.direction) / 1e6
    if not request.config.getoption("--no-peak"):
        extra |= _measure.fresh_peak(contender, case._asdict(), torch.get_num_threads(), device=device(engine))
    benchmark.extra_info |= extra


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "impl",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(bool(reason_missing("cpu")), reason=str(reason_missing("cpu")))),
        pytest.param("cuda", marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(bool(reason_missing("cuda")), reason=str(reason_missing("cuda"))),
        ]),
    ],
)
def test_decode_step(benchmark, impl, dtype):
    """One token with a state, B = 8, H = 8, D = E = 64, from Python."""
    step = _contenders.decode_ours(8, 8, 64, 64, impl=impl, dtype=dtype)
    if impl == "cuda":
        measured, step = step, lambda: (measured(), torch.cuda.synchronize())
    benchmark.group = "one decode step, B=8 H=8"
    benchmark.pedantic(step, rounds=50, iterations=20, warmup_rounds=2)
