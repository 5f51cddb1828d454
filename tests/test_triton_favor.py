"""FAVOR+ in Triton's interpreter, against the float64 reference. The decorator reads TRITON_INTERPRET when a
kernel is defined, and the other tests want it unset: each dtype runs in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "interpret_favor.py"
FLOAT32 = (
    "one token after a state",
    "two tokens",
    "trig",
    "relu, not causal, packed",
    "positive, not causal",
    "packed",
    "l2 and mean",
    "exact, hyperbolic, mean, groups, state, mask",
    "all masked",
    "no token",
    "no key",
)
NARROW = ("two tokens", "hyperbolic", "exact, trig, l2, packed")


@pytest.mark.parametrize(
    ("dtype", "cases"),
    [("float32", (*FLOAT32, "law", "public")), ("bfloat16", NARROW), ("float16", NARROW[:2])],
    ids=["float32", "bfloat16", "float16"],
)
def test_interpreted_kernels_stay_within_the_budget(dtype, cases):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore::RuntimeWarning", str(SCRIPT), dtype, *cases]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("of the budget") + run.stdout.count("kept") == len(cases)
