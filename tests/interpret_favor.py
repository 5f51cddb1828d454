"""Run by test_triton_favor.py in a process of its own: FAVOR+'s Triton launchers through the interpreter, on the CPU.

Yardstick and budget are those of longattn.testing.assertions: the error of the eager formula in the kernel's dtype.
"""

import sys
import zlib
from dataclasses import dataclass
from itertools import pairwise

import torch
from longattn.kernels import favor
from torch import Tensor

import longattn
from longattn.favor import draw_projection
from longattn.features import favor_features, favor_rows
from longattn.reference.favor import favor_attention
from longattn.testing.assertions import FORWARD_FACTOR, GRADIENT_FACTOR, assert_within_budget, blocks

HEADS = 8
NAN, INF = float("nan"), float("inf")
GRADIENTS = ("dq", "dk", "dv", "d_root", "dkv", "dk_sum")


@dataclass(frozen=True)
class Case:
    """P projections: 2 P features of paired kinds. lengths: of packed sequences, then B = 1 and L is their sum."""

    kind: str = "positive"
    B: int = 1
    H: int = 1
    groups: int = 1
    L: int = 65
    S: int | None = None
    D: int = 16
    E: int = 8
    P: int = 30
    causal: bool = True
    exact: bool = False
    l2: bool = False
    mean: bool = False
    mask: float = 0.0
    lengths: tuple[int, ...] = ()
    state: bool = False
    segment: int = 64


CASES = {
    "one token after a state": Case(L=1, D=1, E=3, P=2, state=True),
    "two tokens": Case(L=2, D=5, E=3, P=30),
    "positive": Case(L=130, P=64, B=2),
    "hyperbolic": Case("hyperbolic", L=65, P=32),
    "relu": Case("relu", L=65, P=96),
    "trig": Case("trig", L=63, P=15, D=5),
    "positive, not causal": Case(L=40, S=80, causal=False, mask=0.3, state=True),
    "hyperbolic, not causal, groups": Case("hyperbolic", L=70, S=33, causal=False, groups=2),
    "relu, not causal, packed": Case("relu", L=90, causal=False, lengths=(3, 0, 87), state=True),
    "groups, mask, state": Case(L=80, groups=2, mask=0.4, state=True),
    "packed": Case("hyperbolic", L=70, lengths=(1, 64, 0, 5), groups=2, state=True, mask=0.2, P=16),
    "l2 and mean": Case(L=70, l2=True, mean=True, D=16),
    "trig, l2 and mean, state": Case("trig", L=130, l2=True, mean=True, state=True, P=10),
    "exact": Case(L=130, exact=True, P=64),
    "exact, hyperbolic, mean, groups, state, mask": Case(
        "hyperbolic", L=80, exact=True, mean=True, groups=2, state=True, mask=0.3, P=16
    ),
    "exact, trig, l2, packed": Case("trig", L=73, exact=True, l2=True, lengths=(70, 0, 3), state=True, P=8, D=5),
    "many features": Case(L=130, P=400, D=40, E=20, state=True),
    "exact, many features": Case(L=100, P=300, D=20, E=40, exact=True),
    "wide": Case(L=70, P=20, D=130, E=140, l2=True, mean=True),
    "all masked": Case(L=20, mask=1.0),
    "no token": Case(L=0, state=True),
    "no key": Case(L=5, S=0, causal=False, state=True),
}


def build(case: Case, name: str, seed: int) -> dict[str, Tensor | None]:
    """Everything in float64; padded keys and values are 0 here and poisoned for the kernels."""
    g = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    S = case.L if case.S is None else case.S
    sequences = len(case.lengths) or case.B
    q, k, v = (
        normal(case.B, heads, length, dim)
        for heads, length, dim in (
            (case.H * case.groups, case.L, case.D),
            (case.H, S, case.D),
            (case.H, S, case.E),
        )
    )
    projection = draw_projection(case.P, case.D, seed=3).double()
    root = torch.tensor(1.3 if case.l2 else case.D**-0.25, dtype=torch.float64)
    mean = normal(case.H, case.D) / (4 * case.D**0.5 if case.l2 else 4) if case.mean else None
    state = (None, None, None)
    if case.state:
        before, values = normal(sequences, case.H, 7, case.D), normal(sequences, case.H, 7, case.E)
        phi, a = favor_features(favor_rows(before, root, case.l2, mean), projection, case.kind)
        log = a.amax(-1)
        phi = phi * torch.exp(a - log[..., None])[..., None]
        state = (phi.mT @ values, phi.sum(-2), log)
    mask = None
    if case.mask:
        mask = torch.rand(case.B, S, generator=g, dtype=torch.float64) < case.mask
        k, v = (x.masked_fill(mask[:, None, :, None], 0) for x in (k, v))
    M = case.P * (2 if case.kind in ("hyperbolic", "trig") else 1)
    tensors = dict(zip(("q", "k", "v", "kv", "k_sum", "log"), (q, k, v, *state), strict=True))
    tensors |= {"projection": projection, "root": root, "mean": mean, "mask": mask}
    tensors["cu"] = torch.tensor([0, *case.lengths]).cumsum(0).int() if case.lengths else None
    tensors["grad"] = normal(case.B, case.H * case.groups, case.L, case.E)
    tensors["grad_kv"] = normal(sequences, case.H, M, case.E) / 8
    tensors["grad_k_sum"] = normal(sequences, case.H, M) / 8
    return tensors


