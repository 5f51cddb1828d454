"""A Reformer that shows the parts together: LSH and local attention, reversible blocks, axial positions, long losses.

Kitaev et al. 2020 (arXiv 2001.04451).
"""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..favor import Favor
from ..nn.affine import Affine
from ..nn.chunked import ChunkedFeedForward, chunked_cross_entropy
from ..nn.draws import Draws
from ..nn.local import Local
from ..nn.lsh import LSH, LSHSelfAttention
from ..nn.mechanisms import Exact, Linear, Mechanism
from ..nn.positions import AxialPositionalEmbedding, Rotary
from ..nn.replay import made_again
from ..nn.reversible import ReversibleBlock, ReversibleSequence
from ..ops import _check, _lsh
from .decoding import Cache, cache_of
from .reformer_config import ReformerConfig

TOKENS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Projection(Affine):
    """To the rows of all heads, turned by their position where `rotary` is given."""

    def __init__(self, config: ReformerConfig, rotary: Rotary | None) -> None:
        super().__init__(config.dim, config.heads * config.head_dim, bias=False)
        self.rotary, self.head_dim = rotary, config.head_dim

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        y = super().forward(x)
        return y if self.rotary is None else self.rotary(y.unflatten(-1, (-1, self.head_dim)), offset, dim=1).flatten(2)


class SelfAttention(nn.Module):
    """Queries, keys and values around any mechanism."""

    def __init__(self, config: ReformerConfig, mechanism: Mechanism, rotary: Rotary | None) -> None:
        super().__init__()
        self.causal, self.dropout, self._mechanism = config.causal, config.attention_dropout, mechanism
        self.query, self.key = Projection(config, rotary), Projection(config, rotary)
        self.value = Projection(config, None)
        self.out_proj = Affine(self.value.out_features, config.dim, bias=False)
        own = mechanism.submodules(config.heads)
        self._own = tuple(own)
        for name, module in own.items():
            self.add_module(name, module)
            if isinstance(module, Draws):
                self.register_forward_pre_hook(module.observe)

    @property
    def mechanism(self) -> Mechanism:
        """The description, with the submodules this attention has now."""
        own = {name: getattr(self, name) for name in self._own}
        return dataclasses.replace(self._mechanism, **own) if own else self._mechanism

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        rows = (_heads(project(x), self.value.head_dim) for project in (self.query, self.key, self.value))
        masks = {"is_causal": self.causal, "key_padding_mask": key_padding_mask}
        output = self.mechanism.attend(*rows, dropout_p=self.dropout if self.training else 0.0, **masks)
        return self.out_proj(output.transpose(1, 2).flatten(2))


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)                                     # [B, H, L, D]


def _attention(config: ReformerConfig, layer: int, rotary: Rotary | None) -> LSHSelfAttention | SelfAttention:
    mechanism = config.mechanisms[layer % len(config.mechanisms)]
    if mechanism == "lsh":
        names = ("n_hashes", "chunk_size", "n_buckets", "head_dim", "causal")
        options = {name: getattr(config, name) for name in names} | {"dropout": config.attention_dropout}
        options |= {"seed": config.seed + layer, "out_bias": False} | dict(config.lsh)
        attention = LSHSelfAttention(config.dim, config.heads, **options)
        attention.query_key = Projection(config, rotary)
        return attention
    if mechanism == "favor":
        mechanism = Linear(Favor(config.head_dim, seed=config.seed + layer))
    elif isinstance(mechanism, str):
        mechanism = {"exact": Exact(), "linear": Linear(), "local": Local(config.window)}[mechanism]
    elif isinstance(mechanism, LSH) and mechanism.n_buckets is None:
        n_buckets = _lsh.default_buckets(config.max_length, mechanism.chunk_size)
        mechanism = dataclasses.replace(mechanism, n_buckets=n_buckets)
    return SelfAttention(config, mechanism, rotary)


