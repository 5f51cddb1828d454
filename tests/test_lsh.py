"""LSH attention on every engine and dtype: error budgets, pairs against loops, layouts, torch's transformations."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from longattn import lsh_attention
from longattn.ops._tiles import SELF_ALWAYS, SELF_FALLBACK, Options
from longattn.ops.lsh import orders, prepare, run
from longattn.reference import lsh as reference
from longattn.testing.assertions import assert_same_bits
from longattn.testing.cases import DTYPES, LAYOUTS, draw, lay_out, qkv
from longattn.testing.lsh import COMBINATIONS, LSH, LshCase, LshInputs, build_lsh, check_lsh, evaluate_lsh, run_lsh

BY_NAME = {case.name: case for case in LSH}
# one of each kind, for properties that no shape should change
FEW = [
    BY_NAME[name]
    for name in ("random masked, causal=True", "separate, GQA causal", "packed, not causal", "packed, separate")
]


def named(cases):
    return [pytest.param(case, id=case.name) for case in cases]


def short(dtype):
    return str(dtype).removeprefix("torch.")


def same_bits(actual, expected):
    for name, x in expected.items():
        assert_same_bits(name, actual[name], x)


@pytest.fixture(params=DTYPES, ids=short)
def dtype(request, device):
    if request.param == torch.float64 and device == "cuda":
        pytest.skip("float64 runs on cpu and reference only")
    return request.param


@pytest.mark.parametrize("case", named(LSH))
def test_errors_stay_within_the_budget(case, kernel, dtype, device):
    check_lsh(case, dtype, kernel, device)


@pytest.mark.parametrize("case", named(LSH[::3]))
def test_errors_of_the_reference_stay_within_the_budget(case):
    check_lsh(case, torch.float32, "reference")


@pytest.mark.parametrize("case", named(COMBINATIONS))
def test_every_combination_of_rules_stays_within_the_budget(case, kernel, device):
    check_lsh(case, torch.float32, kernel, device)


# pairs against loops


def sequences_of(lengths, cu_seqlens):
    if cu_seqlens is None:
        return [tuple(range(n) for n in lengths)]
    ends = cu_seqlens.tolist()
    return [(range(a, b), range(a, b)) for a, b in itertools.pairwise(ends)]


def chunks_by_hand(bucket_q, bucket_k, padded, cu_seqlens, c):
    """The definition in loops. -> chunk at the centre of each query, chunk of each key, orders of both"""
    L, S = len(bucket_q), len(bucket_k)
    rank_q, rank_k, order_q, order_k = [None] * L, [None] * S, [], []
    hidden = [L == S and padded[i] for i in range(L)]
    for queries, keys in sequences_of((L, S), cu_seqlens):
        by_key = sorted(keys, key=lambda j: (padded[j], bucket_k[j] if not padded[j] else 0, j))
        by_query = sorted(queries, key=lambda i: (hidden[i], bucket_q[i], i))
        order_q, order_k = order_q + by_query, order_k + by_key
        for place, j in enumerate(by_key):
            rank_k[j] = place // c
        for place in range(0, len(by_query), c):
            first = by_query[place]
            like = [i for i in by_query if (hidden[i], bucket_q[i]) == (hidden[first], bucket_q[first])]
            here = sum(bucket_k[j] == bucket_q[first] and not padded[j] for j in keys)
            before = sum(bucket_k[j] < bucket_q[first] and not padded[j] for j in keys)
            aligned = before + like.index(first) * here // len(like)
            for i in by_query[place : place + c]:
                rank_q[i] = min((aligned + c // 2) // c, max((sum(not padded[j] for j in keys) - 1) // c, 0))
    return rank_q, rank_k, order_q, order_k


PAIRS = (
    LshCase("pairs", L=29, chunk_size=4, mask="random"),
    LshCase("pairs, separate", L=29, chunk_size=4, shared=False, mask="random"),
    LshCase("pairs, separate, causal", L=29, chunk_size=5, shared=False, mask="random", is_causal=True, dedupe=False),
    LshCase("pairs, cross", L=13, S=31, chunk_size=4, shared=False, mask="random", groups=2, within="bucket"),
    LshCase("pairs, cross, few keys", L=31, S=3, chunk_size=4, shared=False, groups=2),
    LshCase("pairs, packed", B=1, L=30, lengths=(7, 0, 1, 22), chunk_size=4, mask="random", is_causal=True),
    LshCase("pairs, packed, separate", B=1, L=30, lengths=(0, 7, 1, 22, 0), chunk_size=3, shared=False, mask="random"),
    LshCase("pairs, counted", L=40, chunk_size=3, look_back=2, look_ahead=0, dedupe=False, is_causal=True),
    LshCase("pairs, one bucket", L=21, chunk_size=4, shared=False, crowded=True),
)


def prepared(case, impl="reference", dtype=torch.float32, device="cpu"):
    inputs = build_lsh(case, dtype, device)
    return inputs, prepare("lsh_attention", *inputs[:3], impl=impl, **inputs.options)


@pytest.mark.parametrize("case", named(PAIRS))
def test_orders_and_ranks_are_those_of_the_definition(case, impl, device):
    _, call = prepared(case, impl, device=device)
    found = orders(call)
    S = call.v.shape[2]
    for b in range(case.B):
        padded = [False] * S if call.mask is None else call.mask[b].tolist()
        for h in range(case.H * case.groups):
            key_head = h // case.groups
            for r in range(case.n_hashes):
                bucket_q = call.buckets[0][b, h, r].tolist()
                bucket_k = bucket_q if case.shared else call.buckets[1][b, key_head, r].tolist()
                rank_q, rank_k, order_q, order_k = chunks_by_hand(
                    bucket_q, bucket_k, padded, call.cu_seqlens, case.chunk_size
                )
                assert found.order_q[b, h, r].tolist() == (order_k if case.shared else order_q)
                assert found.rank_k[b, key_head, r].tolist() == rank_k
                if case.shared:
                    assert found.rank_q[b, h, r].tolist() == rank_k
                else:
                    assert found.order_k[b, key_head, r].tolist() == order_k
                    assert found.rank_q[b, h, r].tolist() == rank_q


@pytest.mark.parametrize("case", named(PAIRS))
def test_the_reference_counts_the_pairs_of_the_definition(case):
    _, call = prepared(case)
    count = reference.pair_counts(*call.buckets, call.mask, call.cu_seqlens, **call.rounds.counted())
    S, ahead = call.v.shape[2], call.rounds.look_ahead
    for b in range(case.B):
        padded = [False] * S if call.mask is None else call.mask[b].tolist()
        for h in range(case.H * case.groups):
            expected = torch.zeros(case.L, S, dtype=torch.int64)
            for r in range(case.n_hashes):
                bucket_q = call.buckets[0][b, h, r].tolist()
                bucket_k = bucket_q if case.shared else call.buckets[1][b, h // case.groups, r].tolist()
                rank_q, rank_k, _, _ = chunks_by_hand(bucket_q, bucket_k, padded, call.cu_seqlens, case.chunk_size)
                rank_q = rank_k if case.shared else rank_q
                for queries, keys in sequences_of((case.L, S), call.cu_seqlens):
                    for i in queries:
                        for j in keys:
                            seen = -case.look_back <= rank_k[j] - rank_q[i] <= ahead and not padded[j]
                            seen = seen and (j <= i or not case.is_causal) and not (case.shared and padded[i])
                            seen = seen and (case.within == "window" or bucket_q[i] == bucket_k[j])
                            expected[i, j] += seen
            expected = expected.clamp(max=1) if case.dedupe else expected
            for i in range(case.L if case.shared or (case.is_causal and case.L == S) else 0):
                expected[i, i] = 0
                expected[i, i] = not padded[i] and (not case.shared or not expected[i].any())
            assert torch.equal(count[b, h], expected)


# layouts


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", named(FEW))
def test_any_strides_equal_contiguous(case, layout, impl, device):
    inputs = build_lsh(case, torch.float32, device)
    # without buckets, so that lengths and hash meet the strides too
    inputs.options["buckets"] = None
    laid = {name: lay_out(x, layout) for name, x in inputs._asdict().items() if isinstance(x, torch.Tensor)}
    plain = {name: x.contiguous() for name, x in laid.items()}
    same_bits(run_lsh(inputs._replace(**laid), impl), run_lsh(inputs._replace(**plain), impl))


@pytest.mark.parametrize("case", named(FEW))
def test_any_strides_of_masks_buckets_and_boundaries_equal_contiguous(case, impl, device):
    inputs = build_lsh(case, torch.float32, device)

    def strange(x):
        if isinstance(x, tuple):
            return tuple(map(strange, x))
        return x.repeat_interleave(2, -1)[..., ::2] if isinstance(x, torch.Tensor) else x

    options = {name: strange(x) for name, x in inputs.options.items()}
    same_bits(run_lsh(inputs._replace(options=options), impl), run_lsh(inputs, impl))


def test_inputs_are_left_as_they_were(impl, device):
    inputs = build_lsh(FEW[-1], torch.float32, device)
    tensors = [inputs.q, inputs.v, inputs.grad_output, inputs.options["key_padding_mask"], *inputs.options["buckets"]]
    before = [x.clone() for x in tensors]
    run_lsh(inputs, impl)
    for x, y in zip(tensors, before, strict=True):
        assert_same_bits("input", x, y)


def test_without_gradients_the_same_bits(impl, device):
    for case in FEW:
        inputs = build_lsh(case, torch.float32, device)
        with torch.no_grad():
            output = run(prepare("lsh_attention", *inputs[:3], impl=impl, **inputs.options))
        assert_same_bits("output", output, run_lsh(inputs, impl)["output"])


# gradients

GRADCHECK = (
    LshCase("gradcheck", B=1, H=2, L=9, D=3, E=2, chunk_size=3, n_buckets=4, is_causal=True, mask="random"),
    LshCase("gradcheck, D=1", B=1, H=1, L=7, D=1, E=1, chunk_size=3, n_buckets=4, n_hashes=2),
    LshCase("gradcheck, counted", B=1, H=1, L=9, D=2, E=2, chunk_size=2, n_buckets=2, dedupe=False, scale=1.7),
    LshCase("gradcheck, separate", B=1, H=1, L=8, D=2, E=3, groups=2, chunk_size=3, n_buckets=4, shared=False,
            mask="random", is_causal=True),
    LshCase("gradcheck, cross", B=1, H=1, L=4, S=7, D=2, E=2, chunk_size=2, n_buckets=2, shared=False, within="bucket"),
    LshCase("gradcheck, packed, dropout", B=1, H=1, L=9, D=2, E=2, lengths=(4, 0, 5), chunk_size=2, dropout_p=0.3),
    LshCase("gradcheck, wrapped", B=1, H=1, L=8, D=2, E=2, chunk_size=2, wrap=True, dedupe=False, norm_eps=0.1),
)  # fmt: skip


@pytest.mark.parametrize("case", named(GRADCHECK))
def test_gradients_are_those_of_the_function(case, impl, device):
    if device == "cuda":
        pytest.skip("float64 runs on cpu and reference only")
    inputs = build_lsh(case, torch.float64).clean()
    leaves = [x.requires_grad_() for x in inputs[:3] if x is not None]

    def call(q, *rest):
        k, v = rest if len(rest) == 2 else (None, *rest)
        return run(prepare("lsh_attention", q, k, v, impl=impl, **inputs.options))

    assert gradcheck(call, leaves, nondet_tol=0.0)


def test_a_second_derivative_of_the_kernels_is_refused_in_a_sentence(kernel, device):
    x, v = qkv(L=9, device=device)[::2]
    x.requires_grad_()
    output = lsh_attention(x, None, v, chunk_size=4, impl=kernel)
    (dx,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use impl='reference'"):
        dx.sum().backward()


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_each_gradient_alone_equals_all_together(wanted, impl, device):
    inputs = build_lsh(FEW[1], torch.float32, device)
    tensors = {name: x.clone() for name, x in zip("qkv", inputs[:3], strict=True)}
    leaf = tensors[wanted].requires_grad_()
    output = run(prepare("lsh_attention", *tensors.values(), impl=impl, **inputs.options))
    (grad,) = torch.autograd.grad(output, leaf, inputs.grad_output)
    assert_same_bits(wanted, grad, run_lsh(inputs, impl)[f"d{wanted}"])


@pytest.mark.parametrize("changed", ["q", "v"])
def test_an_input_changed_before_backward_raises_the_version_error(changed, kernel, device):
    q, _, v = qkv(L=9, device=device)
    tensors = {"q": q, "v": v}
    leaves = [x if name == changed else x.requires_grad_() for name, x in tensors.items()]
    output = lsh_attention(leaves[0], None, leaves[1], impl=kernel)
    tensors[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# torch's transformations


@pytest.mark.parametrize("case", named(FEW))
def test_raw_ops_pass_opcheck(case, kernel, device):
    inputs, call = prepared(case, kernel, device=device)
    q, k, v = inputs.clean()[:3]
    lengths = torch.ops.longattn._lsh_lengths(q)
    found = orders(call)
    rule = SELF_FALLBACK if k is None else SELF_ALWAYS
    options = Options(case.chunk_size, 1, 0, 0, case.is_causal, rule, case.dedupe, False, 0.7, 0.1, 3, kernel)
    tensors = (q, k, v, call.mask, call.cu_seqlens, None if k is not None else 1 / (lengths + 1), *found, None)
    torch.library.opcheck(torch.ops.longattn._softmax_forward, (*tensors, *options))
    saved = torch.ops.longattn._softmax_forward(*tensors, *options)
    torch.library.opcheck(torch.ops.longattn._softmax_backward, (inputs.grad_output, *tensors, *saved, *options))


def test_raw_ops_of_hash_and_sort_pass_opcheck(kernel, device):
    (x,) = draw((2, 3, 37, 5), device=device)
    rotations = torch.ops.longattn._lsh_rotations(x, 3, 2, 6, 4, 7)
    torch.library.opcheck(torch.ops.longattn._lsh_rotations, (x, 3, 2, 6, 4, 7))
    torch.library.opcheck(torch.ops.longattn._lsh_lengths, (x,))
    torch.library.opcheck(torch.ops.longattn._lsh_hash, (x, x[..., 0].contiguous(), rotations, [2, 6], kernel))
    keys = torch.ops.longattn._lsh_hash(x, None, rotations, [2, 6], kernel)
    for cu_seqlens in (None, torch.tensor([0, 5, 5, 37], dtype=torch.int32, device=device)):
        keys = keys if cu_seqlens is None else keys[:1]
        torch.library.opcheck(torch.ops.longattn._lsh_sort, (keys, 12, cu_seqlens, 7))


# torch deprecates parts of itself that its tracing and its compiler use
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("shared", [True, False])
def test_compiles_whole_with_dynamic_lengths_and_gradients(shared, kernel, device):
    torch._dynamo.reset()

    def call(q, k, v):
        return lsh_attention(q * 2, None if shared else k, v, n_hashes=2, chunk_size=16, is_causal=True, impl=kernel)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    # the last has another number of buckets, which is another graph: once is enough
    for L in (70, 100, 130) if shared else (70, 100):
        leaves = [x.requires_grad_() for x in qkv(L=L, D=8, E=8, device=device, seed=L)]
        results = []
        for f in (call, compiled):
            output = f(*leaves)
            grads = torch.autograd.grad(output.square().sum(), leaves, allow_unused=True)
            results.append([output, *(x for x in grads if x is not None)])
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_packed_and_masked_calls_compile_whole(kernel, device):
    torch._dynamo.reset()
    q, k, v = qkv(B=1, L=90, device=device)
    cu_seqlens = torch.tensor([0, 30, 90], dtype=torch.int32, device=device)
    options = {"cu_seqlens": cu_seqlens, "key_padding_mask": torch.arange(90, device=device)[None] % 5 == 0}
    options |= {"chunk_size": 8, "n_buckets": 8, "impl": kernel, "within": "bucket"}
    compiled = torch.compile(lsh_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    assert_same_bits("output", compiled(q, k, v, **options), lsh_attention(q, k, v, **options))


def test_one_graph_serves_the_lengths_of_one_number_of_buckets(kernel, device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(lsh_attention, fullgraph=True, dynamic=True, backend=counter)
    for L in (300, 400, 257, 512, 311):
        x, _, v = qkv(B=1, L=L, D=4, device=device)
        options = {"n_hashes": 1, "chunk_size": 64, "impl": kernel}
        assert_same_bits("output", call(x, None, v, **options), lsh_attention(x, None, v, **options))
    assert counter.frame_count <= 2


def test_checkpointing_changes_no_bit(impl, device):
    inputs = build_lsh(FEW[0], torch.float32, device)

    def call(q, k, v):
        return run(prepare("lsh_attention", q, k, v, impl=impl, **inputs.options))

    plain = evaluate_lsh(inputs, call)
    same_bits(evaluate_lsh(inputs, lambda *qkv: checkpoint(call, *qkv, use_reentrant=False)), plain)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("case", named(FEW[:2]))
def test_autocast_equals_inputs_of_its_dtype(case, low, impl, device):
    inputs = build_lsh(case, torch.float32, device)
    inputs.options["buckets"] = None
    expected = run(prepare("lsh_attention", *inputs.to(low)[:3], impl=impl, **inputs.options))
    with torch.autocast(device, low):
        got = run(prepare("lsh_attention", *inputs[:3], impl=impl, **inputs.options))
    assert got.dtype == low
    assert_same_bits("output", got, expected)


def test_autocast_leaves_float64_alone():
    x, _, v = qkv(B=1, L=5, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert lsh_attention(x, None, v, impl="reference").dtype == torch.float64


@pytest.mark.parametrize("case", named(FEW))
def test_fake_tensors_tell_shapes_and_dtypes(case, kernel, device):
    inputs = build_lsh(case, torch.bfloat16, device)
    inputs.options["buckets"] = None
    real = run_lsh(inputs, kernel)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:

        def fake(x):
            return mode.from_tensor(x) if isinstance(x, torch.Tensor) else x

        options = {name: fake(x) for name, x in inputs.options.items()}
        told = run_lsh(LshInputs(*map(fake, inputs[:3]), options, fake(inputs.grad_output)), kernel)
    for name, x in real.items():
        assert (told[name].shape, told[name].dtype, told[name].device) == (x.shape, x.dtype, x.device), name
