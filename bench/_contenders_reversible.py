"""Who takes part beside reversible layers: the same branches with the same weights, run by several packages.

A step is forward and backward of a stack with inputs that need a gradient; gradients are set to None before it. Block:
y1 = x1 + f(x2), y2 = x2 + g(y1), both streams enter as x and leave as their mean; f is LayerNorm and attention, g is
LayerNorm and a feed-forward layer with GELU.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from _contenders import Contender, missing_of
from _floors import Stack
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import longattn
from longattn.nn import ChunkedFeedForward, ReversibleBlock, ReversibleSequence

OURS = ("longattn", "longattn chunked", "longattn exact")


class Case(NamedTuple):
    """One measurement. attention: "softmax" (torch's, all keys, causal), or "linear" (longattn's, causal)."""

    n: int
    B: int = 1
    H: int = 4
    D: int = 64
    hidden: int = 1024
    layers: int = 12
    attention: str = "softmax"
    dtype: str = "float32"
    direction: str = "forward+backward"

    @property
    def shape(self) -> Stack:
        pairs = (self.n + 1) / 2 if self.attention == "softmax" else 0
        return Stack(self.n, self.B, self.H * self.D, self.hidden, self.layers, pairs, self.dtype)

    @property
    def drawn(self) -> tuple:
        return self


class Attention(nn.Module):
    def __init__(self, case: Case):
        super().__init__()
        self.case, width = case, case.H * case.D
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.case.H, -1)).permute(2, 0, 3, 1, 4)
        if self.case.attention == "softmax":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = longattn.linear_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def branches(case: Case) -> list[tuple[nn.Module, nn.Module]]:
    """(f, g) of each layer, with the same weights every time."""
    torch.manual_seed(0)
    width, made = case.H * case.D, []
    for _ in range(case.layers):
        g = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, case.hidden), nn.GELU(), nn.Linear(case.hidden, width))
        made.append((Attention(case), g))
    return made


class _Both(nn.Module):
    """A stack of packages that take the streams in one tensor."""

    def __init__(self, stack: nn.Module):
        super().__init__()
        self.stack = stack

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(self.stack(torch.cat([x, x], -1)).chunk(2, -1)).mean(0)


class _Checkpointed(nn.Module):
    """Each block under torch's checkpoint, on streams kept apart."""

    def __init__(self, case: Case):
        super().__init__()
        self.pairs = nn.ModuleList(nn.ModuleList(pair) for pair in branches(case))

    def forward(self, x: Tensor) -> Tensor:
        def block(f, g, x1, x2):
            x1 = x1 + f(x2)
            return x1, x2 + g(x1)

        x1 = x2 = x
        for f, g in self.pairs:
            x1, x2 = checkpoint(block, f, g, x1, x2, use_reentrant=False)
        return (x1 + x2) / 2


def _chunked(g: nn.Sequential, chunk_size: int) -> nn.Module:
    """The same feed-forward layer through the tokens in chunks."""
    norm, up, _, down = g
    made = ChunkedFeedForward(up.in_features, up.out_features, chunk_size=chunk_size)
    made.up, made.down = up, down
    return nn.Sequential(norm, made)


def ours(case: Case, exact: bool = False, reversible: bool = True, chunks: int = 1) -> nn.Module:
    pairs = branches(case)
    if chunks > 1:
        pairs = [(f, _chunked(g, -(-case.n // chunks))) for f, g in pairs]
    blocks = [ReversibleBlock(f, g, exact=exact) for f, g in pairs]
    return ReversibleSequence(blocks, reversible=reversible)


def reformer_pytorch(case: Case) -> nn.Module:
    """reformer-pytorch's ReversibleSequence."""
    from reformer_pytorch.reversible import ReversibleSequence as Theirs

    return _Both(Theirs(nn.ModuleList(nn.ModuleList(pair) for pair in branches(case))))


def revlib(case: Case) -> nn.Module:
    """revlib's ReversibleSequential in its default mode."""
    import revlib as package

    return _Both(package.ReversibleSequential(*(branch for pair in branches(case) for branch in pair), split_dim=-1))


def memcnn(case: Case) -> nn.Module:
    """memcnn's additive coupling, each in an InvertibleModuleWrapper that does not keep its input."""
    import memcnn as package

    wrapped = [
        package.InvertibleModuleWrapper(package.AdditiveCoupling(f, g, split_dim=-1), keep_input=False)
        for f, g in branches(case)
    ]
    return _Both(nn.Sequential(*wrapped))


STACKS = {
    "longattn": ours,
    "longattn chunked": functools.partial(ours, chunks=8),
    "longattn exact": functools.partial(ours, exact=True),
    "plain": functools.partial(ours, reversible=False),
    "checkpoint": _Checkpointed,
    "reformer-pytorch": reformer_pytorch,
    "revlib": revlib,
    "memcnn": memcnn,
}
MODULES = {"reformer-pytorch": "reformer_pytorch.reversible", "revlib": "revlib", "memcnn": "memcnn"}


def make_inputs(case: Case, device: str = "cpu") -> Tensor:
    generator, dtype = torch.Generator(device).manual_seed(0), getattr(torch, case.dtype)
    x = torch.empty(case.B, case.n, case.H * case.D, dtype=dtype, device=device).normal_(generator=generator)
    return x.requires_grad_()


def gradients(name: str, case: Case, x: Tensor) -> list[Tensor]:
    """Output and gradients of one step, by name of the contender: of x, then by branch, in the order of `branches`."""
    model = STACKS[name](case).to(x.dtype)
    y = model(x)
    y.square().mean().backward()
    found = {parameter: parameter.grad for parameter in model.parameters()}
    # every package keeps f and g of a layer, under other names and in other orders: tell them by their weights
    order = sorted(found, key=lambda p: (p.numel(), p.detach().double().sum().item(), p.detach().flatten()[0].item()))
    grads, x.grad = [x.grad, *(found[p] for p in order if p.detach().std() > 0 and p.dim() > 1)], None
    return [y.detach(), *grads]


def stepper(name: str, case: Case, x: Tensor):
    model = STACKS[name](case).to(x)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None
        model(x).square().mean().backward()

    return step


CONTENDERS = {
    name: Contender(
        functools.partial(stepper, name), True, MODULES.get(name, "torch" if name == "checkpoint" else "longattn")
    )
    for name in STACKS
}
missing = functools.partial(missing_of, CONTENDERS)


def build(name: str, case: Case, inputs: Tensor | None = None):
    return CONTENDERS[name].build(case, make_inputs(case) if inputs is None else inputs)
