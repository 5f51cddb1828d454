"""Decode caches: the row of each new token is its row in the training function on the tokens so far."""

import itertools
from dataclasses import dataclass

import pytest
import torch

import longattn
from longattn import lsh_attention
from longattn.models import decoding
from longattn.models.decoding import Buckets, Rows, cache_of
from longattn.nn import LSHSelfAttention
from longattn.nn.local import Local
from longattn.nn.mechanisms import Exact, Linear, Mechanism
from longattn.ops.lsh import prepare, run
from longattn.testing.assertions import assert_near
from longattn.testing.cases import qkv

B, H, L, D, E = 2, 2, 37, 6, 5
FIRST = 9


@pytest.fixture(autouse=True)
def few_wait(monkeypatch):
    """The bucket lists take in new tokens several times within these lengths."""
    monkeypatch.setattr(decoding, "LATE", 7)


def rows(L=L, shared=False, **options):
    q, k, v = qkv(B, H, L, D, E, **{"dtype": torch.float64} | options)
    return q, None if shared else k, v


def part(tensors, *bounds):
    return [None if x is None else x[:, :, slice(*bounds)] for x in tensors]


def decode(cache, tensors, first=FIRST):
    """-> rows first - 1 .. of the cache, [B, H, L - first + 1, E]"""
    n = tensors[0].shape[2]
    outputs = [cache(*part(tensors, first))[:, :, -1:]]
    return torch.cat(outputs + [cache(*part(tensors, t, t + 1)) for t in range(first, n)], 2)


def attend(mechanism, tensors):
    return mechanism.attend(*tensors, is_causal=True, key_padding_mask=None, dropout_p=0.0)


# lsh


def check_lsh(tensors, options, first=FIRST):
    found = decode(cache_of(longattn.LSH(share_qk=True, **options)), tensors, first)
    for t in range(first - 1, tensors[0].shape[2]):
        expected = lsh_attention(*part(tensors, t + 1), is_causal=True, **options)[:, :, t]
        assert_near(found[:, :, t - first + 1], expected, 1e-12)


@pytest.mark.parametrize("within", ["window", "bucket"])
@pytest.mark.parametrize("dedupe", [True, False])
@pytest.mark.parametrize("n_hashes", [1, 3])
def test_lsh_decodes_the_last_row_of_each_prefix(n_hashes, dedupe, within):
    fixed = {"n_hashes": n_hashes, "dedupe": dedupe, "within": within, "seed": 3}
    for chunk, (look_back, look_ahead), n_buckets in itertools.product((1, 4, 100), ((0, 1), (1, 0), (2, 1)), (2, 8)):
        sizes = {"chunk_size": chunk, "look_back": look_back, "look_ahead": look_ahead, "n_buckets": n_buckets}
        check_lsh(rows(29, shared=True), fixed | sizes)


def test_lsh_decodes_from_the_first_token_on():
    check_lsh(rows(shared=True), {"n_hashes": 2, "chunk_size": 4, "n_buckets": 4}, first=1)


def test_lsh_decodes_where_all_tokens_share_a_bucket():
    q, _, v = rows(shared=True)
    check_lsh((q[:, :, :1].expand_as(q), None, v), {"n_hashes": 2, "chunk_size": 4, "n_buckets": 8})


