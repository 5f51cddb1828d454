"""Linear attention with relative positions in Triton's interpreter, against the float64 reference, in a process of its
own, as test_triton_linear.py says.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "interpret_toeplitz.py"
# float32 but where another dtype stands before, and rpe_method="fft" where that does
CASES = (
    "far",
    "full, far",
    "one factor",
    "packed",
    "full, more keys",
    "full, more queries",
    "wide",
    "all masked",
    "full, L=0",
    "full, S=0",
    "law",
    "stream",
    "phi",
    "bfloat16:full, packed",
    "bfloat16:phi",
    "float16:full, near",
    "float16:phi",
    "fft:spans",
    "fft:full, sums",
    "fft:full, tail",
    "fft:packed",
    "fft:all masked",
    "fft:full, S=0",
    "bfloat16:fft:spans",
)


def test_interpreted_kernels_stay_within_the_budget():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore::RuntimeWarning", str(SCRIPT), *CASES]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(": kept") == len(CASES)
