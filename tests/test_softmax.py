"""Laws of exact attention: torch's function where torch has one, and what it promises beyond."""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import longattn
from longattn import softmax_attention
from longattn.ops import softmax
from longattn.ops.softmax import softmax_attention_with_weights
from longattn.reference import softmax as reference
from longattn.testing.assertions import assert_same_bits

IMPLS = ("cpu", "torch", "reference")
# (B, Hq, H, L, S, D, E)
SHAPES = [(2, 2, 2, 7, 7, 8, 8), (2, 4, 2, 9, 5, 3, 5), (1, 3, 1, 4, 11, 9, 2), (2, 1, 1, 1, 1, 1, 1)]
EMPTY = [(0, 2, 2, 3, 3, 4, 4), (2, 2, 2, 0, 3, 4, 4), (2, 2, 2, 3, 0, 4, 4), (2, 2, 1, 3, 0, 4, 5)]


def draw(shape, dtype=torch.float64, seed=0):
    B, Hq, H, L, S, D, E = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((B, Hq, L, D), (B, H, S, D), (B, H, S, E))
    return [torch.randn(size, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for size in sizes]


def draw_padding(shape, seed=0):
    padding = torch.rand(shape[0], shape[4], generator=torch.Generator().manual_seed(seed)) < 0.4
    padding[:1] = True
    return padding


def draw_mask(kind, shape, seed=0):
    B, Hq, _, L, S, *_ = shape
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.rand(B, Hq, L, S, generator=generator) < 0.6
    allowed[:, :, :1] = False
    if kind == "bool [L, S]":
        return allowed[0, 0] if B else allowed.new_zeros(L, S)
    if kind == "float [B, Hq, L, S]":
        return torch.randn(B, Hq, L, S, dtype=torch.float64, generator=generator).masked_fill(~allowed, -torch.inf)
    return None


def skip_masks(impl, mask):
    if impl == "cpu" and mask not in ("", "causal"):
        pytest.skip("attn_mask runs in torch")


def outputs(q, k, v, *args, **kwargs):
    """Output and gradients."""
    out = softmax_attention(q, k, v, *args, **kwargs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), weights)]


