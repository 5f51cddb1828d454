"""`convert`: a trained attention with another mechanism, on the very same weights."""

import re

import pytest
import torch
from _attention import E, H, draw
from torch import nn

import longattn
from longattn import Favor, convert
from longattn.nn import MultiheadAttention

# the reference is chosen where nothing was compiled, and says so
pytestmark = pytest.mark.filterwarnings("ignore:linear_attention. only the dense reference")

SHAPES = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False},
    "kdim, vdim": {"kdim": 5, "vdim": 9, "batch_first": True},
}
EXTRAS = {"bias_kv": {"add_bias_kv": True}, "zero_attn": {"add_zero_attn": True, "batch_first": True}}


def trained(cls=nn.MultiheadAttention, *, dtype=torch.float64, **options):
    module = cls(E, H, dtype=dtype, **options)
    with torch.no_grad():
        for seed, p in enumerate(module.parameters()):
            p.copy_(draw(*p.shape, seed=seed) * 0.5)
    return module


def inputs(module):
    """query, key and value of the widths it takes, 6 tokens in 2 sequences"""
    lead = (2, 6) if module.batch_first else (6, 2)
    return [draw(*lead, width, seed=i) for i, width in enumerate((E, module.kdim, module.vdim))]


@pytest.mark.parametrize("options", [*SHAPES.values(), *EXTRAS.values()], ids=[*SHAPES, *EXTRAS])
def test_exact_of_torchs_is_torchs(options):
    module = trained(**options)
    made = convert(module, "exact")
    tensors = inputs(module)
    padding = torch.arange(6) >= torch.tensor([[6], [4]])
    for x, y in zip(made(*tensors, padding), module(*tensors, padding), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("mechanism", ["linear", Favor(E // H, 16, "hyperbolic"), longattn.Linear("relu")], ids=repr)
def test_equals_one_built_with_these_weights(mechanism, options):
    module = trained(**options)
    made = convert(module, mechanism, causal=True)
    built = MultiheadAttention(E, H, dtype=torch.float64, mechanism=mechanism, causal=True, **options)
    built.load_state_dict(module.state_dict(), strict=False)
    assert repr(made) == repr(built)
    assert made.state_dict().keys() == built.state_dict().keys()
    tensors = inputs(module)
    for x, y in zip(made(*tensors), built(*tensors), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("options", [*SHAPES.values(), *EXTRAS.values()], ids=[*SHAPES, *EXTRAS])
def test_parameters_are_the_same_objects(options):
    module = trained(**options)
    module.out_proj.weight.requires_grad_(False)
    made = convert(module, "exact")
    mine, theirs = dict(made.named_parameters()), dict(module.named_parameters())
    assert list(mine) == list(theirs)
    assert all(mine[name] is theirs[name] for name in mine)
    assert made.out_proj is module.out_proj
    assert type(module) is nn.MultiheadAttention
    assert not module._forward_pre_hooks


def test_an_optimizer_made_before_trains_the_result():
    module = trained(batch_first=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    made, x = convert(module, Favor(E // H, 32, learn_temperature=True)), draw(2, 5, E)
    before = made(x, x, x)[0]
    before.square().sum().backward()
    optimizer.step()
    assert not torch.equal(made(x, x, x)[0], before)
    assert made.feature_map.log_temperature.grad is not None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_mode_dtype_and_options_are_kept(dtype, training):
    module = trained(dtype=dtype, dropout=0.25, batch_first=True).train(training)
    made = convert(module, Favor(E // H))
    assert made.training is training
    assert made.feature_map.training is training
    assert made.dropout == 0.25
    assert made.batch_first
    assert {p.dtype for p in made.parameters()} == {dtype}
    x = draw(2, 5, E, dtype=dtype)
    assert made(x, x, x)[0].dtype == dtype


def test_ours_keeps_its_causality_unless_told_otherwise():
    module = MultiheadAttention(E, H, mechanism=Favor(E // H), causal=True)
    assert convert(module, "linear").causal
    assert not convert(module, "linear", causal=False).causal
    assert not convert(nn.MultiheadAttention(E, H), "linear").causal
    assert "feature_map" not in dict(convert(module, "linear").named_modules())


def test_weights_are_not_drawn_again():
    module, before = nn.MultiheadAttention(E, H), torch.get_rng_state()
    made = convert(module, "linear")
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(p.is_meta for p in made.parameters())
    # one whose weights are still to come
    assert convert(nn.MultiheadAttention(E, H, device="meta"), "linear").in_proj_weight.is_meta


def test_an_adapter_on_out_proj_stays():
    module, x = trained(batch_first=True), draw(2, 5, E)
    module.out_proj = nn.Sequential(module.out_proj, nn.Tanh())
    module.out_proj.weight, module.out_proj.bias = module.out_proj[0].weight, module.out_proj[0].bias
    assert convert(module, "exact")(x, x, x)[0].abs().max() <= 1


def test_parametrizations_are_those_of_the_source():
    module = trained(batch_first=True)
    nn.utils.parametrizations.weight_norm(module, "in_proj_weight")
    made, x = convert(module, "exact"), draw(2, 5, E)
    assert isinstance(made, MultiheadAttention)
    assert list(made.state_dict()) == list(module.state_dict())
    torch.testing.assert_close(made(x, x, x), module(x, x, x))
    with torch.no_grad():
        module.parametrizations.in_proj_weight.original0.mul_(2)
    torch.testing.assert_close(made(x, x, x), module(x, x, x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_in_torchs_encoder():
    layer = nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True)
    encoder, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 8, E)
    expected = encoder(x)
    for inner in encoder.layers:
        inner.self_attn = convert(inner.self_attn, "exact")
    torch.testing.assert_close(encoder(x), expected)
    for inner in encoder.layers:
        inner.self_attn = convert(inner.self_attn, Favor(E // H, 16))
    with torch.no_grad():
        fast = encoder(x)
    torch.testing.assert_close(fast, encoder(x))
    assert not torch.allclose(fast, expected, atol=1e-3)


class Subclass(nn.MultiheadAttention):
    pass


def hooked():
    module = nn.MultiheadAttention(E, H)
    module.register_forward_hook(lambda *arguments: None)
    return module


BAD = [
    (lambda: convert(nn.Linear(2, 2), "linear"), TypeError, "it is a torch.nn.modules.linear.Linear"),
    (lambda: convert(Subclass(E, H), "linear"), TypeError, "its class test_convert.Subclass is a subclass of torch"),
    (lambda: convert(hooked(), "linear"), ValueError, "the attention has hooks"),
    (lambda: convert(trained(add_bias_kv=True), "linear"), ValueError, "add_zero_attn need mechanism='exact'"),
    (lambda: convert(trained(add_zero_attn=True), Favor(4)), ValueError, "add_bias_kv and add_zero_attn need"),
    (lambda: convert(trained(), Favor(8)), ValueError, "the Favor is for head_dim 8, but the attention has heads of 4"),
    (lambda: convert(trained(), longattn.Linear(Favor(8))), ValueError, "(embed_dim 12 / 3 heads); pass Favor(4, ...)"),
    (lambda: convert(trained(), "quick"), ValueError, "mechanism must be one of 'exact', 'linear'"),
    (lambda: convert(trained(), 3), TypeError, "mechanism must be a name"),
    (lambda: convert(trained(), Favor(4, device="meta")), ValueError, "on the device of the weights, got cpu and meta"),
]


@pytest.mark.parametrize(("call", "error", "sentence"), BAD, ids=[sentence[:40] for *_, sentence in BAD])
def test_what_would_lose_something_is_refused_in_a_sentence(call, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        call()
