"""What a Favor's estimate of softmax attention is worth for given queries and keys."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .favor import Favor
from .features import favor_features, favor_norm, favor_rows
from .ops import _check
from .ops._dispatch import without_autocast
from .reference.favor import CHUNK

# what is looked at: queries of the whole batch, pairs of a head whose median is taken, numbers held at one time
QUERIES = 512
PAIRS = 2**18
BLOCK = 2**18
# a head's weights are those of averaging, softmax's are not, and an estimate is noise
AVERAGING, NOT_AVERAGING, NOISE = 0.1, 0.2, 10.0


class Fidelity(NamedTuple):
    """One number for each query head, `[Hq]`, float64.

    relative_variance: the variance of the estimate of exp(q.k / temperature) over its square, the median over pairs
        that are estimated, by the formulas for independent projections (Choromanski et al. 2021, lemma 2; orthogonal
        ones do better). Below 1 the estimate of a single weight means something. NaN for kind="relu", which estimates
        another kernel.
    effective_features: how many features carry a query's sum of weights: (sum_m x_m)^2 / sum_m x_m^2 with
        x_m = phi(q)_m sum_j phi(k_j)_m, the mean over queries. 1 to n_features (trig's terms have signs, so less too).
    error: distance between the weights and those of softmax, sum_j |w_ij - p_ij| / 2, the mean over queries: 0 same,
        1 on other keys altogether.
    averaging: the same distance between the weights and equal ones: near 0 the values are only averaged.
    exact_averaging: the same between softmax's weights and equal ones.

    Softmax here is the one that is estimated: of rows of unit length with normalize="l2", and of the map's temperature.
    NaN where a head has nothing to measure, as the first two where exact_diagonal leaves nothing to estimate.
    """

    relative_variance: Tensor
    effective_features: Tensor
    error: Tensor
    averaging: Tensor
    exact_averaging: Tensor


def fidelity(
    favor: Favor, query: Tensor, key: Tensor, *, key_padding_mask: Tensor | None = None, is_causal: bool = False
) -> Fidelity:
    """What `favor` makes of the softmax attention of these queries and keys, per head.

    query: `[B, Hq, L, D]`, key: `[B, H, S, D]`, Hq a multiple of H; key_padding_mask: bool `[B, S]`, True for a padded
        key; is_causal: query i sees keys 0..i, needs L == S.
    Key centring, normalize and (in causal calls) exact_diagonal are those of `favor`. At most 512 queries of the batch
    (one of each entry at least), evenly spaced, meet all keys, a block at a time, so that memory is bounded for any
    length; the median is of about 2**18 pairs, from evenly spaced keys. Queries that see no key do not count.

    Warns (UserWarning) of heads whose weights are close to averaging where softmax's are not, and of heads where the
    estimate is noise. Raises ValueError or TypeError in a sentence.
    """
    op = "Favor.fidelity"
    if not isinstance(favor, Favor):
        _check.fail(op, f"favor must be a longattn.Favor, got {_check.describe(favor)}", TypeError)
    _check.attention_inputs(op, query, key, key, enable_gqa=True)
    if query.shape[3] != favor.head_dim:
        _check.fail(op, f"query and key must have the map's head_dim, {favor.head_dim}, got {query.shape[3]}")
    if query.device != favor.projection.device:
        came = f"got {query.device} and {favor.projection.device}"
        _check.fail(op, f"query must be on the device of the map, {came}; move it with favor.to(query.device)")
    _check.padding_mask(op, key_padding_mask, key)
    if is_causal and query.shape[2] != key.shape[2]:
        _check.fail(op, f"is_causal needs as many queries as keys, got {query.shape[2]} and {key.shape[2]}")
    found = measure(favor, query, key, key_padding_mask, is_causal)
    for sentence in _warnings(favor, found, is_causal):
        warnings.warn(f"{op}: {sentence}", stacklevel=3)
    return found


@torch.no_grad()
def measure(
    favor: Favor, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, skip: Tensor | None = None
) -> Fidelity:
    """`fidelity` of checked inputs, without its warnings. skip: bool `[B, L]`, queries that do not count."""
    B, H, L, _ = query.shape
    # not every GPU of a laptop knows float64
    acc = torch.float32 if query.device.type == "mps" else torch.float64
    nothing = torch.zeros(H, dtype=acc, device=query.device)
    distances, effective, spread, counts = [nothing] * 3, nothing, [], (0, 0)
    stride = max(1, min(QUERIES, B * L) * key.shape[2] // PAIRS)
    with without_autocast(query.device.type):
        mean = _mean(favor, key, mask, is_causal)
        for b in range(B):
            at = torch.arange(L, device=query.device) if skip is None else (~skip[b]).nonzero()[:, 0]
            n = min(len(at), max(1, QUERIES // B))
            at = at[(2 * torch.arange(n, device=at.device) + 1) * len(at) // (2 * max(n, 1))]
            pairs = _Pairs(
                favor, query[b, :, at].to(acc), key[b], at, None if mask is None else mask[b], is_causal,
                None if mean is None else mean[b if len(mean) > 1 else 0],
            )
            sums = pairs.sums(stride)
            seen, estimated = int(sums.seen.count_nonzero()), int(sums.estimated.count_nonzero())
            distances = [total + x for total, x in zip(distances, pairs.distances(sums), strict=True)]
            effective = effective + sums.effective[:, sums.estimated].sum(1)
            spread.append(sums.spread)
            counts = counts[0] + seen, counts[1] + estimated
    error, averaging, exact_averaging = (x / counts[0] for x in distances)
    variance = nothing / 0
    if counts[1] and favor.kind != "relu":
        variance = relative_variance(torch.cat(spread, 1).nanmedian(1).values, favor.kind, favor.n_features)
    return Fidelity(variance, effective / counts[1], error, averaging, exact_averaging)


def relative_variance(squared: Tensor, kind: str, n_features: int) -> Tensor:
    """Of the estimate of exp(q.k) from independent projections, over its square; increases with `squared`, which is
    |q - k|^2 for "trig" and |q + k|^2 for "positive" and "hyperbolic"."""
    up = torch.expm1(squared.clamp_min(0))
    if kind == "positive":
        return up / n_features
    # both are exp(s) (1 - exp(-s))^2, from cosines as from hyperbolic cosines
    return up * -torch.expm1(-squared.clamp_min(0)) / n_features


def _mean(favor: Favor, key: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """What is subtracted from the keys, `[1 or B, H, D]`"""
    if not favor.center_keys:
        return None
    if favor.key_mean is None:
        if is_causal:
            remedy = "store it first with favor.calibrate(key)"
            why = "center_keys in a causal call needs a mean that no later key enters"
            _check.fail("Favor.fidelity", f"{why}; {remedy}")
        return favor.mean(key, mask)
    if len(favor.key_mean) != key.shape[1]:
        came = f"its mean is of {len(favor.key_mean)}; calibrate it on keys like these"
        _check.fail("Favor.fidelity", f"key has {key.shape[1]} heads, but {came}")
    return favor.key_mean[None]


class _Sums(NamedTuple):
    """Of each query over all keys: maxima and sums of the exponentials, and what the features are worth."""

    seen: Tensor                               # [n], how many keys
    exact: tuple[Tensor, Tensor]               # [Hq, n, 1] each: maximum, sum of softmax's weights
    weights: tuple[Tensor, Tensor]             # the same of the mechanism's
    estimated: Tensor                          # [n], whether features are used
    effective: Tensor                          # [Hq, n]
    spread: Tensor                             # [Hq, pairs], |q + k|^2 or |q - k|^2, NaN for pairs that do not count


class _Block(NamedTuple):
    """n queries and m keys."""

    visible: Tensor                            # [n, m]
    far: Tensor                                # [n, m], visible and estimated
    scores: Tensor                             # [Hq, n, m], -inf where not visible
    logs: Tensor                               # [Hq, n, m], weights are dots * exp(logs)
    dots: Tensor                               # [Hq, n, m]
    phi: Tensor                                # [Hq, m, M]
    squared: Tensor                            # [Hq, n, m]


class _Pairs:
    """The queries of one batch entry and all its keys, which come in blocks."""

    def __init__(self, favor, query, key, at, mask, is_causal, mean) -> None:
        acc = query.dtype
        self.kind, self.l2, self.root = favor.kind, favor.normalize == "l2", favor.root.to(acc)
        self.projection, self.mean = favor.projection.to(acc), None if mean is None else mean.to(acc)
        self.key, self.at, self.mask, self.is_causal = key, at, mask, is_causal
        self.exact_diagonal = is_causal and favor.exact_diagonal
        self.groups = query.shape[0] // max(1, key.shape[0])
        self.q = favor_rows(query, self.root, self.l2)                                         # [Hq, n, D]
        self.phi, b = favor_features(self.q, self.projection, self.kind)
        self.b = (b - math.log(favor_norm(self.projection, self.kind)))[..., None]             # [Hq, n, 1]
        self.kept = None

    def blocks(self) -> Iterator[_Block]:
        size = max(64, BLOCK // max(1, self.q.shape[0] * self.q.shape[1]))
        stop = int(self.at[-1]) + 1 if self.is_causal and len(self.at) else self.key.shape[1]
        if stop > size:
            return (self._block(start, min(start + size, stop)) for start in range(0, stop, size))
        self.kept = self.kept or [self._block(0, stop)]
        return iter(self.kept)

    def _block(self, start: int, stop: int) -> _Block:
        column = torch.arange(start, stop, device=self.at.device)
        visible = column <= self.at[:, None] if self.is_causal else torch.ones_like(column, dtype=torch.bool)
        visible = visible.expand(len(self.at), -1)
        k = self.key[:, start:stop].to(self.q.dtype)
        if self.mask is not None:
            hidden = self.mask[start:stop]
            visible, k = visible & ~hidden, k.masked_fill(hidden[:, None], 0)
        near = visible & (self.at[:, None] // CHUNK == column // CHUNK) & self.exact_diagonal
        k = favor_rows(k, self.root, self.l2, self.mean).repeat_interleave(self.groups, 0)     # [Hq, m, D]
        phi, a = favor_features(k, self.projection, self.kind)
        scores = self.q @ k.mT
        squares = (self.q * self.q).sum(-1)[..., None] + (k * k).sum(-1)[:, None]
        logs = torch.where(near, scores, self.b + a[:, None]).masked_fill(~visible, -math.inf)
        dots = torch.where(near, 1, self.phi @ phi.mT)
        squared = squares + (-2 if self.kind == "trig" else 2) * scores
        return _Block(visible, visible & ~near, scores.masked_fill(~visible, -math.inf), logs, dots, phi, squared)

    def sums(self, stride: int) -> _Sums:
        low, zero = torch.full_like(self.b, -math.inf), torch.zeros_like(self.b)
        exact, weights, terms, spread = (low, zero), (low, zero), (low, torch.zeros_like(self.phi)), []
        seen, estimated = torch.zeros_like(self.at), torch.zeros_like(self.at, dtype=torch.bool)
        for block in self.blocks():
            exact = _add(exact, block.scores, lambda w: w.sum(-1, keepdim=True))
            weights = _add(weights, block.logs, lambda w, dots=block.dots: (dots * w).sum(-1, keepdim=True))
            far = block.logs.masked_fill(~block.far, -math.inf)
            terms = _add(terms, far, lambda w, phi=block.phi: w @ phi)
            # a copy of few, not a view that keeps the block
            few = block.squared[..., ::stride].masked_fill(~block.far[:, ::stride], math.nan)
            spread.append(few.flatten(1))
            seen, estimated = seen + block.visible.sum(-1), estimated | block.far.any(-1)
        x = self.phi * terms[1]                                                                # [Hq, n, M]
        return _Sums(seen, exact, weights, estimated, x.sum(-1) ** 2 / (x * x).sum(-1), torch.cat(spread, 1))

    def distances(self, sums: _Sums) -> list[Tensor]:
        """Weights to softmax's, weights to equal, softmax's to equal: `[Hq]` each, summed over queries"""
        totals = [self.b.new_zeros(len(self.b))] * 3
        for block in self.blocks():
            p = _share(sums.exact, block.scores)
            w = _share(sums.weights, block.logs, block.dots)
            equal = block.visible / sums.seen.clamp_min(1)[:, None]
            pairs = ((w, p), (w, equal), (p, equal))
            totals = [total + (x - y).abs().sum((1, 2)) / 2 for total, (x, y) in zip(totals, pairs, strict=True)]
        return totals


def _add(total: tuple[Tensor, Tensor], logs: Tensor, summed) -> tuple[Tensor, Tensor]:
    """A sum kept in units of exp of its maximum; nothing seen yet is a maximum of -inf."""
    top = torch.maximum(total[0], logs.amax(-1, keepdim=True)) if logs.shape[-1] else total[0]
    finite = top.masked_fill(top == -math.inf, 0)
    return top, total[1] * torch.exp(total[0] - finite) + summed(torch.exp(logs - finite))


def _share(total: tuple[Tensor, Tensor], logs: Tensor, factor: Tensor | int = 1) -> Tensor:
    top, z = total
    # a sum of 0 is an output of 0
    return factor * torch.exp(logs - top.masked_fill(top == -math.inf, 0)) / torch.where(z == 0, 1, z)


def _heads(chosen: Tensor) -> str:
    at = chosen.nonzero()[:, 0].tolist()
    shown = ", ".join(map(str, at[:8])) + (f" and {len(at) - 8} more" if len(at) > 8 else "")
    return f"head {shown}" if len(at) == 1 else f"heads {shown}"


def _warnings(favor: Favor, found: Fidelity, is_causal: bool) -> Iterator[str]:
    flat = (found.averaging < AVERAGING) & (found.exact_averaging > NOT_AVERAGING)
    if flat.any():
        relu = "use kind='positive', since kind='relu' estimates another kernel than softmax's"
        yield (
            f"the weights of {_heads(flat)} are close to averaging (distance {found.averaging[flat].min():.2g}) where "
            f"softmax's are not ({found.exact_averaging[flat].max():.2g}); "
            + (relu if favor.kind == "relu" else advice(favor, is_causal))
        )
    noise = found.relative_variance > NOISE
    if noise.any():
        worst = found.relative_variance[noise].max()
        yield (
            f"the estimate is noise in {_heads(noise)}: its variance is up to {worst:.2g} times the square of what it "
            f"estimates; {advice(favor, is_causal)}"
        )


def advice(favor: Favor, is_causal: bool) -> str:
    """What is left to try, as the end of a sentence."""
    left = [] if favor.normalize == "l2" else ["normalize='l2'"]
    left += [f"a temperature above {favor.temperature.item():.3g}"]
    left += [] if favor.center_keys else ["center_keys=True"]
    left += [f"more than {favor.n_features} features"]
    if is_causal and not favor.exact_diagonal and favor.kind != "relu":
        left += ["exact_diagonal=True"]
    return f"try {', '.join(left[:-1])} or {left[-1]}"
