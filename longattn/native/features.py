"""Launchers of csrc/cpu/features.cpp: FAVOR+ features of rows of unit length as a tensor, and their gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..features import favor_bound, favor_count
from . import empty, extension, view, workspace
from .favor import KINDS


def _run(name: str, x, projection, root, mean, kind: str, logs: bool, results: dict) -> None:
    # held until the kernel returns: views carry bare pointers
    problem = {"x": view(x), "projection": view(projection), "root": root.item(), "threads": torch.get_num_threads()}
    problem |= {"kind": KINDS[kind], "l2": True, "logs": logs} | ({} if mean is None else {"mean": view(mean)})
    problem["shift"] = -favor_bound(projection, root, kind).item() if logs else 0.0
    scratch = workspace(extension().features_workspace(problem))
    problem["workspace"] = view(scratch)
    getattr(extension(), name)(problem, {name: view(x) for name, x in results.items()})


def forward(x, projection, root, mean, *, kind: str, logs: bool) -> Tensor:
    """-> phi `[B, H, n, M]` in the accumulator's dtype; logs: times e^(a - favor_bound)"""
    phi = empty((*x.shape[:3], favor_count(projection, kind)), projection.dtype)
    _run("features_forward", x, projection, root, mean, kind, logs, {"phi": phi})
    return phi


def backward(grad, phi, x, projection, root, mean, *, kind: str, logs: bool) -> tuple[Tensor, Tensor]:
    """-> dx, droot"""
    dx, root_rows = empty(x.shape, x.dtype), torch.empty(x.shape[:3], dtype=projection.dtype)
    results = {"grad": grad, "phi": phi, "dx": dx, "root_rows": root_rows}
    _run("features_backward", x, projection, root, mean, kind, logs, results)
    return dx, root_rows.sum()
