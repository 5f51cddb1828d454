"""The states of FAVOR+ attention: split, carried, merged, decoded from, saved."""

import pickle
from itertools import pairwise

import pytest
import torch
from _favor import MAPS, maps, qkv
from hypothesis import given
from hypothesis import strategies as st

from longattn import Favor, FavorState, linear_attention, linear_attention_with_state
from longattn.testing.assertions import assert_near, assert_same_bits
from longattn.testing.cases import draw, segments_of


def merge(a: FavorState, b: FavorState) -> FavorState:
    scale = torch.maximum(a.log_scale, b.log_scale)
    parts = [torch.exp(x.log_scale - scale)[..., None] for x in (a, b)]
    kv = sum(x.kv * part[..., None] for x, part in zip((a, b), parts, strict=True))
    return a._replace(kv=kv, k_sum=sum(x.k_sum * p for x, p in zip((a, b), parts, strict=True)), log_scale=scale)


def sums(state: FavorState, scale: torch.Tensor):
    part = torch.exp(state.log_scale - scale)[..., None]
    return state.kv * part[..., None], state.k_sum * part


def test_states_merge_in_any_grouping(impl, device):
    q, k, v = qkv(L=200, spread=2.0, device=device)
    favor = Favor(8, 32, device=device)
    options = {"feature_map": favor, "is_causal": True, "impl": impl}
    rows = [slice(0, 3), slice(3, 70), slice(70, 199), slice(199, 200)]
    a, b, c, d = (linear_attention_with_state(q[:, :, r], k[:, :, r], v[:, :, r], **options).state for r in rows)
    whole = linear_attention_with_state(q, k, v, **options).state
    for grouped in (merge(merge(merge(a, b), c), d), merge(a, merge(b, merge(c, d))), merge(merge(a, d), merge(c, b))):
        for x, y in zip(sums(grouped, whole.log_scale), sums(whole, whole.log_scale), strict=True):
            assert_near(x, y)
    assert (whole.log_scale == merge(merge(a, b), merge(c, d)).log_scale).all()


@maps()
@given(cuts=st.lists(st.integers(0, 150), max_size=3))
def test_splitting_and_carrying_the_state_equals_one_call(case, kernel, device, cuts):
    q, k, v = qkv(spread=case.deviation, device=device)
    mask = torch.rand(2, 150, generator=torch.Generator().manual_seed(1)).to(device) < 0.3
    options = {"feature_map": case.build(8, 2, device), "is_causal": True, "impl": kernel}
    whole = linear_attention(q, k, v, key_padding_mask=mask, **options)
    state, parts, edges = None, [], [0, *sorted(cuts), 150]
    for start, stop in pairwise(edges):
        part = [x[:, :, start:stop] for x in (q, k, v)]
        output, state = linear_attention_with_state(
            *part, state=state, key_padding_mask=mask[:, start:stop], **options
        )
        parts.append(output)
    assert_near(torch.cat(parts, 2), whole, 2e-4 if case.kind == "trig" else 2e-5)


@maps()
def test_gradients_flow_through_a_carried_state(case, impl, device):
    q, k, v = (x.requires_grad_() for x in qkv(spread=case.deviation, dtype=torch.float64))
    if device == "cuda":
        pytest.skip("float64 runs on cpu and reference only")
    options = {"feature_map": case.build(8, 2).double(), "is_causal": True, "impl": impl}
    weight = draw((2, 2, 150, 12), seed=1, dtype=torch.float64)[0]
    expected = torch.autograd.grad((linear_attention(q, k, v, **options) * weight).sum(), (q, k, v))
    for edges in ((0, 70, 150), (0, 64, 65, 150), (0, 1, 149, 150)):
        state, parts = None, []
        for start, stop in pairwise(edges):
            part = [x[:, :, start:stop] for x in (q, k, v)]
            output, state = linear_attention_with_state(*part, state=state, **options)
            parts.append(output)
        grads = torch.autograd.grad((torch.cat(parts, 2) * weight).sum(), (q, k, v))
        for x, y in zip(grads, expected, strict=True):
            assert_near(x, y, 1e-10)


