"""A drop-in for torch.nn.MultiheadAttention whose attention can be exchanged."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..favor import Favor
from ..ops import _check, _dispatch
from ..ops.affine import affine
from . import masks, nested
from .draws import Draws
from .mechanisms import Exact, Linear, Mechanism, resolve

OP = "MultiheadAttention"
# the largest L x S for which an efficient mechanism forms its weights on request
WEIGHTS_LIMIT = 2**22
# of the hook below; those that torch counts out to others are not negative
KEEP_OUT = -1


def keep_torch_out(module: nn.Module, arguments: tuple) -> None:
    """A forward pre-hook that does nothing. Where a module inside has one, torch's encoder layer calls its attention;
    without, in evaluation, it computes softmax attention from the weights."""


def favor_of(mechanism: Mechanism) -> Favor | None:
    """The Favor a mechanism estimates softmax with, if it does."""
    return mechanism.feature_map if isinstance(mechanism, Linear) and isinstance(mechanism.feature_map, Favor) else None


def refusal(mha: nn.MultiheadAttention, mechanism: Mechanism) -> str | None:
    """Why a mechanism cannot run in an attention of these parameters, in a sentence."""
    # what Auto runs where it is not exact
    inner = getattr(mechanism, "mechanism", mechanism)
    made = favor_of(inner) or inner
    head_dim, kind = getattr(made, "head_dim", mha.head_dim), type(made).__name__
    if head_dim != mha.head_dim:
        came = f"the attention has heads of {mha.head_dim} (embed_dim {mha.embed_dim} / {mha.num_heads} heads)"
        return f"the {kind} is for head_dim {head_dim}, but {came}; pass {kind}({mha.head_dim}, ...)"
    if (mha.bias_k is not None or mha.add_zero_attn) and not mechanism.takes_attn_mask:
        return f"add_bias_kv and add_zero_attn need mechanism='exact', got {mechanism!r}"
    if mha.in_proj_weight is None and not mechanism.takes_keys:
        return f"{mechanism!r} has no keys but its queries, and kdim or vdim makes others; take share_qk=False"
    return None


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with a choice of mechanism: same parameters, init, state_dict and call.

    mechanism: "exact" (softmax), another name ("lsh", "linear", "local", "favor", "auto"), a description such as
        `longattn.LSH(n_hashes=2)` or `longattn.Auto(...)`, or a `longattn.Favor` map.
    causal: query i sees keys 0..i in every call.
    nan_compat: with mechanism "exact", as in `longattn.nn.Exact`: torch's NaN for a query that sees no key.
    Other arguments as in torch. `forward(query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
    average_attn_weights=True, is_causal=False)` returns `(output, weights or None)`, where it differs from torch:

    - A query that sees no key gets attention 0 (so out_proj's bias) and weights 0, with finite gradients, never NaN,
      unless nan_compat asks for it. Padded keys are ignored whatever they hold, NaN too.
    - `is_causal=True` needs no attn_mask. With one it is the hint it is in torch: the mask is taken for the causal one.
    - out_proj is called as a module, so its hooks and adapters work. torch's encoder fast path, which computes softmax
      attention from this module's weights without calling it, is kept out by a forward pre-hook of this module.
    - A nested tensor is taken in every mode, not in inference alone: it is padded here, and comes back nested.
    - Efficient mechanisms (all but "exact") take causality (`causal`, `is_causal`, or an attn_mask that is the causal
      one) and key padding (bool, or float of 0 and -inf), and refuse other masks, add_bias_kv and add_zero_attn with a
      ValueError. A bool key_padding_mask is cheaper: the values of a float one are read. Their weights are formed up to
      L * S = 2**22, beyond it need_weights=True is refused. What dropout acts on is said by each mechanism.

    Memory of "exact": as `longattn.softmax_attention`. need_weights=True forms `[B, H, L, S]`; causality together with
    an attn_mask that is not the causal one, with add_bias_kv or with add_zero_attn, builds a mask of `[L, S]`.
    """

    def __init__(
        self,
        embed_dim,
        num_heads,
        dropout=0.0,
        bias=True,
        add_bias_kv=False,
        add_zero_attn=False,
        kdim=None,
        vdim=None,
        batch_first=False,
        device=None,
        dtype=None,
        *,
        mechanism: str | Mechanism | Favor = "exact",
        causal: bool = False,
        nan_compat: bool = False,
    ) -> None:
        extra = (add_bias_kv, add_zero_attn, kdim, vdim)
        super().__init__(embed_dim, num_heads, dropout, bias, *extra, batch_first, device, dtype)
        mechanism = resolve(mechanism, self.head_dim)
        if nan_compat:
            if not isinstance(mechanism, Exact):
                _check.fail(OP, f"nan_compat=True is for mechanism='exact', got {mechanism!r}, which gives no NaN")
            mechanism = Exact(nan_compat=True)
        own = mechanism.submodules(num_heads)
        for name, module in own.items():
            # what was made here goes where the parameters are, what was given stays where it is; what has no memory yet
            # cannot go anywhere
            made = getattr(mechanism, name, None) is not module
            if made and not any(x.is_meta for x in (*module.parameters(), *module.buffers())):
                module.to(self.out_proj.weight.device)
        self._adopt(mechanism, causal, own)

    def _adopt(self, mechanism: Mechanism, causal: bool, own: dict[str, nn.Module], op: str = OP) -> None:
        """What this class has beside torch's; the parameters are there. own: the submodules of the mechanism."""
        why = refusal(self, mechanism)
        if why is not None:
            _check.fail(op, why)
        self.causal, self._mechanism = bool(causal), mechanism
        for name, module in own.items():
            self.add_module(name, module)
        self._own = tuple(own)
        self._observed = tuple(name for name, module in own.items() if isinstance(module, Draws))
        self._forward_pre_hooks[KEEP_OUT] = keep_torch_out

    @property
    def mechanism(self) -> Mechanism:
        """The description, with the submodules this attention has now."""
        if not self._own:
            return self._mechanism
        return self._mechanism.with_submodules({name: getattr(self, name) for name in self._own})

    def extra_repr(self) -> str:
        shown = []
        if self._mechanism != Exact():
            shown.append(f"mechanism={self._mechanism!r}")
            note = self._mechanism.note(self.head_dim, self.out_proj.weight, self.causal)
            shown[0] += f" ({note})" if note else ""
        return ", ".join(shown + (["causal=True"] if self.causal else []))

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        # a checkpoint of another attention knows nothing of this mechanism: what it has of its own stays as it was made
        for name in self._own:
            if not any(key.startswith(f"{prefix}{name}.") for key in state_dict):
                state_dict.update(getattr(self, name).state_dict(prefix=f"{prefix}{name}."))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def merge_masks(self, attn_mask, key_padding_mask, query):
        """As in torch, whose encoder layer calls this before it computes attention by itself; refused where that would
        be another attention than this one."""
        if not isinstance(self._mechanism, Exact):
            raise RuntimeError(
                f"MultiheadAttention: torch is about to compute softmax attention in place of {self._mechanism!r}, "
                "because the forward pre-hook that keeps it from that was removed; leave _forward_pre_hooks as it was"
            )
        return super().merge_masks(attn_mask, key_padding_mask, query)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """query: `[L, B, E]` (`[B, L, E]` if batch_first, `[L, E]` without a batch); key, value: likewise with S.
        key_padding_mask: `[B, S]`, True = ignore; attn_mask: `[L, S]` or `[B * H, L, S]`, True = forbidden; float masks
        are added. Returns the output, like query, and the weights `[B, L, S]` (`[B, H, L, S]` if not
        average_attn_weights), or None if not need_weights. See the class for the rest.
        """
        masks.check(key_padding_mask, attn_mask)
        for name in self._observed:
            getattr(self, name).observe(self)
        options = need_weights, average_attn_weights, is_causal
        if query.is_nested or key.is_nested or value.is_nested:
            nested.check(self.batch_first, query, key, value, key_padding_mask, attn_mask)
            return nested.padded(lambda *x: self._attend(*x, None, *options), query, key, value)
        return self._attend(query, key, value, key_padding_mask, attn_mask, *options)

    def _attend(
        self, query, key, value, key_padding_mask, attn_mask, need_weights, average_attn_weights, is_causal
    ) -> tuple[Tensor, Tensor | None]:
        batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        # projections of one tensor are one product, so note what is the same before taking views
        same_query, same_value = query is key, key is value
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        batch_first = self.batch_first or not batched
        (B, L), S = query.shape[:2] if batch_first else query.shape[1::-1], key.shape[1 if batch_first else 0]
        self._check_shapes(query, key, value, B, batch_first)
        masks.check_shapes(key_padding_mask, attn_mask, B, self.num_heads, L, S)

        mechanism, attn_mask, is_causal = self._choose(query, key_padding_mask, attn_mask, is_causal, L, S)
        exact = mechanism.takes_attn_mask
        if not (mechanism.takes_keys or same_query):
            remedy = "pass the same tensor, or take share_qk=False"
            _check.fail(OP, f"{mechanism!r} has no keys but its queries; {remedy}")
        if need_weights and not exact and L * S > WEIGHTS_LIMIT:
            limit = f"{mechanism!r} forms them up to L * S = {WEIGHTS_LIMIT}; pass need_weights=False"
            _check.fail(OP, f"need_weights=True would form {L} x {S} weights, and {limit}")
        padded, key_bias = masks.padding(key_padding_mask, mechanism)
        if padded is not None and not same_query:
            # NaN in a padded key must not reach the gradients of the projections, as 0 * NaN
            hole = (padded if batch_first else padded.T).unsqueeze(-1)
            key = key.masked_fill(hole, 0)
            value = key if same_value else value.masked_fill(hole, 0)

        q, k, v = self._project(query, key, value, same_query, same_value)
        if self.bias_k is not None:
            k, v = (_append(x, extra, batch_first) for x, extra in ((k, self.bias_k), (v, self.bias_v)))
        to_heads = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).permute(to_heads) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))

        # q: [B, H, L, D]; k, v: [B, H, S, D]
        if exact:
            # with weights to form anyway, the mask is taken as it is, as in torch
            if is_causal and not need_weights:
                attn_mask = None
            causal = self.causal or (is_causal and attn_mask is None)
            merged = masks.for_exact(attn_mask, padded, key_bias, causal, q, S, k.shape[2] - S)
        else:
            merged = masks.for_efficient(mechanism, attn_mask, padded, self.causal, is_causal, L, S)
        dropout_p = self.dropout if self.training else 0.0
        if need_weights:
            attended, weights = mechanism.attend_with_weights(q, k, v, dropout_p=dropout_p, **merged._asdict())
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            attended, weights = mechanism.attend(q, k, v, dropout_p=dropout_p, **merged._asdict()), None
        output = self.out_proj(attended.permute((0, 2, 1, 3) if batch_first else (2, 0, 1, 3)).flatten(2))
        return output if batched else output.squeeze(0), weights

    def _choose(
        self, query, key_padding_mask, attn_mask, is_causal: bool, L: int, S: int
    ) -> tuple[Mechanism, Tensor | None, bool]:
        """-> what runs this call, and attn_mask and is_causal, where a mask that is the causal one has become that."""
        described, causal = self.mechanism, self.causal or is_causal
        mechanism = described.chosen(L, S, self.head_dim, query, causal or attn_mask is not None)
        if mechanism.takes_attn_mask:
            return mechanism, attn_mask, is_causal
        if attn_mask is not None and (is_causal or masks.is_the_causal_one(attn_mask, L, S)):
            attn_mask, is_causal = None, True
        if described.otherwise is not None and not masks.are_plain(key_padding_mask, attn_mask, causal, L, S):
            mechanism = described.otherwise
        return mechanism, attn_mask, is_causal

    def _explain(
        self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, average_attn_weights=True,
        is_causal=False,
    ) -> _dispatch.Explanation:  # fmt: skip
        """What `longattn.explain(module, ...)` says: which mechanism runs the call `module(...)`."""
        at = 1 if self.batch_first and query.dim() == 3 else 0
        L, S = query.shape[at], key.shape[at]
        mechanism, _, is_causal = self._choose(query, key_padding_mask, attn_mask, is_causal, L, S)
        note = self._mechanism.note(self.head_dim, query, self.causal or is_causal)
        return _dispatch.Explanation(OP, repr(mechanism), {repr(mechanism): None}, note)

    def _project(self, query, key, value, same_query: bool, same_value: bool) -> tuple[Tensor, Tensor, Tensor]:
        E, weight, bias = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        if bias is not None and bias.dtype != (like := self.q_proj_weight if weight is None else weight).dtype:
            bias = bias.to(like.dtype)
        if weight is not None and same_query and same_value:
            return affine(query, weight, bias).chunk(3, -1)
        b_q, b_k, b_v = (None, None, None) if bias is None else bias.split(E)
        if weight is None:
            w_q, w_k, w_v = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        elif same_value:
            k, v = affine(key, weight[E:], None if bias is None else bias[E:]).chunk(2, -1)
            return affine(query, weight[:E], b_q), k, v
        else:
            w_q, w_k, w_v = weight.split(E)
        return affine(query, w_q, b_q), affine(key, w_k, b_k), affine(value, w_v, b_v)

    def _check_shapes(self, query, key, value, B: int, batch_first: bool) -> None:
        """In torch's words where it has some."""
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]}")
        # torch names the shapes with the length first
        k, v = (x.transpose(0, 1).shape if batch_first else x.shape for x in (key, value))
        if self.in_proj_weight is None and k[:2] != v[:2]:
            raise AssertionError(f"key's sequence and batch dims {k[:2]} do not match value's {v[:2]}")
        if self.in_proj_weight is not None and k != v:
            raise AssertionError(f"key shape {k} does not match value shape {v}")
        for name, x, weight in (("key", key, self.k_proj_weight), ("value", value, self.v_proj_weight)):
            if weight is not None and weight.shape != (expected := (self.embed_dim, x.shape[-1])):
                raise AssertionError(f"expecting {name} weights shape of {expected}, but got {weight.shape}")
        if k[1] != B:
            came = f"got {B} and {k[1]} with batch_first={self.batch_first}"
            _check.fail(OP, f"query and key must share the batch size, {came}")


def _append(x: Tensor, extra: Tensor, batch_first: bool) -> Tensor:
    """x with one more key for each of the batch. x: `[B, S, E]` or `[S, B, E]`, extra: `[1, 1, E]`."""
    shape = (x.shape[0], 1, -1) if batch_first else (1, x.shape[1], -1)
    return torch.cat([x, extra.to(x.dtype).expand(shape)], 1 if batch_first else 0)
