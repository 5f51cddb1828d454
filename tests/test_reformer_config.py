"""What a Reformer is made of, as data: defaults, JSON, and what is refused, there and by the model."""

import dataclasses
import json

import pytest
import torch
from _reformer import config, reformer, text

import longattn
from longattn.models.reformer import Reformer, ReformerConfig
from longattn.nn.local import Local
from longattn.nn.mechanisms import Exact, Linear


def test_a_config_survives_json():
    described = (Local(9, chunks=(2, 0)), "lsh", longattn.LSH(n_hashes=2, share_qk=True), Linear("relu"), Exact())
    lsh = {"wrap": False, "n_buckets": (4, 4), "dedupe": False}
    made = config(mechanisms=described, axial_shape=(6, 8), axial_dims=(8, 16), n_buckets=(4, 4), lsh=lsh)
    assert ReformerConfig.from_json(made.to_json()) == made
    assert hash(ReformerConfig.from_json(made.to_json())) == hash(made)
    assert dict(made.lsh) == lsh
    assert dataclasses.replace(made, lsh=dict(reversed(lsh.items()))) == made
    assert json.loads(made.to_json())["dim"] == 24
    assert ReformerConfig.from_json("{}") == ReformerConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.dim = 3


def test_what_follows_from_other_fields_follows_them():
    made = ReformerConfig(dim=64, heads=4, max_length=1000)
    filled = made.filled()
    assert (filled.head_dim, filled.hidden, filled.axial_shape, filled.n_buckets) == (16, 256, (32, 32), 32)
    filled = dataclasses.replace(made, dim=128, max_length=4096).filled()
    assert (filled.head_dim, filled.hidden, filled.axial_shape, filled.n_buckets) == (32, 512, (64, 64), 128)
    given = dataclasses.replace(made, head_dim=8, hidden=10, axial_shape=(40, 30), n_buckets=(4, 4))
    assert given.filled() == given
    assert Reformer(dataclasses.replace(config(), dim=48, max_length=60))(text(L=60)).shape == (2, 60, 50)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: config(positions="sine"), "positions must be one of 'axial', 'rotary', 'learned', None, got 'sine'"),
        (lambda: config(mechanisms=("flash",)), "a mechanism must be one of 'exact', .*, got 'flash'"),
        (lambda: config(mechanisms=()), "mechanisms must be a list of at least one"),
        (lambda: config(heads=5), "dim 24 is no multiple of heads 5; pass head_dim"),
        (lambda: config(depth=0), "depth must be a positive whole number, got 0"),
        (lambda: config(merge="cat"), "merge='cat' ends in 2 dim features, which a tied embedding cannot read"),
        (lambda: config(hidden=0), "hidden must be a positive whole number or None, got 0"),
        (lambda: config(head_dim=0), "head_dim must be a positive whole number or None, got 0"),
        (lambda: config(head_dim=8.0), "head_dim must be a positive whole number or None, got 8.0"),
        (lambda: config(chunk_size=0), "chunk_size must be a positive whole number, got 0"),
        (lambda: config(n_hashes=True), "n_hashes must be a positive whole number, got True"),
        (lambda: config(n_buckets=0), "n_buckets must be None, an even number or a list of them, .*, got 0"),
        (lambda: config(loss_chunk=None), "loss_chunk must be a positive whole number, got None"),
        (lambda: config(feed_forward_chunk=0), "feed_forward_chunk must be a positive whole number or None, got 0"),
        (lambda: config(norm_eps=-1e-5), "norm_eps must be a number from 0 on, got -1e-05"),
        (lambda: config(norm_eps="1e-5"), "norm_eps must be a number from 0 on, got '1e-5'"),
        (lambda: config(dropout=float("nan")), "dropout must be a probability from 0 to 1, got nan"),
        (lambda: config(seed=0.5), "seed must be a whole number, got 0.5"),
        (lambda: config(grid=0.1), "grid must be a power of two"),
        (lambda: config(activation="sine"), "activation must be one of 'gelu', .*, got 'sine'"),
        (lambda: config(axial_shape=(6, 7)), "axial_shape has 6 x 7 = 42 positions, which max_length 48 is beyond"),
        (lambda: config(axial_shape=48), "axial_shape must be None or a list of positive whole numbers, got 48"),
        (lambda: config(axial_dims=(8, 8)), r"axial_dims must be 2 numbers, .* whose sum is dim = 24, got \(8, 8\)"),
        (lambda: config(axial_dims=(24,)), r"axial_dims must be 2 numbers, .* whose sum is dim = 24, got \(24,\)"),
        (lambda: config(axial_dims=()), r"axial_dims must be None or a list of positive whole numbers, got \(\)"),
        (lambda: config(lsh={"buckets": 3}), "lsh must hold arguments of LSHSelfAttention, which has no buckets"),
        (lambda: config(lsh=3), "lsh must be a mapping of arguments of LSHSelfAttention, got 3"),
        (lambda: config(mechanisms=(3,)), "a mechanism must be one of 'exact', .*, got 3"),
        (lambda: dataclasses.replace(config(axial_shape=(6, 8)), max_length=49), "max_length 49 is beyond"),
        (lambda: ReformerConfig.from_json('{"width": 3}'), "this is no configuration of a Reformer"),
        (lambda: ReformerConfig.from_json("{"), "this is no configuration of a Reformer: JSONDecodeError"),
        (lambda: ReformerConfig.from_json('{"mechanisms": 3}'), "this is no configuration of a Reformer: TypeError"),
        (lambda: ReformerConfig.from_json('{"mechanisms": [{}]}'), "this is no configuration of a Reformer: KeyError"),
        (lambda: ReformerConfig.from_json('{"mechanisms": [{"kind": "Code"}]}'), "no configuration of a Reformer"),
        (lambda: config(mechanisms=(Linear(torch.exp),)).to_json(), "holds code, which JSON does not"),
        (lambda: reformer(causal=False).loss(text()), "an encoder sees the token it would have to guess"),
        (lambda: reformer(causal=False).generate(text(), 1), "Reformer.generate: an encoder cannot write"),
        (lambda: reformer().generate(text(L=20), 30), "20 tokens and 30 more are beyond the 48 positions"),
        (lambda: reformer().generate(text(L=20)[:, :0], 3), r"at least one token, got \[2, 0\]"),
        (lambda: reformer().generate(text(), 3, temperature=-1), "temperature must be a number from 0 on, got -1"),
        (lambda: reformer().generate(text(), 3, temperature=float("nan")), "from 0 on, got nan"),
        (lambda: reformer().generate(text(), 3, top_k=2.5), "top_k must be a positive whole number or None, got 2.5"),
        (lambda: reformer().generate(text(), 3, top_k=0), "top_k must be a positive whole number or None, got 0"),
        (lambda: reformer().generate(text(), -1), "n must be a whole number from 0 on, got -1"),
        (lambda: reformer().generate(text() + 1, 3), "Reformer.generate: tokens must be from 0 to 49, got . to 50"),
        (lambda: reformer()(text() - 1), "Reformer: tokens must be from 0 to 49, got -1 to"),
        (lambda: reformer()(text()[0]), r"Reformer: tokens must be \[B, L\], got \[20\]"),
        (lambda: reformer().loss(text(), key_padding_mask=text()[:, 1:] < 3), r"must be bool \[B, S\] = \[2, 20\]"),
        (lambda: reformer()(text(L=49)), "49 positions are more than the 6 x 8 = 48 of its shape"),
    ],
)
def test_what_cannot_be_is_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
