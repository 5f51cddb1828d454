"""The feed-forward layer and the loss in chunks: the numbers of the whole, in the memory of a chunk."""

import pytest
import torch
from _reversible import Live
from torch import nn
from torch.nn import functional as F

import longattn
from longattn.nn import ChunkedFeedForward, ReversibleBlock, ReversibleSequence, chunked_cross_entropy
from longattn.nn.chunked import ACTIVATIONS
from longattn.testing.assertions import assert_near, assert_same_bits
from longattn.testing.cases import draw

D, HIDDEN, V = 6, 20, 11


def layer(chunk_size=None, **options):
    torch.manual_seed(0)
    return ChunkedFeedForward(D, HIDDEN, chunk_size=chunk_size, **options)


def results(module, x, needs_x=True):
    x = x.detach().requires_grad_(needs_x)
    y = module(x)
    leaves = [x] * needs_x + [p for p in module.parameters() if p.requires_grad]
    return y.detach(), *torch.autograd.grad(y.square().sum(), leaves)


def compare(found, expected, tolerance=2e-6):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert_near(a, b, tolerance)


# feed-forward


@pytest.mark.parametrize("chunk_size", [1, 7, 26, 100])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_chunks_change_nothing(activation, chunk_size):
    x = draw((2, 13, D))[0]
    expected = results(layer(activation=activation), x)
    compare(results(layer(chunk_size, activation=activation), x), expected)
    assert torch.equal(expected[0], results(layer(26, activation=activation), x)[0])


def test_the_layer_is_what_it_says():
    x, (act, _) = draw((3, D))[0], ACTIVATIONS["gelu"]
    plain, gated = layer(bias=False), layer(activation="swiglu", bias=False)
    assert_near(plain(x), act(x @ plain.up.weight.T) @ plain.down.weight.T, 1e-6)
    a, b = (x @ gated.up.weight.T).chunk(2, -1)
    assert_near(gated(x), (F.silu(a) * b) @ gated.down.weight.T, 1e-6)
    assert {name for name, _ in plain.named_parameters()} == {"up.weight", "down.weight"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype):
    x = draw((40, D), dtype=dtype)[0]
    compare(results(layer(7).to(dtype), x), results(layer().to(dtype), x), 4 * torch.finfo(dtype).eps)


def test_autocast_repeats():
    x, found = draw((40, D))[0], []
    for chunk_size in (None, 7):
        module = layer(chunk_size)
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        found.append([y, *torch.autograd.grad(y.float().square().sum(), [*module.parameters()])])
    compare(*found, 1e-2)


def test_dropout_repeats_in_the_backward_pass_and_leaves_the_generator():
    """Linear in x for the mask that was drawn: the gradient says which mask the backward pass saw."""
    module = layer(7, activation="relu", dropout=0.5)
    x = draw((40, D))[0].requires_grad_()
    torch.manual_seed(3)
    y = module(x)
    after = torch.get_rng_state()
    (dx,) = torch.autograd.grad(y.sum(), [x])
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(3)
    pieces = []
    for start in range(0, 40, 7):
        h = torch.relu(module.up(x[start : start + 7]))
        pieces.append(module.down(torch.dropout(h, 0.5, True)))
    assert_near(y, torch.cat(pieces), 1e-6)
    assert_near(dx, torch.autograd.grad(torch.cat(pieces).sum(), [x])[0], 1e-6)
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(module.eval()(x), module(x))


def test_frozen_parameters_inputs_without_grad_and_hooks():
    x = draw((40, D))[0]
    made = [layer(chunk_size) for chunk_size in (7, None)]
    for module in made:
        module.up.requires_grad_(False)
        module.down.weight.register_hook(lambda g: 2 * g)
    compare(results(made[0], x), results(made[1], x))
    compare(results(made[0], x, needs_x=False), results(made[1], x, needs_x=False))
    with torch.no_grad():
        assert_near(made[0](x), made[1](x), 1e-6)
    for module in made:
        module.requires_grad_(False)
    compare(*([results(module, x)[1]] for module in made))


