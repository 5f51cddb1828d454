"""`fidelity_report`: what it measures in which models, what it recommends, how it prints, what it leaves as it was."""

import dataclasses
import json
import re
import sys

import pytest
import torch
from torch import nn

import longattn
from longattn import Favor, fidelity_report
from longattn.nn import MultiheadAttention
from longattn.nn.report import FidelityReport, Row, recommend

E, H, D = 16, 4, 4

pytestmark = [
    # the reference is chosen where nothing was compiled, and says so
    pytest.mark.filterwarnings("ignore:linear_attention. only the dense reference"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(cls=nn.MultiheadAttention, seed=0, **options):
    module = cls(E, H, batch_first=True, **options)
    with torch.no_grad():
        for index, p in enumerate(module.parameters()):
            p.copy_(draw(*p.shape, seed=100 * seed + index) * 0.4)
    return module


def causal(n):
    return torch.ones(n, n, dtype=torch.bool).triu(1)


def called(x, **options):
    return {"query": x, "key": x, "value": x, **options}


NUMBERS = ("output_error", "relative_variance", "effective_features", "error", "averaging", "exact_averaging")


def assert_same_numbers(report, expected):
    for x, y in zip(report.rows, expected.rows, strict=True):
        for name in NUMBERS:
            assert getattr(x, name) == pytest.approx(getattr(y, name), rel=1e-4), name


def errors(module, x, mechanism, **options):
    options.setdefault("need_weights", False)
    report = fidelity_report(module, called(x, **options), mechanism, quiet=True)
    assert [row.head for row in report.rows] == list(range(H))
    return [row.output_error for row in report.rows]


def by_hand(module, x, mechanism, is_causal, padded=None, exact_is_causal=None):
    """The same from the module's weights: softmax attention against the mechanism's own weights."""
    q, k, v = nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    q, k, v = (y.unflatten(-1, (H, D)).transpose(1, 2).double() for y in (q, k, v))
    scores = q @ k.mT / D**0.5
    exact_is_causal = is_causal if exact_is_causal is None else exact_is_causal
    hidden = causal(x.shape[1]) & torch.tensor(exact_is_causal)
    hidden = hidden if padded is None else hidden | padded[:, None, None]
    exact = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    other = mechanism.weights(q, k, is_causal=is_causal, key_padding_mask=padded) @ v
    difference = other - exact
    if padded is not None:
        difference, exact = (y.masked_fill(padded[:, None, :, None], 0) for y in (difference, exact))
    return (difference.square().sum((0, 2, 3)) / exact.square().sum((0, 2, 3))).sqrt().tolist()


MECHANISMS = [longattn.Linear(), longattn.Linear(Favor(D, 32)), longattn.Linear(Favor(D, 32, normalize="l2"))]
PADDING = torch.arange(20) >= torch.tensor([[20], [13], [7]])


@pytest.mark.parametrize("padded", [None, PADDING], ids=["", "padded"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mechanism", MECHANISMS, ids=repr)
def test_output_error_is_that_of_the_weights(mechanism, is_causal, padded):
    module, x = attention(), draw(3, 20, E)
    mask = {"attn_mask": causal(20)} if is_causal else {}
    found = errors(module, x, mechanism, key_padding_mask=padded, **mask)
    assert found == pytest.approx(by_hand(module, x, mechanism, is_causal, padded), rel=1e-3)
    assert min(found) > 0.01


def test_exact_against_exact_is_nothing():
    assert errors(attention(), draw(2, 9, E), "exact", attn_mask=torch.rand(9, 9)) == [0.0] * H


def test_masks_that_mean_the_same_measure_the_same():
    module, x, favor = attention(), draw(3, 20, E), Favor(D, 32)
    expected = errors(module, x, favor, attn_mask=causal(20))
    floats = torch.zeros(20, 20).masked_fill(causal(20), -torch.inf)
    assert errors(module, x, favor, attn_mask=floats) == expected
    assert errors(module, x, favor, attn_mask=floats, is_causal=True) == expected
    assert errors(module, x, favor, attn_mask=floats, need_weights=True) == expected
    ours = longattn.convert(module, "exact", causal=True)
    assert errors(ours, x, favor) == expected
    assert errors(longattn.convert(module, "exact"), x, favor, is_causal=True) == expected
    assert errors(module, x, favor) != expected
    padding = torch.zeros(3, 20).masked_fill(PADDING, -torch.inf)
    assert errors(module, x, favor, key_padding_mask=padding) == errors(module, x, favor, key_padding_mask=PADDING)


def test_a_hint_beside_another_mask_is_what_it_is_in_torch():
    # without weights to form, the causal mask; with them, the mask that came. Converted, it is causal in either case
    module, x, none, mechanism = attention(), draw(2, 12, E), torch.zeros(12, 12), longattn.Linear()
    found = errors(module, x, mechanism, attn_mask=none, is_causal=True)
    assert found == pytest.approx(by_hand(module, x, mechanism, True), rel=1e-3)
    found = errors(module, x, mechanism, attn_mask=none, is_causal=True, need_weights=True)
    assert found == pytest.approx(by_hand(module, x, mechanism, True, exact_is_causal=False), rel=1e-3)


def test_padding_changes_nothing():
    module, x, favor = attention(), draw(1, 20, E), Favor(D, 32)
    padded = torch.arange(20)[None] >= 13
    alone = fidelity_report(module, (x[:, :13],) * 3, favor, quiet=True)
    junk = x.masked_fill(padded[..., None], 50.0)
    among = fidelity_report(module, called(junk, key_padding_mask=padded), favor, quiet=True)
    assert_same_numbers(among, alone)


def test_layouts_and_nested_tensors_measure_the_same():
    module, x, favor = attention(), draw(2, 11, E), Favor(D, 32)
    expected = fidelity_report(module, (x, x, x), favor, quiet=True)
    sequence_first = attention()
    sequence_first.batch_first = False
    y = x.transpose(0, 1)
    assert_same_numbers(fidelity_report(sequence_first, [y, y, y], favor, quiet=True), expected)
    one = fidelity_report(module, (x[:1],) * 3, favor, quiet=True)
    assert_same_numbers(fidelity_report(module, (x[0],) * 3, favor, quiet=True), one)
    nested = torch.nested.as_nested_tensor([x[0], x[1, :6]])
    ours = longattn.convert(module, "exact")
    padded = torch.arange(11) >= torch.tensor([[11], [6]])
    dense = fidelity_report(module, (x, x, x, padded), favor, quiet=True)
    assert_same_numbers(fidelity_report(ours, (nested,) * 3, favor, quiet=True), dense)


# whole models


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [None, PADDING], ids=["", "padded"])
def test_torchs_encoder_cannot_bypass_it(padded, training):
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.5, batch_first=True)
    encoder, x = nn.TransformerEncoder(layer, 2).train(training), draw(3, 20, E)
    batch = {"src": x, "src_key_padding_mask": padded}
    report = fidelity_report(encoder, batch, Favor(D, 32), quiet=True)
    assert [(row.layer, row.head) for row in report.rows] == [
        (f"layers.{i}.self_attn", head) for i in range(2) for head in range(H)
    ]
    # the first layer's input is x itself, dropout is off
    alone = errors(encoder.layers[0].self_attn, x, Favor(D, 32), key_padding_mask=padded)
    assert [row.output_error for row in report.rows[:H]] == pytest.approx(alone, rel=1e-5)
    assert fidelity_report(encoder, batch, Favor(D, 32), quiet=True) == report
    if padded is not None:
        nested = torch.nested.as_nested_tensor([y[~hole] for y, hole in zip(x, padded, strict=True)])
        assert_same_numbers(fidelity_report(encoder, nested, Favor(D, 32), quiet=True), report)


def test_decoder_has_rows_for_both_attentions():
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 32, batch_first=True), 1)
    batch = {"tgt": draw(2, 7, E), "memory": draw(2, 9, E, seed=1), "tgt_mask": causal(7)}
    report = fidelity_report(decoder, batch, Favor(D, 32), quiet=True)
    assert [row.layer for row in report.rows[::H]] == ["layers.0.self_attn", "layers.0.multihead_attn"]
    assert all(row.output_error > 0 for row in report.rows)


