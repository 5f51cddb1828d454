"""Times and peak memory, each measured in a fresh process so that no point inherits memory from another."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from typing import NamedTuple

import torch

from ..profile import profile_memory

# torch maps large blocks with huge pages: without, most of a short call is page faults
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
# a first call that takes longer is the measurement; a shorter one warms up
LONG_S = 1.5
REPEAT_S, REPEATS = 0.25, (3, 25)


class WorkerError(RuntimeError):
    """A fresh process failed; the message says why in a sentence."""


# fresh processes


@contextlib.contextmanager
def _changed(variable: str, value: str, signal_ignored: int) -> Iterator[None]:
    """Sets an environment variable unless the user has, and ignores a signal, for a process that inherits both."""
    kept, handler = os.environ.get(variable), signal.signal(signal_ignored, signal.SIG_IGN)
    os.environ.setdefault(variable, value)
    try:
        yield
    finally:
        signal.signal(signal_ignored, handler)
        if kept is None:
            del os.environ[variable]


def _start(function: Callable, *args) -> tuple[multiprocessing.Process, object]:
    # a server that has imported torch, and used nothing of it, forks a worker in milliseconds; elsewhere each
    # worker imports torch by itself
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, function, args), daemon=True)
    if sys.platform == "linux":
        context.set_forkserver_preload([__name__, "longattn"])
        # the server and its workers do not hear Ctrl-C: who started them stops them
        with _changed(HUGE_PAGES, "1", signal.SIGINT):
            forkserver.ensure_running()
    process.start()
    sender.close()
    return process, receiver


def _serve(sender, function: Callable, args: tuple) -> None:
    """Runs in the worker: sends what the generator yields, then how it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        for value in function(*args):
            sender.send(("value", value))
        sender.send(("end", None))
    except BrokenPipeError:
        pass
    except Exception as error:
        sender.send(("error", f"{type(error).__name__}: {error}".splitlines()[0]))


def _end_with_parent() -> None:
    """However the parent ends, or forgets this process, a worker does not outlive it."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def stream(function: Callable[..., Iterator], *args) -> Iterator:
    """Yields what the generator `function(*args)` yields in a fresh process; the process is gone when this ends.

    function must be importable by name. Raises WorkerError if it raises or the process dies. Close this generator when
    leaving early.
    """
    process, receiver = _start(function, *args)
    try:
        while True:
            try:
                kind, value = receiver.recv()
            except EOFError:
                process.join()
                killed = "was killed, perhaps for its memory" if process.exitcode == -signal.SIGKILL else "ended early"
                raise WorkerError(f"the worker process {killed} (exit code {process.exitcode})") from None
            if kind == "end":
                return
            if kind == "error":
                raise WorkerError(value)
            yield value
    finally:
        process.kill()
        process.join()
        receiver.close()


def call(function: Callable[..., Iterator], *args):
    """The one value that the generator `function(*args)` yields in a fresh process."""
    with contextlib.closing(stream(function, *args)) as values:
        return next(values)


# one measurement


class Cost(NamedTuple):
    """Median seconds of a call, bytes of its peak, and half the distance of the quartiles over the median."""

    seconds: float | None
    bytes: int | None
    spread: float | None


def sample(function: Callable[[], object], *, memory: bool = True, device: str = "cpu") -> Cost:
    """Of the first call if that is long, else when warm; memory is measured in calls of its own."""

    def once() -> float:
        start = time.perf_counter()
        # what it returns is kept until the clock is read
        kept = function()  # noqa: F841
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def measured() -> tuple[float, int | None]:
        if not memory:
            return once(), None
        with profile_memory(device=device, interval=None) as profile:
            seconds = once()
        return seconds, profile.peak

    seconds, peak = measured()
    if seconds > LONG_S:
        return Cost(seconds, peak, None)
    times: list[float] = []
    while len(times) < REPEATS[0] or (len(times) < REPEATS[1] and sum(times) < REPEAT_S):
        times.append(once())
    low, middle, high = statistics.quantiles(times, n=4)
    return Cost(middle, measured()[1] if memory else None, (high - low) / 2 / middle)


def available_memory() -> int:
    """Bytes that can be taken without swapping; where nobody knows, as many as there are addresses."""
    with contextlib.suppress(ImportError):
        import psutil

        return psutil.virtual_memory().available
    with contextlib.suppress(OSError), open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return 1 << 62
