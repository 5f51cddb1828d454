"""Who takes part: one builder per package, each from the same q, k, v to a call without arguments.

A builder lays the inputs out as its package wants them, outside the measured call; feature maps are inside it. `same`
says whether it computes our function, so that results can be checked.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from _floors import Shape
from torch import Tensor
from torch.nn import functional as F

import longattn
from longattn.features import FAVOR_PAIRED


class Case(NamedTuple):
    """One measurement. direction: as in `_floors.floor`.

    feature: "elu", "relu"; "raw": q and k are features already, D = M; "favor-KIND": n_features of `longattn.Favor`.
    """

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
    n_features: int | None = None
    exact_diagonal: bool = False

    @property
    def kind(self) -> str | None:
        """The kind of FAVOR+ features; None for any other map."""
        return self.feature.removeprefix("favor-") if self.feature.startswith("favor-") else None

    @property
    def shape(self) -> Shape:
        M = self.n_features or self.D
        P = 0 if self.kind is None else M // 2 if self.kind in FAVOR_PAIRED else M
        sizes = (self.n, self.B, self.H, self.D, self.E, M, self.dtype)
        return Shape(*sizes, P, self.is_causal, self.exact_diagonal)

    @property
    def drawn(self) -> tuple:
        """Cases that are alike in this have the same inputs: what the features are does not matter, unless they are."""
        return *self[:5], self.dtype, self.feature == "raw"


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


def favor(case: Case, device: str | torch.device = "cpu") -> longattn.Favor:
    """The features of a case; the peers are given its projection."""
    options = {"kind": case.kind, "exact_diagonal": case.exact_diagonal}
    return longattn.Favor(case.D, case.n_features, **options, device=device)


def linear(case: Case) -> Callable[..., Tensor]:
    feature_map = "identity" if case.feature == "raw" else case.feature
    if case.kind is not None:
        feature_map = favor(case, "cpu" if case.impl in ("cpu", "reference") else "cuda")
    return functools.partial(
        longattn.linear_attention,
        feature_map=feature_map,
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
    from fast_transformers.attention.linear_attention import LinearAttention
    from fast_transformers.masking import LengthMask

    class Mask:
        # its own TriangularCausalMask and FullMask are n x n matrices that are never read
        lower_triangular, all_ones = case.is_causal, not case.is_causal

    layer = (CausalLinearAttention if case.is_causal else LinearAttention)(case.D, fast_transformers_map(case))
    lengths = LengthMask(torch.full((case.B,), case.n))
    theirs = [x.transpose(1, 2).contiguous() for x in inputs]  # [B, n, H, .]
    return directed(case, lambda q, k, v: layer(q, k, v, Mask, lengths, lengths), *theirs)


def fast_transformers_map(case: Case):
    """A factory of its feature map. Its Favor takes pairs exp(u), exp(-u): our kind "hyperbolic" at equal M."""
    from fast_transformers.feature_maps import Favor
    from fast_transformers.feature_maps.base import ActivationFunctionFeatureMap

    if case.kind is None:
        return ActivationFunctionFeatureMap.factory(functools.partial(phi, case))
    # outside of training it keeps its projection, by default it draws a new one in each call
    feature_map = Favor(case.D, case.n_features, deterministic_eval=True).eval()
    feature_map.omega.copy_(favor(case._replace(feature="favor-hyperbolic")).projection.T)
    return lambda query_dimensions: feature_map


def performer(case: Case, inputs: Inputs):
    """performer-pytorch's causal_linear_attention, which calls the C++ product of pytorch-fast-transformers."""
    from performer_pytorch.performer_pytorch import causal_linear_attention

    return performer_with(case, inputs, causal_linear_attention)


def performer_torch(case: Case, inputs: Inputs):
    """What performer-pytorch itself runs on a CPU: it looks for the CUDA kernel alone."""
    from performer_pytorch import performer_pytorch

    name = "causal_linear_attention_noncuda" if case.is_causal else "linear_attention"
    return performer_with(case, inputs, getattr(performer_pytorch, name))


def performer_with(case: Case, inputs: Inputs, product: Callable[..., Tensor]):
    if case.kind is None:
        return directed(case, lambda q, k, v: product(phi(case, q), phi(case, k), v), *inputs)
    return directed(case, performer_layer(case, product, favor(case).projection), *inputs)


def performer_layer(case: Case, product: Callable[..., Tensor], projection: Tensor | None = None):
    """Its FastAttention, with our projection or with one of its own."""
    from performer_pytorch import FastAttention

    # it prints that it has found no CUDA code
    with contextlib.redirect_stdout(None):
        layer = FastAttention(case.D, case.n_features, causal=case.is_causal)
    if projection is not None:
        layer.projection_matrix.copy_(projection)
    if case.is_causal:
        layer.causal_linear_fn = product
    return layer


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


def missing(name: str) -> str | None:
    return missing_of(CONTENDERS, name)


def missing_of(contenders: dict[str, Contender], name: str) -> str | None:
    """Why a contender cannot take part here; None if it can. One that needs two packages needs both."""
    modules = [contenders[name].module]
    if name == "performer-pytorch + C++ product":
        modules.append("fast_transformers.causal_product")
    for module in modules:
        try:
            __import__(module)
        # a package built for another torch fails in ways of its own; the run goes on without it and says so
        except Exception as error:
            return f"{module} does not import: {type(error).__name__}: {error}"
    if contenders[name].module == "longattn":
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


def decode_ours(case: Case):
    """A step of `case.B` sequences after a state of random sums, or after 256 tokens for FAVOR+."""
    device = "cpu" if case.impl == "cpu" else "cuda"
    q, k, v, _ = make_inputs(case, device)
    sizes = (case.B, case.H, case.D)
    feature_map, state = case.feature, None
    if case.kind is None:
        state = longattn.LinearState(torch.rand(*sizes, case.E, device=device), torch.rand(*sizes, device=device))
    else:
        feature_map = favor(case, device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal state
        options = {"feature_map": feature_map, "is_causal": True, "impl": case.impl}
        out, state = longattn.linear_attention_with_state(q, k, v, state=state, **options)
        return out

    step = torch.no_grad()(attend)
    if state is None:
        step(*make_inputs(case._replace(n=256), device)[:3])
    return lambda: step(q, k, v)


def decode_fast_transformers(case: Case):
    from fast_transformers.recurrent.attention.self_attention.linear_attention import RecurrentLinearAttention

    B, H, D, M = case.B, case.H, case.D, case.shape.M
    layer = RecurrentLinearAttention(D, fast_transformers_map(case))
    state = [torch.rand(B, H, M, case.E), torch.rand(B, H, M)]
    q, k, v = (x[:, :, 0].contiguous() for x in make_inputs(case)[:3])

    @torch.no_grad()
    def step():
        nonlocal state
        out, state = layer(q, k, v, state)
        return out

    return step


DECODERS = {"longattn": decode_ours, "fast-transformers": decode_fast_transformers}
