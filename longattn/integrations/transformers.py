"""Attention of this package inside Hugging Face transformers 5:

    from longattn.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="longattn_local")

or, of a model that is there, `model.set_attn_implementation("longattn_local")`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping

import torch
from torch import Tensor

from ..ops import _check
from ._engines import ENGINES, Call, Engine, attend

PREFIX = "longattn_"
# names that transformers gives a meaning of its own
TAKEN, MARKS = ("eager", "sdpa", "flex_attention"), ("flash", "|", "/")
# arguments of a layer that change what its attention is, and what they are
REFUSED = {
    "softcap": "a softcap of the scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a bias added to the scores",
    "head_mask": "a mask of heads",
    "indices": "chosen keys",
    "block_indices": "chosen blocks of keys",
    "cache": "a paged cache (continuous batching)",
}


def register(*, name: str | None = None, **options: Mapping) -> tuple[str, ...]:
    """Makes mechanisms known to transformers, as attention and as mask; returns their names.

    Without arguments: `longattn_exact`, `longattn_local`, `longattn_lsh`, `longattn_favor` and `longattn_linear`.
    exact, local, lsh, favor, linear: a mapping of options each; then those alone are registered, anew. The options are
        the arguments of `longattn.Local` (without chunks), `LSH` (without scale, share_qk and resample: rotations stay
        those of `seed`), `Favor` (without head_dim and learn_temperature) and `Linear`; "exact" has impl.
    name: in place of `longattn_<mechanism>`, where one mechanism is given:

        register(lsh={"n_hashes": 8}, name="lsh8")

    What a registered attention honours: grouped heads, the layer's scale, dropout, causality as the layer has it,
    padding, positions that restart (packed sequences, each for itself), dynamic and static caches, sliding windows
    ("exact" and "local"; the others where no window is shorter than the keys). "exact" also takes 4-D masks and any
    other pattern, in O(L S) memory. What cannot be honoured is refused with a ValueError in a sentence: softcap, sinks,
    biases, paged caches, output_attentions, and by all but "exact" 4-D masks and patterns such as chunks.

    With a cache the queries are the last of the keys. "exact" and "local" see what they see without one; "favor" and
    "linear" sum the features of all keys again, O(n) for each token; "lsh", which stands for exact attention, is exact.
    "linear" has a kernel of its own in place of the softmax, to which the layer's scale means nothing, and dropout of
    "linear" and "favor" acts on the output. While torch.compile traces, packed sequences are known to "exact" alone;
    the others assert that there are none, and "favor" wants to have run once before.

    Raises ImportError without transformers 5, ValueError or TypeError, each in a sentence.
    """
    unknown = [kind for kind in options if kind not in ENGINES]
    if unknown:
        known = ", ".join(ENGINES)
        _check.fail("register", f"the mechanisms are {known}, got {', '.join(unknown)}", TypeError)
    if name is not None:
        if len(options) != 1:
            _check.fail("register", f"name={name!r} is for one mechanism; pass one, as in lsh={{'n_hashes': 8}}")
        if not isinstance(name, str) or not name or name in TAKEN or any(mark in name for mark in MARKS):
            taken = f"a name of its own, not {', '.join(TAKEN)} and without {' or '.join(map(repr, MARKS))}"
            _check.fail("register", f"name must be {taken}, got {name!r}")
    made = {kind: _engine(kind, given) for kind, given in (options or {kind: {} for kind in ENGINES}).items()}
    attention, masks = _interfaces()
    names = []
    for kind, engine in made.items():
        names.append(name or PREFIX + kind)
        attention.register(names[-1], functools.partial(_attention, engine, names[-1]))
        masks.register(names[-1], _mask(engine, names[-1]))
    return tuple(names)


def _engine(kind: str, given: Mapping) -> Engine:
    if not isinstance(given, Mapping):
        _check.fail("register", f"{kind} must be a mapping of its options, got {_check.describe(given)}", TypeError)
    known = ENGINES[kind].options()
    unknown = [option for option in given if option not in known]
    if unknown:
        _check.fail("register", f"the options of {kind} are {', '.join(known)}; got {', '.join(unknown)}", TypeError)
    return ENGINES[kind](**given)


def _interfaces():
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("register: transformers is not installed; pip install 'transformers>=5'")
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError:
        import transformers

        came = f"transformers {transformers.__version__} has no masks that can be registered"
        raise ImportError(f"register: {came}; pip install 'transformers>=5'") from None
    return AttentionInterface, AttentionMaskInterface


def _mask(engine: Engine, name: str):
    # it reads the library's mask functions, so it is loaded with the library
    from ._transformers_masks import mask

    return functools.partial(mask, engine, name)


def _attention(
    engine: Engine,
    name: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **others,
) -> tuple[Tensor, None]:
    """query `[B, Hq, L, D]`, key and value `[B, H, S, D]` -> (`[B, L, Hq, D]`, None), as AttentionInterface has it.

    attention_mask: what `_transformers_masks.mask` returns, a bool `[B, n]` over the first n keys, or 4-D for exact.
    """
    for option, what in REFUSED.items():
        if others.get(option) is not None:
            _check.fail(name, f"{what} ({option}) cannot be honoured here; pass attn_implementation='eager'")
    if others.get("output_attentions"):
        _check.fail(name, "output_attentions needs the weights, which are never formed; pass output_attentions=False")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if sliding_window is not None and not is_causal:
        # on either side, as the library counts it
        sliding_window = sliding_window + 1
    keys, window, starts, dense = _read(engine, name, attention_mask, sliding_window, query, key)
    if keys is not None and keys.shape[1] < key.shape[2]:
        # a static cache ends in keys that are not written yet
        key, value = (x[:, :, : keys.shape[1]] for x in (key, value))
    if starts is None and cu_seq_lens_q is not None and query.shape[2] > 1:
        starts = _given_starts(name, cu_seq_lens_q, cu_seq_lens_k, query, key, keys)
    call = Call(
        query, key, value,
        padding=None if keys is None else ~keys,
        is_causal=bool(is_causal) and dense is None,
        window=window,
        starts=starts,
        dense=dense,
        scale=query.shape[3] ** -0.5 if scaling is None else float(scaling),
        dropout_p=float(dropout),
    )  # fmt: skip
    return attend(engine, call, name).transpose(1, 2).contiguous(), None


def _read(engine: Engine, name: str, mask, sliding_window, query: Tensor, key: Tensor):
    """-> (keys bool [B, n], window, starts, dense mask), each or None."""
    if mask is None:
        window = None if sliding_window is None or sliding_window >= key.shape[2] else int(sliding_window)
        if window is not None and not engine.takes_window:
            _check.fail(name, f"a sliding window of {window} keys is shorter than the {key.shape[2]}; {_REMEDY}")
        return None, window, None, None
    if not isinstance(mask, Tensor):
        return *mask, None
    if mask.dim() == 2 and mask.dtype == torch.bool:
        return mask, None, None, None
    if mask.dim() == 4 and engine.takes_dense:
        return None, None, None, mask
    expected = f"a bool [B, S] = {[key.shape[0], key.shape[2]]} mask of padding, True for a token"
    remedy = "pass the 2-D one to the model" if engine.takes_dense else f"pass it to the model, or {_REMEDY}"
    _check.fail(name, f"the attention mask must be {expected}, got {_check.describe(mask)}; {remedy}")


_REMEDY = "take attn_implementation='longattn_exact'"


def _given_starts(name: str, cu_q: Tensor, cu_k: Tensor | None, query: Tensor, key: Tensor, keys) -> Tensor:
    self_attention = query.shape[0] == 1 and query.shape[2] == key.shape[2] and keys is None
    if not self_attention or (cu_k is not None and cu_k is not cu_q and cu_k.shape != cu_q.shape):
        came = f"got queries {list(query.shape)} and keys {list(key.shape)}"
        _check.fail(name, f"cu_seq_lens_q needs one row of packed sequences whose keys are its queries, {came}")
    return cu_q.int()
