"""RelativeBias and NPRF: how a bias begins, and linear attention with one inside the module."""

import copy
import math
import pickle

import pytest
import torch
from _attention import draw
from torch import nn

import longattn
from longattn import NPRF, linear_attention, softmax_attention
from longattn.nn import MultiheadAttention, RelativeBias
from longattn.nn.rpe import alibi_slopes
from longattn.testing.assertions import assert_near, assert_same_bits

E, H, L = 12, 3, 40
PLAIN = NPRF(4, 16, max_distance=5)


def build(mechanism=PLAIN, *, dtype=torch.float64, **options):
    torch.manual_seed(0)
    module = MultiheadAttention(E, H, batch_first=True, mechanism=mechanism, dtype=dtype, **options)
    with torch.no_grad():
        module.rpe_bias.weight.normal_()
    return module


# the bias


@pytest.mark.parametrize(
    ("options", "shape", "weight"),
    [
        ({"max_distance": 7}, (3, 15), (3, 15)),
        ({"max_distance": 7, "clipped": False}, (3, 13), (3, 13)),
        ({"max_distance": 128, "init": "t5"}, (3, 257), (3, 32)),
        ({"max_distance": 20, "init": "t5", "n_buckets": 8, "bidirectional": False}, (3, 41), (3, 8)),
        ({"max_distance": 1, "clipped": False, "init": "alibi"}, (3, 1), (3, 1)),
    ],
)
def test_a_bias_has_a_number_for_each_offset(options, shape, weight):
    bias = RelativeBias(3, **options)
    assert bias().shape == shape
    assert dict(bias.named_parameters())["weight"].shape == weight
    assert list(bias.state_dict()) == ["weight"]
    if options.get("init") != "alibi":
        assert bias().count_nonzero() == 0


def test_alibi_begins_at_slopes_of_the_distance():
    # the published slopes of 4, 8 and 12 heads
    assert alibi_slopes(4) == [2**-2, 2**-4, 2**-6, 2**-8]
    assert alibi_slopes(8) == [2.0**-n for n in range(1, 9)]
    expected = [*(2.0**-n for n in range(1, 9)), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    assert alibi_slopes(12) == pytest.approx(expected)
    bias = RelativeBias(8, 100, init="alibi")()
    assert_same_bits("head 0", bias[0], -0.5 * torch.arange(-100.0, 101).abs())
    assert bias[3, 100 - 7] == bias[3, 100 + 7] == -7 / 16


def test_buckets_are_those_of_t5():
    """Its table for 32 buckets and distance 128, and what its decoders use."""
    two_ways = RelativeBias(1, 128, init="t5")
    behind = {0: 0, 1: 1, 7: 7, 8: 8, 11: 8, 12: 9, 15: 9, 16: 10, 22: 10, 23: 11, 31: 11, 32: 12, 45: 12, 46: 13,
              63: 13, 64: 14, 90: 14, 91: 15, 127: 15, 128: 15}  # fmt: skip
    for distance, bucket in behind.items():
        assert two_ways.bucket[128 - distance] == bucket, distance
        assert two_ways.bucket[128 + distance] == bucket + 16 * (distance > 0), distance
    one_way = RelativeBias(1, 128, init="t5", bidirectional=False)
    for distance, bucket in {0: 0, 15: 15, 16: 16, 18: 16, 19: 17, 31: 21, 32: 21, 112: 30, 113: 31, 128: 31}.items():
        assert one_way.bucket[128 - distance] == bucket, distance
    assert (one_way.bucket[128:] == 0).all()


def test_gradients_of_offsets_add_up_in_their_bucket():
    bias = RelativeBias(2, 30, init="t5", n_buckets=8)
    weight = torch.randn(2, 61, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad((bias() * weight).sum(), bias.weight)
    assert_near(grad, torch.zeros(2, 8).index_add(1, bias.bucket, weight), 1e-6)


def test_a_fixed_bias_has_no_parameter_and_is_saved():
    bias = RelativeBias(2, 9, init="alibi", trainable=False)
    assert not list(bias.parameters())
    assert list(bias.state_dict()) == ["weight"]
    assert "trainable=False" in repr(bias)


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        ((0, 5), {}, "num_heads must be a positive integer, got 0"),
        ((2, 0), {}, "max_distance must be a positive integer, got 0"),
        ((2, 5), {"init": "ones"}, "init must be one of 'zeros', 'alibi', 't5', got 'ones'"),
        ((2, 50), {"init": "t5", "n_buckets": 7}, "n_buckets must be an even number, 4 or more, got 7"),
        ((2, 8), {"init": "t5"}, "max_distance must be above 8, where 32 buckets widen, got 8"),
    ],
)
def test_a_bias_of_wrong_options_is_refused_in_a_sentence(arguments, options, sentence):
    with pytest.raises(ValueError, match=f"^RelativeBias: {sentence}"):
        RelativeBias(*arguments, **options)


@pytest.mark.parametrize("init", ["alibi", "t5"])
def test_exact_and_linear_attention_take_the_same_bias(init):
    q, k, v = (draw(2, 3, 50, 4, seed=n) for n in range(3))
    bias = RelativeBias(3, 12, init=init, dtype=torch.float64)
    with torch.no_grad():
        bias.weight.add_(draw(*bias.weight.shape))
    i = torch.arange(50)
    dense = bias()[:, (i - i[:, None]).clamp(-12, 12) + 12]
    expected = torch.softmax(q @ k.mT / 2 + dense, -1) @ v
    assert_near(softmax_attention(q, k, v, rpe_bias=bias(), impl="reference"), expected, 1e-12)
    w = torch.exp(dense) * (q.exp() @ k.exp().mT)
    linear = linear_attention(q, k, v, feature_map=torch.exp, rpe_bias=bias())
    assert_near(linear, w / w.sum(-1, keepdim=True) @ v, 1e-12)


