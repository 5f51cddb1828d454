"""Relative positions at the public door: what explain says, what is refused, and the Toeplitz product alone."""

import math

import pytest
import torch
from _toeplitz import bias_of
from torch.autograd import gradcheck, gradgradcheck

from longattn import (
    Favor,
    LinearState,
    ToeplitzState,
    explain,
    linear_attention,
    linear_attention_with_state,
    native,
    toeplitz_matvec,
)
from longattn.ops import _toeplitz, _toeplitz_fft, toeplitz
from longattn.testing.assertions import assert_near, assert_same_bits
from longattn.testing.cases import draw, qkv
from longattn.testing.toeplitz import BY_NAME, build_toeplitz, run_toeplitz

Q, K, V = qkv(L=6, D=4, E=5)
BIAS = bias_of(reach=2)
L2 = Favor(4, 8, normalize="l2")


# the method


@pytest.mark.parametrize(
    ("L", "reach", "is_causal", "options", "method", "why"),
    [
        (500, 20, True, {}, "prefix", "clipped short of the length"),
        (500, 499, True, {}, "tiles", "every offset"),
        (300, 900, False, {}, "tiles", "every offset"),
        (500, 20, False, {"rpe_method": "tiles"}, "tiles", "as asked for"),
        (500, 20, True, {"rpe_method": "fft"}, "fft", "as asked for"),
        (2**20, 2**20, True, {}, "fft", "reaches further"),
        (2**20, 200, True, {}, "prefix", "clipped"),
        (2**20, 2**19, False, {}, "fft", "reaches further"),
    ],
)
def test_explain_names_the_method_and_why(L, reach, is_causal, options, method, why, kernel, device):
    q, k, v = (torch.empty(1, 1, 1, 8, device=device).expand(1, 2, L, 8) for _ in range(3))
    bias = torch.zeros(1, 1, device=device).expand(2, 2 * reach + 1)
    said = str(explain(linear_attention, q, k, v, rpe_bias=bias, is_causal=is_causal, impl=kernel, **options))
    assert f"method {method}: " in said
    assert why in said


def test_packed_sequences_and_states_never_take_the_fft(kernel, device):
    q, k, v = (torch.empty(1, 1, 1, 8, device=device).expand(1, 2, 2**20, 8) for _ in range(3))
    bias = torch.zeros(1, 1, device=device).expand(2, 2**21 - 1)
    cu_seqlens = torch.tensor([0, 2**20], dtype=torch.int32, device=device)
    assert "method tiles" in str(explain(linear_attention, q, k, v, rpe_bias=bias, cu_seqlens=cu_seqlens, impl=kernel))
    said = explain(linear_attention_with_state, q, k, v, rpe_bias=bias, is_causal=True, impl=kernel)
    assert "method prefix: the method that carries a state" in str(said)


def test_the_reference_says_that_it_has_no_method():
    assert "forms all pairs" in str(explain(linear_attention, Q, K, V, rpe_bias=BIAS, impl="reference"))


def test_the_crossover_grows_with_the_cost_of_transforms():
    def crossover(*shape):
        return next(n for n in range(12, 30) if _toeplitz.prefers_fft(2**n, *shape))

    for device in ("cpu", "cuda"):
        for is_causal in (True, False):
            by_features = [crossover(device, M, 64, is_causal) for M in (1, 8, 16, 32, 64, 128, 256)]
            assert by_features == sorted(by_features)
            assert by_features[0] < by_features[-1]
        assert crossover(device, 64, 64, True) >= crossover(device, 64, 64, False)


# refusals

