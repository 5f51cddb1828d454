"""Feature maps of linear attention on the way to an engine: what is mapped here and what is left to it."""

from __future__ import annotations

from torch import Tensor

from ..favor import Favor
from ..features import FUSED, FeatureMap
from . import _check
from ._favor_features import favor_features
from ._prefix import accumulator


def map_rows(op: str, feature_map: FeatureMap, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None):
    """-> q, k, v and the name of the map that is left to the engine"""
    if not callable(feature_map):
        if not isinstance(feature_map, str) or feature_map not in FUSED:
            known = ", ".join(FUSED)
            remedy = "for random features pass longattn.Favor(head_dim)"
            _check.fail(op, f"feature_map must be one of {known} or a callable, got {feature_map!r}; {remedy}")
        return q, k, v, feature_map
    if mask is not None:
        # the map's own backward would make NaN of a padded key's NaN times 0
        k = k.masked_fill(mask[:, None, :, None], 0)
    phi_q, phi_k = feature_map(q), feature_map(k)
    for x, y in ((q, phi_q), (k, phi_k)):
        shaped = isinstance(y, Tensor) and y.shape[:-1] == x.shape[:-1] and y.shape[-1] == phi_q.shape[-1] > 0
        if not shaped or y.dtype not in _check.DTYPES:
            came = f"got {_check.describe(y)} from {_check.describe(x)}"
            _check.fail(op, f"feature_map must map [..., D] to [..., M], {came}; M > 0, and a floating dtype")
    # a map that works in float32 for accuracy keeps it: the values follow
    return phi_q, phi_k, v.to(phi_q.dtype), "identity"


def features(feature: str | Favor, x: Tensor, keys: bool, fused: bool = True) -> Tensor:
    """-> phi(x) `[B, H, n, M]`, float32 (float64 for float64); fused: by a kernel where the map has one"""
    if isinstance(feature, Favor):
        return favor_features(x, feature, keys, fused)
    return FUSED[feature](x.to(accumulator(x.dtype)))
