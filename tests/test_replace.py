"""`replace_attention` and `restore_attention`: another attention inside models that exist, and back."""

import copy
import io
import re

import pytest
import torch
from _attention import MECHANISMS, E, H, draw
from torch import nn

import longattn
from longattn import Favor, replace_attention, restore_attention
from longattn.nn import MultiheadAttention

# the reference is chosen where nothing was compiled, and says so
pytestmark = pytest.mark.filterwarnings("ignore:linear_attention. only the dense reference")
LINEAR = longattn.Linear()


def transformer(batch_first=True):
    torch.manual_seed(0)
    return nn.Transformer(E, 4, 2, 1, 16, dropout=0.0, batch_first=batch_first, dtype=torch.float64)


class Block(nn.Module):
    """As in a vision transformer."""

    def __init__(self, attention=None):
        super().__init__()
        self.norm = nn.LayerNorm(E, dtype=torch.float64)
        self.attention = attention or nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)

    def forward(self, x):
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


def attentions(model):
    return [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]


def facts(model):
    """Everything a module is made of, by name."""
    return {
        name: (type(module), {n: dict(x) if isinstance(x, dict) else x for n, x in vars(module).items()})
        for name, module in model.named_modules()
    }


# which says so where nested tensors are off from the start
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but")
@pytest.mark.parametrize("batch_first", [True, False])
def test_exact_changes_no_output_and_no_parameter(batch_first):
    model, x, y = transformer(batch_first=batch_first), draw(2, 7, E), draw(2, 5, E, seed=1)
    x, y = (x, y) if batch_first else (x.transpose(0, 1), y.transpose(0, 1))
    expected, parameters = model(x, y), list(model.parameters())
    report = replace_attention(model, "exact", report=False)
    assert len(report.replaced) == len(attentions(model)) == 4
    assert all(type(module) is MultiheadAttention for module in attentions(model))
    torch.testing.assert_close(model(x, y), expected)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("mechanism", MECHANISMS.values(), ids=MECHANISMS)
def test_every_mechanism_trains_in_the_model(mechanism):
    model, x, y = transformer(), draw(2, 7, E), draw(2, 5, E, seed=1)
    before, names = model(x, y), list(model.state_dict())
    replace_attention(model, mechanism, report=False)
    assert [name for name in model.state_dict() if "feature_map" not in name] == names
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x, y).square().sum().backward()
    optimizer.step()
    restore_attention(model)
    assert not torch.equal(model(x, y), before)


def test_an_optimizer_made_before_trains_the_replaced_model():
    model, x = Block(), draw(2, 9, E)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replace_attention(model, LINEAR, report=False)
    before = model(x)
    before.square().sum().backward()
    optimizer.step()
    assert not torch.equal(model(x), before)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("mechanism", [LINEAR, longattn.LSH(n_hashes=1, chunk_size=1), "favor"], ids=repr)
@pytest.mark.parametrize("training", [True, False])
def test_restoring_leaves_no_trace(training, mechanism):
    model, x, y = transformer(), draw(2, 7, E), draw(2, 5, E, seed=1)
    model.train(training)
    model.encoder.layers[0].self_attn.register_forward_hook(lambda *_: None)
    before, text, expected = facts(model), repr(model), model(x, y)
    replace_attention(model, mechanism, report=False)
    assert all(module.training is training for module in model.modules())
    assert not torch.allclose(model(x, y), expected)
    changed = restore_attention(model)
    assert changed == ["encoder", *(name for name, _ in model.named_modules() if name.endswith("attn"))]
    assert facts(model) == before
    assert repr(model) == text
    assert torch.equal(model(x, y), expected)
    assert restore_attention(model) == []


def test_the_first_state_is_restored_however_often_it_was_replaced():
    model = nn.ModuleList([Block(), Block(MultiheadAttention(E, H, mechanism=longattn.LSH(), causal=True))])
    before = facts(model)
    for mechanism in (LINEAR, "favor", "exact"):
        replace_attention(model, mechanism, report=False)
        assert [module.mechanism.work(False) for module in attentions(model)].count(None) in (0, 2)
        assert [module.causal for module in attentions(model)] == [False, True]
    restore_attention(model)
    assert facts(model) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, None], ids=["deepcopy", "torch.save"])
