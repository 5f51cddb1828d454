"""The laws of LSH attention: what may change a result and what may not, which keys a query sees, bad input."""

import dataclasses
import itertools
import math

import pytest
import torch

from longattn import explain, linear_attention, lsh_attention, lsh_buckets, lsh_recall, softmax_attention
from longattn.ops import _lsh
from longattn.ops._tiles import SELF_ORDINARY, Options
from longattn.ops.lsh import orders, prepare, run
from longattn.reference import lsh as reference
from longattn.testing.assertions import assert_near, assert_same_bits
from longattn.testing.cases import draw, qkv
from longattn.testing.lsh import LshCase, build_lsh, run_lsh

NAN = float("nan")
SHARED = LshCase("law, shared", L=97, chunk_size=8, is_causal=True)
SEPARATE = LshCase("law, separate", L=97, chunk_size=8, shared=False)
BOTH = pytest.mark.parametrize("case", [SHARED, SEPARATE], ids=["shared", "separate"])


def attend(inputs, impl):
    return run(prepare("lsh_attention", *inputs[:3], impl=impl, **inputs.options))


def changed(inputs, **options):
    return inputs._replace(options={**inputs.options, **options})


def buckets_of(inputs, rows=slice(None)):
    """The buckets of these positions, in the form they came in."""
    buckets = inputs.options["buckets"]
    return tuple(x[..., rows] for x in buckets) if isinstance(buckets, tuple) else buckets[..., rows]


def counts(inputs):
    call = prepare("lsh_attention", *inputs[:3], impl="reference", **inputs.options)
    return reference.pair_counts(*call.buckets, call.mask, call.cu_seqlens, **call.rounds.counted())


# what may not change a result


@BOTH
def test_padded_rows_in_another_order_change_no_valid_bit(case, impl, device):
    inputs = build_lsh(case, torch.float32, device)
    padded = torch.zeros(case.B, case.L, dtype=torch.bool, device=device)
    padded[0, 5:40:3] = padded[1, 60:] = True
    inputs = changed(inputs, key_padding_mask=padded, buckets=None)
    other = inputs
    for b in range(case.B):
        where = padded[b].nonzero().squeeze(1)
        to = where.flip(0)
        tensors = [None if x is None else x.clone() for x in other[:3]]
        for x in tensors:
            if x is not None:
                x[b, :, where] = x[b, :, to]
        other = other._replace(q=tensors[0], k=tensors[1], v=tensors[2])
    if case.shared:
        results = run_lsh(inputs, impl), run_lsh(other, impl)
    else:
        # queries of their own are valid rows at padded positions
        results = run_lsh(inputs, impl), run_lsh(other._replace(q=inputs.q), impl)
    valid = ~padded[:, None].expand(case.B, case.H, case.L)
    for name, x in results[0].items():
        assert_same_bits(name, results[1][name][valid], x[valid])


@BOTH
@pytest.mark.parametrize("more", [1, 7, 100])
def test_appended_padding_changes_no_valid_bit(case, more, impl, device):
    inputs = build_lsh(case, torch.float32, device)
    n = case.L

    def append(x):
        return x if x is None else torch.cat([x, torch.full_like(x[:, :, :1], NAN).expand(-1, -1, more, -1)], 2)

    def drawn(x):
        more_buckets = torch.arange(more, dtype=torch.int32, device=device) % case.n_buckets
        return torch.cat([x, more_buckets.expand(*x.shape[:-1], more)], -1)

    buckets = inputs.options["buckets"]
    buckets = tuple(map(drawn, buckets)) if isinstance(buckets, tuple) else drawn(buckets)
    mask = (torch.arange(n + more, device=device) >= n).expand(case.B, -1)
    q = append(inputs.q) if case.shared else torch.cat([inputs.q, inputs.q[:, :, :1].expand(-1, -1, more, -1)], 2)
    grad_output = torch.cat([inputs.grad_output, inputs.grad_output[:, :, :1].expand(-1, -1, more, -1) * 0], 2)
    longer = inputs._replace(q=q, k=append(inputs.k), v=append(inputs.v), grad_output=grad_output)
    longer = run_lsh(changed(longer, key_padding_mask=mask, buckets=buckets), impl)
    shorter = run_lsh(inputs, impl)
    if impl == "reference":
        # a dense product of another width may round otherwise
        for name, x in shorter.items():
            assert_near(longer[name][:, :, :n], x, 2e-6)
        return
    for name, x in shorter.items():
        assert_same_bits(name, longer[name][:, :, :n], x)


