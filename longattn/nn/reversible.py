"""Reversible layers: blocks whose inputs are computed back from their outputs, so that no activation is kept.

    y1 = x1 + f(x2),    y2 = x2 + g(y1);    back: x2 = y2 - g(y1),    x1 = y1 - f(x2)

Two buffers hold the streams of a whole stack: each block adds into them in the forward pass and subtracts in the
backward pass. A block is one node of autograd that takes its parameters as inputs and returns their gradients.
Gomez et al. 2017 (arXiv 1707.04585), eq. 6-8 and algorithm 1; Kitaev et al. 2020 (arXiv 2001.04451), section 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..ops import _check
from ..ops import reversible as op
from .replay import Autocast, Draws, Graph, Ran, first_run, gpus_of, gradients, once, outside_graphs, replay, trained

MERGES = ("mean", "cat", None)


class _Streams:
    """The two buffers as the backward pass has rewound them, between the nodes of one forward."""

    pair: tuple[Tensor, Tensor] | None = None
    # whether the gradients on their way are nobody else's, so that they may be added to in place
    own = (False, False)


class _Call(NamedTuple):
    """What all blocks of one forward share. leaves: of (f_kwargs, g_kwargs); tensors: which of them are tensors."""

    dtype: torch.dtype
    impl: str
    devices: tuple[int, ...]
    autocast: Autocast
    leaves: list[Any]
    spec: Any
    tensors: tuple[int, ...]

    def kwargs(self, tensors: Iterable[Tensor]) -> tuple[dict, dict]:
        leaves = list(self.leaves)
        for at, x in zip(self.tensors, tensors, strict=True):
            leaves[at] = x
        return tree_unflatten(leaves, self.spec)

    def branch(self, module: nn.Module, x: Tensor, kwargs: dict) -> Tensor:
        """One branch, seen in the dtype of the stack's input."""
        y = module(x if x.dtype == self.dtype else x.to(self.dtype), **kwargs)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            came = f"a {list(x.shape)} tensor became {_check.describe(y)}"
            _check.fail("ReversibleBlock", f"f and g must return one tensor of their input's shape, {came}")
        return y


def _alone(x: Tensor | None, others: Iterable[Tensor | None]) -> bool:
    """Whether no other gradient lies in the memory of this one."""
    if x is None or x.layout != torch.strided:
        return False
    at = x.untyped_storage().data_ptr()
    return all(y is None or y.layout != torch.strided or y.untyped_storage().data_ptr() != at for y in others)


def _join(d: Tensor | None, g: Tensor | None, in_place: bool) -> tuple[Tensor | None, bool]:
    """-> the sum of two gradients, and whether it is memory of its own"""
    if d is None or g is None:
        return (g, False) if d is None else (d, in_place)
    return (d.add_(g) if in_place else d + g), True


# the nodes: into the buffers, a block, out of them


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, grid, x1, x2):
        return _enter(x1, grid, call.impl), _enter(x2, grid, call.impl)

    @staticmethod
    def backward(ctx, d1, d2):
        return None, None, d1, d2


