"""The laws of linear attention: what each row may depend on. What every case must satisfy is in test_ops.py."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longattn import LinearState, linear_attention, linear_attention_with_state
from longattn.features import RELU_EPSILON
from longattn.testing.assertions import assert_near, assert_same_bits, run_linear
from longattn.testing.cases import LINEAR, LinearCase, build, qkv, segments_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")


# the oracle itself


def by_hand(q, k, v, state, o):
    """The definition, one query and one key at a time, in Python floats."""
    phi = {
        "elu": lambda x: x + 1 if x > 0 else math.exp(x),
        "relu": lambda x: max(x, 0) + RELU_EPSILON,
        "identity": lambda x: x,
    }[o["feature_map"]]
    (B, Hq, L, D), (_, H, S, E) = q.shape, v.shape
    cu = [0, L] if o["cu_seqlens"] is None else o["cu_seqlens"].tolist()
    which = [next((n for n, (a, b) in enumerate(pairwise(cu)) if a <= i < b), 0) for i in range(max(L, S))]
    mask, output = o["key_padding_mask"], torch.zeros(B, Hq, L, E, dtype=q.dtype)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (B, Hq, L))).tolist():
        shared, numerator, z = h // (Hq // H), [0.0] * E, 0.0
        for j in range(S):
            causal = not o["is_causal"] or j <= i
            same = o["cu_seqlens"] is None or which[i] == which[j]
            if causal and same and (mask is None or not mask[b, j]):
                weight = sum(phi(q[b, h, i, d].item()) * phi(k[b, shared, j, d].item()) for d in range(D))
                z += weight
                numerator = [n + weight * v[b, shared, j, e].item() for e, n in enumerate(numerator)]
        if state is not None:
            row = b if o["cu_seqlens"] is None else which[i]
            for d in range(D):
                feature = phi(q[b, h, i, d].item())
                z += feature * state.k_sum[row, shared, d].item()
                numerator = [n + feature * state.kv[row, shared, d, e].item() for e, n in enumerate(numerator)]
        if o["normalize"]:
            numerator = [n / z if z else 0.0 for n in numerator]
        else:
            numerator = [n * (1 if o["scale"] is None else o["scale"]) for n in numerator]
        output[b, h, i] = torch.tensor(numerator, dtype=q.dtype)
    return output


BY_HAND = (
    LinearCase("by hand", B=2, H=2, L=4, S=5, D=3, E=2, mask="random", state=True, groups=2),
    LinearCase("by hand, causal", B=2, H=1, L=5, D=2, E=3, mask="random", state=True, is_causal=True, feature="relu"),
    LinearCase("by hand, identity", B=1, H=1, L=3, S=4, D=2, E=1, feature="identity", normalize=False, scale=-0.7),
    LinearCase("by hand, packed", B=1, H=1, L=6, D=2, E=2, lengths=(2, 0, 3, 1), state=True, is_causal=True, groups=2),
    LinearCase("by hand, packed, not causal", B=1, H=2, L=5, D=2, E=2, lengths=(2, 0, 3), mask="random"),
    LinearCase("by hand, one row masked", B=2, H=1, L=3, D=2, E=2, mask="one row"),
)


@pytest.mark.parametrize("case", BY_HAND, ids=lambda case: case.name)
def test_the_reference_is_the_definition(case):
    inputs = build(case, torch.float64).double()
    output = linear_attention_with_state(*inputs[:3], state=inputs.state, impl="reference", **inputs.options).output
    torch.testing.assert_close(output, by_hand(*inputs[:4], inputs.options), rtol=1e-12, atol=1e-13)


def test_the_outgoing_state_is_the_sum_over_unmasked_keys(impl, device):
    q, k, v = qkv(L=70, device=device)
    mask = torch.arange(70, device=device).expand(2, 70) % 5 == 0
    for is_causal in (False, True):
        state = linear_attention_with_state(q, k, v, is_causal=is_causal, key_padding_mask=mask, impl=impl).state
        phi = (torch.nn.functional.elu(k.double()) + 1) * ~mask[:, None, :, None]
        assert_near(state.kv, phi.mT @ v.double())
        assert_near(state.k_sum, phi.sum(2))


# the past never sees the future


@pytest.mark.parametrize("value", [3.0, 1e30, INF, -INF, NAN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_future_tokens_never_change_a_past_bit(value, dtype, impl, device):
    if impl == "reference" and not math.isfinite(value):
        pytest.skip("the dense formula multiplies what it must not see by 0")
    q, k, v = qkv(B=1, L=200, dtype=dtype, device=device)
    with segments_of(64):
        expected = linear_attention(q, k, v, is_causal=True, impl=impl)
        for t in (0, 1, 63, 64, 65, 127, 128, 150, 199):
            for changed in ("qkv", "k", "v"):
                a, b, c = (x.clone() for x in (q, k, v))
                for name, x in zip("qkv", (a, b, c), strict=True):
                    if name in changed:
                        x[:, :, t:] = value
                output = linear_attention(a, b, c, is_causal=True, impl=impl)
                assert_same_bits(f"the past of token {t}", output[:, :, :t], expected[:, :, :t])
                assert t == 0 or not torch.equal(output[:, :, t:], expected[:, :, t:])


def test_gradients_of_the_past_are_blind_to_later_queries(impl, device):
    """dq and dv, dk of token i come from tokens before and after it alone: a gradient at t reaches no key after t."""
    q, k, v = (x.requires_grad_() for x in qkv(B=1, L=200, device=device))
    with segments_of(64):
        output = linear_attention(q, k, v, is_causal=True, impl=impl)
        for t in (0, 63, 64, 100, 199):
            dq, dk, dv = torch.autograd.grad(output[:, :, t].sum(), (q, k, v), retain_graph=True)
            for x in (dk, dv):
                assert x[:, :, t + 1 :].count_nonzero() == 0
                assert x[:, :, : t + 1].isfinite().all()
            assert dv[:, :, : t + 1].count_nonzero() == dv[:, :, : t + 1].numel()
            others = torch.arange(200, device=device) != t
            assert dq[:, :, others].count_nonzero() == 0


# padding


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_padded_keys_hold_changes_no_bit(dtype, is_causal, impl, device):
    q, k, v = qkv(L=150, dtype=dtype, device=device)
    mask = torch.rand(2, 150, generator=torch.Generator().manual_seed(1)).to(device) < 0.5
    results = []
    for value in (0, 1e4, INF, -INF, NAN):
        kp, vp = (x.masked_fill(mask[:, None, :, None], value) for x in (k, v))
        inputs = build(LinearCase("padded", L=150, D=8, E=12), dtype, device)
        options = {**inputs.options, "is_causal": is_causal, "key_padding_mask": mask}
        with segments_of(64):
            results.append(run_linear(inputs._replace(q=q, k=kp, v=vp, options=options), impl))
    for result in results:
        for name, x in results[0].items():
            assert x.count_nonzero() > 0
            assert_same_bits(name, result[name], x)
        for name in ("dk", "dv"):
            assert result[name].transpose(1, 2)[mask].count_nonzero() == 0
            assert (result[name].transpose(1, 2)[~mask] != 0).any(-1).all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("extra", [1, 28, 70, 900])
def test_appending_padding_changes_no_bit(extra, is_causal, kernel, device, three_threads):
    L = 100
    inputs = build(LinearCase("short", L=L, D=8, E=12, is_causal=is_causal), torch.float32, device)
    with segments_of(64):
        short = run_linear(inputs, kernel)
    more = build(LinearCase("padding", L=extra, D=8, E=12), torch.float32, device)
    q, k, v, grad_output = (
        torch.cat([getattr(inputs, name), getattr(more, name)], 2) for name in ("q", "k", "v", "grad_output")
    )
    grad_output[:, :, L:] = 0
    mask = (torch.arange(L + extra, device=device) >= L).expand(2, -1)
    options = {**inputs.options, "key_padding_mask": mask}
    with segments_of(64):
        long = run_linear(inputs._replace(q=q, k=k, v=v, grad_output=grad_output, options=options), kernel)
    for name, x in short.items():
        got = long[name][:, :, :L] if name in ("output", "dq", "dk", "dv") else long[name]
        assert_same_bits(name, got, x)


def test_a_fully_padded_sequence_gives_zero_and_zero_gradients(impl, device):
    inputs = build(LinearCase("one padded", L=70, is_causal=True, mask="one row"), torch.float32, device)
    results = run_linear(inputs, impl)
    for name, x in results.items():
        # phi(k) of a padded key is nothing, so its query's gradient is 0 too
        assert x[0].count_nonzero() == 0, name
        assert x[1].isfinite().all(), name
        assert x[1].count_nonzero() > 0, name


# what else is in the call


def rows_of(inputs, rows):
    tensors = {name: getattr(inputs, name)[rows] for name in ("q", "k", "v", "grad_output")}
    state = None if inputs.state is None else inputs.state.select(rows)
    return inputs._replace(**tensors, state=state, grad_state=inputs.grad_state.select(rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_sequence_has_the_same_bits_alone(is_causal, dtype, kernel, device, three_threads):
    case = LinearCase("batch", B=5, H=3, L=300, D=16, E=16, is_causal=is_causal, state=True, segment=64)
    inputs = build(case, dtype, device)
    with segments_of(case.segment):
        together = run_linear(inputs, kernel)
        for i in (0, 2, 4):
            alone = run_linear(rows_of(inputs, slice(i, i + 1)), kernel)
            for name, x in alone.items():
                assert_same_bits(f"{name} of sequence {i}", together[name][i : i + 1], x)


def test_the_order_of_heads_changes_no_bit(kernel, device, three_threads):
    inputs = build(LinearCase("heads", B=1, H=5, L=200, is_causal=True, state=True), torch.float32, device)
    order = [3, 0, 4, 1, 2]
    tensors = {name: getattr(inputs, name)[:, order] for name in ("q", "k", "v", "grad_output")}
    state, grad_state = (LinearState(*(x[:, order] for x in s)) for s in (inputs.state, inputs.grad_state))
    expected = run_linear(inputs, kernel)
    for name, x in run_linear(inputs._replace(**tensors, state=state, grad_state=grad_state), kernel).items():
        assert_same_bits(name, x, expected[name][:, order])


@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences_equal_separate_calls(is_causal, impl, device, three_threads):
    lengths = (70, 1, 0, 200, 64, 5)
    case = LinearCase(
        "packed", B=1, L=sum(lengths), lengths=lengths, is_causal=is_causal, state=True, mask="random", groups=2
    )
    inputs = build(case, torch.float32, device).clean()
    bounds = inputs.options["cu_seqlens"].tolist()
    with segments_of(64):
        packed = run_linear(inputs, impl)
        for n, (start, stop) in enumerate(pairwise(bounds)):
            options = dict(inputs.options, cu_seqlens=None)
            options["key_padding_mask"] = options["key_padding_mask"][:, start:stop]
            tensors = {name: getattr(inputs, name)[:, :, start:stop] for name in ("q", "k", "v", "grad_output")}
            row = torch.tensor([n], device=device)
            alone = run_linear(
                inputs._replace(
                    **tensors, state=inputs.state.select(row), grad_state=inputs.grad_state.select(row), options=options
                ),
                impl,
            )
            for name, x in alone.items():
                per_token = name in ("output", "dq", "dk", "dv")
                got = packed[name][:, :, start:stop] if per_token else packed[name][n : n + 1]
                if impl == "reference":
                    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5)
                else:
                    assert_same_bits(f"{name} of sequence {n}", got, x)


def test_repeated_runs_give_the_same_bits(impl, device, three_threads):
    inputs = build(LinearCase("repeat", H=3, L=300, is_causal=True, state=True, segment=64), torch.bfloat16, device)
    with segments_of(64):
        first = run_linear(inputs, impl)
        for _ in range(5):
            for name, x in run_linear(inputs, impl).items():
                assert_same_bits(name, x, first[name])


# everything at once


@st.composite
def any_case(draw):
    lengths = draw(st.one_of(st.just(()), st.lists(st.integers(0, 90), min_size=1, max_size=5).map(tuple)))
    is_causal = draw(st.booleans())
    L = sum(lengths) if lengths else draw(st.integers(0, 200))
    feature = draw(st.sampled_from(["elu", "relu", "identity"]))
    D = draw(st.integers(1, 40))
    return LinearCase(
        f"fuzz {draw(st.integers(0, 1000))}",
        B=1 if lengths else draw(st.integers(1, 3)),
        H=draw(st.integers(1, 3)),
        L=L,
        S=None if is_causal or lengths else draw(st.integers(0, 200)),
        D=D,
        E=draw(st.integers(1, 40)),
        groups=draw(st.integers(1, 3)),
        feature=feature,
        is_causal=is_causal,
        # a quotient of a few terms, or of one feature, may cancel to nothing: the table has those it should have
        normalize=D > 2 and draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.5, -3.0])),
        mask=draw(st.sampled_from(["", "tail", "random", "one row"])),
        lengths=lengths,
        state=True,
        segment=draw(st.sampled_from([None, 64, 128])),
    )


@settings(max_examples=150)
@given(case=any_case(), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_any_shape_and_options_agree_with_the_oracle(kernel, device, case, dtype):
    """Whether it is the right function: how well it is rounded is what the table's budgets hold."""
    if device == "cuda" and dtype == torch.float64:
        dtype = torch.float32
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 5e-2}[dtype]
    with segments_of(case.segment):
        actual = run_linear(build(case, dtype, device), kernel)
    for name, x in run_linear(build(case, dtype).double(), "reference").items():
        got = actual[name].cpu().double()
        assert got.shape == x.shape, name
        assert x.numel() == 0 or (got - x).abs().max() <= tolerance * (1 + x.abs().max()), name


def test_the_table_reaches_every_option():
    """A case that leaves the table must not take an option's only test with it."""
    for name in ("feature", "is_causal", "normalize", "state"):
        assert len({getattr(case, name) for case in LINEAR}) > 1, name
    assert {case.mask for case in LINEAR} == {"", "tail", "random", "one row", "all"}
    assert any(case.lengths and case.groups > 1 and case.mask and case.state for case in LINEAR)
