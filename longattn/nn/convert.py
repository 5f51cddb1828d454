"""From a trained torch.nn.MultiheadAttention to one of ours with another mechanism."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..favor import Favor
from ..ops import _check
from .attention import MultiheadAttention
from .mechanisms import Linear, Mechanism, resolve

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def favor_of(mechanism: Mechanism) -> Favor | None:
    """The Favor a mechanism estimates softmax with, if it does."""
    return mechanism.feature_map if isinstance(mechanism, Linear) and isinstance(mechanism.feature_map, Favor) else None


def check_head_dim(op: str, mha: nn.MultiheadAttention, mechanism: Mechanism) -> None:
    favor = favor_of(mechanism)
    if favor is not None and favor.head_dim != mha.head_dim:
        came = f"the attention has heads of {mha.head_dim} (embed_dim {mha.embed_dim} / {mha.num_heads} heads)"
        _check.fail(op, f"the Favor is for head_dim {favor.head_dim}, but {came}; pass Favor({mha.head_dim}, ...)")


def convert(
    mha: nn.MultiheadAttention, mechanism: str | Mechanism | Favor, *, causal: bool | None = None
) -> MultiheadAttention:
    """`mha` with another mechanism: a `longattn.nn.MultiheadAttention` that computes with the same weights.

    mha: a torch.nn.MultiheadAttention or a longattn.nn.MultiheadAttention; it stays usable, and is not changed.
    mechanism: as in longattn.nn.MultiheadAttention: "exact", `longattn.Favor(head_dim)`, `longattn.Linear(...)`. On an
        accelerator its own modules are moved to the weights' device if they are on the CPU.
    causal: as in longattn.nn.MultiheadAttention; None keeps that of `mha`, False for torch's.

    The result holds the very Parameters of `mha` and its out_proj, not copies: an optimizer, a tied weight and a frozen
    one stay what they are, and training either trains both. state_dict keys, sizes, biases, dropout, batch_first,
    dtype, device and training mode are those of `mha`. In a model:
    `layer.self_attn = longattn.convert(layer.self_attn, mechanism)`.

    Raises ValueError or TypeError in a sentence: for other classes, subclasses included, whose own forward would be
    lost; for hooks and parametrizations on `mha` itself, likewise; for add_bias_kv or add_zero_attn with a mechanism
    other than "exact"; and where the head_dim or the device of the mechanism is another.
    """
    if type(mha) not in (nn.MultiheadAttention, MultiheadAttention):
        parametrized = isinstance(mha, nn.MultiheadAttention) and parametrize.is_parametrized(mha)
        if parametrized:
            remedy = "remove them first with torch.nn.utils.parametrize.remove_parametrizations"
            _check.fail("convert", f"the attention has parametrizations, which would be lost; {remedy}")
        came = f"{type(mha).__module__}.{type(mha).__qualname__}"
        expected = "mha must be a torch.nn.MultiheadAttention or a longattn.nn.MultiheadAttention"
        _check.fail("convert", f"{expected}, not a subclass or another module, got {came}", TypeError)
    if any(getattr(mha, name) for name in HOOKS):
        remedy = "remove them, convert, and register them on the result"
        _check.fail("convert", f"the attention has hooks, which would no longer be called; {remedy}")
    return sharing(mha, resolve(mechanism), causal)


def sharing(mha: nn.MultiheadAttention, mechanism: Mechanism, causal: bool | None = None) -> MultiheadAttention:
    """`convert` of what it takes; hooks on mha are left behind."""
    check_head_dim("convert", mha, mechanism)
    made = MultiheadAttention(
        mha.embed_dim,
        mha.num_heads,
        mha.dropout,
        mha.in_proj_bias is not None,
        mha.bias_k is not None,
        mha.add_zero_attn,
        mha.kdim,
        mha.vdim,
        mha.batch_first,
        # nothing is allocated nor drawn: every parameter is replaced
        device="meta",
        mechanism=mechanism,
        causal=getattr(mha, "causal", False) if causal is None else causal,
    )
    for name, parameter in mha._parameters.items():
        made._parameters[name] = parameter
    made.out_proj = mha.out_proj
    weight = mha.out_proj.weight
    for module in mechanism.submodules().values():
        places = {x.device for x in (*module.parameters(), *module.buffers())}
        if weight.device.type != "meta" and places == {torch.device("cpu")}:
            module.to(weight.device)
        elif places - {weight.device}:
            came = f"got {weight.device} and {', '.join(sorted(map(str, places)))}"
            remedy = "give each device a mechanism of its own"
            _check.fail("convert", f"the mechanism must be on the device of the weights, {came}; {remedy}")
        module.train(mha.training)
    made.training = mha.training
    return made
