"""Relative positions inside torch's tools: compiled, exported, faked, traced, and through torch.func."""

import pytest
import torch
from _toeplitz import bias_of
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from longattn import Favor, ToeplitzState, linear_attention, linear_attention_with_state, native, softmax_attention
from longattn.testing.assertions import assert_near
from longattn.testing.cases import qkv
from longattn.testing.toeplitz import ToeplitzCase, build_toeplitz, evaluate_toeplitz

# torch deprecates parts of itself that its tracing and its compiler use
pytestmark = [
    pytest.mark.skipif(native.missing() is not None, reason=f"cpu: {native.missing()}"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
BIAS = bias_of()


def step(q, k, v, *state, bias=BIAS, **options):
    state = ToeplitzState(*state) if state else ToeplitzState.zeros(2, 2, 8, 12)
    return linear_attention_with_state(q, k, v, state=state, rpe_bias=bias, is_causal=True, **options)


def test_compiles_whole_with_dynamic_lengths_and_gradients():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(q, k, v, bias):
        return linear_attention(q, k, v, rpe_bias=bias, is_causal=True)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    # short of the bias, at its end and beyond
    for L in (65, 100, 257, 12, 21):
        inputs = build_toeplitz(ToeplitzCase(f"compile {L}", L=L, D=8, E=12, is_causal=True), torch.float32)
        eager, whole = (evaluate_toeplitz(inputs, f) for f in (call, compiled))
        for name, x in eager.items():
            torch.testing.assert_close(whole[name], x, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_decoding_compiles_whole():
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    tensors, states = qkv(L=24), [ToeplitzState.zeros(2, 2, 8, 12)] * 2
    with torch.no_grad():
        for t in range(24):
            token = [x[:, :, t : t + 1] for x in tensors]
            (output, states[0]), (expected, states[1]) = (f(*token, *x) for f, x in zip((compiled, step), states))  # noqa: B905
            assert_near(output, expected, 1e-5)


class Module(torch.nn.Module):
    def __init__(self, method):
        super().__init__()
        self.bias, self.method = torch.nn.Parameter(BIAS.clone()), method

    def forward(self, q, k, v):
        return linear_attention(q, k, v, rpe_bias=self.bias, is_causal=True, rpe_method=self.method)


@pytest.mark.parametrize("method", ["auto", "prefix", "fft"])
def test_an_exported_program_takes_any_length(method):
    module, L = Module(method), torch.export.Dim("L", min=2, max=1000)
    program = torch.export.export(module, (*qkv(L=30),), dynamic_shapes=({2: L},) * 3, strict=False).module()
    for n in (5, 77):
        tensors = qkv(L=n)
        # with gradients on, as they are where nobody says otherwise
        assert_near(program(*tensors), module(*tensors), 1e-5)


def test_one_token_of_tensors_without_numbers_takes_the_general_path():
    one = [x[:, :, :1] for x in qkv(L=1)]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x) for x in one]
        state = [mode.from_tensor(x) for x in ToeplitzState.zeros(2, 2, 8, 12)]
        assert step(*fake, *state, bias=mode.from_tensor(BIAS)).output.shape == (2, 2, 1, 12)
    traced = make_fx(lambda *token: step(*token).output)(*one)
    again = [2 * x for x in one]
    assert_near(traced(*again), step(*again).output, 1e-6)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_equals_call_by_call():
    many = [torch.stack([x, -x]) for x in qkv(L=30)]
    biases = torch.stack([BIAS, 2 * BIAS])

    def call(q, k, v, bias):
        return linear_attention(q, k, v, rpe_bias=bias, is_causal=True)

    for f, rows in ((call, many), (lambda *token, bias: step(*token, bias=bias).output, [x[..., :1, :] for x in many])):
        outputs = torch.func.vmap(lambda *x, f=f: f(*x[:3], bias=x[3]))(*rows, biases)
        for i, output in enumerate(outputs):
            assert_near(output, f(*(x[i] for x in rows), bias=biases[i]), 1e-5)


def linear(bias, impl):
    return linear_attention(*qkv(L=30), rpe_bias=bias, impl=impl)


def features(bias, impl):
    return linear_attention(*qkv(L=30), rpe_bias=bias, impl=impl, feature_map=Favor(8, 8, normalize="l2"))


def exact(bias, impl):
    return softmax_attention(*qkv(L=70), rpe_bias=bias, impl=impl)


@pytest.mark.filterwarnings("ignore:.*only the dense reference can run here")
@pytest.mark.parametrize("function", [linear, features, exact])
def test_the_derivatives_of_torch_func_take_the_reference(function):
    leaf = BIAS.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf, "cpu").square().sum(), leaf)
    assert_near(torch.func.grad(lambda bias: function(bias, "auto").square().sum())(BIAS), expected, 1e-4)
    _, along = torch.func.jvp(lambda bias: function(bias, "auto").square().sum(), (BIAS,), (torch.ones_like(BIAS),))
    assert abs(along) <= 1e-4 * expected.abs().sum()
    with pytest.raises(ValueError, match=r"impl='cpu' cannot run this call: torch.func's derivatives"):
        torch.func.grad(lambda bias: function(bias, "cpu").sum())(BIAS)
