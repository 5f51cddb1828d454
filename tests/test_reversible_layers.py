"""Reversible layers against the same function by plain autograd: gradients, rebuilt activations, memory, manners."""

import gc
import weakref

import pytest
import torch
from _reversible import D, Keeper, L, Live, assert_same, branch, results, stack
from torch import nn
from torch.utils._pytree import tree_leaves

from longattn.nn import ChunkedFeedForward, LSHSelfAttention, ReversibleBlock, ReversibleSequence
from longattn.testing.assertions import assert_near, assert_same_bits
from longattn.testing.cases import draw


@pytest.fixture
def x():
    return draw((2, L, D))[0]


# the laws of shared/math: gradients and reconstruction


def test_gradients_through_64_blocks_are_those_of_the_plain_network(x):
    found, expected = (results(stack(depth=64, exact=False, reversible=reversible), x) for reversible in (True, False))
    assert_same_bits("output", found[0], expected[0])
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_exact_mode_has_every_bit_of_the_plain_network_at_64_blocks(x):
    assert_same(branch, x, depth=64)


@pytest.mark.parametrize("exact", [False, True])
def test_activations_come_back(exact, x):
    seen = []
    results(stack(lambda: Keeper(branch(), seen), 64, exact=exact), x)
    first, again = ([y for second, y in seen if second == which] for which in (False, True))
    assert len(first) == len(again) == 128
    error = max((a - b).abs().max().item() for a, b in zip(first, reversed(again), strict=True))
    assert error == 0 if exact else 0 < error <= 1e-5


def test_the_plain_network_is_what_the_formula_says(x):
    model = stack(exact=False, reversible=False)
    x1 = x2 = x
    for block in model.blocks:
        x1 = x1 + block.f(x2)
        x2 = x2 + block.g(x1)
    assert_near(model(x), (x1 + x2) / 2, 1e-6)


def test_exact_mode_rounds_the_entry_and_every_branch(x):
    model = stack(exact=True, merge=None)
    for y in model(x):
        assert ((y * 2**13) % 1 == 0).all()
    x1 = x2 = torch.round(x * 2**13) / 2**13
    for block in model.blocks:
        x1 = x1 + torch.round(block.f(x2) * 2**13) / 2**13
        x2 = x2 + torch.round(block.g(x1) * 2**13) / 2**13
    assert_same_bits("y1", model(x)[0], x1)
    assert_same_bits("y2", model(x)[1], x2)


def test_a_stream_out_of_range_is_raised(x):
    model = stack()
    with torch.no_grad():
        model.blocks[1].f[-1].bias.fill_(5000.0)
    with pytest.raises(OverflowError, match="coarser grid"):
        model(x)
    with pytest.raises(OverflowError, match="coarser grid"):
        stack()(1e6 * x)


# memory


def peak(model, x):
    with Live() as live:
        # what was there before is seen in views alone
        for given in (x, *model.parameters()):
            live.known[given.untyped_storage()._cdata] = None
        loss = model(x).sum()
        loss.backward()
    assert live.peak > 0
    return live.peak


