"""Hugging Face transformers with the mechanisms of this package: small random models, nothing downloaded."""

import functools

import pytest
import torch

import longattn
from longattn.integrations import _engines
from longattn.integrations.transformers import register

transformers = pytest.importorskip("transformers", minversion="5")

# tokens: more than a tile of the engine has
N = 70
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BART = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}
# one chunk of lsh holds all tokens: otherwise later tokens move the edges of chunks, and padding the number of buckets
OPTIONS = {"exact": {}, "local": {"window": 20}, "lsh": {"chunk_size": 256}, "favor": {"n_features": 32}, "linear": {}}
MECHANISMS = tuple(OPTIONS)


@pytest.fixture(autouse=True, scope="module")
def registered():
    register()
    for kind, options in OPTIONS.items():
        register(**{kind: options}, name=f"test_{kind}")


@functools.cache
def made(kind, **options):
    torch.manual_seed(0)
    sizes = SIZES | {"intermediate_size": 48}
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes | {"num_key_value_heads": 2} | options)
        return transformers.LlamaForCausalLM(config).eval()
    if kind == "mistral":
        config = transformers.MistralConfig(**sizes, num_key_value_heads=2, sliding_window=16, **options)
        return transformers.MistralForCausalLM(config).eval()
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, n_positions=128, **options)).eval()
    if kind == "bert":
        config = transformers.BertConfig(**sizes, max_position_embeddings=128, **options)
        return (transformers.BertLMHeadModel if options else transformers.BertForMaskedLM)(config).eval()
    if kind == "bart":
        layers = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in BART.items()}
        config = transformers.BartConfig(
            vocab_size=97, d_model=32, max_position_embeddings=128, pad_token_id=0, **layers
        )
        return transformers.BartForConditionalGeneration(config).eval()
    config = transformers.ViTConfig(**sizes, image_size=36, patch_size=4, num_labels=7)
    return transformers.ViTForImageClassification(config).eval()


def model_of(kind, attention, **options):
    model = made(kind, **options)
    model.set_attn_implementation(attention)
    return model


def tokens(*shape, seed=1):
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(seed))


def padding(side, B=3):
    """Of rows of N, N - 5 and N - 30 tokens."""
    keep, at = torch.tensor([N, N - 5, N - 30][:B])[:, None], torch.arange(N)
    return (at < keep if side == "right" else at >= N - keep).long()


def close(x, y, tolerance=1e-5):
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# exact attention is the library's


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit"])
def test_exact_equals_sdpa_in_outputs_and_gradients(kind, side):
    if kind == "vit":
        inputs = {"pixel_values": torch.randn(3, 3, 36, 36, generator=torch.Generator().manual_seed(0))}
    else:
        inputs = {"input_ids": tokens(3, N)} | ({} if side is None else {"attention_mask": padding(side)})
    found = []
    for attention in ("sdpa", "test_exact"):
        model = model_of(kind, attention)
        model.zero_grad()
        logits = model(**inputs).logits
        if side is not None and kind != "vit":
            logits = logits[padding(side).bool()]
        logits.square().sum().backward()
        # keys get no gradient from the shift of all scores: their biases have noise there
        kept = {n: p.grad for n, p in model.named_parameters() if "key.bias" not in n and "k_proj.bias" not in n}
        found.append((logits.detach(), kept))
    close(*(logits for logits, _ in found))
    largest = max(x.abs().max() for x in found[0][1].values())
    for name, expected in found[0][1].items():
        close(found[1][1][name] / largest, expected / largest)


HOW = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("how", HOW)
def test_generation_equals_that_of_sdpa(how, kind):
    options = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 0, "attention_mask": padding("left")} | HOW[how]
    options |= {"output_logits": True, "return_dict_in_generate": True}
    found = []
    for attention in ("sdpa", "test_exact"):
        torch.manual_seed(5)
        found.append(model_of(kind, attention).generate(tokens(3, N), **options))
    assert torch.equal(found[0].sequences, found[1].sequences)
    close(*(torch.stack(x.logits) for x in found))


