"""Laws of nn.MultiheadAttention that hold for every mechanism, and those of the efficient ones."""

import itertools
import pickle
import re

import pytest
import torch
from _attention import EFFICIENT, LSH, MECHANISMS, ONE, TWO, E, H, Scaled, build, call, constructor, draw, gradients
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import longattn
from longattn.nn import MultiheadAttention, attention, mechanisms
from longattn.reference import linear as reference
from longattn.testing.assertions import assert_same_bits

# the reference is chosen where nothing was compiled, and says so
pytestmark = pytest.mark.filterwarnings("ignore:linear_attention. only the dense reference")


@pytest.fixture(params=MECHANISMS)
def mechanism(request):
    return MECHANISMS[request.param]


@pytest.fixture(params=[name for name in MECHANISMS if name not in ("exact", "auto")])
def efficient(request):
    """Without "auto", which takes every call: what its mechanism cannot honour is exact."""
    return MECHANISMS[request.param]


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
            *project(module, query, key, value),
            mask,
            None,
            None,
            None,
            is_causal=is_causal,
            scale=options.get("scale", 1.0),
            **arguments,
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
    if getattr(mechanism, "normalize", True):
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
    if mechanism == LSH:
        pytest.skip("later tokens move the edges of its chunks; with fixed buckets test_lsh_laws.py holds it to this")
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
    for masks in calls:
        if kind != torch.bool:
            masks = {
                name: torch.zeros(m.shape, dtype=kind).masked_fill(m, -torch.inf) if name != "is_causal" else m
                for name, m in masks.items()
            }
        output, weights = module(x, x, x, need_weights=need_weights, **masks)
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
    if need_weights and mechanism == EFFICIENT:
        # summed in float32 and rounded once
        assert (weights.float().sum(-1) - 1).abs().max() < 5 * 2**-9
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    assert all(g.dtype == torch.float32 for g in gradients(module, output))


