"""ONE table of inputs: named cases of shapes, masks and options, and builders that draw them from a seed.

Every draw comes from a CPU generator, so each device, engine and dtype meets the same numbers.
"""

from __future__ import annotations

import copy
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..favor import Favor
from ..features import FAVOR_KINDS, FUSED, favor_features, favor_rows
from ..ops import _prefix
from ..state import FavorState, LinearState

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class FavorCase:
    """What `longattn.Favor` is made with. `exact` (exact_diagonal) runs without a state: its tail has its own tests."""

    kind: str = "positive"
    n_features: int = 32
    l2: bool = False
    center: bool = False
    exact: bool = False
    spread: float = 0                          # standard deviation of queries and keys, where not the kind's own

    @property
    def deviation(self) -> float:
        # a sum of sines must stay away from 0
        return self.spread or (0.3 if self.kind == "trig" else 0.8)

    def build(self, head_dim: int, num_heads: int, device: str = "cpu") -> Favor:
        normalize = "l2" if self.l2 else None
        favor = Favor(
            head_dim, self.n_features, self.kind, normalize=normalize, seed=head_dim, learn_temperature=True,
            center_keys=self.center, exact_diagonal=self.exact, device=device,
        )  # fmt: skip
        if self.center:
            g = torch.Generator().manual_seed(num_heads)
            favor.key_mean = torch.randn(num_heads, head_dim, generator=g).to(device) / 4
        return favor


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
    favor: FavorCase | None = None             # a Favor map in place of `feature`

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


def _favor(name: str, favor: FavorCase | None = None, **options) -> LinearCase:
    return LinearCase(f"favor, {name}", favor=favor or FavorCase(), **options)


_EXACT = FavorCase(exact=True)
FAVOR = (
    # kinds, lengths around chunks and segments
    *(
        _favor(f"{kind}, causal={causal}", FavorCase(kind, 48), L=130, is_causal=causal, segment=64)
        for kind in FAVOR_KINDS
        for causal in (False, True)
    ),
    *(_favor(f"L=S={L}, causal={causal}", L=L, is_causal=causal) for L in (2, 63, 64, 65) for causal in (False, True)),
    _favor("L=1 after a state", L=1, is_causal=True, state=True),
    _favor("L=1009", L=1009, B=1, H=1, is_causal=True),
    _favor("L=321 in segments of 64", L=321, is_causal=True, segment=64),
    _favor("L=40 S=1100", L=40, S=1100, B=1, H=1),
    _favor("L=37 S=1", L=37, S=1),
    # dims: 1, odd, register tile edges, wide; few and many features
    *(
        _favor(f"head dims {D} and {E}, {M} {kind} features", FavorCase(kind, M), B=1, L=70, D=D, E=E, is_causal=True)
        for D, E, M, kind in (
            (1, 5, 2, "hyperbolic"), (3, 1, 1, "positive"), (16, 31, 30, "hyperbolic"), (31, 16, 17, "positive"),
            (64, 64, 256, "positive"), (64, 64, 256, "hyperbolic"), (100, 64, 99, "positive"), (17, 200, 34, "trig"),
            (256, 17, 64, "positive"), (8, 3, 31, "relu"),
        )
    ),
    _favor("large state", FavorCase(n_features=256), B=1, H=1, L=200, D=64, E=64, is_causal=True, segment=128),
    # unit rows, key mean
    *(_favor(f"l2, causal={causal}", FavorCase(l2=True), L=100, is_causal=causal) for causal in (False, True)),
    _favor("key mean", FavorCase(center=True), L=100, is_causal=True),
    _favor("l2 and key mean", FavorCase("hyperbolic", l2=True, center=True), L=100, S=70, mask="random"),
    # exact_diagonal
    *(_favor(f"exact diagonal, L={L}", _EXACT, L=L, is_causal=True, segment=64) for L in (2, 63, 64, 65, 200)),
    _favor("exact diagonal, hyperbolic", FavorCase("hyperbolic", exact=True), L=150, is_causal=True),
    _favor("exact diagonal, trig", FavorCase("trig", exact=True), L=150, is_causal=True),
    _favor(
        "exact diagonal with everything", FavorCase(exact=True, l2=True, center=True), L=200, is_causal=True, groups=2,
        mask="random", segment=64,
    ),
    _favor("exact diagonal, packed", _EXACT, B=1, L=237, lengths=(40, 0, 190, 7), is_causal=True, segment=64),
    # masks, shared heads, states, packed sequences
    *(
        _favor(f"{mask} masked, causal={causal}", L=130, is_causal=causal, mask=mask, segment=64)
        for mask in ("tail", "random", "one row", "all")
        for causal in (False, True)
    ),
    _favor("GQA causal", L=90, groups=3, is_causal=True, mask="random", state=True, segment=64),
    _favor("MQA", H=1, L=33, S=70, groups=4),
    _favor("state, causal", L=100, is_causal=True, state=True),
    _favor("state, masked, relu", FavorCase("relu"), L=150, is_causal=True, state=True, mask="random", segment=64),
    _favor("state, not causal", L=50, S=70, state=True),
    _favor("state, no keys", L=50, S=0, state=True),
    _favor("packed causal", B=1, L=267, lengths=(1, 64, 0, 130, 65, 7), is_causal=True, segment=64),
    _favor("packed", B=1, L=267, lengths=(1, 64, 0, 130, 65, 7)),
    _favor(
        "packed with everything", FavorCase("hyperbolic"), B=1, L=133, lengths=(40, 0, 90, 3), is_causal=True,
        mask="random", state=True, groups=2, segment=64,
    ),
    # nothing
    _favor("B=0", B=0, L=5, is_causal=True),
    _favor("S=0", L=7, S=0),
    _favor("L=S=0 after a state", L=0, is_causal=True, state=True),
)  # fmt: skip