@pytest.mark.parametrize("attention", ["test_exact", "test_local"])
def test_a_sliding_window_is_kept(attention):
    x = tokens(2, N)
    for inputs in ({}, {"attention_mask": padding("left", 2)}):
        expected = model_of("mistral", "sdpa")(x, **inputs).logits
        found = model_of("mistral", attention)(x, **inputs).logits
        keep = inputs.get("attention_mask", torch.ones(2, N)).bool()
        close(found[keep], expected[keep])
    for name in ("lsh", "favor", "linear"):
        with pytest.raises(ValueError, match=r"window of 16 keys is shorter than the 70"):
            model_of("mistral", f"test_{name}")(x)
        assert model_of("mistral", f"test_{name}")(x[:, :16]).logits.isfinite().all()


def test_exact_takes_any_mask_and_others_refuse_it():
    x, keep = tokens(2, N), torch.ones(2, 1, N, N, dtype=torch.bool).tril()
    keep[:, :, 40:, 3:9] = False
    close(
        model_of("llama", "test_exact")(x, attention_mask=keep).logits,
        model_of("llama", "sdpa")(x, attention_mask=keep).logits,
    )
    for name in ("local", "lsh", "favor", "linear"):
        with pytest.raises(ValueError, match=r"must be a bool \[B, S\] .* got bool \[2, 1, 70, 70\]"):
            model_of("llama", f"test_{name}")(x, attention_mask=keep)


def test_queries_may_look_at_an_encoder():
    inputs = {"input_ids": tokens(3, N), "attention_mask": padding("right")}
    expected = model_of("bart", "sdpa")(**inputs, labels=tokens(3, 11)).logits
    written = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False}
    for name in ("exact", "lsh"):
        model = model_of("bart", f"test_{name}")
        close(model(**inputs, labels=tokens(3, 11)).logits, expected)
        found = model.generate(**inputs, **written)
        assert torch.equal(found, model_of("bart", "sdpa").generate(**inputs, **written))
    for labels in (tokens(3, 11), tokens(3, 1)):
        with pytest.raises(ValueError, match="queries must be among the keys they look near"):
            model_of("bart", "test_local")(**inputs, labels=labels)


def test_causality_follows_the_model_and_the_call():
    x = tokens(2, N)
    other = x.clone()
    other[:, -1] = x[:, -1] % 96 + 1
    for name in MECHANISMS:
        first = 0 if name != "local" else N - 10
        changed = [model_of("bert", f"test_{name}")(y).logits[:, first] for y in (x, other)]
        assert not torch.equal(*changed), name
        decoder = [model_of("bert", f"test_{name}", is_decoder=True)(y).logits[:, first] for y in (x, other)]
        assert torch.equal(*decoder), name
    both_ways = [model_of("llama", name)(x, is_causal=False).logits for name in ("sdpa", "test_exact")]
    close(*both_ways)
    assert not torch.allclose(both_ways[0], model_of("llama", "sdpa")(x).logits, atol=1e-3)


# laws of every mechanism


@pytest.mark.parametrize("name", MECHANISMS)
def test_later_tokens_change_no_earlier_logit(name):
    x = tokens(2, N)
    other = torch.cat([x[:, :41], tokens(2, N - 41, seed=2)], 1)
    for kind in ("llama", "gpt2"):
        model = model_of(kind, f"test_{name}")
        before, after = (model(y).logits for y in (x, other))
        # the order in which lsh sums follows all tokens
        close(after[:, :41], before[:, :41], 1e-6 if name == "lsh" else 0)
        assert not torch.allclose(before[:, 41], after[:, 41], atol=1e-3)


