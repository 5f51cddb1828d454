"""How much memory there is, and how much there was at most: of this process, or of a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import sys
from collections.abc import Callable

import torch


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _reset_high_water() -> bool:
    """Puts the high-water mark of resident memory back to what is resident now; False where that cannot be done."""
    try:
        with open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")
    except OSError:
        return False
    return True


def high_water() -> int:
    """Bytes of resident memory at its highest so far."""
    if sys.platform == "linux":
        return _status("VmHWM")
    if sys.platform == "win32":
        return _process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@functools.cache
def _process():
    try:
        import psutil
    except ImportError:
        raise ImportError(f"profile_memory: on {sys.platform} it needs psutil; pip install psutil") from None
    return psutil.Process()


def resident() -> int:
    """Bytes of resident memory."""
    if sys.platform != "linux":
        return _process().memory_info().rss
    with open("/proc/self/statm", "rb", buffering=0) as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _return_free_memory() -> None:
    """Hands freed heap back to the system, so that its reuse counts as memory again."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class _Resident:
    """Memory of this process: what is resident."""

    def __init__(self) -> None:
        self.open: list[PeakMemory] = []

    now = staticmethod(resident)
    highest = staticmethod(high_water)
    reset = staticmethod(_reset_high_water)


class _Cuda:
    """Memory of a GPU: what torch's allocator has handed out."""

    def __init__(self) -> None:
        self.open: list[PeakMemory] = []

    def now(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def highest(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def reset(self) -> bool:
        torch.cuda.reset_peak_memory_stats()
        return True


GAUGES = {"cpu": _Resident(), "cuda": _Cuda()}


class PeakMemory:
    """`with PeakMemory() as peak: ...`; then peak.bytes is how far memory rose above where it stood. They nest.

    device: "cpu" is resident memory, "cuda" what torch's allocator hands out. Where the high-water mark of resident
    memory cannot be reset (`method` says so), an earlier peak of the same process may be counted.
    """

    method = "growth of resident memory at its highest, in a fresh process"

    def __init__(self, device: str = "cpu") -> None:
        self.gauge = GAUGES[device]

    def __enter__(self) -> PeakMemory:
        if not self.gauge.open:
            gc.collect()
        _return_free_memory()
        self.bytes, self.start = 0, self.gauge.now()
        # the mark is one for all: those outside keep what it has shown so far
        self._note()
        if not self.gauge.reset():
            self.method = f"{PeakMemory.method}, whose earlier peaks may count"
        self.gauge.open.append(self)
        return self

    def __exit__(self, *error) -> None:
        self._note()
        self.gauge.open.remove(self)

    def _note(self) -> None:
        highest = self.gauge.highest()
        for each in self.gauge.open:
            each.bytes = max(each.bytes, highest - each.start)


def peak_of(function: Callable[[], object], device: str = "cpu") -> int:
    """Bytes by which memory grows at most during one call, results included, over what is there before it."""
    with PeakMemory(device) as peak:
        # kept until the peak is read
        kept = function()  # noqa: F841
    return peak.bytes
