"""Dense attention through the tile engine on the CPU: error budgets, and laws of how its work is cut."""

import functools

import pytest
import torch

from longattn import softmax_attention
from longattn.testing.assertions import (
    FORWARD_FACTOR,
    GRADIENT_FACTOR,
    HEADS,
    assert_same_bits,
    assert_within_budget,
    blocks,
)
from longattn.testing.cases import DTYPES

NAMES = ("output", "dq", "dk", "dv")
# (B, Hq, H, L, S, D, E), causal, padded: edges of vectors, tiles, groups and blocks of tiles; few keys, few queries
CASES = {
    "one token": ((1, 1, 1, 1, 1, 1, 1), True, False),
    "edge of a vector": ((1, 2, 2, 63, 63, 7, 9), True, False),
    "one tile": ((1, 2, 2, 64, 64, 16, 16), False, False),
    "one more": ((1, 2, 2, 65, 65, 33, 17), True, True),
    "a group and a block": ((1, 2, 1, 257, 300, 16, 24), False, True),
    "causal blocks": ((1, 4, 2, 333, 333, 64, 64), True, False),
    "causal, more keys": ((1, 1, 1, 100, 300, 8, 8), True, False),
    "causal, more queries": ((1, 1, 1, 300, 100, 8, 8), True, True),
    "wide": ((1, 1, 1, 70, 140, 256, 200), False, False),
    "long": ((1, 1, 1, 1009, 1009, 8, 8), True, True),
}


@functools.cache
def draw(name, dtype, seed=0):
    """q, k, v, the output's gradient, the padding mask; rounded to dtype, in float64."""
    (B, Hq, H, L, S, D, E), _, padded = CASES[name]
    g = torch.Generator().manual_seed(seed)
    sizes = ((B, Hq, L, D), (B, H, S, D), (B, H, S, E), (B, Hq, L, E))
    tensors = [torch.randn(size, generator=g, dtype=torch.float64).to(dtype).double() for size in sizes]
    padding = torch.rand(B, S, generator=g) < 0.3 if padded else None
    if padded:
        padding[:, 0] = False
    return tensors, padding


def run(name, tensors, padding, impl, **options):
    q, k, v, grad = tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = softmax_attention(
        *leaves, is_causal=CASES[name][1], enable_gqa=True, key_padding_mask=padding, impl=impl, **options
    )
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, grad)), strict=True))


def eager(name, tensors, padding):
    """The formula with every tensor in the inputs' dtype."""
    q, k, v, grad = tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    q, groups = leaves[0], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in leaves[1:])
    scores = q @ k.mT * q.shape[3] ** -0.5
    if CASES[name][1]:
        scores = scores.masked_fill(torch.ones(scores.shape[2:], dtype=torch.bool).triu(1), -torch.inf)
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None], -torch.inf)
    out = torch.softmax(scores, -1) @ v
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, grad)), strict=True))


