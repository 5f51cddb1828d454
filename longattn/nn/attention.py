"""A drop-in for torch.nn.MultiheadAttention whose attention can be exchanged."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from ..favor import Favor
from ..ops import _check
from . import masks
from .draws import Draws
from .mechanisms import Exact, Mechanism, resolve

# the largest L x S for which an efficient mechanism forms its weights on request
WEIGHTS_LIMIT = 2**22


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with a choice of mechanism: same parameters, init, state_dict and call.

    mechanism: "exact" (softmax), a description such as `longattn.Linear()`, or a `longattn.Favor` map.
    causal: query i sees keys 0..i in every call.
    Other arguments as in torch. `forward(query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
    average_attn_weights=True, is_causal=False)` returns `(output, weights or None)`, where it differs from torch:

    - A query that sees no key gets attention 0 (so out_proj's bias) and weights 0, with finite gradients, never NaN.
      Padded keys are ignored whatever they hold, NaN too.
    - `is_causal=True` needs no attn_mask. With one it is the hint it is in torch: the mask is taken for the causal one.
    - out_proj is called as a module, so its hooks and adapters work. torch's encoder fast path, which computes softmax
      attention from this module's weights without calling it, is off; a nested tensor that nn.TransformerEncoder passes
      is padded here, and comes back nested.
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
        mechanism: str | Mechanism = "exact",
        causal: bool = False,
    ) -> None:
        mechanism = resolve(mechanism)
        if (add_bias_kv or add_zero_attn) and not mechanism.takes_attn_mask:
            sentence = f"add_bias_kv and add_zero_attn need mechanism='exact', got {mechanism!r}"
            _check.fail("MultiheadAttention", sentence)
        favor = getattr(mechanism, "feature_map", None)
        if isinstance(favor, Favor) and embed_dim != favor.head_dim * num_heads:
            sentence = f"this Favor is for head_dim {favor.head_dim}, got embed_dim {embed_dim} in {num_heads} heads"
            _check.fail("MultiheadAttention", sentence)
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        self.causal = bool(causal)
        self._mechanism = mechanism
        for name, module in mechanism.submodules().items():
            self.add_module(name, module)
            if isinstance(module, Draws):
                self.register_forward_pre_hook(module.observe)

    @property
    def mechanism(self) -> Mechanism:
        """The description, with the submodules this attention has now."""
        own = {name: getattr(self, name) for name in self._mechanism.submodules()}
        return dataclasses.replace(self._mechanism, **own) if own else self._mechanism

    def extra_repr(self) -> str:
        shown = [] if self._mechanism == Exact() else [f"mechanism={self._mechanism!r}"]
        return ", ".join(shown + (["causal=True"] if self.causal else []))

    def _reset_parameters(self) -> None:
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        # torch's encoder reads this flag: False keeps it from computing softmax attention without calling forward,
        # which looks at in_proj_weight instead, so a wrapper that insists may set True and give up that protection
        self._qkv_same_embed_dim = False

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
        options = need_weights, average_attn_weights, is_causal
        if not (query.is_nested or key.is_nested or value.is_nested):
            return self._attend(query, key, value, key_padding_mask, attn_mask, *options)
        self._check_nested(query, key, value, key_padding_mask, attn_mask)
        lengths = query._nested_tensor_size()[:, :1].to(query.device)  # [B, 1]
        dense = query.to_padded_tensor(0.0)  # [B, L, embed_dim]
        padded = torch.arange(dense.shape[1], device=dense.device) >= lengths  # [B, L]
        output, weights = self._attend(dense, dense, dense, padded, None, *options)
        return torch._nested_tensor_from_mask(output, ~padded, mask_check=False), weights

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

        mechanism = self.mechanism
        exact = mechanism.takes_attn_mask
        if not (mechanism.takes_keys or same_query):
            remedy = "pass the same tensor, or take share_qk=False"
            _check.fail("MultiheadAttention", f"{mechanism!r} has no keys but its queries; {remedy}")
        if need_weights and not exact and L * S > WEIGHTS_LIMIT:
            limit = f"{mechanism!r} forms them up to L * S = {WEIGHTS_LIMIT}; pass need_weights=False"
            _check.fail("MultiheadAttention", f"need_weights=True would form {L} x {S} weights, and {limit}")
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

    def _project(self, query, key, value, same_query: bool, same_value: bool) -> tuple[Tensor, Tensor, Tensor]:
        E, weight, bias = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        if weight is not None and same_query and same_value:
            return F.linear(query, weight, bias).chunk(3, -1)
        b_q, b_k, b_v = (None, None, None) if bias is None else bias.split(E)
        if weight is None:
            w_q, w_k, w_v = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        elif same_value:
            k, v = F.linear(key, weight[E:], None if bias is None else bias[E:]).chunk(2, -1)
            return F.linear(query, weight[:E], b_q), k, v
        else:
            w_q, w_k, w_v = weight.split(E)
        return F.linear(query, w_q, b_q), F.linear(key, w_k, b_k), F.linear(value, w_v, b_v)

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
        if k[1] != B:
            came = f"got {B} and {k[1]} with batch_first={self.batch_first}"
            _check.fail("MultiheadAttention", f"query and key must share the batch size, {came}")

    def _check_nested(self, query, key, value, key_padding_mask, attn_mask) -> None:
        """torch takes nested tensors on its fast path only; here the same calls are padded, in any mode."""
        why = ""
        if not (query is key and key is value):
            why = "query, key, and value are not the same Tensor"
        elif not self.batch_first:
            why = "batch_first was not True"
        elif query.layout != torch.strided or query.dim() != 3:
            why = "only 3-D nested tensors of the strided layout are"
        elif key_padding_mask is not None or attn_mask is not None:
            why = "masks were supplied beside the lengths it has"
        if why:
            raise AssertionError(
                f"MultiheadAttention does not support NestedTensor outside of self-attention without masks: {why}; "
                "pass a padded tensor and key_padding_mask"
            )


def _append(x: Tensor, extra: Tensor, batch_first: bool) -> Tensor:
    """x with one more key for each of the batch. x: `[B, S, E]` or `[S, B, E]`, extra: `[1, 1, E]`."""
    shape = (x.shape[0], 1, -1) if batch_first else (1, x.shape[1], -1)
    return torch.cat([x, extra.to(x.dtype).expand(shape)], 1 if batch_first else 0)