@pytest.mark.parametrize("shared", [True, False])
def test_future_tokens_do_not_change_past_outputs(shared, kernel, device):
    case = LshCase(f"future, shared={shared}", L=97, chunk_size=8, is_causal=True, shared=shared)
    inputs, cut = build_lsh(case, torch.float32, device), 41
    q, k, v = (None if x is None else x.clone() for x in inputs[:3])
    for x, value in ((q, 1e4), (k, NAN), (v, math.inf)):
        if x is not None:
            x[:, :, cut:] = value
    output = attend(inputs._replace(q=q, k=k, v=v), kernel)
    assert_same_bits("output", output[:, :, :cut], attend(inputs, kernel)[:, :, :cut])


@BOTH
def test_one_thread_and_two_give_the_same_bits(case, kernel, device):
    # more tiles than a task takes, so that a sequence is cut
    inputs = changed(build_lsh(dataclasses.replace(case, L=301, chunk_size=4), torch.float32, device), buckets=None)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run_lsh(inputs, kernel))
    for other in results[1:]:
        for name, x in results[0].items():
            assert_same_bits(name, other[name], x)


@BOTH
def test_the_rest_of_the_batch_changes_no_bit(case, kernel, device, three_threads):
    inputs = build_lsh(case, torch.float32, device)
    whole = run_lsh(inputs, kernel)
    buckets = inputs.options["buckets"]
    buckets = tuple(x[:1] for x in buckets) if isinstance(buckets, tuple) else buckets[:1]
    tensors = [None if x is None else x[:1] for x in inputs[:3]]
    options = {**inputs.options, "buckets": buckets}
    alone = run_lsh(type(inputs)(*tensors, options, inputs.grad_output[:1]), kernel)
    for name, x in alone.items():
        assert_same_bits(name, x, whole[name][:1])


@pytest.mark.parametrize("shared", [True, False])
def test_packed_sequences_equal_calls_of_their_own(shared, impl, device):
    q, k, v = qkv(B=1, L=130, device=device)
    ends = [0, 40, 40, 47, 130]
    options = {"n_buckets": 8, "chunk_size": 8, "n_hashes": 2, "is_causal": True, "impl": impl}
    packed = lsh_attention(
        q, None if shared else k, v, cu_seqlens=torch.tensor(ends, dtype=torch.int32, device=device), **options
    )
    for a, b in itertools.pairwise(ends):
        x, y, z = (t[:, :, a:b] for t in (q, k, v))
        alone = lsh_attention(x, None if shared else y, z, **options)
        if impl == "reference":
            assert_near(packed[:, :, a:b], alone, 2e-6)
        else:
            assert_same_bits(f"{a}..{b}", packed[:, :, a:b], alone)


