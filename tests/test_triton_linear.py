"""Triton kernels in its interpreter, against the float64 reference. The decorator reads TRITON_INTERPRET when a kernel
is defined, and the other tests want it unset: each dtype runs in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "interpret_triton.py"
FLOAT32 = (
    "causal L=1 after a state",
    "causal L=65",
    "L=1 S=37",
    "L=37 S=1",
    "head dims 1 and 5, causal=True",
    "head dims 31 and 16, causal=True",
    "relu, normalize=False, scale=-0.3",
    "identity, normalize=True, scale=0.3",
    "random masked, causal=False",
    "random masked, causal=True",
    "all masked, causal=True",
    "MQA",
    "state, causal, masked",
    "state, not causal",
    "state, no keys",
)
NARROW = ("causal L=65", "L=S=65", "state, causal, masked", "masked, unnormalized, S > L")


@pytest.mark.parametrize(
    ("dtype", "cases"),
    [("float32", FLOAT32), ("bfloat16", NARROW), ("float16", NARROW)],
    ids=["float32", "bfloat16", "float16"],
)
def test_interpreted_kernels_stay_within_the_budget(dtype, cases):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(SCRIPT), dtype, *cases]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("of the budget") == len(cases)
