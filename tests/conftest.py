"""Poisoned memory for every test, the engines of this machine, and hypothesis settings."""

import functools
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from longattn.ops import _dispatch

settings.register_profile(
    "longattn",
    deadline=None,
    derandomize="CI" in os.environ,
    database=None,
    max_examples=100,
    # the fixtures hold nothing that an example could change
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("longattn")


def _poison(x):
    if torch.compiler.is_compiling() or x.numel() == 0 or x.device.type == "meta":
        return x
    with torch.no_grad():
        if x.is_floating_point() or x.is_complex():
            return x.fill_(float("nan"))
        return x.fill_(True) if x.dtype == torch.bool else x.fill_(255 if x.dtype == torch.uint8 else -1)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """An output element that a kernel leaves unwritten is NaN or -1, so no test can pass by luck."""

    def patch(owner, name):
        original = getattr(owner, name)

        @functools.wraps(original)
        def poisoned(*args, **kwargs):
            return _poison(original(*args, **kwargs))

        monkeypatch.setattr(owner, name, poisoned)

    for name in ("empty", "empty_like", "empty_strided"):
        patch(torch, name)
    patch(torch.Tensor, "new_empty")
    patch(torch.Tensor, "new_empty_strided")


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors here are small, and test_threads.py shows that the number changes no bit; puts back what it found."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def three_threads(one_thread):
    """For laws of bits: with more threads than work the kernels split a sequence, alone otherwise than in company."""
    torch.set_num_threads(3)


def _parameter(impl):
    reason = _dispatch.missing(impl)
    marks = [] if reason is None else [pytest.mark.skip(reason=f"{impl}: {reason}")]
    return pytest.param(impl, marks=[*marks, pytest.mark.gpu] if impl == "triton" else marks)


# without a GPU the interpreter runs Triton's kernels, in test_triton_linear.py
KERNELS = [_parameter(impl) for impl in ("cpu", "triton") if impl != "triton" or torch.cuda.is_available()]


@pytest.fixture(params=[_parameter("reference"), *KERNELS])
def impl(request):
    """Every engine of linear attention that runs on this machine."""
    return request.param


@pytest.fixture(params=KERNELS)
def kernel(request):
    """The same without the reference: for laws that a dense formula cannot keep, or at lengths it cannot reach."""
    return request.param


def device_of(impl: str) -> str:
    return "cuda" if impl == "triton" else "cpu"


@pytest.fixture
def device(request):
    """Where the tensors of the test's engine live."""
    names = [name for name in ("impl", "kernel") if name in request.fixturenames]
    return device_of(request.getfixturevalue(names[0])) if names else "cpu"
