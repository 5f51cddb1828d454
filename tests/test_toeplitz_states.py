"""The states of attention with relative positions: split, carried, decoded from, saved."""

import pickle
from itertools import pairwise

import pytest
import torch
from _toeplitz import bias_of
from hypothesis import given, settings
from hypothesis import strategies as st

from longattn import Favor, ToeplitzState, linear_attention, linear_attention_with_state
from longattn.features import FAVOR_KINDS
from longattn.native import missing
from longattn.testing.assertions import assert_near, assert_same_bits
from longattn.testing.cases import qkv

# none, shorter than a chunk, shorter than the sequence, longer
reaches = pytest.mark.parametrize("reach", [0, 5, 32, 200])
FAVOR = Favor(8, 32, normalize="l2")


def options_of(impl, device, reach=20, heads=2, **more):
    return {"rpe_bias": bias_of(heads, reach, device=device), "is_causal": True, "impl": impl, **more}


def in_parts(tensors, edges, mask=None, **options):
    """-> output and state of the calls between the edges, each with the state of the one before"""
    state, parts = None, []
    for start, stop in pairwise(edges):
        part = [x[:, :, start:stop] for x in tensors]
        masked = {} if mask is None else {"key_padding_mask": mask[:, start:stop]}
        output, state = linear_attention_with_state(*part, state=state, **masked, **options)
        parts.append(output)
    return torch.cat(parts, 2), state


@reaches
@pytest.mark.parametrize("normalize", [True, False])
def test_tokens_one_by_one_equal_one_call(normalize, reach, impl, device):
    q, k, v = qkv(L=50, device=device)
    q = torch.cat([q, 0.5 * q], 1)
    mask = torch.rand(2, 50, generator=torch.Generator().manual_seed(1)).to(device) < 0.2
    options = options_of(impl, device, reach, heads=4, enable_gqa=True, normalize=normalize, scale=0.3)
    with torch.no_grad():
        steps, state = in_parts((q, k, v), range(51), mask, **options)
    assert_near(steps, linear_attention(q, k, v, key_padding_mask=mask, **options))
    last = slice(50 - min(reach, 50), None)
    assert_same_bits("ring_mask", state.ring_mask, mask[:, last])
    assert_same_bits("ring_value", state.ring_value, v.masked_fill(mask[:, None, :, None], 0)[:, :, last])


@settings(max_examples=40)
@given(cuts=st.lists(st.integers(0, 150), max_size=3), reach=st.integers(0, 160), favor=st.booleans())
def test_splitting_and_carrying_the_state_equals_one_call(kernel, device, cuts, reach, favor):
    tensors = qkv(L=150, device=device)
    mask = torch.rand(2, 150, generator=torch.Generator().manual_seed(1)).to(device) < 0.3
    options = options_of(kernel, device, reach, feature_map=FAVOR.to(device) if favor else "relu")
    whole = linear_attention(*tensors, key_padding_mask=mask, **options)
    output, state = in_parts(tensors, [0, *sorted(cuts), 150], mask, **options)
    assert_near(output, whole)
    for x, y in zip(state, in_parts(tensors, [0, 150], mask, **options)[1], strict=True):
        assert x.shape == y.shape
        assert x.numel() == 0 or (x.float() - y.float()).abs().max() <= 2e-5 * (1 + y.float().abs().max())


@reaches
def test_gradients_flow_through_a_carried_state(reach, impl, device):
    if device == "cuda":
        pytest.skip("float64 runs on cpu and reference only")
    tensors = [x.requires_grad_() for x in qkv(L=100, dtype=torch.float64)]
    options = options_of(impl, device, reach)
    bias = options["rpe_bias"].double().requires_grad_()
    options["rpe_bias"] = bias
    weight = qkv(L=100, seed=1, dtype=torch.float64)[2]
    expected = torch.autograd.grad((linear_attention(*tensors, **options) * weight).sum(), (*tensors, bias))
    for edges in ((0, 70, 100), (0, 64, 65, 66, 100), (0, 1, 99, 100)):
        grads = torch.autograd.grad((in_parts(tensors, edges, **options)[0] * weight).sum(), (*tensors, bias))
        for x, y in zip(grads, expected, strict=True):
            assert_near(x, y, 1e-10)


