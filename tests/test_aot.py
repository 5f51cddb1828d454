"""Ahead-of-time compiles for absent GPUs: a kernel that does not compile, or spills registers, cannot land."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CASES = {
    80: ("bfloat16,64,64,causal,plain", "float16,64,64,causal,plain", "float32,64,64,causal,plain"),
    90: (
        "bfloat16,64,64,causal,plain",
        "bfloat16,128,128,causal,plain",
        "bfloat16,64,64,whole,plain",
        "float32,64,64,causal,state",
    ),
    100: ("bfloat16,64,64,causal,plain", "float32,64,64,causal,plain"),
}
# FAVOR+: kind, projections and whether the diagonal is exact come last
FAVOR_CASES = {
    80: ("bfloat16,64,64,causal,state,positive,256,estimated", "float32,64,64,causal,plain,positive,256,estimated"),
    90: (
        "bfloat16,64,64,causal,state,positive,256,estimated",
        "bfloat16,64,64,causal,state,positive,128,exact",
        "bfloat16,64,64,causal,state,hyperbolic,128,estimated",
    ),
    100: ("bfloat16,64,64,causal,state,positive,256,estimated",),
}

# tile attention: LSH of one set of rows or of two, dense, local, or biased by offset; the hash rides with the first
SOFTMAX_CASES = {
    80: ("bfloat16,64,64,causal,shared", "bfloat16,64,64,causal,biased dense"),
    90: (
        "bfloat16,64,64,causal,shared",
        "bfloat16,128,128,causal,shared",
        "float32,64,64,causal,shared",
        "bfloat16,64,64,causal,dense",
        "bfloat16,64,64,causal,local",
        "bfloat16,64,64,whole,biased local",
    ),
    100: ("bfloat16,64,64,causal,shared", "bfloat16,64,64,causal,biased dense"),
}
# relative positions, and features of their own
TOEPLITZ_CASES = {
    80: ("bfloat16,64,64,causal,toeplitz", "float32,64,64,causal,features", "float32,16,64,whole,toeplitz fft"),
    90: (
        "bfloat16,64,64,causal,toeplitz",
        "float32,64,64,whole,toeplitz",
        "bfloat16,64,64,causal,features",
        "float32,16,64,causal,toeplitz fft",
    ),
    100: ("bfloat16,64,64,causal,toeplitz", "bfloat16,64,64,causal,features", "float32,16,64,whole,toeplitz fft"),
}


def compile_cases(capability: int, cases: tuple[str, ...]) -> str:
    pytest.importorskip("triton")
    script = ROOT / "tests" / "compile_triton.py"
    command = [sys.executable, str(script), str(capability), *cases]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.parametrize("capability", CASES)
def test_triton_kernels_compile_without_spills(capability):
    compiled = compile_cases(capability, CASES[capability])
    assert compiled.count("product_kernel") >= 4 * len(CASES[capability]) - 4


@pytest.mark.parametrize("capability", FAVOR_CASES)
def test_favor_kernels_compile_without_spills(capability):
    compiled = compile_cases(capability, FAVOR_CASES[capability])
    for kernel in ("rows_kernel", "totals_kernel", "scan_kernel", "weight_kernel", "values_kernel", "points_kernel"):
        assert kernel in compiled


@pytest.mark.parametrize("capability", SOFTMAX_CASES)
def test_tile_attention_compiles_without_spills(capability):
    compiled = compile_cases(capability, SOFTMAX_CASES[capability])
    for kernel in ("flags_kernel", "forward_kernel", "delta_kernel", "gradient_kernel", "bias_kernel", "hash_kernel"):
        assert kernel in compiled


@pytest.mark.parametrize("capability", TOEPLITZ_CASES)
def test_relative_positions_compile_without_spills(capability):
    compiled = compile_cases(capability, TOEPLITZ_CASES[capability])
    kernels = ["totals_kernel", "scan_kernel", "gradients_kernel", "factors_kernel"]
    kernels += ["split_kernel", "rows_kernel", "features_kernel", "gradient_kernel"]
    kernels += ["spread_kernel", "contract_kernel", "correlate_kernel"]
    for kernel in kernels + [f"sweep_kernel {kind}" for kind in ("out", "dq", "dk", "dv")]:
        assert kernel in compiled


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_sums_of_reversible_streams_compile_without_spills(capability):
    compiled = compile_cases(capability, ("float32,1,1,whole,reversible", "bfloat16,1,1,whole,reversible"))
    assert compiled.count("add_kernel") == 8


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on PATH")
@pytest.mark.parametrize("arch", ["80", "90a", "100"])
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_cuda_kernels_compile_without_spills(source, arch, tmp_path):
    command = ["nvcc", "-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v"]
    command += ["-Werror=all-warnings", "-o", str(tmp_path / "out.cubin"), str(source)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    assert spills, f"ptxas said nothing of spills: {run.stderr}"
    assert all(stores == loads == "0" for stores, loads in spills), run.stderr
