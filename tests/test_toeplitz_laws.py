"""Linear attention with relative positions: what a row may depend on, gradients, and what torch asks of an op."""

from itertools import pairwise

import pytest
import torch
from _toeplitz import Way, bias_of, every_way, kernel_ways, local_ways, modes, named
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from longattn import linear_attention
from longattn.testing.assertions import assert_near, assert_same_bits
from longattn.testing.cases import LAYOUTS, lay_out, qkv
from longattn.testing.toeplitz import BY_NAME, ToeplitzCase, build_toeplitz, evaluate_toeplitz, run_toeplitz

NAN, INF = float("nan"), float("inf")


# what a row may depend on


@local_ways
@pytest.mark.parametrize("value", [3.0, NAN])
def test_future_tokens_never_change_a_past_bit(value, way):
    q, k, v = qkv(B=1, L=200, device=way.device)
    options = {"rpe_bias": bias_of(reach=40, device=way.device), "is_causal": True, **way.options}
    expected = linear_attention(q, k, v, **options)
    for t in (0, 1, 63, 64, 65, 105, 150, 199):
        for changed in ("qkv", "k", "v"):
            tensors = {name: x.clone() for name, x in zip("qkv", (q, k, v), strict=True)}
            for name in changed:
                tensors[name][:, :, t:] = value
            output = linear_attention(*tensors.values(), **options)
            assert_same_bits(f"the past of token {t}", output[:, :, :t], expected[:, :, :t])
            assert t == 0 or not torch.equal(output[:, :, t:], expected[:, :, t:])


@every_way
def test_offsets_of_the_future_are_never_read(way):
    inputs = build_toeplitz(BY_NAME["causal, L=130, reach 40"], torch.float32, way.device)
    bias = inputs.bias.clone()
    bias[:, 41:] = 500.0
    expected = run_toeplitz(inputs, *way)
    for name, x in run_toeplitz(inputs._replace(bias=bias), *way).items():
        assert_same_bits(name, x, expected[name])


@every_way
def test_gradients_of_the_past_are_blind_to_later_queries(way):
    q, k, v = (x.requires_grad_() for x in qkv(B=1, L=200, device=way.device))
    bias = bias_of(reach=40, device=way.device).requires_grad_()
    output = linear_attention(q, k, v, is_causal=True, rpe_bias=bias, **way.options)
    for t in (0, 63, 64, 100, 199):
        dq, dk, dv, dbias = torch.autograd.grad(output[:, :, t].sum(), (q, k, v, bias), retain_graph=True)
        assert dq[:, :, torch.arange(200, device=way.device) != t].count_nonzero() == 0
        for x in (dk, dv):
            assert x[:, :, : t + 1].isfinite().all()
            # the FFT rounds
            assert t == 199 or x[:, :, t + 1 :].abs().max() <= (1e-5 if way.method == "fft" else 0)
        assert dbias[:, 41:].count_nonzero() == 0


@every_way
@modes
def test_what_padded_keys_hold_changes_no_bit(is_causal, way):
    q, k, v = qkv(L=150, device=way.device)
    mask = torch.rand(2, 150, generator=torch.Generator().manual_seed(1)).to(way.device) < 0.5
    inputs = build_toeplitz(ToeplitzCase("padded", L=150, D=8, E=12, is_causal=is_causal), torch.float32, way.device)
    inputs = inputs._replace(q=q, options={**inputs.options, "key_padding_mask": mask})
    results = []
    for value in (0, 1e4, INF, NAN):
        kp, vp = (x.masked_fill(mask[:, None, :, None], value) for x in (k, v))
        results.append(run_toeplitz(inputs._replace(k=kp, v=vp), *way))
        for name, x in results[0].items():
            assert_same_bits(name, results[-1][name], x)
        for name in ("dk", "dv"):
            assert results[-1][name].transpose(1, 2)[mask].count_nonzero() == 0
            assert (results[-1][name].transpose(1, 2)[~mask] != 0).any(-1).all()


@local_ways
@modes
def test_appending_padding_changes_no_bit(is_causal, way, three_threads):
    case = {"D": 8, "E": 12, "is_causal": is_causal}
    for L, reach in ((100, 30), (700, 30), (600, 200)):
        inputs = build_toeplitz(ToeplitzCase("short", L=L, reach=reach, **case), torch.float32, way.device)
        short = run_toeplitz(inputs, *way)
        for extra in (1, 28, 900):
            more = build_toeplitz(ToeplitzCase("padding", L=extra, reach=reach, **case), torch.float32, way.device)
            names = ("q", "k", "v", "grad_output")
            tensors = {name: torch.cat([getattr(inputs, name), getattr(more, name)], 2) for name in names}
            tensors["grad_output"][:, :, L:] = 0
            mask = (torch.arange(L + extra, device=way.device) >= L).expand(2, -1)
            options = {**inputs.options, "key_padding_mask": mask}
            long = run_toeplitz(inputs._replace(**tensors, options=options), *way)
            for name in ("output", "dq", "dk", "dv"):
                assert_same_bits(name, long[name][:, :, :L], short[name])
            for name in ("dk", "dv"):
                assert long[name][:, :, L:].count_nonzero() == 0


