"""The tile engine in gpu.py: LSH attention, exact attention, and LSH's hash and sort alone."""

from __future__ import annotations

import itertools

import _floors
import torch
from _contenders_lsh import Case, build, directed, make_inputs, stage
from _floors import Rates
from torch.nn import functional as F

from longattn.ops import _tiles
from longattn.ops.softmax import CHUNK

LSH, EXACT = "longattn LSH", "longattn exact"
# hashing and sorting have no direction; they stand where others say it
PARTS = ("hash", "sort")
# rounds, 0: exact attention
ROUNDS = (4, 1, 0)


def cases(n: int, heads: int, impl: str = "triton", dtype: str = "bfloat16") -> list[Case]:
    """Causal, D = E = 64, chunks of 64; LSH with shared queries and keys."""
    one = Case(n, H=heads, impl=impl, dtype=dtype)
    ways = [(R, direction) for R in ROUNDS for direction in ("forward", "forward+backward", *(PARTS if R else ()))]
    return [one._replace(n_hashes=R, direction=direction) for R, direction in ways]


def name_of(case: Case) -> str:
    return LSH if case.n_hashes else EXACT


def exact(case: Case, inputs):
    """The engine without orders, as `softmax_attention` calls it."""
    reach, options = 2 * case.n, (False, False, case.D**-0.5, 0.0, 0, case.impl)
    ahead = 0 if case.is_causal else reach
    options = _tiles.Options(CHUNK, reach, ahead, 0, case.is_causal, _tiles.SELF_ORDINARY, *options)

    def attend(q, k, v):
        return _tiles.attend(q, k, v, None, None, None, (None,) * 6, options)

    return directed(case, attend, list(inputs[:3]), inputs.grad_out)


def call_of(case: Case, device: str):
    """The call to measure, on inputs of its own."""
    inputs = make_inputs(case, device)
    if case.direction in PARTS:
        return stage(case.direction, case, inputs)
    return build("longattn", case, inputs) if case.n_hashes else exact(case, inputs)


def floor(case: Case, rates: Rates) -> float:
    """Seconds of arithmetic, or of the rows that each round gathers."""
    if case.direction in PARTS:
        return _floors.part_floor(case.shape, case.direction, rates)
    least = _floors.floor(case.shape, case.direction, rates)
    gathered = _floors.gathered_bytes(case.shape, case.direction) / rates.bandwidth if case.n_hashes else 0
    return max(least, gathered)


def check(impl: str = "triton", device: str = "cuda", length: int = 1000) -> str | None:
    """None if the engine agrees with the float64 reference at the head dims and chunks measured here."""
    from longattn.testing.lsh import LshCase, check_lsh

    for R, dtype in itertools.product((4, 1), (torch.bfloat16, torch.float32)):
        sizes = {"B": 1, "H": 4, "L": length, "D": 64, "E": 64, "n_hashes": R, "chunk_size": 64, "n_buckets": 32}
        try:
            check_lsh(LshCase(f"bench, {R} rounds", is_causal=True, **sizes), dtype, impl, device)
        except AssertionError as error:
            return str(error)
    case = Case(length, H=4, n_hashes=0, impl=impl, dtype="bfloat16", direction="forward+backward")
    inputs = make_inputs(case, device)
    *wide, grad_out = (x.double() for x in inputs)
    expected = directed(case, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), wide, grad_out)()
    for name, x, y in zip(("output", "dq", "dk", "dv"), exact(case, inputs)(), expected, strict=True):
        error = ((x - y).abs().max() / y.abs().max()).item()
        # a result is rounded to 8 bits, the weights and their gradients too
        if error > 0.02:
            return f"exact attention of the tile engine: {name} is off by {error:.1e}"
    return None
