"""softmax_attention(rpe_bias=...) in Triton's interpreter, in a process of its own, as test_triton_lsh.py says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "interpret_softmax.py"
# float32 but where another dtype stands before
CASES = (
    "one token",
    "causal, clipped",
    "causal, full",
    "causal, one number",
    "clipped",
    "full, more keys",
    "more queries",
    "two numbers",
    "shared by heads",
    "window",
    "window, whole",
    "chunks",
    "chunks, causal",
    "all hidden",
    "no query",
    "no key",
    "packed",
    "dropout",
    "hidden",
    "bfloat16:causal, full",
    "float16:shared by heads",
)


def test_interpreted_kernels_stay_within_the_budget():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore::RuntimeWarning", str(SCRIPT), *CASES]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(": kept") == len(CASES)
