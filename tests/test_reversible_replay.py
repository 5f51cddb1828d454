"""Reversible layers run their branches twice: what the second run must share with the first, so that nobody notices."""

import subprocess
import sys
import weakref

import pytest
import torch
from _reversible import D, Keeper, L, assert_same, branch, results, stack
from torch import nn
from torch.utils.checkpoint import checkpoint

import longattn
from longattn.nn import LSHSelfAttention, ReversibleBlock, ReversibleSequence, replay
from longattn.testing.assertions import assert_near, assert_same_bits
from longattn.testing.cases import draw


@pytest.fixture
def x():
    return draw((2, L, D))[0]


@pytest.mark.parametrize("merge", ["mean", "cat", None])
def test_dropout_repeats_and_the_generator_ends_where_it_would(merge, x):
    assert_same(lambda: branch(dropout=0.3), x, merge=merge)


def test_a_backward_leaves_the_generator_alone(x):
    y = stack(lambda: branch(dropout=0.3))(x).sum()
    before = torch.get_rng_state()
    y.backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_repeats(x):
    class Autocast(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x)

    found = assert_same(lambda: branch(dropout=0.2), x, prepare=Autocast)
    assert (found[0] - results(stack(lambda: branch(dropout=0.2)), x)[0]).abs().max() > 1e-4