@maps()
def test_tokens_one_by_one_equal_one_call(case, impl, device):
    q, k, v = qkv(L=140, spread=case.deviation, device=device)
    q = torch.cat([q, 0.5 * q], 1)
    mask = torch.rand(2, 140, generator=torch.Generator().manual_seed(1)).to(device) < 0.2
    options = {"feature_map": case.build(8, 2, device), "is_causal": True, "enable_gqa": True, "impl": impl}
    whole = linear_attention(q, k, v, key_padding_mask=mask, **options)
    state, steps = None, []
    with torch.no_grad():
        for t in range(140):
            one = [x[:, :, t : t + 1] for x in (q, k, v)]
            step, state = linear_attention_with_state(*one, state=state, key_padding_mask=mask[:, t : t + 1], **options)
            steps.append(step)
    assert_near(torch.cat(steps, 2), whole, 2e-4 if case.kind == "trig" else 2e-5)


@maps(MAPS[0], MAPS[4])
def test_decoding_from_tensors_that_are_written_again_equals_one_call(case, kernel, device):
    q, k, v = qkv(L=70, device=device)
    options = {"feature_map": case.build(8, 2, device), "is_causal": True, "impl": kernel}
    tokens, state, steps = [x[:, :, :1].clone() for x in (q, k, v)], None, []
    with torch.no_grad():
        for t in range(70):
            for x, y in zip(tokens, (q, k, v), strict=True):
                x.copy_(y[:, :, t : t + 1])
            step, state = linear_attention_with_state(*tokens, state=state, **options)
            steps.append(step)
    assert_near(torch.cat(steps, 2), linear_attention(q, k, v, **options))


@maps(MAPS[0], MAPS[4])
@pytest.mark.parametrize("S", [0, 5, 63, 64, 70])
def test_keys_without_queries_fill_the_state(S, case, impl, device):
    q, k, v = qkv(L=90, device=device)
    options = {"feature_map": case.build(8, 2, device), "is_causal": True, "impl": impl}
    _, state = linear_attention_with_state(*(x[:, :, :1] for x in (q, k, v)), **options)
    end = 1 + S
    output, state = linear_attention_with_state(q[:, :, :0], k[:, :, 1:end], v[:, :, 1:end], state=state, **options)
    assert output.shape == (2, 2, 0, 12)
    rest, _ = linear_attention_with_state(*(x[:, :, end:] for x in (q, k, v)), state=state, **options)
    assert_near(rest, linear_attention(q, k, v, **options)[:, :, end:])


@maps(MAPS[0], MAPS[4])
def test_a_state_keeps_nothing_but_itself_alive(case, impl, device):
    q, k, v = qkv(L=1000, B=1, device=device)
    options = {"feature_map": case.build(8, 2, device), "is_causal": True, "impl": impl}
    _, state = linear_attention_with_state(q, k, v, **options)
    for x in state:
        assert x.untyped_storage().nbytes() == x.nbytes


@maps()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_sequences_and_padding_change_no_bit(dtype, case, kernel, device):
    q, k, v = qkv(L=237, B=1, dtype=dtype, device=device)
    favor, edges = case.build(8, 2, device), [0, 40, 40, 230, 237]
    options = {"feature_map": favor, "is_causal": True, "impl": kernel}
    cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=device)
    with segments_of(64):
        packed = linear_attention(q, k, v, cu_seqlens=cu_seqlens, **options)
        for start, stop in pairwise(edges):
            alone = linear_attention(*(x[:, :, start:stop] for x in (q, k, v)), **options)
            assert_same_bits("packed", packed[:, :, start:stop], alone)
        whole = linear_attention(q, k, v, **options)
        mask = torch.arange(237, device=device).expand(1, 237) >= 150
        padded = linear_attention(q, k, v, key_padding_mask=mask, **options)
        assert_same_bits("padded", padded[:, :, :150], whole[:, :, :150])


