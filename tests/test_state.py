"""LinearState: what can be done with the memory between two calls."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from longattn import LinearState, linear_attention_with_state


def filled(batch=4, requires_grad=False):
    g = torch.Generator().manual_seed(0)
    kv, k_sum = torch.randn(batch, 2, 3, 5, generator=g), torch.randn(batch, 2, 3, generator=g)
    return LinearState(kv.requires_grad_(requires_grad), k_sum.requires_grad_(requires_grad))


def same(a, b):
    assert isinstance(a, LinearState)
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def test_zeros_is_what_a_call_starts_from(impl, device):
    q, k, v = (torch.randn(2, 3, 6, n, device=device) for n in (4, 4, 5))
    state = LinearState.zeros(2, 3, 4, 5, device=device)
    assert [list(x.shape) for x in state] == [[2, 3, 4, 5], [2, 3, 4]]
    assert all(x.dtype == torch.float32 and x.count_nonzero() == 0 and x.device == q.device for x in state)
    assert LinearState.zeros(1, 1, 1, 1, dtype=torch.float64).kv.dtype == torch.float64
    started = linear_attention_with_state(q, k, v, is_causal=True, state=state, impl=impl)
    fresh = linear_attention_with_state(q, k, v, is_causal=True, impl=impl)
    for x, y in zip(started.state, fresh.state, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_a_state_has_the_dtype_of_the_sums(dtype, expected, impl, device):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("float64 runs on cpu and reference only")
    x = torch.ones(1, 1, 3, 2, dtype=dtype, device=device)
    state = linear_attention_with_state(x, x, x, impl=impl).state
    assert {t.dtype for t in state} == {expected}


def test_detach_forgets_the_history_and_shares_the_values():
    state = filled(requires_grad=True)
    detached = LinearState(state.kv * 2, state.k_sum * 2).detach()
    assert not any(x.requires_grad for x in detached)
    same(detached, [x.detach() * 2 for x in state])
    assert state.detach().kv.data_ptr() == state.kv.data_ptr()


def test_to_moves_both_tensors():
    state = filled()
    assert {x.dtype for x in state.to(torch.float64)} == {torch.float64}
    assert {x.device.type for x in state.to("meta")} == {"meta"}
    assert {(x.device.type, x.dtype) for x in state.to("meta", torch.float64)} == {("meta", torch.float64)}


@pytest.mark.parametrize("rows", [[1, 3], [-1], [], [False, True, False, True]])
def test_reset_starts_the_chosen_rows_afresh(rows):
    state = filled()
    before = copy.deepcopy(state)
    index = torch.tensor(rows, dtype=torch.bool if rows and isinstance(rows[0], bool) else torch.int64)
    chosen = torch.zeros(4, dtype=torch.bool)
    chosen[index] = True
    fresh = state.reset(index)
    for x, y in zip(fresh, before, strict=True):
        assert x[chosen].count_nonzero() == 0
        assert torch.equal(x[~chosen], y[~chosen])
    same(state, before)
    assert fresh.kv.data_ptr() != state.kv.data_ptr()


def test_reset_forgets_infinities_and_nan():
    state = filled()
    state.kv[2] = float("nan")
    state.k_sum[2] = float("inf")
    fresh = state.reset(torch.tensor([2]))
    assert fresh.kv[2].count_nonzero() == 0
    assert fresh.k_sum[2].count_nonzero() == 0


@pytest.mark.parametrize("rows", [[2, 0, 0, 3], [True, False, False, True], []])
def test_select_takes_rows_in_their_order(rows):
    state = filled()
    index = torch.tensor(rows, dtype=torch.bool if rows and isinstance(rows[0], bool) else torch.int64)
    expected = [n for n, keep in enumerate(rows) if keep] if index.dtype == torch.bool else rows
    for x, y in zip(state.select(index), state, strict=True):
        assert x.shape[0] == len(expected)
        for n, row in enumerate(expected):
            assert torch.equal(x[n], y[row])


def test_gradients_pass_reset_and_select_to_the_rows_they_keep():
    state = filled(requires_grad=True)
    fresh = state.reset(torch.tensor([1, 2]))
    for x, y in zip(fresh, state, strict=True):
        (grad,) = torch.autograd.grad(x.sum(), y)
        assert grad[[1, 2]].count_nonzero() == 0
        assert (grad[[0, 3]] == 1).all()
    chosen = state.select(torch.tensor([2, 2, 0]))
    for x, y in zip(chosen, state, strict=True):
        (grad,) = torch.autograd.grad(x.sum(), y)
        assert [grad[n].flatten()[0].item() for n in range(4)] == [1, 0, 2, 0]


def test_selected_rows_go_on_as_they_would_have(impl, device):
    g = torch.Generator().manual_seed(1)
    first, second = ([torch.randn(4, 2, 9, n, generator=g).to(device) for n in (3, 3, 5)] for _ in range(2))
    state = linear_attention_with_state(*first, is_causal=True, impl=impl).state
    expected = linear_attention_with_state(*second, state=state, is_causal=True, impl=impl)
    rows = torch.tensor([3, 1], device=device)
    got = linear_attention_with_state(*(x[rows] for x in second), state=state.select(rows), is_causal=True, impl=impl)
    torch.testing.assert_close(got.output, expected.output[rows])
    restarted = state.reset(torch.tensor([0], device=device))
    got = linear_attention_with_state(*second, state=restarted, is_causal=True, impl=impl)
    fresh = linear_attention_with_state(*(x[:1] for x in second), is_causal=True, impl=impl)
    torch.testing.assert_close(got.output[:1], fresh.output)
    torch.testing.assert_close(got.output[1:], expected.output[1:])


def test_a_call_leaves_the_incoming_state_as_it_was(impl, device):
    q, k, v = (torch.randn(4, 2, 6, n, device=device) for n in (3, 3, 5))
    state = filled().to(device)
    before = copy.deepcopy(state)
    after = linear_attention_with_state(q, k, v, state=state, is_causal=True, impl=impl).state
    same(state, before)
    assert not torch.equal(after.kv, state.kv)


def test_safetensors_round_trip(tmp_path):
    state = filled()
    save_file(state._asdict(), tmp_path / "state.safetensors")
    same(LinearState(**load_file(tmp_path / "state.safetensors")), state)


def test_safetensors_round_trip_of_a_calls_result(tmp_path, impl, device):
    q, k, v = (torch.randn(1, 2, 6, n, device=device) for n in (3, 3, 5))
    state = linear_attention_with_state(q, k, v, impl=impl).state
    save_file(state._asdict(), tmp_path / "state.safetensors")
    same(LinearState(**load_file(tmp_path / "state.safetensors", device=device)), state)


def test_pickle_and_deepcopy_round_trip():
    state = filled()
    same(pickle.loads(pickle.dumps(state)), state)
    same(copy.deepcopy(state), state)


def test_its_tensors_load_with_weights_only():
    state, buffer = filled(), io.BytesIO()
    torch.save(state._asdict(), buffer)
    buffer.seek(0)
    same(LinearState(**torch.load(buffer, weights_only=True)), state)