class Cheap(nn.Module):
    """One activation in, one out, and no parameters to speak of."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return torch.tanh(x * self.scale)


@pytest.mark.parametrize("exact", [False, True])
def test_memory_does_not_grow_with_depth(exact):
    x = torch.randn(1, 256, 64)
    for make in (Cheap, lambda: ChunkedFeedForward(64, 8, chunk_size=32), lambda: LSHSelfAttention(64, 2)):
        few, many = (peak(stack(make, depth, exact=exact), x.requires_grad_()) for depth in (4, 12))
        # the gradients of the parameters stay
        weights = sum(p.nbytes for p in make().parameters())
        assert (many - few) / 8 <= 0.05 * x.nbytes + 2 * weights
    plain = [peak(stack(Cheap, depth, exact=exact, reversible=False), x) for depth in (4, 12)]
    assert (plain[1] - plain[0]) / 8 >= 2 * x.nbytes


def test_a_step_holds_two_streams_two_gradients_and_a_branch():
    x = torch.randn(1, 256, 256, requires_grad=True)
    # the streams and their gradients, the output and its own, and what tanh and its product hold and pass on
    assert peak(stack(Cheap, 8, exact=False), x) <= 10.1 * x.nbytes


def test_nothing_outlives_the_graph(x):
    model = stack()
    gc.collect()
    gc.disable()
    try:
        y = model(x.requires_grad_())
        node = weakref.ref(y.grad_fn)
        del y
        assert node() is None
    finally:
        gc.enable()


# autograd's manners


def test_without_a_graph_the_bits_are_the_same(x):
    for merge in ("mean", "cat", None):
        model = stack(merge=merge)
        expected = model(x)
        for without in (torch.no_grad, torch.inference_mode):
            with without():
                found = model(x)
            for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
                assert_same_bits("without a graph", a, b)
                assert not a.requires_grad
                assert b.requires_grad
    with torch.inference_mode():
        inside, block = model(x.clone()), ReversibleBlock(nn.ReLU(inplace=True), branch())
        with pytest.raises(RuntimeError, match="ReLU writes into its input"):
            block(x, x)
    assert_same_bits("of a tensor of inference mode", inside[0], expected[0])


def test_backward_and_grad_agree_and_hooks_run_once(x):
    model, counts = stack(), []
    for p in model.parameters():
        p.register_hook(lambda g: counts.append(1) or 2 * g)
        p.register_post_accumulate_grad_hook(lambda _: counts.append(2))
    model(x).square().sum().backward()
    plain = stack(reversible=False)
    plain(x).square().sum().backward()
    n = len([*model.parameters()])
    assert counts.count(1) == counts.count(2) == n
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_same_bits("twice the gradient", p.grad, 2 * q.grad)


def test_a_graph_may_be_walked_again(x):
    model = stack(lambda: branch(dropout=0.2))
    loss = model(x.requires_grad_()).square().sum()
    leaves = [x, *model.parameters()]
    # the last block alone, then all, twice
    part = torch.autograd.grad(loss, [*model.blocks[-1].parameters()], retain_graph=True)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    twice = torch.autograd.grad(loss, leaves)
    for a, b in zip(once, twice, strict=True):
        assert_same_bits("again", a, b)
    for a, b in zip(part, once[-len(part) :], strict=True):
        assert_same_bits("part", a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_accumulated_batches_add_up(x):
    model, plain = stack(), stack(reversible=False)
    for m in (model, plain):
        losses = [m(y).square().sum() for y in (x, 2 * x)]
        losses[1].backward()
        losses[0].backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_same_bits("sum", p.grad, q.grad)


class Table(nn.Module):
    """A bias of the stream's own shape: its gradient is the stream's gradient itself, in the same memory."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, L, D))
        self.flat = nn.Parameter(torch.randn(L, D))

    def forward(self, x):
        return torch.tanh(x) + self.table + self.flat


@pytest.mark.parametrize("make", [Table, nn.Identity], ids=["table", "identity"])
def test_gradients_that_share_memory_stay_apart(make, x):
    assert_same(lambda: nn.Sequential(make(), nn.Linear(D, D), make()) if make is nn.Identity else make(), x[:1])
    model, plain = (stack(lambda: nn.Sequential(make()), reversible=r) for r in (True, False))
    for m in (model, plain):
        leaf = x[:1].clone().requires_grad_()
        m(leaf).square().sum().backward()
        m.kept = [leaf.grad, *(p.grad for p in m.parameters())]
    for a, b in zip(model.kept, plain.kept, strict=True):
        assert_same_bits("kept", a, b)


def test_only_one_of_two_outputs_is_used(x):
    for at in (0, 1):
        grads = []
        for reversible in (True, False):
            model = stack(merge=None, reversible=reversible)
            leaf = x.clone().requires_grad_()
            loss = model(leaf)[at].square().sum()
            grads.append(torch.autograd.grad(loss, [leaf, *model.parameters()], allow_unused=True,
                                             materialize_grads=True))  # fmt: skip
        for a, b in zip(*grads, strict=True):
            assert_same_bits("gradient", a, b)