@functools.cache
def judged(name, dtype):
    """The oracle of the first draw, and the yardstick's error in each block, the worst of many heads."""
    heads = CASES[name][0][0] * CASES[name][0][2]
    errors, first = {}, None
    for seed in range(-(-HEADS // heads)):
        tensors, padding = draw(name, dtype, seed)
        oracle = run(name, tensors, padding, "reference")
        plain = eager(name, [x.to(dtype) for x in tensors], padding)
        for key, x in oracle.items():
            error = blocks(plain[key].double() - x).amax((0, 1))
            errors[key] = torch.maximum(errors.get(key, error), error)
        first = oracle if first is None else first
    return first, errors


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
def test_errors_stay_within_the_budget(name, dtype):
    tensors, padding = draw(name, dtype)
    actual = run(name, [x.to(dtype) for x in tensors], padding, "cpu")
    yardstick = torch.float32 if dtype == torch.float64 else dtype
    oracle = run(name, tensors, padding, "reference")
    _, errors = judged(name, yardstick)
    shrink = 1 if yardstick == dtype else 4 * torch.finfo(dtype).eps / torch.finfo(yardstick).eps
    for key, x in actual.items():
        assert x.dtype == dtype
        if oracle[key].count_nonzero() == 0:
            # one key takes all the weight: no score matters
            assert x.abs().max() <= 2 * shrink * torch.finfo(yardstick).eps
            continue
        factor = FORWARD_FACTOR if key == "output" else GRADIENT_FACTOR
        assert_within_budget(f"{key} of {name!r}", x, oracle[key], shrink * errors[key], factor=factor)


@pytest.mark.parametrize("name", ["causal blocks", "a group and a block", "long"])
def test_threads_change_no_bit(name):
    tensors, padding = draw(name, torch.float32)
    tensors, threads = [x.float() for x in tensors], torch.get_num_threads()
    results = []
    try:
        # a head alone is cut into more segments than there are threads
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(name, tensors, padding, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for key in NAMES:
            assert_same_bits(key, other[key], results[0][key])


def test_the_rest_of_the_batch_changes_no_bit():
    tensors, padding = draw("causal blocks", torch.float32)
    alone = [x.float() for x in tensors]
    batch = [torch.cat([torch.randn_like(x), x, x * 2]) for x in alone]
    first, whole = run("causal blocks", alone, padding, "cpu"), run("causal blocks", batch, None, "cpu")
    for key in NAMES:
        assert_same_bits(key, whole[key][1:2], first[key])


def test_appended_padding_changes_no_valid_bit():
    q, k, v = (torch.randn(1, 2, 130, 16) for _ in range(3))
    longer = [torch.cat([x, torch.full((1, 2, 90, 16), torch.nan)], 2) for x in (k, v)]
    expected = softmax_attention(q, k, v, impl="cpu")
    padding = torch.arange(220)[None] >= 130
    assert_same_bits("output", softmax_attention(q, *longer, key_padding_mask=padding, impl="cpu"), expected)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_future_values_that_are_not_finite_stay_in_the_future(poison):
    q, k, v, grad = (torch.randn(1, 1, 200, 8) for _ in range(4))
    results = []
    for filling in (0.0, poison):
        v2, k2, g2 = v.clone(), k.clone(), grad.clone()
        v2[:, :, 130], k2[:, :, 150], g2[:, :, 40] = filling, filling, filling
        leaves = [x.requires_grad_() for x in (q.clone(), k2, v2)]
        out = softmax_attention(*leaves, is_causal=True, impl="cpu")
        results.append((out.detach(), *torch.autograd.grad(out, leaves, g2)))
    (out, dq, *_), (bad_out, bad_dq, bad_dk, bad_dv) = results
    assert_same_bits("output", bad_out[:, :, :130], out[:, :, :130])
    assert not bad_out[:, :, 130:].isfinite().any()
    # a gradient reaches the keys of its own row, which are the past
    keep = [*range(40), *range(41, 130)]
    assert_same_bits("dq", bad_dq[:, :, keep], dq[:, :, keep])
    assert bad_dv[:, :, :41].isnan().all()
    assert bad_dk[:, :, :41].isnan().all()


def test_huge_logits_neither_overflow_nor_lose_a_row():
    q, k, v = (torch.randn(1, 1, 70, 8) for _ in range(3))
    for scale in (1e9, -1e9):
        out = softmax_attention(q, k, v, scale=scale, is_causal=True, impl="cpu")
        scores = scale * q.double() @ k.double().mT
        best = scores.masked_fill(torch.ones(70, 70).triu(1).bool(), -torch.inf).argmax(-1)
        torch.testing.assert_close(out, v.gather(2, best[..., None].expand_as(v)))


def test_dropout_follows_torchs_generator_and_keeps_the_mean():
    q, k, v = (torch.randn(1, 1, 64, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def dropped(seed, *tensors):
        torch.manual_seed(seed)
        return softmax_attention(*tensors, dropout_p=0.3, impl="cpu")

    assert_same_bits("output", dropped(1, q, k, v), dropped(1, q, k, v))
    mean = torch.stack([dropped(seed, q, k, v).detach() for seed in range(400)])
    expected = softmax_attention(q, k, v, impl="reference").detach()
    assert ((mean.mean(0) - expected).abs() <= 5 * mean.std(0) / 20).all()
    short = [x.detach()[:, :, :6].requires_grad_() for x in (q, k, v)]
    torch.autograd.gradcheck(lambda *tensors: dropped(2, *tensors), short)
