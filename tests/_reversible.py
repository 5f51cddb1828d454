"""Small reversible stacks, what they compute, and how much memory they hold."""

import weakref

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import longattn
from longattn.nn import ReversibleBlock, ReversibleSequence
from longattn.testing.assertions import assert_same_bits

D, L = 12, 10


def branch(dropout=0.0, d=D):
    return nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * d, d))


def stack(make=branch, depth=3, *, reversible=True, exact=True, merge="mean", seed=0):
    """Blocks of make() twice, the same weights for the same seed."""
    torch.manual_seed(seed)
    blocks = [ReversibleBlock(make(), make(), exact=exact) for _ in range(depth)]
    return ReversibleSequence(blocks, merge=merge, reversible=reversible)


def results(model, x, *, seed=7, needs_x=True, **kwargs):
    """Output, gradients of x and of the parameters that are trained, and a number drawn afterwards."""
    torch.manual_seed(seed)
    x = x.detach().requires_grad_(needs_x)
    y = model(x, **kwargs)
    outputs = y if isinstance(y, tuple) else (y,)
    leaves = [x] * needs_x + [p for p in model.parameters() if p.requires_grad]
    loss = sum((i + 1) * out.float().square().sum() for i, out in enumerate(outputs))
    grads = torch.autograd.grad(loss, leaves)
    return [*(out.detach() for out in outputs), *grads, torch.rand(3)]


def assert_same(make, x, *, depth=3, merge="mean", prepare=lambda model: model, **how):
    """In exact mode: every bit of the plain network."""
    found, expected = (
        results(prepare(stack(make, depth, merge=merge, reversible=reversible)), x, **how)
        for reversible in (True, False)
    )
    assert len(found) == len(expected) > 3
    for a, b in zip(found, expected, strict=True):
        assert_same_bits("reversible", a, b)
        assert b.count_nonzero() > 0
    return found


class Keeper(nn.Module):
    """Notes what it is given and in which run."""

    def __init__(self, inner, seen):
        super().__init__()
        self.inner, self.seen = inner, seen

    def forward(self, x):
        self.seen.append((longattn.recomputing(), x.detach().clone()))
        return self.inner(x)


class Live(TorchDispatchMode):
    """The most bytes of tensors made under it that were alive at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.meet(x.untyped_storage())
        return out

    def meet(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.now += size
            self.peak = max(self.peak, self.now)
            self.known[key] = weakref.finalize(storage, self.leave, key, size)

    def leave(self, key, size):
        self.now -= size
        del self.known[key]
