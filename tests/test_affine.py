"""x W^T + b in our own tiles: the numbers of `F.linear`, and who computes what."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from longattn import native
from longattn.native.affine import product
from longattn.nn.affine import Affine
from longattn.ops import affine as op
from longattn.testing.assertions import assert_same_bits
from longattn.testing.cases import draw

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"cpu: {native.missing()}")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# (M, K, N): one of each, a tile and one more or less, blocks of the depth and one more, several tasks, several packs
SHAPES = (
    (1, 1, 1), (6, 16, 16), (7, 255, 17), (8, 256, 31), (9, 257, 33), (97, 300, 130), (200, 63, 600), (37, 5000, 300),
    (130, 2, 1100),
)  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """Calls of any size are ours."""
    monkeypatch.setattr(op, "ROWS", 1)
    monkeypatch.setattr(op, "PRODUCTS", 1)


def laid_out(x, how):
    """As it is, turned, in steps, or its first row for all."""
    if how == "turned":
        return x.t().contiguous().t()
    if how == "sliced":
        wide = torch.full((x.shape[0], 2 * x.shape[1] + 1), torch.nan, dtype=x.dtype)
        wide[:, 1::2] = x
        return wide[:, 1::2]
    if how == "expanded":
        return x[:1].expand_as(x)
    return x


def error(y, a, b, bias, expected):
    """The largest error against what its sum can lose: one rounding for each term, and one of the result."""
    size = a.double().abs() @ b.double().abs() + (0 if bias is None else bias.double().abs())
    eps = torch.finfo(torch.float64 if a.dtype == torch.float64 else torch.float32).eps
    # sums of 256 terms from 0, then a sum of those
    terms = min(a.shape[1], 256) ** 0.5 + (a.shape[1] / 256) ** 0.5 + 4
    budget = eps * terms * size + torch.finfo(y.dtype).eps * expected.abs()
    return ((y.double() - expected).abs() / budget.clamp(min=1e-300)).max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_any_layout(shape, dtype):
    M, K, N = shape
    a, b, bias = (x.to(dtype) for x in draw((M, K), (K, N), (N,)))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    for how_a in ("plain", "turned", "sliced", "expanded"):
        for how_b in ("plain", "turned", "sliced", "expanded"):
            x, y = laid_out(a, how_a), laid_out(b, how_b)
            expected = x.double() @ y.double()
            for out, with_bias, split in ((dtype, True, False), (acc, False, False), (acc, False, True)):
                found = product(x, y, bias if with_bias else None, out, split=split)
                assert found.dtype == out
                assert found.is_contiguous()
                wanted = expected + bias.double() if with_bias else expected
                assert error(found, x, y, bias if with_bias else None, wanted) < 1, (how_a, how_b, split)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bit_depends_on_threads_or_other_rows(dtype):
    a, b, bias = (x.to(dtype) for x in draw((700, 2500), (2500, 150), (150,)))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    whole, split = product(a, b, bias, dtype), product(a.t(), a[:, :90], None, acc, split=True)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert_same_bits(f"{threads} threads", product(a, b, bias, dtype), whole)
        assert_same_bits(f"{threads} threads, split", product(a.t(), a[:, :90], None, acc, split=True), split)
    for rows in (slice(0, 1), slice(13, 112), slice(300, 700)):
        assert_same_bits(f"rows {rows}", product(a[rows], b, bias, dtype), whole[rows])
    columns = product(a, b[:, :40], bias[:40], dtype)
    assert_same_bits("columns", columns, whole[:, :40])


def test_columns_are_packed_some_at_a_time(monkeypatch):
    a, b, bias = draw((40, 300), (300, 500), (500,), dtype=torch.bfloat16)
    whole = product(a, b, bias, torch.bfloat16)
    monkeypatch.setattr("longattn.native.affine.PACKED", 300 * 128)
    assert_same_bits("in four", product(a, b, bias, torch.bfloat16), whole)


def test_nan_stays_in_its_row_and_column():
    a, b = draw((100, 300), (300, 50))
    expected = product(a, b, None, torch.float32)
    a[17, 5] = torch.nan
    b[9, 31] = torch.inf
    found = product(a, b, None, torch.float32)
    touched = torch.zeros_like(expected, dtype=torch.bool)
    touched[17], touched[:, 31] = True, True
    assert found[17].isnan().all()
    assert not found[:, 31].isfinite().any()
    assert_same_bits("the rest", found[~touched], expected[~touched])


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=str)
def test_nothing_to_multiply(shape):
    M, K, N = shape
    bias = torch.ones(N)
    a, b = torch.zeros(M, K), torch.zeros(K, N)
    assert torch.equal(product(a, b, bias, torch.float32), torch.ones(M, N))
    assert torch.equal(product(a, b, None, torch.float32, split=True), torch.zeros(M, N))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(small, monkeypatch, dtype, split):
    monkeypatch.setattr(op, "SPLIT", 1 << 20 if split else 0)
    layer, x = Affine(30, 50, dtype=dtype), draw((3, 70, 30))[0].to(dtype).requires_grad_()
    grad = draw((3, 70, 50), seed=1)[0].to(dtype)
    leaves = [x, layer.weight, layer.bias]
    found = [layer(x), *torch.autograd.grad(layer(x), leaves, grad)]
    doubles = [p.detach().double().requires_grad_() for p in leaves]
    exact = [y := F.linear(*doubles), *torch.autograd.grad(y, doubles, grad.double())]
    eager = [y := F.linear(*leaves), *torch.autograd.grad(y, leaves, grad)]
    for ours, theirs, truth in zip(found, eager, exact, strict=True):
        assert ours.dtype == dtype
        assert ours.shape == truth.shape
        # torch's own float64 is the truth for ours, which adds in another order
        floor = (8 if dtype == torch.float64 else 1) * torch.finfo(dtype).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + floor


def test_gradients_only_where_they_are_wanted(small):
    x, layer = draw((40, 6))[0], Affine(6, 9)
    for wanted in (layer.weight, layer.bias):
        layer.requires_grad_(False)
        wanted.requires_grad_(True)
        (found,) = torch.autograd.grad(layer(x).sum(), [wanted])
        assert found.shape == wanted.shape
        assert found.count_nonzero() > 0
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    (dx,) = torch.autograd.grad(layer(x.requires_grad_()).sum(), [x])
    torch.testing.assert_close(dx, layer.weight.sum(0).expand(40, 6))


def test_second_derivatives_are_there(small):
    def function(x, weight, bias):
        return op.affine(x, weight, bias).tanh()

    inputs = [x.double().requires_grad_() for x in draw((5, 3), (4, 3), (4,))]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_gradients_of_expanded_ones(small):
    x, weight = draw((50, 20), (30, 20))
    x.requires_grad_(), weight.requires_grad_()
    found = torch.autograd.grad(op.affine(x, weight).sum(), [x, weight])
    expected = torch.autograd.grad(F.linear(x, weight).sum(), [x, weight])
    torch.testing.assert_close(found, expected)


def test_autocast_is_torchs(small):
    layer, x = Affine(40, 24), draw((64, 40))[0].requires_grad_()
    twin = nn.Linear(40, 24)
    twin.load_state_dict(layer.state_dict())
    results = []
    for module in (layer, twin):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *module.parameters()])])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        # y and its gradient are rounded to bfloat16 (2^-8) on both sides, and may fall to either neighbour
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * b.abs().max().item())


def test_lazy_signs_are_seen(small):
    x = torch.complex(*draw((40, 6), (40, 6))).conj().imag
    assert x.is_neg()
    layer = Affine(6, 9)
    torch.testing.assert_close(layer(x), F.linear(x.resolve_neg(), layer.weight, layer.bias))
    grad = torch.complex(*draw((40, 9), (40, 9))).conj().imag
    (found,) = torch.autograd.grad(layer(x), [layer.weight], grad)
    torch.testing.assert_close(found, grad.resolve_neg().t() @ x.resolve_neg())


def test_the_default_device_is_not_asked(small):
    x, layer = draw((40, 6))[0], Affine(6, 9)
    expected = layer(x)
    with torch.device("meta"):
        assert_same_bits("under another default", layer(x), expected)


def test_only_what_is_needed_is_kept(small):
    x, layer = draw((40, 6))[0].requires_grad_(), Affine(6, 9)
    layer.weight.requires_grad_(False)
    y = layer(x)
    with torch.no_grad():
        x.zero_()
    y.sum().backward()
    assert layer.bias.grad.eq(40).all()
    layer.requires_grad_(True)
    y = layer(x.detach())
    with torch.no_grad():
        layer.weight.zero_()
    y.sum().backward()


def test_batches_of_gradients(small):
    x, layer = draw((40, 6))[0].requires_grad_(), Affine(6, 9)
    grads = draw((3, 40, 9))[0]
    found = torch.autograd.grad(layer(x), [x, layer.weight], grads, is_grads_batched=True)
    expected = [torch.autograd.grad(layer(x), [x, layer.weight], grad) for grad in grads]
    for a, b in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))


def test_what_else_is_in_the_batch_changes_no_bit(monkeypatch):
    layer, x = Affine(256, 512), draw((4, 2048, 256))[0]
    assert_same_bits("alone", layer(x[:1]), layer(x)[:1])
    # many rows in all, but short sequences: which bits torch's product gives a row is torch's affair
    assert calls_of(monkeypatch, lambda: layer(x[:, :700]))[0] == 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_torchs(small):
    layer, parts = Affine(6, 9), draw((40, 6), (30, 6))
    found = layer(torch.nested.nested_tensor(parts)).unbind()
    for y, part in zip(found, parts, strict=True):
        torch.testing.assert_close(y, layer(part))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_takes_inputs_of_both_dtypes(small, monkeypatch, dtype):
    layer, x = Affine(40, 24), draw((64, 40), dtype=dtype)[0]
    with torch.autocast("cpu", torch.bfloat16):
        count, y = calls_of(monkeypatch, lambda: layer(x))
    assert (count, y.dtype) == (1, torch.bfloat16)


def calls_of(monkeypatch, call):
    """How often our kernel runs in `call`."""
    seen = []

    def counted(*arguments, **options):
        seen.append(1)
        return product(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(op.kernels, "product", counted)
        result = call()
    return len(seen), result


def test_small_calls_and_odd_ones_are_torchs(monkeypatch):
    layer = Affine(256, 512)
    x = draw((2048, 256))[0]
    assert calls_of(monkeypatch, lambda: layer(x))[0] == 1
    assert calls_of(monkeypatch, lambda: layer(x[:100]))[0] == 0
    with torch.no_grad():
        count, _ = calls_of(monkeypatch, lambda: torch.func.vmap(layer)(x[None]))
        assert count == 0
        parameters = dict(layer.named_parameters())
        count, _ = calls_of(monkeypatch, lambda: torch.func.functional_call(layer, parameters, (x,)))
        assert count == 1
    count, _ = calls_of(monkeypatch, lambda: torch.func.grad(lambda x: layer(x).sum())(x))
    assert count == 0
    assert layer.to("meta")(x.to("meta")).shape == (2048, 512)


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (torch.zeros(2000, 5), torch.zeros(400, 6), None),
        (torch.zeros(2000, 5), torch.zeros(400, 5), torch.zeros(3)),
        (torch.zeros(2000, 5), torch.zeros(400, 5).double(), None),
        (torch.zeros(2000, 5).long(), torch.zeros(400, 5), None),
        (torch.zeros(2000, 5), torch.zeros(4, 400, 5), None),
    ],
    ids=["depth", "bias", "dtypes", "whole numbers", "three dimensions"],
)
def test_bad_arguments_get_torchs_words(small, x, weight, bias):
    with pytest.raises(RuntimeError) as theirs:
        F.linear(x, weight, bias)
    with pytest.raises(RuntimeError) as ours:
        op.affine(x, weight, bias)
    assert str(ours.value) == str(theirs.value)
