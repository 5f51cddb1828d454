"""ONE table of inputs: named cases of shapes, masks and options, and builders that draw them from a seed.

Every draw comes from a CPU generator, so each device, engine and dtype meets the same numbers.
"""

from __future__ import annotations

import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..features import FUSED
from ..ops import _prefix
from ..state import LinearState

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class LinearCase:
    """One call of linear attention. Letters as in DESIGN; Hq = H * groups, S = L where None."""

    name: str
    B: int = 2
    H: int = 2
    L: int = 65
    S: int | None = None
    D: int = 16
    E: int = 24
    groups: int = 1
    feature: str = "elu"
    is_causal: bool = False
    normalize: bool = True
    scale: float | None = None
    mask: str = ""                             # "", "tail", "random", "one row", "all"
    lengths: tuple[int, ...] = ()              # of packed sequences; then B = 1 and L is their sum
    state: bool = False
    segment: int | None = None                 # tokens between saved states, where not the op's own choice

    @property
    def sees_nothing(self) -> bool:
        """No query sees any key: every result is exactly 0."""
        keys = self.L if self.S is None else self.S
        return (self.mask == "all" or keys == 0) and not self.state


def _packed(name: str, *lengths: int, **options) -> LinearCase:
    return LinearCase(name, B=1, L=sum(lengths), lengths=lengths, **options)


def _causal(name: str, **options) -> LinearCase:
    return LinearCase(name, is_causal=True, **options)


LINEAR = (
    # lengths: one token, chunk edges, primes, one past the CPU segment of 1024 tokens
    _causal("causal L=1 after a state", L=1, state=True),
    *(_causal(f"causal L={L}", L=L) for L in (2, 63, 64, 65, 100)),
    _causal("causal L=1009", L=1009, B=1, H=1),
    _causal("causal L=1089 crosses a segment", L=1089, B=1, H=1),
    _causal("causal L=321 in segments of 64", L=321, segment=64),
    _causal("causal L=257 in segments of 128, few features", L=257, segment=128, D=3, E=5, state=True),
    LinearCase("L=1 S=37", L=1, S=37),
    LinearCase("L=37 S=1", L=37, S=1, normalize=False),
    *(LinearCase(f"L=S={L}", L=L) for L in (2, 63, 64, 65, 100)),
    LinearCase("L=1009 S=301", L=1009, S=301, B=1, H=1),
    LinearCase("L=40 S=1100", L=40, S=1100, B=1, H=1),
    # head dims: 1, odd, register tile edges, wide
    *(
        LinearCase(f"head dims {D} and {E}, causal={causal}", B=1, L=70, D=D, E=E, is_causal=causal, normalize=D > 1)
        for D, E in ((1, 5), (3, 1), (16, 31), (31, 16), (64, 100), (100, 64), (128, 3), (256, 17), (17, 256))
        for causal in (False, True)
    ),
    _causal("head dims 64 and 64 in segments of 64", B=1, L=200, D=64, E=64, segment=64),
    _causal("head dims 128 and 100, large state", B=1, H=1, L=200, D=128, E=100, segment=128),
    # features, normalizer, scale
    *(
        _causal(f"{feature}, normalize={normalize}, scale={scale}", feature=feature, normalize=normalize, scale=scale)
        for feature in FUSED
        for normalize, scale in ((True, None), (True, 0.3), (False, None), (False, -0.3))
    ),
    LinearCase("relu, not causal, scaled", L=50, S=70, feature="relu", normalize=False, scale=1.7),
    LinearCase("identity, not causal", L=50, S=70, feature="identity"),
    _causal("256 raw features", B=1, L=150, D=256, E=64, feature="identity", segment=64),
    # masks
    *(
        LinearCase(f"{mask} masked, causal={causal}", L=130, is_causal=causal, mask=mask, segment=64)
        for mask in ("tail", "random", "one row", "all")
        for causal in (False, True)
    ),
    LinearCase("masked, unnormalized, S > L", L=33, S=90, mask="random", normalize=False),
    # heads that share keys
    _causal("GQA causal", L=90, groups=3, mask="random", state=True, segment=64),
    LinearCase("MQA", H=1, L=33, S=70, groups=4),
    # states
    _causal("state, causal", L=100, state=True),
    _causal("state, causal, masked", L=150, state=True, mask="random", segment=64, feature="relu"),
    _causal("state, unnormalized", L=100, state=True, normalize=False, scale=0.5),
    LinearCase("state, not causal", L=50, S=70, state=True),
    LinearCase("state, no keys", L=50, S=0, state=True),
    # packed sequences, some empty
    _packed("packed causal", 1, 64, 0, 130, 65, 7, is_causal=True, segment=64),
    _packed("packed", 1, 64, 0, 130, 65, 7),
    _packed("packed, empty ends", 0, 3, 70, 0, is_causal=True, normalize=False),
    _packed("packed one sequence", 100, is_causal=True),
    _packed(
        "packed with everything", 40, 0, 90, 3, is_causal=True, mask="random", state=True, groups=2, feature="relu",
        segment=64,
    ),
    _packed("packed with states, not causal", 40, 0, 90, 3, mask="random", state=True, groups=2),
    # nothing
    LinearCase("B=0", B=0, L=5),
    _causal("B=0, causal, state", B=0, L=5, state=True),
    LinearCase("L=0", L=0, S=7),
    LinearCase("S=0", L=7, S=0),
    LinearCase("S=0, unnormalized", L=7, S=0, normalize=False),
    _causal("L=S=0", L=0),
    _causal("L=S=0 after a state", L=0, state=True),
    _packed("packed, nothing in it", 0, 0, is_causal=True, state=True),
)  # fmt: skip


