"""Laws of sliding windows and of chunks: `softmax_attention(window=)` and the mechanism `Local`."""

import re

import pytest
import torch

import longattn
from longattn import Local, softmax_attention

NAN = float("nan")
# window, causal, (B, Hq, H, L, S, D, E)
CASES = [
    (1, True, (1, 2, 1, 70, 70, 5, 6)),
    (1, False, (1, 1, 1, 66, 66, 4, 4)),
    (7, True, (2, 2, 2, 130, 130, 8, 5)),
    (64, True, (1, 1, 1, 200, 200, 8, 8)),
    (65, False, (1, 2, 1, 333, 333, 3, 8)),
    (100, True, (1, 1, 1, 100, 300, 8, 8)),
    (20, False, (1, 1, 1, 300, 100, 8, 8)),
    (5000, True, (1, 1, 1, 100, 100, 8, 8)),
]


def draw(shape, seed=0, dtype=torch.float64):
    B, Hq, H, L, S, D, E = shape
    g = torch.Generator().manual_seed(seed)
    sizes = ((B, Hq, L, D), (B, H, S, D), (B, H, S, E))
    return [torch.randn(size, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


def band(L, S, window, causal):
    """True = may attend."""
    apart = torch.arange(L)[:, None] - torch.arange(S)
    return (apart < window) & (apart >= 0 if causal else -apart < window)


def results(q, k, v, **options):
    out = softmax_attention(q, k, v, enable_gqa=True, **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), weights)]


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("window", "causal", "shape"), CASES)
def test_a_window_is_a_band_of_the_mask(window, causal, shape, padded, impl):
    q, k, v = draw(shape)
    B, S = shape[0], shape[4]
    padding = torch.rand(B, S, generator=torch.Generator().manual_seed(1)) < 0.3 if padded else None
    masks = {"key_padding_mask": padding}
    expected = results(q, k, v, attn_mask=band(shape[3], S, window, causal), impl="reference", **masks)
    actual = results(q, k, v, window=window, is_causal=causal, impl=impl, **masks)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_window_as_wide_as_the_input_is_no_window(dtype):
    q, k, v = draw((1, 2, 2, 300, 300, 16, 16), dtype=dtype)
    wide, without = (results(q, k, v, is_causal=True, window=window, impl="cpu") for window in (300, None))
    assert all(torch.equal(x, y) for x, y in zip(wide, without, strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_what_is_outside_the_window_changes_no_bit(causal):
    L, window, at = 300, 50, 120
    q, k, v = draw((1, 1, 1, L, L, 8, 8), dtype=torch.float32)
    before = softmax_attention(q, k, v, is_causal=causal, window=window, impl="cpu").detach()
    k, v = (x.detach().clone() for x in (k, v))
    k[:, :, at] = v[:, :, at] = NAN
    after = softmax_attention(q, k, v, is_causal=causal, window=window, impl="cpu")
    sees = band(L, L, window, causal)[:, at]
    assert after[0, 0, sees].isnan().all()
    assert torch.equal(after[0, 0, ~sees], before[0, 0, ~sees])


def test_same_bits_for_any_number_of_threads():
    q, k, v = draw((1, 2, 2, 500, 500, 8, 8), dtype=torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(results(q, k, v, window=70, impl="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(other, found[0], strict=True))


@pytest.mark.parametrize(("before", "after"), [(1, 0), (0, 0), (2, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_chunks_are_whole_blocks_of_the_mask(before, after, causal):
    size, L = 16, 100
    q, k, v = (x.detach() for x in draw((1, 2, 2, L, L, 8, 8)))
    ahead = torch.arange(L) // size - (torch.arange(L) // size)[:, None]
    allowed = (ahead >= -before) & (ahead <= after)
    if causal:
        allowed = allowed.tril()
    expected = softmax_attention(q, k, v, attn_mask=allowed, impl="reference")
    local = Local(size, chunks=(before, after))
    masks = {"is_causal": causal, "key_padding_mask": None}
    torch.testing.assert_close(local.attend(q, k, v, dropout_p=0.0, **masks), expected)
    torch.testing.assert_close(local.weights(q, k, **masks) @ v, expected)


def test_dropout_keeps_the_mean_and_the_band():
    q, k, v = (x.detach() for x in draw((1, 1, 1, 200, 200, 8, 200)))
    v = torch.eye(200, dtype=torch.float64)[None, None]
    torch.manual_seed(0)
    weights = softmax_attention(q, k, v, window=40, is_causal=True, dropout_p=0.25)[0, 0]
    plain = softmax_attention(q, k, v, window=40, is_causal=True)[0, 0]
    seen = band(200, 200, 40, True)
    assert (weights[~seen] == 0).all()
    dropped = weights[seen] == 0
    assert 0.22 < dropped.double().mean() < 0.28
    torch.testing.assert_close(weights[seen][~dropped], plain[seen][~dropped] / 0.75)


def test_explain_says_why_torch_does_not_run_a_window():
    q, k, v = (x.detach() for x in draw((1, 1, 1, 10, 10, 4, 4)))
    explanation = longattn.explain(softmax_attention, q, k, v, window=3)
    assert explanation.chosen == "cpu"
    assert "no window" in explanation.reasons["torch"]
    with pytest.raises(ValueError, match="impl='torch' cannot run this call: torch's kernels know no window"):
        softmax_attention(q, k, v, window=3, impl="torch")


# torch deprecates parts of itself that its tracing uses
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_compiled_graph_serves_all_lengths():
    torch.compiler.reset()
    compiled = torch.compile(softmax_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for L in (5, 70, 200):
            q, k, v = draw((1, 2, 2, L, L, 8, 8), seed=L)
            arguments = {"is_causal": True, "window": 20}
            torch.testing.assert_close(compiled(q, k, v, **arguments), softmax_attention(q, k, v, **arguments))


CALL = {"is_causal": True, "key_padding_mask": None, "dropout_p": 0.0}


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: softmax_attention(x, x, x, window=0), "window must be a positive integer or None, got 0"),
        (lambda x: softmax_attention(x, x, x, window=2.0), "window must be a positive integer or None, got 2.0"),
        (lambda x: softmax_attention(x, x, x, torch.ones(3, 3), window=2), "attn_mask and window exclude each other"),
        (lambda x: Local(2).attend(x, x, x, attn_mask=torch.ones(3, 3), **CALL), "Local: attn_mask is not taken"),
        (lambda x: Local(2, (0, 0)).attend_with_weights(x, x, x, attn_mask=x, **CALL), "Local: attn_mask is not taken"),
        (lambda _: Local(0), "Local: window must be a positive integer, got 0"),
        (lambda _: Local(4, chunks=(1, -1)), "Local: chunks must be None or two counts, (before, after), got (1, -1)"),
        (lambda _: Local(4, chunks=1), "Local: chunks must be None or two counts, (before, after), got 1"),
    ],
)
def test_bad_windows_are_refused_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call(torch.zeros(1, 1, 3, 4))