def test_a_branch_that_ignores_its_input_or_trains_nothing(x):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.randn(D))

        def forward(self, x):
            return self.value.expand_as(x)

    class Silent(nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    def blocks(reversible):
        torch.manual_seed(0)
        made = [(Constant(), branch()), (branch(), Silent()), (Silent(), Constant())]
        return ReversibleSequence([ReversibleBlock(f, g, exact=True) for f, g in made], reversible=reversible)

    for a, b in zip(results(blocks(True), x), results(blocks(False), x), strict=True):
        assert_same_bits("gradient", a, b)


def test_the_callers_tensors_are_left_alone(x):
    before, model = x.clone(), stack(merge=None)
    leaf = x.requires_grad_()
    y1, y2 = model(leaf)
    kept = [y1.detach().clone(), y2.detach().clone()]
    d = torch.ones_like(y1)
    torch.autograd.backward([y1, y2], [d, d])
    assert torch.equal(x, before)
    assert (d == 1).all()
    assert torch.equal(y1, kept[0])
    assert torch.equal(y2, kept[1])
    # and what the caller does to his does no harm
    y1, y2 = model(leaf)
    leaf.grad, old = None, leaf.grad
    with torch.no_grad():
        y1.zero_()
    torch.autograd.backward([y1, y2], [d, d])
    assert_same_bits("gradient", leaf.grad, old)


def test_a_single_block_stands_alone(x):
    torch.manual_seed(0)
    block, (a, b) = ReversibleBlock(branch(), branch()), draw((2, L, D), (2, L, D), seed=5)
    a, b = a.requires_grad_(), b.requires_grad_()
    y1, y2 = block(a, b)
    z1 = a + block.f(b)
    z2 = b + block.g(z1)
    leaves = [a, b, *block.parameters()]
    found = torch.autograd.grad((y1 * y2).sum(), leaves)
    for p, q in zip((y1, y2, *found), (z1, z2, *torch.autograd.grad((z1 * z2).sum(), leaves)), strict=True):
        assert_near(p, q, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype, x):
    found = assert_same(branch, x.to(dtype), prepare=lambda model: model.to(dtype))
    assert {y.dtype for y in found[:-1]} == {dtype}


def test_strange_shapes():
    for shape in ((0, L, D), (D,), (3, D), (2, 0, D)):
        model, x = stack(), torch.ones(shape, requires_grad=True)
        model(x).sum().backward()
        assert x.grad.shape == x.shape
    x = draw((D, L, 2))[0].mT.mT.transpose(0, 2)
    assert_same_bits("strided", stack()(x), stack()(x.contiguous()))
    assert stack(depth=0)(x).shape == x.shape


# what is refused


def test_second_derivatives_are_refused(x):
    model, leaf = stack(), x.requires_grad_()
    with pytest.raises(RuntimeError, match="ReversibleBlock has no second derivative"):
        torch.autograd.grad(model(leaf).sum(), [leaf], create_graph=True)
    plain = stack(reversible=False, exact=False)
    (g,) = torch.autograd.grad(plain(leaf).square().sum(), [leaf], create_graph=True)
    assert torch.autograd.grad(g.square().sum(), [leaf])[0].isfinite().all()


def test_changes_between_forward_and_backward_are_refused(x):
    def step(model):
        with torch.no_grad():
            model.blocks[0].f[1].weight.mul_(2.0)

    def move(model):
        model.blocks[0].f[1].weight = nn.Parameter(torch.zeros(2 * D, D))

    for change, sentence in ((step, "changed since"), (nn.Module.eval, "another mode"), (move, "other parameters")):
        model = stack()
        loss = model(x).sum()
        change(model)
        with pytest.raises(RuntimeError, match=f"^ReversibleBlock: the backward pass runs it again.*{sentence}"):
            loss.backward()


def test_errors_are_sentences(x):
    block = ReversibleBlock(branch(), branch())
    with pytest.raises(TypeError, match="f must be a module, whose parameters are known"):
        ReversibleBlock(torch.tanh, branch())
    with pytest.raises(ValueError, match="grid must be a power of two"):
        ReversibleBlock(branch(), branch(), exact=True, grid=0.1)
    with pytest.raises(TypeError, match="blocks must be ReversibleBlocks, got Sequential"):
        ReversibleSequence([branch()])
    with pytest.raises(ValueError, match="all blocks must share one grid"):
        ReversibleSequence([block, ReversibleBlock(branch(), branch(), exact=True)])
    with pytest.raises(ValueError, match="merge must be one of"):
        ReversibleSequence([block], merge="sum")
    with pytest.raises(ValueError, match="one tensor of their input's shape"):
        ReversibleBlock(nn.Linear(D, 5), branch())(x, x)
    with pytest.raises(ValueError, match="must share shape, dtype and device"):
        block(x, x[:1])
    with pytest.raises(TypeError, match="must be floating point"):
        block(x.long(), x.long())
    with pytest.raises(RuntimeError, match="ReLU writes into its input"):
        ReversibleBlock(nn.ReLU(inplace=True), branch())(x, x)


# torch looks at .grad where its graph breaks
@pytest.mark.filterwarnings("ignore:.*non-leaf Tensor:UserWarning")
def test_a_compiled_model_may_hold_one(x):
    model, head = stack(), nn.Linear(D, D)
    torch._dynamo.reset()
    compiled = torch.compile(lambda y: head(model(torch.tanh(y))), backend="eager")
    assert_same_bits("compiled", compiled(x), head(model(torch.tanh(x))))


def test_state_dict_and_repr():
    model = stack()
    assert not stack(seed=1).load_state_dict(model.state_dict()).missing_keys
    assert "merge='mean'" in repr(model)
    assert "exact=True, grid=0.0001220703125" in repr(model)
