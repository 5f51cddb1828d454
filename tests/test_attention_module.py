"""Laws of nn.MultiheadAttention: torch's module where the mechanism is exact, and what holds for every mechanism."""

import copy
import functools
import io
import itertools
import pickle
import random
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import longattn
from longattn.nn import MultiheadAttention, attention, mechanisms
from longattn.reference import linear as reference
from longattn.testing.assertions import assert_same_bits

E, H = 12, 3
MECHANISMS = {"exact": "exact", "linear": longattn.Linear(), "relu": longattn.Linear("relu", normalize=False)}
# the reference is chosen where nothing was compiled, and says so
pytestmark = pytest.mark.filterwarnings("ignore:linear_attention. only the dense reference")


@pytest.fixture(params=MECHANISMS)
def mechanism(request):
    return MECHANISMS[request.param]


def build(mechanism="exact", *, seed=0, dtype=torch.float64, batch_first=True, **options):
    """A module whose every parameter is random, biases too."""
    module = MultiheadAttention(E, H, batch_first=batch_first, mechanism=mechanism, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)
    return module


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(module, *tensors):
    total = sum(x.square().sum() for x in tensors if x is not None)
    return torch.autograd.grad(total, list(module.parameters()), allow_unused=True)


# exact is torch's module


AXES = {
    "batch_first": (False, True),
    "batched": (True, False),
    "inputs": ("self", "memory", "three", "kdim"),
    "bias": (True, False),
    "add_bias_kv": (False, True),
    "add_zero_attn": (False, True),
    "key_padding_mask": (None, torch.bool, "plain", torch.float64),
    "attn_mask": (None, (torch.bool, 2), (torch.float64, 2), (torch.bool, 3), (torch.float64, 3)),
    "need_weights": (False, True),
    "average": (True, False),
}


def sample(count):
    """Cases in which every pair of options meets many times; always the same ones."""
    grid, generator = list(itertools.product(*AXES.values())), random.Random(0)
    return [dict(zip(AXES, values, strict=True)) for values in generator.sample(grid, count)]


def draw_call(case, B=2, L=5, S=7):
    """Constructor options and arguments of one call."""
    options = {name: case[name] for name in ("batch_first", "bias", "add_bias_kv", "add_zero_attn")}
    S = L if case["inputs"] == "self" else S
    kdim, vdim = (8, 10) if case["inputs"] == "kdim" else (E, E)
    options |= {"kdim": kdim, "vdim": vdim}

    def sized(length, dim, seed):
        shape = (B, length, dim) if case["batch_first"] else (length, B, dim)
        return draw(*(shape if case["batched"] else (length, dim)), seed=seed)

    query = sized(L, E, 1)
    key = query if case["inputs"] == "self" else sized(S, kdim, 2)
    value = key if case["inputs"] in ("self", "memory") else sized(S, vdim, 3)
    padding, mask = None, None
    if case["key_padding_mask"] is not None:
        padding = draw(B, S, seed=4) < -0.6
        padding[:, 0] = False
        padding = padding if case["batched"] else padding[0]
        if case["key_padding_mask"] != torch.bool:
            biased = draw(B, S, seed=5) if case["key_padding_mask"] != "plain" else torch.zeros(B, S).double()
            padding = (biased if case["batched"] else biased[0]).masked_fill(padding, -torch.inf)
    if case["attn_mask"] is not None:
        dtype, dim = case["attn_mask"]
        mask = draw((B if case["batched"] else 1) * H, L, S, seed=6) < -0.6
        mask[:, :, 0] = False
        if dtype != torch.bool:
            mask = draw(*mask.shape, seed=7).masked_fill(mask, -torch.inf)
        mask = mask[0] if dim == 2 else mask
    names = {"need_weights": case["need_weights"], "average_attn_weights": case["average"]}
    return options, (query, key, value), names | {"key_padding_mask": padding, "attn_mask": mask}


