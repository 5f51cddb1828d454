"""Micro-benchmarks of reversible layers for pytest-benchmark: no time is asserted, bench_linear.py says what is there.

pytest bench/bench_reversible.py                       everything that runs here
pytest bench/bench_reversible.py -k "step and 4096"    some of it
"""

import _contenders_reversible
import _micro
import pytest
import torch
from _contenders_reversible import Case
from torch.nn import functional as F

from longattn import reversible_add
from longattn.nn import ChunkedFeedForward, chunked_cross_entropy

WIDTH, HIDDEN, VOCABULARY = 256, 1024, 8192
LENGTHS = (1024, 16384)
GRID = 2**-13
# beside ours: the same layers by plain autograd, and with torch's checkpoint
STACKS = ("longattn", "longattn exact", "plain", "checkpoint")
ENGINES = [pytest.param(engine, marks=_micro.marks(engine)) for engine in ("cpu", "triton", "cuda", "reference")]
CHUNKS = pytest.mark.parametrize("chunk_size", [None, 1024], ids=["whole", "chunks"])


def drawn(*shape: int, device: str = "cpu", **options) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.empty(*shape, device=device, **options).normal_(generator=generator)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("grid", [None, GRID], ids=["plain", "grid"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", LENGTHS)
def test_sum(benchmark, engine, grid, dtype, n):
    """A stream of [n, 256] in float32 and a branch of this dtype, in place: there and, for the next time, back."""
    device = _micro.device(engine)
    x, f = drawn(n, WIDTH, device=device), drawn(n, WIDTH, device=device, dtype=getattr(torch, dtype))
    x = x if grid is None else reversible_add(torch.zeros_like(x), x, grid=grid)

    def there_and_back():
        reversible_add(x, f, grid=grid, inplace=True, impl=engine)
        reversible_add(x, f, grid=grid, subtract=True, inplace=True, impl=engine)

    benchmark.group = f"two sums of a stream n={n}, a branch of {dtype}"
    benchmark.pedantic(_micro.synchronized(there_and_back, engine), rounds=20, iterations=5, warmup_rounds=2)
    moved = 2 * n * WIDTH * (8 + f.element_size())
    benchmark.extra_info["gb_per_s"] = 1e-9 * moved / benchmark.stats.stats.median


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("layers", [2, 6])
@pytest.mark.parametrize("n", [1024, 4096])
def test_step(benchmark, request, name, layers, n):
    """Forward and backward of layers with longattn's linear attention, and the memory of it against their number."""
    case = Case(n, layers=layers, attention="linear")
    benchmark.group = f"step of {layers} layers n={n}"
    _micro.attention(benchmark, request, "cpu", case, name, _contenders_reversible)


@CHUNKS
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_feed_forward(benchmark, chunk_size, activation):
    torch.manual_seed(0)
    layer = ChunkedFeedForward(WIDTH, HIDDEN, chunk_size=chunk_size, activation=activation)
    x = drawn(LENGTHS[-1], WIDTH).requires_grad_()
    leaves, grad = [x, *layer.parameters()], drawn(*x.shape)
    benchmark.group = f"feed-forward {activation} n={len(x)} forward+backward"
    benchmark.pedantic(lambda: torch.autograd.grad(layer(x), leaves, grad), rounds=5, warmup_rounds=1)


@CHUNKS
def test_loss(benchmark, chunk_size):
    hidden, weight = drawn(4096, WIDTH).requires_grad_(), drawn(VOCABULARY, WIDTH).div_(16).requires_grad_()
    target = torch.randint(VOCABULARY, (len(hidden),), generator=torch.Generator().manual_seed(0))

    def step():
        if chunk_size is None:
            loss = F.cross_entropy(F.linear(hidden, weight), target)
        else:
            loss = chunked_cross_entropy(hidden, weight, target, chunk_size=chunk_size)
        return torch.autograd.grad(loss, [hidden, weight])

    benchmark.group = f"loss of {VOCABULARY} classes n={len(hidden)} forward+backward"
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
