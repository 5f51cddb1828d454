"""The weights of `transformers`' Reformer in ours."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..nn.local import Local
from ..ops import _check


def config_of(made: type, hf):
    """A ReformerConfig from theirs."""
    dims = tuple(hf.axial_pos_embds_dim) if hf.axial_pos_embds else None
    shape = tuple(hf.axial_pos_shape) if hf.axial_pos_embds else None
    longest = hf.max_position_embeddings
    local = Local(hf.local_attn_chunk_length, chunks=(hf.local_num_chunks_before, hf.local_num_chunks_after))
    return made(
        vocab=hf.vocab_size,
        dim=hf.hidden_size,
        depth=len(hf.attn_layers),
        heads=hf.num_attention_heads,
        head_dim=hf.attention_head_size,
        hidden=hf.feed_forward_size,
        mechanisms=tuple("lsh" if kind == "lsh" else local for kind in hf.attn_layers),
        causal=hf.is_decoder,
        # its grid is what it can take, whatever it promises
        max_length=longest if shape is None else min(longest, math.prod(shape)),
        positions="axial" if hf.axial_pos_embds else "learned",
        axial_shape=shape,
        axial_dims=dims,
        chunk_size=hf.lsh_attn_chunk_length,
        n_hashes=hf.num_hashes,
        n_buckets=hf.num_buckets,
        lsh={
            "look_back": hf.lsh_num_chunks_before, "look_ahead": hf.lsh_num_chunks_after, "scale": 1.0,
            "dedupe": False, "wrap": True, "norm_eps": 1e-6 * hf.attention_head_size, "seed": hf.hash_seed or 0,
            "dropout": hf.lsh_attention_probs_dropout_prob,
        },
        merge="cat",
        tied=False,
        activation=hf.hidden_act,
        feed_forward_chunk=hf.chunk_size_feed_forward or None,
        dropout=hf.hidden_dropout_prob,
        attention_dropout=hf.local_attention_probs_dropout_prob,
        norm_eps=hf.layer_norm_eps,
    )  # fmt: skip


def convert(cls: type, made: type, source: nn.Module):
    if not hasattr(source, "reformer") or not hasattr(source, "lm_head"):
        expected = "ReformerModelWithLMHead of transformers"
        _check.fail("Reformer.from_huggingface", f"source must be a {expected}, got {type(source).__name__}", TypeError)
    state = source.state_dict()
    weight = state["reformer.embeddings.word_embeddings.weight"]
    model = cls(config_of(made, source.config)).to(weight.device, weight.dtype)
    names = {"embedding.weight": "reformer.embeddings.word_embeddings.weight"}
    theirs = "reformer.embeddings.position_embeddings."
    if source.config.axial_pos_embds:
        names |= {f"positions.weights.{i}": f"{theirs}weights.{i}" for i in range(len(source.config.axial_pos_shape))}
    else:
        names["positions.weights.0"] = f"{theirs}embedding.weight"
    for i, kind in enumerate(source.config.attn_layers):
        f, g, layer = f"blocks.blocks.{i}.f", f"blocks.blocks.{i}.g", f"reformer.encoder.layers.{i}"
        parts = ("query_key", "value") if kind == "lsh" else ("query", "key", "value")
        names |= {f"{f}.attention.{x}.weight": f"{layer}.attention.self_attention.{x}.weight" for x in parts}
        names[f"{f}.attention.out_proj.weight"] = f"{layer}.attention.output.dense.weight"
        for x in ("weight", "bias"):
            names[f"{f}.norm.{x}"] = f"{layer}.attention.layer_norm.{x}"
            names[f"{g}.0.{x}"] = f"{layer}.feed_forward.layer_norm.{x}"
            names[f"{g}.1.up.{x}"] = f"{layer}.feed_forward.dense.dense.{x}"
            names[f"{g}.1.down.{x}"] = f"{layer}.feed_forward.output.dense.{x}"
    for x in ("weight", "bias"):
        names[f"norm.{x}"] = f"reformer.encoder.layer_norm.{x}"
    names["head.weight"] = "lm_head.decoder.weight"
    own = model.state_dict()
    with torch.no_grad():
        for ours, name in names.items():
            own[ours].copy_(state[name].reshape(own[ours].shape))
        # some versions have it in the layer, some beside it, where it is not used
        bias = state.get("lm_head.decoder.bias")
        own["head.bias"].copy_(torch.zeros_like(own["head.bias"]) if bias is None else bias)
    return model
