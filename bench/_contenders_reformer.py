"""Who takes part beside a training step of `longattn.models.Reformer`: language models of the same sizes over bytes.

A step is forward and backward of the mean cross-entropy of one sequence; gradients are set to None before it. Rotations
and weights are everyone's own, so only sizes are the same: width, depth, heads, feed-forward, chunks, rounds.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from _contenders import Contender, missing_of
from _floors import Stack
from torch import Tensor, nn
from torch.nn import functional as F

from longattn.models import Reformer, ReformerConfig
from longattn.ops import _lsh

VOCAB, WINDOW = 256, 128


class Case(NamedTuple):
    """One measurement. mechanisms: of the layers in turn. autocast: to bfloat16. n counts the tokens that guess."""

    n: int
    B: int = 1
    H: int = 4
    D: int = 64
    hidden: int = 1024
    layers: int = 6
    mechanisms: tuple[str, ...] = ("lsh",)
    n_hashes: int = 4
    chunk: int = 64
    autocast: bool = False
    dtype: str = "float32"
    direction: str = "forward+backward"

    @property
    def dim(self) -> int:
        return self.H * self.D

    @property
    def shape(self) -> Stack:
        # causal: all of the chunk before and half of a query's own
        pairs = {"lsh": 1.5 * self.chunk * self.n_hashes, "local": WINDOW, "exact": (self.n + 1) / 2}
        mean = sum(pairs[name] for name in self.mechanisms) / len(self.mechanisms)
        return Stack(self.n, self.B, self.dim, self.hidden, self.layers, mean, self.dtype)

    @property
    def drawn(self) -> tuple:
        """Cases that are alike in this have the same inputs."""
        return self.n, self.B

    def of_layers(self) -> list[str]:
        return [self.mechanisms[i % len(self.mechanisms)] for i in range(self.layers)]


def make_inputs(case: Case, device: str = "cpu") -> Tensor:
    """Tokens `[B, n + 1]`."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randint(VOCAB, (case.B, case.n + 1), generator=generator, device=device)


def ours(case: Case, **options) -> nn.Module:
    config = ReformerConfig(
        vocab=VOCAB, dim=case.dim, depth=case.layers, heads=case.H, hidden=case.hidden, mechanisms=case.mechanisms,
        max_length=case.n, window=WINDOW, chunk_size=case.chunk, n_hashes=case.n_hashes, feed_forward_chunk=2048,
        loss_chunk=4096, **options,
    )  # fmt: skip
    return Reformer(config)


class _OfLogits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def loss(self, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


class _Exact(nn.Module):
    """torch's TransformerEncoder, causal, norms first."""

    def __init__(self, case: Case):
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCAB, case.dim), nn.Embedding(case.n, case.dim)
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(case.dim, case.H, case.hidden, **options)
        self.layers = nn.TransformerEncoder(layer, case.layers, nn.LayerNorm(case.dim), enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return F.linear(self.layers(x, mask=mask, is_causal=True), self.embedding.weight)


def reformer_pytorch(case: Case) -> nn.Module:
    """reformer-pytorch's ReformerLM: every layer is LSH, the feed-forward is not in chunks (faster so)."""
    from reformer_pytorch import ReformerLM

    sizes = {"num_tokens": VOCAB, "dim": case.dim, "depth": case.layers, "heads": case.H, "max_seq_len": case.n}
    options = {"bucket_size": case.chunk, "n_hashes": case.n_hashes, "ff_mult": case.hidden // case.dim, "ff_chunks": 1}
    return _OfLogits(ReformerLM(**sizes, **options, causal=True))


class _HuggingFace(_OfLogits):
    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits


def hugging_face(case: Case) -> nn.Module:
    """transformers' ReformerModelWithLMHead; its loss shifts by itself, so logits are taken as from the others."""
    from transformers import ReformerConfig as Config
    from transformers import ReformerModelWithLMHead

    side = 2 ** (case.n.bit_length() // 2)
    config = Config(
        attn_layers=case.of_layers(), hidden_size=case.dim, num_attention_heads=case.H, attention_head_size=case.D,
        feed_forward_size=case.hidden, num_hashes=case.n_hashes, vocab_size=VOCAB, is_decoder=True,
        axial_pos_shape=[side, case.n // side], axial_pos_embds_dim=[case.dim // 4, case.dim - case.dim // 4],
        max_position_embeddings=case.n, lsh_attn_chunk_length=case.chunk, local_attn_chunk_length=case.chunk,
        num_buckets=_lsh.factorise(_lsh.default_buckets(case.n, case.chunk)), hash_seed=0,
        hidden_dropout_prob=0.0, lsh_attention_probs_dropout_prob=0.0, local_attention_probs_dropout_prob=0.0,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return _HuggingFace(ReformerModelWithLMHead(config))


MODELS = {
    "longattn": ours,
    "longattn plain": functools.partial(ours, reversible=False),
    "reformer-pytorch": reformer_pytorch,
    "Hugging Face": hugging_face,
    "torch exact": lambda case: _OfLogits(_Exact(case)),
}
MODULES = {
    "reformer-pytorch": "reformer_pytorch",
    "Hugging Face": "transformers.models.reformer.modeling_reformer",
    "torch exact": "torch",
}


def loss_of(model: nn.Module, case: Case, tokens: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.autocast):
        return model.loss(tokens)


def stepper(name: str, case: Case, tokens: Tensor):
    torch.manual_seed(0)
    model = MODELS[name](case).train()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss_of(model, case, tokens).backward()

    return step


CONTENDERS = {
    name: Contender(functools.partial(stepper, name), True, MODULES.get(name, "longattn")) for name in MODELS
}
missing = functools.partial(missing_of, CONTENDERS)


def build(name: str, case: Case, inputs: Tensor | None = None):
    return CONTENDERS[name].build(case, make_inputs(case) if inputs is None else inputs)
