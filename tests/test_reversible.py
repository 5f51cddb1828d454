"""The sum of a reversible layer on every engine: the formula, exact inverses, ranges, layouts, autograd, compile."""

import itertools

import pytest
import torch
from conftest import _parameter
from hypothesis import given
from hypothesis import strategies as st

import longattn
from longattn import reversible_add
from longattn.ops import _dispatch
from longattn.reference import reversible as reference
from longattn.testing.assertions import assert_same_bits
from longattn.testing.cases import draw

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = ((0,), (1,), (7,), (3, 100), (2, 5, 63), (40001,))
GPU = torch.cuda.is_available()
ENGINES = [_parameter(impl) for impl in ("cpu", "triton", "cuda") if impl == "cpu" or GPU]


@pytest.fixture(params=ENGINES)
def engine(request):
    return request.param


@pytest.fixture
def device(engine):
    return "cpu" if engine == "cpu" else "cuda"


@pytest.mark.parametrize("grid", [None, 2**-13, 0.5], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_engine_has_the_bits_of_the_formula(engine, device, dtype, grid):
    if dtype == torch.float64 and engine != "cpu":
        pytest.skip("float64 runs on cpu and reference only")
    grid = 0.25 if grid == 2**-13 and dtype in (torch.bfloat16, torch.float16) else grid
    for shape, other, subtract in itertools.product(SIZES, DTYPES[: 4 if engine == "cpu" else 1], (False, True)):
        x, f = draw(shape, shape, device=device)
        x, f = x.to(dtype), (3 * f).to(other)
        expected = reversible_add(x, f, grid=grid, subtract=subtract, impl="reference")
        found = reversible_add(x, f, grid=grid, subtract=subtract, impl=engine)
        assert_same_bits("sum", found, expected)
        assert reversible_add(x, f, grid=grid, subtract=subtract, impl=engine, inplace=True) is x
        assert_same_bits("in place", x, expected)


def test_the_reference_is_the_formula():
    x, f = torch.tensor([1.0, 2.0, -3.0, 0.5]), torch.tensor([0.25, 0.75, -1.25, 0.3])
    # multiples of a half, halves of it to even: 0, 1, -1, 0.5
    assert reversible_add(x, f, grid=0.5, impl="reference").tolist() == [1.0, 3.0, -4.0, 1.0]
    assert reversible_add(x, f, grid=0.5, subtract=True, impl="reference").tolist() == [1.0, 1.0, -2.0, 0.0]
    assert_same_bits("plain", reversible_add(x, f, impl="reference"), x + f)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_on_the_grid_the_inverse_is_exact(impl_or_engine, dtype):
    """A walk of a hundred steps, there and back, up to the very edge of the range."""
    grid = 2.0**-13
    x = reversible_add(torch.zeros(1000, dtype=dtype), draw((1000,), dtype=dtype)[0], grid=grid, impl=impl_or_engine)
    start, steps = x.clone(), [10 * f for f in draw(*[(1000,)] * 100, seed=1, dtype=dtype)]
    for f in steps:
        reversible_add(x, f, grid=grid, inplace=True, impl=impl_or_engine)
    assert (x != start).any()
    for f in reversed(steps):
        reversible_add(x, f, grid=grid, inplace=True, subtract=True, impl=impl_or_engine)
    assert torch.equal(x.view(torch.uint8), start.view(torch.uint8))


@pytest.fixture(params=["reference", _parameter("cpu")])
def impl_or_engine(request):
    return request.param


@given(
    x=st.integers(-(2**24) + 1, 2**24 - 1),
    f=st.floats(-(2.0**24), 2.0**24, width=32),
    power=st.integers(-20, 20),
)
def test_any_two_sums_that_stay_in_range_are_exact(x, f, power):
    impl, grid = "reference" if _dispatch.missing("cpu") else "cpu", 2.0**power
    before, branch = torch.tensor([x * grid]), torch.tensor([f * grid])
    try:
        y = reversible_add(before, branch, grid=grid, impl=impl)
    except OverflowError:
        assert abs(x + round(f)) >= 2**24
        return
    assert y.item() == (x + round(f)) * grid
    assert reversible_add(y, branch, grid=grid, subtract=True, impl=impl).item() == before.item()


def test_a_sum_out_of_range_is_raised_with_the_remedy(impl_or_engine):
    x = torch.zeros(40001)
    x[33333] = 2.0**11 - 2**-13
    reversible_add(x, torch.zeros(40001), grid=2**-13, impl=impl_or_engine)
    with pytest.raises(OverflowError, match=r"reached 2048 = grid \* 2\^24.*coarser grid than 2\*\*-13"):
        reversible_add(x, torch.full_like(x, 2**-13), grid=2**-13, impl=impl_or_engine)
    with pytest.raises(OverflowError):
        reversible_add(x, torch.full_like(x, torch.inf), grid=2**-13, impl=impl_or_engine)
    # without a grid there is nothing to leave
    assert reversible_add(x, torch.full_like(x, 1e30), impl=impl_or_engine).isfinite().all()


def test_nan_stays_where_it_is(impl_or_engine):
    x, f = torch.ones(100), torch.ones(100)
    f[41] = torch.nan
    found = reversible_add(x, f, grid=2**-13, impl=impl_or_engine)
    assert found.isnan().nonzero().tolist() == [[41]]


@pytest.mark.parametrize("inplace", [False, True])
def test_any_strides(engine, device, inplace):
    for layout in ("transposed", "sliced", "strided"):
        x, f = draw((6, 40, 10), (6, 40, 10), device=device)
        lay = {"transposed": lambda y: y.mT.contiguous().mT, "sliced": lambda y: torch.cat([y, y], -1)[..., :10],
               "strided": lambda y: torch.repeat_interleave(y, 2, 1)[:, ::2]}[layout]  # fmt: skip
        expected = reference.reversible_add(x, f, 2**-13, subtract=False)
        for a, b in ((lay(x), f), (x, lay(f)), (lay(x), lay(f))):
            a = lay(a.clone()) if a is not x else a.clone()
            found = reversible_add(a, b, grid=2**-13, impl=engine, inplace=inplace)
            assert_same_bits(layout, found, expected)
            if inplace:
                assert found is a
    f = draw((1, 10), device=device)[0].expand(6, 10)
    assert_same_bits("expanded", reversible_add(torch.ones_like(f), f, impl=engine), 1 + f)


def test_a_sum_in_place_reads_nothing_that_it_has_written(impl_or_engine):
    def add(x, f):
        return reversible_add(x, f, inplace=True, impl=impl_or_engine)

    a = draw((30,))[0]
    for x, f in ((a[:20], a[5:25]), (a[5:25], a[:20]), (a[:10], a.view(torch.bfloat16)[:10])):
        with pytest.raises(ValueError, match=r"^reversible_add: inplace=True .* part of whose memory f lies"):
            add(x, f)
    for x in (a[:1].expand(4), a.as_strided((5, 4), (2, 1)), a.unfold(0, 3, 2)):
        with pytest.raises(ValueError, match=r"^reversible_add: inplace=True .* elements share memory"):
            add(x, torch.ones(x.shape))
    # x itself, and neighbours in one memory
    for x, f in (
        (a, a),
        (a[:15], a[15:]),
        (a.view(5, 6)[:, :3], a.view(5, 6)[:, 3:]),
        (a[::2], a[1::2]),
        (a[:0], a[:0]),
    ):
        expected = x + f
        assert_same_bits("sum", add(x, f), expected)


@pytest.mark.parametrize("subtract", [False, True])
def test_the_gradient_is_the_identity(impl_or_engine, subtract):
    x, f, grad = draw((3, 5), (3, 5), (3, 5))
    x, f = x.requires_grad_(), f.bfloat16().requires_grad_()
    found = torch.autograd.grad(reversible_add(x, f, grid=0.25, subtract=subtract, impl=impl_or_engine), [x, f], grad)
    assert_same_bits("dx", found[0], grad)
    assert_same_bits("df", found[1], (-grad if subtract else grad).bfloat16())


def test_gradcheck_and_the_second_derivative():
    x, f = (y.requires_grad_() for y in draw((2, 3), (2, 3), dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda a, b: reversible_add(a, b), [x, f])
    assert torch.autograd.gradgradcheck(lambda a, b: reversible_add(a, b, subtract=True).square(), [x, f])


def test_the_number_of_threads_changes_no_bit(impl_or_engine):
    x, f = draw((300_001,), (300_001,))
    one = reversible_add(x, f, grid=2**-13, impl=impl_or_engine)
    torch.set_num_threads(3)
    assert_same_bits("three threads", reversible_add(x, f, grid=2**-13, impl=impl_or_engine), one)


def test_opcheck(engine, device):
    x, f = draw((3, 5), (3, 5), device=device)
    for op in (torch.ops.longattn._reversible_add, torch.ops.longattn._reversible_add_):
        torch.library.opcheck(op.default, (x.clone(), f, 2**-13, False, engine))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole(impl_or_engine):
    def function(x, f):
        y = reversible_add(x, f.relu(), grid=2**-13, impl=impl_or_engine)
        return reversible_add(y, f, subtract=True, impl=impl_or_engine).square()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 9):
        results = []
        for call in (function, compiled):
            x, f = (y.requires_grad_() for y in draw((n, 3), (n, 3)))
            y = call(x, f)
            results.append((y.detach(), *torch.autograd.grad(y.sum(), [x, f])))
        for a, b in zip(*results, strict=True):
            assert_same_bits("compiled", b, a)


def test_explain_says_which_engine():
    x = torch.ones(3)
    explanation = longattn.explain(reversible_add, x, x)
    assert explanation.reasons["reference"] is None
    assert explanation.reasons["cuda"] is not None or GPU
    assert explanation.chosen == ("cpu" if explanation.reasons["cpu"] is None else "reference")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "sentence"),
    [
        ((3, torch.ones(2)), {}, TypeError, "x must be a float32, .* got int 3"),
        ((torch.ones(2, dtype=torch.int64), torch.ones(2)), {}, TypeError, "x must be a float32"),
        ((torch.ones(2), torch.ones(1)), {}, ValueError, "nothing is broadcast"),
        ((torch.ones(2), torch.ones(2)), {"grid": 0.3}, ValueError, "grid must be a power of two"),
        ((torch.ones(2), torch.ones(2)), {"grid": -0.5}, ValueError, "grid must be a power of two"),
        ((torch.ones(2), torch.ones(2)), {"grid": torch.inf}, ValueError, "grid must be a power of two"),
        ((torch.ones(2).half(), torch.ones(2)), {"grid": 64.0}, ValueError, "leaves torch.float16 no room"),
        ((torch.ones(2), torch.ones(2, requires_grad=True)), {"inplace": True}, ValueError, "outside autograd"),
        ((torch.ones(2), torch.ones(2)), {"impl": "gpu"}, ValueError, "impl must be"),
    ],
)
def test_errors_are_sentences(arguments, options, error, sentence):
    with pytest.raises(error, match=f"^reversible_add: .*{sentence}"):
        reversible_add(*arguments, **options)