class Twice(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention, self.unused = attention(**options), attention(seed=1)

    def forward(self, x):
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.attention(x, x, x, need_weights=False)[0]


def test_a_layer_called_twice_has_rows_for_each_call():
    report = fidelity_report(Twice(), draw(2, 7, E), Favor(D, 32), quiet=True)
    assert [(row.layer, row.call) for row in report.rows[::H]] == [("attention", 0), ("attention", 1)]
    assert "attention (call 1)" in str(report)


def test_other_mechanisms_compute_exact_attention_for_the_run():
    """So the second call sees what it would see in an exact model."""
    exact = Twice()
    approximate = Twice(cls=MultiheadAttention, mechanism=Favor(D, 8))
    approximate.attention.load_state_dict({**approximate.attention.state_dict(), **exact.attention.state_dict()})
    x = draw(2, 7, E)
    before = approximate(x)
    expected = fidelity_report(exact, x, "linear", quiet=True)
    found = fidelity_report(approximate, x, "linear", quiet=True)
    for x_row, y_row in zip(found.rows, expected.rows, strict=True):
        assert x_row.output_error == pytest.approx(y_row.output_error, rel=1e-5)
    assert torch.equal(approximate(x), before)


def state_of(model):
    training = [module.training for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    weights = [p.clone() for p in model.parameters()], [p.grad for p in model.parameters()]
    return training, hooks, weights, torch.get_rng_state().tolist()


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_it_was(fails):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 32, batch_first=True), 2)
    encoder.layers[1].self_attn = MultiheadAttention(E, H, batch_first=True, mechanism="linear")
    encoder.layers[0].eval()
    if fails:
        encoder.layers[1].linear2 = nn.Linear(3, 3)
    before, mechanism = state_of(encoder), encoder.layers[1].self_attn.mechanism
    if fails:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            fidelity_report(encoder, draw(2, 7, E), Favor(D, 32), quiet=True)
    else:
        fidelity_report(encoder, draw(2, 7, E), Favor(D, 32), quiet=True)
    after = state_of(encoder)
    assert after[:2] == before[:2]
    assert after[3:] == before[3:]
    assert all(torch.equal(x, y) for x, y in zip(after[2][0], before[2][0], strict=True))
    assert after[2][1] == [None] * len(after[2][1])
    assert encoder.layers[1].self_attn.mechanism == mechanism