class LinearInputs(NamedTuple):
    """What one call takes, and the gradients that come back to it."""

    q: Tensor                                  # [B, Hq, L, D]
    k: Tensor                                  # [B, H, S, D]
    v: Tensor                                  # [B, H, S, E]
    state: LinearState | FavorState | None
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
        options = {**options, "feature_map": _in_double(options["feature_map"])}
        grad_output, grad_state = (x.to(torch.float64) for x in grads)
        return LinearInputs(q.double(), k.double(), v.double(), state, options, grad_output, grad_state)


def _in_double(feature_map):
    """A Favor map whose parameters are float64, so that numbers derived from them are too."""
    return copy.deepcopy(feature_map).double() if isinstance(feature_map, Favor) else feature_map


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
        if case.favor is not None:
            return x * case.favor.deviation
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
    feature_map = case.feature
    if case.favor is not None:
        feature_map = case.favor.build(D, H, device)
        feature_map = feature_map.double() if dtype == torch.float64 else feature_map
    M = D if case.favor is None else case.favor.n_features
    if case.state and case.favor is not None:
        state = _favor_state(case.favor.build(D, H), raw(sequences, H, 7, D), normal(sequences, H, 7, E), dtype)
        state = state.to(device)
    elif case.state:
        phi = FUSED[case.feature](raw(sequences, H, 7, D))
        state = LinearState(phi.mT @ normal(sequences, H, 7, E), phi.sum(2))
        state = state.to(device, acc)
    grad_state = LinearState(normal(sequences, H, M, E) / 8, normal(sequences, H, M) / 8).to(device, acc)
    options = {
        "feature_map": feature_map,
        "is_causal": case.is_causal,
        "normalize": case.normalize,
        "scale": case.scale,
        "enable_gqa": case.groups > 1,
        "key_padding_mask": None if mask is None else mask.to(device),
        "cu_seqlens": cu_seqlens,
    }
    q, k, v, grad_output = (x.to(device, dtype) for x in (q, k, v, normal(B, Hq, L, E)))
    return LinearInputs(q, k, v, state, options, grad_output, grad_state)


def _favor_state(favor: Favor, k: Tensor, v: Tensor, dtype: torch.dtype) -> FavorState:
    """The state after these keys; the sums in the accumulator's dtype, an empty tail in that of the inputs."""
    rows = favor_rows(k, favor.root.double(), favor.normalize == "l2")
    phi, a = favor_features(rows, favor.projection.double(), favor.kind)
    log_scale = a.amax(-1)
    phi = phi * torch.exp(a - log_scale[..., None])[..., None]
    sums = (x.detach().to(_prefix.accumulator(dtype)) for x in (phi.mT @ v, phi.sum(2), log_scale))
    tail = (x[:, :, :0].to(dtype) for x in (k, v))
    return FavorState(*sums, *tail, torch.zeros(k.shape[0], 0, dtype=torch.bool))


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