def cast(inputs: dict, dtype: torch.dtype, acc: torch.dtype) -> dict:
    kept = ("mask", "cu")
    return {
        name: x if x is None or name in kept else x.to(dtype if name in ("q", "k", "v", "grad") else acc)
        for name, x in inputs.items()
    }


def eager(case: Case, x: dict) -> dict[str, Tensor]:
    """The reference and its gradients, in the dtypes of the inputs."""
    leaves = {"dq": "q", "dk": "k", "dv": "v", "d_root": "root", "dkv": "kv", "dk_sum": "k_sum"}
    x = x | {name: x[name].clone().requires_grad_() for name in leaves.values() if x[name] is not None}
    output, kv, k_sum, log = favor_attention(
        x["q"], x["k"], x["v"], x["mask"], x["cu"], x["kv"], x["k_sum"], x["log"], x["projection"], x["root"],
        x["mean"], kind=case.kind, l2=case.l2, is_causal=case.causal, exact_diagonal=case.exact,
    )  # fmt: skip
    used = {name: x[leaf] for name, leaf in leaves.items() if x[leaf] is not None}
    loss = (output * x["grad"]).sum() + (kv * x["grad_kv"]).sum() + (k_sum * x["grad_k_sum"]).sum()
    grads = torch.autograd.grad(loss, list(used.values()), allow_unused=True, materialize_grads=True)
    return {"output": output.detach(), "kv": kv.detach(), "k_sum": k_sum.detach(), "log": log.detach()} | dict(
        zip(used, grads, strict=True)
    )


def run(case: Case, x: dict) -> dict[str, Tensor]:
    """The launchers, on poisoned padding and strided inputs."""
    q, k, v = x["q"], x["k"], x["v"]
    if x["mask"] is not None:
        k, v = (y.masked_fill(x["mask"][:, None, :, None], float("nan")) for y in (k, v))
    q, k, v = (y.transpose(1, 2).contiguous().transpose(1, 2) for y in (q, k, v))
    v = torch.stack([v, torch.full_like(v, float("nan"))], -1)[..., 0]
    tensors = (q, k, v, x["mask"], x["cu"], x["kv"], x["k_sum"], x["log"], x["projection"], x["root"], x["mean"])
    options = {
        "kind": case.kind, "l2": case.l2, "is_causal": case.causal, "exact_diagonal": case.exact,
        "segment": case.segment,
    }  # fmt: skip
    out, z, r, *segments, kv, k_sum, log = favor.forward(*tensors, save_segments=True, **options)
    grads = favor.backward(
        x["grad"], x["grad_kv"], x["grad_k_sum"], *tensors, out, z, r, *segments, log, **options
    )  # fmt: skip
    results = {"output": out, "kv": kv, "k_sum": k_sum, "log": log} | dict(zip(GRADIENTS, grads, strict=True))
    if x["kv"] is None:
        assert results.pop("dkv").numel() == results.pop("dk_sum").numel() == 0
    return results


def matrix(x: Tensor) -> Tensor:
    """[B, H, rows, columns] of any result."""
    return x.reshape(1, 1, 1, 1) if x.dim() == 0 else x if x.dim() == 4 else x.reshape(*x.shape[:2], 1, -1)


