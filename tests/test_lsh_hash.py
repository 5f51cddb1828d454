"""The hash and the sort of LSH attention, and the sentences of its public functions."""

import math

import pytest
import torch

from longattn import lsh_attention, lsh_buckets, lsh_recall
from longattn.ops import _lsh
from longattn.ops.lsh import hash_of, prepare
from longattn.reference import lsh as reference
from longattn.testing.assertions import assert_near, assert_same_bits
from longattn.testing.cases import DTYPES, draw, qkv

NAN, INF = float("nan"), float("inf")


def given(rotations, device="cpu"):
    """Rotations [D, C] of one head and one round."""
    return torch.tensor(rotations, dtype=torch.float32, device=device)[None, None]


# the hash


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_buckets", [2, 6, 128, 260, 4096, 32768])
def test_every_engine_gives_the_buckets_of_the_reference(n_buckets, dtype, kernel, device):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("float64 runs on cpu and reference only")
    (x,) = draw((2, 3, 101, 17), dtype=dtype, device=device)
    found, expected = (lsh_buckets(x, n_buckets=n_buckets, impl=impl) for impl in (kernel, "reference"))
    assert found.dtype == torch.int32
    assert_same_bits("buckets", found, expected)
    assert 0 <= found.min() < found.max() < n_buckets


def test_a_bucket_is_the_index_of_the_first_maximum(impl, device):
    # one column for each of two factors of 2, three for a factor of 6
    for rotations, n, cases in (
        ([[1.0, 1.0, -1.0]], 6, {1: 0, -1: 2, 0: 0}),
        ([[0.0, 2.0, 3.0]], 6, {1: 2, -1: 5, 0: 0}),
        ([[-1.0]], 2, {1: 1, -1: 0, 0: 0, NAN: 0, INF: 1}),
    ):
        x = torch.tensor(list(cases), device=device).view(1, 1, -1, 1).float()
        found = lsh_buckets(x, n_hashes=1, n_buckets=n, rotations=given(rotations, device), impl=impl)
        assert found.flatten().tolist() == list(cases.values())


def test_a_bucket_counts_through_its_factors(impl, device):
    factors = _lsh.factorise(260)
    assert factors == [10, 26]
    rotations = torch.zeros(1, 1, 2, 18, device=device)
    rotations[0, 0, 0, 3] = 1
    rotations[0, 0, 1, 5 + 7] = 1
    x = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]], device=device)[None, None]
    found = lsh_buckets(x, n_hashes=1, n_buckets=260, rotations=rotations, impl=impl)
    assert found.flatten().tolist() == [3 + 10 * 7, 8 + 10 * 7, 3 + 10 * (13 + 7)]


@pytest.mark.parametrize("factor", [2.0**-30, 0.5, 2.0**40])
def test_a_power_of_two_as_a_factor_leaves_buckets_equal(factor, impl, device):
    q, k, v = qkv(L=65, device=device)
    assert_same_bits("shared", lsh_buckets(q * factor, impl=impl), lsh_buckets(q, impl=impl))
    small, large = (hash_of(prepare("x", x, y, v, impl=impl)) for x, y in ((q, k), (q * factor, k * factor)))
    for x, y in zip(small, large, strict=True):
        assert_same_bits("separate", x, y)


def test_each_head_and_round_has_rotations_of_its_own(impl, device):
    x = draw((1, 1, 200, 16), device=device)[0].expand(1, 3, 200, 16)
    buckets = lsh_buckets(x, n_hashes=3, n_buckets=16, impl=impl).flatten(0, 2)
    for i in range(9):
        for j in range(i):
            assert (buckets[i] == buckets[j]).float().mean() < 0.3


def test_query_heads_of_a_group_share_rotations(impl, device):
    (k, v), (q,) = draw((1, 2, 50, 8), (1, 2, 50, 8), device=device), draw((1, 2, 50, 8), seed=1, device=device)
    wide = q.repeat_interleave(3, 1)
    found = hash_of(prepare("x", wide, k, v, enable_gqa=True, impl=impl))[0]
    assert_same_bits("queries", found, hash_of(prepare("x", q, k, v, impl=impl))[0].repeat_interleave(3, 1))