def test_dropout_is_of_training_only_and_follows_torchs_generator(mechanism):
    module, x = build(mechanism, dropout=0.5), draw(2, 50, E)
    torch.manual_seed(0)
    first, second = (module(x, x, x, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert_same_bits("same seed", module(x, x, x, need_weights=False)[0], first)
    module.eval()
    assert_same_bits("eval", module(x, x, x)[0], build(mechanism)(x, x, x)[0])
    module.dropout = 1.0
    assert (module.train()(x, x, x, need_weights=False)[0] == module.out_proj.bias).all()


@pytest.mark.parametrize("dropout", [-0.1, 1.5, torch.nan])
def test_dropout_that_is_no_probability_is_refused(dropout, mechanism):
    module, x = build(mechanism, dropout=dropout), draw(2, 9, E)
    with pytest.raises((ValueError, RuntimeError), match="probability"):
        module(x, x, x, need_weights=False)


def test_linear_drops_its_output():
    module, x = build(longattn.Linear(), dropout=0.5), draw(2, 50, E)
    kept = {}
    module.out_proj.register_forward_pre_hook(lambda _, arguments: kept.update(attended=arguments[0].detach()))
    module(x, x, x, need_weights=False)
    share = (kept["attended"] == 0).double().mean()
    assert 0.4 < share < 0.6


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


# masks that efficient mechanisms take


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("L", [5, 9])
def test_causality_is_the_same_however_it_is_given(L, need_weights, mechanism):
    module, x = build(mechanism), draw(2, L, E)
    options = {"need_weights": need_weights}
    expected = module(x, x, x, is_causal=True, **options)[0]
    assert not torch.equal(module(x, x, x, **options)[0], expected)
    torch.testing.assert_close(build(mechanism, causal=True)(x, x, x, **options)[0], expected)
    forbidden = torch.ones(L, L, dtype=torch.bool).triu(1)
    added = torch.zeros(L, L).masked_fill(forbidden, -torch.inf)
    for mask in (forbidden, added, added.double(), forbidden.expand(2 * H, L, L)):
        for arguments in ({}, {"is_causal": True}):
            torch.testing.assert_close(module(x, x, x, attn_mask=mask, **arguments, **options)[0], expected)


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
def test_any_other_mask_is_refused_by_an_efficient_mechanism(mask, efficient):
    module, x = build(efficient), draw(2, 5, E)
    sentence = f"MultiheadAttention: {module.mechanism!r} cannot honour this attn_mask ("
    with pytest.raises(ValueError, match="^" + re.escape(sentence)) as caught:
        module(x, x, x, attn_mask=mask)
    assert "it takes the causal mask (pass is_causal=True" in str(caught.value)
    assert str(caught.value).endswith("other masks take mechanism='exact'")


def test_float_padding_mask_is_the_bool_one(mechanism):
    module, x = build(mechanism), draw(2, 5, E)
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    added = torch.zeros(2, 5, dtype=torch.float64).masked_fill(padding, -torch.inf)
    for is_causal in (False, True):
        expected = module(x, x, x, padding, is_causal=is_causal)[0]
        assert_same_bits("output", module(x, x, x, added, is_causal=is_causal)[0], expected)


# torch runs kernels that vmap does not know row by row, and says so
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:torch.searchsorted")
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_vmap_over_masks_is_one_call_for_each(dtype, mechanism):
    module, xs = build(mechanism).eval(), draw(3, 2, 9, E)
    masks = torch.arange(9) >= torch.tensor([[[9], [5]], [[8], [6]], [[1], [7]]])  # [3, 2, 9]
    masks = masks if dtype == torch.bool else torch.zeros(masks.shape, dtype=dtype).masked_fill(masks, -torch.inf)

    def attend(x, mask):
        return module(x, x, x, mask, need_weights=False)[0]

    expected = torch.stack([attend(x, mask) for x, mask in zip(xs, masks, strict=True)])
    torch.testing.assert_close(torch.func.vmap(attend)(xs, masks), expected)
    shared = torch.func.vmap(attend, (0, None))(xs, masks[0])
    torch.testing.assert_close(shared, torch.stack([attend(x, masks[0]) for x in xs]))
    if dtype != torch.bool and mechanism not in ("exact", MECHANISMS["auto"]):
        # one row of one call
        masks[2, 1, 0] = 1
        with pytest.raises(ValueError, match="bool, or float with values 0 and -inf"):
            torch.func.vmap(attend)(xs, masks)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_fake_tensors_and_make_fx_read_no_mask(dtype, mechanism):
    module, x = build(mechanism).eval(), draw(2, 9, E)
    mask = torch.arange(9) >= torch.tensor([[9], [5]])
    mask = mask if dtype == torch.bool else torch.zeros(2, 9, dtype=dtype).masked_fill(mask, -torch.inf)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        y = fake.from_tensor(x)
        output, weights = module(y, y, y, fake.from_tensor(mask))
    assert (output.shape, weights.shape) == ((2, 9, E), (2, 9, 9))

    def attend(x, mask):
        return module(x, x, x, mask, need_weights=False)[0]

    with torch.no_grad():
        graph, other = make_fx(attend)(x, mask), draw(2, 9, E, seed=1)
        torch.testing.assert_close(graph(other, mask), attend(other, mask))


@pytest.mark.parametrize("value", [-1e9, 1.0, torch.nan, torch.inf])
def test_padding_mask_that_biases_is_refused_by_an_efficient_mechanism(value, efficient):
    module, x = build(efficient), draw(2, 5, E)
    mask = torch.zeros(2, 5)
    mask[1, 2] = value
    with pytest.raises(ValueError, match="takes a key_padding_mask that is bool, or float with values 0 and -inf; "):
        module(x, x, x, mask)


def test_a_mask_that_learns_is_refused_by_an_efficient_mechanism(efficient):
    x = draw(2, 5, E)
    causal = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).double().requires_grad_()
    padding = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    for masks, sentence in (
        ({"attn_mask": causal}, "cannot honour this attn_mask"),
        ({"key_padding_mask": padding}, "0 and -inf; others, and those that require a gradient, would be added"),
    ):
        with pytest.raises(ValueError, match=sentence):
            build(efficient)(x, x, x, **masks)
        # where there is a choice, exact attention takes it
        auto = build(longattn.Auto(efficient, break_even=0)) if efficient != "favor" else build("auto")
        auto(x, x, x, **masks)[0].square().sum().backward()
        assert next(iter(masks.values())).grad.abs().max() > 0


def test_weights_are_formed_up_to_a_limit(monkeypatch, efficient):
    assert attention.WEIGHTS_LIMIT == 2**22
    monkeypatch.setattr(attention, "WEIGHTS_LIMIT", 10)
    module, x, memory = build(efficient), draw(1, 2, E), draw(1, 6, E)
    assert module(x, memory[:, 1:], memory[:, 1:])[1].shape == (1, 2, 5)
    assert module(x, memory, memory, need_weights=False)[0].shape == (1, 2, E)
    sentence = (
        f"need_weights=True would form 2 x 6 weights, and {module.mechanism!r} forms them up to L * S = 10; pass "
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        module(x, memory, memory)
    assert build()(x, memory, memory)[1].shape == (1, 2, 6)


@pytest.mark.parametrize(
    ("attempt", "error", "sentence"),
    [
        (constructor(E, H, mechanism="quick"), ValueError, "mechanism must be one of 'exact', 'linear', 'lsh', "),
        (constructor(E, H, mechanism=longattn.Linear), TypeError, "mechanism must be a name or a description such as"),
        (constructor(E, H, mechanism=EFFICIENT, add_bias_kv=True), ValueError, "need mechanism='exact', got Linear()"),
        (constructor(E, H, mechanism=EFFICIENT, add_zero_attn=True), ValueError, "add_bias_kv and add_zero_attn need"),
        (call(*[ONE.cfloat()] * 3, options={"dtype": torch.complex64}), TypeError, "no softmax of complex numbers"),
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

    with pytest.raises(TypeError, match=r"abstract methods? attend, weights"):
        Empty()
