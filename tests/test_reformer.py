"""The Reformer model: what it is made of, how it writes, its files, and the weights of Hugging Face."""

import contextlib
import os
import sys

import pytest
import torch
from _reformer import config, reformer, text
from _reversible import Live
from torch.utils.checkpoint import checkpoint

import longattn
from longattn.models.reformer import Reformer, _choose
from longattn.nn import LSHSelfAttention
from longattn.nn.local import Local
from longattn.nn.mechanisms import Linear
from longattn.testing.assertions import assert_near, assert_same_bits


def gradients(model, loss):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


# what it is made of


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mechanism", ["lsh", "local", "exact", "linear", Local(4, chunks=(1, 0)), longattn.LSH()])
def test_every_parameter_learns(mechanism, causal):
    model = reformer(mechanisms=(mechanism,), causal=causal)
    loss = model.loss(text(), None if causal else text(seed=2))
    for name, grad in gradients(model, loss).items():
        assert grad.isfinite().all(), name
        assert grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    "options",
    [
        {}, {"exact": True}, {"merge": "cat", "tied": False}, {"positions": "rotary", "feed_forward_chunk": 7},
        {"dropout": 0.2, "attention_dropout": 0.2, "mechanisms": ("local", "lsh")},
    ],
)  # fmt: skip
def test_reversible_or_not_the_numbers_are_the_same(options):
    options = {"depth": 6, "mechanisms": ("local", "lsh", "linear"), "dtype": torch.float32} | options
    models, losses = [reformer(reversible=reversible, **options) for reversible in (True, False)], []
    for model in models:
        torch.manual_seed(5)
        losses.append(model.loss(text(L=40)))
    assert_same_bits("loss", losses[0], losses[1])
    found, expected = (gradients(m, loss) for m, loss in zip(models, losses, strict=True))
    for name, x in expected.items():
        assert (found[name] - x).abs().max() <= 1e-5 * x.abs().max().clamp(min=1e-3), name


def held(model, call):
    """Bytes beside the parameters: of what is alive after `call`, and at most."""
    with Live() as live:
        live.known |= {p.untyped_storage()._cdata: None for p in model.parameters()}
        kept = call()  # noqa: F841
        return live.now, live.peak


def test_the_normed_rows_are_not_kept_while_attention_is_undone(monkeypatch):
    model, tokens = reformer(mechanisms=("exact",), max_length=512, hidden=8), text(L=400)
    _, least = held(model, lambda: model.features(tokens).sum().backward())
    monkeypatch.setattr("longattn.models.reformer.made_again", lambda *_: contextlib.nullcontext())
    _, most = held(model, lambda: model.features(tokens).sum().backward())
    assert most - least >= 0.9 * 8 * tokens.numel() * model.config.dim


def test_a_plain_model_leaves_what_is_kept_to_torchs_checkpoint():
    model, tokens = reformer(mechanisms=("exact", "local"), reversible=False), text(L=48)
    plain, _ = held(model, lambda: model.features(tokens))
    found, _ = held(model, lambda: checkpoint(model.features, tokens, use_reentrant=False))
    # the features alone
    assert found <= 1.1 * 8 * tokens.numel() * model.config.dim < plain / 8