def test_a_mean_is_measured_where_a_causal_call_needs_one():
    # short but for a direction that all keys share, which the softmax does not see
    module, x = attention(), draw(2, 30, E)
    with torch.no_grad():
        module.in_proj_weight[: 2 * E] *= 0.3
        module.in_proj_bias[E : 2 * E] += 3
    plain, centred = Favor(D, 64), Favor(D, 64, center_keys=True)
    batch = called(x, attn_mask=causal(30))
    first, second = (fidelity_report(module, batch, favor, quiet=True) for favor in (plain, centred))
    assert centred.key_mean is None
    for row, other in zip(first.rows, second.rows, strict=True):
        assert row.recommendation == "center_keys"
        assert row.centred_error == pytest.approx(other.error, rel=1e-4)
        assert other.output_error < row.output_error
        assert other.centred_error is None


# what cannot be measured


class Subclass(nn.MultiheadAttention):
    pass


@pytest.mark.parametrize(
    ("module", "options", "why"),
    [
        (attention(), {"attn_mask": torch.rand(20, 20)}, "cannot honour this attn_mask"),
        (attention(), {"key_padding_mask": torch.rand(3, 20)}, "takes a key_padding_mask that is bool, or float"),
        (attention(add_bias_kv=True), {}, "add_bias_kv and add_zero_attn need mechanism='exact'"),
        (attention(add_zero_attn=True), {}, "add_bias_kv and add_zero_attn need mechanism='exact'"),
        (attention(Subclass), {}, "Subclass is a subclass, whose own forward may compute something else"),
    ],
    ids=["attn_mask", "key_padding_mask", "bias_kv", "zero_attn", "subclass"],
)
def test_what_the_mechanism_cannot_take_stays_exact_and_says_why(module, options, why):
    x = draw(3, 20, E)
    report = fidelity_report(module, called(x, **options), Favor(D), quiet=True)
    for row in report.rows:
        assert row.recommendation == "keep exact"
        assert why in row.why
        assert row.output_error is None
    assert why in " ".join(str(report).split())


def test_layers_of_another_head_dim_stay_exact():
    model = nn.ModuleDict({"wide": attention(), "narrow": nn.MultiheadAttention(E, 8, batch_first=True)})
    model.forward = lambda x: [m(x, x, x) for m in model.values()]
    rows = fidelity_report(model, draw(2, 7, E), Favor(D), quiet=True).rows
    assert [row.layer for row in rows if row.output_error is None] == ["narrow"] * 8
    assert "pass Favor(2, ...)" in rows[-1].why


X = torch.zeros(1, 3, E)
BAD = [
    (lambda: fidelity_report("model", X, "linear"), TypeError, "model must be an nn.Module, got str"),
    (lambda: fidelity_report(nn.Linear(2, 2), X, "linear"), ValueError, "the model has no torch.nn.MultiheadAttention"),
    (lambda: fidelity_report(Twice(), X, "linaer"), ValueError, "mechanism must be one of 'exact', 'linear'"),
    (lambda: fidelity_report(Twice(), X, Favor(8)), ValueError, "for head_dim 8, but the attention has heads of 4"),
    (lambda: fidelity_report(Twice(), 3, "linear"), TypeError, "batch must be a tensor, a tuple of arguments or"),
    (lambda: fidelity_report(Twice().unused, {}, "linear"), TypeError, "missing 3 required positional arguments"),
]


