"""LSH attention's part of the table: cases, inputs, and the check of one case against the budgets of assertions.py.

Buckets are drawn with the inputs, so that every engine and dtype, the oracle and the yardstick face the same pairs.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._prefix import accumulator
from ..ops.lsh import prepare, run
from ..reference import lsh as reference
from .assertions import FORWARD_FACTOR, GRADIENT_FACTOR, HEADS, assert_within_budget, blocks
from .cases import _draw_mask


@dataclass(frozen=True)
class LshCase:
    """One call of LSH attention. Letters as in DESIGN; Hq = H * groups, S = L where None."""

    name: str
    B: int = 2
    H: int = 2
    L: int = 100
    S: int | None = None
    D: int = 16
    E: int = 12
    groups: int = 1
    shared: bool = True
    n_hashes: int = 3
    chunk_size: int = 16
    n_buckets: int = 8
    look_back: int = 1
    look_ahead: int | None = None
    within: str = "window"
    dedupe: bool = True
    is_causal: bool = False
    scale: float | None = None
    dropout_p: float = 0.0
    mask: str = ""                             # "", "tail", "random", "one row", "all"
    lengths: tuple[int, ...] = ()              # of packed sequences; then B = 1 and L is their sum
    crowded: bool = False                      # all tokens in one bucket
    wrap: bool = False
    norm_eps: float = 0.0

    @property
    def sees_nothing(self) -> bool:
        """No query sees any key: every result is exactly 0."""
        return self.mask == "all" or self.S == 0 or self.L == 0


def _separate(name: str, **options) -> LshCase:
    return LshCase(f"separate, {name}", shared=False, **options)


def _packed(name: str, *lengths: int, **options) -> LshCase:
    return LshCase(f"packed, {name}", B=1, L=sum(lengths), lengths=lengths, **options)


LSH = (
    # lengths and chunks, one past and one short of each other
    *(LshCase(f"L={L}, chunk {c}", L=L, chunk_size=c) for L, c in ((1, 1), (2, 16), (63, 7), (257, 64), (100, 100))),
    *(LshCase(f"causal L={L}, chunk {c}", L=L, chunk_size=c, is_causal=True)
      for L, c in ((1, 16), (2, 1), (63, 64), (64, 64), (65, 64), (100, 7), (257, 16), (100, 1000))),
    *(_separate(f"L={L}, chunk {c}, causal={causal}", L=L, chunk_size=c, is_causal=causal)
      for L, c, causal in ((1, 1, True), (2, 7, False), (63, 16, True), (257, 64, False), (100, 100, True))),
    LshCase("chunk 1", L=63, chunk_size=1, look_back=2, look_ahead=1, n_hashes=2),
    # head dims
    *(LshCase(f"head dims {D} and {E}", B=1, L=70, D=D, E=E, is_causal=D > 16)
      for D, E in ((3, 1), (31, 16), (64, 64), (128, 100), (256, 17))),
    *(_separate(f"head dims {D} and {E}", B=1, L=70, D=D, E=E) for D, E in ((1, 5), (64, 100), (17, 256))),
    # rounds
    LshCase("one round", n_hashes=1, is_causal=True),
    LshCase("eight rounds", n_hashes=8, L=130, chunk_size=7),
    LshCase("eight rounds, each counted", n_hashes=8, L=130, chunk_size=7, dedupe=False, is_causal=True),
    LshCase("one bucket", crowded=True, is_causal=True, n_hashes=2),
    _separate("one bucket", crowded=True, n_hashes=2),
    LshCase("scaled", scale=3.5, is_causal=True),
    _separate("negative scale", scale=-0.3),
    # masks
    *(LshCase(f"{mask} masked, causal={causal}", L=130, mask=mask, is_causal=causal)
      for mask in ("tail", "random", "one row", "all") for causal in (False, True)),
    *(_separate(f"{mask} masked, causal={causal}", L=130, mask=mask, is_causal=causal)
      for mask in ("tail", "random", "one row", "all") for causal in (False, True)),
    # shared heads, other lengths
    _separate("GQA causal", groups=3, L=90, is_causal=True, mask="random"),
    _separate("MQA", H=1, groups=4, L=33, S=70),
    _separate("cross L < S", L=37, S=257, mask="random", within="bucket"),
    _separate("cross L > S", L=130, S=21, n_buckets=2, dedupe=False),
    _separate("cross, one key", L=37, S=1),
    # packed sequences, some empty
    _packed("causal", 1, 64, 0, 130, 65, 7, is_causal=True),
    _packed("not causal", 1, 64, 0, 130, 65, 7, within="bucket"),
    _packed("masked", 40, 0, 90, 3, mask="random", is_causal=True, look_back=2),
    _packed("separate", 40, 0, 90, 3, shared=False, mask="random", is_causal=True, groups=2),
    _packed("separate, not causal", 0, 3, 70, 0, shared=False, chunk_size=7),
    # dropout
    LshCase("dropout", dropout_p=0.3, is_causal=True),
    LshCase("dropout, each counted", dropout_p=0.5, dedupe=False, mask="random"),
    _separate("dropout", dropout_p=0.2, groups=2, is_causal=True),
    # as Hugging Face
    LshCase("wrapped", L=128, wrap=True, dedupe=False, look_ahead=0, norm_eps=1.6e-5),
    LshCase("wrapped, causal", L=112, wrap=True, dedupe=False, is_causal=True, mask="tail"),
    LshCase("wrapped, far", L=63, wrap=True, dedupe=False, look_back=3, look_ahead=2),
    # nothing
    LshCase("B=0", B=0, L=5),
    LshCase("L=S=0", L=0, is_causal=True),
    _separate("L=0", L=0, S=7),
    _separate("S=0", L=7, S=0),
)  # fmt: skip

# every combination of what decides on pairs, at lengths and chunks that take turns
SHAPES = ((63, 7), (100, 16), (65, 64), (33, 1), (97, 32))
COMBINATIONS = tuple(
    LshCase(
        f"{'shared' if shared else 'separate'}, causal={causal}, mask={mask!r}, {within}, dedupe={dedupe}, "
        f"{look_back} back, {look_ahead} ahead",
        B=1, L=SHAPES[i % 5][0], chunk_size=SHAPES[i % 5][1], D=8, E=8, shared=shared, is_causal=causal, mask=mask,
        within=within, dedupe=dedupe, look_back=look_back, look_ahead=look_ahead,
    )
    for i, (shared, causal, mask, within, dedupe, look_back, look_ahead) in enumerate(itertools.product(
        (True, False), (False, True), ("", "random"), ("window", "bucket"), (True, False), (0, 1, 2), (0, 1)
    ))
)  # fmt: skip


class LshInputs(NamedTuple):
    """What one call takes, and the gradient that comes back to it."""

    q: Tensor                                  # [B, Hq, L, D]
    k: Tensor | None                           # [B, H, S, D]
    v: Tensor                                  # [B, H, S, E]
    options: dict                              # keyword arguments of ops.lsh.prepare
    grad_output: Tensor                        # [B, Hq, L, E]

    def clean(self) -> LshInputs:
        """The same with 0 in padded rows."""
        mask = self.options["key_padding_mask"]
        if mask is None:
            return self
        q, k, v = (None if x is None else x.masked_fill(mask[:, None, :, None], 0) for x in (
            self.q if self.k is None else None, self.k, self.v))  # fmt: skip
        return self._replace(q=self.q if q is None else q, k=k, v=v)

    def to(self, dtype: torch.dtype) -> LshInputs:
        q, k, v = (None if x is None else x.to(dtype) for x in self[:3])
        return self._replace(q=q, k=k, v=v, grad_output=self.grad_output.to(dtype))


def build_lsh(case: LshCase, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> LshInputs:
    """Inputs of `case`. Padded rows hold NaN and infinities; in shared QK those of queries too."""
    g = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) + seed)
    S, Hq = case.L if case.S is None else case.S, case.H * case.groups

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def buckets(heads: int, length: int) -> Tensor:
        shape = (case.B, heads, case.n_hashes, length)
        drawn = torch.randint(0, case.n_buckets, shape, generator=g, dtype=torch.int32)
        return (drawn * 0 + 3 if case.crowded else drawn).to(device)

    q, v = normal(case.B, Hq, case.L, case.D), normal(case.B, case.H, S, case.E)
    k = None if case.shared else normal(case.B, case.H, S, case.D)
    mask = _draw_mask(case.mask, case.B, S, g) if case.mask else None
    if mask is not None:
        poison = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=torch.float64)
        away, holds = mask[:, None, :, None], poison[torch.arange(case.B * S).view(case.B, 1, S, 1) % 3]
        q = torch.where(away, holds, q) if case.shared else q
        k, v = (None if x is None else torch.where(away, holds, x) for x in (k, v))
    names = ("n_hashes", "chunk_size", "n_buckets", "look_back", "look_ahead", "within", "dedupe", "is_causal")
    names += ("scale", "dropout_p", "wrap", "norm_eps")
    options = {name: getattr(case, name) for name in names} | {
        "seed": 2**40 + 7,
        "enable_gqa": case.groups > 1,
        "key_padding_mask": None if mask is None else mask.to(device),
        "cu_seqlens": torch.tensor([0, *case.lengths]).cumsum(0).int().to(device) if case.lengths else None,
        "buckets": buckets(Hq, case.L) if case.shared else (buckets(Hq, case.L), buckets(case.H, S)),
    }
    q, v, grad_output = (x.to(device, dtype) for x in (q, v, normal(case.B, Hq, case.L, case.E)))
    return LshInputs(q, None if k is None else k.to(device, dtype), v, options, grad_output)


def evaluate_lsh(inputs: LshInputs, call) -> dict[str, Tensor]:
    """Result and gradients of `call(q, k, v) -> output` by name; dk only where there are keys."""
    # detach keeps the strides: what the caller laid out is what the kernel reads
    leaves = {name: x.detach().requires_grad_() for name, x in zip("qkv", inputs[:3], strict=True) if x is not None}
    output = call(leaves["q"], leaves.get("k"), leaves["v"])
    grads = torch.autograd.grad(output, list(leaves.values()), inputs.grad_output)
    return {"output": output.detach()} | {f"d{name}": x for name, x in zip(leaves, grads, strict=True)}


def run_lsh(inputs: LshInputs, impl: str) -> dict[str, Tensor]:
    """The public function with one engine, and the two options that only modules reach."""
    return evaluate_lsh(inputs, lambda q, k, v: run(prepare("lsh_attention", q, k, v, impl=impl, **inputs.options)))


def run_eager(inputs: LshInputs) -> dict[str, Tensor]:
    """The reference's formula in the inputs' dtype, sums included: what plain PyTorch gives for these pairs."""
    call = prepare("lsh_attention", *inputs[:3], impl="reference", **inputs.options)
    count = reference.pair_counts(*call.buckets, call.mask, call.cu_seqlens, **call.rounds.counted())
    names = {name: getattr(call, name) for name in ("scale", "dropout_p", "seed", "norm_eps")}
    return evaluate_lsh(inputs, lambda q, k, v: reference.attend(q, k, v, call.mask, count, **names)[0])


@functools.cache
def _judged(case: LshCase, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """-> the oracle's results for seed 0, and the error of eager PyTorch in each block, the worst of a dozen heads.

    In float64, where the oracle rounds no less and in shorter vectors, it is four times float32's in float64's units.
    """
    eager_dtype = torch.float32 if dtype == torch.float64 else dtype
    shrink = 1 if eager_dtype == dtype else 4 * torch.finfo(dtype).eps / torch.finfo(eager_dtype).eps
    errors: dict[str, Tensor] = {}
    for seed in range(max(-(-HEADS // max(case.B * case.H, 1)), 1)):
        inputs = build_lsh(case, eager_dtype, seed=seed).clean()
        eager, exact = run_eager(inputs), run_lsh(inputs.to(torch.float64), "reference")
        for name, x in exact.items():
            error = shrink * blocks(eager[name].double() - x).amax((0, 1)) if x.numel() else x
            errors[name] = torch.maximum(errors.get(name, error), error)
    return run_lsh(build_lsh(case, dtype).clean().to(torch.float64), "reference"), errors


def check_lsh(case: LshCase, dtype: torch.dtype, impl: str, device: str = "cpu") -> dict[str, float]:
    """One case on one engine, result and gradients; returns the share of each budget in use."""
    inputs = build_lsh(case, dtype, device)
    actual = run_lsh(inputs, impl)
    for name, x in actual.items():
        assert x.dtype == dtype, f"{name} of {case.name!r} ({impl}): dtype {x.dtype}, expected {dtype}"
    if case.sees_nothing:
        for name, x in actual.items():
            assert (x == 0).all(), f"{name} of {case.name!r} ({dtype}, {impl}) must be 0: its queries see no key"
        return {}
    (oracle, eager), used = _judged(case, dtype), {}
    for name, x in actual.items():
        what = f"{name} of {case.name!r} ({dtype}, {impl})"
        if x.numel() and name in ("dq", "dk") and oracle[name].abs().max() < 1e-12:
            # every query sees one key: what is left of p (dP - delta) is rounding
            terms = inputs.clean().to(torch.float64)
            limit = 8 * torch.finfo(dtype).eps * (terms.grad_output.abs().amax() * terms.v.abs().sum(-1).amax())
            assert x.abs().max() <= limit * accumulator(dtype).itemsize, f"{what} must vanish, got {x.abs().max():.3g}"
            continue
        factor = GRADIENT_FACTOR if name.startswith("d") else FORWARD_FACTOR
        used[name] = assert_within_budget(what, x, oracle[name], eager[name], factor=factor)
    return used