def test_strides_and_empty_inputs():
    x = draw((D, 5, 8))[0].transpose(0, 2)
    compare(results(layer(3), x), results(layer(), x))
    assert layer(3)(torch.ones(0, D)).shape == (0, D)
    assert layer(3)(torch.ones(2, 0, D)).shape == (2, 0, D)


def test_the_hidden_layer_never_exists_whole():
    x = torch.randn(2048, 16, requires_grad=True)
    module = ChunkedFeedForward(16, 256, chunk_size=64)
    with Live() as live:
        module(x).sum().backward()
    # what a chunk takes, the output, its gradient and that of x; 2048 rows of the hidden layer are sixteen x
    chunk = 64 * 256 * 4
    assert live.peak <= 8 * chunk + 4 * x.nbytes + 4 * sum(p.nbytes for p in module.parameters())
    assert live.peak < 2048 * 256 * 4


def test_inside_reversible_blocks():
    x, found = draw((2, 30, D))[0], []
    for reversible in (True, False):
        torch.manual_seed(0)
        blocks = [
            ReversibleBlock(nn.Linear(D, D), ChunkedFeedForward(D, HIDDEN, chunk_size=7, dropout=0.2), exact=True)
            for _ in range(3)
        ]
        torch.manual_seed(1)
        found.append(results(ReversibleSequence(blocks, reversible=reversible), x))
    for a, b in zip(*found, strict=True):
        assert_same_bits("gradient", a, b)


@pytest.mark.parametrize("bypassed", [False, True])
def test_what_a_layer_made_from_it_does_not_use_gets_no_gradient(bypassed):
    class Made(ChunkedFeedForward):
        def __init__(self, chunk_size):
            super().__init__(D, HIDDEN, chunk_size=chunk_size)
            self.unused = nn.Parameter(torch.ones(3))

        def _whole(self, x):
            return super()._whole(x.detach() if bypassed else x)

    x, found = draw((40, D))[0], []
    for chunk_size in (7, None):
        torch.manual_seed(0)
        module, leaf = Made(chunk_size), x.clone().requires_grad_()
        (module(leaf).square().sum() + leaf.sum()).backward()
        assert module.unused.grad is None
        found.append([leaf.grad, *(p.grad for p in module.parameters() if p is not module.unused)])
    compare(*found)


def test_changes_before_the_backward_pass_are_refused():
    module = layer(7)
    loss = module(draw((40, D))[0]).sum()
    with torch.no_grad():
        module.up.bias.add_(1)
    with pytest.raises(RuntimeError, match=r"^ChunkedFeedForward: the backward pass runs it again.*changed since"):
        loss.backward()
    with pytest.raises(RuntimeError, match="ChunkedFeedForward has no second derivative"):
        torch.autograd.grad(module(draw((40, D))[0]).sum(), [module.up.bias], create_graph=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"chunk_size": 0}, "chunk_size must be a positive"),
        ({"activation": "selu"}, "activation must be one of 'gelu'"),
        ({"dropout": 1.5}, "dropout must be a probability"),
    ],
)
def test_errors_are_sentences(options, sentence):
    with pytest.raises(ValueError, match=f"^ChunkedFeedForward: {sentence}"):
        ChunkedFeedForward(D, HIDDEN, **options)


# the loss


