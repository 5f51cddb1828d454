"""Run by test_triton_toeplitz.py in a process of its own: linear attention with relative positions, and FAVOR+ features
as a tensor, through Triton's interpreter, on the CPU.
"""

import sys

import torch
from longattn.kernels import features, toeplitz, toeplitz_fft

import longattn
from longattn import features as maps
from longattn.favor import draw_projection
from longattn.ops import _dispatch, _toeplitz_fft
from longattn.testing.toeplitz import (
    TOEPLITZ,
    ToeplitzCase,
    build_toeplitz,
    check_toeplitz,
    fft_bound,
    oracle,
    run_toeplitz,
)

NAN, INF = float("nan"), float("inf")
# the table's options for fewer heads and dims: the interpreter takes long for every program
SMALL = tuple(
    ToeplitzCase(name, **{"B": 1, "H": 1, "E": 8, "is_causal": not name.startswith("full")} | options)
    for name, options in {
        # states of segments before the tile and, not causal, after it
        "far": {"L": 40, "reach": 1, "mask": "random"},
        "full, far": {"L": 70, "reach": 3, "E": 3, "holes": True},
        "full, near": {"L": 35, "reach": 40, "groups": 2},
        "one factor": {"L": 40, "reach": 0, "normalize": False, "scale": -0.3},
        "packed": {"L": 50, "reach": 1, "lengths": (1, 40, 0, 9)},
        "full, packed": {"L": 50, "reach": 1, "lengths": (40, 0, 10), "mask": "random"},
        "full, more keys": {"L": 10, "S": 50, "reach": 4},
        "full, more queries": {"L": 50, "S": 10, "reach": 9},
        "wide": {"L": 35, "D": 20, "E": 40, "reach": 9},
        "all masked": {"L": 20, "mask": "all"},
        # transforms: two spans of the queries, odd lengths, NaN behind masked keys
        "spans": {"L": 71, "reach": 70, "mask": "random", "groups": 2},
        "full, sums": {"L": 33, "S": 14, "reach": 40, "E": 3, "normalize": False, "mask": "random"},
        "full, tail": {"L": 35, "reach": 5, "mask": "tail", "B": 2, "groups": 2},
    }.items()
)


def few_steps() -> None:
    """Segments as small as tiles may be, so that short sequences have far keys, and wide tiles of sources; blocks of
    transforms of a few features, and stages of more than one program for a row."""
    toeplitz.SEGMENT = dict.fromkeys(toeplitz.SEGMENT, 32)
    tiles = toeplitz.TILES[0][-1]._replace(own=32, other=32, inner=16, outer=32)
    _toeplitz_fft.BLOCK_BYTES = 16_000
    toeplitz_fft.SPREAD = toeplitz_fft.CONTRACT = toeplitz_fft.CORRELATE = 16, 32
    toeplitz.TILES = tuple((dot, "", toeplitz.MAX_DIM, tiles) for dot in ("bf16", "tf32", "ieee"))


def past_sees_no_future() -> None:
    """A later key, value or query, however strange, changes no earlier output bit; and reaches what may see it."""
    g, n = torch.Generator().manual_seed(0), 40
    tensors, rest = torch.rand(3, 1, 1, n, 4, generator=g).unbind(), (torch.rand(1, 3, generator=g), None, None)
    options = {"reach": 1, "offset": 0, "is_causal": True, "normalize": True}
    out, z = toeplitz.forward(*tensors, *rest, **options)
    for which, at, strange in ((0, 36, NAN), (1, 20, NAN), (2, 1, INF)):
        changed = [x.clone() for x in tensors]
        changed[which][:, :, at] = strange
        after = toeplitz.forward(*changed, *rest, **options)[0]
        assert torch.equal(out[:, :, :at], after[:, :, :at]), f"a future {strange} reached the past"
        assert not after[:, :, at : None if which else at + 1].isfinite().any(), f"{strange} vanished"
        assert which or torch.equal(out[:, :, at + 1 :], after[:, :, at + 1 :]), "a query reached another"
    grad = torch.rand(out.shape, generator=g)
    grads = toeplitz.backward(grad, None, *tensors, *rest, out, z, **options)
    grad[:, :, 36] = NAN
    strange = toeplitz.backward(grad, None, *tensors, *rest, out, z, **options)
    at = torch.arange(n)
    for name, x, y in zip(("dq", "dk", "dv"), grads[:3], strange[:3], strict=True):
        reached = at == 36 if name == "dq" else at <= 36
        assert torch.equal(x[:, :, ~reached], y[:, :, ~reached]), f"NaN of one row's gradient reached {name} too far"
        assert not y[:, :, reached].isfinite().any(), f"NaN of one row's gradient vanished from {name}"