class LinearInputs(NamedTuple):
    """What one call takes, and the gradients that come back to it."""

    q: Tensor                                  # [B, Hq, L, D]
    k: Tensor                                  # [B, H, S, D]
    v: Tensor                                  # [B, H, S, E]
    state: LinearState | None
    options: dict                              # keyword arguments of linear_attention_with_state
    grad_output: Tensor                        # [B, Hq, L, E]
    grad_state: LinearState

    def clean(self) -> LinearInputs:
        """The same with 0 in padded keys and values."""
        mask = self.options["key_padding_mask"]
        if mask is None:
            return self
        k, v = (x.masked_fill(mask[:, None, :, None], 0) for x in (self.k, self.v))
        return self._replace(k=k, v=v)

    def double(self) -> LinearInputs:
        """The clean numbers in float64: what the oracle is given."""
        q, k, v, state, options, *grads = self.clean()
        state = None if state is None else state.to(torch.float64)
        grad_output, grad_state = (x.to(torch.float64) for x in grads)
        return LinearInputs(q.double(), k.double(), v.double(), state, options, grad_output, grad_state)


def _draw_mask(kind: str, B: int, S: int, generator: torch.Generator) -> Tensor:
    mask = torch.zeros(B, S, dtype=torch.bool)
    if kind == "tail":
        for row in range(B):
            mask[row, S - S // (2 + row):] = True
    elif kind == "random":
        mask = torch.rand(B, S, generator=generator) < 0.4
    elif kind == "one row":
        mask[0] = True
    elif kind == "all":
        mask[:] = True
    else:
        raise ValueError(f"mask kind {kind!r}")
    return mask


def build(case: LinearCase, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> LinearInputs:
    """Inputs of `case`. Padded keys and values hold NaN and infinities; an incoming state is that of seven tokens."""
    g = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) + seed)
    acc = _prefix.accumulator(dtype)
    S = case.L if case.S is None else case.S
    B, H, Hq, L, D, E = case.B, case.H, case.H * case.groups, case.L, case.D, case.E

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def raw(*shape: int) -> Tensor:
        """What phi is applied to."""
        x = normal(*shape)
        if case.feature == "identity" and case.normalize:
            # the result is a quotient: features of one sign keep its denominator away from 0
            return x.abs() / 8 + 0.02
        # in float16 the eager formula, which has no float32 sums, would overflow with features around 1
        return x - 2 if dtype == torch.float16 and case.feature == "elu" else x

    q, k, v = raw(B, Hq, L, D), raw(B, H, S, D), normal(B, H, S, E)
    mask = _draw_mask(case.mask, B, S, g) if case.mask else None
    if mask is not None:
        poison = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=torch.float64)
        holds = poison[torch.arange(B * S).view(B, 1, S, 1) % 3]
        k, v = (torch.where(mask[:, None, :, None], holds, x) for x in (k, v))
    cu_seqlens = None
    if case.lengths:
        cu_seqlens = torch.tensor([0, *case.lengths]).cumsum(0).int().to(device)
    sequences = len(case.lengths) or B
    state = None
    if case.state:
        phi = FUSED[case.feature](raw(sequences, H, 7, D))
        state = LinearState(phi.mT @ normal(sequences, H, 7, E), phi.sum(2))
        state = state.to(device, acc)
    grad_state = LinearState(normal(sequences, H, D, E) / 8, normal(sequences, H, D) / 8).to(device, acc)
    options = {
        "feature_map": case.feature,
        "is_causal": case.is_causal,
        "normalize": case.normalize,
        "scale": case.scale,
        "enable_gqa": case.groups > 1,
        "key_padding_mask": None if mask is None else mask.to(device),
        "cu_seqlens": cu_seqlens,
    }
    q, k, v, grad_output = (x.to(device, dtype) for x in (q, k, v, normal(B, Hq, L, E)))
    return LinearInputs(q, k, v, state, options, grad_output, grad_state)


@contextmanager
def segments_of(tokens: int | None):
    """Inside the block a state is saved every `tokens` tokens (a multiple of 64): many segments in short inputs."""
    before = dict(_prefix.SEGMENT)
    if tokens is not None:
        _prefix.SEGMENT.update(dict.fromkeys(before, tokens))
    try:
        yield
    finally:
        _prefix.SEGMENT.update(before)


def draw(*shapes, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """Normal tensors of these shapes."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype) for shape in shapes]


def qkv(B=2, H=2, L=100, D=8, E=12, S=None, **options) -> list[Tensor]:
    """Normal q, k, v where a test cares for their values only; options of `draw`."""
    S = L if S is None else S
    return draw((B, H, L, D), (B, H, S, D), (B, H, S, E), **options)


LAYOUTS = ("transposed", "sliced", "expanded", "strided", "offset")


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of x `[B, H, L, D]` in other memory, NaN between them. "expanded" repeats its first head."""
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded":
        return x[:, :1].clone().expand_as(x)
    if layout == "sliced":
        halo = x.new_full([n + 3 for n in x.shape], float("nan"))
        inside = halo[tuple(slice(2, n + 2) for n in x.shape)]
    elif layout == "strided":
        inside = x.new_full([*x.shape[:-1], 2 * x.shape[-1]], float("nan"))[..., ::2]
    elif layout == "offset":
        inside = x.new_full([x.numel() + 1], float("nan"))[1:].view(x.shape)
    else:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    return inside.copy_(x)