class AttentionLayer(nn.Module):
    """f of a block: norm, attention, dropout."""

    def __init__(self, config: ReformerConfig, layer: int, rotary: Rotary | None) -> None:
        super().__init__()
        self.layer, self.norm = layer, nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.attention, self.dropout = _attention(config, layer, rotary), nn.Dropout(config.dropout)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None, caches: list[Cache] | None = None) -> Tensor:
        y = self.norm(x)
        if caches is not None:
            return self._decode(y, caches[self.layer])
        # attention is where a step needs most memory
        with made_again(y, functools.partial(self.norm, x)):
            return self.dropout(self.attention(y, key_padding_mask))

    def _decode(self, y: Tensor, cache: Cache) -> Tensor:
        a = self.attention
        shared = isinstance(a, LSHSelfAttention)
        q = (a.query_key if shared else a.query)(y, cache.length)
        k = None if shared else _heads(a.key(y, cache.length), a.value.head_dim)
        head_dim = a.head_dim if shared else a.value.head_dim
        output = cache(_heads(q, head_dim), k, _heads(a.value(y), head_dim))
        return a.out_proj(output.transpose(1, 2).flatten(2))

    def cache(self) -> Cache:
        return cache_of(self.attention if isinstance(self.attention, LSHSelfAttention) else self.attention.mechanism)


def _block(config: ReformerConfig, layer: int, rotary: Rotary | None) -> ReversibleBlock:
    c = config
    feed_forward = ChunkedFeedForward(
        c.dim, c.hidden, chunk_size=c.feed_forward_chunk, activation=c.activation, dropout=c.dropout
    )
    feed_forward = nn.Sequential(nn.LayerNorm(c.dim, eps=c.norm_eps), feed_forward, nn.Dropout(c.dropout))
    return ReversibleBlock(AttentionLayer(c, layer, rotary), feed_forward, exact=c.exact, grid=c.grid)


class DecodeCache:
    """What a `Reformer` keeps of the tokens it has seen: a cache for each layer."""

    def __init__(self, layers: list[Cache]) -> None:
        self.layers = layers

    @property
    def length(self) -> int:
        return self.layers[0].length

    def reorder(self, index: Tensor) -> None:
        """Sequence b goes on as what sequence index[b] was, for beam search. index: int64, any number of rows."""
        for layer in self.layers:
            layer.reorder(index)