@pytest.mark.parametrize("options", [{}, {"merge": "cat", "tied": False}])
def test_the_loss_is_the_cross_entropy_of_the_logits(options):
    model, tokens = reformer(**options).eval(), text(L=41)
    logits = model(tokens[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert_near(model.loss(tokens), expected, 1e-12)
    targets = text(L=40, seed=4).masked_fill(text(L=40) < 10, -100)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert_near(model.loss(tokens[:, :-1], targets), expected, 1e-12)
    assert_near(model.loss(tokens.to(torch.uint8)), model.loss(tokens), 1e-12)


@pytest.mark.parametrize("mechanism", ["exact", "local"])
def test_what_is_padded_is_neither_guessed_nor_guessed_from(mechanism):
    model, tokens = reformer(mechanisms=(mechanism,)).eval(), text(L=31)
    place = torch.arange(31)
    # at the end, in the middle, at the beginning
    for padded in ((place >= 21).expand(2, 31), torch.stack([place == 9, place < 4])):
        logits = model(tokens[:, :-1], padded[:, :-1])
        targets = tokens[:, 1:].masked_fill(padded[:, 1:] | padded[:, :-1], -100)
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        assert_near(model.loss(tokens, key_padding_mask=padded), expected, 1e-12)
        other = tokens.masked_fill(padded, 3)
        assert_near(model.loss(other, key_padding_mask=padded), expected, 1e-12)
    short = model.loss(tokens[:, :21])
    assert_near(model.loss(tokens, key_padding_mask=(place >= 21).expand(2, 31)), short, 1e-12)
    encoder, padded = reformer(mechanisms=(mechanism,), causal=False).eval(), (place >= 21).expand(2, 31)
    expected = encoder.loss(tokens[:, :21], tokens[:, :21])
    assert_near(encoder.loss(tokens, tokens, padded), expected, 1e-12)


def test_a_coarser_grid_takes_larger_streams():
    model = reformer(exact=True, dtype=torch.float32)
    with torch.no_grad():
        model.embedding.weight.mul_(1e5)
    with pytest.raises(OverflowError, match="use a coarser grid"):
        model.loss(text())
    coarse = reformer(exact=True, grid=2**-5, dtype=torch.float32)
    coarse.load_state_dict(model.state_dict())
    assert coarse.loss(text()).isfinite()


@pytest.mark.parametrize("mechanism", ["exact", "local", "linear", "lsh"])
def test_padding_at_the_end_changes_no_valid_row(mechanism):
    model, tokens = reformer(mechanisms=(mechanism,), causal=False).eval(), text(L=30)
    padded = torch.arange(30).expand(2, 30) >= torch.tensor([[30], [21]])
    logits, alone = model(tokens, padded), model(tokens[1:, :21])
    assert_near(logits[1:, :21], alone, 1e-12)
    assert_near(model(tokens.masked_fill(padded, 0), padded)[1, :21], logits[1, :21], 1e-12)


@pytest.mark.parametrize("mechanism", ["exact", "local", "linear"])
def test_later_tokens_change_no_earlier_row(mechanism):
    model, tokens = reformer(mechanisms=(mechanism,)).eval(), text(L=30)
    other = tokens.clone()
    other[:, 17:] = text(L=13, seed=5)
    assert_near(model(other)[:, :17], model(tokens)[:, :17], 1e-12)
    assert not torch.allclose(model(other)[:, 17:], model(tokens)[:, 17:])


@pytest.mark.parametrize("positions", ["axial", "rotary", "learned"])
def test_positions_tell_equal_tokens_apart(positions):
    tokens = torch.zeros(1, 9, dtype=torch.int64)
    tokens[:, 0] = 1
    logits = reformer(positions=positions, mechanisms=("exact",))(tokens)[0, 1:]
    assert (logits[:, None] - logits[None]).abs().amax(-1).add(torch.eye(8)).min() > 1e-6


def test_layers_take_their_mechanisms_in_turn():
    model = reformer(depth=5, mechanisms=["local", "lsh", longattn.Linear("relu")], n_hashes=3, seed=0)
    kinds = [block.f.attention for block in model.blocks.blocks]
    assert [type(x) for x in kinds[1::3]] == [LSHSelfAttention] * 2
    assert [x.mechanism for x in kinds[::3]] == [Local(6), Local(6)]
    assert kinds[2].mechanism == Linear("relu")
    assert [x.seed for x in kinds[1::3]] == [1, 4]
    assert kinds[1].n_hashes == 3


def test_the_number_of_buckets_does_not_follow_the_length():
    model = reformer(mechanisms=("lsh", longattn.LSH(chunk_size=8)), n_buckets=None, max_length=256, chunk_size=8)
    assert model.config.filled().n_buckets == 64
    assert model.blocks.blocks[0].f.attention.n_buckets == 64
    assert model.blocks.blocks[1].f.attention.mechanism.n_buckets == 64


# writing


def recomputed(model, prompt, n):
    """Greedy, with all tokens anew for each."""
    tokens = prompt
    for _ in range(n):
        tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens


@pytest.mark.parametrize("positions", ["axial", "rotary", "learned", None])
@pytest.mark.parametrize(
    "mechanisms",
    [
        ("exact",), ("local",), ("linear",), ("favor",), ("lsh",), (Local(4, chunks=(1, 0)), "lsh"),
        (longattn.LSH(n_hashes=2, chunk_size=48, share_qk=True), longattn.LSH(n_hashes=2, chunk_size=48)),
    ],
)  # fmt: skip
def test_generation_equals_recomputation(mechanisms, positions):
    # where the window of lsh is all tokens, later ones move no window of earlier ones
    # a tied embedding that has learnt nothing repeats the last token
    options = {"positions": positions, "chunk_size": 48, "n_hashes": 2, "tied": False}
    model = reformer(mechanisms=mechanisms, **options).eval()
    prompt = text(B=3, L=7)
    found = model.generate(prompt, 25, temperature=0)
    assert torch.equal(found, recomputed(model, prompt, 25))
    assert len(found[:, 7:].unique()) > 4


def test_a_model_that_is_exactly_reversible_writes_as_it_reads():
    model = reformer(exact=True, mechanisms=("local", "exact"), dtype=torch.float32).eval()
    assert torch.equal(model.generate(text(), 20, temperature=0), recomputed(model, text(), 20))


FOREIGN = {"dedupe": False, "wrap": True, "norm_eps": 1e-5, "scale": 1.0}


@pytest.mark.parametrize("lsh", [{}, {"within": "bucket", "look_back": 2}, FOREIGN])
def test_a_last_layer_of_lsh_decodes_the_last_row_of_each_prefix(lsh):
    # its rows come from layers whose rows no later token changes
    model, tokens = reformer(mechanisms=("local", "lsh"), n_hashes=2, lsh=lsh).eval(), text(L=40)
    cache = model.cache()
    found = [model.step(tokens[:, :5], cache)] + [model.step(tokens[:, t : t + 1], cache) for t in range(5, 40)]
    for t in range(4, 40):
        assert_near(found[t - 4], model(tokens[:, : t + 1])[:, -1], 1e-10)


def test_a_seed_decides_what_is_drawn_whatever_torchs_generator_says():
    model, prompt = reformer(), text(L=5)
    state = torch.get_rng_state()
    first = model.generate(prompt, 20, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(model.generate(prompt, 20, seed=3), first)
    assert not torch.equal(model.generate(prompt, 20, seed=4), first)
    assert torch.equal(first[:, :5], prompt)
    assert model.training


def test_draws_follow_temperature_and_top_k():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0, 0.5]]).expand(20000, 5)
    draws = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    for temperature, top_k in ((1.0, None), (0.5, None), (2.0, 3), (1.0, 1), (1.0, 9)):
        expected = logits[0] / temperature
        if top_k is not None:
            expected = expected.masked_fill(expected < expected.topk(min(top_k, 5)).values[-1], -torch.inf)
        found = torch.bincount(_choose(logits, draws, temperature, top_k).flatten(), minlength=5)
        assert_near(found / 20000, expected.softmax(-1), 0.02)
    last = _choose(logits[:1], torch.tensor([1 - 2**-24]), 1.0, 2)
    assert last.item() == 2