def assert_all_close(actual, expected, tolerance=1e-12):
    for name, x, y in zip(("output", "dq", "dk", "dv"), actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mask", ["", "causal", "bool [L, S]", "float [B, Hq, L, S]"])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_scaled_dot_product_attention(shape, mask, impl):
    skip_masks(impl, mask)
    q, k, v = draw(shape)
    arguments = (draw_mask(mask, shape), 0.0, mask == "causal")
    for scale in (None, 0.3):
        expected = F.scaled_dot_product_attention(q, k, v, *arguments, scale=scale, enable_gqa=True)
        actual = softmax_attention(q, k, v, *arguments, scale, True, impl=impl)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", ["", "causal", "bool [L, S]", "float [B, Hq, L, S]"])
@pytest.mark.parametrize("shape", SHAPES + EMPTY)
def test_agrees_with_the_dense_formula(shape, mask):
    q, k, v = draw(shape)
    arguments = {"attn_mask": draw_mask(mask, shape), "is_causal": mask == "causal", "enable_gqa": True}
    for padding, scale in itertools.product((None, draw_padding(shape)), (None, 0.0, -0.7)):
        arguments |= {"key_padding_mask": padding, "scale": scale}
        assert_all_close(outputs(q, k, v, **arguments), outputs(q, k, v, **arguments, impl="reference"))


def test_reference_is_the_formula_in_loops():
    shape = (2, 2, 1, 3, 4, 2, 3)
    q, k, v = (x.detach() for x in draw(shape))
    padding, bias = torch.tensor([[0, 1, 0, 0], [1, 1, 0, 1]]).bool(), draw_mask("float [B, Hq, L, S]", shape)
    bias[0, 0, 1] = -torch.inf
    expected = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    for b, h, i in itertools.product(range(2), range(2), range(3)):
        seen = [j for j in range(4) if not padding[b, j] and bias[b, h, i, j] > -torch.inf]
        exps = {j: torch.exp(0.5 * q[b, h, i] @ k[b, 0, j] + bias[b, h, i, j]) for j in seen}
        for j in seen:
            expected[b, h, i] += exps[j] / sum(exps.values()) * v[b, 0, j]
    actual, _ = reference.softmax_attention(q, k, v, bias, padding, dropout_p=0.0, is_causal=False, scale=0.5)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", ["causal", "bool [L, S]", "float [B, Hq, L, S]"])
def test_padding_costs_torchs_kernel_no_accuracy(mask, dtype):
    shape = (2, 6, 3, 130, 130, 24, 24)
    q, k, v = draw(shape, dtype)
    padding, attn_mask = draw_padding(shape, seed=1), draw_mask(mask, shape)
    padding[0, 100:] = False
    arguments = {"attn_mask": attn_mask, "is_causal": mask == "causal", "enable_gqa": True}
    exact = outputs(*(x.detach().double().requires_grad_() for x in (q, k, v)), key_padding_mask=padding, **arguments)
    actual = outputs(q, k, v, key_padding_mask=padding, **arguments, impl="torch")

    attn_mask = torch.ones(130, 130, dtype=torch.bool).tril() if mask == "causal" else attn_mask
    if attn_mask.dtype == torch.bool:
        merged = attn_mask & ~padding[:, None, None]
    else:
        merged = attn_mask.to(dtype).masked_fill(padding[:, None, None], -torch.inf)
    torchs = outputs(q, k, v, merged, enable_gqa=True, impl="torch")
    for name, x, y, oracle in zip(("output", "dq", "dk", "dv"), actual, torchs, exact, strict=True):
        error, limit = ((z.double() - oracle).abs().max() for z in (x, y))
        assert 0 < error <= 1.02 * limit, name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_query_that_sees_no_key_gives_zero_and_passes_no_gradient(dtype, dropout_p, impl):
    shape = (2, 2, 2, 6, 6, 8, 8)
    q, k, v = draw(shape, dtype)
    row = torch.ones(6, 6, dtype=torch.bool)
    row[2] = False
    infinite = torch.zeros(6, 6, dtype=dtype).masked_fill(~row, -torch.inf)
    leading, whole = torch.zeros(2, 6, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.bool)
    leading[0, :3], whole[0] = True, True
    # each with the queries of the first sequence that then see nothing
    cases = [
        ({"attn_mask": row}, [2]),
        ({"attn_mask": infinite}, [2]),
        ({"key_padding_mask": whole}, range(6)),
        ({"key_padding_mask": whole, "is_causal": True}, range(6)),
        ({"key_padding_mask": leading, "is_causal": True}, range(3)),
        ({"key_padding_mask": leading, "attn_mask": row.tril()}, range(3)),
        ({"key_padding_mask": leading, "attn_mask": infinite}, [2]),
    ]
    for arguments, blind in cases:
        if impl == "cpu" and "attn_mask" in arguments:
            continue
        out, dq, dk, dv = outputs(q, k, v, **arguments, dropout_p=dropout_p, impl=impl)
        for x in (out, dq):
            assert (x[0, :, list(blind)] == 0).all(), arguments.keys()
        assert all(x.isfinite().all() for x in (out, dq, dk, dv)), arguments.keys()
        assert out[1, :, 3:].count_nonzero() > 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("mask", ["", "causal", "bool [L, S]", "float [B, Hq, L, S]"])
def test_what_padded_keys_hold_changes_no_bit(mask, poison, impl):
    skip_masks(impl, mask)
    shape = (2, 2, 1, 9, 9, 5, 6)
    q, k, v = draw(shape, torch.float32)
    padding = draw_padding(shape, seed=2)
    padding[0] = torch.arange(9) >= 6
    attn_mask = draw_mask(mask, shape)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.float()
    arguments = {"attn_mask": attn_mask, "is_causal": mask == "causal", "enable_gqa": True, "impl": impl}
    results = []
    for filling in (0.0, poison):
        filled = [x.detach().masked_fill(padding[:, None, :, None], filling).requires_grad_() for x in (k, v)]
        results.append(outputs(q, *filled, key_padding_mask=padding, **arguments))
    for name, x, y in zip(("output", "dq", "dk", "dv"), *results, strict=True):
        assert_same_bits(name, x, y)
        assert x.isfinite().all(), name
    for x in results[1][2:]:
        assert (x.masked_select(padding[:, None, :, None]) == 0).all()


@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_future_keys_do_not_change_past_outputs(dtype, padded, impl):
    L = 600  # beyond one block of torch's kernel
    q, k, v = (x.detach() for x in draw((1, 2, 2, L, L, 8, 8), dtype))
    padding = torch.arange(L)[None] % 7 == 3 if padded else None
    expected = softmax_attention(q, k, v, is_causal=True, key_padding_mask=padding, impl=impl)
    for cut in (1, 63, 511, 599):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, cut:], v2[:, :, cut:] = 1e3, -1e4
        actual = softmax_attention(q, k2, v2, is_causal=True, key_padding_mask=padding, impl=impl)
        assert_same_bits(f"cut {cut}", actual[:, :, :cut], expected[:, :, :cut])
        assert (actual[:, :, cut:] != expected[:, :, cut:]).any()