def streams_agree() -> None:
    """A prompt, a token, and more than the ring holds, impl="triton" against impl="reference", with gradients."""
    g = torch.Generator().manual_seed(2)
    q, k, v, grad = torch.randn(4, 1, 1, 40, 6, generator=g)
    bias = torch.randn(1, 11, generator=g)
    results = {}
    for impl in ("triton", "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, bias)]
        state, parts = None, []
        for rows in zip(*(x.split((20, 1, 19), 2) for x in leaves[:3]), strict=True):
            part, state = longattn.linear_attention_with_state(
                *rows, state=state, rpe_bias=leaves[3], is_causal=True, impl=impl
            )
            parts.append(part)
        output = torch.cat(parts, 2)
        results[impl] = [output, *torch.autograd.grad((output * grad).sum(), leaves)]
    for x, y in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
        assert y.abs().sum() > 0


def transforms_stay_within_their_bound(case: ToeplitzCase, dtype: torch.dtype) -> None:
    """As test_toeplitz.py asks of rpe_method="fft"; what is rounded to another dtype may be off by that too."""
    inputs = build_toeplitz(case, dtype)
    actual = run_toeplitz(inputs, "triton", "fft")
    if case.sees_nothing or 0 in inputs.q.shape:
        assert all((x == 0).all() for x in actual.values())
        return
    eps = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
    bound, expected = fft_bound(inputs), oracle(case, dtype)
    error = (actual["output"].double() - expected["output"]).abs()
    assert (error <= bound + eps * expected["output"].abs()).all(), f"output: {error.max():.1e}"
    for name, x in expected.items():
        error = (actual[name].double() - x).abs().max()
        assert error <= (1e-4 + 4 * eps) * max(x.abs().max(), 1), f"{name}: {error:.1e}"


def features_are_the_formula(dtype: torch.dtype) -> None:
    """phi, dx and droot of every kind, of queries and of keys with a mean, against float64."""
    g = torch.Generator().manual_seed(3)
    exact = {torch.float32: 2e-6, torch.float16: 2e-5, torch.bfloat16: 1e-4}[dtype]
    rounded = max(8 * exact, 4 * torch.finfo(dtype).eps)
    sizes = (("positive", 5, 40, False), ("positive", 8, 16, True), ("hyperbolic", 16, 20, True), ("trig", 8, 7, True))
    for kind, D, P, logs in (*sizes, ("relu", 8, 16, False)) if dtype == torch.float32 else sizes[1:2]:
        x = torch.randn(1, 2, 17, D, generator=g).to(dtype).transpose(2, 3).contiguous().transpose(2, 3)
        x[:, :, 3] = 0
        projection, root = draw_projection(P, D, seed=1), torch.tensor(1.2)
        mean = torch.randn(2, D, generator=g) / 8 if logs else None
        phi = features.forward(x, projection, root, mean, kind=kind, logs=logs)
        grad = torch.randn(phi.shape, generator=g)
        dx, droot = features.backward(grad, phi, x, projection, root, mean, kind=kind, logs=logs)
        leaf, leaf_root = x.double().requires_grad_(), root.double().requires_grad_()
        wide = projection.double()
        rows = maps.favor_rows(leaf, leaf_root, True, None if mean is None else mean.double())
        expected, a = maps.favor_features(rows, wide, kind)
        if logs:
            expected = expected * torch.exp(a - maps.favor_bound(wide, leaf_root, kind))[..., None]
        wanted = torch.autograd.grad((expected * grad).sum(), (leaf, leaf_root))
        assert (phi.dtype, dx.dtype, droot.dtype) == (torch.float32, dtype, torch.float32)
        results = (
            ("phi", phi, expected, exact),
            ("dx", dx, wanted[0], rounded),
            ("droot", droot, wanted[1], rounded),
        )
        for name, y, z, limit in results:
            # droot is a sum over rows whose terms cancel
            size = z.abs().max() if y.dim() else wanted[0].abs().sum()
            error = ((y - z).abs().max() / size).item()
            assert error <= limit, f"{name} of {kind}, {logs=}, {dtype}: {error:.1e} of {limit:.1e} allowed"


if __name__ == "__main__":
    assert _dispatch._interpreting(), "set TRITON_INTERPRET=1"
    torch.set_num_threads(1)
    few_steps()
    table = {case.name: case for case in (*TOEPLITZ, *SMALL)}
    laws = {"law": past_sees_no_future, "stream": streams_agree}
    for name in sys.argv[1:]:
        *before, case = name.split(":")
        fft = "fft" in before
        dtype = getattr(torch, next((x for x in before if x != "fft"), "float32"))
        if case in laws:
            laws[case]()
        elif case == "phi":
            features_are_the_formula(dtype)
        elif fft:
            transforms_stay_within_their_bound(table[case], dtype)
        else:
            check_toeplitz(table[case], dtype, "triton", "prefix")
        print(f"{name}: kept", flush=True)