def check(name: str, dtype: torch.dtype) -> float:
    case = CASES[name]
    inputs = cast(build(case, name, 0), dtype, torch.float32)
    actual, oracle = run(case, inputs), eager(case, cast(inputs, torch.float64, torch.float64))
    yardstick: dict[str, Tensor] = {}
    for seed in range(-(-HEADS // (case.B * case.H))):
        x = cast(build(case, name, seed), dtype, torch.float32)
        exact = eager(case, cast(x, torch.float64, torch.float64))
        for key, rough in eager(case, cast(x, dtype, dtype)).items():
            if not rough.numel():
                continue
            error = blocks(matrix(rough.double() - exact[key]).nan_to_num(0, 0, 0)).amax((0, 1))
            yardstick[key] = torch.maximum(yardstick.get(key, error), error)
    worst = 0.0
    for key, x in actual.items():
        expected = oracle[key]
        assert x.shape == expected.shape, f"{key} of {name!r}: {list(x.shape)}, expected {list(expected.shape)}"
        wanted = dtype if key in ("output", "dq", "dk", "dv") else torch.float32
        assert x.dtype == wanted, f"{key} of {name!r}: {x.dtype}"
        if key == "log":
            infinite = expected == -torch.inf
            assert torch.equal(x == -torch.inf, infinite), f"log_scale of {name!r}"
            x, expected = x.masked_fill(infinite, 0), expected.masked_fill(infinite, 0)
        if not x.numel() or expected.count_nonzero() == 0:
            assert (x == 0).all(), f"{key} of {name!r} must be 0"
            continue
        factor = GRADIENT_FACTOR if key in GRADIENTS else FORWARD_FACTOR
        what = f"{key} of {name!r} ({dtype})"
        share = assert_within_budget(what, matrix(x), matrix(expected), yardstick[key], factor=factor)
        if VERBOSE:
            print(f"   {key}: {share:.2f}")
        worst = max(worst, share)
    return worst


def past_sees_no_future() -> None:
    """A later key, value or query, however strange, changes no earlier output bit."""
    for kind, exact in (("positive", False), ("positive", True)):
        q, k, v = torch.randn(3, 1, 1, 80, 8, generator=torch.Generator().manual_seed(1))
        projection, root = draw_projection(10, 8), torch.tensor(0.6)

        def outputs(q, k, v, kind=kind, exact=exact, projection=projection, root=root):
            rest = (None,) * 5
            options = {"kind": kind, "l2": False, "is_causal": True, "exact_diagonal": exact, "segment": 64}
            return favor.forward(q, k, v, *rest, projection, root, None, save_segments=False, **options)[:3]

        before = outputs(q, k, v)
        for at, n, factor in ((40, 1, 1000), (70, 1, NAN), (40, 2, INF), (40, 0, NAN)):
            changed = [q.clone(), k.clone(), v.clone()]
            changed[n][:, :, at] *= factor
            after = outputs(*changed)
            for x, y in zip(before, after, strict=True):
                assert torch.equal(x[:, :, :at], y[:, :, :at]), f"{kind}, exact={exact}: token {at} reached the past"
            if n and factor != 1000:
                assert not after[0][:, :, at:].isfinite().any(), "what is not finite must not vanish"


def public_door_agrees(exact: bool) -> None:
    """linear_attention with its autograd and states, impl="triton" against impl="reference" in float32.

    exact: a prompt that ends within a chunk, one token, and tokens that go beyond the chunk; else a prompt and a token.
    """
    cuts = (0, 62, 63, 66) if exact else (0, 18, 19)
    g = torch.Generator().manual_seed(2)
    q, k, v, grad = torch.randn(4, 1, 1, cuts[-1], 8, generator=g)
    mask = torch.rand(1, cuts[-1], generator=g) < 0.2
    results = {}
    for impl in ("triton", "reference"):
        feature_map = longattn.Favor(8, 16, learn_temperature=True, exact_diagonal=exact)
        options = {"feature_map": feature_map, "is_causal": True, "impl": impl}
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        state, parts = None, []
        for start, stop in pairwise(cuts):
            rows = (x[:, :, start:stop] for x in leaves)
            part, state = longattn.linear_attention_with_state(
                *rows, state=state, key_padding_mask=mask[:, start:stop], **options
            )
            parts.append(part)
        carried = torch.cat(parts, 2)
        assert state.tail_mask.shape[1] == (2 if exact else 0)
        loss = (carried * grad).sum() + state.kv.sum() + state.k_sum.sum()
        found = [carried, *state[:3], *torch.autograd.grad(loss, [*leaves, *feature_map.parameters()])]
        if not exact:
            output = longattn.linear_attention(*leaves, key_padding_mask=mask, **options)
            found += [output, *torch.autograd.grad((output * grad).sum(), [*leaves, *feature_map.parameters()])]
        results[impl] = found
    assert len(results["triton"]) == (8 if exact else 13)
    for i, (x, y) in enumerate(zip(results["triton"], results["reference"], strict=True)):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=3e-5, msg=lambda m, i=i: f"result {i}, {exact=}: {m}")
        assert y.abs().sum() > 0


VERBOSE = False

if __name__ == "__main__":
    assert favor.EMULATE, "set TRITON_INTERPRET=1"
    torch.set_num_threads(1)
    dtype = getattr(torch, sys.argv[1])
    for name in sys.argv[2:]:
        if name == "-v":
            VERBOSE = True
        elif name == "law":
            past_sees_no_future()
            print("law: kept", flush=True)
        elif name == "public":
            for exact in (False, True):
                public_door_agrees(exact)
            print("public: kept", flush=True)
        else:
            print(f"{name}: {check(name, dtype):.2f} of the budget", flush=True)