def test_a_copy_of_a_replaced_model_can_be_restored(copied):
    model, x = Block(), draw(2, 5, E)
    expected = model(x)
    replace_attention(model, LINEAR, report=False)
    if copied is None:
        file = io.BytesIO()
        torch.save(model, file)
        twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    else:
        twin = copied(model)
    assert torch.equal(twin(x), model(x))
    restore_attention(twin)
    assert torch.equal(twin(x), expected)
    assert type(model.attention) is MultiheadAttention


# what is replaced


WHERE = {
    "all": (None, 4),
    "regular expression": (r"encoder\.layers\.1", 1),
    "function": (lambda name, module: "multihead" in name and module.num_heads == 4, 1),
    "names": (["encoder.layers.0.self_attn", "decoder.layers.0.multihead_attn"], 2),
}


@pytest.mark.parametrize(("where", "count"), WHERE.values(), ids=WHERE)
def test_where_says_which(where, count):
    model = transformer()
    report = replace_attention(model, LINEAR, where=where, report=False)
    ours = [module for module in attentions(model) if isinstance(module, MultiheadAttention)]
    assert len(report.replaced) == len(ours) == count
    assert [row.why for row in report.rows if row.why] == ["where leaves it out"] * (4 - count)


def test_a_shared_attention_is_replaced_once_under_all_its_names():
    shared = Block()
    model = nn.Sequential(shared, Block(shared.attention), Block())
    report = replace_attention(model, LINEAR, report=False)
    assert report.replaced == ["0.attention = 1.attention", "2.attention"]
    assert replace_attention(model, "exact", where=["1.attention"], report=False).replaced == report.replaced[:1]


def test_a_model_that_is_an_attention_is_replaced_in_place():
    model, x = nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64), draw(2, 5, E)
    report = replace_attention(model, LINEAR, report=False)
    assert report.replaced == [""]
    assert model.mechanism == LINEAR
    restore_attention(model)
    assert type(model) is nn.MultiheadAttention
    model(x, x, x)


