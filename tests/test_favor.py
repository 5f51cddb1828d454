"""What FAVOR+ attention must be: its laws, its refusals, and what it converges to."""

import copy

import pytest
import torch
from _favor import MAPS, maps, qkv
from torch.autograd import gradcheck
from torch.nn import functional as F

import longattn
from longattn import Favor, linear_attention, linear_attention_with_state
from longattn.features import FAVOR_KINDS
from longattn.ops.favor import Options
from longattn.testing.assertions import assert_near, assert_same_bits, run_linear
from longattn.testing.cases import FAVOR, LinearCase, build, draw, segments_of

INF, NAN = float("inf"), float("nan")
BY_NAME = {case.name.removeprefix("favor, "): case for case in FAVOR}


# the function


@maps()
def test_gradients_are_those_of_the_function(case, impl):
    """Through both results of one call into a second: the unit of a state cancels there, as it must."""
    favor = case.build(3, 1).double()
    q, k, v = (x.requires_grad_() for x in qkv(L=6, B=1, H=1, D=3, E=2, spread=case.deviation, dtype=torch.float64))
    mask = torch.tensor([[False, False, True, False]])

    def call(q, k, v, log_temperature):
        own = copy.deepcopy(favor)
        del own.log_temperature
        own.log_temperature = log_temperature
        options = {"feature_map": own, "is_causal": True, "impl": impl}
        first, second = ([x[:, :, rows] for x in (q, k, v)] for rows in (slice(0, 4), slice(4, 6)))
        before, state = linear_attention_with_state(*first, key_padding_mask=mask, **options)
        after, _ = linear_attention_with_state(*second, state=state, **options)
        return before, after

    assert gradcheck(call, (q, k, v, favor.log_temperature.detach().requires_grad_()), nondet_tol=0.0)


