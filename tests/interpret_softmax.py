"""Run by test_triton_softmax.py in a process of its own: a bias by offset in tile attention in Triton's interpreter."""

import math
import sys
from itertools import pairwise

import torch
from longattn.kernels import softmax

from longattn import softmax_attention
from longattn.ops import softmax as ops
from longattn.ops._tiles import Options, attend
from longattn.testing.assertions import FORWARD_FACTOR, GRADIENT_FACTOR

NAMES = ("output", "dq", "dk", "dv", "dbias")
# B, Hq, H, L, S, K, then options
CASES = {
    "one token": (1, 1, 1, 1, 1, 0, {}),
    "causal, clipped": (1, 2, 1, 50, 50, 3, {"is_causal": True, "mask": True}),
    "causal, full": (1, 1, 1, 37, 37, 36, {"is_causal": True}),
    "causal, one number": (1, 1, 1, 40, 40, 0, {"is_causal": True}),
    "clipped": (2, 2, 2, 40, 40, 5, {"mask": True}),
    "full, more keys": (1, 2, 1, 20, 50, 60, {"mask": True}),
    "more queries": (1, 1, 1, 70, 20, 17, {}),
    "two numbers": (1, 1, 1, 35, 35, 1, {"shared": True, "scale": -0.4}),
    "shared by heads": (1, 2, 2, 33, 33, 20, {"is_causal": True, "shared": True}),
    "window": (1, 2, 1, 60, 60, 4, {"is_causal": True, "window": 20, "mask": True}),
    "window, whole": (1, 1, 1, 50, 50, 30, {"window": 7}),
    "chunks": (1, 1, 1, 60, 60, 14, {"chunks": ops.Chunks(10, 1, 1)}),
    "chunks, causal": (1, 2, 1, 60, 60, 40, {"chunks": ops.Chunks(7, 2, 0), "is_causal": True}),
    "all hidden": (1, 1, 1, 20, 20, 2, {"hidden": True}),
    "no query": (1, 1, 1, 0, 5, 2, {}),
    "no key": (1, 2, 1, 5, 0, 2, {}),
}


def few_rows() -> None:
    """Tiles as small as they may be, so that short sequences have many; two blocks of D and of E."""
    tiles = softmax.Tiles(16, 16, 16, 16, 4, 1)
    softmax.TILES = tuple((dot, "", softmax.MAX_DIM, tiles) for dot in ("bf16", "tf32", "ieee"))


def build(name: str, seed: int = 0):
    B, Hq, H, L, S, K, options = CASES[name]
    options, g = dict(options), torch.Generator().manual_seed(seed + L + S + K)
    q, k = (torch.randn(B, h, n, 20, generator=g, dtype=torch.float64) for h, n in ((Hq, L), (H, S)))
    v = torch.randn(B, H, S, 17, generator=g, dtype=torch.float64)
    bias = torch.randn(*(() if options.pop("shared", False) else (Hq,)), 2 * K + 1, generator=g, dtype=torch.float64)
    if K > 2:
        bias[..., K - 1] = -math.inf
    if options.pop("hidden", False):
        bias.fill_(-math.inf)
    if options.pop("mask", False):
        options["key_padding_mask"] = torch.rand(B, S, generator=g) < 0.3
    return [q, k, v, bias], torch.randn(B, Hq, L, 17, generator=g, dtype=torch.float64), options


def run(tensors, grad, dtype, impl, options):
    """-> by name, with padded rows of NaN and strides that no one would choose where kernels run"""
    leaves = [x.to(dtype if x.dim() == 4 else torch.promote_types(dtype, torch.float32)) for x in tensors]
    mask = options.get("key_padding_mask")
    if impl == "triton":
        if mask is not None:
            leaves[1:3] = (x.masked_fill(mask[:, None, :, None], math.nan) for x in leaves[1:3])
        leaves = [x.mT.contiguous().mT if x.dim() > 1 else x for x in leaves]
    leaves = [x.requires_grad_() for x in leaves]
    out = ops.attend("softmax_attention", *leaves[:3], rpe_bias=leaves[3], enable_gqa=True, impl=impl, **options)
    return dict(zip(NAMES, (out, *torch.autograd.grad(out, leaves, grad.to(dtype))), strict=True))


def eager(tensors, grad, dtype, options):
    """The same formula in torch's own operations in one dtype."""
    leaves = [x.to(dtype if x.dim() == 4 else torch.promote_types(dtype, torch.float32)) for x in tensors]
    q, k, v, bias = (x.requires_grad_() for x in leaves)
    L, S, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    t = torch.arange(S) - torch.arange(L)[:, None]
    reach = bias.shape[-1] // 2
    scale = options.get("scale", q.shape[3] ** -0.5)
    s = scale * q @ k.repeat_interleave(groups, 1).mT
    s = s + bias[..., t.clamp(-reach, reach) + reach].to(dtype)
    if options.get("is_causal"):
        s = s.masked_fill(t > 0, -math.inf)
    out = s.softmax(-1) @ v.repeat_interleave(groups, 1)
    return dict(zip(NAMES, (out, *torch.autograd.grad(out, (q, k, v, bias), grad.to(dtype))), strict=True))


