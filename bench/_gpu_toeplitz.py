"""Relative positions in gpu.py: prefix, tiles and FFT beside exact attention with the same bias, and crossovers."""

from __future__ import annotations

import itertools
import math

import _contenders_toeplitz
import _floors
import torch
from _contenders_toeplitz import Case, call_of, make_inputs
from _floors import Rates

NAME = "longattn rpe"
# exact attention with the bias: as a mask of n x n, or in one kernel that torch.compile makes
MASK, FLEX = "torch SDPA, bias mask", "torch flex_attention, bias"
K = 128
DIRECTIONS = ("forward", "forward+backward")
# the FFT computes in float32 whatever it is given
WAYS = (("prefix", K, 64), ("tiles", None, 64), ("fft", None, 64), ("tiles", None, 16), ("fft", None, 16))


def cases(n: int, heads: int, impl: str = "triton", dtype: str = "bfloat16") -> list[Case]:
    """Causal, E = 64; prefix with a bias clipped at K, the others with a number for every offset."""
    one = Case(n, H=heads, impl=impl, dtype=dtype)
    return [
        one._replace(method=method, reach=reach, D=D, direction=direction)
        for (method, reach, D), direction in itertools.product(WAYS, DIRECTIONS)
    ]


def opponents(n: int, heads: int, dtype: str = "bfloat16") -> list[tuple[str, Case]]:
    one = Case(n, H=heads, dtype=dtype, impl="torch", method="tiles")
    return [(name, one._replace(direction=direction)) for name in (MASK, FLEX) for direction in DIRECTIONS]


def label(row: dict) -> str:
    return f"rpe {row['method']} M={row['D']}"


def growth(method: str) -> float:
    """The power of the length that time grows with, at most."""
    return 2 if method == "tiles" else 1.2


def bytes_of(name: str, case: Case) -> float:
    """About what a call takes: float32 features and their gradients; or the mask, its gradient and their copies."""
    if name == MASK:
        return 4 * case.H * case.n**2 * _floors.ITEM_BYTES[case.dtype]
    return 5 * case.shape.token_heads * case.shape.inputs * 4


def flex(case: Case, inputs, compiled: bool = True):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask, reach = None, case.reaches
    if case.is_causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, case.n, case.n, device=inputs.q.device)
    run = torch.compile(flex_attention) if compiled else flex_attention

    def attend(q, k, v, bias):
        def add(score, b, h, i, j):
            return score + bias[h, torch.clamp(j - i, -reach, reach) + reach]

        return run(q, k, v, score_mod=add, block_mask=mask)

    return call_of(case, inputs, attend)


def build(name: str, case: Case, device: str):
    """The call to measure, on inputs of its own."""
    inputs = make_inputs(case, device)
    if name == FLEX:
        return flex(case, inputs, compiled=device == "cuda")
    return _contenders_toeplitz.build("torch SDPA" if name == MASK else "longattn", case, inputs)


def floor(case: Case, rates: Rates) -> float:
    return _floors.floor(case.shape, case.direction, rates)


def crossovers(rows: list[dict]) -> list[dict]:
    """From which length on one way is faster than another, by lines between lengths in a log-log plot.

    None: at no length measured; the shortest length measured where it was faster at all of them.
    """
    measured: dict[tuple, dict[int, float]] = {}
    for row in rows:
        if "median_ms" in row and row["dtype"] == "bfloat16" and row["direction"] in DIRECTIONS:
            if row["contender"] == NAME:
                what = label(row)
            elif row["contender"].startswith("torch") and row.get("D") == 64:
                what = row["contender"]
            else:
                continue
            measured.setdefault((what, row["direction"]), {})[row["n"]] = row["median_ms"]
    pairs = [(f"rpe {fast} M={M}", f"rpe tiles M={M}") for fast in ("fft", "prefix") for M in (16, 64)]
    exact = sorted({what for what, _ in measured if what.startswith("torch")})
    pairs += [(what, other) for what in ("rpe prefix M=64", "rpe tiles M=64", "rpe fft M=64") for other in exact]
    found = []
    for (fast, slow), direction in itertools.product(pairs, DIRECTIONS):
        one, two = (measured.get((what, direction), {}) for what in (fast, slow))
        lengths = sorted(one.keys() & two.keys())
        if lengths:
            at = _crossing([(n, math.log(one[n] / two[n])) for n in lengths])
            found.append({"direction": direction, "faster": fast, "than": slow, "from_n": at, "measured": lengths})
    return found


def _crossing(points: list[tuple[int, float]]) -> int | None:
    """Where the last line from above 0 to below it crosses; points: lengths in order, and logarithms of time ratios."""
    if points[-1][1] > 0:
        return None
    for (n, before), (later, after) in reversed(list(itertools.pairwise(points))):
        if before > 0:
            return round(n * (later / n) ** (before / (before - after)))
    return points[0][0]


def check(impl: str = "triton", device: str = "cuda", length: int = 1000) -> str | None:
    """None if prefix and tiles agree with the float64 reference at the dims measured here."""
    from longattn.testing.toeplitz import ToeplitzCase, check_toeplitz

    sizes = {"B": 1, "H": 2, "L": length, "E": 64, "is_causal": True}
    for D, dtype, reach in itertools.product((64, 16), (torch.bfloat16, torch.float32), (K, length - 1)):
        case = ToeplitzCase(f"bench rpe, {D} features, reach {reach}", D=D, reach=reach, **sizes)
        try:
            check_toeplitz(case, dtype, impl, "prefix", device)
        except AssertionError as error:
            return str(error)
    return None
