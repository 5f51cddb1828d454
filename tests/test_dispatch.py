"""Which engine runs and who says so; and what a caller who got it wrong is told."""

import os
import re
import subprocess
import sys

import pytest
import torch

import longattn
from longattn import LinearState, explain, linear_attention, linear_attention_with_state, softmax_attention
from longattn.ops import _dispatch

IMPLS = ("cuda", "triton", "cpu", "reference")


def qkv(L=6, S=None, B=2, H=2, D=4, E=5, dtype=torch.float32, device="cpu"):
    S = L if S is None else S
    shapes = (B, H, L, D), (B, H, S, D), (B, H, S, E)
    return [torch.ones(*shape, dtype=dtype, device=device) for shape in shapes]


# choosing


def test_explain_gives_every_engine_a_verdict_and_the_choice_of_auto():
    explanation = explain(linear_attention, *qkv(), is_causal=True)
    assert explanation.op == "linear_attention"
    assert tuple(explanation.reasons) == IMPLS
    usable = [impl for impl, reason in explanation.reasons.items() if reason is None]
    assert explanation.chosen == usable[0]
    assert usable[-1] == "reference"
    for reason in explanation.reasons.values():
        assert reason is None or len(reason) > 10
    lines = str(explanation).splitlines()
    assert len(lines) == 1 + len(IMPLS)
    assert [line.split()[0] for line in lines[1:]] == list(IMPLS)
    assert sum("<- chosen" in line for line in lines) == 1
    assert next(line for line in lines if "<- chosen" in line).split()[0] == explanation.chosen


def test_explain_tells_why_an_engine_refuses(impl, device):
    reasons = explain(linear_attention, *qkv(device=device)).reasons
    if device == "cpu":
        assert reasons["cuda"] is not None
    reasons = explain(linear_attention, *qkv(device="meta"), impl="reference").reasons
    for name in ("cuda", "triton", "cpu"):
        assert reasons[name] == _dispatch.missing(name) or "tensors are on meta" in reasons[name]


def test_explain_runs_nothing(monkeypatch):
    from longattn.ops import linear

    monkeypatch.setattr(linear, "_run", lambda call: pytest.fail("it ran"))
    assert explain(linear_attention_with_state, *qkv(), is_causal=True).op == "linear_attention_with_state"


def test_explain_raises_what_the_call_would():
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"^linear_attention: query must be \[batch, heads, length, dim\]"):
        explain(linear_attention, q[0], k, v)
    with pytest.raises(TypeError, match=r"explain: expected one of .*linear_attention.*, got "):
        explain(torch.add, q, k)


def test_an_explicit_engine_is_the_one_that_runs(impl, device, monkeypatch):
    assert explain(linear_attention, *qkv(device=device), impl=impl).chosen == impl
    from longattn.native import linear as native_linear
    from longattn.ops import linear

    ran = []
    engines = ("reference", linear.reference, "linear_attention"), ("cpu", native_linear, "forward")
    for name, module, function in engines:
        original = getattr(module, function)

        def spy(*args, name=name, original=original, **kwargs):
            ran.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, function, spy)
    linear_attention(*qkv(device=device), impl=impl)
    assert ran == ([] if impl == "triton" else [impl])


def test_auto_takes_the_first_engine_that_can(kernel, device):
    assert explain(linear_attention, *qkv(device=device)).chosen == kernel
    q, k, v = qkv(device=device)
    output = linear_attention(q, k, v)
    assert torch.equal(output, linear_attention(q, k, v, impl=kernel))


@pytest.mark.parametrize("name", [name for name in ("cuda", "triton") if _dispatch.missing(name) is not None])
def test_an_explicit_engine_never_falls_back(name):
    with pytest.raises(ValueError, match=rf"^linear_attention: impl='{name}' cannot run this call: .*impl='auto'"):
        linear_attention(*qkv(), impl=name)


def test_the_cpu_engine_refuses_tensors_elsewhere():
    with pytest.raises(ValueError, match=r"^linear_attention: impl='cpu' cannot run this call: "):
        linear_attention(*qkv(device="meta"), impl="cpu")


@pytest.mark.parametrize("impl", ["gpu", "", None, "CPU"])
def test_an_unknown_engine_is_refused(impl):
    with pytest.raises(ValueError, match=r"^linear_attention: impl must be 'auto' or one of 'cuda', .*, got ") as error:
        linear_attention(*qkv(), impl=impl)
    assert repr(impl) in str(error.value)


def python(script, **environment):
    command = [sys.executable, "-W", "always", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})


WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["longattn._C"] = None
import torch, longattn
q = torch.ones(1, 1, 3, 2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        longattn.linear_attention(q, q, q)
    longattn.linear_attention(q, q, q, impl="reference")
explanation = longattn.explain(longattn.linear_attention, q, q, q)
assert explanation.chosen == "reference" and explanation.reasons["cpu"], explanation
try:
    longattn.linear_attention(q, q, q, impl="cpu")
except ValueError as error:
    assert "impl='cpu' cannot run this call: the extension" in str(error), error
else:
    raise AssertionError("impl='cpu' fell back")
print(len(caught), caught[0].filename, caught[0].message)
"""


def test_with_nothing_but_the_reference_auto_warns_once_and_says_how_to_get_kernels():
    printed = python(WITHOUT_EXTENSION, TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="").stdout
    count, filename, message = printed.split(" ", 2)
    assert count == "1"
    # the caller's line, not one of the package
    assert filename == "<string>"
    for part in ("linear_attention: only the dense reference can run here", "cpu: the extension", "pip install"):
        assert part in message


# sentences

Q, K, V = qkv()
STATE = LinearState.zeros(2, 2, 4, 5)
MASK = torch.zeros(2, 6, dtype=torch.bool)
ONE = [x[:1] for x in (Q, K, V)]


def cu(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


BAD = {
    # name: (positional, options, error, what the sentence says)
    "rank of query": ((Q[0], K, V), {}, ValueError, "[batch, heads, length, dim], got [2, 6, 4]"),
    "rank of value": ((Q, K, V[None]), {}, ValueError, "value must be [batch, .*, got [1, 2, 2, 6, 5]"),
    "scalar": ((Q, torch.ones(()), V), {}, ValueError, "key must be [batch, heads, length, dim], got []"),
    "no tensor": ((Q, None, V), {}, TypeError, "key must be a tensor, got NoneType None"),
    "list": (([[1.0]], K, V), {}, TypeError, "query must be a tensor, got list"),
    "integers": ((Q.long(), K.long(), V.long()), {}, TypeError, "query must be float32, bfloat16, .* got torch.int64"),
    "bool values": ((Q, K, V > 0), {}, TypeError, "value must be float32, bfloat16, .* got torch.bool"),
    "complex": ((Q, K.to(torch.complex64), V), {}, TypeError, "key must be float32, .* got torch.complex64"),
    "float8": (
        tuple(x.to(torch.float8_e5m2) for x in (Q, K, V)), {}, TypeError, "must be float32, .*, got torch.float8_e5m2",
    ),
    "mixed dtypes": (
        (Q, K.half(), V), {}, TypeError, "share a dtype, got torch.float32, torch.float16 and torch.float32",
    ),
    "mixed devices": ((Q, K.to("meta"), V), {}, ValueError, "must be on one device, got cpu, meta and cpu"),
    "batch": ((Q, K[:1], V), {}, ValueError, "share the batch size, got 2, 1 and 2"),
    "heads of value": ((Q, K, V[:, :1]), {}, ValueError, "key and value must share heads and length, got [2, 2, 6, 4]"),
    "length of value": ((Q, K, V[:, :, :5]), {}, ValueError, "heads and length, got [2, 2, 6, 4] and [2, 2, 5, 5]"),
    "head dim": ((Q[..., :3], K, V), {}, ValueError, "query and key must share head_dim, got 3 and 4"),
    "head dim 0": ((Q[..., :0], K[..., :0], V), {}, ValueError, "head_dim and value dim must be positive"),
    "value dim 0": ((Q, K, V[..., :0]), {}, ValueError, "head_dim and value dim must be positive"),
    "fewer key heads": ((Q, K[:, :1], V[:, :1]), {}, ValueError, "2 heads and key has 1; pass enable_gqa=True"),
    "heads that do not divide": (
        (torch.ones(2, 3, 6, 4), K, V), {"enable_gqa": True}, ValueError, "multiple of key heads, got 3 and 2",
    ),
    "no key heads": ((Q, K[:, :0], V[:, :0]), {"enable_gqa": True}, ValueError, "multiple of key heads, got 2 and 0"),
    "causal lengths": (
        (Q[:, :, :4], K, V), {"is_causal": True}, ValueError, "as many queries as keys, got 4 and 6; carry a state",
    ),
    "float mask": (
        (Q, K, V), {"key_padding_mask": MASK.float()}, TypeError,
        "key_padding_mask must be bool [B, S] = [2, 6] .* got float32 [2, 6] .*; pass mask == float('-inf')",
    ),
    "uint8 mask": ((Q, K, V), {"key_padding_mask": MASK.byte()}, TypeError, "must be bool .* got uint8 [2, 6]"),
    "int64 mask": ((Q, K, V), {"key_padding_mask": MASK.long()}, TypeError, "must be bool .* got int64 [2, 6]"),
    "mask of another length": (
        (Q, K, V), {"key_padding_mask": MASK[:, :5]}, ValueError, "= [2, 6] .* got bool [2, 5] on cpu",
    ),
    "mask transposed": ((Q, K, V), {"key_padding_mask": MASK.T}, ValueError, "= [2, 6] .* got bool [6, 2]"),
    "mask 1-D": ((Q, K, V), {"key_padding_mask": MASK[0]}, ValueError, "= [2, 6] .* got bool [6]"),
    "mask 3-D": ((Q, K, V), {"key_padding_mask": MASK[:, None]}, ValueError, "= [2, 6] .* got bool [2, 1, 6]"),
    "mask of queries": (
        (Q, K[:, :, :3], V[:, :, :3]), {"key_padding_mask": MASK}, ValueError, "= [2, 3] .* got bool [2, 6]",
    ),
    "mask list": ((Q, K, V), {"key_padding_mask": [True]}, TypeError, "key_padding_mask must be a tensor, got list"),
    "mask elsewhere": ((Q, K, V), {"key_padding_mask": MASK.to("meta")}, ValueError, "on meta.*, but key is on cpu"),
    "boundaries int64": (ONE, {"cu_seqlens": cu(0, 6, dtype=torch.int64)}, TypeError, "int32 [N+1] .* got int64 [2]"),
    "boundaries float": (ONE, {"cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, "int32 [N+1] .* got float32 [2]"),
    "boundaries list": (ONE, {"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens must be a tensor, got list [0, 6]"),
    "boundaries 2-D": (ONE, {"cu_seqlens": cu(0, 6)[None]}, ValueError, "int32 [N+1] .* got int32 [1, 2]"),
    "one boundary": (ONE, {"cu_seqlens": cu(0)}, ValueError, "int32 [N+1] with N >= 1, got int32 [1]"),
    "no boundary": (ONE, {"cu_seqlens": cu()}, ValueError, "int32 [N+1] with N >= 1, got int32 [0]"),
    "boundaries elsewhere": (ONE, {"cu_seqlens": cu(0, 6).to("meta")}, ValueError, "must be on cpu, got meta"),
    "packed batch": ((Q, K, V), {"cu_seqlens": cu(0, 6)}, ValueError, "need batch size 1, got 2"),
    "packed cross": (
        (ONE[0][:, :, :4], *ONE[1:]), {"cu_seqlens": cu(0, 6)}, ValueError, "need L == S, got 4 and 6",
    ),
    "scale nan": ((Q, K, V), {"scale": float("nan")}, ValueError, "a finite number or None, got float nan"),
    "scale inf": ((Q, K, V), {"scale": float("inf")}, ValueError, "a finite number or None, got float inf"),
    "scale text": ((Q, K, V), {"scale": "1"}, ValueError, "scale must be a finite number or None, got str '1'"),
    "unknown feature map": ((Q, K, V), {"feature_map": "exp"}, ValueError, "one of elu, relu, identity or a callable"),
    "no feature map": ((Q, K, V), {"feature_map": None}, ValueError, "one of elu, relu, .* callable, got None"),
    "unhashable feature map": ((Q, K, V), {"feature_map": ["elu"]}, ValueError, "one of elu, .* got ['elu']"),
    "map of other shape": (
        (Q, K, V), {"feature_map": lambda x: x.sum(-1)}, ValueError, "to [..., M], got float32 [2, 2, 6] on",
    ),
    "map of no tensor": ((Q, K, V), {"feature_map": lambda x: None}, ValueError, "must map .* got NoneType"),
    "map of another length": (
        (Q, K, V), {"feature_map": lambda x: x[:, :, 1:]}, ValueError, "must map .* got float32 [2, 2, 5, 4]",
    ),
    "map to no features": ((Q, K, V), {"feature_map": lambda x: x[..., :0]}, ValueError, "feature_map must map"),
    "map to integers": ((Q, K, V), {"feature_map": lambda x: x.long()}, (TypeError, ValueError), "feature_map must"),
}  # fmt: skip


def pattern(sentence):
    """The sentence with .* meaning what it means in a pattern."""
    return ".*".join(map(re.escape, sentence.split(".*")))


@pytest.mark.parametrize("op", [linear_attention, linear_attention_with_state], ids=lambda op: op.__name__)
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_a_sentence(name, op, impl):
    tensors, options, error, sentence = BAD[name]
    with pytest.raises(error, match=rf"^{op.__name__}: .*{pattern(sentence)}") as caught:
        op(*tensors, impl=impl, **options)
    assert "\n" not in str(caught.value)


BAD_STATE = {
    "a tuple": (tuple(STATE), TypeError, "state must be a LinearState, got tuple"),
    "a tensor": (STATE.kv, TypeError, "state must be a LinearState, got "),
    "another batch": (LinearState.zeros(3, 2, 4, 5), ValueError, ".kv must be .*[2, 2, 4, 5].* float32 [3, 2, 4, 5]"),
    "one row for two": (LinearState.zeros(1, 2, 4, 5), ValueError, "[2, 2, 4, 5].* got float32 [1, 2, 4, 5]"),
    "query heads": (LinearState.zeros(2, 4, 4, 5), ValueError, "[2, 2, 4, 5].* got float32 [2, 4, 4, 5]"),
    "other features": (LinearState.zeros(2, 2, 5, 5), ValueError, "[2, 2, 4, 5].* got float32 [2, 2, 5, 5]"),
    "transposed": (LinearState(STATE.kv.mT, STATE.k_sum), ValueError, "[2, 2, 4, 5].* got float32 [2, 2, 5, 4]"),
    "another k_sum": (LinearState(STATE.kv, STATE.kv), ValueError, ".k_sum .*[2, 2, 4].* float32 [2, 2, 4, 5]"),
    "half": (STATE.to(torch.float16), TypeError, "state.kv must be torch.float32 .* got float16"),
    "double": (STATE.to(torch.float64), TypeError, "state.kv must be torch.float32 .* got float64"),
    "one double": (LinearState(STATE.kv, STATE.k_sum.double()), TypeError, "state.k_sum .*float32 .* got float64"),
    "elsewhere": (STATE.to("meta"), ValueError, "on cpu .* got float32 [2, 2, 4, 5] on meta"),
    "nothing in it": (LinearState(None, None), (TypeError, ValueError), "state.kv must be .* got NoneType None"),
}  # fmt: skip


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", BAD_STATE)
def test_a_state_of_another_kind_is_refused_in_a_sentence(name, is_causal, impl):
    state, error, sentence = BAD_STATE[name]
    with pytest.raises(error, match=rf"^linear_attention_with_state: .*{pattern(sentence)}"):
        linear_attention_with_state(Q, K, V, state=state, is_causal=is_causal, impl=impl)


def test_packed_states_have_one_row_for_each_sequence(impl, device):
    tensors, bounds = [x.to(device) for x in ONE], cu(0, 2, 2, 6).to(device)
    state = LinearState.zeros(3, 2, 4, 5, device=device)
    _, after = linear_attention_with_state(*tensors, cu_seqlens=bounds, state=state, impl=impl)
    assert after.kv.shape == (3, 2, 4, 5)
    with pytest.raises(ValueError, match=r"state.kv must be torch.float32 \[3, 2, 4, 5\].* got float32 \[1, 2, 4, 5\]"):
        linear_attention_with_state(
            *tensors, cu_seqlens=bounds, state=LinearState.zeros(1, 2, 4, 5, device=device), impl=impl
        )


def test_packed_causal_calls_need_as_many_queries_as_keys_even_with_a_state(impl):
    with pytest.raises(ValueError, match="L == S"):
        linear_attention_with_state(
            ONE[0][:, :, :3], *ONE[1:], cu_seqlens=cu(0, 6), state=STATE.select(cu(0)), is_causal=True, impl=impl
        )


@pytest.mark.skipif(_dispatch.missing("cpu") is not None, reason=f"cpu: {_dispatch.missing('cpu')}")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "bounds",
    [(0, 4, 2, 6), (0, 5), (0, 7), (1, 6), (-1, 6), (0, -3, 6), (0, 2**31 - 1), (0, 9, 6), (6, 0), (0, 0), (2, 2)],
    ids=str,
)
def test_the_cpu_kernels_refuse_wrong_boundaries(bounds, is_causal):
    sentence = "^longattn: cu_seqlens must start at 0, never decrease and end at the length 6, got "
    with pytest.raises(ValueError, match=sentence):
        linear_attention(*ONE, cu_seqlens=cu(*bounds), is_causal=is_causal, impl="cpu")


def test_boundaries_at_the_limits_are_accepted(impl, device):
    tensors = [x.to(device) for x in ONE]
    for bounds in ((0, 6), (0, 0, 6), (0, 6, 6), (0, 0, 0, 6, 6, 6), (0, 1, 2, 3, 4, 5, 6)):
        output = linear_attention(*tensors, cu_seqlens=cu(*bounds).to(device), is_causal=True, impl=impl)
        assert torch.equal(output, torch.ones_like(output))


def test_infinite_and_absurd_but_legal_options_are_accepted(impl, device):
    q, k, v = qkv(device=device)
    for scale in (0, 1, True, -2.5, 1e-30):
        output = linear_attention(q, k, v, scale=scale, normalize=False, impl=impl)
        torch.testing.assert_close(output, torch.full_like(output, 6 * 16.0 * scale))


def test_options_are_keywords_only():
    with pytest.raises(TypeError, match="positional"):
        linear_attention(Q, K, V, "elu")


def test_the_public_names_are_there():
    for name in longattn.__all__:
        assert getattr(longattn, name) is not None
    assert explain(softmax_attention, Q, K, V).op == "softmax_attention"