def test_lsh_of_many_chunks_has_no_gradient_from_the_future():
    register(lsh={"chunk_size": 8, "n_hashes": 2}, name="small_chunks")
    model = model_of("llama", "small_chunks")
    embedded = model.get_input_embeddings()(tokens(1, 120)).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    (gradient,) = torch.autograd.grad(logits[:, 50].square().sum(), embedded)
    assert gradient[:, 51:].eq(0).all()
    assert gradient[:, :51].ne(0).any(-1).sum() > 40
    # and what is left out is left out: it is not exact attention
    assert not torch.allclose(logits, model_of("llama", "sdpa")(inputs_embeds=embedded).logits, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_padding_changes_no_valid_row(name, side):
    x, mask = tokens(3, N), padding(side)
    keep = mask.bool()
    for kind in ("llama", "bert"):
        model = model_of(kind, f"test_{name}")
        # positions as a tokenizer's padding leaves them
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found = model(x, attention_mask=mask, position_ids=positions).logits
        for b in range(3):
            close(found[b, keep[b]], model(x[b : b + 1, keep[b]]).logits[0], 2e-5)
        other = torch.where(keep, x, tokens(3, N, seed=3))
        assert torch.equal(model(other, attention_mask=mask, position_ids=positions).logits[keep], found[keep])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_pieces_with_a_cache_equal_the_whole(name, cache):
    x, mask = tokens(3, N), padding("left")
    for kind in ("llama", "mistral"):
        model = model_of(kind, f"test_{name}")
        if kind == "mistral" and name not in ("exact", "local"):
            continue
        whole = model(x, attention_mask=mask).logits
        static = functools.partial(transformers.StaticCache, max_cache_len=90)
        past, found = {"dynamic": transformers.DynamicCache, "static": static}[cache](config=model.config), []
        # a prompt, a piece, single tokens
        for first, end in ((0, 40), (40, 66), *((i, i + 1) for i in range(66, N))):
            places = {"attention_mask": mask[:, :end], "position_ids": torch.arange(first, end)[None]}
            found.append(model(x[:, first:end], past_key_values=past, **places).logits)
        close(torch.cat(found, 1)[mask.bool()], whole[mask.bool()], 2e-5)


@pytest.mark.parametrize("name", MECHANISMS)
def test_grouped_heads_read_the_keys_of_their_group(name):
    x = tokens(2, N)
    grouped = model_of("llama", f"test_{name}")
    expected = grouped(x).logits
    repeated = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, intermediate_size=48)).eval()
    state = grouped.state_dict()
    for key, weight in state.items():
        if "k_proj" in key or "v_proj" in key:
            state[key] = weight.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    repeated.load_state_dict(state)
    repeated.set_attn_implementation(f"test_{name}")
    close(repeated(x).logits, expected)


@pytest.mark.parametrize("name", MECHANISMS)
def test_packed_sequences_do_not_see_each_other(name):
    model, lengths = model_of("llama", f"test_{name}"), (5, 40, 25)
    x = tokens(2, N)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, N)
    found = model(x, position_ids=positions, use_cache=False).logits
    alone = [model(part).logits for part in x.split(lengths, 1)]
    close(found, torch.cat(alone, 1))
    bounds = torch.tensor([0, 5, 45, 70], dtype=torch.int32)
    told = model(x[:1], position_ids=positions[:1], use_cache=False, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds).logits
    close(told, found[:1])
    with pytest.raises(ValueError, match="one row of packed sequences"):
        model(x, use_cache=False, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)


@pytest.mark.parametrize("name", MECHANISMS)
def test_dropout_and_gradients(name):
    model = model_of("llama", f"test_{name}", attention_dropout=0.3)
    x = tokens(2, N)
    assert torch.equal(model(x).logits, model(x).logits)
    model.train()
    try:
        losses = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            losses.append(model(x, labels=x).loss)
        assert losses[0] == losses[1] != losses[2]
        losses[0].backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
    finally:
        model.eval()


@pytest.mark.parametrize("name", ["exact", "lsh", "favor"])
def test_compiled_is_what_eager_is(name):
    register(**{name: OPTIONS[name]}, name=f"fresh_{name}")
    model, x = model_of("llama", f"fresh_{name}", num_hidden_layers=1), tokens(2, N)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    one, two = torch.arange(N).expand(2, N), torch.cat([torch.arange(30), torch.arange(N - 30)]).expand(2, N)
    with torch.no_grad():
        if name == "favor":
            with pytest.raises(Exception, match="run the model once before"):
                compiled(x, position_ids=one, use_cache=False)
        expected = [model(x, position_ids=at, use_cache=False).logits for at in (one, two)]
        close(compiled(x, position_ids=one, use_cache=False).logits, expected[0])
        if name == "exact":
            close(compiled(x, position_ids=two, use_cache=False).logits, expected[1])
            keep = padding("left", 2)
            padded = [run(x, attention_mask=keep, use_cache=False).logits[keep.bool()] for run in (compiled, model)]
            close(*padded)
        else:
            with pytest.raises(RuntimeError, match="while compiling, packed sequences"):
                compiled(x, position_ids=two, use_cache=False)
    torch.compiler.reset()