def test_as_many_are_kept_as_top_k_says_and_the_first_of_equal_ones():
    logits, draws = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0]]).expand(4000, 5), torch.rand(4000)
    for top_k, chosen in ((1, {1}), (2, {1, 2}), (3, {1, 2, 4}), (4, {0, 1, 2, 4})):
        assert set(_choose(logits, draws, 1.0, top_k).flatten().tolist()) == chosen
    # next to nothing is the likeliest alone, and divides nothing by 0
    assert set(_choose(logits + logits.new_tensor([0, 0, 0, 0, 1]), draws, 1e-320, None).flatten().tolist()) == {4}


@pytest.mark.parametrize(("vocab", "dtype"), [(256, torch.uint8), (257, torch.int64), (128, torch.int8)])
def test_what_is_written_fits_its_dtype(vocab, dtype):
    model = reformer(vocab=vocab, mechanisms=("local",), tied=False)
    with torch.no_grad():
        model.head.bias[vocab - 1] = 1e3
    prompt = torch.zeros(1, 2, dtype=torch.uint8 if vocab > 128 else torch.int8)
    found = model.generate(prompt, 3)
    assert found.dtype == dtype
    assert found.tolist() == [[0, 0, vocab - 1, vocab - 1, vocab - 1]]
    assert model.generate(prompt, 0).tolist() == [[0, 0]]


def test_each_prompt_of_a_batch_is_written_as_alone():
    model, prompts = reformer(mechanisms=("local", "lsh", "linear"), depth=3).eval(), text(B=3, L=6)
    together = model.generate(prompts, 20, temperature=0)
    for b in range(3):
        assert torch.equal(together[b : b + 1], model.generate(prompts[b : b + 1], 20, temperature=0))


def test_beams_go_on_from_the_sequences_they_were():
    model, tokens = reformer(mechanisms=("local", "lsh", "linear", "exact"), depth=4).eval(), text(B=2, L=30)
    index = torch.tensor([1, 0, 1])
    cache, other = model.cache(), model.cache()
    # of no token, which is whatever order
    cache.reorder(index)
    model.step(tokens[:, :20], cache), model.step(tokens[index, :20], other)
    cache.reorder(index)
    assert cache.length == 20
    later = text(B=3, L=10, seed=8)
    for t in range(10):
        assert_near(model.step(later[:, t : t + 1], cache), model.step(later[:, t : t + 1], other), 1e-12)


