"""Running a module a second time as it ran the first: autocast, the random numbers drawn, whether it is a replay."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

_here = threading.local()


def recomputing() -> bool:
    """Whether this thread runs a module of a reversible or chunked layer for the second time, in a backward pass.

    For modules with side effects: batch normalisation updates its statistics in both runs unless it asks.
    """
    return getattr(_here, "depth", 0) > 0


def awaited() -> Tensor | None:
    """In a replay, the gradient that its output is about to get; a module whose output that is may use it at once."""
    return getattr(_here, "awaited", None)


class Autocast(NamedTuple):
    """(device type, enabled, dtype) as a forward found them; no entry where nothing was cast."""

    states: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls, device: str) -> Autocast:
        types = [name for name in dict.fromkeys((device, "cpu")) if torch.amp.is_autocast_available(name)]
        return cls(tuple((x, torch.is_autocast_enabled(x), torch.get_autocast_dtype(x)) for x in types))

    @property
    def casts(self) -> bool:
        return any(enabled for _, enabled, _ in self.states)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for device, enabled, dtype in self.states:
                if enabled or torch.is_autocast_enabled(device):
                    # what a first run cast without a graph must not serve the second
                    context = torch.autocast(device, enabled=enabled, dtype=dtype, cache_enabled=False)
                    stack.enter_context(context)
            yield


class Draws(NamedTuple):
    """The state of torch's generators on the CPU and on the GPUs of a call."""

    states: tuple[tuple[int | None, Tensor], ...]

    @classmethod
    def now(cls, devices: tuple[int, ...]) -> Draws:
        gpus = ((index, torch.cuda.get_rng_state(index)) for index in devices)
        return cls(((None, torch.get_rng_state()), *gpus))

    def differ(self, other: Draws) -> bool:
        return any(not torch.equal(a, b) for (_, a), (_, b) in zip(self.states, other.states, strict=True))

    def restore(self) -> None:
        for index, state in self.states:
            if index is None:
                torch.set_rng_state(state)
            else:
                torch.cuda.set_rng_state(state, index)


class Ran(NamedTuple):
    """A module as a forward found it, for the backward pass that runs it again."""

    module: nn.Module
    training: bool
    parameters: list[Tensor]
    versions: list[int]

    @classmethod
    def now(cls, module: nn.Module, parameters: Iterable[Tensor]) -> Ran:
        parameters = list(parameters)
        return cls(module, module.training, parameters, [p._version for p in parameters])

    def check(self) -> None:
        now = trained(self.module)
        if len(now) != len(self.parameters) or any(a is not b for a, b in zip(now, self.parameters, strict=True)):
            what = "other parameters than its forward had (functional_call, or a new device or dtype)"
        elif [p._version for p in self.parameters] != self.versions:
            what = "parameters that changed since its forward; step the optimiser after backward"
        elif self.module.training != self.training:
            what = "another mode than its forward had; call train() or eval() after backward"
        else:
            return
        raise RuntimeError(f"{type(self.module).__name__}: the backward pass runs it again, and it has {what}")


def once(what: str) -> None:
    """At the head of a backward pass that autograd cannot look into; it may only be asked whether it should."""
    if torch.is_grad_enabled():
        remedy = "leave create_graph=False, or use the layer without recomputation"
        raise RuntimeError(f"{what} has no second derivative: {remedy}")