# which keys a query sees


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("how", ["long chunk", "one bucket"])
def test_one_chunk_or_one_bucket_is_dense_shared_attention(how, causal, impl, device):
    x, _, v = qkv(L=60, device=device)
    options = {"chunk_size": 64} if how == "long chunk" else {"chunk_size": 60, "within": "bucket", "n_buckets": 4}
    if how == "one bucket":
        options["buckets"] = torch.full((2, 2, 4, 60), 3, device=device, dtype=torch.int32)
    output = lsh_attention(x, None, v, is_causal=causal, impl=impl, **options)
    allowed = ~torch.eye(60, dtype=torch.bool, device=device)
    allowed = allowed.tril() if causal else allowed
    allowed[0, 0] = causal
    keys = torch.nn.functional.normalize(x, dim=-1)
    assert_near(output, softmax_attention(x, keys, v, allowed, scale=1.0, impl="reference"), 1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_one_chunk_is_dense_attention_with_separate_keys(causal, impl, device):
    q, k, v = qkv(L=60, device=device)
    output = lsh_attention(q, k, v, chunk_size=64, is_causal=causal, impl=impl)
    assert_near(output, softmax_attention(q, k, v, is_causal=causal, impl="reference"), 1e-6)


def test_a_query_of_a_chunk_of_its_own_takes_its_own_value(impl, device):
    x, _, v = qkv(L=33, device=device)
    output = lsh_attention(x, None, v, chunk_size=1, look_back=0, look_ahead=0, impl=impl)
    assert_same_bits("output", output, v)


def test_rounds_that_count_each_time_combine_by_their_log_sum_exp(impl, device):
    case = LshCase("rounds", L=97, chunk_size=8, shared=False, dedupe=False, n_hashes=3)
    inputs = build_lsh(case, torch.float32, device)

    def one(inputs):
        """-> output, log-sum-exp"""
        call = prepare("lsh_attention", *inputs[:3], impl=impl, **inputs.options)
        if impl == "reference":
            count = reference.pair_counts(*call.buckets, None, None, **call.rounds.counted())
            return reference.attend(*inputs[:3], None, count, scale=call.scale, dropout_p=0.0, seed=0)
        options = Options(8, 1, 1, 0, False, SELF_ORDINARY, False, False, call.scale, 0.0, 0, impl)
        return torch.ops.longattn._softmax_forward(*inputs[:3], None, None, None, *orders(call), None, *options)

    whole, outputs, logs = one(inputs), [], []
    for r in range(3):
        buckets = tuple(x[:, :, r : r + 1] for x in inputs.options["buckets"])
        output, lse = one(changed(inputs, buckets=buckets, n_hashes=1))
        outputs.append(output)
        logs.append(lse)
    total = torch.logsumexp(torch.stack(logs), 0)
    combined = sum(torch.exp(lse - total)[..., None] * output for lse, output in zip(logs, outputs, strict=True))
    assert_near(whole[0], combined, 1e-6)
    assert_near(whole[1], total, 1e-6)


def test_a_key_met_in_two_rounds_counts_once_or_twice(impl, device):
    x, _, v = qkv(B=1, H=1, L=30, device=device)
    buckets = lsh_buckets(x, n_hashes=1, n_buckets=4, chunk_size=4, impl="reference")
    options = {"n_buckets": 4, "chunk_size": 4, "impl": impl, "is_causal": True}
    once = lsh_attention(x, None, v, n_hashes=1, buckets=buckets, **options)
    both = buckets.repeat(1, 1, 2, 1)
    for dedupe in (True, False):
        # the same keys in both rounds: twice the weight of all of them is no other weight
        assert_near(lsh_attention(x, None, v, n_hashes=2, buckets=both, dedupe=dedupe, **options), once, 1e-6)
    both[0, 0, 1] = both[0, 0, 1].flip(-1)
    once, twice = (lsh_attention(x, None, v, n_hashes=2, buckets=both, dedupe=d, **options) for d in (True, False))
    assert (once - twice).abs().max() > 1e-2


def test_recall_rises_with_rounds_to_all_of_the_mass(impl, device):
    g = torch.Generator().manual_seed(3)
    centres = torch.randn(1, 2, 16, 32, generator=g)
    x = (centres.repeat(1, 1, 32, 1) + torch.randn(1, 2, 512, 32, generator=g) / 4).to(device)
    for k in (None, x.flip(1)):
        recall = lsh_recall(x, k, n_hashes=6, chunk_size=16, impl=impl)
        assert recall.shape == (1, 2, 6)
        assert (recall.diff() >= 0).all()
        assert (recall[..., -1] > recall[..., 0] + 0.01).all()
    assert (lsh_recall(x, None, n_hashes=6, chunk_size=16, impl=impl)[..., -1] > 0.8).all()
    assert_near(lsh_recall(x, None, chunk_size=512, impl=impl), torch.ones(1, 2, 4, device=device), 1e-5)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"within": "bucket", "look_back": 0}], ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_recall_is_the_mass_of_the_pairs_counted(shared, options, impl, device):
    case = LshCase(f"recall, {shared}, {options}", L=70, shared=shared, chunk_size=8, mask="random", **options)
    inputs = build_lsh(case, torch.float64 if impl == "reference" else torch.float32, device).clean()
    public = {name: x for name, x in inputs.options.items() if name not in ("wrap", "norm_eps")}
    recall = lsh_recall(*inputs[:2], **public, impl=impl)
    for r in range(case.n_hashes):
        buckets = inputs.options["buckets"]
        part = tuple(x[:, :, : r + 1] for x in buckets) if isinstance(buckets, tuple) else buckets[:, :, : r + 1]
        met = counts(changed(inputs, n_hashes=r + 1, buckets=part)) > 0
        everything = changed(inputs, chunk_size=case.L, within="window", n_hashes=r + 1, buckets=part)
        dense = counts(everything) > 0
        call = prepare("recall", *inputs[:3], impl="reference", **inputs.options)
        keys = reference.unit_keys(inputs.q) if shared else inputs.k
        scores = torch.where(dense, call.scale * inputs.q @ keys.mT, -math.inf)
        p = torch.where(dense.any(-1, keepdim=True), torch.softmax(scores, -1).nan_to_num(), 0)
        expected = (p * met).sum((-1, -2)) / dense.any(-1).sum(-1)
        assert_near(recall[..., r], expected, 2e-5)