@pytest.mark.parametrize("kind", ["positive", "hyperbolic"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_many_features_converge_to_softmax_attention(kind, is_causal, impl, device):
    q, k, v = qkv(L=60, B=1, spread=0.4, device=device)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    errors = []
    for n_features in (64, 4096):
        draws = []
        for seed in range(4):
            favor = Favor(8, n_features, kind, seed=seed, device=device)
            output = linear_attention(q, k, v, feature_map=favor, is_causal=is_causal, impl=impl)
            draws.append((output - exact).norm() / exact.norm())
        errors.append(torch.stack(draws).mean().item())
    # 64 times the features: an eighth of the error, less what four draws leave to luck
    assert errors[1] < 0.02
    assert errors[1] < errors[0] / 3


def test_exact_diagonal_is_softmax_attention_inside_one_chunk(impl, device):
    q, k, v = qkv(L=64, device=device)
    favor = Favor(8, 2, exact_diagonal=True, device=device)
    output = linear_attention(q, k, v, feature_map=favor, is_causal=True, impl=impl)
    assert_near(output, F.scaled_dot_product_attention(q, k, v, is_causal=True), 1e-5)


def test_exact_diagonal_lowers_the_error(impl, device):
    q, k, v = qkv(L=130, B=1, H=4, spread=1.2, device=device)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    errors = []
    for exact_diagonal in (False, True):
        favors = [Favor(8, 64, exact_diagonal=exact_diagonal, seed=seed, device=device) for seed in range(4)]
        outputs = [linear_attention(q, k, v, feature_map=favor, is_causal=True, impl=impl) for favor in favors]
        errors.append(sum((output - exact).norm().item() for output in outputs))
    assert errors[1] < 0.8 * errors[0]


def test_the_features_are_those_of_the_fused_map(impl, device):
    q, k, v = qkv(L=70, device=device)
    for case in MAPS[:4]:
        favor = case.build(8, 2, device)
        fused = linear_attention(q, k, v, feature_map=favor, is_causal=True, impl=impl)
        called = linear_attention(q, k, v, feature_map=lambda x, favor=favor: favor(x), is_causal=True, impl=impl)
        assert_near(fused, called, 2e-4 if case.kind == "trig" else 2e-5)


def test_unit_rows_make_the_length_of_queries_and_keys_irrelevant(impl, device):
    q, k, v = qkv(device=device)
    favor = Favor(8, 32, normalize="l2", device=device)
    expected = linear_attention(q, k, v, feature_map=favor, impl=impl)
    for factor in (2.0**-60, 2.0**60):
        assert_near(linear_attention(factor * q, k * factor, v, feature_map=favor, impl=impl), expected)


def test_a_shift_of_the_keys_and_of_their_mean_cancels(impl, device):
    q, k, v = qkv(device=device)
    favor = Favor(8, 32, center_keys=True, device=device)
    results = []
    for shift in (0.0, 3.0):
        favor.calibrate(k + shift)
        results.append(linear_attention(q, k + shift, v, feature_map=favor, is_causal=True, impl=impl))
    assert_near(results[1], results[0])
    # without a stored mean a call that is not causal takes that of its own keys
    favor.key_mean = None
    assert_near(*(linear_attention(q, k + shift, v, feature_map=favor, impl=impl) for shift in (0.0, 3.0)))


def test_centering_lowers_the_error_for_keys_far_from_zero(impl, device):
    q, k, v = qkv(L=200, B=1, spread=0.5, device=device)
    k = k + 2
    exact = F.scaled_dot_product_attention(q, k, v)
    favors = [Favor(8, 128, center_keys=center, device=device) for center in (False, True)]
    errors = [(linear_attention(q, k, v, feature_map=favor, impl=impl) - exact).norm().item() for favor in favors]
    assert errors[1] < 0.5 * errors[0]


def test_the_mean_of_a_call_leaves_out_padded_keys_and_passes_gradients(impl):
    favor = Favor(4, 16, center_keys=True).double()
    q, k, v = (x.requires_grad_() for x in qkv(L=5, B=1, H=1, D=4, E=2, dtype=torch.float64))
    mask = torch.tensor([[False, True, False, False, True]])
    call = lambda q, k, v: linear_attention(q, k, v, feature_map=favor, key_padding_mask=mask, impl=impl)  # noqa: E731
    assert gradcheck(call, (q, k, v))
    poisoned = k.detach().clone()
    poisoned[:, :, 1] = NAN
    for normalize in (None, "l2"):
        favor.normalize = normalize
        results = []
        for key in (k.detach().clone(), poisoned):
            leaves = [x.detach().clone().requires_grad_() for x in (q, key, v)]
            output = call(*leaves)
            results.append((output.detach(), *torch.autograd.grad(output.square().sum(), leaves)))
        for x, y in zip(*results, strict=True):
            assert_same_bits("result", x, y)
            assert x.count_nonzero() > 0


# order, padding, scale


@maps()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_future_tokens_never_change_a_past_bit(dtype, case, kernel, device):
    favor = case.build(8, 1, device)
    q, k, v = qkv(L=200, B=1, H=1, dtype=dtype, device=device)
    with segments_of(64):
        expected = linear_attention(q, k, v, feature_map=favor, is_causal=True, impl=kernel)
        for t in (1, 63, 64, 65, 130, 199):
            for value in ("1000 times", 1e30, INF, NAN):
                for changed in ("qkv", "k"):
                    tensors = {name: x.clone() for name, x in zip("qkv", (q, k, v), strict=True)}
                    for name in changed:
                        x = tensors[name]
                        if value == "1000 times":
                            x[:, :, t] *= 1000
                        else:
                            x[:, :, t:] = value
                    output = linear_attention(*tensors.values(), feature_map=favor, is_causal=True, impl=kernel)
                    assert_same_bits(f"the past of token {t}", output[:, :, :t], expected[:, :, :t])
                    # a key made too large may be left without weight, but NaN shows
                    assert value is not NAN or not torch.equal(output[:, :, t:], expected[:, :, t:])


@maps()
@pytest.mark.parametrize("is_causal", [False, True])
def test_what_padded_keys_hold_changes_no_bit(is_causal, case, impl, device):
    if case.exact and not is_causal:
        pytest.skip("exact_diagonal is causal")
    made = LinearCase("padded", L=150, D=8, E=12, is_causal=is_causal, mask="random", favor=case)
    inputs = build(made, torch.float32, device)
    mask = inputs.options["key_padding_mask"][:, None, :, None]
    with segments_of(64):
        results = []
        for value in (0, 1e6, 3e38, NAN):
            k, v = (x.masked_fill(mask, value) for x in (inputs.k, inputs.v))
            results.append(run_linear(inputs._replace(k=k, v=v), impl))
    for result in results:
        for name, x in results[0].items():
            assert_same_bits(name, result[name], x)
        for name in ("dk", "dv"):
            assert result[name].masked_select(mask).count_nonzero() == 0


def test_a_padded_key_among_very_negative_scores_gives_no_nan(kernel, device):
    """Its own score is 0, e^300 times what its chunk measures in."""
    q, _, v = qkv(L=100, device=device)
    q = q.sign() * 10
    mask = torch.arange(100, device=device).expand(2, 100) % 3 == 1
    leaves = [x.requires_grad_() for x in (q, -q.detach(), v)]
    favor = Favor(8, 16, exact_diagonal=True, device=device)
    output = linear_attention(*leaves, feature_map=favor, is_causal=True, key_padding_mask=mask, impl=kernel)
    for x in (output, *torch.autograd.grad(output.square().sum(), leaves)):
        assert x.isfinite().all()
        assert x.count_nonzero() > 0


@maps()
@pytest.mark.parametrize("power", [-20, 20])
def test_extreme_scales_stay_finite_with_finite_gradients(power, case, kernel, device):
    for dtype in (torch.float32, torch.bfloat16):
        for is_causal in (True,) if case.exact else (False, True):
            made = LinearCase("extreme", L=150, D=8, E=12, is_causal=is_causal, favor=case)
            inputs = build(made, dtype, device)
            q, k = (x * 2.0**power for x in (inputs.q, inputs.k))
            with segments_of(64):
                for name, x in run_linear(inputs._replace(q=q, k=k), kernel).items():
                    # features of relu at 2^20 square to 2^40, and trig's are e^(+2^40)
                    assert x.isfinite().all(), (name, dtype, is_causal)


def test_a_key_alone_has_all_the_weight_however_large(kernel, device):
    """No eps: features that are all tiny still divide by their own sum. Where float32 holds nothing of them the row is
    0, and never anything else; with an exact diagonal it is right at any length."""
    q, k, v = draw((1, 64, 1, 64), (1, 64, 1, 64), (1, 64, 1, 16), device=device)
    for scale in (1.0, 3.0, 7.0, 12.0, 50.0, 1000.0):
        for favor in (Favor(64, 256), Favor(64, 256, "hyperbolic"), Favor(64, 32, exact_diagonal=True)):
            favor = favor.to(device)
            output = linear_attention(scale * q, scale * k, v, feature_map=favor, is_causal=True, impl=kernel)
            seen = (output != 0).any(-1, keepdim=True).expand_as(v)
            assert_near(output[seen], v[seen], 1e-5)
            assert seen.all() or (scale > 7 and not favor.exact_diagonal)


def test_nan_shows_whatever_its_payload(kernel, device):
    q, k, v = qkv(L=6, B=1, H=1, device=device)
    for bits in (0x7FC00000, 0x7FC00001, 0x7FFFFFFF):
        for case in MAPS:
            favor = case.build(8, 1, device)
            for changed in range(2):
                tensors = [x.clone() for x in (q, k, v)]
                tensors[changed].view(torch.int32)[:, :, 2, 3] = bits
                output = linear_attention(*tensors, feature_map=favor, is_causal=True, impl=kernel)
                assert output[:, :, :2].isfinite().all()
                assert output[:, :, 2].isnan().all(), (hex(bits), case, changed)


def test_the_length_of_a_query_does_not_matter_to_the_sum_of_its_weights(kernel, device):
    q, k, _ = qkv(L=100, spread=2.0, device=device)
    ones = torch.ones(2, 2, 100, 3, device=device)
    for case in MAPS:
        if case.kind != "trig":
            favor = case.build(8, 2, device)
            output = linear_attention(q, k, ones, feature_map=favor, is_causal=True, impl=kernel)
            assert_near(output, ones, 1e-5)


@maps()
def test_segments_change_nothing_but_rounding(case, kernel, device):
    q, k, v = qkv(L=400, spread=case.deviation, device=device)
    favor = case.build(8, 2, device)
    results = []
    for segment in (64, 128, 1024):
        with segments_of(segment):
            results.append(linear_attention(q, k, v, feature_map=favor, is_causal=True, impl=kernel))
    assert_near(results[1], results[0], 1e-5)
    assert_near(results[2], results[0], 1e-5)


# torch's transformations


@pytest.mark.parametrize("name", ["GQA causal", "packed with everything", "exact diagonal with everything", "S=0"])
def test_raw_ops_pass_opcheck(name, kernel, device):
    inputs = build(BY_NAME[name], torch.float32, device).clean()
    o, favor = inputs.options, inputs.options["feature_map"]
    options = Options(favor.kind, favor.normalize == "l2", o["is_causal"], favor.exact_diagonal, 64, kernel)
    sums = (None, None, None) if inputs.state is None else inputs.state[:3]
    map_of = (favor.projection, favor.root.detach(), favor.key_mean if favor.center_keys else None)
    tensors = (*inputs[:3], o["key_padding_mask"], o["cu_seqlens"], *sums, *map_of)
    for save_segments in (True, False):
        torch.library.opcheck(torch.ops.longattn._favor_forward, (*tensors, *options, save_segments))
    *saved, _, _, log_scale = torch.ops.longattn._favor_forward(*tensors, *options, True)
    for grad_state, root_grad in ((inputs.grad_state, True), ((None, None), False)):
        arguments = (inputs.grad_output, *grad_state, *tensors, *saved, log_scale, *options, root_grad)
        torch.library.opcheck(torch.ops.longattn._favor_backward, arguments)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@maps(MAPS[0], MAPS[4])
def test_compiles_whole_with_dynamic_lengths_and_gradients(case, kernel, device):
    torch._dynamo.reset()
    favor = case.build(8, 2, device)

    def call(q, k, v):
        return linear_attention(q, k, v, feature_map=favor, is_causal=True, impl=kernel)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for L in (2, 65, 130):
        results = []
        for f in (call, compiled):
            leaves = [x.requires_grad_() for x in qkv(L=L, device=device)]
            output = f(*leaves)
            results.append((output, *torch.autograd.grad(output.square().sum(), (*leaves, favor.log_temperature))))
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_autocast_equals_inputs_of_its_dtype(impl, device):
    q, k, v = qkv(device=device)
    favor = Favor(8, 16, device=device)
    expected = linear_attention(*(x.bfloat16() for x in (q, k, v)), feature_map=favor, impl=impl)
    with torch.autocast(device, torch.bfloat16):
        got = linear_attention(q, k, v, feature_map=favor, impl=impl)
    assert_same_bits("output", got, expected)


# as a mechanism


@maps()
def test_the_module_attends_with_the_map(case):
    torch.manual_seed(0)
    mha = longattn.nn.MultiheadAttention(16, 2, batch_first=True, mechanism=case.build(8, 2), causal=True)
    x = torch.randn(2, 70, 16)
    padding = torch.zeros(2, 70, dtype=torch.bool)
    padding[0, 50:] = True
    output, weights = mha(x, x, x, key_padding_mask=padding, average_attn_weights=False)
    fast, nothing = mha(x, x, x, key_padding_mask=padding, need_weights=False)
    assert nothing is None
    assert_near(output, fast)
    value = (x @ mha.in_proj_weight[32:].T + mha.in_proj_bias[32:]).unflatten(-1, (2, 8)).transpose(1, 2)
    assert_near(output, mha.out_proj((weights @ value).transpose(1, 2).flatten(2)), 2e-4)
    assert weights.triu(1).count_nonzero() == 0
    assert weights[0, ..., 50:].count_nonzero() == 0
    output.square().sum().backward()
    assert mha.mechanism.feature_map.log_temperature.grad.isfinite()
    assert "feature_map.projection" in mha.state_dict()


# refusals


@pytest.mark.parametrize(
    ("made", "options", "sentence"),
    [
        ({}, {"normalize": False}, r"normalize=True removes.*feature_map=lambda x: favor\(x\)"),
        ({"head_dim": 4}, {}, r"made for head_dim 4, got query and key with 8"),
        ({"exact_diagonal": True}, {}, r"exact_diagonal needs is_causal=True"),
        ({"center_keys": True}, {"is_causal": True}, r"center_keys needs a stored mean.*calibrate"),
        ({}, {"impl": "cuda"}, r"impl='cuda' cannot run"),
    ],
)
def test_bad_calls_are_refused_in_a_sentence(made, options, sentence):
    favor = Favor(**{"head_dim": 8, "n_features": 16, **made})
    with pytest.raises(ValueError, match=rf"linear_attention: .*{sentence}"):
        linear_attention(*qkv(L=5), feature_map=favor, **options)


def test_raw_ops_guard_their_memory(kernel):
    q = torch.randn(1, 1, 6, 8, dtype=torch.float64)
    options = Options("positive", False, True, False, 64, kernel)
    tensors = (q, q, q, None, None, None, None, None, torch.randn(16, 8), torch.tensor(1.0), None)
    with pytest.raises(ValueError, match="projection has a dtype that does not fit"):
        torch.ops.longattn._favor_forward(*tensors, *options, False)


def test_a_map_for_other_heads_is_refused_by_the_module():
    with pytest.raises(ValueError, match="is for head_dim 8, but the attention has heads of 4"):
        longattn.nn.MultiheadAttention(12, 3, mechanism=Favor(8))


def test_bad_states_are_refused_in_a_sentence():
    q, k, v = qkv(L=5)
    options = {"feature_map": Favor(8, 16), "is_causal": True}
    _, state = linear_attention_with_state(q, k, v, **options)
    with pytest.raises(TypeError, match="state must be a FavorState, got LinearState"):
        linear_attention_with_state(q, k, v, state=longattn.LinearState(state.kv, state.k_sum), **options)
    with pytest.raises(TypeError, match="state must be a LinearState, got FavorState"):
        linear_attention_with_state(q, k, v, state=state)
    with pytest.raises(TypeError, match=r"state\.tail_mask must be bool"):
        linear_attention_with_state(q, k, v, state=state._replace(tail_mask=None), **options)
    with pytest.raises(ValueError, match=r"state.k_sum must be .*\[2, 2, 16\]"):
        linear_attention_with_state(q, k, v, state=state._replace(k_sum=state.k_sum[..., :3]), **options)
    exact = {**options, "feature_map": Favor(8, 16, exact_diagonal=True)}
    _, tail = linear_attention_with_state(q, k, v, **exact)
    with pytest.raises(ValueError, match="holds 5 tokens of an unfinished chunk"):
        linear_attention_with_state(q, k, v, state=tail, **options)
    with pytest.raises(ValueError, match="exact_diagonal cannot carry a state with more queries than keys"):
        linear_attention_with_state(q, k[:, :, :2], v[:, :, :2], state=tail, **exact)
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="exact_diagonal cannot carry a state with packed sequences"):
        linear_attention_with_state(q[:1], k[:1], v[:1], cu_seqlens=cu_seqlens, **exact)
    wrong = Favor(8, 16, center_keys=True)
    wrong.calibrate(torch.randn(1, 3, 9, 8))
    with pytest.raises(ValueError, match="key_mean was measured for 3 heads, got keys with 2"):
        linear_attention(q, k, v, feature_map=wrong)


def test_a_second_derivative_of_the_kernels_is_refused_in_a_sentence(kernel, device):
    q, k, v = qkv(L=9, device=device)
    q.requires_grad_()
    output = linear_attention(q, k, v, feature_map=Favor(8, 16, device=device), impl=kernel)
    (dq,) = torch.autograd.grad(output.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative; use impl='reference'"):
        dq.sum().backward()


def test_the_table_reaches_every_kind():
    assert {case.favor.kind for case in FAVOR} == set(FAVOR_KINDS)
