"""nn.MultiheadAttention within what torch builds around it: encoders, decoders, nested tensors, torch.compile."""

import copy
import dataclasses
import functools
import itertools
import pickle
import re

import pytest
import torch
from _attention import MECHANISMS, E, build, draw, gradients
from torch import nn
from torch.utils.checkpoint import checkpoint

import longattn
from longattn.nn import MultiheadAttention
from longattn.nn.draws import Draws
from longattn.testing.assertions import assert_same_bits

# the reference is chosen where nothing was compiled, and says so
pytestmark = pytest.mark.filterwarnings("ignore:linear_attention. only the dense reference")


@pytest.fixture(params=MECHANISMS)
def mechanism(request):
    return MECHANISMS[request.param]


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


@pytest.mark.parametrize("name", ["exact", "linear"])
def test_the_hook_is_what_keeps_torch_from_bypassing(name, calls):
    encoder, x = encoder_with(MECHANISMS[name], replaced=False, layers=1).eval(), torch.randn(3, 6, E)
    encoder.layers[0].self_attn._forward_pre_hooks.clear()
    with torch.no_grad():
        if name == "exact":
            encoder(x)
        else:
            # another attention than the one asked for is never computed
            with pytest.raises(RuntimeError, match=r"in place of Linear\(\), because the forward pre-hook"):
                encoder(x)
    assert not calls


def test_hooks_of_others_come_and_go_beside_it(calls):
    encoder, x = encoder_with("linear", replaced=False, layers=1).eval(), torch.randn(3, 6, E)
    encoder = pickle.loads(pickle.dumps(encoder))
    handles = [encoder.layers[0].self_attn.register_forward_pre_hook(lambda *_: None) for _ in range(3)]
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        encoder(x)
    assert len(calls) == 1


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


LAYOUTS = pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@LAYOUTS
@pytest.mark.parametrize("is_causal", [False, True])
def test_nested_tensor_is_the_padded_one(is_causal, layout, mechanism):
    module = build(mechanism)
    rows = [draw(n, E, seed=n).requires_grad_() for n in (5, 2, 3)]
    nested = torch.nested.as_nested_tensor(rows, layout=layout)
    output, weights = module(nested, nested, nested, is_causal=is_causal)
    assert output.layout == layout
    assert weights.shape == (3, 5, 5)
    for x, y in zip(rows, output.unbind(), strict=True):
        torch.testing.assert_close(y, module(x, x, x, is_causal=is_causal)[0])
    alone = module(rows[1], rows[1], rows[1], is_causal=is_causal)[0].square().sum()
    grads = [torch.autograd.grad(f, rows[1])[0] for f in (output.unbind()[1].square().sum(), alone)]
    torch.testing.assert_close(*grads)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@LAYOUTS
def test_nested_memory_is_the_padded_one(layout, mechanism):
    if isinstance(mechanism, longattn.Auto):
        pytest.skip("it goes by the padded length")
    module = build(mechanism)
    rows, memory = ([draw(n, E, seed=n) for n in sizes] for sizes in ((5, 2, 3), (1, 7, 4)))
    query, key = (torch.nested.nested_tensor(x, layout=layout) for x in (rows, memory))
    output, _ = module(query, key, key)
    for x, y, z in zip(rows, memory, output.unbind(), strict=True):
        torch.testing.assert_close(z, module(x, y, y)[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@LAYOUTS
def test_nested_tensor_is_refused_where_it_would_lose_something(layout):
    nested, longer = (torch.nested.nested_tensor([draw(3, E), draw(n, E)], layout=layout) for n in (2, 3))
    padding = torch.zeros(2, 3, dtype=torch.bool)
    module, last, refused = build(), build(batch_first=False), "MultiheadAttention does not support this NestedTensor: "
    for call, why in (
        (lambda: module(nested, nested, longer), "key and value have other lengths"),
        (lambda: module(nested.to_padded_tensor(0.0), nested, nested), "query, key and value are not all nested"),
        (lambda: last(nested, nested, nested), "batch_first was not True"),
        (lambda: module(nested, nested, nested, padding), "masks were supplied"),
    ):
        with pytest.raises(AssertionError, match=re.escape(refused + why)):
            call()


# compile, export, checkpoint

LENGTHS = (5, 70, 17, 33, 39, 40, 41, 100, 64, 128, 63, 3, 2, 200, 257, 300, 512, 1030, 777, 1100)


# torch deprecates parts of itself that its tracing uses
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in MECHANISMS if name != "relu"])
def test_a_compiled_encoder_has_few_graphs_for_many_lengths(name):
    layer, mechanism = nn.TransformerEncoderLayer(E, 2, 16, dropout=0.1, batch_first=True), redrawn(MECHANISMS[name])
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    longattn.replace_attention(encoder, mechanism, report=False)
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(encoder, fullgraph=True, dynamic=True, backend=backend)
    for L in LENGTHS:
        x, padding = draw(2, L, E, seed=L, dtype=torch.float32), torch.arange(L) >= torch.tensor([[L], [(L + 1) // 2]])
        results = []
        for run in (encoder, compiled):
            torch.manual_seed(L)
            results.append(run(x, src_key_padding_mask=padding)[~padding])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        results[1].sum().backward()
        with torch.no_grad():
            encoder.layers[0].self_attn.out_proj.weight.mul_(1)
    assert len(graphs) <= 3
    steps = [int(module.step) for module in encoder.modules() if isinstance(module, Draws)]
    assert steps == ([len(LENGTHS)] if name == "lsh" else [])


def redrawn(mechanism):
    return dataclasses.replace(mechanism, resample="step") if isinstance(mechanism, longattn.LSH) else mechanism


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("name", "need_weights"), [("exact", True), ("linear", False)])
def test_gradients_of_a_compiled_module_are_those_of_the_module(name, need_weights):
    module = build(MECHANISMS[name]).eval()
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for L in (5, 70):
            x = draw(2, L, E, seed=L)
            # float masks are what torch's encoder passes on
            padding = torch.zeros(2, L).masked_fill(torch.arange(L) >= torch.tensor([[L], [3]]), -torch.inf)
            results = [f(x, x, x, padding, need_weights, is_causal=True) for f in (module, compiled)]
            grads = [gradients(module, *result) for result in results]
            torch.testing.assert_close(results[1], results[0])
            torch.testing.assert_close(grads[1], grads[0])
    if name == "linear":
        with pytest.raises(RuntimeError, match="values 0 and -inf"):
            compiled(x, x, x, padding + 1, need_weights, is_causal=True)


class Attention(nn.Module):
    """Causal self-attention of one argument."""

    def __init__(self, mechanism, **options):
        super().__init__()
        self.inner = build(mechanism, **options)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False, is_causal=True)[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_exported_module_takes_other_lengths(mechanism):
    module = Attention(mechanism).eval()
    with torch.no_grad():
        length = torch.export.Dim("length", min=8, max=4096)
        exported = torch.export.export(module, (draw(2, 70, E),), dynamic_shapes=({1: length},)).module()
        for L in (9, 70, 1100):
            torch.testing.assert_close(exported(draw(2, L, E, seed=L)), module(draw(2, L, E, seed=L)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_forward_is_replayed_as_it_ran(reentrant, mechanism):
    module, x = Attention(redrawn(mechanism), dropout=0.3), draw(2, 70, E).requires_grad_()
    results = []
    for run in (module, functools.partial(checkpoint, module, use_reentrant=reentrant)):
        torch.manual_seed(0)
        module.zero_grad()
        output = run(x)
        x.grad = None
        output.square().sum().backward()
        results.append([output, x.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        assert_same_bits("output and gradients", a, b)