# numbers that spoil others


@BOTH
@pytest.mark.parametrize("where", ["k", "v"])
def test_a_nan_reaches_only_the_queries_that_see_it(case, where, kernel, device):
    inputs, bad = build_lsh(case, torch.float32, device), 30
    x = {"k": inputs.q if case.shared else inputs.k, "v": inputs.v}[where].clone()
    x[:, :, bad] = NAN
    spoilt = inputs._replace(**{("q" if case.shared else "k") if where == "k" else "v": x})
    sees = counts(inputs)[..., bad] > 0
    if case.shared and where == "k":
        sees[..., bad] = True
    assert 0 < sees.sum() < 0.7 * sees.numel()
    clean, output = attend(inputs, kernel), attend(spoilt, kernel)
    assert output[sees].isnan().all()
    assert_same_bits("output", output[~sees], clean[~sees])


def test_a_nan_in_a_query_never_reaches_the_sort(impl, device):
    x, k, v = qkv(B=1, H=1, L=65, device=device)
    options = {"n_hashes": 2, "chunk_size": 8, "n_buckets": 8}
    bad = x.clone()
    bad[0, 0, 20] = NAN
    bad[0, 0, 40] = math.inf
    for keys in (None, k):
        clean, spoilt = (prepare("x", y, keys, v, impl=impl, **options) for y in (x, bad))
        for found in (orders(clean), orders(spoilt)):
            assert (found.order_q.sort(-1).values == torch.arange(65, device=device)).all()
    buckets = lsh_buckets(bad, impl=impl, **options)
    assert ((buckets >= 0) & (buckets < 8)).all()
    assert (buckets[..., 20] == 0).all()
    others = torch.arange(65, device=device) % 20 != 0
    assert_same_bits("buckets", buckets[..., others], lsh_buckets(x, impl=impl, **options)[..., others])


@pytest.mark.parametrize("causal", [False, True])
def test_zero_vectors_give_finite_results_and_gradients(causal, impl, device):
    x, _, v = qkv(L=50, device=device)
    x[:, :, ::3] = 0
    x.requires_grad_()
    output = lsh_attention(x, None, v, chunk_size=8, is_causal=causal, impl=impl)
    (dx,) = torch.autograd.grad(output.square().sum(), x)
    assert output.isfinite().all()
    assert dx.isfinite().all()
    nothing = lsh_attention(torch.zeros_like(x), None, v, chunk_size=64, impl=impl)
    mean = (v.sum(2, keepdim=True) - v) / 49
    assert_near(nothing, mean, 1e-6)


@pytest.mark.parametrize("size", [2.0**-40, 2.0**40])
def test_keys_have_unit_length_at_any_length_of_the_query(size, impl, device):
    x, _, v = qkv(L=50, device=device)
    x = torch.nn.functional.normalize(x, dim=-1)
    options = {"chunk_size": 8, "n_buckets": 8, "impl": impl}
    options["buckets"] = lsh_buckets(x, chunk_size=8, n_buckets=8, impl=impl)
    # keys, not queries, are divided by their length
    expected = lsh_attention(x, None, v, scale=1.0, **options)
    assert_near(lsh_attention(x * size, None, v, scale=1 / size, **options), expected, 1e-5)


