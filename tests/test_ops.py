"""Every op on every engine and dtype: error budgets, odd shapes, layouts, and what torch's transformations ask."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from longattn import LinearState, linear_attention, linear_attention_with_state
from longattn.ops.linear import Options
from longattn.testing.assertions import assert_same_bits, check_linear, evaluate, run_linear
from longattn.testing.cases import DTYPES, FAVOR, LAYOUTS, LINEAR, LinearCase, build, lay_out, segments_of

BY_NAME = {case.name: case for case in (*LINEAR, *FAVOR)}
# one of each kind, for properties that no shape should change
FEW = [
    BY_NAME[name]
    for name in (
        "causal L=257 in segments of 128, few features",
        "random masked, causal=False",
        "GQA causal",
        "packed with everything",
    )
]
FEW_FAVOR = [
    BY_NAME[f"favor, {name}"]
    for name in ("GQA causal", "packed with everything", "exact diagonal with everything", "l2 and key mean")
]


def named(cases):
    return [pytest.param(case, id=case.name) for case in cases]


def short(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.fixture(params=DTYPES, ids=short)
def dtype(request, device):
    if request.param == torch.float64 and device == "cuda":
        pytest.skip("float64 runs on cpu and reference only")
    return request.param


def test_case_names_are_unique():
    assert len(BY_NAME) == len(LINEAR) + len(FAVOR)


@pytest.mark.parametrize("case", named(LINEAR))
def test_errors_stay_within_the_budget(case, impl, dtype, device):
    check_linear(case, dtype, impl, device)


@pytest.mark.parametrize("case", named(FAVOR))
def test_errors_of_favor_stay_within_the_budget(case, kernel, dtype, device):
    check_linear(case, dtype, kernel, device)


@pytest.mark.parametrize("case", named(FAVOR[::3]))
def test_errors_of_the_favor_reference_stay_within_the_budget(case):
    check_linear(case, torch.float32, "reference")


# layouts


def same_bits(actual, expected):
    for name, x in expected.items():
        assert_same_bits(name, actual[name], x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", named(FEW + FEW_FAVOR))
def test_any_strides_equal_contiguous(case, layout, impl, device):
    inputs = build(case, torch.float32, device)
    laid = {name: lay_out(getattr(inputs, name), layout) for name in ("q", "k", "v", "grad_output")}
    strange = inputs._replace(**laid)
    assert layout == "offset" or not any(x.is_contiguous() for x in laid.values())
    plain = inputs._replace(**{name: x.contiguous() for name, x in laid.items()})
    with segments_of(case.segment):
        same_bits(run_linear(strange, impl), run_linear(plain, impl))


def test_any_strides_of_mask_boundaries_and_state_equal_contiguous(impl, device):
    inputs = build(BY_NAME["packed with everything"], torch.float32, device)
    options = dict(inputs.options)
    options["key_padding_mask"] = options["key_padding_mask"].repeat_interleave(2, 1)[:, ::2]
    options["cu_seqlens"] = options["cu_seqlens"].repeat_interleave(3)[1::3]
    state = LinearState(lay_out(inputs.state.kv, "transposed"), inputs.state.k_sum.mT.contiguous().mT)
    grad_state = LinearState(lay_out(inputs.grad_state.kv, "strided"), inputs.grad_state.k_sum.mT.contiguous().mT)
    strange = inputs._replace(options=options, state=state, grad_state=grad_state)
    same_bits(run_linear(strange, impl), run_linear(inputs, impl))


def test_a_mask_expanded_over_the_batch_equals_its_copy(impl, device):
    case = LinearCase("expanded mask", B=3, L=70, is_causal=True)
    inputs = build(case, torch.float32, device)
    mask = (torch.arange(70, device=device) % 3 == 0).expand(3, 70)
    expanded, copied = (
        inputs._replace(options={**inputs.options, "key_padding_mask": m}) for m in (mask, mask.contiguous())
    )
    same_bits(run_linear(expanded, impl), run_linear(copied, impl))


def test_gradient_of_a_sum_equals_gradient_of_ones(impl, device):
    inputs = build(BY_NAME["GQA causal"], torch.float32, device)
    expanded = inputs._replace(grad_output=torch.ones((), device=device).expand(inputs.grad_output.shape))
    ones = inputs._replace(grad_output=torch.ones_like(inputs.grad_output))
    same_bits(run_linear(expanded, impl), run_linear(ones, impl))


def test_an_expanded_leaf_gets_the_sum_of_its_gradients(impl, device):
    inputs = build(LinearCase("expanded", H=4, L=70, is_causal=True), torch.float32, device)
    leaf = inputs.k[:, :1].clone().requires_grad_()
    wide = leaf.detach().expand_as(inputs.k).clone().requires_grad_()
    for k in (leaf.expand_as(inputs.k), wide):
        linear_attention(inputs.q, k, inputs.v, is_causal=True, impl=impl).backward(inputs.grad_output)
    torch.testing.assert_close(leaf.grad, wide.grad.sum(1, keepdim=True))


# gradients

GRADCHECK = (
    LinearCase("gradcheck causal", B=1, H=2, L=7, D=2, E=3, is_causal=True, state=True),
    LinearCase("gradcheck GQA masked", B=2, H=1, L=5, D=3, E=2, groups=2, is_causal=True, mask="random"),
    LinearCase("gradcheck not causal", B=1, H=1, L=4, S=6, D=2, E=2, feature="relu", mask="random", state=True),
    LinearCase("gradcheck scaled", B=1, H=1, L=6, D=2, E=3, is_causal=True, normalize=False, scale=0.7, state=True),
    LinearCase("gradcheck scaled, not causal", B=1, H=1, L=3, S=4, D=2, E=2, normalize=False, scale=-2.0),
    LinearCase(
        "gradcheck packed", B=1, H=1, L=9, D=2, E=2, lengths=(4, 0, 5), is_causal=True, state=True, feature="identity"
    ),
    LinearCase("gradcheck packed, not causal", B=1, H=1, L=6, D=2, E=2, lengths=(2, 0, 4), state=True),
    LinearCase("gradcheck two segments", B=1, H=1, L=66, D=1, E=1, is_causal=True, normalize=False, segment=64),
)


def differentiable(case, impl, device="cpu"):
    """A function of the tensors that need gradients, and those tensors."""
    inputs = build(case, torch.float64, device).clean()
    tensors = [inputs.q, inputs.k, inputs.v, *(inputs.state or ())]

    def call(q, k, v, *state):
        state = LinearState(*state) if state else None
        output, state = linear_attention_with_state(q, k, v, state=state, impl=impl, **inputs.options)
        return output, *state

    return call, [x.requires_grad_() for x in tensors]


@pytest.mark.parametrize("case", named(GRADCHECK))
def test_gradients_are_those_of_the_function(case, impl, device):
    if device == "cuda":
        pytest.skip("float64 runs on cpu and reference only")
    call, tensors = differentiable(case, impl)
    with segments_of(case.segment):
        assert gradcheck(call, tensors, nondet_tol=0.0)


def test_the_reference_has_a_second_derivative():
    call, tensors = differentiable(GRADCHECK[0], "reference")
    assert gradgradcheck(call, tensors)


def test_a_second_derivative_of_the_kernels_is_refused_in_a_sentence(kernel, device):
    inputs = build(LinearCase("second derivative", L=9), torch.float32, device)
    q = inputs.q.requires_grad_()
    output = linear_attention(q, inputs.k, inputs.v, impl=kernel)
    (dq,) = torch.autograd.grad(output.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"linear_attention: .*no second derivative; use impl='reference'"):
        dq.sum().backward()


@pytest.mark.parametrize("wanted", ["q", "k", "v", "kv", "k_sum"])
def test_each_gradient_alone_equals_all_together(wanted, impl, device):
    inputs = build(BY_NAME["state, causal"], torch.float32, device)
    every = run_linear(inputs, impl)
    tensors = {"q": inputs.q, "k": inputs.k, "v": inputs.v, **inputs.state._asdict()}
    leaf = tensors[wanted] = tensors[wanted].clone().requires_grad_()
    q, k, v, *state = tensors.values()
    output, state = linear_attention_with_state(q, k, v, state=LinearState(*state), impl=impl, **inputs.options)
    pairs = [(x, w) for x, w in zip((output, *state), (inputs.grad_output, *inputs.grad_state), strict=True)]
    outputs, weights = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
    (grad,) = torch.autograd.grad(outputs, leaf, weights)
    torch.testing.assert_close(grad, every[f"d{wanted}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("used", ["output", "kv", "k_sum"])
def test_each_result_alone_gives_its_gradient(used, impl, device):
    inputs = build(BY_NAME["state, causal, masked"], torch.float32, device).clean()
    keep = {"output": inputs.grad_output, **inputs.grad_state._asdict()}
    alone = {name: x if name == used else torch.zeros_like(x) for name, x in keep.items()}
    expected = run_linear(
        inputs._replace(grad_output=alone["output"], grad_state=LinearState(alone["kv"], alone["k_sum"])), impl
    )
    tensors = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, *inputs.state)]
    q, k, v, *state = tensors
    output, state = linear_attention_with_state(q, k, v, state=LinearState(*state), impl=impl, **inputs.options)
    result = {"output": output, **state._asdict()}[used]
    grads = torch.autograd.grad(result, tensors, keep[used], materialize_grads=True, allow_unused=True)
    for name, grad in zip(("dq", "dk", "dv", "dkv", "dk_sum"), grads, strict=True):
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("changed", ["q", "k", "v"])
def test_an_input_changed_before_backward_raises_the_version_error(changed, kernel, device):
    inputs = build(LinearCase("in place", L=9), torch.float32, device)
    tensors = {name: getattr(inputs, name).clone() for name in ("q", "k", "v")}
    leaves = [x if name == changed else x.requires_grad_() for name, x in tensors.items()]
    output = linear_attention(*leaves, impl=kernel)
    tensors[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_inputs_are_left_as_they_were(impl, device):
    inputs = build(BY_NAME["packed with everything"], torch.float32, device)
    tensors = [*inputs[:3], *inputs.state, inputs.grad_output, *inputs.grad_state]
    tensors += [x for x in inputs.options.values() if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in tensors]
    run_linear(inputs, impl)
    for x, y in zip(tensors, before, strict=True):
        assert_same_bits("input", x, y)


def test_without_gradients_the_same_bits(impl, device):
    for case in FEW:
        inputs = build(case, torch.float32, device)
        expected = run_linear(inputs, impl)
        with torch.no_grad():
            output, state = linear_attention_with_state(
                *inputs[:3], state=inputs.state, impl=impl, **inputs.options
            )
        same_bits({"output": output, **state._asdict()}, {name: expected[name] for name in ("output", "kv", "k_sum")})


# torch's transformations


@pytest.mark.parametrize("case", named([FEW[0], FEW[-1], BY_NAME["B=0"], BY_NAME["S=0"]]))
def test_raw_ops_pass_opcheck(case, kernel, device):
    inputs = build(case, torch.float32, device).clean()
    o = inputs.options
    options = Options(
        o["feature_map"], o["is_causal"], o["normalize"], 1.0 if o["scale"] is None else o["scale"], 64, kernel
    )
    tensors = (*inputs[:3], o["key_padding_mask"], o["cu_seqlens"], *(inputs.state or (None, None)))
    for save_segments in (True, False):
        torch.library.opcheck(torch.ops.longattn._linear_forward, (*tensors, *options, save_segments))
    saved = torch.ops.longattn._linear_forward(*tensors, *options, True)[:4]
    for grad_state in (inputs.grad_state, (None, None)):
        arguments = (inputs.grad_output, *grad_state, *tensors, *saved, *options)
        torch.library.opcheck(torch.ops.longattn._linear_backward, arguments)


def one_call(q, k, v, state, impl):
    return linear_attention_with_state(q, k, v, state=state, is_causal=True, impl=impl)


def two_calls(q, k, v, state, impl):
    output, state = linear_attention_with_state(q * 2, k, v, state=state, is_causal=True, impl=impl)
    again, state = linear_attention_with_state(q, k + 1, v, state=state, is_causal=True, feature_map="relu", impl=impl)
    return output + again, state


# torch deprecates parts of itself that its tracing and its compiler use
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("backend", "call"), [("aot_eager", two_calls), ("inductor", one_call)])
def test_compiles_whole_with_dynamic_lengths_and_gradients(backend, call, kernel, device):
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=backend)
    lengths = (2, 65, 100, 130) if backend == "aot_eager" else (65, 100)
    for L in lengths:
        inputs = build(LinearCase(f"compile {L}", L=L, D=8, E=12, state=True), torch.float32, device)
        eager, whole = (
            evaluate(inputs, lambda *tensors, f=f: f(*tensors, kernel)) for f in (call, compiled)
        )
        for name, x in eager.items():
            torch.testing.assert_close(whole[name], x, rtol=1e-5, atol=1e-5)


def test_one_graph_serves_many_lengths(kernel, device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(linear_attention, fullgraph=True, dynamic=True, backend=counter)
    for L in (3, 64, 65, 100, 129, 1009):
        q, k, v = (torch.randn(1, 2, L, 4, device=device) for _ in range(3))
        assert_same_bits("output", call(q, k, v, impl=kernel), linear_attention(q, k, v, impl=kernel))
    assert counter.frame_count <= 2


def test_checkpointing_changes_no_bit(impl, device):
    inputs = build(BY_NAME["GQA causal"], torch.float32, device)

    def call(q, k, v, state):
        return linear_attention_with_state(q, k, v, state=state, impl=impl, **inputs.options)

    plain = evaluate(inputs, call)
    again = evaluate(inputs, lambda *tensors: checkpoint(call, *tensors, use_reentrant=False))
    same_bits(again, plain)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=short)
def test_autocast_equals_inputs_of_its_dtype(low, impl, device):
    inputs = build(BY_NAME["state, causal"], torch.float32, device)
    cast = inputs._replace(q=inputs.q.to(low), k=inputs.k.to(low), v=inputs.v.to(low))
    expected = linear_attention_with_state(*cast[:3], state=inputs.state, impl=impl, **inputs.options)
    with torch.autocast(device, low):
        got = linear_attention_with_state(*inputs[:3], state=inputs.state, impl=impl, **inputs.options)
    assert got.output.dtype == low
    assert got.state.kv.dtype == torch.float32
    assert_same_bits("output", got.output, expected.output)
    assert_same_bits("kv", got.state.kv, expected.state.kv)


def test_autocast_gives_gradients_of_the_inputs_dtype(impl, device):
    inputs = build(LinearCase("autocast", L=33), torch.float32, device)
    q = inputs.q.requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        output = linear_attention(q, inputs.k, inputs.v, impl=impl)
    output.float().sum().backward()
    assert q.grad.dtype == torch.float32
    assert q.grad.isfinite().all()
    assert q.grad.count_nonzero() > 0


def test_autocast_leaves_float64_alone():
    q, k, v = (torch.randn(1, 1, 5, 4, dtype=torch.float64) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        output = linear_attention(q, k, v, impl="reference")
    assert output.dtype == torch.float64


@pytest.mark.parametrize("case", named(FEW))
def test_fake_tensors_tell_shapes_and_dtypes(case, impl, device):
    inputs = build(case, torch.bfloat16, device)
    real = run_linear(inputs, impl)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:

        def fake(x):
            return mode.from_tensor(x) if isinstance(x, torch.Tensor) else x

        faked = inputs._replace(
            **{name: fake(getattr(inputs, name)) for name in ("q", "k", "v", "grad_output")},
            state=None if inputs.state is None else LinearState(*map(fake, inputs.state)),
            grad_state=LinearState(*map(fake, inputs.grad_state)),
            options={name: fake(x) for name, x in inputs.options.items()},
        )
        told = run_linear(faked, impl)
    for name, x in real.items():
        assert (told[name].shape, told[name].dtype, told[name].device) == (x.shape, x.dtype, x.device), name


def test_meta_tensors_tell_shapes():
    q, k = torch.empty(2, 4, 7, 8, device="meta"), torch.empty(2, 2, 9, 8, device="meta")
    v = torch.empty(2, 2, 9, 5, device="meta")
    output, state = linear_attention_with_state(q, k, v, enable_gqa=True, impl="reference")
    assert output.shape == (2, 4, 7, 5)
    assert output.device.type == "meta"
    assert state.kv.shape == (2, 2, 8, 5)
