"""Who takes part in the comparison of modules: attention layers and encoders as users hold them, on equal weights."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from _contenders import Contender, missing_of
from _floors import Stack
from torch import Tensor, nn

import longattn

KINDS = ("layer", "encoder")


class Case(NamedTuple):
    """One measurement: self-attention of `[B, n, H D]`. kind: "layer", one MultiheadAttention; "encoder", torch's
    TransformerEncoder of `layers` around it. direction: "forward" (eval, no graph) or "forward+backward" (train)."""

    n: int
    B: int = 1
    H: int = 8
    D: int = 64
    hidden: int = 2048
    layers: int = 6
    kind: str = "encoder"
    n_hashes: int = 2
    is_causal: bool = False
    dtype: str = "float32"
    direction: str = "forward"

    @property
    def dim(self) -> int:
        return self.H * self.D

    @property
    def shape(self) -> Stack:
        hidden, layers = (self.hidden, self.layers) if self.kind == "encoder" else (0, 1)
        pairs = (self.n + 1) / 2 if self.is_causal else self.n
        return Stack(self.n, self.B, self.dim, hidden, layers, pairs, self.dtype)

    @property
    def drawn(self) -> tuple:
        """Cases that are alike in this have the same inputs."""
        return self.n, self.B, self.dim, self.dtype, self.direction


def make_inputs(case: Case, device: str = "cpu") -> Tensor:
    generator, dtype = torch.Generator(device).manual_seed(0), getattr(torch, case.dtype)
    x = torch.empty(case.B, case.n, case.dim, dtype=dtype, device=device).normal_(generator=generator)
    return x.requires_grad_(case.direction != "forward")


def model_of(name: str, case: Case) -> nn.Module:
    torch.manual_seed(0)
    lsh = longattn.LSH(n_hashes=case.n_hashes)
    mechanism = {"longattn exact": "exact", "longattn LSH": lsh, "longattn auto": longattn.Auto(lsh)}.get(name)
    if case.kind == "layer":
        if name == "torch":
            return nn.MultiheadAttention(case.dim, case.H, batch_first=True)
        return longattn.nn.MultiheadAttention(case.dim, case.H, batch_first=True, mechanism=mechanism)
    layer = nn.TransformerEncoderLayer(case.dim, case.H, case.hidden, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, case.layers, enable_nested_tensor=False)
    if name != "torch":
        longattn.replace_attention(model, mechanism, report=False)
    return model


def stepper(name: str, case: Case, x: Tensor):
    model = model_of(name, case).to(x.dtype)

    if case.kind == "layer":

        def run() -> Tensor:
            return model(x, x, x, need_weights=False, **masks)[0]
    else:

        def run() -> Tensor:
            return model(x, **masks)

    masks = {}
    if case.is_causal:
        mask = nn.Transformer.generate_square_subsequent_mask(case.n) if name == "torch" else None
        masks = {("attn_mask" if case.kind == "layer" else "mask"): mask, "is_causal": True}
    if case.direction == "forward":
        model.eval()
        return torch.no_grad()(run)
    model.train()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None
        run().square().mean().backward()

    return step


NAMES = ("torch", "longattn exact", "longattn LSH", "longattn auto")
# the one that others are told by
CONTENDERS = {
    "longattn": Contender(functools.partial(stepper, "longattn exact"), True, "longattn"),
    **{name: Contender(functools.partial(stepper, name), True, "longattn") for name in NAMES},
}
missing = functools.partial(missing_of, CONTENDERS)


def build(name: str, case: Case, inputs: Tensor | None = None):
    return CONTENDERS[name].build(case, make_inputs(case) if inputs is None else inputs)
