"""`fidelity` of a Favor map: its numbers against the dense formulas, what it warns of, what it refuses."""

import math
import re

import pytest
import torch

from longattn import Favor, fidelity
from longattn.favor import draw_projection
from longattn.fidelity import measure
from longattn.reference.favor import favor_attention

KINDS = ("positive", "hyperbolic", "relu", "trig")


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(favor, q, k, mask, is_causal):
    """Weights of the oracle and of softmax, and which pairs are visible: `[B, Hq, L, S]` each."""
    (B, Hq, L, _), (_, H, S, _) = q.shape, k.shape
    k = k.masked_fill(mask[:, None, :, None], 0)
    mean = None if not favor.center_keys else (favor.key_mean if favor.key_mean is not None else favor.mean(k, mask))
    if mean is not None and mean.dim() == 3:
        # of each batch entry: subtracted before, which the softmax does not see
        k, mean = k - mean[:, :, None], None
    identity = torch.eye(S, dtype=torch.float64).expand(B, H, S, S)
    weights, *_ = favor_attention(
        q,
        k,
        identity,
        mask,
        None,
        None,
        None,
        None,
        favor.projection.double(),
        favor.root.double(),
        mean,
        kind=favor.kind,
        l2=favor.normalize == "l2",
        is_causal=is_causal,
        exact_diagonal=favor.exact_diagonal and is_causal,
    )
    if favor.normalize == "l2":
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    visible = (~mask)[:, None, None].expand(B, Hq, L, S)
    if is_causal:
        visible = visible & torch.ones(L, S, dtype=torch.bool).tril()
    scores = q @ k.repeat_interleave(Hq // H, 1).mT / favor.temperature.double()
    p = torch.nan_to_num(scores.masked_fill(~visible, -math.inf).softmax(-1))
    return weights, p, visible


def distances(weights, p, visible):
    seen = visible.sum(-1, keepdim=True)
    equal = visible / seen.clamp_min(1)
    count = (seen > 0).sum((0, 2, 3))
    pairs = ((weights, p), (weights, equal), (p, equal))
    return [(x - y).abs().sum((0, 2, 3)) / 2 / count for x, y in pairs]


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "exact_diagonal": {"is_causal": True, "exact_diagonal": True},
    "l2": {"normalize": "l2", "temperature": 0.3},
    "stored mean": {"is_causal": True, "center_keys": True},
    "own mean": {"center_keys": True},
}


# relu has no exact diagonal
CASES = [(name, kind) for name in OPTIONS for kind in KINDS if (name, kind) != ("exact_diagonal", "relu")]


