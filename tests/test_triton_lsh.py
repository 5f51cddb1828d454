"""Tile attention and the hash of LSH in Triton's interpreter. The decorator reads TRITON_INTERPRET when a kernel is
defined, and the other tests want it unset: each dtype runs in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "interpret_lsh.py"
FLOAT32 = (
    "one token",
    "two rounds of sevens",
    "three rounds, all options",
    "chunk of 64",
    "chunk of a hundred",
    "wrap, one round, ahead",
    "packed",
    "separate, fallback",
    "separate, packed",
    "crossed",
    "dense, whole",
    "dense, more queries",
    "chunks",
    "sliding",
    "sliding, not causal",
    "all padded",
    "no key",
    "no token",
)
NARROW = ("two rounds of sevens", "dense, whole")
# of longattn.testing.lsh, through the public function
PUBLIC = ("causal L=2, chunk 1", "separate, L=2, chunk 7, causal=False")


@pytest.mark.parametrize(
    ("dtype", "cases"),
    [("float32", (*FLOAT32, *PUBLIC, "law", "hash")), ("bfloat16", NARROW), ("float16", ("chunk of 64",))],
    ids=["float32", "bfloat16", "float16"],
)
def test_interpreted_kernels_stay_within_the_budget(dtype, cases):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore::RuntimeWarning", str(SCRIPT), dtype, *cases]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("of the budget") + run.stdout.count("kept") == len(cases)
