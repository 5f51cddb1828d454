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
    "one head, relu, unnormalized",
    "one head, identity",
    "random masked, causal=False",
    "one head, masked",
    "one head, all masked",
    "MQA",
    "one head, state",
    "state, not causal",
    "state, no keys",
)
NARROW = ("L=S=65", "one head, state", "masked, unnormalized, S > L")


@pytest.mark.parametrize(
    ("dtype", "cases"),
    [("float32", (*FLOAT32, "law")), ("bfloat16", NARROW), ("float16", NARROW[:2])],
    ids=["float32", "bfloat16", "float16"],
)
def test_interpreted_kernels_stay_within_the_budget(dtype, cases):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(SCRIPT), dtype, *cases]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("of the budget") + run.stdout.count("kept") == len(cases)