@every_way
@modes
def test_packed_sequences_equal_separate_calls(is_causal, way, three_threads):
    lengths = (70, 1, 0, 130)
    case = ToeplitzCase("packed", B=1, H=1, L=201, lengths=lengths, is_causal=is_causal, groups=2, reach=30)
    inputs = build_toeplitz(case, torch.float32, way.device)
    packed, dbias = run_toeplitz(inputs, *way), 0
    for start, stop in pairwise(inputs.options["cu_seqlens"].tolist()):
        tensors = {name: getattr(inputs, name)[:, :, start:stop] for name in ("q", "k", "v", "grad_output")}
        alone = run_toeplitz(inputs._replace(**tensors, options={**inputs.options, "cu_seqlens": None}), *way)
        dbias = dbias + alone["dbias"]
        for name in ("output", "dq", "dk", "dv"):
            got = packed[name][:, :, start:stop]
            if way.impl == "reference" or way.method == "fft":
                torch.testing.assert_close(got, alone[name], rtol=1e-4, atol=1e-5)
            else:
                assert_same_bits(name, got, alone[name])
    assert_near(packed["dbias"], dbias, 1e-4)


@kernel_ways
@modes
def test_a_sequence_has_the_same_bits_alone(is_causal, way, three_threads):
    case = ToeplitzCase("batch", B=4, H=3, L=300, is_causal=is_causal, reach=50)
    inputs = build_toeplitz(case, torch.bfloat16, way.device)
    together = run_toeplitz(inputs, *way)
    for i in (0, 3):
        rows = {name: getattr(inputs, name)[i : i + 1] for name in ("q", "k", "v", "grad_output")}
        alone = run_toeplitz(inputs._replace(**rows), *way)
        for name in ("output", "dq", "dk", "dv"):
            assert_same_bits(name, together[name][i : i + 1], alone[name])


@kernel_ways
def test_repeated_runs_and_any_number_of_threads_give_the_same_bits(way):
    inputs = build_toeplitz(ToeplitzCase("repeat", H=3, L=400, is_causal=True, reach=50), torch.float32, way.device)
    first = run_toeplitz(inputs, *way)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for name, x in run_toeplitz(inputs, *way).items():
            assert_same_bits(name, x, first[name])


@every_way
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_equal_contiguous(layout, way):
    for name in ("causal, GQA", "random masked, causal=False"):
        inputs = build_toeplitz(BY_NAME[name], torch.float32, way.device)
        laid = {name: lay_out(getattr(inputs, name), layout) for name in ("q", "k", "v", "grad_output")}
        plain = run_toeplitz(inputs._replace(**{name: x.contiguous() for name, x in laid.items()}), *way)
        for name, x in run_toeplitz(inputs._replace(**laid), *way).items():
            assert_same_bits(name, x, plain[name])


# gradients

GRADCHECK = (
    ToeplitzCase("gradcheck causal", B=1, H=1, L=7, D=2, E=2, is_causal=True, reach=2, groups=2),
    ToeplitzCase("gradcheck masked", B=2, H=1, L=4, S=6, D=2, E=2, mask="random", reach=1),
    ToeplitzCase("gradcheck scaled", B=1, H=2, L=5, D=2, E=1, is_causal=True, normalize=False, scale=0.7, reach=6),
    ToeplitzCase("gradcheck packed", B=1, H=1, L=7, D=2, E=2, lengths=(4, 0, 3), reach=2, shared=True),
)


def differentiable(case, way):
    inputs = build_toeplitz(case, torch.float64).double()
    names = {**way.options, **inputs.options}
    tensors = [x.requires_grad_() for x in inputs[:4]]
    return lambda q, k, v, bias: linear_attention(q, k, v, rpe_bias=bias, **names), tensors


@every_way
@pytest.mark.parametrize("case", named(GRADCHECK))
def test_gradients_are_those_of_the_function(case, way):
    if way.device == "cuda":
        pytest.skip("float64 runs on cpu and reference only")
    call, tensors = differentiable(case, way)
    # every entry for one, a random direction for those that the table holds to the same numbers
    assert gradcheck(call, tensors, nondet_tol=0.0, fast_mode=way.method != "prefix")


def test_the_reference_has_a_second_derivative():
    assert gradgradcheck(*differentiable(GRADCHECK[2], Way("reference", "auto")))