def check(name: str, dtype: torch.dtype) -> None:
    tensors, grad, options = build(name)
    if dtype != torch.float32:
        # what is given, rounded, is what both compute from
        tensors = [x.to(dtype).double() for x in tensors]
        grad = grad.to(dtype).double()
    found = run(tensors, grad, dtype, "triton", options)
    wanted = run(tensors, grad, torch.float64, "reference", options)
    plain = None if dtype == torch.float32 else eager(tensors, grad, dtype, options)
    for key, y in wanted.items():
        x = found[key]
        assert x.shape == y.shape, key
        assert x.dtype == (torch.float32 if key == "dbias" else dtype), key
        if dtype == torch.float32:
            limit = 2e-5 * (1 + y.abs().max().item()) if y.numel() else 0
            torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=limit, msg=lambda m, key=key: f"{key}: {m}")
            continue
        factor = FORWARD_FACTOR if key == "output" else GRADIENT_FACTOR
        error, allowed = ((z.double() - y).abs().amax() for z in (x, plain[key]))
        assert error <= factor * allowed, f"{key}: {error:.2e}, eager has {allowed:.2e}"


def packed_sequences_are_each_alone(dtype: torch.dtype) -> None:
    g, starts, reach = torch.Generator().manual_seed(0), (0, 21, 21, 24, 64), 9
    q, k, v, grad = torch.randn(4, 1, 2, 64, 8, generator=g)
    bias = torch.randn(2, 2 * reach + 1, generator=g)
    for is_causal, window in ((True, 0), (False, 0), (False, 12)):
        ahead = 0 if is_causal else ops.EVERY
        options = Options(16, ops.EVERY, ahead, window, is_causal, 0, False, False, 0.3, 0.0, 0, "triton")
        leaves = [x.clone().requires_grad_() for x in (q, k, v, bias)]
        cu = torch.tensor(starts, dtype=torch.int32)
        out = attend(*leaves[:3], None, cu, None, (None,) * 6, options, leaves[3])
        found = (out, *torch.autograd.grad(out, leaves, grad))
        leaves = [x.double().requires_grad_() for x in (q, k, v, bias)]
        rules = {"is_causal": is_causal, "window": window or None, "scale": 0.3, "impl": "reference"}
        parts = [
            softmax_attention(*(x[:, :, i:j] for x in leaves[:3]), rpe_bias=leaves[3], **rules)
            for i, j in pairwise(starts)
        ]
        out = torch.cat(parts, 2)
        for key, x, y in zip(NAMES, found, (out, *torch.autograd.grad(out, leaves, grad.double())), strict=True):
            assert (x - y).abs().max() < 2e-5 * (1 + y.abs().max()), key


def dropout_drops_alike(dtype: torch.dtype) -> None:
    """With weights dropped: dbias is the derivative of the function that was computed, by a difference."""
    tensors, grad, _ = build("causal, full")
    tensors, grad = [x.float() for x in tensors], grad.float()
    tensors[3] = tensors[3].clamp(min=-2)
    options = Options(64, ops.EVERY, 0, 0, True, 0, False, False, 0.3, 0.4, 7, "triton")

    def f(bias):
        return attend(*tensors[:3], None, None, None, (None,) * 6, options, bias)

    bias = tensors[3].clone().requires_grad_()
    slope = torch.autograd.grad(f(bias), bias, grad)[0]
    toward, step = torch.randn(bias.shape, generator=torch.Generator().manual_seed(1)), 1e-2
    rise = sum(sign * (f(bias.detach() + sign * step * toward).double() * grad).sum() for sign in (1, -1))
    torch.testing.assert_close((slope.double() * toward).sum(), rise / (2 * step), rtol=2e-3, atol=1e-3)


def hidden_keys_may_hold_anything(dtype: torch.dtype) -> None:
    """NaN in a key that a bias of -inf hides stays there; its bits do not move anything; and a run is repeatable."""
    tensors, grad, _ = build("window, whole")
    bias = torch.full((1, 7), -math.inf)
    bias[:, 1:-1] = torch.randn(5, generator=torch.Generator().manual_seed(0))
    tensors[3], options = bias.double(), {"scale": 0.3}
    before, again = (run(tensors, grad, torch.float32, "triton", options) for _ in range(2))
    assert all(torch.equal(before[key], again[key]) for key in NAMES)
    tensors[1][:, :, 30], tensors[2][:, :, 30] = math.nan, math.inf
    after = run(tensors, grad, torch.float32, "triton", options)
    unseen = (torch.arange(50) - 30).abs() > 2
    for key in ("output", "dq"):
        assert torch.equal(before[key][:, :, unseen], after[key][:, :, unseen]), key
        assert not after[key][:, :, ~unseen].isfinite().any(), key


LAWS = {
    "packed": packed_sequences_are_each_alone,
    "dropout": dropout_drops_alike,
    "hidden": hidden_keys_may_hold_anything,
}

if __name__ == "__main__":
    assert softmax.EMULATE, "set TRITON_INTERPRET=1"
    torch.set_num_threads(1)
    few_rows()
    for name in sys.argv[1:]:
        dtype, _, case = name.rpartition(":")
        LAWS.get(case, lambda dtype, case=case: check(case, dtype))(getattr(torch, dtype or "float32"))
        print(f"{name}: kept", flush=True)
