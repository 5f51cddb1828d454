"""What is measured against torch's exact attention: this package's mechanisms, and those of other packages."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from ..favor import Favor
from ..ops import _lsh
from ..ops.linear import linear_attention
from ..ops.lsh import lsh_attention
from ..ops.softmax import softmax_attention

EXACT = "exact"
FEATURES, WINDOW = 256, 128
# rounds and keys of a chunk of LSH attention, ours and others'
ROUNDS, CHUNK = 4, 64

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Shape(NamedTuple):
    """Of one attention call, beside its length."""

    heads: int = 8
    head_dim: int = 64
    batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    causal: bool = True


class Attention(NamedTuple):
    """make(shape, length) -> attend(q, k, v) on `[B, H, L, D]`.

    power: of the length, by which its time grows. estimates: it is meant to give what exact attention gives. looks: for
    the keys that matter, so that there is a recall. package: what it needs, by the name one installs.
    """

    make: Callable[[Shape, int], Attend]
    what: str
    power: int = 1
    estimates: bool = False
    looks: bool = False
    package: str | None = None


# of this package


@functools.cache
def _map(head_dim: int, causal: bool, device: str) -> Favor:
    # only an order has a diagonal
    return Favor(head_dim, FEATURES, exact_diagonal=causal, device=device)


def _favor(shape: Shape, length: int) -> Attend:
    options = {"feature_map": _map(shape.head_dim, shape.causal, shape.device), "is_causal": shape.causal}
    return functools.partial(linear_attention, **options)


def _lsh_shared(shape: Shape, length: int) -> Attend:
    # the Reformer's: queries are keys too, so k is left unread
    return lambda q, k, v: lsh_attention(q, None, v, is_causal=shape.causal, n_hashes=ROUNDS, chunk_size=CHUNK)


def _with(function, **options) -> Callable[[Shape, int], Attend]:
    return lambda shape, length: functools.partial(function, is_causal=shape.causal, **options)


# of others


class Given(nn.Module):
    """In place of a projection: the rows themselves, `[B, n, H D]`."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.rows


def hugging_face_layer(
    *, heads: int, head_dim: int, n_hashes: int, chunk: int, factors: list[int], is_causal: bool
) -> nn.Module:
    """transformers' LSHSelfAttention, whose projections `query_key` and `value` return the rows they are given."""
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = ReformerConfig(
        hidden_size=heads * head_dim, num_attention_heads=heads, attention_head_size=head_dim, attn_layers=["lsh"],
        lsh_attn_chunk_length=chunk, lsh_num_chunks_before=1, lsh_num_chunks_after=int(not is_causal),
        lsh_attention_probs_dropout_prob=0.0, is_decoder=is_causal, hash_seed=0,
        num_hashes=n_hashes, num_buckets=factors if len(factors) > 1 else factors[0],
    )  # fmt: skip
    layer = LSHSelfAttention(config)
    layer.query_key, layer.value = Given(), Given()
    return layer


def _hugging_face(shape: Shape, length: int) -> Attend:
    factors = _lsh.factorise(_lsh.default_buckets(length, CHUNK))
    heads = {"heads": shape.heads, "head_dim": shape.head_dim}
    options = {"n_hashes": ROUNDS, "chunk": CHUNK, "factors": factors, "is_causal": shape.causal}
    layer = hugging_face_layer(**heads, **options).to(shape.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer.query_key.rows, layer.value.rows = (x.transpose(1, 2).flatten(2) for x in (q, v))
        return layer(layer.value.rows[..., :0]).hidden_states.unflatten(2, (shape.heads, -1)).transpose(1, 2)

    return attend


def _reformer_pytorch(shape: Shape, length: int) -> Attend:
    from reformer_pytorch.reformer_pytorch import LSHAttention

    layer = LSHAttention(bucket_size=CHUNK, n_hashes=ROUNDS, causal=shape.causal).eval()
    return lambda q, k, v: layer(q.flatten(0, 1), v.flatten(0, 1))[0].unflatten(0, q.shape[:2])


def _performer_pytorch(shape: Shape, length: int) -> Attend:
    from performer_pytorch import FastAttention

    # it prints that it has found no CUDA code
    with contextlib.redirect_stdout(None):
        return FastAttention(shape.head_dim, FEATURES, causal=shape.causal).to(shape.device)


# the first is what the others are held against; a new one is one line
ATTENTIONS = {
    EXACT: Attention(_with(softmax_attention, impl="torch"), "torch's scaled_dot_product_attention", 2),
    "softmax": Attention(_with(softmax_attention), "exact, on this package's tiles", 2),
    "linear": Attention(_with(linear_attention), "elu(x) + 1"),
    "favor": Attention(_favor, f"{FEATURES} random features (causal: exact diagonal)", estimates=True),
    "lsh": Attention(_lsh_shared, f"{ROUNDS} rounds, shared queries and keys", looks=True),
    "lsh-keys": Attention(
        _with(lsh_attention, n_hashes=ROUNDS, chunk_size=CHUNK), f"{ROUNDS} rounds, keys of their own"
    ),
    "local": Attention(_with(softmax_attention, window=WINDOW), f"a window of {WINDOW}"),
    "hf-lsh": Attention(_hugging_face, "Hugging Face's Reformer", package="transformers"),
    "reformer-pytorch": Attention(_reformer_pytorch, "lucidrains' LSH", package="reformer-pytorch"),
    "performer-pytorch": Attention(_performer_pytorch, "lucidrains' FAVOR+", package="performer-pytorch"),
}


def missing(name: str) -> str | None:
    """Why it cannot take part, or None."""
    package = ATTENTIONS[name].package
    if package is None or importlib.util.find_spec(package.replace("-", "_")) is not None:
        return None
    return f"{name} needs {package}; pip install {package}"
