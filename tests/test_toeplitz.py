"""Linear attention with relative positions: the definition, every method and engine against it, laws of a bias."""

import math
from itertools import pairwise

import pytest
import torch
from _toeplitz import every_way, modes, named

from longattn import Favor, linear_attention
from longattn.testing.assertions import assert_near, assert_same_bits
from longattn.testing.cases import qkv
from longattn.testing.toeplitz import (
    BY_NAME,
    TOEPLITZ,
    ToeplitzCase,
    build_toeplitz,
    check_toeplitz,
    fft_bound,
    oracle,
    run_toeplitz,
)

INF = float("inf")


# the oracle, and everything against it


def by_hand(inputs):
    """The definition, one query and one key at a time, in Python floats; the map is elu(x) + 1."""
    q, k, v, bias, o, _ = inputs
    (B, Hq, L, D), (_, H, S, E) = q.shape, v.shape
    cu = [0, L] if o["cu_seqlens"] is None else o["cu_seqlens"].tolist()
    which = [next((n for n, (a, b) in enumerate(pairwise(cu)) if a <= i < b), 0) for i in range(max(L, S))]
    mask, output = o["key_padding_mask"], torch.zeros(B, Hq, L, E, dtype=q.dtype)
    reach = bias.shape[-1] // 2
    bias = bias.expand(Hq, -1).tolist()

    def phi(x):
        return x + 1 if x > 0 else math.exp(x)

    for b, h, i in torch.cartesian_prod(*map(torch.arange, (B, Hq, L))).tolist():
        shared, numerator, z = h // (Hq // H), [0.0] * E, 0.0
        for j in range(S):
            t = j - i
            if (o["is_causal"] and t > 0) or (mask is not None and mask[b, j]) or which[i] != which[j]:
                continue
            c = math.exp(bias[h][max(-reach, min(t, reach)) + reach])
            w = c * sum(phi(q[b, h, i, d].item()) * phi(k[b, shared, j, d].item()) for d in range(D))
            z += w
            numerator = [n + w * v[b, shared, j, e].item() for e, n in enumerate(numerator)]
        output[b, h, i] = torch.tensor([n / z if z else 0.0 for n in numerator], dtype=q.dtype)
    return output


BY_HAND = (
    ToeplitzCase("by hand, clipped", H=1, L=4, S=5, D=2, E=2, mask="random", groups=2, reach=2),
    ToeplitzCase("by hand, causal", L=5, D=2, E=3, mask="random", is_causal=True, reach=1, holes=True),
    ToeplitzCase("by hand, every offset", L=5, S=3, D=2, E=1, reach=4, shared=True),
    ToeplitzCase("by hand, packed", B=1, L=6, D=2, E=2, lengths=(2, 0, 3, 1), is_causal=True, reach=9),
    ToeplitzCase("by hand, packed, not causal", B=1, L=5, D=2, E=2, lengths=(2, 0, 3), mask="random", reach=1),
)


@pytest.mark.parametrize("case", named(BY_HAND))
def test_the_reference_is_the_definition(case):
    inputs = build_toeplitz(case, torch.float64).double()
    output = run_toeplitz(inputs, "reference")["output"]
    torch.testing.assert_close(output, by_hand(inputs), rtol=1e-12, atol=1e-13)


def test_the_table_reaches_every_option():
    assert len(BY_NAME) == len(TOEPLITZ)
    for name in ("feature", "is_causal", "normalize", "shared", "holes"):
        assert len({getattr(case, name) for case in TOEPLITZ}) > 1, name
    assert {case.mask for case in TOEPLITZ} == {"", "tail", "random", "one row", "all"}
    assert any(case.lengths and case.groups > 1 and case.mask and case.favor for case in TOEPLITZ)


@pytest.mark.parametrize("case", named(TOEPLITZ))
def test_errors_stay_within_the_budget(case, kernel, device):
    check_toeplitz(case, torch.float32, kernel, "prefix", device)


