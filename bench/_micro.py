"""What the micro-benchmarks share: which engines run here, one measured call with what is recorded beside it."""

from __future__ import annotations

import _contenders
import _floors
import _measure
import pytest
import torch

from longattn.ops import _dispatch


def device(engine: str) -> str:
    return "cuda" if engine in ("triton", "cuda") or (engine == "exact" and torch.cuda.is_available()) else "cpu"


def marks(engine: str) -> list:
    """A mark for the GPU; a skip with the reason where the engine cannot run. "exact" is torch's attention."""
    reason = None if engine == "exact" else _dispatch.missing(engine)
    found = [pytest.mark.gpu] if device(engine) == "cuda" else []
    return [*found, pytest.mark.skip(reason=reason)] if reason else found


def synchronized(call, engine: str):
    return (lambda: (call(), torch.cuda.synchronize())) if device(engine) == "cuda" else call


def attention(benchmark, request, engine: str, case, contender: str = "longattn", contenders=_contenders) -> None:
    """contenders: the module that builds them; "exact" is torch's attention, whoever is named."""
    contender = "torch SDPA" if engine == "exact" else contender
    call = contenders.build(contender, case, contenders.make_inputs(case, device(engine)))
    benchmark.pedantic(synchronized(call, engine), rounds=3 if case.n > 1024 else 10, warmup_rounds=1)
    extra = {"ns_per_token_head": 1e9 * benchmark.stats.stats.median / case.shape.token_heads}
    extra["results_mb"] = _floors.output_bytes(case.shape, case.direction) / 1e6
    if not request.config.getoption("--no-peak"):
        where = {"device": device(engine), "module": contenders.__name__}
        extra |= _measure.fresh_peak(contender, case._asdict(), torch.get_num_threads(), **where)
    benchmark.extra_info |= extra


def decode(benchmark, case: _contenders.Case) -> None:
    step = synchronized(_contenders.decode_ours(case), case.impl)
    benchmark.pedantic(step, rounds=50, iterations=20, warmup_rounds=2)
