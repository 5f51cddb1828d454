"""LSH attention in modules: the mechanism of MultiheadAttention, and Reformer's self-attention with its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..ops import _check, _lsh_check
from ..ops._dispatch import IMPLS, without_autocast
from ..ops._prefix import accumulator
from ..ops._tiles import draw_seed
from ..ops.lsh import hash_of, prepare, run
from ..reference import lsh as reference
from .affine import Affine
from .draws import Draws
from .mechanisms import Mechanism

RESAMPLE = ("step", "never")
# a bucket for each chunk, as reformer-pytorch has it; None is two
PER_CHUNK = "per chunk"


def _check_fields(op: str, x) -> None:
    n_buckets = x.n_buckets
    if isinstance(n_buckets, tuple):
        even = all(type(n) is int and n >= 2 and n % 2 == 0 for n in n_buckets)
        if not n_buckets or not even:
            _check.fail(op, f"n_buckets must be even numbers when it is their product, got {n_buckets!r}")
        n_buckets = math.prod(n_buckets)
    elif n_buckets == PER_CHUNK:
        n_buckets = None
    counts = (x.n_hashes, x.chunk_size, n_buckets, x.look_back, x.look_ahead)
    _lsh_check.options(op, *counts, x.within, x.scale, 0.0, x.seed)
    if x.resample not in RESAMPLE:
        _check.fail(op, f"resample must be one of {', '.join(map(repr, RESAMPLE))}, got {x.resample!r}")
    if x.impl not in ("auto", *IMPLS):
        _check.fail(op, f"impl must be 'auto' or one of {', '.join(map(repr, IMPLS))}, got {x.impl!r}")


def _options(x, draws: Draws | None, v: Tensor, dropout_p: float) -> dict:
    """Keyword arguments of ops.lsh.prepare for one call of a description or a module."""
    names = ("n_hashes", "chunk_size", "look_back", "look_ahead", "within", "dedupe", "scale", "impl")
    options = {name: getattr(x, name) for name in names} | {"dropout_p": dropout_p, "hash_seed": x.seed}
    if isinstance(x.n_buckets, tuple):
        options["factors"] = list(x.n_buckets)
    elif x.n_buckets == PER_CHUNK:
        options["n_buckets"] = max(2 * math.ceil(v.shape[2] / (2 * x.chunk_size)), 2)
    else:
        options["n_buckets"] = x.n_buckets
    if x.resample == "step" and draws is not None and draws.training:
        options["step"] = draws.count
    if dropout_p > 0:
        options["seed"] = draw_seed()
    return options


@dataclass(frozen=True, repr=False)
class LSH(Mechanism, name="lsh"):
    """LSH attention, `longattn.lsh_attention`: softmax over the keys whose hash is near, linear in the length.

    n_hashes, chunk_size, n_buckets, look_back, look_ahead, within, dedupe, scale, impl: as in `longattn.lsh_attention`.
    share_qk: the query projection serves for keys too (self-attention only: the key projection is left unused, and
        the module refuses a key that is not its query).
    seed: of the rotations. Attentions with one seed and one number of heads draw the same.
    resample: "step" draws new rotations for every training step (`longattn.nn.draws.Draws`, whose count is saved with
        the module), "never" keeps those of evaluation.

    Causality needs L == S. Dropout acts on the weights. Weights asked for with need_weights are formed on the side,
    without dropout, in O(L S) memory. Raises ValueError or TypeError in a sentence.

    Kitaev et al. 2020 (arXiv 2001.04451).
    """

    n_hashes: int = 4
    chunk_size: int = 64
    n_buckets: int | None = None
    look_back: int = 1
    look_ahead: int | None = None
    within: str = "window"
    dedupe: bool = True
    scale: float | None = None
    share_qk: bool = False
    seed: int = 0
    resample: str = "step"
    impl: str = "auto"
    # made for each attention that takes this description
    draws: Draws | None = field(default=None, compare=False)

    def __post_init__(self):
        _check_fields("LSH", self)

    def submodules(self, num_heads: int) -> dict[str, nn.Module]:
        return {"draws": Draws()} if self.resample == "step" else {}

    @property
    def takes_keys(self) -> bool:
        return not self.share_qk

    def work(self, is_causal):
        ahead = int(not is_causal) if self.look_ahead is None else self.look_ahead
        return "lsh", float(self.n_hashes * self.chunk_size * (1 + self.look_back + ahead))

    def attend(self, q, k, v, *, is_causal, key_padding_mask, dropout_p, attn_mask=None) -> Tensor:
        return run(self._call(q, k, v, is_causal, key_padding_mask, dropout_p))

    def weights(self, q, k, *, is_causal, key_padding_mask) -> Tensor:
        call = self._call(q, k, k, is_causal, key_padding_mask, 0.0)
        acc, S = accumulator(call.q.dtype), call.v.shape[2]
        count = reference.pair_counts(*hash_of(call), call.mask, None, **call.rounds.counted())
        # what is summed with the rows of the identity are the weights
        rows = torch.eye(S, dtype=acc, device=q.device).expand(*call.v.shape[:2], S, S)
        q, k = (None if x is None else x.to(acc) for x in (call.q, call.k))
        with without_autocast(call.q.device.type):
            output, _ = reference.attend(q, k, rows, call.mask, count, scale=call.scale, dropout_p=0.0, seed=0)
        return output.to(call.q.dtype)

    def _call(self, q, k, v, is_causal, key_padding_mask, dropout_p):
        if self.share_qk and q.shape[2] != v.shape[2]:
            remedy = "share_qk=True is for self-attention, other attentions have keys of their own"
            _check.fail("LSH", f"got {q.shape[2]} queries and {v.shape[2]} keys; {remedy}")
        options = _options(self, self.draws, v, dropout_p)
        masks = {"is_causal": is_causal, "key_padding_mask": key_padding_mask}
        return prepare("LSH", q, None if self.share_qk else k, v, **masks, **options)


class LSHSelfAttention(nn.Module):
    """Reformer's self-attention: shared queries and keys, one projection for both.

    embed_dim, num_heads, head_dim (default embed_dim // num_heads): of the projections.
    causal: query i sees keys 0..i.
    dropout: of the weights, in training.
    bias: of query_key and value; out_bias: of out_proj.
    n_buckets: as in `longattn.lsh_attention`, or a sequence of even factors.
    wrap, norm_eps: see `from_huggingface`; wrap takes dedupe=False and within="window".
    Others as in `longattn.LSH`. Raises ValueError or TypeError in a sentence.

    Kitaev et al. 2020 (arXiv 2001.04451).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = False,
        out_bias: bool = True,
        n_hashes: int = 4,
        chunk_size: int = 64,
        n_buckets: int | Sequence[int] | None = None,
        look_back: int = 1,
        look_ahead: int | None = None,
        within: str = "window",
        dedupe: bool = True,
        scale: float | None = None,
        wrap: bool = False,
        norm_eps: float = 0.0,
        seed: int = 0,
        resample: str = "step",
        impl: str = "auto",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        name = "LSHSelfAttention"
        for what, size in (("embed_dim", embed_dim), ("num_heads", num_heads), ("head_dim", head_dim)):
            if size is not None and (type(size) is not int or size < 1):
                _check.fail(name, f"{what} must be a positive integer, got {size!r}")
        if head_dim is None and embed_dim % num_heads:
            _check.fail(name, f"embed_dim {embed_dim} is no multiple of num_heads {num_heads}")
        if not (isinstance(dropout, (int, float)) and 0 <= dropout <= 1):
            _check.fail(name, f"dropout must be a probability from 0 to 1, got {dropout!r}")
        if not (isinstance(norm_eps, (int, float)) and 0 <= norm_eps < math.inf):
            _check.fail(name, f"norm_eps must be a number from 0 on, got {norm_eps!r}")
        if wrap and (dedupe or within != "window"):
            why = "wrap looks over the edges of rounds"
            _check.fail(name, f"{why}, so it takes dedupe=False and within='window'")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, head_dim or embed_dim // num_heads
        self.causal, self.dropout, self.n_hashes, self.chunk_size = bool(causal), dropout, n_hashes, chunk_size
        self.n_buckets = tuple(n_buckets) if isinstance(n_buckets, (list, tuple)) else n_buckets
        self.look_back, self.look_ahead, self.within, self.dedupe = look_back, look_ahead, within, dedupe
        self.scale, self.wrap, self.norm_eps, self.seed = scale, wrap, norm_eps, seed
        self.resample, self.impl = resample, impl
        _check_fields("LSHSelfAttention", self)
        made, inner = {"device": device, "dtype": dtype}, num_heads * self.head_dim
        self.query_key = Affine(embed_dim, inner, bias=bias, **made)
        self.value = Affine(embed_dim, inner, bias=bias, **made)
        self.out_proj: nn.Module = Affine(inner, embed_dim, bias=out_bias, **made)
        self.draws = Draws(device)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None, *, buckets: Tensor | None = None) -> Tensor:
        """x: `[B, L, embed_dim]`; key_padding_mask: bool `[B, L]`, True = padded (attention 0 there); buckets: int
        `[B, num_heads, n_hashes, L]` in place of hashing. Returns `[B, L, embed_dim]`."""
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[2] != self.embed_dim:
            came = _check.describe(x)
            _check.fail("LSHSelfAttention", f"x must be [batch, length, embed_dim {self.embed_dim}], got {came}")
        _check.padding_mask("LSHSelfAttention", key_padding_mask, x[:, None])
        if self.resample == "step":
            self.draws.observe(self)
        if key_padding_mask is not None:
            # NaN in a padded row must not reach the gradients of the projections, as 0 * NaN
            x = x.masked_fill(key_padding_mask[..., None], 0)
        q, v = (
            project(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for project in (self.query_key, self.value)
        )  # [B, H, L, head_dim]
        options = _options(self, self.draws, v, self.dropout if self.training else 0.0)
        # where one chunk is all there is, its neighbours in other rounds would be itself again
        options |= {"wrap": self.wrap and q.shape[2] > self.chunk_size, "norm_eps": self.norm_eps}
        if buckets is not None:
            options["buckets"] = buckets
        masks = {"is_causal": self.causal, "key_padding_mask": key_padding_mask}
        output = run(prepare("LSHSelfAttention", q, None, v, **masks, **options))
        return self.out_proj(output.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, n_hashes={self.n_hashes}, chunk_size={self.chunk_size}" + (
            ", causal=True" if self.causal else ""
        )

    @classmethod
    def from_huggingface(cls, source: nn.Module | Mapping[str, Tensor], config, **options) -> LSHSelfAttention:
        """The LSH attention of `transformers`' Reformer, with its weights.

        source: its LSHSelfAttention (out_proj then is the identity), its ReformerAttention (with the output projection,
            without the layer norm before it all), or the state_dict of either. config: its ReformerConfig.
        options: arguments of this class that replace the config's.

        On the same buckets the attention is the same: scale 1 on keys divided by sqrt(|x|^2 + 1e-6 D), one look over
        the edges of rounds (wrap), pairs counted in every round. It differs where that code does: padded queries
        give 0, any length will do, the number of buckets follows the length where the config has none, and no
        generator is reseeded.
        """
        state = dict(source.state_dict() if isinstance(source, nn.Module) else source)
        state = {name.removeprefix("self_attention."): x for name, x in state.items()}
        heads, head_dim = config.num_attention_heads, config.attention_head_size
        weight = state["query_key.weight"]
        made = {
            "head_dim": head_dim, "causal": config.is_decoder, "dropout": config.lsh_attention_probs_dropout_prob,
            "n_hashes": config.num_hashes, "chunk_size": config.lsh_attn_chunk_length, "n_buckets": config.num_buckets,
            "look_back": config.lsh_num_chunks_before, "look_ahead": config.lsh_num_chunks_after, "scale": 1.0,
            "dedupe": False, "wrap": True, "norm_eps": 1e-6 * head_dim, "seed": config.hash_seed or 0,
            "out_bias": False, "device": weight.device, "dtype": weight.dtype,
        }  # fmt: skip
        module = cls(config.hidden_size, heads, **made | options)
        names = {"query_key": "query_key.weight", "value": "value.weight", "out_proj": "output.dense.weight"}
        if names["out_proj"] not in state:
            module.out_proj = nn.Identity()
            del names["out_proj"]
        with torch.no_grad():
            for own, name in names.items():
                getattr(module, own).weight.copy_(state[name])
        return module

    @classmethod
    def from_reformer_pytorch(cls, source: nn.Module, **options) -> LSHSelfAttention:
        """The LSHSelfAttention of reformer-pytorch, with its weights; its own conventions: logits divided by sqrt(D)
        on unit keys, a bucket for each chunk, one chunk back whether causal or not.

        source: that module. options: arguments of this class that replace its own.
        Memory keys, local heads, dropout after the projection, and a hash that takes all rounds from one draw are
        refused with a ValueError. Padded rows, which stay in the buckets there, are sorted behind all others here; and
        attend_across_buckets=False keeps to buckets in inputs of one chunk too, where that package attends densely.
        """
        attention = source.lsh_attn
        across, duplicates = attention._attend_across_buckets, attention._allow_duplicate_attention
        refused = {
            "num_mem_kv": source.num_mem_kv > 0,
            "n_local_attn_heads": source.n_local_attn_heads > 0,
            "post_attn_dropout": source.post_attn_dropout.p > 0,
            "rehash_each_round=False": not attention._rehash_each_round,
            "use_full_attn": source.use_full_attn,
            # across buckets it looks over the edges of rounds, where pairs are counted each time
            "allow_duplicate_attention=False with attend_across_buckets=True": across and not duplicates,
        }
        for name, found in refused.items():
            if found:
                _check.fail("LSHSelfAttention.from_reformer_pytorch", f"{name} has no counterpart here")
        weight = source.toqk.weight
        made = {
            "head_dim": source.dim_head, "causal": attention.causal, "dropout": attention.dropout.p,
            "n_hashes": attention.n_hashes, "chunk_size": attention.bucket_size, "n_buckets": PER_CHUNK,
            "look_ahead": 0, "within": "window" if across else "bucket", "dedupe": not duplicates, "wrap": across,
            "scale": source.dim_head**-0.5, "device": weight.device, "dtype": weight.dtype,
        }  # fmt: skip
        module = cls(source.dim, source.heads, **made | options)
        with torch.no_grad():
            module.query_key.weight.copy_(weight)
            module.value.weight.copy_(source.tov.weight.repeat(source.v_head_repeats, 1))
            module.out_proj.load_state_dict(source.to_out.state_dict())
        return module
