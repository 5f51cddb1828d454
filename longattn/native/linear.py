"""Launchers of csrc/cpu/linear.cpp: they allocate the outputs and pass views. Signatures are those of every engine."""

from __future__ import annotations

import torch
from torch import Tensor

from . import contiguous, empty, extension, view, workspace

FEATURES = {"identity": 0, "elu": 1, "relu": 2}


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def slots_of(length: int, packed: int | None, segment: int) -> int:
    return (length + segment - 1) // segment if packed is None else length // segment + packed


class Problem:
    """Sizes, scratch and the description of one call that forward and backward share."""

    # with a projection, which makes features of its own number
    features = projections = 0

    def __init__(self, q, k, v, mask, cu_seqlens, kv, k_sum, *, feature, is_causal, normalize, scale, segment):
        self.batch, self.heads, self.length = q.shape[0], k.shape[1], q.shape[2]
        self.state_shape = (self.features or k.shape[3], v.shape[3])
        self.packed = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.sequences = self.batch if self.packed is None else self.packed
        self.slots = slots_of(self.length, self.packed, segment) if is_causal else self.packed or 1
        self.acc = _accumulator(q.dtype)
        self.keys = k.shape[2]
        self.segment = segment
        # enough heads keep every thread busy in one pass; otherwise segments of one head run side by side
        self.threads = torch.get_num_threads()
        longest = max(self.length, self.keys)
        self.split = self.sequences * self.heads < 2 * self.threads > 2 and longest > segment
        sizes = k.shape[3], v.shape[3], self.state_shape[0], self.projections
        scratch = extension().linear_workspace(*sizes, q.dtype == torch.float64, self.threads)
        # held until the kernel returns: views carry bare pointers
        self.tensors = {
            "q": q, "k": k, "v": v, "mask": mask, "cu_seqlens": cu_seqlens,
            "kv": contiguous(kv), "k_sum": contiguous(k_sum),
            "workspace": workspace(scratch),
        }  # fmt: skip
        self.options = {
            "feature": FEATURES[feature], "is_causal": is_causal, "normalize": normalize, "scale": scale,
            "segment": segment, "split": self.split, "threads": self.threads,
        }  # fmt: skip

    def state(self, slots: int | None = None) -> tuple[Tensor, Tensor]:
        """Uninitialised outgoing states, or one for each slot; packed slots may stay unused, so they are zeroed."""
        lead = (self.sequences, self.heads) if slots is None else (self.batch, self.heads, slots)
        make = torch.zeros if slots is not None and self.packed else torch.empty
        return tuple(make(*lead, *shape, dtype=self.acc) for shape in (self.state_shape, self.state_shape[:1]))

    def run(self, entry, tensors: dict[str, Tensor | None]) -> None:
        views = {name: view(x) for name, x in self.tensors.items() if x is not None}
        entry({**views, **self.options}, {name: view(x) for name, x in tensors.items() if x is not None})


def forward(q, k, v, mask, cu_seqlens, kv, k_sum, *, save_segments: bool, **options):
    """-> out, normalizer, segment_kv, segment_k_sum, kv, k_sum"""
    problem = Problem(q, k, v, mask, cu_seqlens, kv, k_sum, **options)
    out = empty((*q.shape[:3], v.shape[3]), q.dtype)
    normalizer = torch.empty(q.shape[:3] if options["normalize"] else 0, dtype=problem.acc)
    is_causal, nothing = options["is_causal"], (None, None)
    segments = problem.state(problem.slots) if save_segments or (problem.split and is_causal) else nothing
    partial = nothing
    if problem.split and not is_causal:
        partial = problem.state(slots_of(problem.keys, problem.packed, problem.segment))
    final = problem.state()
    names = "out", "normalizer", "segment_kv", "segment_k_sum", "partial_kv", "partial_k_sum", "kv", "k_sum"
    results = dict(zip(names, (out, normalizer, *segments, *partial, *final), strict=True))
    problem.run(extension().linear_forward, results)
    saved = segments if save_segments else (out.new_empty(0, dtype=problem.acc) for _ in range(2))
    return out, normalizer, *saved, *final


def backward(
    grad_out, grad_kv, grad_k_sum, q, k, v, mask, cu_seqlens, kv, k_sum, out, normalizer, segment_kv, segment_k_sum,
    **options,
):  # fmt: skip
    """-> dq, dk, dv, dkv, dk_sum (the last two empty where no state came in)"""
    problem = Problem(q, k, v, mask, cu_seqlens, kv, k_sum, **options)
    dq, dk, dv = (empty(x.shape, x.dtype) for x in (q, k, v))
    partial = (None, None)
    if problem.split:
        partial = problem.state(slots_of(problem.length, problem.packed, problem.segment))
    initial = problem.state()
    saved = (out, normalizer, segment_kv, segment_k_sum, *partial)
    names = "out", "normalizer", "segment_kv", "segment_k_sum", "partial_kv", "partial_k_sum"
    gradients = {"dq": dq, "dk": dk, "dv": dv, "dkv": initial[0], "dk_sum": initial[1]}
    incoming = {"grad_out": grad_out, "grad_kv": contiguous(grad_kv), "grad_k_sum": contiguous(grad_k_sum)}
    problem.run(extension().linear_backward, {**dict(zip(names, saved, strict=True)), **gradients, **incoming})
    if kv is None:
        initial = tuple(x.new_empty(0) for x in initial)
    return dq, dk, dv, *initial
