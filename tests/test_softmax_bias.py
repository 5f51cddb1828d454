"""softmax_attention(rpe_bias=...): the bias by offset, in the tiles of the CPU and in the definition."""

import math

import pytest
import torch

import longattn
from longattn import softmax_attention

# B, Hq, H, L, S, D, K
CASES = (
    (1, 2, 2, 1, 1, 4, 0),
    (2, 2, 1, 70, 70, 16, 3),
    (1, 2, 2, 200, 90, 8, 300),
    (1, 4, 2, 90, 200, 12, 100),
    (1, 1, 1, 1200, 1200, 8, 64),
)


def build(case, dtype=torch.float32):
    B, Hq, H, L, S, D, K = case
    g = torch.Generator().manual_seed(sum(case))
    q, k, v = (torch.randn(B, h, n, D, generator=g, dtype=dtype) for h, n in ((Hq, L), (H, S), (H, S)))
    bias = torch.randn(Hq, 2 * K + 1, generator=g, dtype=torch.float64)
    if K:
        bias[0, K - 1] = -math.inf
    mask = torch.rand(B, S, generator=g) < 0.3
    return [q, k, v, bias.to(torch.promote_types(dtype, torch.float32))], mask


def run(tensors, impl, **options):
    tensors = [x.clone().requires_grad_() for x in tensors]
    *qkv, bias = tensors
    out = softmax_attention(*qkv, rpe_bias=bias, enable_gqa=True, impl=impl, **options)
    g = torch.Generator().manual_seed(0)
    grad = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)
    return out, *torch.autograd.grad(out, tensors, grad)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tiles_agree_with_the_definition(case, is_causal, window):
    tensors, mask = build(case)
    options = {"is_causal": is_causal, "key_padding_mask": mask, "window": window}
    got = run(tensors, "cpu", **options)
    wanted = run([x.double() for x in tensors], "reference", **options)
    for name, x, y in zip(("out", "dq", "dk", "dv", "dbias"), got, wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-5 * (1 + y.abs().max().item()), msg=name)


def test_gradients_pass_gradcheck():
    tensors, _ = build((1, 2, 1, 5, 7, 4, 3), torch.float64)
    tensors[3][0, 2] = 0.5

    def f(q, k, v, bias):
        return softmax_attention(q, k, v, rpe_bias=bias, enable_gqa=True, impl="cpu")

    assert torch.autograd.gradcheck(f, [x.requires_grad_() for x in tensors])


def test_a_bias_of_zero_and_a_constant_change_nothing():
    (q, k, v, _), _ = build(CASES[4])
    plain = softmax_attention(q, k, v, is_causal=True, impl="cpu")
    for constant in (0.0, 3.0):
        biased = softmax_attention(q, k, v, is_causal=True, rpe_bias=torch.full((9,), constant))
        torch.testing.assert_close(biased, plain, rtol=1e-5, atol=1e-6)


def test_a_bias_of_minus_infinity_is_a_window():
    (q, k, v, _), _ = build(CASES[4])
    bias = torch.full((21,), -math.inf)
    bias[1:-1] = 0
    torch.testing.assert_close(
        softmax_attention(q, k, v, rpe_bias=bias), softmax_attention(q, k, v, window=10, impl="cpu")
    )


def test_the_same_bits_for_any_number_of_threads():
    tensors, _ = build(CASES[4])
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run(tensors, "cpu", is_causal=True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("bias", "words"),
    [
        (torch.zeros(2, 4), "odd"),
        (torch.zeros(3, 5), "2K\\+1"),
        (torch.tensor([math.nan]), "finite"),
        ([0.0], "tensor"),
    ],
)
def test_bad_biases_get_a_sentence(bias, words):
    (q, k, v, _), _ = build(CASES[1])
    with pytest.raises((ValueError, TypeError), match=words):
        softmax_attention(q, k, v, enable_gqa=True, rpe_bias=bias)


def test_explain_says_why_not_torch():
    (q, k, v, bias), _ = build(CASES[4])
    assert "rpe_bias" in longattn.explain(softmax_attention, q, k, v, rpe_bias=bias).reasons["torch"]
