"""From a trained torch.nn.MultiheadAttention to one of ours with another mechanism: the very same module, or a twin."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..favor import Favor
from ..ops import _check
from .attention import KEEP_OUT, MultiheadAttention, refusal
from .draws import Draws
from .mechanisms import Mechanism, resolve

# where an attention keeps what it was before `take_over`
KEPT = "_before_longattn"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
OURS = ("causal", "_mechanism", "_own", "_observed")


def base_of(mha: nn.Module) -> type:
    """Its class; where that is one of torch's parametrizations, the class it stands for."""
    cls = type(mha)
    return cls.__bases__[0] if parametrize.is_parametrized(mha) and len(cls.__bases__) == 1 else cls


def _with_base(mha: nn.Module, base: type) -> type:
    """Its class with another one in place of `base_of`: parametrizations are properties of a class of their own."""
    if base_of(mha) is type(mha):
        return base
    members = {name: x for name, x in vars(type(mha)).items() if name not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{base.__name__}", (base,), members)


def misfit(mha: nn.Module) -> str | None:
    """Why a module cannot become one of ours, in a sentence."""
    cls = base_of(mha)
    if cls in (nn.MultiheadAttention, MultiheadAttention):
        return None
    name = f"{cls.__module__}.{cls.__qualname__}"
    if not isinstance(mha, nn.MultiheadAttention):
        return f"it is no torch.nn.MultiheadAttention, it is a {name}"
    if cls.__module__.startswith(("torch.ao.", "torch.quantization")):
        return f"it is quantised ({name}); replace before quantising"
    if cls.__name__.startswith("FSDP"):
        return "fully_shard has made it its own; replace before fully_shard"
    return f"its class {name} is a subclass of torch.nn.MultiheadAttention, whose own forward would be lost"


def check_fits(op: str, mha: nn.MultiheadAttention, mechanism: Mechanism) -> None:
    why = refusal(mha, mechanism)
    if why is not None:
        _check.fail(op, why)


def place(modules: Iterable[nn.Module], mha: nn.MultiheadAttention, op: str) -> None:
    """Puts the modules of a mechanism where the weights are, in the mode of the attention."""
    weight = mha.out_proj.weight
    for module in modules:
        places = {x.device for x in (*module.parameters(), *module.buffers())}
        # steps lose nothing without memory, what was drawn does
        if places == {torch.device("cpu")} and (weight.device.type != "meta" or isinstance(module, Draws)):
            module.to(weight.device)
        elif places - {weight.device}:
            came = f"got {weight.device} and {', '.join(sorted(map(str, places)))}"
            remedy = "give each device a mechanism of its own"
            remedy = "do this once the weights have memory" if weight.is_meta else remedy
            _check.fail(op, f"the mechanism must be on the device of the weights, {came}; {remedy}")
        module.train(mha.training)


def take_over(mha: nn.MultiheadAttention, mechanism: Mechanism, causal: bool | None, op: str) -> MultiheadAttention:
    """Makes it ours, in place: the same object, Parameters, hooks and modules inside, of our class."""
    check_fits(op, mha, mechanism)
    own = mechanism.submodules(mha.num_heads)
    place(own.values(), mha, op)
    before = {name: mha.__dict__[name] for name in OURS if name in mha.__dict__} | {"class": base_of(mha)}
    before["modules"] = {name: mha._modules.pop(name) for name in before.get("_own", ())}
    mha.__class__ = _with_base(mha, MultiheadAttention)
    mha._adopt(mechanism, before.get("causal", False) if causal is None else causal, own, op)
    mha.__dict__.setdefault(KEPT, before)
    return mha


def give_back(mha: MultiheadAttention) -> None:
    """Undoes `take_over`; where there were several, all of them."""
    before = mha.__dict__.pop(KEPT)
    for name in mha._own:
        del mha._modules[name]
    place(before["modules"].values(), mha, "restore_attention")
    mha._modules.update(before.pop("modules"))
    base = before.pop("class")
    mha.__class__ = _with_base(mha, base)
    if base is not MultiheadAttention:
        del mha._forward_pre_hooks[KEEP_OUT]
    for name in OURS:
        mha.__dict__.pop(name)
    mha.__dict__.update(before)


def _twin(mha: nn.MultiheadAttention) -> nn.MultiheadAttention:
    """Another object of its class, without hooks, on the same Parameters and modules."""
    made = object.__new__(type(mha))
    made.__dict__.update(mha.__dict__)
    made.__dict__.update({name: x for name, x in vars(nn.Module()).items() if name.endswith("_hooks")})
    for name in ("_parameters", "_buffers", "_modules"):
        made.__dict__[name] = mha.__dict__[name].copy()
    for name in (KEPT, "_compiled_call_impl"):
        made.__dict__.pop(name, None)
    return made


def sharing(mha: nn.MultiheadAttention, mechanism: Mechanism, causal: bool | None = None) -> MultiheadAttention:
    """`convert` of what it takes; hooks on mha are left behind."""
    made = take_over(_twin(mha), mechanism, causal, "convert")
    del made.__dict__[KEPT]
    return made


def convert(
    mha: nn.MultiheadAttention, mechanism: str | Mechanism | Favor, *, causal: bool | None = None
) -> MultiheadAttention:
    """`mha` with another mechanism: a `longattn.nn.MultiheadAttention` that computes with the same weights.

    mha: a torch.nn.MultiheadAttention or a longattn.nn.MultiheadAttention; it stays usable, and is not changed.
    mechanism: as in longattn.nn.MultiheadAttention: "exact", `longattn.Favor(head_dim)`, `longattn.Linear(...)`. On an
        accelerator its own modules are moved to the weights' device if they are on the CPU.
    causal: as in longattn.nn.MultiheadAttention; None keeps that of `mha`, False for torch's.

    The result holds the very Parameters of `mha`, its parametrizations and its out_proj, not copies: an optimizer, a
    tied weight and a frozen one stay what they are, and training either trains both. state_dict keys, sizes, biases,
    dropout, batch_first, dtype, device and training mode are those of `mha`. The attentions of a whole model, in place
    and with their hooks, are what `longattn.replace_attention` takes.

    Raises ValueError or TypeError in a sentence: for other classes, subclasses included, whose own forward would be
    lost; for hooks on `mha` itself, likewise; for add_bias_kv or add_zero_attn with a mechanism other than "exact"; and
    where the head_dim or the device of the mechanism is another.
    """
    why = misfit(mha)
    if why is not None:
        expected = "mha must be a torch.nn.MultiheadAttention or a longattn.nn.MultiheadAttention"
        _check.fail("convert", f"{expected}, but {why}", TypeError)
    hooks = [name for name in HOOKS if set(getattr(mha, name)) - {KEEP_OUT}]
    if hooks:
        remedy = "remove them, convert, and register them on the result, or take longattn.replace_attention"
        _check.fail("convert", f"the attention has hooks, which would no longer be called; {remedy}")
    return sharing(mha, resolve(mechanism, mha.head_dim), causal)
