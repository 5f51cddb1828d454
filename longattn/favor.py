"""FAVOR+ (Performer) features as a module: random projections, temperature, key mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .features import FAVOR_KINDS, FAVOR_PAIRED, favor_features, favor_norm, favor_rows
from .ops import _check
from .ops._dispatch import without_autocast

SCALINGS = ("random", "regularized")
# odd, so that no two steps of a seed meet, nor two seeds that differ in one half alone
STRIDE, FOLD = 0x7F4A7C15, 0x9E3779B1


def draw_projection(
    rows: int, head_dim: int, *, orthogonal: bool = True, scaling: str = "random", seed: int = 0, step: int = 0
) -> Tensor:
    """Random directions `[rows, head_dim]`, float32 on the CPU, a function of its arguments alone.

    orthogonal: blocks of head_dim rows are Haar-distributed (uniform over rotations); else rows are independent normal.
    scaling: "random" gives row norms chi(head_dim) as of normal rows, "regularized" sqrt(head_dim).
    Choromanski et al. 2021, section 2.4.
    """
    # torch's generator reads the lower half of its seed only
    seed = seed % 2**32 + (seed >> 32) % 2**32 * FOLD
    generator = torch.Generator().manual_seed((seed + step * STRIDE) % 2**32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if orthogonal:
        blocks = []
        for _ in range(-(-rows // head_dim)):
            q, r = torch.linalg.qr(normal(head_dim, head_dim))
            # LAPACK's choice of signs is not uniform: without this the estimates are biased by tens of percent
            blocks.append((q * torch.where(r.diagonal() < 0, -1, 1)).mT)
        directions = torch.cat(blocks)[:rows]
        norms = normal(rows, head_dim).norm(dim=1) if scaling == "random" else math.sqrt(head_dim)
    else:
        directions = normal(rows, head_dim)
        norms = directions.norm(dim=1) if scaling == "random" else math.sqrt(head_dim)
        directions = directions / directions.norm(dim=1, keepdim=True)
    norms = torch.as_tensor(norms, dtype=torch.float64).expand(rows)
    return (directions * norms[:, None]).float()


def _shown(x) -> str:
    return _check.describe(x) if isinstance(x, Tensor) else repr(x)


def _is_temperature(x) -> bool:
    """Positive, and neither it nor its square root's inverse beyond float32."""
    try:
        return not isinstance(x, (bool, str)) and 1e-37 < float(x) < 3e38
    except (TypeError, ValueError, OverflowError):
        return False