def trained(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


@contextlib.contextmanager
def first_run(autocast: Autocast) -> Iterator[None]:
    """Around a run without a graph: a cast of a parameter made here must not reach others by autocast's cache."""
    caches = autocast.casts and torch.is_autocast_cache_enabled()
    if caches:
        torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        if caches:
            torch.set_autocast_cache_enabled(True)


def gpus_of(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(sorted({x.device.index for x in tensors if x.device.type == "cuda"}))


@contextlib.contextmanager
def replay(autocast: Autocast, draws: Draws | None, gradient: Tensor | None = None) -> Iterator[None]:
    """Autocast and generators as they were, and gradients on; afterwards both are where they were found.

    gradient: what `awaited` says inside.
    """
    found = None if draws is None else Draws.now(tuple(i for i, _ in draws.states if i is not None))
    before, _here.awaited = awaited(), gradient
    _here.depth = getattr(_here, "depth", 0) + 1
    try:
        if draws is not None:
            draws.restore()
        with torch.enable_grad():
            if any(enabled or torch.is_autocast_enabled(device) for device, enabled, _ in autocast.states):
                with autocast.again():
                    yield
            else:
                yield
    finally:
        _here.depth -= 1
        _here.awaited = before
        if found is not None:
            found.restore()


def outside_graphs(function: Callable) -> Callable:
    """`function`, never in a graph of torch.compile, which would see through the nodes it makes."""
    disabled = []

    def unseen() -> Callable:
        # not made before it is wanted: it loads the compiler
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0]

    # a graph must not make it anew in every call
    unseen._torchdynamo_disable = True

    def call(*arguments):
        return (unseen() if torch.compiler.is_compiling() else function)(*arguments)

    return call


def made_again(result: Tensor, make: Callable[[], Tensor]) -> contextlib.AbstractContextManager:
    """Inside, in a replay, autograd does not keep `result` for what is computed from it, but calls `make` each time.

    For what is cheap to make and as large as a stream; make must return the same values. A first run is left alone,
    where such hooks would stand before those of others (torch's checkpoint) and nobody may change what is kept.
    """
    if torch.compiler.is_compiling() or not (recomputing() and torch.is_grad_enabled() and result.numel()):
        return contextlib.nullcontext()
    return _hooks(result, make)


@contextlib.contextmanager
def _hooks(result: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    first, whole, autocast = result._version, result.is_contiguous(), Autocast.now(result.device.type)
    # until the end, so that its address is nobody else's, and no longer, as autograd keeps `pack` too
    held = [result]

    def pack(x: Tensor):
        (y,) = held
        same = x.data_ptr() == y.data_ptr() and (x.numel(), x.dtype) == (y.numel(), y.dtype)
        if same and whole and x.is_contiguous() and x._version == first:
            return x.shape, None
        # without its graph, which would hold the node that holds it
        return x.detach(), x._version

    def unpack(kept):
        x, version = kept
        if version is None:
            with replay(autocast, None), torch.no_grad():
                return make().reshape(x)
        if x._version != version:
            what = f"a {list(x.shape)} tensor that the backward pass needs was changed in place"
            raise RuntimeError(f"ReversibleBlock: in the second run of a branch {what}; let it work on a copy")
        return x

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        held.clear()


@contextlib.contextmanager
def without_hooks(tensors: list[Tensor]) -> Iterator[None]:
    """Gradients taken inside a node pass these tensors' hooks by; they run on what the node returns."""
    held = [(x._backward_hooks, dict(x._backward_hooks)) for x in tensors if x._backward_hooks]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in held:
            hooks.update(kept)


class Graph(NamedTuple):
    """Where a result came from, without the result: its memory is free once nobody else holds it. edge: None where
    nothing depends on what has a gradient."""

    edge: torch.autograd.graph.GradientEdge | None
    dtype: torch.dtype

    @classmethod
    def of(cls, output: Tensor) -> Graph:
        return cls(torch.autograd.graph.get_gradient_edge(output) if output.requires_grad else None, output.dtype)


def gradients(graph: Graph, inputs: list[Tensor], grad: Tensor | None) -> list[Tensor | None]:
    """torch.autograd.grad, where there may be nothing to take: no gradient came, or none is wanted, or none depends."""
    if grad is None or not inputs or graph.edge is None:
        return [None] * len(inputs)
    grad = grad if grad.dtype == graph.dtype else grad.to(graph.dtype)
    if not any(x._backward_hooks for x in inputs):
        return [*torch.autograd.grad(graph.edge, inputs, grad, allow_unused=True)]
    with without_hooks(inputs):
        return [*torch.autograd.grad(graph.edge, inputs, grad, allow_unused=True)]