# elsewhere they are the same call
@pytest.mark.parametrize("case", named(case for case in TOEPLITZ if case.reach < case.L - 1)[::2])
def test_errors_of_tiles_stay_within_the_budget(case, kernel, device):
    check_toeplitz(case, torch.float32, kernel, "tiles", device)


# each dtype meets a sixth of the short cases
TURNS = [(case, dtype) for turn, dtype in enumerate((torch.bfloat16, torch.float16, torch.float64))
         for case in [case for case in TOEPLITZ if case.L < 1000][turn::6]]  # fmt: skip


@pytest.mark.parametrize(("case", "dtype"), TURNS, ids=lambda x: getattr(x, "name", str(x)))
def test_errors_in_other_dtypes_stay_within_the_budget(case, dtype, kernel, device):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("float64 runs on cpu and reference only")
    check_toeplitz(case, dtype, kernel, "prefix", device)


@pytest.mark.parametrize("case", named(TOEPLITZ[::6]))
def test_errors_of_the_reference_stay_within_the_budget(case):
    check_toeplitz(case, torch.float32, "reference", "auto")


@pytest.mark.parametrize("case", named(TOEPLITZ[::2]))
def test_the_fft_stays_within_its_bound(case, kernel, device):
    inputs = build_toeplitz(case, torch.float32, device)
    actual = run_toeplitz(inputs, kernel, "fft")
    if case.sees_nothing or 0 in inputs.q.shape:
        assert all((x == 0).all() for x in actual.values())
        return
    expected = oracle(case, torch.float32)
    error = (actual["output"].double().cpu() - expected["output"]).abs()
    assert (error <= fft_bound(inputs).cpu()).all()
    # gradients are sums over rows of very different bounds
    for name, x in expected.items():
        assert (actual[name].double().cpu() - x).abs().max() <= 1e-4 * max(x.abs().max(), 1), name


PLAIN = ("causal, L=63, reach 1", "full, L=50 S=210", "dims 3 and 1", "causal, holes", "causal, packed with everything")


@pytest.mark.parametrize("case", named(BY_NAME[name] for name in PLAIN))
def test_the_fft_in_float64_is_the_same_function(case, kernel, device):
    if device == "cuda":
        pytest.skip("float64 runs on cpu and reference only")
    inputs = build_toeplitz(case, torch.float64)
    actual = run_toeplitz(inputs, kernel, "fft")
    for name, x in run_toeplitz(inputs.double(), "reference").items():
        assert (actual[name] - x).abs().max() <= 1e-11 * (1 + x.abs().max()), name


# laws of the bias


@every_way
@modes
def test_the_gradient_of_a_bias_sums_to_zero(is_causal, way):
    case = ToeplitzCase("sum of gradients", L=150, H=3, is_causal=is_causal, reach=31, mask="random")
    dbias = run_toeplitz(build_toeplitz(case, torch.float32, way.device), *way)["dbias"]
    assert dbias.sum(-1).abs().max() <= 1e-4 * dbias.abs().sum(-1).min()
    # offsets that no pair of a causal call has
    assert not is_causal or dbias[:, 32:].count_nonzero() == 0


@every_way
def test_a_constant_added_to_a_bias_changes_nothing(way):
    inputs = build_toeplitz(BY_NAME["causal, L=130, reach 40"], torch.float32, way.device)
    more = inputs._replace(bias=inputs.bias + torch.tensor([[40.0], [-200.0]], device=way.device))
    for name, x in run_toeplitz(inputs, *way).items():
        assert_near(run_toeplitz(more, *way)[name], x, 1e-3 if way.method == "fft" else 1e-4)


@every_way
@modes
@pytest.mark.parametrize("favor", [False, True])
def test_no_bias_is_linear_attention(favor, is_causal, way):
    q, k, v = qkv(L=100, device=way.device)
    options = {"is_causal": is_causal, "impl": way.impl, "feature_map": "elu"}
    if favor:
        options["feature_map"] = Favor(8, 32, normalize="l2", temperature=0.5, device=way.device)
    for reach in (0, 30, 99):
        bias = torch.zeros(2, 2 * reach + 1, device=way.device)
        output = linear_attention(q, k, v, rpe_bias=bias, rpe_method=way.method, **options)
        assert_near(output, linear_attention(q, k, v, **options), 1e-4)