# torch deprecates masks of two kinds in one call
@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("block", range(8))
def test_exact_is_torchs_module(block):
    for case in sample(400)[block::8]:
        options, inputs, arguments = draw_call(case)
        ours = build(**options)
        theirs = nn.MultiheadAttention(E, H, dtype=torch.float64, **options)
        theirs.load_state_dict(ours.state_dict())
        results = [(*module(*inputs, **arguments),) for module in (ours, theirs)]
        for x, y in zip(*results, strict=True):
            assert (x is None) == (y is None), case
            if x is not None:
                torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9, msg=lambda text, case=case: f"{case}: {text}")
        grads = [gradients(module, *result) for module, result in zip((ours, theirs), results, strict=True)]
        for x, y in zip(*grads, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9, msg=lambda text, case=case: f"{case}: {text}")


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_exact_drops_the_weights_torch_drops(padded, need_weights):
    ours, x = build(dropout=0.5), draw(2, 5, E)
    theirs = nn.MultiheadAttention(E, H, dropout=0.5, batch_first=True, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    padding = torch.arange(5) >= torch.tensor([[5], [3]]) if padded else None
    results = []
    for module in (ours, theirs):
        torch.manual_seed(0)
        results.append(module(x, x, x, padding, need_weights))
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-9, atol=1e-9)
    assert torch.equal(ours.eval()(x, x, x, padding)[0], ours(x, x, x, padding)[0])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [None, torch.bool, torch.float64])
@pytest.mark.parametrize("extra", [False, True])
def test_causality_needs_no_mask(extra, padded, need_weights):
    ours, x = build(add_bias_kv=extra, add_zero_attn=extra), draw(2, 5, E)
    theirs = nn.MultiheadAttention(E, H, add_bias_kv=extra, add_zero_attn=extra, batch_first=True, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    mask, padding = torch.ones(5, 5, dtype=torch.bool).triu(1), None
    if padded is not None:
        padding = torch.arange(5) >= torch.tensor([[5], [3]])
        padding = padding if padded == torch.bool else torch.zeros(2, 5).double().masked_fill(padding, -torch.inf)
        mask = mask if padded == torch.bool else torch.zeros(5, 5).double().masked_fill(mask, -torch.inf)
    expected = theirs(x, x, x, padding, need_weights, mask)
    always = build(add_bias_kv=extra, add_zero_attn=extra, causal=True)
    for module, arguments in (
        (ours, {"is_causal": True}),
        (ours, {"is_causal": True, "attn_mask": mask}),
        (always, {}),
        (always, {"attn_mask": mask}),
    ):
        actual = module(x, x, x, padding, need_weights, **arguments)
        for a, b in zip(actual, expected, strict=True):
            assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-9, atol=1e-9), arguments.keys()


def test_hinted_mask_is_taken_for_the_causal_one(mechanism):
    module, x = build(mechanism), draw(2, 5, E)
    expected = module(x, x, x, need_weights=False, is_causal=True)[0]
    wrong = torch.zeros(5, 5, dtype=torch.bool)
    assert_same_bits("output", module(x, x, x, need_weights=False, attn_mask=wrong, is_causal=True)[0], expected)


def test_causal_module_adds_its_causality_to_a_mask():
    module, x = build(causal=True), draw(2, 5, E)
    band = torch.ones(5, 5, dtype=torch.bool).tril(-2)
    whole = band | torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected, weights = build()(x, x, x, attn_mask=whole)
    for mask in (band, torch.zeros(5, 5, dtype=torch.float64).masked_fill(band, -torch.inf)):
        actual = module(x, x, x, attn_mask=mask)
        torch.testing.assert_close(actual, (expected, weights))
        torch.testing.assert_close(module(x, x, x, attn_mask=mask, need_weights=False)[0], expected)


# parameters


CONSTRUCTORS = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"kdim": 8},
    {"kdim": 8, "vdim": 10, "add_bias_kv": True, "dtype": torch.float64},
]


@pytest.mark.parametrize("options", CONSTRUCTORS, ids=str)
def test_parameters_and_their_init_are_torchs(options):
    modules, states = [], []
    for make in (nn.MultiheadAttention, MultiheadAttention):
        torch.manual_seed(0)
        modules.append(make(E, H, **options))
        states.append(torch.get_rng_state())
    theirs, ours = modules
    assert torch.equal(*states)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(theirs.parameters(), ours.parameters(), strict=True))
    assert repr(theirs) == repr(ours)
    for module in modules:
        torch.manual_seed(1)
        module._reset_parameters()
    assert all(torch.equal(x, y) for x, y in zip(theirs.parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "mechanism"),
    [(o, m) for o in CONSTRUCTORS for m in MECHANISMS.values() if m == "exact" or "add_bias_kv" not in o],
    ids=str,
)
def test_state_dict_loads_both_ways(options, mechanism):
    theirs, ours = nn.MultiheadAttention(E, H, **options), MultiheadAttention(E, H, mechanism=mechanism, **options)
    for source, target in ((theirs, ours), (ours, theirs)):
        nn.init.normal_(source.out_proj.weight)
        target.load_state_dict(source.state_dict())
        assert all(torch.equal(x, y) for x, y in zip(source.parameters(), target.parameters(), strict=True))
    saved = io.BytesIO()
    torch.save(ours.state_dict(), saved)
    saved.seek(0)
    theirs.load_state_dict(torch.load(saved, weights_only=True))