def test_near_rows_collide_more_often_than_far_ones_and_buckets_fill_evenly(impl, device):
    (x, noise) = draw((1, 4, 512, 32), (1, 4, 512, 32), device=device)
    options = {"n_hashes": 16, "n_buckets": 16, "impl": impl}
    buckets, near = lsh_buckets(x, **options), lsh_buckets(x + 0.2 * noise, **options)
    far = lsh_buckets(noise, **options)
    assert (buckets == near).float().mean() > 0.6
    assert abs((buckets == far).float().mean() - 1 / 16) < 0.01
    share = torch.bincount(buckets.flatten(), minlength=16) / buckets.numel()
    assert (share - 1 / 16).abs().max() < 0.02


def test_given_rotations_and_buckets_replace_the_seed(impl, device):
    x, _, v = qkv(L=60, device=device)
    options = {"n_hashes": 2, "chunk_size": 8, "n_buckets": 8, "impl": impl}
    expected = lsh_attention(x, None, v, seed=9, **options)
    rotations = _lsh.draw_rotations(2, 2, 8, 4, seed=9, device=device)
    assert_same_bits("rotations", lsh_attention(x, None, v, rotations=rotations, **options), expected)
    buckets = lsh_buckets(x, seed=9, **options)
    for given_buckets in (buckets, buckets.long()):
        assert_same_bits("buckets", lsh_attention(x, None, v, buckets=given_buckets, **options), expected)
    assert not torch.equal(lsh_attention(x, None, v, seed=10, **options), expected)


# rotations and factors


def test_rotations_are_a_function_of_seed_and_step_and_leave_torchs_generator_alone():
    before = torch.get_rng_state()
    drawn = {(seed, step): _lsh.draw_rotations(2, 3, 8, 4, seed=seed, step=step) for seed in (0, 1, 2**32, -1)
             for step in (0, 1, 2)}  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before)
    for key, x in drawn.items():
        assert x.dtype == torch.float32
        assert torch.equal(_lsh.draw_rotations(2, 3, 8, 4, seed=key[0], step=key[1]), x)
        for other, y in drawn.items():
            assert key == other or not torch.equal(x, y)
    x = _lsh.draw_rotations(8, 8, 64, 32)
    assert abs(x.mean()) < 0.01
    assert abs(x.std() - 1) < 0.01


def test_a_caller_may_write_into_the_rotations_it_drew():
    first = _lsh.draw_rotations(1, 1, 4, 2, seed=3)
    kept = first.clone()
    first.zero_()
    assert torch.equal(_lsh.draw_rotations(1, 1, 4, 2, seed=3), kept)


def test_factors_are_even_balanced_and_multiply_to_the_number_of_buckets():
    for n in (*range(2, 400, 2), 2 * 67, 2 * 127 * 2, 16384, 16386, 32768, 2**20, 6**6, 2 * 10007, 4 * 10007):
        factors = _lsh.factorise(n)
        assert math.prod(factors) == n
        assert all(b % 2 == 0 for b in factors)
        assert len(factors) <= 1 + (n > 128) + (n > 16384)
    assert [_lsh.factorise(n) for n in (128, 256, 2048, 16384, 32768, 2**20)] == [
        [128], [16, 16], [32, 64], [128, 128], [32, 32, 32], [64, 128, 128]
    ]  # fmt: skip
    # 2 times an odd number is no product of two even ones
    assert _lsh.factorise(2 * 10007) == [2 * 10007]
    assert [_lsh.default_buckets(n, 64) for n in (0, 1, 64, 65, 4096, 5000)] == [2, 2, 2, 4, 128, 256]


# lengths of rows, the last coordinate of keys


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [1, 200, 10**9])
def test_lengths_of_rows_do_not_depend_on_blocks_and_do_not_overflow(dtype, block, monkeypatch):
    (x,) = draw((2, 3, 37, 19), dtype=torch.float64)
    # squares of which overflow in the dtype, but not in the float64 that judges
    largest = min(math.sqrt(torch.finfo(dtype).max) * 4, 1e150)
    x = (x * torch.tensor([1.0, 1e-4, largest], dtype=torch.float64)[torch.arange(37) % 3, None]).to(dtype)
    x[0, 0, :2] = 0
    x[1, 1, 5, 3], x[1, 1, 6, 3] = NAN, INF
    expected = torch.ops.longattn._lsh_lengths(x)
    monkeypatch.setitem(_lsh.BLOCK, "cpu", block)
    found = torch.ops.longattn._lsh_lengths(x)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same_bits("lengths", found, expected)
    assert found[1, 1, 5].isnan()
    assert found[1, 1, 6] == INF
    assert (found[0, 0, :2] == 0).all()
    found[1, 1, 5:7] = 1
    wide = torch.linalg.vector_norm(x.double(), dim=-1)
    wide[1, 1, 5:7] = 1
    scale = wide.clamp(min=torch.finfo(found.dtype).tiny)
    assert ((found.double() - wide).abs() / scale).max() < 4 * torch.finfo(found.dtype).eps