# what it says


REFUSED = {
    "softcap": ("softcap", {"softcap": 30.0}),
    "sinks": ("attention sinks", {"s_aux": torch.zeros(4)}),
    "position bias": ("a bias added", {"position_bias": torch.zeros(1, 4, N, N)}),
    "weights": ("weights, which are never formed", {"output_attentions": True}),
    "paged cache": ("paged cache", {"cache": object()}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_honoured_is_refused(what):
    sentence, arguments = REFUSED[what]
    for name in MECHANISMS:
        attend = transformers.AttentionInterface()[f"test_{name}"]
        q = torch.randn(1, 4, N, 8)
        with pytest.raises(ValueError, match=f"test_{name}: .*{sentence}"):
            attend(torch.nn.Module(), q, q, q, None, **arguments)


def test_a_mask_of_its_own_is_refused_by_all_but_exact():
    from transformers.masking_utils import create_causal_mask

    def every_third(batch, head, q, k):
        return k % 3 == 0

    embedded = torch.zeros(2, N, 32)
    for name in MECHANISMS:
        config = model_of("llama", f"test_{name}").config
        arguments = (config, embedded, None, None)
        if name == "exact":
            seen = create_causal_mask(*arguments, or_mask_function=every_third)
            at = torch.arange(N)
            assert torch.equal(seen[0, 0], (at <= at[:, None]) | (at % 3 == 0))
            continue
        with pytest.raises(ValueError, match="more than causality"):
            create_causal_mask(*arguments, or_mask_function=every_third)


BAD = {
    "mechanism": ({"performer": {}}, TypeError, "the mechanisms are exact, local, lsh, favor, linear, got performer"),
    "option": ({"lsh": {"hashes": 3}}, TypeError, "the options of lsh are n_hashes, .*; got hashes"),
    "no mapping": ({"lsh": 3}, TypeError, "lsh must be a mapping"),
    "value": ({"local": {"window": 0}}, ValueError, "window must be a positive integer"),
    "two for a name": ({"lsh": {}, "local": {}, "name": "x"}, ValueError, "is for one mechanism"),
    "taken name": ({"lsh": {}, "name": "sdpa"}, ValueError, "a name of its own"),
    "name of another kind": ({"lsh": {}, "name": "my_flash"}, ValueError, "without 'flash'"),
    "module": ({"linear": {"feature_map": torch.nn.ReLU()}}, ValueError, "would not be saved with the model"),
}


@pytest.mark.parametrize("what", BAD)
def test_registering_says_what_is_wrong(what):
    arguments, error, sentence = BAD[what]
    with pytest.raises(error, match=sentence):
        register(**arguments)


def test_options_take_part():
    assert register() == tuple(f"longattn_{name}" for name in _engines.ENGINES)
    assert register(local={"window": 1}, name="itself") == ("itself",)
    # a token that sees itself alone
    x = tokens(1, N)
    model = model_of("llama", "itself")
    found = model(x).logits
    close(found[:, 30], model(x[:, 30:31], position_ids=torch.tensor([[30]])).logits[:, 0])


def test_the_scale_of_the_layer_is_kept():
    q, k, v = (torch.randn(1, 2, N, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7)
    estimate = longattn.Favor(8, 32, temperature=1 / 0.7)
    estimated = longattn.linear_attention(q, k, v, feature_map=estimate, is_causal=True)
    for name, wanted in (("exact", expected), ("lsh", expected), ("favor", estimated)):
        found, weights = transformers.AttentionInterface()[f"test_{name}"](
            torch.nn.Module(), q, k, v, None, scaling=0.7
        )
        close(found.transpose(1, 2), wanted)
        assert weights is None