@pytest.mark.parametrize(("call", "error", "sentence"), BAD, ids=[sentence[:40] for *_, sentence in BAD])
def test_nothing_to_measure_is_refused_in_a_sentence(call, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        call()


def test_a_model_that_calls_none_of_them_is_refused():
    model = nn.ModuleDict({"attention": attention()})
    model.forward = lambda x: x
    with pytest.raises(ValueError, match=r"called none of its attentions \('attention'\)"):
        fidelity_report(model, X, "linear")


# recommendations


def row(**numbers):
    usual = {"relative_variance": 0.1, "error": 0.2, "averaging": 0.3, "exact_averaging": 0.3}
    return Row("layer", 0, 0, **{**usual, **numbers})


PLAIN, L2, RELU = Favor(D), Favor(D, normalize="l2"), Favor(D, kind="relu")


@pytest.mark.parametrize(
    ("numbers", "favor", "expected"),
    [
        ({}, PLAIN, "keep exact"),
        ({"output_error": 0.05}, PLAIN, "use"),
        ({"output_error": 0.05, "relative_variance": 1e3}, PLAIN, "use"),
        ({"output_error": 0.4, "relative_variance": 1e3}, PLAIN, "normalize"),
        ({"output_error": 0.4, "relative_variance": 1e3, "centred_error": 0.05}, PLAIN, "center_keys"),
        ({"output_error": 0.4, "relative_variance": 1e3, "centred_error": 0.19}, PLAIN, "normalize"),
        ({"output_error": 0.4, "relative_variance": 5.0}, PLAIN, "more features"),
        ({"output_error": 0.9, "relative_variance": 5.0}, PLAIN, "normalize"),
        ({"output_error": 0.4, "relative_variance": 1e3}, L2, "raise temperature"),
        ({"output_error": 0.9, "error": 0.05, "averaging": 0.05}, L2, "lower temperature"),
        ({"output_error": 0.9, "error": 0.05}, L2, "fine-tune"),
        ({"output_error": 0.4}, PLAIN, "more features"),
        ({"output_error": 0.9}, PLAIN, "keep exact"),
        ({"output_error": 0.4, "relative_variance": None}, RELU, "fine-tune"),
        ({"output_error": 0.4, "relative_variance": None, "error": None, "averaging": None}, None, "fine-tune"),
        ({"output_error": 0.9, "relative_variance": None, "error": None, "averaging": None}, None, "keep exact"),
        ({"output_error": 0.01, "relative_variance": None, "error": None, "averaging": None}, None, "use"),
    ],
)
def test_recommendations(numbers, favor, expected):
    assert recommend(row(**numbers), favor)[0] == expected


# how it is shown


def report_of(mechanism=None):
    return fidelity_report(attention(), (draw(1, 9, E),) * 3, mechanism or Favor(D, 32), quiet=True)


def test_json_has_every_number():
    report = report_of()
    document = json.loads(report.to_json())
    assert document["mechanism"] == repr(longattn.Linear(Favor(D, 32)))
    assert document["rows"] == [dataclasses.asdict(row) for row in report.rows]
    assert document["rows"][0]["relative_variance"] > 0


def test_json_is_standard_where_the_variance_overflows():
    module = attention()
    with torch.no_grad():
        module.in_proj_weight.mul_(300)
    report = fidelity_report(module, (draw(1, 9, E),) * 3, Favor(D, 32), quiet=True)
    assert max(row.relative_variance for row in report.rows) == sys.float_info.max
    json.loads(report.to_json(), parse_constant=pytest.fail)


def test_text_and_table_say_the_same(capsys, monkeypatch):
    pytest.importorskip("rich")
    from rich.console import Console

    report = report_of()
    Console(width=200).print(report.table())
    table = capsys.readouterr().out
    for line in str(report).splitlines()[2:6]:
        assert set(line.split()) <= {*table.split(), "(model)"}
    assert all(reason in " ".join(table.split()) for reason in report.reasons())
    report.print()
    assert "recommended" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich.console", None)
    report.print()
    assert capsys.readouterr().out == f"{report}\n"


def test_prints_unless_quiet(capsys):
    batch = (draw(1, 9, E),) * 3
    assert fidelity_report(attention(), batch, Favor(D, 32)).rows == report_of().rows
    assert "Favor(4, n_features=32" in capsys.readouterr().out
    fidelity_report(attention(), batch, Favor(D, 32), quiet=True)
    assert capsys.readouterr().out == ""


def test_table_fits_eighty_columns(capsys):
    pytest.importorskip("rich")
    from rich.console import Console

    numbers = {**dict.fromkeys(NUMBERS, 0.1234), "relative_variance": 1.234e123, "effective_features": 1024.0}
    whole = Row("encoder.layers.11.self_attention", 3, 15, **numbers, recommendation="lower temperature")
    Console(width=80).print(FidelityReport("x", (whole,)).table())
    printed = capsys.readouterr().out
    for cell in ("15", "0.123", "1.23e+123", "1.02e+03", "lower temperature"):
        assert f" {cell} " in printed