class Scaled(nn.Module):
    """A feature map with a parameter: elu(x scale) + 1."""

    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, dim, dtype=torch.float64))

    def forward(self, x):
        return longattn.features.elu(x * self.scale)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", [*MECHANISMS, "module"])
def test_copies_are_whole_and_independent(name, copied):
    module = build(longattn.Linear(Scaled(E // H)) if name == "module" else MECHANISMS[name], causal=True)
    x = draw(2, 5, E)
    twin = copied(module)
    assert repr(twin) == repr(module)
    assert_same_bits("output", twin(x, x, x)[0], module(x, x, x)[0])
    before = module(x, x, x)[0]
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    assert_same_bits("output", module(x, x, x)[0], before)
    if name == "module":
        assert twin.mechanism.feature_map is twin.feature_map is not module.feature_map


def test_a_module_as_feature_map_is_part_of_the_attention():
    module, x = build(longattn.Linear(Scaled(E // H))), draw(2, 5, E)
    assert "feature_map.scale" in module.state_dict()
    module(x, x, x)[0].square().sum().backward()
    assert module.feature_map.scale.grad.abs().min() > 0
    # what is put in its place is what runs
    before = module(x, x, x)[0]
    module.feature_map = Scaled(E // H)
    with torch.no_grad():
        module.feature_map.scale.mul_(2)
    assert not torch.equal(module(x, x, x)[0], before)
    assert module.float().feature_map.scale.dtype == torch.float32
    assert module(x.float(), x.float(), x.float())[0].dtype == torch.float32


def test_meta_device_and_dtype_are_honoured(mechanism):
    module = MultiheadAttention(E, H, mechanism=mechanism, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    module = module.to_empty(device="cpu")
    module._reset_parameters()
    assert all(p.isfinite().all() for p in (module.in_proj_weight, module.in_proj_bias))


# mechanisms


def test_descriptions_are_values():
    assert longattn.Linear("relu") == longattn.Linear(feature_map="relu") != longattn.Linear()
    assert len({longattn.Linear(), longattn.Linear("elu"), longattn.Linear(normalize=False)}) == 2
    assert pickle.loads(pickle.dumps(longattn.Linear("relu"))) == longattn.Linear("relu")
    assert repr(longattn.Linear()) == "Linear()"
    assert repr(longattn.Linear("relu", scale=0.5)) == "Linear(feature_map='relu', scale=0.5)"
    assert repr(longattn.Linear(torch.exp)) == "Linear(feature_map=exp)"
    assert repr(longattn.Linear(nn.ELU(2.0))) == "Linear(feature_map=ELU(alpha=2.0))"
    with pytest.raises(AttributeError):
        longattn.Linear().scale = 2
    text = repr(MultiheadAttention(E, H, mechanism=longattn.Linear("relu"), causal=True))
    assert text.splitlines()[1].strip() == "mechanism=Linear(feature_map='relu'), causal=True"
    assert MultiheadAttention(E, H, mechanism="linear").mechanism == longattn.Linear()


def project(module, query, key, value):
    """Queries, keys and values `[B, H, N, D]`, the plain way."""
    if module.in_proj_weight is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    else:
        weights = module.in_proj_weight.chunk(3)
    projected = map(F.linear, (query, key, value), weights, module.in_proj_bias.chunk(3))
    return [x.unflatten(-1, (H, E // H)).transpose(1, 2) for x in projected]


@pytest.mark.parametrize("inputs", ["self", "memory", "three", "kdim"])
@pytest.mark.parametrize("options", [{}, {"feature_map": "relu"}, {"normalize": False, "scale": 0.3}], ids=str)
def test_linear_is_linear_attention_between_the_projections(options, inputs):
    sizes = {"kdim": 8, "vdim": 10} if inputs == "kdim" else {}
    module = build(longattn.Linear(**options), **sizes)
    query = draw(2, 5, E)
    key = query if inputs == "self" else draw(2, 7, sizes.get("kdim", E), seed=1)
    value = key if inputs in ("self", "memory") else draw(2, 7, sizes.get("vdim", E), seed=2)
    padding = torch.arange(key.shape[1]) >= torch.tensor([[key.shape[1]], [3]])
    arguments = {"feature": options.get("feature_map", "elu"), "normalize": options.get("normalize", True)}
    for is_causal, mask in itertools.product((False, True) if inputs == "self" else (False,), (None, padding)):
        expected, _, _ = reference.linear_attention(
            *project(module, query, key, value), mask, None, None, None,
            is_causal=is_causal, scale=options.get("scale", 1.0), **arguments,
        )
        expected = module.out_proj(expected.transpose(1, 2).flatten(2))
        actual, weights = module(query, key, value, mask, need_weights=False, is_causal=is_causal)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
        assert weights is None
        for x, y in zip(gradients(module, actual), gradients(module, expected), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("callable_map", [False, True])
def test_weights_are_those_that_sum_the_values(is_causal, callable_map, mechanism):
    if callable_map and mechanism != "exact":
        mechanism = longattn.Linear(Scaled(E // H))
    module, x = build(mechanism), draw(2, 6, E)
    padding = torch.arange(6) >= torch.tensor([[6], [3]])
    output, weights = module(x, x, x, padding, is_causal=is_causal, average_attn_weights=False)
    _, _, v = project(module, x, x, x)
    torch.testing.assert_close(module.out_proj((weights @ v).transpose(1, 2).flatten(2)), output)
    assert (weights.masked_select(padding[:, None, None]) == 0).all()
    assert not is_causal or (weights.triu(1) == 0).all()
    torch.testing.assert_close(module(x, x, x, padding, is_causal=is_causal)[1], weights.mean(1))
    torch.testing.assert_close(module(x, x, x, padding, need_weights=False, is_causal=is_causal)[0], output)
    if mechanism == "exact" or mechanism.normalize:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, H, 6, dtype=torch.float64))


def test_layouts_agree(mechanism):
    first, x = build(mechanism), draw(2, 6, E)
    last = build(mechanism, batch_first=False)
    padding = torch.arange(6) >= torch.tensor([[6], [3]])
    memory = draw(2, 6, E, seed=1)
    for inputs in ((x, x, x), (x, memory, memory)):
        expected, weights = first(*inputs, padding, average_attn_weights=False)
        turned = [y.transpose(0, 1) for y in inputs]
        turned = [turned[0], *((turned[0],) * 2 if inputs[1] is x else (turned[1],) * 2)]
        actual, same = last(*turned, padding, average_attn_weights=False)
        torch.testing.assert_close((actual.transpose(0, 1), same), (expected, weights))
        for module in (first, last):
            alone, same = module(*(y[1] for y in inputs), padding[1], average_attn_weights=False)
            torch.testing.assert_close((alone, same), (expected[1], weights[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_future_tokens_do_not_change_past_outputs(dtype, mechanism):
    module, x = build(mechanism, causal=True, dtype=dtype), draw(2, 70, E, dtype=dtype)
    expected = module(x, x, x, need_weights=False)[0]
    for cut in (1, 33, 69):
        y = x.clone()
        y[:, cut:] = 100
        actual = module(y, y, y, need_weights=False)[0]
        assert_same_bits(f"cut {cut}", actual[:, :cut], expected[:, :cut])
        assert (actual[:, cut:] != expected[:, cut:]).any()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_what_padded_tokens_hold_changes_no_valid_row(need_weights, is_causal, mechanism):
    module, x = build(mechanism, dtype=torch.float32), draw(2, 9, E, dtype=torch.float32)
    padding = torch.arange(9) >= torch.tensor([[9], [4]])
    results = []
    for filling in (0, torch.nan, torch.inf):
        y = x.masked_fill(padding[..., None], filling)
        output, weights = module(y, y, y, padding, need_weights, is_causal=is_causal)
        results.append([t[~padding] for t in (output, weights) if t is not None])
    for result in results[1:]:
        for name, a, b in zip(("output", "weights"), result, results[0], strict=False):
            assert_same_bits(name, a, b)
            assert a.isfinite().all()


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("need_weights", [False, True])
def test_what_padded_memory_holds_reaches_neither_output_nor_gradient(need_weights, kind, mechanism):
    padding = torch.arange(9) >= torch.tensor([[9], [4]])
    mask = padding if kind == torch.bool else torch.zeros(2, 9).masked_fill(padding, -torch.inf)
    module, x = build(mechanism, dtype=torch.float32), draw(2, 5, E, dtype=torch.float32)
    results = []
    for filling in (0, torch.nan):
        memory = draw(2, 9, E, seed=1, dtype=torch.float32).masked_fill(padding[..., None], filling)
        memory.requires_grad_()
        output, weights = module(x, memory, memory, mask, need_weights)
        loss = output.square().sum() + (0 if weights is None else weights.square().sum())
        results.append([output, *torch.autograd.grad(loss, [memory, *module.parameters()])])
    for a, b in zip(*results, strict=True):
        assert_same_bits("output and gradients", a, b)
        assert a.isfinite().all()


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
def test_query_that_sees_no_key_gives_zero(kind, need_weights, mechanism):
    module, x = build(mechanism), draw(2, 5, E)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1] = True
    calls = [{"key_padding_mask": padding}, {"key_padding_mask": padding, "is_causal": True}]
    if mechanism == "exact":
        mask = torch.zeros(2 * H, 5, 5, dtype=torch.bool)
        mask[H:] = True
        calls += [{"attn_mask": mask}, {"attn_mask": mask, "key_padding_mask": padding}]
    for call in calls:
        if kind != torch.bool:
            call = {
                name: torch.zeros(m.shape, dtype=kind).masked_fill(m, -torch.inf) if name != "is_causal" else m
                for name, m in call.items()
            }
        output, weights = module(x, x, x, need_weights=need_weights, **call)
        assert_same_bits("output", output[1], module.out_proj.bias.expand(5, E))
        assert output[0].isfinite().all()
        assert weights is None or (weights[1] == 0).all()
        assert all(g.isfinite().all() for g in gradients(module, output, weights))


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 3), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
def test_empty_inputs_give_empty_or_zero_attention(shape, need_weights, mechanism):
    B, L, S = shape
    module, x, memory = build(mechanism), draw(B, L, E), draw(B, S, E)
    output, weights = module(x, memory, memory, torch.zeros(B, S, dtype=torch.bool), need_weights)
    assert output.shape == (B, L, E)
    assert weights is None or weights.shape == (B, L, S)
    assert (output == module.out_proj.bias).all()
    assert all(g is None or g.isfinite().all() for g in gradients(module, output))


@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast_returns_its_dtype(need_weights, mechanism):
    module, x = build(mechanism, dtype=torch.float32), draw(2, 5, E, dtype=torch.float32)
    expected, _ = module(x, x, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, weights = module(x, x, x, need_weights=need_weights)
    assert output.dtype == torch.bfloat16
    assert weights is None or weights.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    assert all(g.dtype == torch.float32 for g in gradients(module, output))


def test_linear_drops_its_output_in_training_only():
    module, x = build(longattn.Linear(), dropout=0.5), draw(2, 50, E)
    kept = {}
    module.out_proj.register_forward_pre_hook(lambda _, arguments: kept.update(attended=arguments[0].detach()))
    torch.manual_seed(0)
    first = module(x, x, x, need_weights=False)[0]
    share = (kept["attended"] == 0).double().mean()
    assert 0.4 < share < 0.6
    torch.manual_seed(0)
    assert_same_bits("same seed", module(x, x, x, need_weights=False)[0], first)
    module.eval()
    quiet = module(x, x, x, need_weights=False)[0]
    assert kept["attended"].count_nonzero() == kept["attended"].numel()
    assert_same_bits("eval", quiet, build(longattn.Linear())(x, x, x, need_weights=False)[0])
    module.dropout = 1.0
    assert (module.train()(x, x, x, need_weights=False)[0] == module.out_proj.bias).all()


# out_proj is called


def test_hooks_and_adapters_on_out_proj_take_part(mechanism):
    module, x = build(mechanism), draw(2, 5, E)
    before, calls = module(x, x, x)[0], []
    handle = module.out_proj.register_forward_hook(lambda _, __, output: calls.append(1) or output + 1)
    for need_weights in (False, True):
        torch.testing.assert_close(module(x, x, x, need_weights=need_weights)[0], before + 1)
    assert len(calls) == 2
    handle.remove()

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return 2 * self.base(x)

    module.out_proj = Adapter(module.out_proj)
    torch.testing.assert_close(module(x, x, x)[0], 2 * before)


# no silent bypass


@pytest.fixture
def calls(monkeypatch):
    """Counts calls of our forward. A hook would count too, but switches torch's fast path off, and so hides the bug."""
    counted, forward = [], MultiheadAttention.forward

    @functools.wraps(forward)
    def counting(self, *args, **kwargs):
        counted.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MultiheadAttention, "forward", counting)
    return counted


def encoder_with(mechanism, replaced, layers=2):
    """torch's encoder, with our module put into the layer before the encoder is made, or into the encoder."""
    layer = nn.TransformerEncoderLayer(E, 2, 16, dropout=0.0, batch_first=True)
    ours = MultiheadAttention(E, 2, batch_first=True, mechanism=mechanism)
    ours.load_state_dict(layer.self_attn.state_dict())
    if replaced:
        encoder = nn.TransformerEncoder(layer, layers)
        for made in encoder.layers:
            made.self_attn = copy.deepcopy(ours)
        return encoder
    layer.self_attn = ours
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


MODES = {
    "train": (True, torch.enable_grad),
    "eval": (False, torch.enable_grad),
    "no_grad": (False, torch.no_grad),
    "inference_mode": (False, torch.inference_mode),
}


# torch converts a padded batch to a nested tensor by itself, and then says that those are a prototype
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_torchs_encoder_never_computes_attention_behind_our_back(mode, replaced, mechanism, calls):
    torch.manual_seed(0)
    encoder, x = encoder_with(mechanism, replaced), torch.randn(3, 6, E)
    padding = torch.arange(6) >= torch.tensor([[6], [4], [2]])
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    training, context = MODES[mode]
    for mask, padded in itertools.product((None, causal), (None, padding)):
        expected = encoder.train()(x, mask, src_key_padding_mask=padded)
        calls.clear()
        with context():
            actual = encoder.train(training)(x, mask, src_key_padding_mask=padded)
        assert [id(module) for module in calls] == [id(layer.self_attn) for layer in encoder.layers]
        valid = slice(None) if padded is None else ~padding
        torch.testing.assert_close(actual[valid], expected[valid], rtol=1e-5, atol=1e-5)


def test_the_flag_is_what_keeps_torch_from_bypassing(calls):
    encoder, x = encoder_with("exact", replaced=False, layers=1).eval(), torch.randn(3, 6, E)
    encoder.layers[0].self_attn._qkv_same_embed_dim = True
    with torch.no_grad():
        encoder(x)
    assert not calls


def test_decoder_calls_both_attentions(mechanism, calls):
    layer = nn.TransformerDecoderLayer(E, 2, 16, dropout=0.0, batch_first=True)
    layer.self_attn = MultiheadAttention(E, 2, batch_first=True, mechanism=mechanism)
    layer.multihead_attn = MultiheadAttention(E, 2, batch_first=True, mechanism=mechanism)
    decoder = nn.TransformerDecoder(layer, 2).eval()
    target, memory = torch.randn(2, 5, E), torch.randn(2, 7, E)
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    with torch.no_grad():
        decoder(target, memory, causal, memory_key_padding_mask=padding)
    assert len(calls) == 4


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("is_causal", [False, True])
def test_nested_tensor_is_the_padded_one(is_causal, mechanism):
    module = build(mechanism)
    rows = [draw(n, E, seed=n).requires_grad_() for n in (5, 2, 3)]
    nested = torch.nested.as_nested_tensor(rows)
    output, weights = module(nested, nested, nested, is_causal=is_causal)
    assert weights.shape == (3, 5, 5)
    for x, y in zip(rows, output.unbind(), strict=True):
        torch.testing.assert_close(y, module(x, x, x, is_causal=is_causal)[0])
    alone = module(rows[1], rows[1], rows[1], is_causal=is_causal)[0].square().sum()
    grads = [torch.autograd.grad(f, rows[1])[0] for f in (output.unbind()[1].square().sum(), alone)]
    torch.testing.assert_close(*grads)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensor_is_refused_where_it_would_lose_something():
    nested = torch.nested.nested_tensor([draw(3, E), draw(2, E)])
    other, padding = nested + 1, torch.zeros(2, 3, dtype=torch.bool)
    module, last = build(), build(batch_first=False)
    refused = "MultiheadAttention does not support NestedTensor outside of self-attention without masks: "
    for call, why in (
        (lambda: module(nested, nested, other), "query, key, and value are not the same"),
        (lambda: module(nested.to_padded_tensor(0.0), nested, nested), "query, key, and value are not the same"),
        (lambda: last(nested, nested, nested), "batch_first was not True"),
        (lambda: module(nested, nested, nested, padding), "masks were supplied"),
    ):
        with pytest.raises(AssertionError, match=re.escape(refused + why)):
            call()


# masks that efficient mechanisms take


EFFICIENT = longattn.Linear()


def test_causal_mask_is_recognised():
    module, x = build(EFFICIENT), draw(2, 5, E)
    expected = module(x, x, x, is_causal=True)[0]
    forbidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    added = torch.zeros(5, 5).masked_fill(forbidden, -torch.inf)
    for mask in (forbidden, added, forbidden.expand(2 * H, 5, 5)):
        for arguments in ({}, {"is_causal": True}):
            assert_same_bits("output", module(x, x, x, attn_mask=mask, **arguments)[0], expected)
    assert not torch.equal(module(x, x, x)[0], expected)


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(5, 5, dtype=torch.bool),
        torch.ones(5, 5, dtype=torch.bool).triu(),
        torch.ones(5, 5, dtype=torch.bool).triu(1).logical_not(),
        torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -1e9),
        torch.ones(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf),
    ],
    ids=["nothing", "diagonal", "past", "finite", "bias"],
)
def test_any_other_mask_is_refused_by_an_efficient_mechanism(mask):
    module, x = build(EFFICIENT), draw(2, 5, E)
    sentence = r"^MultiheadAttention: Linear\(\) cannot honour this attn_mask \(\w+ \[5, 5\] on cpu\): it takes"
    with pytest.raises(ValueError, match=sentence):
        module(x, x, x, attn_mask=mask)


def test_float_padding_mask_is_the_bool_one(mechanism):
    module, x = build(mechanism), draw(2, 5, E)
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    added = torch.zeros(2, 5, dtype=torch.float64).masked_fill(padding, -torch.inf)
    for is_causal in (False, True):
        expected = module(x, x, x, padding, is_causal=is_causal)[0]
        assert_same_bits("output", module(x, x, x, added, is_causal=is_causal)[0], expected)


@pytest.mark.parametrize("value", [-1e9, 1.0, torch.nan, torch.inf])
def test_padding_mask_that_biases_is_refused_by_an_efficient_mechanism(value):
    module, x = build(EFFICIENT), draw(2, 5, E)
    mask = torch.zeros(2, 5)
    mask[1, 2] = value
    with pytest.raises(ValueError, match="takes a key_padding_mask that is bool, or float with values 0 and -inf; "):
        module(x, x, x, mask)


def test_weights_are_formed_up_to_a_limit(monkeypatch):
    assert attention.WEIGHTS_LIMIT == 2**22
    monkeypatch.setattr(attention, "WEIGHTS_LIMIT", 10)
    module, x, memory = build(EFFICIENT), draw(1, 2, E), draw(1, 6, E)
    assert module(x, memory[:, 1:], memory[:, 1:])[1].shape == (1, 2, 5)
    assert module(x, memory, memory, need_weights=False)[0].shape == (1, 2, E)
    sentence = "need_weights=True would form 2 x 6 weights, and Linear() forms them up to L * S = 10; pass "
    with pytest.raises(ValueError, match=re.escape(sentence)):
        module(x, memory, memory)
    assert build()(x, memory, memory)[1].shape == (1, 2, 6)


# bad input


def constructor(*args, **kwargs):
    return lambda make: make(*args, **kwargs)


def call(*args, options=None, **kwargs):
    return lambda make: make(E, H, batch_first=True, **(options or {}))(*args, **kwargs)


ONE, TWO = torch.zeros(2, 5, E), torch.zeros(2, 7, E)


@pytest.mark.parametrize(
    "attempt",
    [
        constructor(0, 1),
        constructor(12, -1),
        constructor(12, 5),
        call(torch.zeros(5), ONE, ONE),
        call(torch.zeros(2, 2, 5, E), ONE, ONE),
        call(ONE, ONE[0], ONE[0]),
        call(ONE[0], ONE, ONE),
        call(ONE[..., :8], ONE[..., :8], ONE[..., :8]),
        call(ONE, ONE, TWO),
        call(ONE, TWO[..., :8], ONE, options={"kdim": 8}),
        call(ONE, ONE, ONE, torch.zeros(2, 5, dtype=torch.int64)),
        call(ONE, ONE, ONE, attn_mask=torch.zeros(5, 5, dtype=torch.uint8)),
        call(ONE, ONE, ONE, torch.zeros(5, dtype=torch.bool)),
        call(ONE, ONE, ONE, torch.zeros(3, 5, dtype=torch.bool)),
        call(ONE, ONE, ONE, torch.zeros(2, 6, dtype=torch.bool)),
        call(ONE[0], ONE[0], ONE[0], torch.zeros(2, 5, dtype=torch.bool)),
        call(ONE, ONE, ONE, attn_mask=torch.zeros(5, dtype=torch.bool)),
        call(ONE, ONE, ONE, attn_mask=torch.zeros(5, 6, dtype=torch.bool)),
        call(ONE, ONE, ONE, attn_mask=torch.zeros(2, 5, 5, dtype=torch.bool)),
        call(ONE[0], ONE[0], ONE[0], attn_mask=torch.zeros(2, 5, 5, dtype=torch.bool)),
    ],
)
def test_torchs_errors_are_ours(attempt):
    with pytest.raises((AssertionError, ValueError, RuntimeError)) as theirs:
        attempt(nn.MultiheadAttention)
    for mechanism in ("exact", EFFICIENT):
        with pytest.raises(type(theirs.value)) as ours:
            attempt(functools.partial(MultiheadAttention, mechanism=mechanism))
        assert str(ours.value) == str(theirs.value)
        assert type(ours.value) is type(theirs.value)


def test_mismatched_masks_warn_as_torch_does():
    arguments = (ONE, ONE, ONE, torch.zeros(2, 5, dtype=torch.bool))
    with pytest.warns(UserWarning, match="Support for mismatched key_padding_mask and attn_mask is") as caught:
        MultiheadAttention(E, H, batch_first=True)(*arguments, attn_mask=torch.zeros(5, 5))
    assert caught[0].filename.endswith("module.py")


@pytest.mark.parametrize(
    ("attempt", "error", "sentence"),
    [
        (constructor(E, H, mechanism="lsh"), ValueError, "mechanism must be one of 'exact', 'linear' or a description"),
        (constructor(E, H, mechanism=longattn.Linear), TypeError, "mechanism must be a name or a description such as"),
        (constructor(E, H, mechanism=EFFICIENT, add_bias_kv=True), ValueError, "need mechanism='exact', got Linear()"),
        (constructor(E, H, mechanism=EFFICIENT, add_zero_attn=True), ValueError, "add_bias_kv and add_zero_attn need"),
        (call(ONE, ONE[:1], ONE[:1]), ValueError, "query and key must share the batch size, got 2 and 1"),
        (
            call(ONE, TWO, TWO, is_causal=True, options={"mechanism": EFFICIENT}),
            ValueError,
            "is_causal needs as many queries as keys, got 5 and 7",
        ),
    ],
)
def test_bad_input_gets_one_sentence(attempt, error, sentence):
    with pytest.raises(error) as caught:
        attempt(MultiheadAttention)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"feature_map": "exp"}, "Linear: feature_map must be one of elu, relu, identity or a callable, got 'exp'"),
        ({"impl": "fast"}, "Linear: impl must be 'auto' or one of 'cuda', 'triton', 'cpu', 'reference', got 'fast'"),
    ],
)
def test_bad_description_gets_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        longattn.Linear(**options)


def test_a_mechanism_without_its_methods_says_so():
    class Empty(mechanisms.Mechanism):
        pass

    q = draw(1, 1, 2, 2)
    with pytest.raises(NotImplementedError):
        Empty().attend(q, q, q, is_causal=False, key_padding_mask=None, dropout_p=0.0)


# compile


# torch deprecates parts of itself that its tracing uses
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("name", "need_weights"), [("exact", False), ("exact", True), ("linear", False)])
def test_one_compiled_graph_serves_all_lengths(name, need_weights):
    module = build(MECHANISMS[name], dtype=torch.float32).eval()
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for L in (5, 70):
            x = draw(2, L, E, dtype=torch.float32, seed=L)
            # float masks are what torch's encoder passes on
            padding = torch.zeros(2, L).masked_fill(torch.arange(L) >= torch.tensor([[L], [3]]), -torch.inf)
            results = [f(x, x, x, padding, need_weights, is_causal=True) for f in (module, compiled)]
            grads = [gradients(module, *result) for result in results]
            torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)
    if name == "linear":
        with pytest.raises(RuntimeError, match="values 0 and -inf"):
            compiled(x, x, x, padding + 1, need_weights, is_causal=True)