@pytest.mark.parametrize("block", [2**20, 2**12])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_distances_are_those_of_the_dense_weights(name, kind, block, monkeypatch):
    monkeypatch.setattr(fidelity, "BLOCK", block)
    options = dict(OPTIONS[name])
    is_causal = options.pop("is_causal", False)
    favor = Favor(8, 64, kind, **options)
    q, k = draw(2, 4, 140, 8), draw(2, 2, 140, 8, seed=1) + (3 if favor.center_keys else 0)
    # the first queries of a causal call see no key, whatever the padding holds
    mask = torch.rand(2, 140, generator=torch.Generator().manual_seed(2)) < 0.3
    mask[0, :5] = True
    if favor.center_keys and is_causal:
        favor.calibrate(k, mask)
    expected = distances(*dense(favor, q, k, mask, is_causal))
    found = measure(favor, q, k.masked_fill(mask[:, None, :, None], math.nan), mask, is_causal)
    for x, y in zip(found[2:], expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_own_mean_with_l2_is_of_unit_rows():
    favor, mask = Favor(8, 64, normalize="l2", center_keys=True), torch.zeros(1, 30, dtype=torch.bool)
    q, k = draw(1, 2, 30, 8), draw(1, 2, 30, 8, seed=1) + 1
    stored = Favor(8, 64, normalize="l2", center_keys=True)
    stored.calibrate(k)
    expected = distances(*dense(stored, q, k, mask, False))
    torch.testing.assert_close(favor.fidelity(q, k).error, expected[0], rtol=1e-6, atol=1e-7)


def squares(favor, q, k, sign):
    x, y = (rows * favor.root.double() for rows in (q, k))
    return (x[:, :, :, None] + sign * y[:, :, None]).square().sum(-1)


@pytest.mark.parametrize(
    ("kind", "sign", "variance"),
    [
        ("positive", 1, lambda s: (s.exp() - 1) / 64),
        ("hyperbolic", 1, lambda s: (1 - (-s).exp()) * (s.exp() - 1) / 64),
        ("trig", -1, lambda s: s.exp() * (1 - (-s).exp()) ** 2 / 64),
    ],
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_relative_variance_is_the_median_of_the_papers(is_causal, kind, sign, variance):
    favor = Favor(8, 64, kind, exact_diagonal=True)
    q, k, mask = draw(1, 2, 90, 8, scale=0.5), draw(1, 2, 90, 8, seed=1, scale=0.5), torch.arange(90)[None] % 7 == 0
    each = variance(squares(favor, q, k, sign))
    row, column = torch.arange(90)[:, None], torch.arange(90)
    far = ~mask[0] & (row == row)
    if is_causal:
        # pairs of one chunk of 64 are exact
        far = far & (column <= row) & (column // 64 != row // 64)
    expected = each[0, :, far].median(-1).values
    torch.testing.assert_close(measure(favor, q, k, mask, is_causal).relative_variance, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_effective_features_are_the_participation_ratio(is_causal, kind):
    favor, q, k = Favor(8, 32, kind), draw(2, 3, 50, 8, scale=0.5), draw(2, 3, 50, 8, seed=1, scale=0.5)
    phi_q, phi_k = favor(q), favor(k)
    x = phi_q * (phi_k.cumsum(2) if is_causal else phi_k.sum(2, keepdim=True))
    expected = (x.sum(-1) ** 2 / x.square().sum(-1)).mean((0, 2))
    found = measure(favor, q, k, None, is_causal).effective_features
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert kind == "trig" or bool(((found >= 1) & (found <= 32)).all())


def test_estimate_of_one_pair_varies_as_predicted():
    """The whole way: the spread of a single weight's estimate over many drawings."""
    q, k = draw(1, 1, 1, 4, scale=0.4), draw(1, 1, 1, 4, seed=1, scale=0.4)
    for kind in ("positive", "hyperbolic", "trig"):
        favor, found = Favor(4, 8, kind, orthogonal=False), []
        predicted = measure(favor, q, k, None, False).relative_variance.item()
        for seed in range(800):
            favor.projection = draw_projection(len(favor.projection), 4, orthogonal=False, seed=seed)
            found.append((favor(q) * favor(k)).sum())
        found = torch.stack(found) / ((q * k).sum() / 2).exp()
        assert found.var().item() == pytest.approx(predicted, rel=0.2)


def test_long_inputs_are_sampled_evenly(monkeypatch):
    favor, q, k = Favor(4, 16, "hyperbolic"), draw(2, 1, 1500, 4), draw(2, 1, 1500, 4, seed=1)
    some = favor.fidelity(q, k, is_causal=True)
    again = favor.fidelity(q, k, is_causal=True)
    assert all(torch.equal(x, y) for x, y in zip(some, again, strict=True))
    monkeypatch.setattr(fidelity, "QUERIES", 10**9)
    monkeypatch.setattr(fidelity, "PAIRS", 10**9)
    every = favor.fidelity(q, k, is_causal=True)
    for x, y in zip(some, every, strict=True):
        torch.testing.assert_close(x, y, rtol=0.1, atol=0)
        assert not torch.equal(x, y)


def test_queries_to_skip_do_not_count():
    favor, q, k = Favor(4, 16), draw(2, 2, 20, 4), draw(2, 2, 20, 4, seed=1)
    mask = torch.arange(20) >= torch.tensor([[20], [12]])
    rows = [measure(favor, q[b : b + 1, :, :n], k[b : b + 1, :, :n], None, False) for b, n in ((0, 20), (1, 12))]
    found = measure(favor, q.masked_fill(mask[:, None, :, None], math.nan), k, mask, False, skip=mask)
    for x, first, second in zip(found[1:], rows[0][1:], rows[1][1:], strict=True):
        torch.testing.assert_close(x, (20 * first + 12 * second) / 32)


def test_huge_inputs_stay_finite_where_they_can():
    favor, q, k = Favor(8, 64), draw(1, 2, 40, 8, scale=2.0**20), draw(1, 2, 40, 8, seed=1, scale=2.0**20)
    found = measure(favor, q, k, None, True)
    assert torch.isfinite(torch.stack(found[2:])).all()
    assert (found.relative_variance == math.inf).all()


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4)])
def test_nothing_to_measure_is_nan(shape):
    x = torch.zeros(shape)
    assert torch.stack(Favor(4).fidelity(x, x)).isnan().all()
    x = torch.zeros(1, 2, 3, 4)
    assert torch.stack(Favor(4).fidelity(x, x, key_padding_mask=torch.ones(1, 3, dtype=torch.bool))).isnan().all()


def test_relu_estimates_another_kernel_and_exact_chunks_estimate_nothing():
    x = draw(1, 2, 30, 8)
    assert Favor(8, kind="relu").fidelity(x, x).relative_variance.isnan().all()
    found = Favor(8, exact_diagonal=True).fidelity(x, x, is_causal=True)
    assert found.relative_variance.isnan().all()
    assert found.effective_features.isnan().all()
    assert found.error.max() < 1e-12


def test_half_precision_and_gradients_are_taken():
    x = draw(1, 2, 30, 8, scale=0.3)
    expected = Favor(8).fidelity(x, x)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found = Favor(8).fidelity(x.to(dtype).requires_grad_(), x.to(dtype))
        for y, z in zip(found, expected, strict=True):
            assert not y.requires_grad
            torch.testing.assert_close(y, z, rtol=0.05, atol=0)


# warnings


def test_warns_of_noise_and_says_what_to_do():
    x = draw(1, 2, 100, 64)
    x[:, 1] *= 0.1
    with pytest.warns(UserWarning, match="noise in head 0: .*try normalize='l2', a temperature above 8, center_keys"):
        Favor(64).fidelity(x, x)
    # what the map does already is not proposed again
    with pytest.warns(UserWarning, match="noise in heads 0, 1: .*; try a temperature above 0.05 or more than 256 "):
        Favor(64, normalize="l2", temperature=0.05, center_keys=True).fidelity(x, x)


def test_warns_of_averaging_where_softmax_does_not_average():
    # opposite directions: softmax sees the sign only, and the features see nothing but their constant
    x = torch.zeros(1, 1, 64, 8, dtype=torch.float64)
    x[..., 0] = torch.where(torch.arange(64) % 2 == 0, 4.0, -4.0)
    favor = Favor(8, 32, "relu")
    favor.projection[:, 0] = 0
    with pytest.warns(UserWarning, match="weights of head 0 are close to averaging .*use kind='positive'"):
        favor.fidelity(x, x)


@pytest.mark.filterwarnings("error")
def test_says_nothing_where_averaging_is_right_or_the_estimate_good():
    x = draw(1, 2, 100, 16, scale=0.01)
    assert Favor(16).fidelity(x, x).averaging.max() < 0.1
    x = draw(1, 2, 100, 16)
    assert Favor(16, 1024, normalize="l2").fidelity(x, x).error.max() < 0.1


# what is refused


def call(favor=None, q=(2, 3, 5, 4), k=(2, 3, 5, 4), **options):
    favor = Favor(4) if favor is None else favor
    return lambda: fidelity.fidelity(favor, *(torch.zeros(x) if isinstance(x, tuple) else x for x in (q, k)), **options)


BAD = [
    (call("positive"), TypeError, "favor must be a longattn.Favor, got str 'positive'"),
    (call(q=(3, 5, 4)), ValueError, "query must be [batch, heads, length, dim], got [3, 5, 4]"),
    (call(q=[1.0]), TypeError, "query must be a tensor, got list [1.0]"),
    (call(q=(2, 3, 5, 6), k=(2, 3, 5, 6)), ValueError, "query and key must have the map's head_dim, 4, got 6"),
    (call(k=(2, 3, 5, 6)), ValueError, "query and key must share head_dim, got 4 and 6"),
    (call(k=(1, 3, 5, 4)), ValueError, "must share the batch size, got 2, 1 and 1"),
    (call(k=(2, 2, 5, 4)), ValueError, "query heads must be a multiple of key heads, got 3 and 2"),
    (call(q=(2, 3, 4, 4), is_causal=True), ValueError, "is_causal needs as many queries as keys, got 4 and 5"),
    (call(key_padding_mask=torch.zeros(2, 4) > 0), ValueError, "key_padding_mask must be bool [B, S] = [2, 5]"),
    (call(key_padding_mask=torch.zeros(2, 5)), TypeError, "key_padding_mask must be bool [B, S] = [2, 5]"),
    (call(Favor(4, device="meta")), ValueError, "query must be on the device of the map, got cpu and meta"),
    (call(Favor(4, center_keys=True), is_causal=True), ValueError, "store it first with favor.calibrate(key)"),
]


@pytest.mark.parametrize(("ask", "error", "sentence"), BAD, ids=[sentence[:40] for *_, sentence in BAD])
def test_bad_arguments_are_refused_in_a_sentence(ask, error, sentence):
    with pytest.raises(error, match=f"^Favor.fidelity: .*{re.escape(sentence)}"):
        ask()


def test_a_mean_of_other_heads_is_refused():
    favor = Favor(4, center_keys=True)
    favor.calibrate(draw(1, 2, 5, 4))
    with pytest.raises(ValueError, match="key has 3 heads, but its mean is of 2"):
        call(favor)()