# files


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_is_loaded_bit_for_bit(tied, dtype, tmp_path):
    pytest.importorskip("safetensors")
    favor = longattn.Favor(8, 16, temperature=2.5, seed=7)
    model = reformer(mechanisms=("lsh", Linear(favor), "local"), depth=4, tied=tied, dtype=dtype)
    model.loss(text())
    model.save(tmp_path / "model")
    state = torch.get_rng_state()
    other = Reformer.load(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.safetensors"]
    assert [x.dtype for x in other.parameters()] == [x.dtype for x in model.parameters()]
    for name, x in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], x), name
    assert_same_bits("logits", other.eval()(text()), model.eval()(text()))


def test_mechanisms_that_share_features_share_them_in_files_too(tmp_path):
    pytest.importorskip("safetensors")
    favor, other = longattn.Favor(8, 16, seed=7, learn_temperature=True), longattn.Favor(8, 16, seed=7)
    mechanisms = ("lsh", Linear(favor), Linear(favor, impl="reference"), Linear(other))
    model = reformer(mechanisms=mechanisms, depth=5, dtype=torch.float32).eval()
    model.save(tmp_path)
    loaded = Reformer.load(tmp_path).eval()
    assert_same_bits("logits", loaded(text()), model(text()))
    maps = [block.f.attention.mechanism.feature_map for block in loaded.blocks.blocks[1:4]]
    assert maps[0] is maps[1] is not maps[2]


def test_files_that_are_no_model_are_one_sentence(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    sentence = "holds no Reformer that can be read"
    with pytest.raises(ValueError, match=sentence):
        Reformer.load(tmp_path / "nowhere")
    reformer().save(tmp_path)
    for name, contents in (("config.json", config(dim=48).to_json()), ("config.json", "{")):
        whole = (tmp_path / name).read_text()
        (tmp_path / name).write_text(contents)
        with pytest.raises(ValueError, match=sentence):
            Reformer.load(tmp_path)
        (tmp_path / name).write_text(whole)
    tensors = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(tensors[: len(tensors) // 2])
    with pytest.raises(ValueError, match=sentence):
        Reformer.load(tmp_path)
    # whole, and of another program
    for metadata in (None, {"format": "pt"}, {"dtype": "float8000"}):
        safetensors.save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors", metadata)
        with pytest.raises(ValueError, match=sentence):
            Reformer.load(tmp_path)


def test_without_safetensors_saving_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: reformer().save(tmp_path), lambda: Reformer.load(tmp_path)):
        with pytest.raises(ModuleNotFoundError, match="needs the package safetensors: pip install safetensors"):
            call()


# hugging face


def their_rotations(call, extra):
    """Those of a generator that `hash_seed` = 0 starts anew in each call, as that code does."""
    R, D, factors = call.rounds.n_hashes, call.q.shape[3], call.rounds.factors
    torch.manual_seed(0)
    drawn = torch.randn(call.q.shape[1], D, R, sum(factors) // 2, dtype=torch.float64)
    return drawn.transpose(1, 2).float().contiguous()


@pytest.mark.parametrize("L", [12, 16, 48, 39])
@pytest.mark.parametrize("axial", [True, False])
def test_weights_of_hugging_face_give_their_logits(axial, L, monkeypatch):
    transformers = pytest.importorskip("transformers")
    theirs_config = transformers.ReformerConfig(
        attn_layers=["local", "lsh", "local", "lsh"], hidden_size=24, num_attention_heads=3, attention_head_size=10,
        feed_forward_size=40, vocab_size=50, is_decoder=True, axial_pos_embds=axial, axial_pos_shape=[8, 8],
        axial_pos_embds_dim=[8, 16], max_position_embeddings=64, local_attn_chunk_length=4, lsh_attn_chunk_length=8,
        num_buckets=[2, 4], num_hashes=2, hash_seed=0, hidden_act="gelu", hidden_dropout_prob=0.1, use_cache=False,
        local_num_chunks_before=2, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    # in float32 its sum of rounds is off by 3e-3 where a token sees only itself: -1e5 + log(2) rounds
    theirs = transformers.ReformerModelWithLMHead(theirs_config).double().eval()
    ours = Reformer.from_huggingface(theirs).eval()
    monkeypatch.setattr("longattn.ops.lsh._rotations", their_rotations)
    tokens = text(L=L)
    with torch.no_grad():
        expected = theirs(tokens).logits
    assert expected.std() > 0.1
    assert_near(ours(tokens), expected, 1e-10)