@kernel_ways
def test_a_second_derivative_of_the_kernels_is_refused_in_a_sentence(way):
    inputs = build_toeplitz(GRADCHECK[0], torch.float32, way.device)
    bias = inputs.bias.requires_grad_()
    output = linear_attention(*inputs[:3], rpe_bias=bias, **way.options, **inputs.options)
    (grad,) = torch.autograd.grad(output.square().sum(), bias, create_graph=True)
    with pytest.raises(RuntimeError, match=r"linear_attention: .*no second derivative; use impl='reference'"):
        grad.sum().backward()


@kernel_ways
def test_each_gradient_alone_equals_all_together(way):
    inputs = build_toeplitz(BY_NAME["causal, GQA"], torch.float32, way.device)
    every = run_toeplitz(inputs, *way)
    for wanted in ("q", "k", "v", "bias"):
        tensors = inputs._asdict()
        leaf = tensors[wanted] = tensors[wanted].clone().requires_grad_()
        q, k, v, bias, *_ = tensors.values()
        output = linear_attention(q, k, v, rpe_bias=bias, **way.options, **inputs.options)
        (grad,) = torch.autograd.grad(output, leaf, inputs.grad_output)
        assert_same_bits(wanted, grad, every[f"d{wanted}"])


@every_way
def test_inputs_are_left_as_they_were(way):
    inputs = build_toeplitz(BY_NAME["causal, packed with everything"], torch.float32, way.device)
    tensors = [*inputs[:4], inputs.grad_output, *(x for x in inputs.options.values() if isinstance(x, torch.Tensor))]
    before = [x.clone() for x in tensors]
    run_toeplitz(inputs, *way)
    for x, y in zip(tensors, before, strict=True):
        assert_same_bits("input", x, y)


# torch's transformations


@every_way
def test_checkpointing_and_no_grad_change_no_bit(way):
    inputs = build_toeplitz(BY_NAME["causal, GQA"], torch.float32, way.device)

    def call(q, k, v, bias):
        return linear_attention(q, k, v, rpe_bias=bias, **way.options, **inputs.options)

    plain = evaluate_toeplitz(inputs, call)
    again = evaluate_toeplitz(inputs, lambda *tensors: checkpoint(call, *tensors, use_reentrant=False))
    for name, x in plain.items():
        assert_same_bits(name, again[name], x)
    with torch.no_grad():
        assert_same_bits("output", call(*inputs[:4]), plain["output"])


@every_way
def test_autocast_equals_inputs_of_its_dtype(way):
    inputs = build_toeplitz(BY_NAME["causal, GQA"], torch.float32, way.device)
    options = {"rpe_bias": inputs.bias, **way.options, **inputs.options}
    cast = [x.bfloat16() for x in inputs[:3]]
    expected = linear_attention(*cast, **options)
    with torch.autocast(way.device, torch.bfloat16):
        got = linear_attention(*inputs[:3], **options)
        leaf = inputs.bias.clone().requires_grad_()
        output = linear_attention(*inputs[:3], **{**options, "rpe_bias": leaf})
    assert got.dtype == torch.bfloat16
    assert_same_bits("output", got, expected)
    (grad,) = torch.autograd.grad(output.float().sum(), leaf)
    assert grad.dtype == torch.float32
    assert grad.isfinite().all()


@kernel_ways
def test_raw_ops_pass_opcheck(way):
    if way.method == "tiles":
        pytest.skip("the same op as prefix")
    normalize = way.method == "prefix"
    options = {"device": way.device, "dtype": torch.float64 if way.device == "cpu" else torch.float32}
    q, k, v = (x.abs() for x in qkv(B=1, H=1, L=5, D=2, E=2, **options))
    c = bias_of(heads=1, reach=4, **options).exp()
    mask = torch.zeros(1, 5, dtype=torch.bool, device=way.device)
    tensors, options = (q, k, v, c, mask, None), (True, normalize, way.method, way.impl)
    torch.library.opcheck(torch.ops.longattn._toeplitz_forward, (*tensors, *options))
    saved = torch.ops.longattn._toeplitz_forward(*tensors, *options)
    grad_z = None if normalize else torch.ones_like(saved[1])
    arguments = (torch.ones_like(saved[0]), grad_z, *tensors, *saved, *options)
    torch.library.opcheck(torch.ops.longattn._toeplitz_backward, arguments)


# torch deprecates parts of itself that its tracing and its compiler use
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_whole_with_dynamic_lengths_and_gradients(kernel, device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(q, k, v, bias):
        return linear_attention(q, k, v, rpe_bias=bias, is_causal=True, impl=kernel)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for L in (65, 100, 257):
        inputs = build_toeplitz(ToeplitzCase(f"compile {L}", L=L, D=8, E=12, is_causal=True), torch.float32, device)
        eager, whole = (evaluate_toeplitz(inputs, f) for f in (call, compiled))
        for name, x in eager.items():
            torch.testing.assert_close(whole[name], x, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2
