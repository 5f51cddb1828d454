"""Who takes part: one builder per package, each from the same q, k, v to a call without arguments.

A builder lays the inputs out as its package wants them, outside the measured call; feature maps are inside it. `same`
says whether it computes our function, so that results can be checked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from _floors import Shape
from torch import Tensor
from torch.nn import functional as F

import longattn


class Case(NamedTuple):
    """One measurement. feature "raw": q and k are features already, D = M. direction: as in `_floors.floor`."""

    n: int
    B: int = 1
    H: int = 8
    D: int = 64
    E: int = 64
    feature: str = "elu"
    normalize: bool = True
    dtype: str = "float32"
    direction: str = "forward"
    impl: str = "cpu"
    is_causal: bool = True

    @property
    def shape(self) -> Shape:
        return Shape(self.n, self.B, self.H, self.D, self.E, self.D, self.dtype)


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Unit normal q, k, v and grad_out `[B, H, n, .]`; raw features are absolute values, as positive maps give."""
    generator, dtype = torch.Generator(device).manual_seed(0), getattr(torch, case.dtype)

    def draw(width: int) -> Tensor:
        return torch.empty(case.B, case.H, case.n, width, dtype=dtype, device=device).normal_(generator=generator)

    q, k, v, grad_out = draw(case.D), draw(case.D), draw(case.E), draw(case.E)
    if case.feature == "raw":
        q.abs_(), k.abs_()
    return Inputs(q, k, v, grad_out)


def directed(case: Case, function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor):
    """The call to measure: function(q, k, v) without a graph, with one and its gradients, or once more through one."""
    if case.direction == "forward":
        return torch.no_grad()(lambda: function(q, k, v))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    if case.direction == "backward":
        made = function(*leaves)
        return lambda: torch.autograd.grad(made, leaves, grad_out, retain_graph=True)

    def both():
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad_out)

    return both


def phi(case: Case, x: Tensor) -> Tensor:
    return x if case.feature == "raw" else F.elu(x) + 1


# builders


def linear(case: Case) -> Callable[..., Tensor]:
    return functools.partial(
        longattn.linear_attention,
        feature_map="identity" if case.feature == "raw" else case.feature,
        is_causal=case.is_causal,
        normalize=case.normalize,
        impl=case.impl,
    )


def ours(case: Case, inputs: Inputs):
    return directed(case, linear(case), *inputs)


def sdpa(case: Case, inputs: Inputs):
    return directed(case, functools.partial(F.scaled_dot_product_attention, is_causal=case.is_causal), *inputs)


def fast_transformers(case: Case, inputs: Inputs):
    from fast_transformers.causal_product import causal_dot_product

    if not case.normalize:
        return directed(case, lambda q, k, v: causal_dot_product(phi(case, q), phi(case, k), v), *inputs)
    from fast_transformers.attention.causal_linear_attention import CausalLinearAttention
    from fast_transformers.feature_maps.base import ActivationFunctionFeatureMap
    from fast_transformers.masking import LengthMask

    class LowerTriangular:
        # its own TriangularCausalMask is an n x n matrix that is never read
        lower_triangular = True

    feature_map = ActivationFunctionFeatureMap.factory(functools.partial(phi, case))
    layer, lengths = CausalLinearAttention(case.D, feature_map), LengthMask(torch.full((case.B,), case.n))
    theirs = [x.transpose(1, 2).contiguous() for x in inputs]  # [B, n, H, .]
    return directed(case, lambda q, k, v: layer(q, k, v, LowerTriangular, lengths, lengths), *theirs)


def performer(case: Case, inputs: Inputs):
    """performer-pytorch's causal_linear_attention, which calls the C++ product of pytorch-fast-transformers."""
    from performer_pytorch.performer_pytorch import causal_linear_attention

    return directed(case, lambda q, k, v: causal_linear_attention(phi(case, q), phi(case, k), v), *inputs)


def performer_torch(case: Case, inputs: Inputs):
    """What performer-pytorch itself runs on a CPU: it looks for the CUDA kernel alone."""
    from performer_pytorch.performer_pytorch import causal_linear_attention_noncuda

    return directed(case, lambda q, k, v: causal_linear_attention_noncuda(phi(case, q), phi(case, k), v), *inputs)


def linear_attention_transformer(case: Case, inputs: Inputs):
    """Its causal_linear_attn: softmax(q), exp(k), and only whole earlier buckets of 64 tokens: less work than ours."""
    from linear_attention_transformer.linear_attention_transformer import causal_linear_attn

    return directed(case, functools.partial(causal_linear_attn, bucket_size=64), *inputs)


class Contender(NamedTuple):
    build: Callable
    same: bool
    module: str = "torch"


CONTENDERS = {
    "longattn": Contender(ours, True, "longattn"),
    "torch SDPA": Contender(sdpa, False),
    "fast-transformers": Contender(fast_transformers, True, "fast_transformers.causal_product"),
    "linear-attention-transformer": Contender(linear_attention_transformer, False, "linear_attention_transformer"),
    "performer-pytorch + C++ product": Contender(performer, True, "performer_pytorch"),
    "performer-pytorch": Contender(performer_torch, True, "performer_pytorch"),
}


@functools.cache
def missing(name: str) -> str | None:
    """Why a contender cannot take part here; None if it can. One that needs two packages needs both."""
    modules = [CONTENDERS[name].module]
    if name == "performer-pytorch + C++ product":
        modules.append("fast_transformers.causal_product")
    for module in modules:
        try:
            __import__(module)
        # a package built for another torch fails in ways of its own; the run goes on without it and says so
        except Exception as error:
            return f"{module} does not import: {type(error).__name__}: {error}"
    if name == "longattn":
        from longattn import native

        return native.missing()
    return None


def build(name: str, case: Case, inputs: Inputs | None = None):
    return CONTENDERS[name].build(case, make_inputs(case) if inputs is None else inputs)


def output_of(name: str, case: Case, result) -> Tensor:
    """The attention output `[B, H, n, E]` of what a call returned."""
    out = result if case.direction == "forward" else result[0]
    return out.transpose(1, 2) if name == "fast-transformers" and case.normalize else out


# one decoding step


def decode_ours(B: int, H: int, D: int, E: int, impl: str = "cpu", dtype: str = "float32"):
    case, device = Case(1, B=B, H=H, D=D, E=E, dtype=dtype), "cpu" if impl == "cpu" else "cuda"
    q, k, v, _ = make_inputs(case, device)
    state = longattn.LinearState(torch.rand(B, H, D, E, device=device), torch.rand(B, H, D, device=device))

    @torch.no_grad()
    def step():
        nonlocal state
        out, state = longattn.linear_attention_with_state(q, k, v, state=state, is_causal=True, impl=impl)
        return out

    return step


def decode_fast_transformers(B: int, H: int, D: int, E: int):
    from fast_transformers.recurrent.attention.self_attention.linear_attention import RecurrentLinearAttention

    layer, state = RecurrentLinearAttention(D), [torch.rand(B, H, D, E), torch.rand(B, H, D)]
    q, k, v = torch.randn(B, H, D), torch.randn(B, H, D), torch.randn(B, H, E)

    @torch.no_grad()
    def step():
        nonlocal state
        out, state = layer(q, k, v, state)
        return out

    return step


DECODERS = {"longattn": decode_ours, "fast-transformers": decode_fast_transformers}
