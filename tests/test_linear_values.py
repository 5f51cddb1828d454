"""The laws of linear attention: states, sums, scales, features and magnitudes."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longattn import LinearState, linear_attention, linear_attention_with_state
from longattn.features import RELU_EPSILON
from longattn.testing.assertions import assert_near, assert_same_bits, evaluate, run_linear
from longattn.testing.cases import LinearCase, build, draw, qkv, segments_of

NAN = float("nan")


# states


@settings(max_examples=25)
@given(st.data())
def test_splitting_and_carrying_the_state_equals_one_call(impl, device, data):
    L = data.draw(st.integers(2, 200))
    cuts = data.draw(st.lists(st.integers(0, L), min_size=1, max_size=4).map(sorted))
    options = {
        "feature_map": data.draw(st.sampled_from(["elu", "relu"])),
        "normalize": data.draw(st.booleans()),
        "is_causal": True,
        "enable_gqa": True,
        "impl": impl,
    }
    case = LinearCase(f"split {L}", B=2, H=1, L=L, D=5, E=7, groups=2, state=data.draw(st.booleans()))
    inputs = build(case, torch.float32, device)

    def in_parts(q, k, v, state):
        outputs = []
        for start, stop in pairwise([0, *cuts, L]):
            part = (x[:, :, start:stop] for x in (q, k, v))
            output, state = linear_attention_with_state(*part, state=state, **options)
            outputs.append(output)
        return torch.cat(outputs, 2), state

    with segments_of(64):
        whole = evaluate(inputs, lambda q, k, v, s: linear_attention_with_state(q, k, v, state=s, **options))
        parts = evaluate(inputs, in_parts)
    for name, x in whole.items():
        assert_near(parts[name], x)


def test_tokens_one_by_one_equal_one_call(impl, device):
    L = 4096 if impl == "cpu" else 512
    q, k, v = qkv(B=1, H=1, L=L, D=16, E=16, device=device)
    expected, end = linear_attention_with_state(q, k, v, is_causal=True, impl=impl)
    state, outputs = LinearState.zeros(1, 1, 16, 16, device=device), []
    for t in range(L):
        step = (x[:, :, t : t + 1] for x in (q, k, v))
        output, state = linear_attention_with_state(*step, state=state, is_causal=True, impl=impl)
        outputs.append(output)
    assert_near(torch.cat(outputs, 2), expected, 1e-5)
    assert_near(state.kv, end.kv, 1e-5)
    assert_near(state.k_sum, end.k_sum, 1e-5)


def test_batched_steps_of_many_heads_equal_one_call(impl, device):
    q, k, v = qkv(B=3, H=4, L=9, D=7, E=5, dtype=torch.bfloat16, device=device)
    expected = linear_attention(q, k, v, is_causal=True, impl=impl)
    state = None
    for t in range(9):
        step = (x[:, :, t : t + 1] for x in (q, k, v))
        output, state = linear_attention_with_state(*step, state=state, is_causal=True, impl=impl)
        assert_near(output, expected[:, :, t : t + 1], 1e-2)


def test_carrying_nothing_equals_carrying_zeros(impl, device):
    q, k, v = qkv(device=device)
    expected = linear_attention_with_state(q, k, v, is_causal=True, impl=impl)
    zeros = LinearState.zeros(2, 2, 8, 12, device=device)
    got = linear_attention_with_state(q, k, v, state=zeros, is_causal=True, impl=impl)
    assert_near(got.output, expected.output)
    assert_near(got.state.kv, expected.state.kv)


@pytest.mark.parametrize(("L", "S"), [(3, 10), (10, 3), (1, 8), (8, 1), (4, 0), (0, 4), (70, 200), (200, 70)])
def test_causal_calls_with_a_state_align_the_last_query_with_the_last_key(L, S, impl, device):
    case = LinearCase("aligned", L=L, S=S, D=6, E=5, is_causal=True, state=True, mask="random", groups=2)
    inputs = build(case, torch.float32, device).clean()
    actual = run_linear(inputs, impl)

    def by_definition(q, k, v, state):
        # query i is at position i + S - L among the keys
        phi_q, phi_k = (torch.nn.functional.elu(x) + 1 for x in (q, k.repeat_interleave(2, 1)))
        seen = torch.arange(S, device=device) <= torch.arange(L, device=device)[:, None] + S - L
        keep = ~inputs.options["key_padding_mask"]
        w = (phi_q @ phi_k.mT) * (seen & keep[:, None, None])
        kv, k_sum = (x.repeat_interleave(2, 1) for x in state)
        z = w.sum(-1) + torch.einsum("bhld,bhd->bhl", phi_q, k_sum)
        output = (w @ v.repeat_interleave(2, 1) + phi_q @ kv) / z[..., None]
        phi_k = (torch.nn.functional.elu(k) + 1) * keep[:, None, :, None]
        return output, LinearState(state.kv + phi_k.mT @ v, state.k_sum + phi_k.sum(2))

    doubles = inputs._replace(grad_state=LinearState(*(x.double() for x in inputs.grad_state)))
    doubles = doubles._replace(**{n: getattr(inputs, n).double() for n in ("q", "k", "v", "grad_output")})
    expected = evaluate(doubles._replace(state=LinearState(*(x.double() for x in inputs.state))), by_definition)
    for name, x in expected.items():
        if x.count_nonzero() == 0:
            assert actual[name].count_nonzero() == 0
        else:
            assert_near(actual[name], x)


# sums


def test_a_million_float16_ones_sum_right(kernel, device):
    L = 1_000_000
    ones = torch.ones(1, 1, L, 2, dtype=torch.float16, device=device)
    output, state = linear_attention_with_state(ones, ones, ones, is_causal=True, impl=kernel)
    # phi(1) = 2: every weight is 8, the normaliser of the last query is 8 million
    assert (output == 1).all()
    assert (state.kv == 2 * L).all()
    assert (state.k_sum == 2 * L).all()
    count = torch.arange(1, L + 1, device=device, dtype=torch.float64)
    output = linear_attention(ones, ones, ones, is_causal=True, normalize=False, scale=1 / 1024, impl=kernel)
    expected = count * 8 / 1024
    assert ((output[0, 0, :, 0].double() - expected).abs() <= expected * 2**-11 + 2**-25).all()
    output = linear_attention(ones[:, :, :3], ones, ones, normalize=False, scale=1 / 1024, impl=kernel)
    assert (output == L * 8 / 1024).all()


def test_relative_error_grows_no_faster_than_the_root_of_the_length(kernel):
    if kernel != "cpu":
        pytest.skip("the yardstick is the float64 kernel, which the CPU has")
    errors = {}
    for L in (1024, 16_384, 262_144):
        q, k, v = qkv(B=1, H=1, L=L, D=16, E=16)
        exact = linear_attention(*(x.double() for x in (q, k, v)), is_causal=True, impl="cpu")[:, :, -512:]
        last = linear_attention(q, k, v, is_causal=True, impl="cpu")[:, :, -512:]
        errors[L] = ((last - exact).norm() / exact.norm()).item()
    assert errors[1024] > 0
    for L, error in errors.items():
        assert error <= 2 * math.sqrt(L / 1024) * errors[1024], errors


# heads, scale, denominators


def test_shared_keys_equal_repeated_keys(impl, device):
    case = LinearCase("GQA", H=2, L=70, groups=3, is_causal=True, mask="random")
    inputs = build(case, torch.float32, device).clean()
    shared = run_linear(inputs, impl)
    wide = inputs._replace(k=inputs.k.repeat_interleave(3, 1), v=inputs.v.repeat_interleave(3, 1))
    third = LinearState(*(x.repeat_interleave(3, 1) / 3 for x in inputs.grad_state))
    repeated = run_linear(wide._replace(grad_state=third), impl)
    assert_near(shared["output"], repeated["output"])
    assert_near(shared["dq"], repeated["dq"])
    for name in ("dk", "dv"):
        assert_near(shared[name], repeated[name].unflatten(1, (2, 3)).sum(2))
    for name in ("kv", "k_sum"):
        assert_near(shared[name], repeated[name][:, ::3])


@pytest.mark.parametrize("is_causal", [False, True])
def test_scale_multiplies_the_numerator_and_cancels_in_the_quotient(is_causal, impl, device):
    q, k, v = qkv(device=device)
    plain, scaled = (
        linear_attention(q, k, v, normalize=False, scale=s, is_causal=is_causal, impl=impl) for s in (None, -0.25)
    )
    assert_same_bits("numerator", scaled, plain * -0.25)
    plain, scaled = (linear_attention(q, k, v, scale=s, is_causal=is_causal, impl=impl) for s in (None, -0.25))
    assert_near(scaled, plain)


@pytest.mark.parametrize("is_causal", [False, True])
def test_zero_denominators_give_zero_with_zero_gradient(is_causal, impl, device):
    inputs = build(LinearCase("zero", B=1, L=70, D=4, E=3, feature="identity"), torch.float32, device)
    inputs = inputs._replace(options={**inputs.options, "is_causal": is_causal})
    zeros = [0, 3, 64, 69]
    inputs.q[:, :, zeros] = 0
    results = run_linear(inputs, impl)
    # dq itself is not 0 in the limit, but the op says: where z is 0 the output is 0 whatever q does
    for name in ("output", "dq"):
        assert results[name][:, :, zeros].count_nonzero() == 0
        others = [i for i in range(70) if i not in zeros]
        assert (results[name][:, :, others] != 0).any(-1).all()
    assert all(x.isfinite().all() for x in results.values())


def test_no_keys_give_zero_or_what_the_state_holds(impl, device):
    q, k, v = qkv(S=0, device=device)
    assert linear_attention(q, k, v, impl=impl).count_nonzero() == 0
    _, state = linear_attention_with_state(*qkv(L=30, seed=1, device=device), impl=impl)
    got = linear_attention_with_state(q, k, v, state=state, impl=impl)
    phi = torch.nn.functional.elu(q) + 1
    assert_near(got.output, phi @ state.kv / (phi * state.k_sum[:, :, None]).sum(-1, keepdim=True))
    assert_same_bits("kv", got.state.kv, state.kv)


# features


@pytest.mark.parametrize("name", ["elu", "relu"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_callable_feature_map_equals_the_fused_one(is_causal, name, impl, device):
    function = {"elu": lambda x: torch.nn.functional.elu(x) + 1, "relu": lambda x: x.relu() + RELU_EPSILON}[name]
    inputs = build(LinearCase("callable", L=70, mask="random", is_causal=is_causal, state=True), torch.float32, device)
    fused, called = (
        run_linear(inputs.clean()._replace(options={**inputs.options, "feature_map": feature}), impl)
        for feature in (name, function)
    )
    for key, x in fused.items():
        assert_near(called[key], x)


def test_a_callable_feature_map_may_change_the_number_of_features(impl, device):
    q, k, v = qkv(L=50, D=3, device=device)
    weight = draw((3, 20), seed=5, device=device)[0].requires_grad_()

    def exponentials(x):
        return torch.exp(x @ weight / 4)

    output, state = linear_attention_with_state(q, k, v, feature_map=exponentials, is_causal=True, impl=impl)
    assert state.kv.shape == (2, 2, 20, 12)
    scores = (exponentials(q.double().float()) @ exponentials(k).mT).tril()
    expected = scores @ v / scores.sum(-1, keepdim=True)
    assert_near(output, expected)
    grads = [torch.autograd.grad(x.square().sum(), weight)[0] for x in (output, expected)]
    assert_near(*grads)


def test_nan_in_padded_keys_does_not_pass_a_callable_feature_map(impl, device):
    inputs = build(LinearCase("callable, masked", L=70, mask="random"), torch.float32, device)
    options = {**inputs.options, "feature_map": lambda x: torch.exp(x / 4)}
    hostile, clean = (run_linear(x._replace(options=options), impl) for x in (inputs, inputs.clean()))
    for name, x in clean.items():
        assert x.isfinite().all()
        assert_same_bits(name, hostile[name], x)


def test_elu_of_extreme_values(impl, device):
    x = torch.linspace(-1000, 1000, 81, device=device)[:, None]
    one = torch.ones(81, 1, device=device)
    q, k, v = (t[None, None].clone().requires_grad_() for t in (one, x, one))
    state = linear_attention_with_state(q, k, v, impl=impl).state
    _, each = linear_attention_with_state(
        torch.zeros(81, 1, 0, 1, device=device), x[:, None, None], one[:, None, None], impl=impl
    )
    phi = torch.where(x > 0, x + 1, x.double().exp())
    assert (each.k_sum[:, 0].double() - phi).abs().le(phi * 3e-7 + 1e-44).all()
    assert state.k_sum.isfinite().all()
    (dk,) = torch.autograd.grad(state.k_sum.sum(), k)
    slope = torch.where(x > 0, 1, x.double().exp())
    assert (dk[0, 0].double() - slope).abs().le(slope * 3e-7 + 1e-44).all()


def test_every_exponential_is_within_two_ulps(impl, device):
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 18,), generator=g).to(torch.int32).view(torch.float32)
    # all magnitudes, and those where exp is neither 0 nor 1
    x = torch.cat([bits, torch.rand(1 << 18, generator=g) * -110]).nan_to_num(0.0, 0.0, 0.0).to(device)
    ones = torch.ones(64, 32, 1, 1, device=device)
    q = torch.ones(64, 32, 0, 256, device=device)
    state = linear_attention_with_state(q, x.view(64, 32, 1, 256), ones, impl=impl).state
    phi = torch.where(x > 0, x.double() + 1, x.double().exp())
    error = (state.k_sum.flatten().double() - phi).abs()
    assert (error <= phi * 2 * torch.finfo(torch.float32).eps + 2.0**-149).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_value_is_read_and_rounded_as_torch_does(dtype, impl, device):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device)
    values = bits.view(dtype).view(64, 4, 1, 256)
    one = torch.ones(64, 4, 1, 1, dtype=dtype, device=device)
    options = {"feature_map": "identity", "normalize": False, "is_causal": True, "impl": impl}
    assert_same_bits("a value", linear_attention(one, one, values, **options), values)
    # keys of all magnitudes: products that over- and underflow the dtype, and every kind of tie
    keys = bits.view(dtype)[torch.randperm(2**16, generator=torch.Generator().manual_seed(0)).to(device)[:256]]
    keys = keys.nan_to_num(1.0, 1.0, 1.0).view(64, 4, 1, 1)
    expected = (values.float() * keys.float()).to(dtype)
    assert_same_bits("a product", linear_attention(one, keys, values, **options), expected)


def test_relu_keeps_nan(impl, device):
    q, k, v = qkv(B=1, H=1, L=70, device=device)
    k[:, :, 66] = NAN
    output = linear_attention(q, k, v, feature_map="relu", is_causal=True, impl=impl)
    assert output[:, :, 66:].isnan().all()


def test_nan_in_one_query_stays_in_its_row(impl, device):
    for feature in ("elu", "relu", "identity"):
        q, k, v = (x.abs() for x in qkv(L=100, device=device))
        expected = linear_attention(q, k, v, feature_map=feature, is_causal=True, impl=impl)
        q[0, 1, 37, 2] = NAN
        output = linear_attention(q, k, v, feature_map=feature, is_causal=True, impl=impl)
        assert output[0, 1, 37].isnan().all()
        output[0, 1, 37] = expected[0, 1, 37]
        assert_same_bits(feature, output, expected)


# magnitudes


def test_large_bfloat16_stays_finite(impl, device):
    for feature in ("elu", "relu", "identity"):
        q, k, v = (torch.full((1, 1, 70, 16), 133120.0, dtype=torch.bfloat16, device=device) for _ in range(3))
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        output, state = linear_attention_with_state(q, k, v, feature_map=feature, is_causal=True, impl=impl)
        assert_same_bits(feature, output, torch.full_like(output, 133120.0))
        assert state.kv.isfinite().all()
        for grad in torch.autograd.grad(output.sum(), (q, k, v)):
            assert grad.isfinite().all()


def test_large_float16_stays_finite(impl, device):
    q, k, v = (torch.full((1, 1, 70, 16), 60000.0, dtype=torch.float16, device=device) for _ in range(3))
    output = linear_attention(q, k, v, is_causal=True, impl=impl)
    assert_same_bits("output", output, v)


def test_subnormal_inputs_are_not_flushed(impl, device):
    if device == "cuda":
        pytest.skip("a promise of the CPU")
    q, k, v = qkv(L=66, device=device)
    v = v * 1e-39
    output, state = linear_attention_with_state(q, k, v, is_causal=True, impl=impl)
    exact = linear_attention(q.double(), k.double(), v.double(), is_causal=True, impl="reference")
    smallest = 2.0**-149
    assert exact.abs().max() < torch.finfo(torch.float32).tiny
    assert (output.double() - exact).abs().max() <= 200 * smallest
    assert state.kv.count_nonzero() > 0
    tiny = torch.full((1, 1, 1, 1), 1e-40)
    output = linear_attention(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), tiny, feature_map="identity", impl=impl)
    assert_same_bits("a subnormal value", output, tiny)


def test_one_tensor_as_query_key_and_value_gets_the_summed_gradient(impl, device):
    x, w = draw((2, 2, 70, 8), (2, 2, 70, 8), device=device)
    x.requires_grad_()
    apart = [x.detach().clone().requires_grad_() for _ in range(3)]
    (together,) = torch.autograd.grad(linear_attention(x, x, x, is_causal=True, impl=impl), x, w)
    grads = torch.autograd.grad(linear_attention(*apart, is_causal=True, impl=impl), apart, w)
    torch.testing.assert_close(together, sum(grads))