def _enter(x: Tensor, grid: float, impl: str) -> Tensor:
    """A buffer of the accumulator's dtype that holds x, on the grid if there is one."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if grid:
        return op.add(torch.zeros(x.shape, dtype=dtype, device=x.device), x, grid, False, impl, inplace=True)
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)


class _Block(torch.autograd.Function):
    # tensors: those of the keyword arguments, then the parameters
    @staticmethod
    def forward(ctx, block, call, streams, x1, x2, *tensors):
        kwargs = call.kwargs(tensors[: len(call.tensors)])
        with first_run(call.autocast):
            ctx.draws = _add_branches(block, call, x1.detach(), x2.detach(), *kwargs, remember=True)
        ctx.ran, ctx.call, ctx.streams = Ran.now(block, tensors[len(call.tensors) :]), call, streams
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[: len(call.tensors)])
        ctx.mark_dirty(x1, x2)
        return x1, x2

    @staticmethod
    def backward(ctx, d1, d2):
        once("ReversibleBlock")
        block, call, streams, needs = ctx.ran.module, ctx.call, ctx.streams, ctx.needs_input_grad[3:]
        nothing = (None,) * (len(needs) + 3)
        if d1 is None and d2 is None:
            return nothing
        ctx.ran.check()
        given = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needs[2:], strict=False)]
        f_kwargs, g_kwargs = call.kwargs(given)
        candidates = [*given, *ctx.ran.parameters]
        wanted = [x for x, need in zip(candidates, needs[2:], strict=True) if need]
        grid, (own1, own2) = block.step, streams.own
        y1, y2 = streams.pair
        streams.pair = None

        def pull(module, stream, other, kwargs, draws, grad, through):
            """other -= module(stream) -> the gradients of the stream and of `wanted`"""
            z = stream.detach().requires_grad_(through)
            with replay(call.autocast, draws, grad):
                y = call.branch(module, z, kwargs)
            op.add(other, y.detach(), grid, True, call.impl, inplace=True)
            graph, y = Graph.of(y), None
            if not through:
                return None, gradients(graph, wanted, grad)
            dz, *rest = gradients(graph, [z, *wanted], grad)
            return dz, rest

        dz, of_g = pull(block.g, y1, y2, g_kwargs, ctx.draws[1], d2, True)
        d1, own1 = _join(d1, dz, own1 and _alone(d1, of_g))
        del dz
        dz, of_f = pull(block.f, y2, y1, f_kwargs, ctx.draws[0], d1, needs[1])
        d2, own2 = _join(d2, dz, own2 and _alone(d2, (d1, *of_g)))
        sums = [b if a is None else a if b is None else a + b for a, b in zip(of_f, of_g, strict=True)]
        streams.pair = (y1, y2)
        streams.own = own1 and _alone(d1, (d2, *sums)), own2 and _alone(d2, (d1, *sums))
        sums = iter(sums)
        return None, None, None, d1, d2, *(next(sums) if need else None for need in needs[2:])


def _add_branches(block, call, x1, x2, f_kwargs, g_kwargs, *, remember: bool):
    """The block, in place; -> what the branches drew from (None: nothing)"""
    found, before = [], Draws.now(call.devices) if remember else None
    for module, stream, other, kwargs in ((block.f, x2, x1, f_kwargs), (block.g, x1, x2, g_kwargs)):
        version = stream._version
        y = call.branch(module, stream, kwargs)
        if stream._version != version:
            remedy = "let it work on a copy"
            raise RuntimeError(f"ReversibleBlock: {type(module).__name__} writes into its input; {remedy}")
        op.add(other, y, block.step, False, call.impl, inplace=True)
        del y
        if remember:
            after = Draws.now(call.devices)
            found.append(before if after.differ(before) else None)
            before = after
    return found


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, streams, merge, x1, x2):
        ctx.streams = streams
        ctx.save_for_backward(x1, x2)
        ctx.merge = merge
        ctx.set_materialize_grads(False)
        return _leave(x1, x2, merge, call.dtype)

    @staticmethod
    def backward(ctx, *grads):
        pair = ctx.saved_tensors
        # the buffers are rewound in place, unless this graph is to be walked again
        keeps = torch._C._autograd._get_current_graph_task_keep_graph()
        ctx.streams.pair = tuple(x.detach().clone() if keeps else x.detach() for x in pair)
        ctx.streams.own, dtype = (False, False), pair[0].dtype
        if all(d is None for d in grads):
            return (None,) * 5
        grads = [None if d is None else d.to(dtype) for d in grads]
        if ctx.merge == "mean":
            grads = [grads[0] * 0.5] * 2
        elif ctx.merge == "cat":
            grads = grads[0].chunk(2, -1)
        return None, None, None, *grads


def _leave(x1: Tensor, x2: Tensor, merge: str | None, dtype: torch.dtype):
    if merge == "mean":
        return ((x1 + x2) * 0.5).to(dtype)
    if merge == "cat":
        return torch.cat([x1, x2], -1).to(dtype)
    # the buffers stay the stack's own
    return tuple(x.to(dtype, copy=True) for x in (x1, x2))


# running a stack


def _run(blocks, x1, x2, f_kwargs: dict, g_kwargs: dict, merge: str | None, is_reversible: bool):
    for x in (x1, x2):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            _check.fail("ReversibleBlock", f"the streams must be floating point, got {_check.describe(x)}", TypeError)
    if x1.shape != x2.shape or x1.dtype != x2.dtype or x1.device != x2.device:
        came = f"got {_check.describe(x1)} and {_check.describe(x2)}"
        _check.fail("ReversibleBlock", f"the streams must share shape, dtype and device, {came}")
    leaves, spec = tree_flatten((f_kwargs, g_kwargs))
    at = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    given = [leaves[i] for i in at]
    parameters = [trained(block) for block in blocks]
    devices = gpus_of(x1, *given, *(p for some in parameters for p in some))
    # tensors travel as inputs of the nodes, so that the call keeps none alive
    kept = [None if i in at else leaf for i, leaf in enumerate(leaves)]
    call = _Call(x1.dtype, op.chosen_for(x1), devices, Autocast.now(x1.device.type), kept, spec, at)
    grid = blocks[0].step if blocks else 0.0
    records = torch.is_grad_enabled() and (any(parameters) or any(x.requires_grad for x in (x1, x2, *given)))
    if not records:
        # ordinary tensors in inference mode too, whose versions say whether a branch writes into its input
        with torch.inference_mode(False), torch.no_grad():
            x1, x2 = _enter(x1, grid, call.impl), _enter(x2, grid, call.impl)
        for block in blocks:
            _add_branches(block, call, x1, x2, f_kwargs, g_kwargs, remember=False)
        return _leave(x1, x2, merge, call.dtype)
    x1, x2 = _Enter.apply(call, grid, x1, x2)
    if is_reversible:
        streams = _Streams()
        for block, own in zip(blocks, parameters, strict=True):
            x1, x2 = _Block.apply(block, call, streams, x1, x2, *given, *own)
        return _Leave.apply(call, streams, merge, x1, x2)
    for block in blocks:
        # views, so that a branch's own gradients are summed before they join the stream's, as in the nodes above
        x1 = op.differentiable(x1, call.branch(block.f, x2.view_as(x2), f_kwargs), block.step, False, call.impl)
        x2 = op.differentiable(x2, call.branch(block.g, x1.view_as(x1), g_kwargs), block.step, False, call.impl)
    return _leave(x1, x2, merge, call.dtype)


# branches may be compiled
_stack = outside_graphs(_run)


class ReversibleBlock(nn.Module):
    """y1 = x1 + f(x2), y2 = x2 + g(y1), with nothing kept for the backward pass but the outputs.

    f, g: modules that return one tensor of their input's shape, and the same one when run again.
    exact: the streams and every branch's output are rounded to multiples of `grid` before they are added, so that each
        sum is exact and its inverse gives every activation back bit for bit, at any depth. OverflowError where a stream
        reaches grid * 2^24 (2^11 for 2^-13); the gradient of the rounding is the identity.
    grid: a power of two.

    The streams are float32 (float64 for float64 inputs); the branches see them in the dtype of the input. A branch runs
    again in the backward pass, under the autocast state and with the random numbers of torch's generators of the first
    run (`longattn.recomputing` tells it so); generators are afterwards where a plain network leaves them. Statistics
    of batch normalisation are updated in both runs. Gradients reach parameters, x1, x2 and tensors in keyword
    arguments; a tensor that f or g takes from elsewhere gets none. What hooks of inner modules keep of the streams or
    of their gradients they must clone. There is no second derivative.
    """

    def __init__(self, f: nn.Module, g: nn.Module, exact: bool = False, grid: float = 2**-13) -> None:
        super().__init__()
        for name, module in (("f", f), ("g", g)):
            if not isinstance(module, nn.Module):
                sentence = f"{name} must be a module, whose parameters are known, got {_check.describe(module)}"
                _check.fail("ReversibleBlock", sentence, TypeError)
        op.check_grid("ReversibleBlock", grid)
        self.f, self.g, self.exact, self.grid = f, g, bool(exact), float(grid)

    @property
    def step(self) -> float:
        """The grid; 0 where nothing is rounded."""
        return self.grid if self.exact else 0.0

    def forward(
        self, x1: Tensor, x2: Tensor, *, f_kwargs: dict | None = None, g_kwargs: dict | None = None, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """x1, x2: `[...]` of one shape and dtype -> y1, y2, alike. Other keyword arguments go to f, with f_kwargs;
        g_kwargs to g."""
        return _stack([self], x1, x2, kwargs | (f_kwargs or {}), g_kwargs or {}, None, True)

    def extra_repr(self) -> str:
        return f"exact=True, grid={self.grid}" if self.exact else ""


class ReversibleSequence(nn.Module):
    """A stack of `ReversibleBlock`s whose memory does not grow with its depth.

    blocks: an iterable of them, all with one grid. One block may stand in several places.
    merge: what leaves: "mean" of the streams, "cat" along the last dimension, or None, both as a tuple. x enters both.
    reversible: False is the same function by plain autograd, which keeps every activation.

    One forward holds two streams and the inside of one branch, a backward two streams, two gradients and the inside of
    one branch. Costs one more forward.
    """

    def __init__(
        self, blocks: Iterable[ReversibleBlock], *, merge: str | None = "mean", reversible: bool = True
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        for block in self.blocks:
            if not isinstance(block, ReversibleBlock):
                came = type(block).__name__
                _check.fail("ReversibleSequence", f"blocks must be ReversibleBlocks, got {came}", TypeError)
        grids = sorted({block.step for block in self.blocks})
        if len(grids) > 1:
            _check.fail("ReversibleSequence", f"all blocks must share one grid (0 is inexact), got {grids}")
        if merge not in MERGES:
            _check.fail("ReversibleSequence", f"merge must be one of {', '.join(map(repr, MERGES))}, got {merge!r}")
        self.merge, self.reversible = merge, bool(reversible)

    def forward(
        self, x: Tensor, *, f_kwargs: dict | None = None, g_kwargs: dict | None = None, **kwargs
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x: `[..., D]` -> `[..., D]` (`[..., 2 D]`, or two tensors, by `merge`). Other keyword arguments go to every
        f, with f_kwargs; g_kwargs to every g."""
        return _stack([*self.blocks], x, x, kwargs | (f_kwargs or {}), g_kwargs or {}, self.merge, self.reversible)

    def extra_repr(self) -> str:
        return f"merge={self.merge!r}" + ("" if self.reversible else ", reversible=False")