def test_by_name_each_attention_has_features_of_its_own_and_a_description_shares_them():
    for mechanism, count in (("favor", 4), (Favor(E // 4, 16), 1)):
        model = transformer()
        replace_attention(model, mechanism, report=False)
        assert len({id(module.feature_map) for module in attentions(model)}) == count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_and_frozen_parameters_stay(dtype):
    model = Block().to(dtype).requires_grad_(False)
    replace_attention(model, "favor", report=False)
    assert {p.dtype for name, p in model.named_parameters() if "feature_map" not in name} == {dtype}
    assert not any(p.requires_grad for name, p in model.named_parameters() if "feature_map" not in name)
    assert model(draw(2, 5, E, dtype=dtype)).dtype == dtype


# what is kept


def test_hooks_stay_and_their_handles_still_remove_them():
    model, x, calls = Block(), draw(2, 5, E), []
    attention = model.attention
    handles = [
        attention.register_forward_hook(lambda *_: calls.append("forward")),
        attention.register_forward_pre_hook(lambda *_, **__: calls.append("before"), with_kwargs=True),
        attention.register_full_backward_hook(lambda *_: calls.append("backward")),
        attention.out_proj.register_forward_hook(lambda *_: calls.append("out_proj")),
    ]
    replace_attention(model, LINEAR, report=False)
    model(x.requires_grad_()).sum().backward()
    assert calls == ["before", "out_proj", "forward", "backward"]
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    assert len(calls) == 4


PARAMETRIZED = {
    "weight_norm": lambda module: nn.utils.parametrizations.weight_norm(module, "in_proj_weight"),
    "spectral_norm": lambda module: nn.utils.parametrizations.spectral_norm(module, "in_proj_weight"),
    "old weight_norm": lambda module: nn.utils.weight_norm(module, "in_proj_weight"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("parametrize", PARAMETRIZED.values(), ids=PARAMETRIZED)
def test_parametrized_weights_stay_parametrized(parametrize):
    model, x = Block().eval(), draw(2, 5, E)
    parametrize(model.attention)
    cls, names, expected = type(model.attention), list(model.state_dict()), model(x)
    replace_attention(model, "exact", report=False)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), expected)
    (model(x).sum() + model.attention.in_proj_weight.sum()).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "in_proj_weight" in name)
    restore_attention(model)
    assert type(model.attention).__name__ == cls.__name__
    assert type(model.attention).__mro__[1:] == cls.__mro__[1:]
    torch.testing.assert_close(model(x), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoders_nested_tensors_are_off_until_it_is_restored(monkeypatch):
    layer = nn.TransformerEncoderLayer(E, 4, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    seen, forward = [], MultiheadAttention.forward

    def watched(self, query, *args, **kwargs):
        seen.append(query)
        return forward(self, query, *args, **kwargs)

    monkeypatch.setattr(MultiheadAttention, "forward", watched)
    x, padding = draw(3, 6, E), torch.arange(6) >= torch.tensor([[6], [4], [2]])
    report = replace_attention(encoder, LINEAR, report=False)
    with torch.no_grad():
        encoder(x, src_key_padding_mask=padding)
        assert [q.is_nested for q in seen] == [False, False]
        assert report.nested == ("",)
        assert encoder.enable_nested_tensor
        restore_attention(encoder)
        assert encoder.use_nested_tensor
        encoder(x, src_key_padding_mask=padding)
    assert len(seen) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_computes_what_it_was_given():
    torch._dynamo.reset()
    model, x = Block(), draw(2, 9, E)
    compiled = torch.compile(model, backend="eager")
    exact = compiled(x)
    replace_attention(compiled, LINEAR, report=False)
    linear = compiled(x)
    assert not torch.allclose(linear, exact)
    torch.testing.assert_close(linear, model(x))
    replace_attention(compiled, longattn.Local(2), report=False)
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(compiled(x), linear)
    assert restore_attention(compiled) == ["_orig_mod.attention"]
    torch.testing.assert_close(compiled(x), exact)


# what is not replaced


class Subclass(nn.MultiheadAttention):
    pass


class CrossAttention(nn.Module):
    pass


def hard_model():
    model = nn.ModuleDict({
        "plain": nn.MultiheadAttention(E, H), "subclass": Subclass(E, H),
        "other": CrossAttention(), "same": CrossAttention(),
        "extra": nn.MultiheadAttention(E, H, add_bias_kv=True), "wide": nn.MultiheadAttention(2 * E, H),
        "memory": nn.MultiheadAttention(E, H, kdim=5),
    })  # fmt: skip
    model["quantised"] = torch.ao.nn.quantizable.MultiheadAttention(E, H)
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_table_says_what_was_not_replaced_and_why(capsys):
    shared = longattn.LSH(share_qk=True)
    reasons = {
        "subclass": "its class test_replace.Subclass is a subclass of torch.nn.MultiheadAttention, whose own forward",
        "extra": "add_bias_kv and add_zero_attn need mechanism='exact', got LSH(share_qk=True)",
        "memory": "LSH(share_qk=True) has no keys but its queries, and kdim or vdim makes others; take share_qk=False",
        "quantised": "it is quantised (torch.ao.nn.quantizable.modules.activation.MultiheadAttention)",
        "other and 1 more": "it is no torch.nn.MultiheadAttention",
    }
    model = hard_model()
    report = replace_attention(model, shared)
    assert report.replaced == ["plain", "wide"]
    assert {row.name for row in report.rows if row.why} == set(reasons)
    for row in report.rows:
        assert row.why.startswith(reasons.get(row.name, ""))
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    assert printed.startswith("replace_attention: 2 of 7 attentions now compute LSH(share_qk=True)\n")
    assert re.search(r"plain +LSH\(share_qk=True\)\n", printed)
    assert re.search(r"subclass +Subclass +not replaced: its class", printed)
    report = replace_attention(hard_model(), Favor(E // H), report=False)
    why = next(row.why for row in report.rows if row.name == "wide")
    assert why.startswith("the Favor is for head_dim 4, but the attention has heads of 8 (embed_dim 24 / 3 heads)")


BAD = {
    "no module": (lambda: replace_attention(3, LINEAR), TypeError, "model must be an nn.Module, got int 3"),
    "nothing": (lambda: replace_attention(nn.Linear(2, 2), LINEAR), ValueError, "the model has no torch.nn.Multihead"),
    "all": (
        lambda: replace_attention(Subclass(E, H), LINEAR), ValueError, "nothing to replace: the model: its class test_",
    ),
    "where": (lambda: replace_attention(Block(), LINEAR, where="q"), ValueError, "attention: where leaves it out"),
    "names": (
        lambda: replace_attention(Block(), LINEAR, where=["norm"]), ValueError,
        "where names 'norm', which is no attention of this model; it has 'attention'",
    ),
    "number": (lambda: replace_attention(Block(), LINEAR, where=3), TypeError, "or names, got int 3"),
    "restored": (lambda: restore_attention(3), TypeError, "restore_attention: model must be an nn.Module, got int 3"),
    "pattern": (lambda: replace_attention(Block(), LINEAR, where="("), ValueError, "'(' is no regular expression"),
    "mechanism": (lambda: replace_attention(Block(), "quick"), ValueError, "mechanism must be one of 'exact'"),
    "device": (
        lambda: replace_attention(Block(), Favor(4, device="meta")), ValueError,
        "replace_attention: the mechanism must be on the device of the weights, got cpu and meta",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "sentence"), BAD.values(), ids=BAD)
def test_what_cannot_be_replaced_is_refused_in_a_sentence(call, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        call()


@pytest.mark.parametrize("mechanism", [longattn.LSH(), "favor", LINEAR], ids=repr)
@pytest.mark.parametrize("assign", [True, False])
def test_a_model_without_memory_comes_to_life(assign, mechanism):
    source, model = Block().eval(), Block().to("meta")
    with torch.device("meta"):
        replace_attention(model, mechanism, report=False)
    model = model.eval() if assign and mechanism != "favor" else model.eval().to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), assign=assign)
    replace_attention(source, mechanism, report=False)
    x = draw(2, 9, E)
    assert torch.equal(model(x), source(x))


def test_memory_may_come_after_a_replacement_of_what_draws_nothing():
    model = Block().to("meta")
    replace_attention(model, longattn.LSH(), report=False)
    model.to_empty(device="cpu").load_state_dict(Block().state_dict())
    assert model.train()(draw(2, 9, E)).isfinite().all()
    assert model.attention.draws.step == 1
    with pytest.raises(ValueError, match="got meta and cpu; do this once the weights have memory"):
        replace_attention(Block().to("meta"), "favor")


def test_a_refused_replacement_changes_nothing():
    model = nn.ModuleList([Block(), Block()])
    before = facts(model)
    with pytest.raises(ValueError, match="on the device of the weights"):
        replace_attention(model, Favor(4, device="meta"))
    assert facts(model) == before


# adapters


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mechanism", ["exact", "linear", "lsh"])
def test_lora_adapters_of_peft_take_part(mechanism):
    peft = pytest.importorskip("peft")
    layer = nn.TransformerEncoderLayer(E, 4, 16, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2), draw(2, 9, E, dtype=torch.float32)
    replace_attention(model, mechanism, report=False)
    before = model.eval()(x)
    config = peft.LoraConfig(target_modules=["self_attn"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        fast = adapted.eval()(x)
    slow = adapted(x)
    torch.testing.assert_close(fast, slow)
    assert not torch.allclose(slow, before, atol=1e-3)
    slow.square().sum().backward()
    trained = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 8
    assert all(grad.abs().max() > 0 for grad in trained)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(x), slow, rtol=1e-4, atol=1e-4)
    assert all(isinstance(module, MultiheadAttention) for module in attentions(merged))