def loss_inputs(n=40, dtype=torch.float32, bias=True):
    hidden, weight, b = draw((2, n // 2, D), (V, D), (V,), dtype=dtype)
    target = torch.randint(V, (2, n // 2), generator=torch.Generator().manual_seed(0))
    target[0, 2] = target[1, 0] = -100
    return [x.requires_grad_() for x in (hidden, weight, *([b] if bias else []))], target


def losses(leaves, target, chunk_size, weights=None, **options):
    hidden, weight, *bias = leaves
    bias = bias[0] if bias else None
    if chunk_size is None:
        logits = F.linear(hidden, weight, bias).flatten(0, -2)
        loss = F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, target.flatten(), **options)
        loss = loss.view(target.shape) if options.get("reduction") == "none" else loss
    else:
        loss = chunked_cross_entropy(hidden, weight, target, bias=bias, chunk_size=chunk_size, **options)
    scale = 3.0 if weights is None else weights
    return loss.detach(), *torch.autograd.grad((scale * loss).sum(), leaves)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_is_that_of_the_whole(reduction, smoothing, bias):
    leaves, target = loss_inputs(bias=bias)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    weights = draw(target.shape, seed=4)[0] if reduction == "none" else None
    expected = losses(leaves, target, None, weights, **options)
    for chunk_size in (1, 7, 40, 1000):
        compare(losses(leaves, target, chunk_size, weights, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_loss_in_other_dtypes(dtype):
    leaves, target = loss_inputs(dtype=dtype)
    found, expected = losses(leaves, target, 7), losses(leaves, target, None)
    compare(found, expected, 1e-12 if dtype == torch.float64 else 2e-2)
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_the_loss_under_autocast():
    leaves, target = loss_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = losses(leaves, target, 7), losses(leaves, target, None)
    compare(found, expected, 1e-2)
    assert (found[0] - losses(leaves, target, None)[0]).abs() > 0


def test_another_ignored_index_and_none_left():
    leaves, target = loss_inputs()
    target = target.clamp(min=0)
    compare(losses(leaves, target, 7, ignore_index=2), losses(leaves, target, None, ignore_index=2))
    loss, *grads = losses(leaves, torch.full_like(target, -100), 7)
    assert loss.isnan()
    assert all((g == 0).all() for g in grads)
    assert losses(leaves, torch.full_like(target, -100), 7, reduction="sum")[0] == 0


def test_only_what_needs_a_gradient_gets_one():
    (hidden, weight, bias), target = loss_inputs()
    for leaf, given in ((hidden, (hidden, weight.detach())), (weight, (hidden.detach(), weight))):
        (found,) = torch.autograd.grad(chunked_cross_entropy(*given, target, chunk_size=7), [leaf])
        (expected,) = torch.autograd.grad(F.cross_entropy((hidden @ weight.T).flatten(0, 1), target.flatten()), [leaf])
        assert_near(found, expected, 1e-6)
    expected = losses([hidden, weight, bias], target, None)[0]
    with torch.no_grad():
        assert_near(chunked_cross_entropy(hidden, weight, target, bias=bias), expected, 1e-6)


def test_the_loss_may_be_walked_again():
    leaves, target = loss_inputs()
    loss = chunked_cross_entropy(*leaves[:2], target, bias=leaves[2], chunk_size=7)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        assert_same_bits("again", a, b)
    with pytest.raises(RuntimeError, match="chunked_cross_entropy has no second derivative"):
        torch.autograd.grad(chunked_cross_entropy(*leaves[:2], target), leaves[:1], create_graph=True)


def test_gradcheck():
    leaves, target = loss_inputs(n=6, dtype=torch.float64)
    target = target.clamp(min=0)
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda h, w, b, r=reduction: chunked_cross_entropy(h, w, target, bias=b, chunk_size=2, reduction=r), leaves
        )


def test_the_logits_never_exist_whole():
    n, vocabulary = 4096, 512
    hidden, weight = torch.randn(n, 8, requires_grad=True), torch.randn(vocabulary, 8, requires_grad=True)
    target = torch.randint(vocabulary, (n,))
    with Live() as live:
        chunked_cross_entropy(hidden, weight, target, chunk_size=64).backward()
    assert live.peak <= 4 * 64 * vocabulary * 4 + 4 * (hidden.nbytes + weight.nbytes) + 4 * target.nbytes
    assert live.peak < n * vocabulary * 4 / 4


def test_large_logits_do_not_overflow():
    leaves, target = loss_inputs()
    leaves = [(100 * x.detach()).requires_grad_() for x in leaves]
    compare(losses(leaves, target, 7), losses(leaves, target, None), 1e-5)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"target": torch.zeros(2, 20)}, TypeError, "target must hold class numbers"),
        ({"target": torch.full((2, 20), V)}, ValueError, f"target must be from 0 to {V - 1} or ignore_index"),
        ({"target": torch.full((2, 20), -1)}, ValueError, f"target must be from 0 to {V - 1} or ignore_index"),
        ({"target": torch.zeros(40, dtype=torch.int64)}, ValueError, "without the last dim"),
        ({"weight": torch.ones(V, D + 1)}, ValueError, r"hidden must be \[..., D\] and weight \[V, D\]"),
        ({"weight": torch.ones(V, D).half()}, TypeError, "one dtype for all"),
        (
            {"weight": torch.ones(0, D), "bias": None},
            ValueError,
            r"weight must be \[V, D\] with a class at least",
        ),
        ({"bias": torch.ones(3)}, ValueError, r"bias must be \[V\]"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"label_smoothing": 2}, ValueError, "label_smoothing must be from 0 to 1"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be a positive"),
    ],
)
def test_errors_of_the_loss_are_sentences(change, error, sentence):
    (hidden, weight, bias), target = loss_inputs()
    arguments = {"hidden": hidden, "weight": weight, "target": target, "bias": bias} | change
    with pytest.raises(error, match=f"^chunked_cross_entropy: .*{sentence}"):
        chunked_cross_entropy(**arguments)


