"""The Favor module by itself: how its projections are distributed, redrawn and saved, what its features are."""

import copy
import functools
import json
import math
import pickle
import re
import subprocess
import sys

import pytest
import torch

import longattn
from longattn import Favor
from longattn.favor import draw_projection
from longattn.features import favor_features, favor_norm
from longattn.fidelity import relative_variance

SEEDS, D = 1000, 8


@functools.cache
def projections(orthogonal, rows=D, head_dim=D):
    """`[seeds, rows, head_dim]`, float64"""
    drawn = [draw_projection(rows, head_dim, orthogonal=orthogonal, seed=seed) for seed in range(SEEDS)]
    return torch.stack(drawn).double()


def directions(head_dim=D):
    """Unit vectors `[n, head_dim]`: where LAPACK's choice of signs shows, +-e_1 and +-1, and some others."""
    special = torch.stack([torch.eye(head_dim, dtype=torch.float64)[0], torch.full((head_dim,), head_dim**-0.5)])
    others = torch.randn(12, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.cat([special, -special, others / others.norm(dim=1, keepdim=True)])


def estimates(w, q, k, kind):
    """The estimate of exp(q.k) over exp(q.k), one for each drawing and pair. w: `[seeds, P, D]`, q, k: `[n, D]`"""
    (x, a), (y, b) = (favor_features(rows, w, kind) for rows in (q, k))
    products = (x * y).sum(-1) / favor_norm(w[0], kind)                                        # [seeds, n]
    return products * torch.exp(a + b - (q * k).sum(-1))


def pairs(length, kind):
    """q and k with |q + k| (|q - k| for trig) of this length"""
    s = length * directions()
    q = 0.3 * s + 0.2 * s.roll(1, 1)
    return q, (q - s if kind == "trig" else s - q)


def assert_mean_is_one(x):
    """Within four standard errors, for each column."""
    z = (x.mean(0) - 1) / (x.std(0) / len(x) ** 0.5)
    assert z.abs().max() < 4, z


@pytest.mark.parametrize("kind", ["positive", "hyperbolic", "trig"])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_estimate_is_right_on_average(orthogonal, kind):
    assert_mean_is_one(estimates(projections(orthogonal), *pairs(1.5, kind), kind))


def test_estimate_in_two_dimensions_is_right_on_average():
    s = 1.5 * directions(2)
    assert_mean_is_one(estimates(projections(True, rows=2, head_dim=2), s / 2, s / 2, "positive"))


@pytest.mark.parametrize("head_dim", [2, 8])
def test_lapacks_own_signs_would_fail_that_test(head_dim):
    g = torch.randn(SEEDS, head_dim, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norms = torch.randn(g.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).norm(dim=2)
    q, r = torch.linalg.qr(g)
    s = 1.5 * directions(head_dim)
    with pytest.raises(AssertionError):
        assert_mean_is_one(estimates(q.mT * norms[..., None], s / 2, s / 2, "positive"))
    signs = torch.where(r.diagonal(dim1=1, dim2=2) < 0, -1, 1)[:, None]
    assert_mean_is_one(estimates((q * signs).mT * norms[..., None], s / 2, s / 2, "positive"))


@pytest.mark.parametrize(("kind", "share"), [("positive", 0.9), ("hyperbolic", 0.6)])
def test_orthogonal_projections_vary_less(kind, share):
    q, k = pairs(1.0, kind)
    orthogonal, independent = (estimates(projections(x), q, k, kind).var(0).mean() for x in (True, False))
    assert orthogonal < share * independent


@pytest.mark.parametrize("length", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["positive", "hyperbolic", "trig"])
def test_variance_is_the_papers_for_independent_projections(kind, length):
    found = estimates(projections(False, rows=32), *pairs(length, kind), kind).var(0).mean()
    n_features = 32 if kind == "positive" else 64
    expected = relative_variance(torch.tensor(length**2, dtype=torch.float64), kind, n_features)
    assert found.item() == pytest.approx(expected.item(), rel=0.1)


@pytest.mark.parametrize("rows", [3, 8, 21])
def test_blocks_of_head_dim_rows_are_orthogonal(rows):
    w = draw_projection(rows, D, seed=5).double()
    assert w.shape == (rows, D)
    for block in w.split(D):
        gram = block @ block.mT
        assert (gram - gram.diagonal().diag()).abs().max() < 1e-5
    for x, y in zip(w.split(D), w.split(D)[1:], strict=False):
        assert (x @ y.mT).abs().max() > 0.1


@pytest.mark.parametrize("orthogonal", [True, False])
def test_row_norms(orthogonal):
    squares = projections(orthogonal).square().sum(-1).flatten()
    # chi squared: mean D, variance 2D
    assert abs(squares.mean() - D) < 4 * (2 * D / len(squares)) ** 0.5
    assert squares.var().item() == pytest.approx(2 * D, rel=0.1)
    fixed = draw_projection(20, D, orthogonal=orthogonal, scaling="regularized")
    torch.testing.assert_close(fixed.norm(dim=1), torch.full((20,), D**0.5))


# the same in every process


DRAWINGS = [(0, 0), (0, 1), (1, 0), (1, 1), (-1, 0), (2**32, 0), (2**63 + 5, 12345), (0, 2**20)]


def drawn(seed, step):
    favor = Favor(5, 7, seed=seed)
    favor.redraw(step)
    return favor.projection


def test_redraw_is_a_function_of_seed_and_step_in_any_process():
    script = f"""
import json, longattn
out = []
for seed, step in {DRAWINGS}:
    favor = longattn.Favor(5, 7, seed=seed)
    favor.redraw(99)
    favor.redraw(step)
    out.append(favor.projection.tolist())
print(json.dumps(out))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (seed, step), theirs in zip(DRAWINGS, json.loads(done.stdout), strict=True):
        assert torch.equal(torch.tensor(theirs), drawn(seed, step))


def test_other_seeds_and_steps_draw_other_projections():
    different = {tuple(drawn(seed, step).flatten().tolist()) for seed, step in DRAWINGS}
    assert len(different) == len(DRAWINGS)
    assert torch.equal(Favor(5, 7, seed=3).projection, drawn(3, 0))


def test_redraw_leaves_the_global_generator_and_the_temperature():
    favor = Favor(4, 6, temperature=3.0, learn_temperature=True)
    before, buffer = torch.get_rng_state(), favor.projection
    favor.redraw(1)
    assert torch.equal(before, torch.get_rng_state())
    # in place: what holds the buffer sees the new one
    assert favor.projection is buffer
    assert favor.temperature.item() == pytest.approx(3.0)


# saved, copied, cast


def calibrated(**options):
    favor = Favor(4, 8, center_keys=True, **options)
    favor.calibrate(torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0)))
    return favor


@pytest.mark.parametrize("has_mean", [False, True])
@pytest.mark.parametrize("loads_into_mean", [False, True])
def test_state_dict_round_trip(loads_into_mean, has_mean):
    options = {"temperature": 2.5, "seed": 4}
    saved = calibrated(**options) if has_mean else Favor(4, 8, center_keys=True, **options)
    loaded = calibrated() if loads_into_mean else Favor(4, 8, center_keys=True)
    saved.redraw(3)
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded.projection, saved.projection)
    assert loaded.temperature == saved.temperature
    assert (loaded.key_mean is None) == (not has_mean)
    assert not has_mean or torch.equal(loaded.key_mean, saved.key_mean)


def test_a_state_dict_without_this_module_keeps_its_mean():
    favor = calibrated()
    model = torch.nn.ModuleDict({"favor": favor, "other": torch.nn.Linear(2, 2)})
    model.load_state_dict({f"other.{k}": v for k, v in model["other"].state_dict().items()}, strict=False)
    assert favor.key_mean is not None


def pickled(x):
    return pickle.loads(pickle.dumps(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("make", [Favor, calibrated], ids=["without mean", "with mean"])
def test_copies_are_equal_and_apart(make, copied):
    favor = make(4, 8, seed=2) if make is Favor else make(seed=2)
    x = torch.randn(3, 4)
    other = copied(favor)
    assert torch.equal(other(x), favor(x))
    assert (other.key_mean is None) == (favor.key_mean is None)
    assert repr(other) == repr(favor)
    other.redraw(1)
    assert not torch.equal(other(x), favor(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model_keeps_its_projections(dtype):
    favor, x = calibrated(temperature=7.3, learn_temperature=True), torch.randn(6, 4)
    expected = favor(x)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), favor).to(dtype)
    assert model[0].weight.dtype == dtype
    assert torch.equal(favor(x), expected)
    assert favor.key_mean.dtype == torch.float32


def test_temperature_is_learnt_on_request_only():
    assert not list(Favor(4, 8).parameters())
    favor = Favor(4, 8, learn_temperature=True)
    favor(torch.randn(5, 4)).sum().backward()
    assert favor.log_temperature.grad.abs() > 0


def test_mean_is_of_the_keys_that_are_not_padded():
    key = torch.randn(3, 2, 6, 4, dtype=torch.float64)
    mask = torch.arange(6) >= torch.tensor([[6], [2], [0]])
    key.masked_fill_(mask[:, None, :, None], math.nan)
    favor = Favor(4, 8, center_keys=True)
    favor.calibrate(key, mask)
    expected = torch.stack([key[:, h][~mask].mean(0) for h in range(2)])
    torch.testing.assert_close(favor.key_mean, expected)
    with_l2 = Favor(4, 8, center_keys=True, normalize="l2")
    with_l2.calibrate(key, mask)
    units = torch.stack([torch.nn.functional.normalize(key[:, h][~mask], dim=1).mean(0) for h in range(2)])
    torch.testing.assert_close(with_l2.key_mean, units)


# what it computes, and what it refuses


@pytest.mark.parametrize("normalize", [None, "l2"])
def test_features_are_the_papers(normalize):
    x = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = x / x.norm(dim=1, keepdim=True) if normalize else x
    rows = rows / (1.7**0.5)
    for kind in longattn.features.FAVOR_KINDS:
        favor = Favor(5, 12, kind, temperature=1.7, normalize=normalize).double()
        u, g = rows @ favor.projection.mT, rows.square().sum(-1, keepdim=True) / 2
        expected = {
            "positive": torch.exp(u - g) / 12**0.5,
            "hyperbolic": torch.cat([torch.exp(u - g), torch.exp(-u - g)], -1) / 12**0.5,
            "relu": (u.clamp_min(0) + 1e-3) / 12**0.5,
            "trig": torch.cat([u.sin(), u.cos()], -1) * torch.exp(g) / 6**0.5,
        }[kind]
        torch.testing.assert_close(favor(x), expected, rtol=1e-6, atol=1e-12)


def centring() -> Favor:
    return Favor(4, center_keys=True)


BAD = [
    (lambda: Favor(0), ValueError, "head_dim must be a positive integer, got 0"),
    (lambda: Favor(4.0), ValueError, "head_dim must be a positive integer, got 4.0"),
    (lambda: Favor(4, 0), ValueError, "n_features must be a positive integer, got 0"),
    (lambda: Favor(4, -2), ValueError, "n_features must be a positive integer, got -2"),
    (lambda: Favor(4, True), ValueError, "n_features must be a positive integer, got True"),
    (lambda: Favor(4, 7, "hyperbolic"), ValueError, "n_features must be even, got 7"),
    (lambda: Favor(4, 7, "trig"), ValueError, "n_features must be even, got 7"),
    (lambda: Favor(4, kind="cosh"), ValueError, "'positive', 'hyperbolic', 'relu', 'trig', got 'cosh'"),
    (lambda: Favor(4, scaling="none"), ValueError, "scaling must be one of 'random', 'regularized', got 'none'"),
    (lambda: Favor(4, normalize="l1"), ValueError, "normalize must be one of None, 'l2', got 'l1'"),
    (lambda: Favor(4, temperature=math.nan), ValueError, "temperature must be a positive finite number, got nan"),
    (lambda: Favor(4, temperature=math.inf), ValueError, "temperature must be a positive finite number, got inf"),
    (lambda: Favor(4, temperature=0.0), ValueError, "temperature must be a positive finite number, got 0.0"),
    (lambda: Favor(4, temperature=True), ValueError, "temperature must be a positive finite number, got True"),
    (lambda: Favor(4, temperature=1e-90), ValueError, "temperature must be a positive finite number, got 1e-90"),
    (lambda: Favor(4, temperature=10**400), ValueError, "temperature must be a positive finite number, got 1000"),
    (lambda: Favor(torch.ones(3)), ValueError, "head_dim must be a positive integer, got float32 [3] on cpu"),
    (lambda: Favor(4, temperature="hot"), ValueError, "temperature must be a positive finite number, got 'hot'"),
    (lambda: Favor(4, seed=0.5), TypeError, "seed must be an integer, got 0.5"),
    (lambda: Favor(4, 8, "relu", exact_diagonal=True), ValueError, "kind='relu' estimates another"),
    (lambda: Favor(4).redraw(1.0), TypeError, "step must be an integer, got 1.0"),
    (lambda: Favor(4)(torch.ones(3, 5)), ValueError, "x must be [..., 4], got float32 [3, 5] on cpu"),
    (lambda: centring().calibrate(torch.ones(3, 4)), ValueError, "key must be [batch, heads, length, 4]"),
    (lambda: Favor(4).calibrate(torch.ones(1, 1, 3, 4)), ValueError, "make it with center_keys=True"),
    (lambda: Favor(4, seed=True), TypeError, "seed must be an integer, got True"),
    (lambda: centring().calibrate(torch.ones(2, 1, 0, 4)), ValueError, "there must be a key that is not padded"),
    (
        lambda: centring().calibrate(torch.ones(2, 1, 3, 4), torch.ones(2, 3, dtype=torch.bool)),
        ValueError,
        "there must be a key that is not padded",
    ),
    (
        lambda: centring().calibrate(torch.ones(2, 1, 3, 4), torch.ones(3, 2, dtype=torch.bool)),
        ValueError,
        "key_padding_mask must be bool [B, S] = [2, 3]",
    ),
]


@pytest.mark.parametrize(("call", "error", "sentence"), BAD, ids=[sentence[:40] for *_, sentence in BAD])
def test_bad_arguments_are_refused_in_a_sentence(call, error, sentence):
    with pytest.raises(error, match=f"^Favor.*{re.escape(sentence)}"):
        call()