@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_equals_leaving_the_keys_out(is_causal, impl):
    # many blocks of a kernel that hold padded keys only, before and after the valid ones
    L, start, stop = 1300, 700, 1250
    q, k, v = draw((1, 2, 2, L, L, 8, 8))
    padding = (torch.arange(L) < start) | (torch.arange(L) >= stop)
    padded = softmax_attention(q, k, v, is_causal=is_causal, key_padding_mask=padding[None], impl=impl)
    kept = (x[:, :, start:stop] for x in (k, v))
    queries = q[:, :, start:stop] if is_causal else q
    short = softmax_attention(queries, *kept, is_causal=is_causal, impl=impl)
    torch.testing.assert_close(padded[:, :, start:stop] if is_causal else padded, short, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", ["causal", "bool [L, S]", "float [B, Hq, L, S]"])
def test_masks_merge_for_kernels_that_take_one(mask):
    # the way of devices other than the CPU
    shape = (2, 4, 2, 6, 6, 8, 8)
    q, k, v = (x.detach() for x in draw(shape))
    padding, attn_mask = draw_padding(shape), draw_mask(mask, shape)
    wide = attn_mask if attn_mask is None else attn_mask[(None,) * (4 - attn_mask.dim())]
    merged = softmax._merge(wide, padding, 6, mask == "causal")
    options = {"enable_gqa": True, "impl": "reference"}
    expected = softmax_attention(q, k, v, attn_mask, 0.0, mask == "causal", key_padding_mask=padding, **options)
    torch.testing.assert_close(softmax_attention(q, k, v, merged, **options), expected)
    assert expected[1].count_nonzero() > 0


class Watch(TorchDispatchMode):
    """Names of the operators that ran, and the most elements any of their results had."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return result


@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("arguments", ["", "causal", "padding", "causal padding", "gqa", "narrow values", "strides"])
def test_neither_forward_nor_backward_forms_the_scores(arguments, impl):
    L, D = 512, 16
    H, E = (1 if "gqa" in arguments else 4), (D - 6 if "narrow" in arguments else D)
    q, k, v = draw((1, 4, H, L, L, D, E), torch.float32)
    if "strides" in arguments:
        q, k, v = (x.detach().mT.contiguous().mT.requires_grad_() for x in (q, k, v))
    padding = torch.arange(L)[None] % 5 == 0 if "padding" in arguments else None
    with Watch() as watch:
        out = softmax_attention(
            q, k, v, None, 0.0, "causal" in arguments, None, "gqa" in arguments, key_padding_mask=padding, impl=impl
        )
        out.sum().backward()
    ran = {"cpu": "_softmax_backward", "torch": "_scaled_dot_product_flash_attention_for_cpu"}
    assert ran[impl] in watch.names
    assert watch.largest <= 4 * L * (D + 8) < L * L


def test_fused_kernel_reads_shared_keys_unrepeated():
    q, k, v = (x.detach() for x in draw((1, 8, 2, 64, 64, 8, 8), torch.float32))
    with Watch() as watch:
        shared = softmax_attention(q, k, v, enable_gqa=True, impl="torch")
    assert watch.names == {"_scaled_dot_product_flash_attention_for_cpu"} | (watch.names & {"slice", "alias"})
    repeated = softmax_attention(q, k.repeat_interleave(4, 1), v.repeat_interleave(4, 1))
    torch.testing.assert_close(shared, repeated)


@pytest.mark.parametrize("impl", IMPLS)
def test_layout_does_not_change_the_result(impl):
    q, k, v = (x.detach() for x in draw((2, 3, 3, 6, 6, 4, 4)))
    expected = softmax_attention(q, k, v, impl=impl)
    sliced = [torch.stack([x, -x], -1)[..., 0] for x in (q, k, v)]
    torch.testing.assert_close(softmax_attention(*sliced, impl=impl), expected)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(softmax_attention(*transposed, impl=impl), expected)
    shared = k[:1].expand(2, -1, -1, -1)
    expanded = softmax_attention(q, shared, v, impl=impl)
    torch.testing.assert_close(expanded, softmax_attention(q, shared.contiguous(), v, impl=impl))


def test_gradient_of_expanded_inputs_is_summed():
    q, k, v = draw((2, 3, 3, 5, 5, 4, 4))
    one = k.detach()[:1].requires_grad_()
    padding = draw_padding((2, 3, 3, 5, 5, 4, 4), seed=3)
    torch.autograd.gradcheck(
        lambda one: softmax_attention(q, one.expand(2, -1, -1, -1), v, is_causal=True, key_padding_mask=padding), one
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_is_that_of_the_function(impl, is_causal):
    shape = (2, 2, 1, 4, 4, 3, 2)
    padding = torch.tensor([[False, True, False, False], [True, False, False, True]])
    torch.autograd.gradcheck(
        lambda q, k, v: softmax_attention(
            q, k, v, is_causal=is_causal, enable_gqa=True, key_padding_mask=padding, impl=impl
        ),
        draw(shape),
    )


def test_gradient_reaches_a_float_mask():
    shape = (2, 2, 2, 3, 4, 3, 3)
    q, k, v = (x.detach() for x in draw(shape))
    bias = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    padding = torch.tensor([[False, True, False, False], [True, False, False, True]])
    torch.autograd.gradcheck(lambda bias: softmax_attention(q, k, v, bias, key_padding_mask=padding), bias)


@pytest.mark.parametrize("is_causal", [False, True])
def test_dropout_draws_as_torch_does(is_causal):
    q, k, v = (x.detach() for x in draw((2, 2, 2, 6, 6, 4, 4)))
    results = []
    for attend in (F.scaled_dot_product_attention, softmax_attention):
        torch.manual_seed(3)
        results.append(attend(q, k, v, None, 0.5, is_causal))
    torch.testing.assert_close(*results)
    assert not torch.equal(softmax_attention(q, k, v, None, 0.5, is_causal), results[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_of_everything_gives_zero(impl):
    q, k, v = draw((1, 2, 2, 5, 5, 4, 4))
    assert all((x == 0).all() for x in outputs(q, k, v, dropout_p=1.0, impl=impl))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_weights_are_those_that_sum_the_values(dropout_p):
    shape = (2, 4, 2, 5, 7, 3, 6)
    q, k, v = (x.detach() for x in draw(shape))
    padding = draw_padding(shape)
    out, weights = softmax_attention_with_weights(
        q, k, v, dropout_p=dropout_p, enable_gqa=True, key_padding_mask=padding
    )
    torch.testing.assert_close(out, weights @ v.repeat_interleave(2, 1))
    assert (weights.masked_select(padding[:, None, None]) == 0).all()
    if dropout_p == 0:
        torch.testing.assert_close(weights.sum(-1), (~padding.all(1))[:, None, None].expand(2, 4, 5).double())
        plain = softmax_attention(q, k, v, enable_gqa=True, key_padding_mask=padding)
        torch.testing.assert_close(out, plain)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_computes_in_its_dtype(impl):
    q, k, v = (x.detach() for x in draw((1, 2, 2, 5, 5, 8, 8), torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = softmax_attention(q, k, v, impl=impl)
    assert_same_bits("output", actual, softmax_attention(*(x.bfloat16() for x in (q, k, v)), impl=impl))


def test_inputs_and_generator_are_left_alone():
    shape = (2, 2, 2, 5, 5, 4, 4)
    q, k, v = draw(shape)
    padding, before = draw_padding(shape), torch.get_rng_state()
    copies, versions = [x.detach().clone() for x in (q, k, v, padding)], [x._version for x in (q, k, v, padding)]
    for arguments in ({"is_causal": True}, {"attn_mask": torch.zeros(5, 5, dtype=torch.float64)}, {}):
        outputs(q, k, v, **arguments, key_padding_mask=padding)
    assert versions == [x._version for x in (q, k, v, padding)]
    assert all(torch.equal(x, y) for x, y in zip((q, k, v, padding), copies, strict=True))
    assert torch.equal(before, torch.get_rng_state())


def test_meta_tensors_give_shapes():
    q, k, v = (x.detach().to("meta") for x in draw((2, 4, 2, 5, 5, 3, 6)))
    padding = torch.zeros(2, 5, dtype=torch.bool, device="meta")
    for is_causal in (False, True):
        out = softmax_attention(q, k, v, is_causal=is_causal, enable_gqa=True, key_padding_mask=padding)
        assert out.shape == (2, 4, 5, 6)


# with padding it is held to this in test_attention_encoder.py; torch deprecates parts of itself that its tracing uses
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_compiled_graph_serves_all_lengths():
    torch.compiler.reset()
    compiled = torch.compile(softmax_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for L in (5, 17, 70):
            q, k, v = draw((2, 4, 2, L, L, 8, 6), seed=L)
            arguments = {"is_causal": True, "enable_gqa": True}
            torch.testing.assert_close(compiled(q, k, v, **arguments), softmax_attention(q, k, v, **arguments))


def test_explain_names_the_engine_and_computes_nothing():
    q, k, v = (x.detach() for x in draw((1, 2, 2, 4, 4, 3, 3)))
    with Watch() as watch:
        explanation = longattn.explain(softmax_attention, query=q, key=k, value=v, is_causal=True)
    assert explanation.chosen == "torch"
    assert explanation.reasons | {"triton": None} == dict.fromkeys(("torch", "cpu", "triton", "reference"))
    assert not watch.names
    long = [x.expand(1, 2, 64, 3) for x in (q[:, :, :1], k[:, :, :1], v[:, :, :1])]
    assert longattn.explain(softmax_attention, *long).chosen == "cpu"
    assert longattn.explain(softmax_attention, *long, dropout_p=0.1).chosen == "torch"
    assert longattn.explain(softmax_attention, *long, torch.zeros(64, 64)).chosen == "torch"
    with pytest.raises(ValueError, match=r"^softmax_attention: query has 2 heads and key has 1; "):
        longattn.explain(softmax_attention, q, k[:, :1], v[:, :1])


GOOD = {name: torch.zeros(2, 2, 3, 4) for name in ("query", "key", "value")}


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"query": torch.zeros(2, 3, 4)}, ValueError, "query must be [batch, heads, length, dim], got [2, 3, 4]"),
        ({"key": [1.0]}, TypeError, "key must be a tensor, got list [1.0]"),
        ({"value": torch.zeros(2, 2, 3, 4, dtype=torch.int64)}, TypeError, "value must be float32"),
        ({"key": torch.zeros(2, 2, 3, 4, dtype=torch.float16)}, TypeError, "query, key and value must share a dtype"),
        ({"key": torch.zeros(2, 2, 3, 4, device="meta")}, ValueError, "query, key and value must be on one device"),
        ({"query": torch.zeros(1, 2, 3, 4)}, ValueError, "query, key and value must share the batch size"),
        ({"value": torch.zeros(2, 2, 5, 4)}, ValueError, "key and value must share heads and length"),
        ({"query": torch.zeros(2, 2, 3, 5)}, ValueError, "query and key must share head_dim, got 5 and 4"),
        ({"query": torch.zeros(2, 4, 3, 4)}, ValueError, "pass enable_gqa=True if query heads share keys"),
        ({"query": torch.zeros(2, 3, 3, 4), "enable_gqa": True}, ValueError, "query heads must be a multiple"),
        ({"attn_mask": [True]}, TypeError, "attn_mask must be a tensor, got list [True]"),
        ({"attn_mask": torch.zeros(3, 3, dtype=torch.int64)}, TypeError, "attn_mask must be bool (True = may attend)"),
        ({"attn_mask": torch.zeros(3, 4)}, ValueError, "broadcast to [B, Hq, L, S] = [2, 2, 3, 3]"),
        ({"attn_mask": torch.zeros(1, 2, 2, 3, 3)}, ValueError, "got float32 [1, 2, 2, 3, 3] on cpu"),
        ({"attn_mask": torch.zeros(3, 3, device="meta")}, ValueError, "and be on cpu, got float32 [3, 3] on meta"),
        ({"attn_mask": torch.zeros(3, 3), "is_causal": True}, ValueError, "attn_mask and is_causal exclude each other"),
        ({"key_padding_mask": torch.zeros(2, 3)}, TypeError, "pass mask == float('-inf')"),
        ({"key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)}, ValueError, "got bool [2, 4] on cpu"),
        ({"key_padding_mask": torch.zeros(3, dtype=torch.bool)}, ValueError, "must be bool [B, S] = [2, 3]"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be a probability from 0 to 1, got float -0.1"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p must be a probability"),
        ({"dropout_p": "0.1"}, ValueError, "dropout_p must be a probability"),
        ({"scale": float("inf")}, ValueError, "scale must be a finite number or None, got float inf"),
        ({"impl": "cuda"}, ValueError, "one of 'cpu', 'torch', 'triton', 'reference', got 'cuda'"),
        (
            {"impl": "cpu", "attn_mask": torch.zeros(3, 3)},
            ValueError,
            "impl='cpu' cannot run this call: attn_mask runs in torch; causality, windows and key padding run here",
        ),
    ],
)
def test_bad_input_gets_one_sentence(change, error, sentence):
    with pytest.raises(error) as caught:
        softmax_attention(**(GOOD | change))
    assert str(caught.value).startswith("softmax_attention: ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