# the mechanism


def test_each_attention_has_a_bias_and_features_of_its_own():
    first, second = build(), build()
    assert {name.partition(".")[0] for name in first.state_dict()} >= {"favor", "rpe_bias"}
    assert first.rpe_bias.weight.shape == (3, 11)
    assert first.rpe_bias is not second.rpe_bias
    assert torch.equal(first.favor.projection, second.favor.projection)
    assert first.mechanism.rpe_bias is first.rpe_bias
    assert PLAIN.rpe_bias is None
    assert PLAIN == NPRF(4, 16, 5) != NPRF(4, 16, 6)
    assert hash(PLAIN) == hash(NPRF(4, 16, 5))
    for other in (pickle.loads(pickle.dumps(first)), copy.deepcopy(first)):
        x = draw(2, L, E)
        assert_same_bits("output", other(x, x, x)[0], first(x, x, x)[0])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_module_is_the_function_and_its_weights_sum_the_values(causal, masked):
    module, x = build(causal=causal), draw(2, L, E)
    mask = torch.arange(L).expand(2, L) < 3 if masked else None
    output, weights = module(x, x, x, key_padding_mask=mask, average_attn_weights=False)
    q, k, v = (y.unflatten(-1, (H, 4)).transpose(1, 2) for y in module._project(x, x, x, True, True))
    masks = {"is_causal": causal, "key_padding_mask": mask}
    attended = linear_attention(q, k, v, feature_map=module.favor, rpe_bias=module.rpe_bias(), **masks)
    assert_near(output, module.out_proj(attended.transpose(1, 2).flatten(2)), 1e-12)
    assert_near(weights @ v, attended, 1e-12)
    assert not causal or weights.triu(1).count_nonzero() == 0
    seen = weights.sum(-1)
    assert ((seen - 1).abs() < 1e-12).all() or (masked and causal and (seen[:, :, :3] == 0).all())


def test_keys_of_another_length_count_from_the_start():
    module, x, y = build(), draw(2, 7, E), draw(2, 11, E, seed=1)
    output, weights = module(x, y, y)
    assert output.shape == (2, 7, E)
    assert weights.shape == (2, 7, 11)
    # a key that no other offset reaches: what the bias says of its offset from the query
    before = weights[:, 3, 4].clone()
    with torch.no_grad():
        module.rpe_bias.weight[:, 5 + 1] += 3
    after = module(x, y, y)[1]
    assert (after[:, 3, 4] > before).all()
    assert (after[:, 3, 5] < weights[:, 3, 5]).all()


def test_bias_features_and_projections_train():
    module = build(NPRF(4, 16, max_distance=5, learn_temperature=True), causal=True, dtype=torch.float32)
    x = draw(2, L, E, dtype=torch.float32)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (module(x, x, x, need_weights=False)[0] - x.roll(1, 1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, p in module.named_parameters():
        # the softmax-like quotient does not see what is added to all scores of a query
        if name != "in_proj_bias":
            assert p.grad.count_nonzero() > 0, name
    assert module.rpe_bias.weight.grad[:, 6:].count_nonzero() == 0
    assert math.isclose(module.rpe_bias.weight.grad.sum().item(), 0, abs_tol=1e-6)


def test_dropout_acts_on_the_output():
    module, x = build(dropout=0.5), draw(2, L, E)
    assert not torch.equal(module(x, x, x)[0], module(x, x, x)[0])
    module.eval()
    assert torch.equal(module(x, x, x)[0], module(x, x, x)[0])


def test_an_encoder_layer_and_half_precision_take_it():
    layer = nn.TransformerEncoderLayer(E, H, 24, batch_first=True).eval()
    layer.self_attn = build(NPRF(4, 16, init="alibi"), dtype=torch.float32).eval()
    x = draw(2, L, E, dtype=torch.float32)
    expected = layer(x)
    assert expected.isfinite().all()
    got = layer.bfloat16()(x.bfloat16()).float()
    assert_near(got, expected, 5e-2)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: NPRF(4, 0), "Favor: n_features must be a positive integer, got 0"),
        (lambda: NPRF(4, max_distance=0), "NPRF: max_distance must be a positive integer, got 0"),
        (lambda: NPRF(4, init="random"), "NPRF: init must be one of 'zeros', 'alibi', 't5', got 'random'"),
        (lambda: NPRF(4, rpe_method="dense"), "NPRF: rpe_method must be one of .*got 'dense'"),
        (lambda: NPRF(4, impl="gpu"), "NPRF: impl must be one of .*got 'gpu'"),
        (lambda: build(NPRF(5)), "MultiheadAttention: the NPRF is for head_dim 5, but the attention has heads of 4"),
        (
            lambda: PLAIN.attend(*[draw(1, 3, 4, 4)] * 3, is_causal=False, key_padding_mask=None, dropout_p=0.0),
            "NPRF: this description has no parameters",
        ),
    ],
)
def test_a_wrong_description_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        make()


def test_its_names_are_there():
    assert longattn.NPRF is longattn.nn.NPRF
    assert repr(NPRF(4, max_distance=9)) == "NPRF(head_dim=4, max_distance=9)"