def test_lsh_decodes_with_many_buckets_in_factors():
    check_lsh(rows(shared=True), {"n_hashes": 2, "chunk_size": 4, "n_buckets": 256, "scale": 0.5})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lsh_decodes_in_lower_precision(dtype):
    tensors, options = rows(shared=True, dtype=dtype), {"n_hashes": 2, "chunk_size": 4, "n_buckets": 8}
    found = decode(cache_of(longattn.LSH(share_qk=True, **options)), tensors)
    assert found.dtype == dtype
    expected = lsh_attention(tensors[0], None, tensors[2], is_causal=True, **options)[:, :, -1]
    assert_near(found[:, :, -1].float(), expected.float(), 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("n_hashes", [1, 2, 3])
@pytest.mark.parametrize(("look_back", "look_ahead"), [(1, 0), (2, 1), (0, 0)])
def test_lsh_of_foreign_checkpoints_decodes_over_the_edges_of_rounds(look_back, look_ahead, n_hashes):
    looks = {"look_back": look_back, "look_ahead": look_ahead, "norm_eps": 1e-3, "scale": 1.0}
    options = {"n_hashes": n_hashes, "chunk_size": 4, "n_buckets": 8, "dedupe": False} | looks
    module = LSHSelfAttention(H * D, H, causal=True, wrap=True, **options)
    tensors = rows(shared=True)
    found = decode(cache_of(module), tensors, 2)
    for t in range(1, L):
        if -(-(t + 1) // 4) * n_hashes <= look_back + look_ahead:
            # the engine does not look at one chunk twice
            continue
        q, _, v = part(tensors, t + 1)
        call = prepare("test", q, None, v, is_causal=True, wrap=t + 1 > 4, **options)
        assert_near(found[:, :, t - 1], run(call)[:, :, t], 1e-12)


def test_bucket_lists_are_what_sorting_gives():
    g = torch.Generator().manual_seed(0)
    buckets = torch.randint(5, (B, H, 3, L), generator=g, dtype=torch.int32)
    lists = Buckets(buckets[..., :4], 5)
    for t in range(4, L):
        place = lists.append(buckets[..., t]) - torch.arange(3) * (t + 1)
        order = buckets[..., : t + 1].argsort(dim=-1, stable=True)
        assert torch.equal(order.gather(-1, place[..., None])[..., 0], torch.full_like(place, t))
        found, of = lists.at(torch.arange(3 * (t + 1)).expand(B, H, -1))
        assert torch.equal(found.view_as(order), order)
        assert torch.equal(of.view_as(order), buckets.long().gather(-1, order))


def test_lsh_needs_a_number_of_buckets_that_stays():
    for n_buckets in (None, "per chunk"):
        with pytest.raises(ValueError, match="LSHCache: n_buckets must be given, for tokens to stay in their buckets"):
            cache_of(LSHSelfAttention(8, 2, causal=True, n_buckets=n_buckets))


# all others


@dataclass(frozen=True, repr=False)
class Squared(Mechanism):
    """A mechanism from elsewhere."""

    def attend(self, q, k, v, *, is_causal, key_padding_mask, dropout_p, attn_mask=None):
        return (q @ k.mT).square().tril() @ v

    def weights(self, q, k, *, is_causal, key_padding_mask): ...


MECHANISMS = [
    Exact(), Local(1), Local(5), Local(100), Local(4, chunks=(1, 0)), Local(4, chunks=(0, 0)), Local(3, chunks=(2, 0)),
    Linear(), Linear("relu", normalize=False, scale=0.5), Linear(longattn.Favor(D, 16)),
    Linear(longattn.Favor(D, 16, exact_diagonal=True)), longattn.LSH(chunk_size=4, n_buckets=8), Squared(),
]  # fmt: skip


@pytest.mark.parametrize("first", [1, 9, 20])
@pytest.mark.parametrize("mechanism", MECHANISMS, ids=repr)
def test_every_mechanism_decodes_the_last_row_of_each_prefix(mechanism, first):
    tensors = rows()
    found = decode(cache_of(mechanism), tensors, first)
    for t in range(first - 1, L):
        assert_near(found[:, :, t - first + 1], attend(mechanism, part(tensors, t + 1))[:, :, t], 1e-10)


ALL = [*MECHANISMS, longattn.LSH(n_hashes=2, chunk_size=4, n_buckets=8, share_qk=True)]


def tensors_for(mechanism):
    return rows(shared=getattr(mechanism, "share_qk", False))


@pytest.mark.parametrize("mechanism", ALL, ids=repr)
def test_a_prompt_may_come_in_parts(mechanism):
    tensors, cache, other = tensors_for(mechanism), cache_of(mechanism), cache_of(mechanism)
    whole = decode(cache, tensors, FIRST)
    parts = [other(*part(tensors, FIRST))[:, :, -1:], other(*part(tensors, FIRST, 21)), other(*part(tensors, 21, L))]
    assert torch.equal(torch.cat(parts, 2), whole)
    assert other.length == cache.length == L


@pytest.mark.parametrize("mechanism", ALL, ids=repr)
def test_a_reordered_cache_goes_on_as_the_chosen_sequences(mechanism):
    tensors, index = tensors_for(mechanism), torch.tensor([1, 1, 0])
    chosen = [None if x is None else x[index] for x in tensors]
    cache, other = cache_of(mechanism), cache_of(mechanism)
    # of no token, which is whatever order
    cache.reorder(index)
    for some, given in ((cache, tensors), (other, chosen)):
        some(*part(given, FIRST))
        for t in range(FIRST, 25):
            some(*part(given, t, t + 1))
    cache.reorder(index)
    for t in range(25, L):
        token = part(chosen, t, t + 1)
        # what the rows become must not be shared between copies
        token = [None if x is None else x * torch.tensor([1.0, -1.0, 2.0]).view(3, 1, 1, 1) for x in token]
        assert_near(cache(*token), other(*token), 1e-12)


@pytest.mark.parametrize("mechanism", ALL, ids=repr)
def test_a_sequence_decodes_in_company_as_alone(mechanism):
    tensors = tensors_for(mechanism)
    together = decode(cache_of(mechanism), tensors)
    for b in range(B):
        alone = decode(cache_of(mechanism), [None if x is None else x[b : b + 1] for x in tensors])
        assert_near(together[b : b + 1], alone, 1e-12)


def test_local_attention_keeps_its_window_alone():
    tensors, cache = rows(L=300), cache_of(Local(8))
    decode(cache, tensors)
    assert cache.k.memory.shape[2] <= 32
    assert cache_of(Local(4, chunks=(2, 0))).k.keep == 12


def test_rows_grow_by_doubling():
    x, grown, sizes = rows()[0], Rows(), set()
    for t in range(L):
        assert torch.equal(grown.append(x[:, :, t : t + 1]), x[:, :, : t + 1])
        sizes.add(grown.memory.shape[2])
    assert len(sizes) == 2