@pytest.mark.parametrize("packed", [False, True])
def test_the_last_coordinate_gives_all_keys_the_length_of_the_longest_valid_one(packed):
    (k,) = draw((1, 2, 50, 6))
    k[0, 0, 3] *= 100
    k[0, 1, 20], k[0, 1, 21, 2] = NAN, INF
    mask = torch.arange(50)[None] == 3
    cu_seqlens = torch.tensor([0, 11, 11, 50], dtype=torch.int32) if packed else None
    extra = _lsh.last_coordinate(torch.ops.longattn._lsh_lengths(k), mask, cu_seqlens)
    for start, stop in ((0, 11), (11, 50)) if packed else ((0, 50),):
        for head in range(2):
            valid = k[0, head, start:stop].isfinite().all(-1) & ~mask[0, start:stop]
            squares = k[0, head, start:stop].square().sum(-1)[valid]
            total = squares + extra[0, head, start:stop][valid].square()
            assert_near(total, squares.max().expand_as(total), 1e-5)
    assert extra.isfinite().all()


# the sort


@pytest.mark.parametrize("cu_seqlens", [None, [0, 0, 31, 40, 40, 100], [0, 100]], ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_every_sort_is_stable_and_ranks_by_chunk(chunk, cu_seqlens, kernel, device):
    g = torch.Generator().manual_seed(chunk)
    keys = torch.randint(0, 9, (1 if cu_seqlens else 2, 3, 2, 100), generator=g, dtype=torch.int32).to(device)
    ends = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
    found = torch.ops.longattn._lsh_sort(keys, 9, ends, chunk)
    for x, y in zip(found, _lsh.sort_by_torch(keys, 9, ends, chunk), strict=True):
        assert_same_bits("sort", x, y)


def test_torchs_sort_follows_the_definition():
    keys = torch.tensor([[[[2, 0, 2, 1, 0, 1, 1]]]], dtype=torch.int32)
    order, rank = _lsh.sort_by_torch(keys, 3, None, 2)
    assert order.flatten().tolist() == [1, 4, 3, 5, 6, 0, 2]
    assert rank.flatten().tolist() == [2, 0, 3, 1, 0, 1, 2]
    order, rank = _lsh.sort_by_torch(keys, 3, torch.tensor([0, 3, 7], dtype=torch.int32), 2)
    assert order.flatten().tolist() == [1, 0, 2, 4, 3, 5, 6]
    assert rank.flatten().tolist() == [0, 0, 1, 0, 0, 1, 1]


def test_the_reference_drops_by_the_written_hash():
    def mix(x):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ x >> shift) * factor % 2**32
        return x ^ x >> 16

    seed = 0x123456789ABCDEF0
    kept = reference.kept(2, 3, 5, 7, 0.4, seed, "cpu")
    for b, h, i, j in ((0, 0, 0, 0), (1, 2, 4, 6), (1, 0, 3, 2), (0, 1, 2, 5)):
        head = mix(mix((seed % 2**32 + 0x9E3779B9 * (b * 3 + h + 1)) % 2**32) ^ seed >> 32)
        u = mix((mix(head ^ i * 0x85EBCA6B % 2**32) + j * 0xC2B2AE35) % 2**32)
        assert kept[b, h, i, j] == (u >= math.floor(0.4 * 2**32))
    assert abs(reference.kept(4, 4, 200, 200, 0.4, 1, "cpu").float().mean() - 0.6) < 0.005


# bad input


def bad(sentence, error=ValueError, shared=True, **options):
    return pytest.param(options, shared, error, sentence, id=f"{shared} {list(options)} {sentence[:20]}")