def test_recomputing_is_true_in_the_second_run():
    seen, module = [], layer(7)
    module.up.register_forward_hook(lambda *_: seen.append(longattn.recomputing()))
    module(draw((14, D))[0]).sum().backward()
    assert seen == [False, False, True, True]


@pytest.mark.parametrize("tail", [[], [nn.Dropout(0.0)], [nn.Linear(16, 16)]], ids=["last", "dropout", "linear"])
def test_a_reversible_layer_computes_each_chunk_twice_and_not_three_times(tail, monkeypatch):
    whole, runs = ChunkedFeedForward._whole, []
    monkeypatch.setattr(ChunkedFeedForward, "_whole", lambda self, x: runs.append(1) or whole(self, x))

    def gradients(foresees: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer = ChunkedFeedForward(16, 32, chunk_size=10, dropout=0.2)
        layer._foresees = foresees
        block = ReversibleBlock(nn.Linear(16, 16), nn.Sequential(nn.LayerNorm(16), layer, *tail))
        x = torch.randn(2, 33, 16, requires_grad=True)
        runs.clear()
        torch.stack(block(x, x)).square().sum().backward()
        return [x.grad, *(p.grad for p in layer.parameters())]

    ahead = gradients(True)
    # seven chunks; where the layer is not the last its gradient is not known before
    assert len(runs) == (21 if any(isinstance(m, nn.Linear) for m in tail) else 14)
    assert all(torch.equal(a, b) for a, b in zip(ahead, gradients(False), strict=True))


class Transposed(nn.Module):
    def forward(self, x):
        return x.mT


def test_a_gradient_that_arrives_in_another_order_is_not_the_one_foreseen():
    found = []
    for foresees in (True, False):
        torch.manual_seed(0)
        layer = ChunkedFeedForward(16, 32, chunk_size=10)
        layer._foresees = foresees
        block = ReversibleBlock(nn.Linear(16, 16), nn.Sequential(layer, Transposed()))
        x, weight = draw((1, 16, 16), (1, 16, 32))
        # gradients that are halves of one tensor, as are those of merge="cat"
        (torch.cat(block(x, x), -1) * weight).sum().backward()
        found.append([p.grad for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# torch looks at .grad where its graph breaks
@pytest.mark.filterwarnings("ignore:.*non-leaf Tensor:UserWarning")
def test_a_compiled_loss_is_the_same_and_warns_of_nothing():
    torch._dynamo.reset()
    hidden, weight = draw((2, 9, D), (V, D))
    target = torch.arange(18).view(2, 9) % V

    def loss(hidden, weight):
        return chunked_cross_entropy(torch.tanh(hidden), weight, target, chunk_size=4)

    leaves = [x.requires_grad_() for x in (hidden, weight)]
    values = [f(*leaves) for f in (torch.compile(loss, backend="aot_eager"), loss)]
    assert_same_bits("loss", *values)
    for a, b in zip(*(torch.autograd.grad(value, leaves) for value in values), strict=True):
        assert_same_bits("gradient", a, b)