class Reformer(nn.Module):
    """A Transformer of reversible blocks whose attention is chosen layer by layer.

    Blocks are y1 = x1 + attention(norm(x2)), y2 = x2 + feed_forward(norm(y1)); embedding, positions, blocks, norm,
    head. Raises ValueError or TypeError in a sentence.
    """

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.config = config
        config = config.filled()
        width = config.dim * (2 if config.merge == "cat" else 1)
        self.embedding = nn.Embedding(config.vocab, config.dim)
        nn.init.normal_(self.embedding.weight, std=config.dim**-0.5)
        self.positions = None
        if config.positions == "axial":
            self.positions = AxialPositionalEmbedding(config.axial_shape, config.axial_dims or config.dim)
        elif config.positions == "learned":
            self.positions = AxialPositionalEmbedding((config.max_length,), config.dim)
        rotary = Rotary(config.head_dim) if config.positions == "rotary" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = ReversibleSequence(
            [_block(config, layer, rotary) for layer in range(config.depth)],
            merge=config.merge,
            reversible=config.reversible,
        )
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.head = None if config.tied else nn.Linear(width, config.vocab)

    @property
    def head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def head_bias(self) -> Tensor | None:
        return None if self.head is None else self.head.bias

    def _features(self, tokens: Tensor, offset: int = 0, **options) -> Tensor:
        _check_tokens("Reformer", tokens, self.config.vocab)
        x = self.embedding(tokens.long())
        if self.positions is not None:
            x = x + self.positions(tokens.shape[1], offset)
        return self.norm(self.blocks(self.dropout(x), **options))

    def features(self, tokens: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """tokens: whole numbers `[B, L]`; key_padding_mask: bool, True = padded. -> what the head reads, `[B, L, dim]`
        (2 dim with merge="cat")."""
        return self._features(tokens, key_padding_mask=key_padding_mask)

    def forward(self, tokens: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """tokens `[B, L]` -> logits `[B, L, vocab]`."""
        return F.linear(self.features(tokens, key_padding_mask), self.head_weight, self.head_bias)

    def loss(self, tokens: Tensor, targets: Tensor | None = None, key_padding_mask: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats. tokens `[B, L + 1]`: of each after the first, from those before it; with targets
        `[B, L]` (-100 = none), which an encoder needs: of them, from tokens `[B, L]`. Logits exist for `loss_chunk`
        tokens at a time.

        key_padding_mask: bool, True = padded, of the shape of tokens. What is padded is no target, nor is what would be
        guessed from a padded token; neither is counted in the mean (NaN where nothing is left).
        """
        if targets is None and not self.config.causal:
            _check.fail("Reformer.loss", "an encoder sees the token it would have to guess; pass targets")
        _check_tokens("Reformer.loss", tokens, self.config.vocab)
        mask = key_padding_mask
        _check.padding_mask("Reformer.loss", mask, tokens[:, None])
        uncounted = mask
        if targets is None:
            tokens, targets = tokens[:, :-1], tokens[:, 1:]
            if mask is not None:
                mask, uncounted = mask[:, :-1], mask[:, :-1] | mask[:, 1:]
        targets = targets if targets.is_floating_point() else targets.long()
        if uncounted is not None and targets.shape == uncounted.shape:
            targets = targets.masked_fill(uncounted, -100)
        options = {"bias": self.head_bias, "chunk_size": self.config.loss_chunk}
        return chunked_cross_entropy(self.features(tokens, mask), self.head_weight, targets, **options)

    # generation

    def cache(self) -> DecodeCache:
        """An empty one, for `step`."""
        if not self.config.causal:
            _check.fail("Reformer.generate", "an encoder cannot write: its tokens see those behind them")
        return DecodeCache([block.f.cache() for block in self.blocks.blocks])

    @torch.no_grad()
    def step(self, tokens: Tensor, cache: DecodeCache) -> Tensor:
        """The next tokens `[B, L]` -> logits of the one after them, `[B, vocab]`. In evaluation mode."""
        x = self._features(tokens, cache.length, caches=cache.layers)
        return F.linear(x[:, -1], self.head_weight, self.head_bias)

    @torch.no_grad()
    def generate(
        self, prompt: Tensor, n: int, *, temperature: float = 1.0, top_k: int | None = None, seed: int = 0
    ) -> Tensor:
        """prompt `[B, P]` of at least one token -> `[B, P + n]`, prompt and n more tokens, in the dtype of the prompt,
        or int64 where that has no number for every token.

        temperature: 0 takes the likeliest token. top_k: only of so many likeliest, equal ones in the order of their
        numbers. seed: of the draws, which torch's generator knows nothing of. Evaluation mode while it runs. Time and
        memory of each token: `longattn.models.decoding`.
        """
        op = "Reformer.generate"
        _check_tokens(op, prompt, self.config.vocab)
        if prompt.shape[1] == 0:
            _check.fail(op, f"prompt must be [B, P] of at least one token, got {list(prompt.shape)}")
        if type(n) is not int or n < 0:
            _check.fail(op, f"n must be a whole number from 0 on, got {n!r}")
        if not (isinstance(temperature, (int, float)) and 0 <= temperature < torch.inf):
            _check.fail(op, f"temperature must be a number from 0 on, got {temperature!r}")
        if top_k is not None and (type(top_k) is not int or top_k < 1):
            _check.fail(op, f"top_k must be a positive whole number or None, got {top_k!r}")
        if self.positions is not None and prompt.shape[1] + n > self.positions.max_length:
            longest = f"the {self.positions.max_length} positions of this model"
            _check.fail(op, f"{prompt.shape[1]} tokens and {n} more are beyond {longest}")
        # of float32, so that it stays below 1 when multiplied
        draws = torch.rand(n, len(prompt), generator=torch.Generator().manual_seed(seed)).to(prompt.device)
        cache, training = self.cache(), self.training
        dtype = prompt.dtype if torch.iinfo(prompt.dtype).max >= self.config.vocab - 1 else torch.int64
        tokens = [prompt.to(dtype)]
        self.eval()
        try:
            for draw in draws:
                tokens.append(_choose(self.step(tokens[-1], cache), draw, temperature, top_k).to(dtype))
        finally:
            self.train(training)
        return torch.cat(tokens, 1)

    # files

    def save(self, path: str | os.PathLike) -> None:
        """Into the folder `path`: config.json and model.safetensors, each whole or not at all."""
        safetensors, folder = _safetensors("save"), Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        partial = [folder / "model.safetensors.partial", folder / "config.json.partial"]
        dtype = str(self.embedding.weight.dtype).removeprefix("torch.")
        safetensors.torch.save_model(self, str(partial[0]), metadata={"dtype": dtype})
        partial[1].write_text(self.config.to_json())
        for file in partial:
            os.replace(file, file.with_suffix(""))

    @classmethod
    def load(cls, path: str | os.PathLike, device=None) -> Reformer:
        """What `save` wrote, in its dtype."""
        safetensors, folder = _safetensors("load"), Path(path)
        unreadable = safetensors.SafetensorError
        try:
            with safetensors.safe_open(str(folder / "model.safetensors"), "pt") as file:
                dtype = getattr(torch, file.metadata()["dtype"])
            # weights that are drawn to be replaced take nothing from torch's generator
            with torch.random.fork_rng(devices=[]):
                model = cls(ReformerConfig.from_json((folder / "config.json").read_text())).to(device, dtype)
            safetensors.torch.load_model(model, str(folder / "model.safetensors"))
        except (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, unreadable) as error:
            raise ValueError(f"Reformer.load: {folder} holds no Reformer that can be read: {error}") from error
        return model

    @classmethod
    def from_huggingface(cls, source: nn.Module) -> Reformer:
        """`transformers`' ReformerModelWithLMHead with its weights; how its attentions differ from ours is said by
        `longattn.nn.LSHSelfAttention.from_huggingface`. In evaluation the logits are the same on the same buckets."""
        from ._huggingface import convert

        return convert(cls, ReformerConfig, source)


def _check_tokens(op: str, tokens: Tensor, vocab: int) -> None:
    if not isinstance(tokens, Tensor) or tokens.dtype not in TOKENS:
        _check.fail(op, f"tokens must be whole numbers [B, L], got {_check.describe(tokens)}", TypeError)
    if tokens.dim() != 2:
        _check.fail(op, f"tokens must be [B, L], got {list(tokens.shape)}")
    # to look at them on a GPU would wait for it; there the lookup asserts it
    if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
        least, most = (int(x) for x in tokens.aminmax())
        if least < 0 or most >= vocab:
            _check.fail(op, f"tokens must be from 0 to {vocab - 1}, got {least} to {most}")


def _choose(logits: Tensor, draw: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """logits `[B, vocab]`, draw `[B]` uniform in [0, 1) -> `[B, 1]`"""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.double()
    # before the division, which no temperature then overflows
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))
    sums = logits.softmax(-1).cumsum(-1)
    return torch.searchsorted(sums, draw.double()[:, None] * sums[:, -1:], right=True)


def _safetensors(verb: str):
    try:
        import safetensors.torch
    except ImportError as error:
        sentence = f"Reformer.{verb} needs the package safetensors: pip install safetensors"
        raise ModuleNotFoundError(sentence) from error
    return safetensors