@pytest.mark.parametrize(("options", "shared", "error", "sentence"), [
    bad("n_buckets must be even and positive .*got int 7", n_buckets=7),
    bad("n_buckets must be even and positive .*got int 0", n_buckets=0),
    bad("n_buckets must be even and positive .*got int -4", n_buckets=-4),
    bad("n_hashes must be a whole number of at least 1 and below 2.31, got int 0", n_hashes=0),
    bad("chunk_size must be a whole number of at least 1 token and below 2.31, got int 0", chunk_size=0),
    bad("chunk_size must be .*got float 8.0", chunk_size=8.0),
    bad("look_back must be .*got int -1", look_back=-1),
    bad("look_ahead must be .*got int -1", look_ahead=-1),
    bad("within must be one of 'window', 'bucket', got 'chunk'", within="chunk"),
    bad("scale must be a finite number or None, got float nan", scale=NAN),
    bad("dropout_p must be a probability", dropout_p=1.5),
    bad("seed must be an integer, got str 'x'", TypeError, seed="x"),
    bad("attn_mask .*pass is_causal, key_padding_mask or cu_seqlens", attn_mask=torch.ones(9, 9, dtype=torch.bool)),
    bad("rotations must be float32 \\[2, 4, 8, 1\\]", rotations=torch.zeros(2, 4, 8, 2)),
    bad("rotations must be float32 \\[2, 4, 9, 1\\]", shared=False, rotations=torch.zeros(2, 4, 8, 1)),
    bad("rotations must be float32", TypeError, rotations=torch.zeros(2, 4, 8, 1, dtype=torch.float64)),
    bad("buckets must be int32 .*\\[2, 2, 4, 9\\]", buckets=torch.zeros(2, 2, 3, 9, dtype=torch.int32)),
    bad("buckets must be int32", TypeError, buckets=torch.zeros(2, 2, 4, 9)),
    bad("buckets must be from 0 to n_buckets - 1 = 1, got 2 to 2", buckets=torch.full((2, 2, 4, 9), 2)),
    bad("buckets must be from 0 .*got -1 to -1", buckets=torch.full((2, 2, 4, 9), -1)),
    bad("buckets must be a pair", TypeError, shared=False, buckets=torch.zeros(2, 2, 4, 9, dtype=torch.int32)),
    bad("rotations and buckets exclude each other", rotations=torch.zeros(2, 4, 8, 1), buckets=torch.zeros(2, 2, 4, 9)),
    bad("key_padding_mask must be bool", key_padding_mask=torch.zeros(2, 8, dtype=torch.bool)),
    bad("packed sequences need batch size 1", cu_seqlens=torch.tensor([0, 9], dtype=torch.int32)),
])  # fmt: skip
def test_bad_options_are_refused_in_a_sentence(options, shared, error, sentence):
    q, k, v = qkv(L=9)
    with pytest.raises(error, match=f"lsh_attention: .*{sentence}"):
        lsh_attention(q, None if shared else k, v, **options)


def test_bad_shapes_are_refused_in_a_sentence():
    q, k, v = qkv(L=9, S=7)
    with pytest.raises(ValueError, match=r"lsh_attention: k=None \(shared QK\) needs query and value to share"):
        lsh_attention(q, None, v)
    with pytest.raises(ValueError, match="lsh_attention: k=None"):
        lsh_attention(k, None, v[:, :1])
    with pytest.raises(ValueError, match="lsh_attention: is_causal needs as many queries as keys, got 9 and 7"):
        lsh_attention(q, k, v, is_causal=True)
    with pytest.raises(TypeError, match="lsh_attention: query must be a tensor, got list"):
        lsh_attention([1], None, v)
    with pytest.raises(ValueError, match="lsh_attention: query has 2 heads and key has 1"):
        lsh_attention(q, k[:, :1], v[:, :1])
    with pytest.raises(ValueError, match="lsh_attention: impl must be 'auto' or one of"):
        lsh_attention(q, k, v, impl="fast")
    with pytest.raises(ValueError, match="lsh_buckets: n_buckets must be even"):
        lsh_buckets(q, n_buckets=3)
    with pytest.raises(ValueError, match="lsh_recall: n_hashes must be"):
        lsh_recall(q, k, n_hashes=0)