@every_way
@pytest.mark.parametrize("t", [-70, -64, -1, 0, 3, 65])
def test_one_offset_alone_shifts_the_values(t, way):
    q, k, v = qkv(L=130, device=way.device)
    bias = torch.full((2, 201), -INF, device=way.device)
    bias[:, t + 100] = 0.7
    output = linear_attention(q, k, v, rpe_bias=bias, **way.options)
    expected = torch.zeros_like(v)
    rows = slice(max(-t, 0), 130 - max(t, 0))
    expected[:, :, rows] = v[:, :, rows.start + t : rows.stop + t]
    assert_near(output, expected, 1e-5)
    assert output.isfinite().all()


@every_way
@modes
def test_a_clipped_bias_agrees_with_its_long_form(is_causal, way):
    case = ToeplitzCase("clipped", L=150, is_causal=is_causal, reach=12)
    inputs = build_toeplitz(case, torch.float32, way.device)
    short = run_toeplitz(inputs, *way)
    left, right = (inputs.bias[:, [n]].expand(-1, 170) for n in (0, -1))
    long = run_toeplitz(inputs._replace(bias=torch.cat([left, inputs.bias, right], 1)), *way)
    tolerance = 1e-4 if way.method == "fft" else 2e-5
    for name in ("output", "dq", "dk", "dv"):
        assert_near(long[name], short[name], tolerance)
    # what is beyond the clipped form adds up in its ends
    d = long["dbias"]
    folded = torch.cat([d[:, :171].sum(1, True), d[:, 171:194], d[:, 194:].sum(1, True)], 1)
    assert_near(folded, short["dbias"], tolerance)


@every_way
def test_a_bias_longer_than_the_sequence_is_read_around_its_centre(way):
    inputs = build_toeplitz(ToeplitzCase("long bias", L=50, reach=90), torch.float32, way.device)
    centre = inputs._replace(bias=inputs.bias[:, 41:140])
    results = [run_toeplitz(x, *way) for x in (inputs, centre)]
    for name in ("output", "dq", "dk", "dv"):
        assert_near(results[0][name], results[1][name], 1e-4)
    assert_near(results[0]["dbias"][:, 41:140], results[1]["dbias"], 1e-4)
    assert results[0]["dbias"][:, :41].count_nonzero() == results[0]["dbias"][:, 140:].count_nonzero() == 0


@every_way
def test_a_bias_of_half_precision_or_strange_strides_is_its_copy(way):
    inputs = build_toeplitz(BY_NAME["causal, L=64, reach 17"], torch.float32, way.device)
    half = inputs.bias.bfloat16()
    strange = half.mT.contiguous().mT.requires_grad_()
    tensors = inputs.plain()[:3]
    names = {**way.options, **inputs.options}
    output = linear_attention(*tensors, rpe_bias=strange, **names)
    assert_same_bits("output", output, linear_attention(*tensors, rpe_bias=half.float(), **names))
    (grad,) = torch.autograd.grad(output.sum(), strange)
    assert grad.dtype == torch.bfloat16


@every_way
@modes
def test_factors_far_apart_make_no_nan(is_causal, way):
    case = ToeplitzCase("far apart", L=100, is_causal=is_causal, reach=20, spread=300.0)
    for name, x in run_toeplitz(build_toeplitz(case, torch.float32, way.device), *way).items():
        assert x.isfinite().all(), name


@every_way
def test_a_head_that_hides_every_offset_gives_zero(way):
    inputs = build_toeplitz(BY_NAME["full, L=65, reach 64"], torch.float32, way.device)
    bias = inputs.bias.clone()
    bias[1] = -INF
    results = run_toeplitz(inputs._replace(bias=bias), *way)
    for name in ("output", "dq", "dk", "dv"):
        assert results[name][:, 1].count_nonzero() == 0
        assert results[name][:, 0].count_nonzero() > 0
    assert results["dbias"][1].count_nonzero() == 0
