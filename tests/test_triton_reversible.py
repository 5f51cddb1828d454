"""The sum of a reversible layer in Triton's interpreter, in a process of its own, as test_triton_lsh.py says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_interpreted_kernels_have_the_bits_of_the_formula():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore::RuntimeWarning", str(Path(__file__).parent / "interpret_reversible.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("kept") == 3