def test_backward_under_the_same_autocast_gets_no_cast_without_a_graph(x):
    """Autocast caches casts of parameters: those of the first run have no graph and must serve nobody."""
    model, plain = stack(), stack(reversible=False)
    shared = [m.blocks[0].f[1] for m in (model, plain)]
    grads = []
    for m, layer in zip((model, plain), shared, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            y = m(x).float().sum() + layer(x).float().square().sum()
            grads.append(torch.autograd.grad(y, [*m.parameters()]))
    for a, b in zip(*grads, strict=True):
        assert_near(a, b, 1e-2)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("causal", [False, True])
def test_lsh_attention_inside(causal, dropout):
    x = draw((2, 50, 16))[0]

    def make():
        return nn.Sequential(
            nn.LayerNorm(16), LSHSelfAttention(16, 2, n_hashes=2, chunk_size=8, causal=causal, dropout=dropout)
        )

    assert_same(make, x)


def test_attention_with_a_padding_mask_for_f_alone(x):
    mask = torch.arange(L).expand(2, L) % 4 == 3

    def make():
        return LSHSelfAttention(D, 2, n_hashes=1, chunk_size=4, impl="reference")

    def blocks(reversible):
        torch.manual_seed(0)
        return ReversibleSequence([ReversibleBlock(make(), branch()) for _ in range(2)], reversible=reversible)

    with torch.no_grad():
        expected = blocks(False)(x, key_padding_mask=mask)
    found, plain = (results(blocks(r), x, key_padding_mask=mask) for r in (True, False))
    assert_same_bits("without a graph", found[0], expected)
    for a, b in zip(found, plain, strict=True):
        assert_near(a, b, 1e-5)


class Context(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(D, D)

    def forward(self, x, memory=None, *, pair=(), scale=1.0):
        y = self.inner(x)
        for m in (memory, *pair):
            y = y if m is None else y + scale * torch.tanh(x * m)
        return y


def test_keyword_arguments_reach_their_branch_and_get_gradients(x):
    grads = []
    for reversible in (True, False):
        memory, one, two, fixed = draw((2, L, D), (D,), (D,), (D,), seed=3)
        leaves = [t.requires_grad_() for t in (memory, one, two)]
        model = stack(Context, reversible=reversible)
        y = model(x, memory=memory, scale=0.5, f_kwargs={"pair": (one, fixed)}, g_kwargs={"memory": two})
        grads.append([y, *torch.autograd.grad(y.square().sum(), [*leaves, *model.parameters()])])
    for a, b in zip(*grads, strict=True):
        assert_near(a, b, 1e-6)
    assert not torch.equal(grads[0][0], stack(Context)(x))


def test_weights_may_be_shared(x):
    grads = []
    for reversible in (True, False):
        torch.manual_seed(0)
        one = branch()
        block = ReversibleBlock(one, branch(), exact=True)
        model = ReversibleSequence([block, block, ReversibleBlock(one, one, exact=True)], reversible=reversible)
        grads.append(results(model, x))
    for a, b in zip(*grads, strict=True):
        assert_near(a, b, 1e-6)


def test_frozen_parameters_get_nothing_and_the_others_all(x):
    def freeze(model):
        for name, p in model.named_parameters():
            p.requires_grad_("1.f" not in name and "bias" not in name)
        return model

    assert_same(branch, x, prepare=freeze)
    model = freeze(stack())
    model(x).sum().backward()
    assert [p.grad is not None for p in model.parameters()] == [p.requires_grad for p in model.parameters()]


def test_all_frozen_passes_gradients_to_the_input(x):
    assert_same(lambda: branch().requires_grad_(False), x, merge=None)


def test_an_input_without_gradient_trains_all_the_same(x):
    found = assert_same(branch, x, needs_x=False)
    assert len(found) == 2 + len([*stack().parameters()])


def test_checkpoint_inside(x):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = branch(dropout=0.2)

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    assert_same(Checkpointed, x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_outside(reentrant, x):
    model, grads = stack(lambda: branch(dropout=0.2)), []
    for call in (model, lambda y: checkpoint(model, y, use_reentrant=reentrant)):
        model.zero_grad()
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        call(leaf).square().sum().backward()
        grads.append([leaf.grad, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*grads, strict=True):
        assert_same_bits("checkpointed", a, b)


def test_a_stack_inside_a_branch(x):
    assert_same(lambda: stack(lambda: branch(dropout=0.2), 2), x, depth=2)


def test_eval_mode_has_gradients_and_no_dropout(x):
    found = assert_same(lambda: branch(dropout=0.5), x, prepare=nn.Module.eval)
    for a, b in zip(found[:-1], results(stack(branch), x)[:-1], strict=True):
        assert_same_bits("without dropout", a, b)


def test_recomputing_is_true_in_the_second_run_alone(x):
    seen = []
    model = stack(lambda: Keeper(branch(), seen), 2)
    y = model(x)
    assert [again for again, _ in seen] == [False] * 4
    y.sum().backward()
    assert [again for again, _ in seen] == [False] * 4 + [True] * 4
    assert not longattn.recomputing()
    del seen[:]
    stack(lambda: Keeper(branch(), seen), 2, reversible=False)(x).sum().backward()
    assert [again for again, _ in seen] == [False] * 4


# what a replay makes again


def replayed(x, use, make=torch.tanh):
    """A branch's second run, where result = make(x) is made again and `use([result], weight)` multiplies by weight.

    Returns weight's gradient, how often the result was made again, and whether it was gone before.
    """
    weight, calls = torch.full_like(x, 2.0).requires_grad_(), []

    def again():
        calls.append(longattn.recomputing())
        return make(x)

    with replay.replay(replay.Autocast.now("cpu"), None):
        kept = [again()]
        there = weakref.ref(kept[0])
        with replay.made_again(kept[0], again):
            loss = use(kept, weight).sum()
    kept.clear()
    gone = there() is None
    (grad,) = torch.autograd.grad(loss, [weight])
    assert all(calls)
    return grad, len(calls) - 1, gone


def test_what_is_made_again_is_not_kept_and_is_the_same(x):
    grad, times, gone = replayed(x, lambda kept, w: kept[0] * w + (kept[0].view(-1, D) * w.view(-1, D)).view_as(w))
    assert_same_bits("made twice", grad, 2 * torch.tanh(x))
    assert (times, gone) == (2, True)


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        (lambda kept, w: kept[0].clone() * w, torch.tanh),
        # the memory of what nobody needs any more would be the next tensor's
        (lambda kept, w: (kept.clear(), torch.full((2, L, D), 3.0) * w)[1], lambda x: torch.full_like(x, 3.0)),
        (lambda kept, w: kept[0].mT.contiguous().mT * w, torch.tanh),
        (lambda kept, w: kept[0].view(torch.int32).view(torch.float32).add_(1) * w, lambda x: torch.tanh(x) + 1),
    ],
    ids=["a copy", "another tensor in its place", "a copy in another order", "changed in place"],
)
def test_only_what_is_made_again_is_not_kept(use, expected, x):
    grad, times, _ = replayed(x, use)
    assert_same_bits("kept", grad, expected(x))
    assert times == 0


def test_rows_in_another_order_in_memory_are_kept(x):
    grad, times, _ = replayed(x, lambda kept, w: kept[0].mT * w.mT, lambda x: torch.tanh(x).mT.contiguous().mT)
    assert_same_bits("kept", grad, torch.tanh(x))
    assert times == 0


def test_what_is_kept_beside_it_must_not_change(x):
    def use(kept, w):
        other = kept[0] + 1
        y = other * w
        other.add_(1)
        return y

    with pytest.raises(RuntimeError, match=r"second run of a branch a .* tensor .* was changed in place"):
        replayed(x, use)


# data parallel

DDP = """
import sys
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from longattn.nn import LSHSelfAttention, ReversibleBlock, ReversibleSequence

rank, file = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)


def build(reversible):
    torch.manual_seed(0)
    one = nn.Linear(8, 8)
    blocks = [
        ReversibleBlock(LSHSelfAttention(8, 2, n_hashes=1, chunk_size=4), nn.Sequential(one, nn.GELU()))
        for _ in range(3)
    ]
    blocks[1].g.requires_grad_(False)
    blocks += [ReversibleBlock(one, nn.Linear(8, 8), exact=False)]
    return nn.Sequential(ReversibleSequence(blocks, reversible=reversible), nn.Linear(8, 3))


x = torch.randn(2, 2, 12, 8, generator=torch.Generator().manual_seed(1))
expected = build(False)
expected(x.flatten(0, 1)).square().mean().backward()
# a small cap makes several buckets, and so several reductions during one backward
model = DistributedDataParallel(build(True), bucket_cap_mb=0.0005)
for step in range(2):
    model.zero_grad()
    model(x[rank]).square().mean().backward()
    for (name, p), q in zip(model.module.named_parameters(), expected.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or (p.grad - q.grad).norm() <= 1e-5 * q.grad.norm(), name
distributed.destroy_process_group()
print("agreed")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_two_gloo_processes_reduce_the_gradients_of_one(tmp_path):
    """Data parallel marks each parameter ready once: gradients come out of nodes, never from a nested backward."""
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", DDP]
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    try:
        for worker in workers:
            out, err = worker.communicate(timeout=120)
            assert (worker.returncode, out) == (0, "agreed\n"), err
    finally:
        for worker in workers:
            worker.kill()