def test_logits_of_minus_1e9_beat_padded_keys(impl, device):
    q, k = torch.ones(1, 1, 40, 4, device=device), torch.full((1, 1, 40, 4), -2.5e8, device=device)
    v = draw((1, 1, 40, 3), device=device)[0]
    padded = torch.arange(40, device=device)[None] % 2 == 1
    k[:, :, 1::2], v[:, :, 1::2] = 0, 1e6
    output = lsh_attention(q, k, v, scale=1.0, chunk_size=64, key_padding_mask=padded, impl=impl)
    assert_near(output, v[:, :, ::2].mean(2, keepdim=True).expand_as(v), 1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_identical_tokens_and_one_bucket_for_all_are_ordinary_input(shared, impl, device):
    x = draw((1, 2, 1, 8), device=device)[0].expand(1, 2, 100, 8)
    v = draw((1, 2, 100, 4), seed=1, device=device)[0]
    output = lsh_attention(x, None if shared else x, v, chunk_size=16, look_ahead=0, look_back=0, impl=impl)
    for start in range(0, 100, 16):
        part = v[:, :, start : start + 16]
        mean = part.mean(2, keepdim=True).expand_as(part)
        n = part.shape[2]
        expected = (part.sum(2, keepdim=True) - part) / (n - 1) if shared else mean
        assert_near(output[:, :, start : start + 16], expected, 1e-6)


# dropout


def test_dropout_drops_the_share_it_is_asked_for(impl, device):
    x, _, _ = qkv(B=1, H=2, L=256, device=device)
    v = torch.ones(1, 2, 256, 1, device=device)
    kept = lsh_attention(x * 0, None, v, chunk_size=256, dropout_p=0.25, seed=5, impl=impl)
    # the mean of 255 weights that are 0 or 4/3 as often as not
    assert abs(kept.mean() - 1) < 0.01
    assert 0.02 < kept.std() < 0.06
    assert not torch.equal(kept[:, 0], kept[:, 1])
    other = lsh_attention(x * 0, None, v, chunk_size=256, dropout_p=0.25, seed=5 + 2**32, impl=impl)
    assert not torch.equal(kept, other)


def test_dropping_everything_gives_0_and_gradient_0(impl, device):
    x, _, v = qkv(L=20, device=device)
    x.requires_grad_()
    output = lsh_attention(x, None, v, chunk_size=8, dropout_p=1.0, impl=impl)
    (dx,) = torch.autograd.grad(output.sum(), x)
    assert (output == 0).all()
    assert (dx == 0).all()


# engines


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to wait for")
@pytest.mark.parametrize("shared", [True, False])
def test_nothing_waits_for_the_device(shared):
    q, k, v = qkv(L=300, device="cuda")
    mask = torch.arange(300, device="cuda").expand(2, -1) % 7 == 0
    options = {"key_padding_mask": mask, "is_causal": True, "impl": "triton"}
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def call():
        output = lsh_attention(q, None if shared else k, v, **options)
        torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)

    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_explain_names_the_engine_and_what_sorts():
    x, _, v = qkv(L=9)
    told = explain(lsh_attention, x, None, v, impl="reference")
    assert told.chosen == "reference"
    assert "sorted by torch (reference)" in str(told)
    usual = explain(lsh_attention, x, None, v)
    assert usual.reasons["cuda"]
    expected = "counting sort" if _lsh.sorter("cpu") == "cpu" else "torch.sort(stable=True)"
    assert usual.chosen == "reference" or expected in str(usual)


# torch deprecates parts of itself that forward mode loads
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*only the dense reference can run here")
def test_derivatives_the_kernels_do_not_have_are_the_references_and_never_zero():
    q, _, v = (x.double() for x in qkv(L=100, D=8, E=8))
    leaf = q.clone().requires_grad_()
    # the last of them runs in our own kernel otherwise, and here in torch's, which know no forward mode
    for forward_mode, call in (
        (True, lambda q: lsh_attention(q, None, v).square().sum()),
        (True, lambda q: linear_attention(q, q, v).square().sum()),
        (False, lambda q: softmax_attention(q, q, v).square().sum()),
    ):
        expected = torch.autograd.grad(call(leaf), leaf)[0]
        assert expected.abs().max() > 0
        torch.testing.assert_close(torch.func.grad(call)(q), expected)
        if forward_mode:
            _, along = torch.func.jvp(call, (q,), (torch.ones_like(q),))
            torch.testing.assert_close(along, expected.sum())
    for call in (lsh_attention, linear_attention):
        with pytest.raises(ValueError, match=r"impl='cpu' cannot run this call: torch.func's derivatives"):
            torch.func.jvp(lambda q, call=call: call(q, q, v, impl="cpu"), (q,), (q,))


def test_an_own_key_without_weight_hands_nothing_on(kernel, device):
    q, k, v = qkv(B=1, H=1, L=6, D=4, device=device)
    k[:, :, 5], v[:, :, 5] = -1e6 * q[:, :, 5], NAN
    leaves = [x.requires_grad_() for x in (q, k, v)]
    output = lsh_attention(*leaves, is_causal=True, chunk_size=16, impl=kernel)
    assert output[:, :, 5].isfinite().all()
    dq, dk, _ = torch.autograd.grad(output[:, :, 5].sum(), leaves)
    assert dq.isfinite().all()
    assert dk.isfinite().all()
