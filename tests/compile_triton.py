"""Run by test_aot.py in a process of its own: the launchers, compiling where they would launch, for an absent GPU.

Prints a line for each kernel it compiled, and exits 1 if ptxas spilled registers in any.
"""

import contextlib
import io
import os
import re
import sys

os.environ["TRITON_ALWAYS_COMPILE"] = "1"

import torch
import triton
from longattn.kernels import favor, features, linear, lsh, reversible, softmax, toeplitz, toeplitz_fft
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from longattn.ops import _toeplitz_fft
from longattn.ops._prefix import SEGMENT

SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


class Driver:
    """A driver that knows its target and has no device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0

    def set_current_device(self, device):
        pass


def compile_instead(spilled: list[str]) -> None:
    launch, seen = JITFunction.run, set()

    def run(self, *args, grid, warmup, **options):
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = launch(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash in seen:
            return kernel
        seen.add(kernel.hash)
        found = SPILLS.search(log.getvalue())
        if found is None:
            raise RuntimeError(f"ptxas said nothing of spills in {self.__name__}: {log.getvalue()!r}")
        spills = int(found[2]) + int(found[3])
        name = f"{self.__name__} {options.get('KIND', '')} {options.get('DOT', '')}"
        if "QUERIES" in options and "LAST" in options:
            name += " queries" if options["QUERIES"] else " keys"
        print(f"{name}: {spills} bytes spilled, {kernel.metadata.shared} bytes shared", flush=True)
        if spills:
            spilled.append(name)
        return kernel

    JITFunction.run = run


def forward_and_backward(dtype: torch.dtype, D: int, E: int, is_causal: bool, state: bool) -> None:
    B, H, L, groups = 1, 2, 300, 2
    q, k, v = (torch.zeros(B, h, L, d, dtype=dtype) for h, d in ((H * groups, D), (H, D), (H, E)))
    mask = torch.zeros(B, L, dtype=torch.bool) if state else None
    kv, k_sum = (torch.zeros(B, H, D, E), torch.zeros(B, H, D)) if state else (None, None)
    # segments shorter than the sequence, so that totals and scan run too
    assert min(SEGMENT.values()) > 64
    options = {"feature": "elu", "is_causal": is_causal, "normalize": True, "scale": 1.0, "segment": 64}
    tensors = (q, k, v, mask, None, kv, k_sum)
    out, z, *segments, new_kv, new_k_sum = linear.forward(*tensors, save_segments=True, **options)
    linear.backward(out, new_kv, new_k_sum, *tensors, out, z, *segments, **options)


def favor_forward_and_backward(
    dtype: torch.dtype, D: int, E: int, is_causal: bool, state: bool, *, kind: str, P: int, exact: bool
) -> None:
    B, H, L = 1, 2, 300
    q, k, v = (torch.zeros(B, H, L, d, dtype=dtype) for d in (D, D, E))
    M = P * (2 if kind in ("hyperbolic", "trig") else 1)
    mask = torch.zeros(B, L, dtype=torch.bool) if state else None
    given = (torch.zeros(B, H, M, E), torch.zeros(B, H, M), torch.zeros(B, H)) if state else (None,) * 3
    options = {"kind": kind, "l2": False, "is_causal": is_causal, "exact_diagonal": exact, "segment": 64}
    tensors = (q, k, v, mask, None, *given, torch.zeros(P, D), torch.ones(()), None)
    out, z, r, *segments, kv, k_sum, log = favor.forward(*tensors, save_segments=True, **options)
    favor.backward(out, kv, k_sum, *tensors, out, z, r, *segments, log, **options)


def softmax_forward_and_backward(dtype: torch.dtype, D: int, E: int, causal: bool, kind: str) -> None:
    """kind: "shared" or "separate" LSH of two rounds, "dense", "local", or one of these with a "biased" before it."""
    kind, bias = kind.removeprefix("biased "), kind.startswith("biased ")
    B, H, L, R, chunk = 1, 2, 300, 4, 64
    q, k, v = (torch.zeros(B, h, L, d, dtype=dtype) for h, d in ((H if kind == "shared" else 2 * H, D), (H, D), (H, E)))
    key_scale, tables = None, (None,) * 6
    options = {"chunk": chunk, "look_back": 1, "look_ahead": 0 if causal else 1, "window": 0, "is_causal": causal,
               "dedupe": True, "self_rule": 2, "wrap": False, "scale": 1.0, "dropout_p": 0.0, "seed": 0}
    if kind == "dense":
        options |= {"look_back": L, "look_ahead": 0 if causal else L, "self_rule": 0}
    elif kind == "local":
        options |= {"window": chunk, "self_rule": 0}
    else:
        of_q, of_k = (torch.zeros(B, x.shape[1], R, L, dtype=torch.int32) for x in (q, k))
        tables = (of_q, of_k, of_q, of_k, None, None)
    if kind == "shared":
        k, key_scale, tables = None, torch.zeros(B, H, L), (of_q, None, of_q, None, None, None)
        options["self_rule"] = 1
        lsh.hash(q, None, torch.zeros(H, R, D, 24), (16, 32))
    if bias:
        options["bias"] = torch.zeros(2 * H, 2 * 40 + 1)
    tensors = (q, k, v, None, None, key_scale, *tables)
    out, lse = softmax.forward(*tensors, **options)
    softmax.backward(out, *tensors, out, lse, **options)


def toeplitz_forward_and_backward(dtype: torch.dtype, M: int, E: int, causal: bool, fft: bool) -> None:
    """Shorter than the sequence, and past a segment: near tiles, states before them and after."""
    B, H, L, reach, groups = 1, 2, 1100, 20, 2
    assert max(toeplitz.SEGMENT.values()) + reach < L
    q, k, v = (torch.zeros(B, h, L, d, dtype=x) for h, d, x in ((H * groups, M, None), (H, M, None), (H, E, dtype)))
    mask, c = torch.zeros(B, L, dtype=torch.bool), torch.zeros(H * groups, 2 * reach + 1)
    options = {"reach": reach, "offset": 0, "is_causal": causal, "normalize": True}
    run = _toeplitz_fft.engine(toeplitz_fft) if fft else toeplitz
    out, z = run.forward(q, k, v, c, mask, None, **options)
    run.backward(out, None, q, k, v, c, mask, None, out, z, **options)


def features_forward_and_backward(dtype: torch.dtype, D: int, P: int) -> None:
    for kind, logs in (("positive", False), ("hyperbolic", True)):
        x, projection, mean = torch.zeros(1, 2, 100, D, dtype=dtype), torch.zeros(P, D), torch.zeros(2, D)
        tensors = (x, projection, torch.ones(()), mean if logs else None)
        phi = features.forward(*tensors, kind=kind, logs=logs)
        features.backward(phi, phi, *tensors, kind=kind, logs=logs)


def sums_of_streams(dtype: torch.dtype) -> None:
    for grid in (0.0, 2.0**-13):
        for subtract in (False, True):
            reversible.add(torch.zeros(5000), torch.zeros(5000, dtype=dtype), grid, 2.0**11, subtract, True)


if __name__ == "__main__":
    triton.runtime.driver.set_active(Driver(int(sys.argv[1])))
    knobs.nvidia.dump_ptxas_log = True
    spilled: list[str] = []
    compile_instead(spilled)
    for case in sys.argv[2:]:
        name, D, E, causal, state, *of_favor = case.split(",")
        print(f"-- {case}", flush=True)
        if state.removeprefix("biased ") in ("shared", "separate", "dense", "local"):
            softmax_forward_and_backward(getattr(torch, name), int(D), int(E), causal == "causal", state)
            continue
        if state in ("toeplitz", "toeplitz fft"):
            fft = state == "toeplitz fft"
            toeplitz_forward_and_backward(getattr(torch, name), int(D), int(E), causal == "causal", fft)
            continue
        if state == "features":
            features_forward_and_backward(getattr(torch, name), int(D), int(E))
            continue
        if state == "reversible":
            sums_of_streams(getattr(torch, name))
            continue
        common = (getattr(torch, name), int(D), int(E), causal == "causal", state == "state")
        if of_favor:
            kind, P, exact = of_favor
            favor_forward_and_backward(*common, kind=kind, P=int(P), exact=exact == "exact")
        else:
            forward_and_backward(*common)
    if spilled:
        sys.exit(f"registers spilled in {', '.join(spilled)}")