class Favor(nn.Module):
    """Random features whose dot products estimate exp(q.k / temperature): softmax attention in linear time.

    Choromanski et al. 2021 (arXiv 2009.14794). Give it to `linear_attention(feature_map=...)`, to
    `longattn.Linear(...)` or as `mechanism=` of `longattn.nn.MultiheadAttention`; the kernels then compute projection,
    exponential, products and normaliser in one pass and never store features. Calling it returns the features, for
    study.

    head_dim: D, width of queries and keys.
    n_features: M. Even for "hyperbolic" and "trig", which take two features from each projection.
    kind: "positive" exp(w.x - |x|^2/2), "hyperbolic" exp(+-w.x - |x|^2/2) (lower error at small norms), "relu"
        max(w.x, 0) + 1e-3 (another kernel, not the softmax's), "trig" sin and cos (unstable; for study).
    orthogonal, scaling: how projections are drawn, `longattn.favor.draw_projection`.
    normalize: None, or "l2": queries and keys are divided by their length first, which bounds the variance.
    temperature: of the kernel; default sqrt(head_dim), 1 with normalize="l2".
    seed: projections are a function of (seed, step of the last redraw): equal on every device and rank.
    learn_temperature: makes the logarithm of the temperature a parameter.
    center_keys: subtract a mean from the keys, which leaves the softmax as it is and lowers the error for keys far
        from 0. The mean is the one stored by `calibrate`; without one, that of the call's unpadded keys, which a causal
        call may not look at: it raises.
    exact_diagonal: causal calls use exp(q.k / temperature) itself inside chunks of 64 tokens, features beyond.

    A query whose features and those of all its keys have no common ground within float32 (weights below 2^-100 of what
    the largest features would give: lengths |q| + |k| of about 40 sqrt(temperature)) sees nothing and gets 0; estimates
    are worthless long before. With exact_diagonal it still sees its own chunk.

    Raises ValueError or TypeError in a sentence.
    """

    projection: Tensor
    key_mean: Tensor | None

    def __init__(
        self,
        head_dim: int,
        n_features: int = 256,
        kind: str = "positive",
        orthogonal: bool = True,
        scaling: str = "random",
        normalize: str | None = None,
        temperature: float | None = None,
        seed: int = 0,
        *,
        learn_temperature: bool = False,
        center_keys: bool = False,
        exact_diagonal: bool = False,
        device=None,
    ) -> None:
        super().__init__()
        for name, x in (("head_dim", head_dim), ("n_features", n_features)):
            if not isinstance(x, int) or isinstance(x, bool) or x < 1:
                _check.fail("Favor", f"{name} must be a positive integer, got {_shown(x)}")
        choices = (("kind", kind, FAVOR_KINDS), ("scaling", scaling, SCALINGS), ("normalize", normalize, (None, "l2")))
        for name, x, known in choices:
            if x not in known:
                _check.fail("Favor", f"{name} must be one of {', '.join(map(repr, known))}, got {x!r}")
        if kind in FAVOR_PAIRED and n_features % 2:
            why = f"kind={kind!r} takes two features from each projection"
            _check.fail("Favor", f"{why}: n_features must be even, got {n_features}")
        if exact_diagonal and kind == "relu":
            why = "exact_diagonal mixes the softmax kernel with its estimate"
            _check.fail("Favor", f"{why}, and kind='relu' estimates another")
        if not isinstance(seed, int) or isinstance(seed, bool):
            _check.fail("Favor", f"seed must be an integer, got {seed!r}", TypeError)
        if temperature is None:
            temperature = 1.0 if normalize == "l2" else math.sqrt(head_dim)
        if not _is_temperature(temperature):
            _check.fail("Favor", f"temperature must be a positive finite number, got {temperature!r}")
        self.head_dim, self.n_features, self.kind = head_dim, n_features, kind
        self.orthogonal, self.scaling, self.normalize, self.seed = orthogonal, scaling, normalize, seed
        self.center_keys, self.exact_diagonal = center_keys, exact_diagonal
        self._log_temperature = math.log(temperature)
        self.register_buffer("projection", self._draw(0).to(device))
        log_temperature = torch.tensor(self._log_temperature, dtype=torch.float32, device=device)
        if learn_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature)
        self.register_buffer("key_mean", None)

    def _draw(self, step: int) -> Tensor:
        rows = self.n_features // (2 if self.kind in FAVOR_PAIRED else 1)
        shape = {"orthogonal": self.orthogonal, "scaling": self.scaling}
        return draw_projection(rows, self.head_dim, seed=self.seed, step=step, **shape)

    @property
    def temperature(self) -> Tensor:
        return self.log_temperature.exp()

    @property
    def root(self) -> Tensor:
        """temperature^(-1/2), what queries and keys are multiplied by."""
        return torch.exp(-0.5 * self.log_temperature)

    @torch.no_grad()
    def redraw(self, step: int) -> None:
        """New projections, a function of (seed, step): every rank that redraws at the same step gets the same ones.

        In place, so between training steps only: a backward pass, or a recomputation of its forward, must meet the
        projections that its forward met (torch raises where it can tell).
        """
        if not isinstance(step, int) or isinstance(step, bool):
            _check.fail("Favor.redraw", f"step must be an integer, got {step!r}", TypeError)
        self.projection.copy_(self._draw(step))

    @torch.no_grad()
    def calibrate(self, key: Tensor, key_padding_mask: Tensor | None = None) -> None:
        """Stores the mean of the keys `[B, H, S, D]` that are not padded (bool `[B, S]`), for each head.

        A causal decoder measures it once on representative data; it stays as it is in training and is saved with the
        module.
        """
        if not self.center_keys:
            _check.fail("Favor.calibrate", "this map does not centre keys: make it with center_keys=True")
        self._check_rows("key", key)
        _check.padding_mask("Favor.calibrate", key_padding_mask, key)
        if key.shape[0] * key.shape[2] == 0 or (key_padding_mask is not None and key_padding_mask.all()):
            _check.fail("Favor.calibrate", f"there must be a key that is not padded, got {_check.describe(key)}")
        # one row of the whole batch, so that every key weighs the same
        row = key.transpose(0, 1).flatten(1, 2)[None]
        mean = self.mean(row, None if key_padding_mask is None else key_padding_mask.flatten()[None])[0]
        # a tensor of inference mode could not be part of a later graph
        with torch.inference_mode(False):
            self.key_mean = mean.clone()

    def mean(self, key: Tensor, mask: Tensor | None) -> Tensor:
        """-> `[B, H, D]` of the rows as the kernel sees them, before the temperature"""
        acc = torch.float64 if key.dtype == torch.float64 else torch.float32
        if mask is None:
            return favor_rows(key.to(acc), 1.0, self.normalize == "l2").mean(2)
        # before the rows are divided by their length, so that a padded NaN meets no derivative
        rows = favor_rows(key.to(acc).masked_fill(mask[:, None, :, None], 0), 1.0, self.normalize == "l2")
        return rows.sum(2) / (~mask).to(acc).sum(1).clamp_min(1)[:, None, None]

    def _check_rows(self, name: str, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[-1] != self.head_dim:
            _check.fail("Favor", f"{name} must be [batch, heads, length, {self.head_dim}], got {_check.describe(x)}")

    def forward(self, x: Tensor) -> Tensor:
        """The features `[..., D] -> [..., M]`, float32 (float64 for float64).

        E[phi(q).phi(k)] = exp(q.k / temperature), with q and k of unit length with normalize="l2". Nothing is
        subtracted, so large inputs overflow here.
        """
        if not isinstance(x, Tensor) or x.dim() < 1 or x.shape[-1] != self.head_dim:
            _check.fail("Favor", f"x must be [..., {self.head_dim}], got {_check.describe(x)}")
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        with without_autocast(x.device.type):
            projection = self.projection.to(acc)
            rows = favor_rows(x.to(acc), self.root.to(acc), self.normalize == "l2")
            phi, a = favor_features(rows, projection, self.kind)
            return phi * (torch.exp(a) * favor_norm(projection, self.kind) ** -0.5)[..., None]

    def fidelity(self, query: Tensor, key: Tensor, **masks):
        """What the estimate is worth for these queries and keys, per head: `longattn.fidelity.fidelity`."""
        from .fidelity import fidelity

        return fidelity(self, query, key, **masks)

    def _apply(self, fn, recurse=True):
        # a model in half precision keeps them: the kernels compute with float32, whatever the inputs are
        def kept(x: Tensor) -> Tensor:
            y = fn(x)
            return x.to(y.device) if y.dtype in (torch.float16, torch.bfloat16) else y

        had_memory = not self.projection.is_meta
        super()._apply(kept, recurse)
        if not had_memory and not self.projection.is_meta:
            # to_empty has left anything in it, and a checkpoint of another attention has none of this
            self.redraw(0)
            with torch.no_grad():
                self.log_temperature.fill_(self._log_temperature)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        # the mean is there only after `calibrate`, here or where the file was written
        mean = state_dict.get(prefix + "key_mean")
        if mean is not None and (self.key_mean is None or self.key_mean.shape != mean.shape):
            self.key_mean = torch.empty_like(mean, device=self.projection.device)
        elif mean is None and prefix + "projection" in state_dict:
            self.key_mean = None
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        shown = [f"{self.head_dim}, n_features={self.n_features}, kind={self.kind!r}"]
        for name, default in (("orthogonal", True), ("scaling", "random"), ("normalize", None), ("seed", 0)):
            if getattr(self, name) != default:
                shown.append(f"{name}={getattr(self, name)!r}")
        shown += [f"{name}=True" for name in ("center_keys", "exact_diagonal") if getattr(self, name)]
        return ", ".join(shown)