@pytest.mark.parametrize("reach", [5, 200])
@pytest.mark.parametrize(("L", "S"), [(3, 10), (1, 70), (70, 100), (0, 30)])
def test_calls_with_a_state_align_the_last_query_with_the_last_key(L, S, reach, impl, device):
    q, k, v = qkv(L=180, device=device)
    options = options_of(impl, device, reach)
    _, state = linear_attention_with_state(*(x[:, :, :70] for x in (q, k, v)), **options)
    key, value = (x[:, :, 70 : 70 + S] for x in (k, v))
    output, after = linear_attention_with_state(q[:, :, 70 + S - L : 70 + S], key, value, state=state, **options)
    whole, end = in_parts((q, k, v), [0, 70 + S], **options)
    assert output.shape == (2, 2, L, 12)
    assert_near(output, whole[:, :, 70 + S - L :])
    for x, y in zip(after, end, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_decoding_from_tensors_that_are_written_again_equals_one_call(kernel, device):
    q, k, v = qkv(L=40, device=device)
    for feature_map in ("elu", "identity"):
        options = options_of(kernel, device, 7, feature_map=feature_map, normalize=False)
        tokens, state, steps = [x[:, :, :1].clone() for x in (q, k, v)], None, []
        with torch.no_grad():
            for t in range(40):
                for x, y in zip(tokens, (q, k, v), strict=True):
                    x.copy_(y[:, :, t : t + 1])
                step, state = linear_attention_with_state(*tokens, state=state, **options)
                steps.append(step)
        assert_near(torch.cat(steps, 2), linear_attention(q, k, v, **options))


def test_a_state_keeps_nothing_but_itself_alive(impl, device):
    tensors = qkv(L=300, B=1, device=device)
    for edges in ([0, 300], [0, 250, 300], [0, 299, 300]):
        for x in in_parts(tensors, edges, **options_of(impl, device, 30))[1]:
            assert x.untyped_storage().nbytes() == x.nbytes
            assert x.is_contiguous()


def test_a_call_leaves_the_incoming_state_as_it_was(impl, device):
    q, k, v = qkv(L=60, device=device)
    options = options_of(impl, device, 10)
    _, state = linear_attention_with_state(*(x[:, :, :30] for x in (q, k, v)), **options)
    before = [x.clone() for x in state]
    for stop in (31, 60):
        linear_attention_with_state(*(x[:, :, 30:stop] for x in (q, k, v)), state=state, **options)
        for x, y in zip(state, before, strict=True):
            assert_same_bits("state", x, y)


def test_selected_and_reset_rows_go_on_as_they_would_have(impl, device):
    q, k, v = qkv(B=3, L=90, device=device)
    options = options_of(impl, device, 20)
    _, state = linear_attention_with_state(*(x[:, :, :60] for x in (q, k, v)), **options)
    order = torch.tensor([2, 0, 0], device=device)
    fresh = state.reset(torch.tensor([1], device=device))
    assert fresh.ring_mask[1].all()
    for stop in (61, 90):
        tokens = [x[:, :, 60:stop] for x in (q, k, v)]
        expected, _ = linear_attention_with_state(*tokens, state=state, **options)
        chosen, _ = linear_attention_with_state(*(x[order] for x in tokens), state=state.select(order), **options)
        assert_near(chosen, expected[order], 1e-6)
        restarted, _ = linear_attention_with_state(*tokens, state=fresh, **options)
        assert_near(restarted[1:2], linear_attention(*(x[1:2] for x in tokens), **options))
        assert_near(restarted[::2], expected[::2], 1e-6)


def test_a_state_survives_files_and_moves(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    _, state = linear_attention_with_state(*qkv(L=70, dtype=torch.bfloat16), **options_of("auto", "cpu"))
    safetensors.save_file(state._asdict(), tmp_path / "state")
    loaded = ToeplitzState(**safetensors.load_file(tmp_path / "state"))
    for other in (loaded, pickle.loads(pickle.dumps(state)), state.detach(), state.to("cpu")):
        for name, x in state._asdict().items():
            assert_same_bits(name, getattr(other, name), x)
    assert [x.dtype for x in state.to(torch.float64)] == [torch.float64] * 4 + [torch.bool]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zeros_is_what_a_call_starts_from(dtype, impl, device):
    q, k, v = qkv(L=70, dtype=dtype, device=device)
    options = options_of(impl, device)
    expected = linear_attention_with_state(q, k, v, **options)
    got = linear_attention_with_state(q, k, v, state=ToeplitzState.zeros(2, 2, 8, 12, device=device), **options)
    assert_near(got.output, expected.output, 1e-2 if dtype != torch.float32 else 1e-5)
    assert [x.dtype for x in got.state] == [torch.float32] * 3 + [dtype, torch.bool]
    for x, y in zip(got.state, expected.state, strict=True):
        assert_same_bits("state", x, y)


@pytest.mark.parametrize("reach", [0, 3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [*FAVOR_KINDS, "centred", "elu"])
def test_one_token_in_one_kernel_equals_the_same_in_torch(kind, dtype, reach):
    if missing():
        pytest.skip("there is no kernel")
    g = torch.Generator().manual_seed(reach)
    centred = kind == "centred"
    feature = kind
    if kind != "elu":
        feature = Favor(6, 10, "positive" if centred else kind, normalize="l2", center_keys=centred)

    def draw(heads, n, dim=6):
        return torch.randn(2, heads, n, dim, generator=g, dtype=dtype)

    if centred:
        feature.calibrate(draw(2, 20).float())
    bias = torch.randn(4, 2 * reach + 1, generator=g, dtype=dtype)
    options = {"feature_map": feature, "is_causal": True, "rpe_bias": bias, "enable_gqa": True}
    padded = torch.rand(2, 7, generator=g) < 0.4
    before = draw(4, 7), draw(2, 7), draw(2, 7, 5)
    state = linear_attention_with_state(*before, key_padding_mask=padded, **options).state
    for _ in range(3):
        token = draw(4, 1), draw(2, 1), draw(2, 1, 5)
        fused = linear_attention_with_state(*token, state=state, **options)
        # what asks for gradients runs in torch's operations
        plain = linear_attention_with_state(token[0].requires_grad_(), *token[1:], state=state, **options)
        for a, b in zip((fused.output, *fused.state), (plain.output, *plain.state), strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)
        state = fused.state


@pytest.mark.parametrize("n_features", [8, 20])
@pytest.mark.parametrize("reach", [1, 6, 40])
def test_a_state_may_be_stepped_from_again_and_again(reach, n_features, impl, device):
    """By a search that tries one token, then another: every state on the way stays good."""
    q, k, v = qkv(L=30, D=n_features, device=device)
    options = options_of(impl, device, reach)
    states = [ToeplitzState.zeros(2, 2, n_features, 12, device=device)]
    with torch.no_grad():
        whole = linear_attention(q, k, v, **options)
        for t in range(30):
            token = [x[:, :, t : t + 1] for x in (q, k, v)]
            wrong = linear_attention_with_state(*(2 * x for x in token), state=states[t], **options)
            right = linear_attention_with_state(*token, state=states[t], **options)
            linear_attention_with_state(*(3 * x for x in token), state=wrong.state, **options)
            assert_near(right.output, whole[:, :, t : t + 1])
            states.append(right.state)
        for t in (29, 3, 17, 0):
            again = linear_attention_with_state(*(x[:, :, t : t + 1] for x in (q, k, v)), state=states[t], **options)
            assert_near(again.output, whole[:, :, t : t + 1])
            for x, y in zip(again.state, states[t + 1], strict=True):
                assert_same_bits("state", x, y)


# as many heads as make whole parts, a ring longer than them
@pytest.mark.parametrize("heads", [1, 2])
def test_a_ring_of_many_segments_is_split_as_one_call(heads, kernel, device):
    tensors = qkv(B=1, H=heads, L=1400, device=device)
    for reach in (600, 700):
        options = options_of(kernel, device, reach, heads)
        whole = linear_attention(*tensors, **options)
        assert_near(in_parts(tensors, [0, 600, 1400], **options)[0], whole)
        assert_near(in_parts(tensors, [0, 700, 1399, 1400], **options)[0], whole)
