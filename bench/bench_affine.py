"""Micro-benchmarks of whole-layer products for pytest-benchmark: ours beside torch's, no time is asserted.

pytest bench/bench_affine.py                           everything that runs here
pytest bench/bench_affine.py -k "gradients and 8192"   some of it
"""

import _micro
import pytest
import torch
from torch.nn import functional as F

from longattn.ops.affine import affine

FUNCTIONS = {"longattn": affine, "torch": F.linear}
# (in, out): a feed-forward layer and back, a projection to two heads and back
WIDTHS = ((256, 512), (512, 256), (256, 128), (128, 256))


@pytest.mark.parametrize("name", [pytest.param("longattn", marks=_micro.marks("cpu")), "torch"])
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("widths", WIDTHS, ids=lambda widths: f"{widths[0]}-{widths[1]}")
@pytest.mark.parametrize("rows", [8192, 65536])
def test_layer(benchmark, name, gradients, dtype, widths, rows):
    """A layer of [rows, in] -> [rows, out] with a bias: its result, or that and its three gradients."""
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, dtype)
    shapes = (rows, widths[0]), widths[::-1], widths[1:], (rows, widths[1])
    *inputs, grad = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    inputs = [x.requires_grad_(gradients) for x in inputs]

    def call():
        y = FUNCTIONS[name](*inputs)
        return torch.autograd.grad(y, inputs, grad) if gradients else y

    benchmark.group = f"{rows} rows, {widths[0]} to {widths[1]}, {dtype}, {'gradients' if gradients else 'forward'}"
    slow = dtype == torch.bfloat16
    benchmark.pedantic(call, rounds=2 if slow else 9, warmup_rounds=1)
    flops = (3 if gradients else 1) * 2 * rows * widths[0] * widths[1]
    # the best of the rounds: others on the machine only ever slow one down
    benchmark.extra_info |= {"gflops": 1e-9 * flops / benchmark.stats.stats.min}