NAN_BIAS, INF_BIAS = (BIAS.clone().index_fill_(1, torch.tensor([1]), x) for x in (math.nan, math.inf))
FAR_KEY = Favor(4, 8, normalize="l2", center_keys=True)
BAD = {
    "no tensor": ({"rpe_bias": [0.0]}, TypeError, "rpe_bias must be a tensor of float32, .* got list"),
    "integers": ({"rpe_bias": BIAS.long()}, TypeError, "rpe_bias must be a tensor of float32, .* got int64"),
    "even": ({"rpe_bias": BIAS[:, :4]}, ValueError, r"\[2, 2K\+1\], or \[2K\+1\] for all heads: .*got \[2, 4\]"),
    "other heads": ({"rpe_bias": bias_of(3)}, ValueError, r"rpe_bias must be \[2, 2K\+1\].*got \[3, 41\]"),
    "a batch": ({"rpe_bias": BIAS[None]}, ValueError, r"rpe_bias must be .*got \[1, 2, 5\]"),
    "nothing": ({"rpe_bias": BIAS[:, :0]}, ValueError, r"rpe_bias must be .*got \[2, 0\]"),
    "elsewhere": ({"rpe_bias": BIAS.to("meta")}, ValueError, "rpe_bias is on meta and query on cpu"),
    "NaN": ({"rpe_bias": NAN_BIAS}, ValueError, "rpe_bias must hold finite numbers"),
    "infinity": ({"rpe_bias": INF_BIAS}, ValueError, "rpe_bias must hold finite numbers"),
    "method": ({"rpe_method": "dense"}, ValueError, "rpe_method must be one of 'auto', .*'fft', got 'dense'"),
    "no bias": ({"rpe_bias": None, "rpe_method": "fft"}, ValueError, "rpe_method is for calls with an rpe_bias"),
    "Favor": ({"feature_map": Favor(4, 8)}, ValueError, "rpe_bias needs a Favor map with normalize='l2'"),
    "exact diagonal": (
        {"feature_map": Favor(4, 8, normalize="l2", exact_diagonal=True), "is_causal": True},
        ValueError,
        "rpe_bias and exact_diagonal exclude each other",
    ),
    "no stored mean": ({"feature_map": FAR_KEY}, ValueError, "rpe_bias with center_keys needs a stored mean"),
    "raw sums of Favor": ({"feature_map": L2, "normalize": False}, ValueError, "only normalize=True removes"),
    "head_dim of Favor": ({"feature_map": Favor(5, 8, normalize="l2")}, ValueError, "made for head_dim 5"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_a_sentence(name):
    options, error, sentence = BAD[name]
    with pytest.raises(error, match=rf"^linear_attention: .*{sentence}") as caught:
        linear_attention(Q, K, V, **{"rpe_bias": BIAS, **options})
    assert "\n" not in str(caught.value)


STATE = ToeplitzState.zeros(2, 2, 4, 5)
HELD = ToeplitzState(STATE.kv, STATE.k_sum, K[:, :, :3], V[:, :, :3], torch.zeros(2, 3, dtype=torch.bool))
BAD_STREAM = {
    "not causal": ({"is_causal": False}, ValueError, "a state with rpe_bias needs is_causal=True"),
    "packed": (
        {"q": Q[:1], "k": K[:1], "v": V[:1], "cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)},
        ValueError,
        "packed sequences have no state with rpe_bias",
    ),
    "tiles": ({"rpe_method": "tiles"}, ValueError, "a state is carried by rpe_method='prefix', got 'tiles'"),
    "another kind": ({"state": LinearState.zeros(2, 2, 4, 5)}, TypeError, "state must be a ToeplitzState, got LinearS"),
    "more queries": ({"k": K[:, :, :3], "v": V[:, :, :3], "state": STATE}, ValueError, "got 6 and 3"),
    "features": ({"state": ToeplitzState.zeros(2, 2, 3, 5)}, ValueError, r"state.kv must be .*\[2, 2, 4, 5\]"),
    "half": ({"state": STATE.to(torch.float16)}, TypeError, "state.kv must be torch.float32"),
    "a longer ring": ({"state": HELD}, ValueError, "the state holds 3 keys and rpe_bias reaches 2"),
    "values": ({"state": HELD._replace(ring_value=K[:, :, :3]), "rpe_bias": bias_of()}, ValueError, "state.ring_value"),
    "no mask": ({"state": HELD._replace(ring_mask=None), "rpe_bias": bias_of()}, TypeError, "state.ring_mask"),
}


@pytest.mark.parametrize("name", BAD_STREAM)
def test_a_stream_of_another_kind_is_refused_in_a_sentence(name):
    options, error, sentence = BAD_STREAM[name]
    options = {"q": Q, "k": K, "v": V, "rpe_bias": BIAS, "is_causal": True, **options}
    tensors = [options.pop(name) for name in "qkv"]
    with pytest.raises(error, match=f"^linear_attention_with_state: .*{sentence}"):
        linear_attention_with_state(*tensors, **options)


@pytest.mark.parametrize("method", ["prefix", "fft"])
def test_wrong_boundaries_are_refused_in_a_sentence(method, kernel, device):
    if device == "cuda" and method == "prefix":
        pytest.skip("reading them would wait for the device")
    q, k, v = (x[:1].to(device) for x in (Q, K, V))
    for bounds in ((0, 4, 2, 6), (0, 5), (1, 6), (0, 7)):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
        options = {"rpe_bias": BIAS.to(device), "rpe_method": method, "impl": kernel}
        with pytest.raises(ValueError, match="longattn: cu_seqlens must start at 0, never decrease and end at"):
            linear_attention(q, k, v, cu_seqlens=cu_seqlens, **options)


def test_a_callable_map_gives_its_features_dtype(impl, device):
    q, k, v = (x.to(device).bfloat16() for x in (Q, K, V))
    bias = BIAS.to(device)
    output = linear_attention(q, k, v, rpe_bias=bias, feature_map=lambda x: x.float().exp(), impl=impl)
    tensors = (q.float().exp(), k.float().exp(), v.float())
    assert output.dtype == torch.float32
    assert_same_bits("output", output, linear_attention(*tensors, rpe_bias=bias, feature_map="identity", impl=impl))


# the product alone


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 2, 63, 100, 1009])
def test_the_product_is_that_of_the_dense_matrix(n, causal):
    c, x = draw((3, 2 * n - 1), (2, 3, n, 4), dtype=torch.float64)
    i = torch.arange(n)
    dense = c[:, i - i[:, None] + n - 1]
    expected = (dense.tril() if causal else dense) @ x
    assert_near(toeplitz_matvec(c, x, causal=causal), expected, 1e-13)
    assert_near(toeplitz_matvec(c.float(), x.float(), causal=causal), expected, 1e-5)
    assert toeplitz_matvec(c.bfloat16(), x.bfloat16()).dtype == torch.bfloat16


def test_the_product_is_differentiable_twice_and_broadcasts():
    c, x = (y.requires_grad_() for y in draw((9,), (2, 5, 3), dtype=torch.float64))
    for causal in (False, True):
        assert gradcheck(lambda c, x, causal=causal: toeplitz_matvec(c, x, causal), (c, x))
        assert gradgradcheck(lambda c, x, causal=causal: toeplitz_matvec(c, x, causal), (c, x))
    assert toeplitz_matvec(torch.ones(2, 1, 9), torch.ones(3, 5, 4)).shape == (2, 3, 5, 4)
    assert toeplitz_matvec(torch.ones(0), torch.ones(2, 0, 4)).shape == (2, 0, 4)


def test_a_product_of_wrong_sizes_is_refused_in_a_sentence():
    for c, x, error, sentence in (
        (torch.ones(8), torch.ones(5, 3), ValueError, r"c must be \[..., 2n-1\] = \[..., 9\] for x of length 5"),
        (torch.ones(9), torch.ones(5), ValueError, r"x must have 2 dimensions or more, got \[5\]"),
        (torch.ones(9).int(), torch.ones(5, 3), TypeError, "c must be a floating tensor, got int32"),
        (torch.ones(9, device="meta"), torch.ones(5, 3), ValueError, "c is on meta and x on cpu"),
    ):
        with pytest.raises(error, match=f"^toeplitz_matvec: {sentence}"):
            toeplitz_matvec(c, x)


def test_lengths_of_transforms_are_the_next_fast_ones():
    def smooth(n):
        for p in (2, 3, 5):
            while n % p == 0:
                n //= p
        return n == 1

    for n in range(1, 600):
        step = 16 if n > 128 else 1
        assert _toeplitz_fft.fast_length(n) == next(m for m in range(n, 2 * n + 1) if smooth(m) and m % step == 0)


@pytest.mark.parametrize("size", [1, 5000, 30_000, 8 << 20])
@pytest.mark.parametrize("name", ["causal, GQA", "packed, causal=False", "random masked, causal=True"])
def test_transforms_of_torch_in_blocks_of_any_size_give_what_ours_do(name, size, monkeypatch):
    """Those surround cuFFT on a GPU, in blocks: less than a row, a few rows, a few features, all."""
    if native.missing():
        pytest.skip("there is no kernel")
    inputs = build_toeplitz(BY_NAME[name], torch.float32)
    ours = run_toeplitz(inputs, "cpu", "fft")
    monkeypatch.setattr(_toeplitz_fft, "BLOCK_BYTES", size)
    monkeypatch.setattr(toeplitz, "engine", lambda *way: _toeplitz_fft)
    for name, x in run_toeplitz(inputs, "cpu", "fft").items():
        assert_near(x, ours[name], 1e-4)
        assert not torch.equal(x, ours[name])