@maps(MAPS[0], MAPS[4])
@pytest.mark.parametrize(("L", "S"), [(3, 10), (1, 70), (70, 100), (10, 3)])
def test_causal_calls_with_a_state_align_the_last_query_with_the_last_key(L, S, case, impl, device):
    if case.exact and L > S:
        pytest.skip("refused, tested below")
    q, k, v = qkv(L=180, device=device)
    options = {"feature_map": case.build(8, 2, device), "is_causal": True, "impl": impl}
    start = 70
    _, state = linear_attention_with_state(*(x[:, :, :start] for x in (q, k, v)), **options)
    key, value = (x[:, :, start : start + S] for x in (k, v))
    query = q[:, :, start + S - L : start + S]
    output, _ = linear_attention_with_state(query, key, value, state=state, **options)
    n = min(L, S)
    expected = linear_attention(*(x[:, :, : start + S] for x in (q, k, v)), **options)[:, :, -n:]
    assert_near(output[:, :, -n:], expected)


@maps(MAPS[0], MAPS[4])
def test_selected_and_reset_rows_go_on_as_they_would_have(case, kernel, device):
    q, k, v = qkv(B=3, L=130, device=device)
    options = {"feature_map": case.build(8, 2, device), "is_causal": True, "impl": kernel}
    # a whole chunk, so that a row that starts afresh starts on a chunk's edge
    _, state = linear_attention_with_state(*(x[:, :, :64] for x in (q, k, v)), **options)
    tokens = [x[:, :, 64:] for x in (q, k, v)]
    expected, _ = linear_attention_with_state(*tokens, state=state, **options)
    order = torch.tensor([2, 0, 0], device=device)
    chosen, _ = linear_attention_with_state(*(x[order] for x in tokens), state=state.select(order), **options)
    assert_same_bits("output", chosen, expected[order])
    fresh, _ = linear_attention_with_state(*tokens, state=state.reset(torch.tensor([1], device=device)), **options)
    alone, _ = linear_attention_with_state(*(x[1:2] for x in tokens), **options)
    assert_near(fresh[1:2], alone)
    assert_same_bits("output", fresh[::2], expected[::2])


def test_a_reset_row_forgets_the_tail_of_its_chunk(kernel, device):
    q, k, v = qkv(L=12, device=device)
    options = {"feature_map": Favor(8, 16, exact_diagonal=True, device=device), "is_causal": True, "impl": kernel}
    _, state = linear_attention_with_state(*(x[:, :, :10] for x in (q, k, v)), **options)
    assert state.tail_mask.shape == (2, 10)
    last = [x[:, :, 10:11] for x in (q, k, v)]
    output, _ = linear_attention_with_state(*last, state=state.reset(torch.tensor([0], device=device)), **options)
    assert_near(output[0], v[0, :, 10:11], 1e-5)
    assert not torch.allclose(output[1], v[1, :, 10:11], atol=1e-2)


def test_a_state_survives_files_and_moves(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    q, k, v = qkv(L=70)
    _, state = linear_attention_with_state(q, k, v, feature_map=Favor(8, 16, exact_diagonal=True), is_causal=True)
    safetensors.save_file(state._asdict(), tmp_path / "state")
    loaded = FavorState(**safetensors.load_file(tmp_path / "state"))
    for other in (loaded, pickle.loads(pickle.dumps(state)), state.detach(), state.to(torch.float32)):
        for name, x in state._asdict().items():
            assert_same_bits(name, getattr(other, name), x)
    assert state.to(torch.float64).tail_mask.dtype == torch.bool
    assert state.to(torch.float64).kv.dtype == torch.float64


@maps(MAPS[0], MAPS[4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zeros_is_what_a_call_starts_from(dtype, case, impl, device):
    q, k, v = qkv(L=70, dtype=dtype, device=device)
    options = {"feature_map": case.build(8, 2, device), "is_causal": True, "impl": impl}
    state = FavorState.zeros(2, 2, 32, 12, 8, device=device)
    expected = linear_attention_with_state(q, k, v, **options)
    got = linear_attention_with_state(q, k, v, state=state, **options)
    assert_near(got.output, expected.output)
    scale = expected.state.log_scale
    for x, y in zip(sums(got.state, scale), sums(expected.state, scale), strict=True):
        assert_near(x, y)
