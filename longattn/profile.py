"""Where the memory of a piece of code goes: how high it rises, when, and in which phase."""

from __future__ import annotations

import contextlib
import functools
import json
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ._memory import GAUGES, PeakMemory, resident
from .ops import _check

# beyond this many samples neighbours are joined, the higher of two stays
MOST_SAMPLES = 1 << 15
# allocations and frees that torch's recorder of CUDA memory keeps
MOST_EVENTS = 1_000_000
BACKWARD = "backward"


class Sample(NamedTuple):
    """Bytes beyond the start, so many seconds after it."""

    seconds: float
    bytes: int


class Phase(NamedTuple):
    """A named stretch, in seconds after the start of the profile; peak: bytes beyond that start, at its highest."""

    name: str
    start: float
    end: float
    peak: int


# backward passes, noticed wherever they are started from

_profiles: list[profile_memory] = []
_lock = threading.Lock()
_entries: dict[str, Callable] = {}


def _marked(entry: Callable) -> Callable:
    @functools.wraps(entry)
    def run(*args, **kwargs):
        with contextlib.ExitStack() as stack:
            for each in list(_profiles):
                if each._thread == threading.get_ident() and BACKWARD not in each._running:
                    stack.enter_context(each.phase(BACKWARD))
            return entry(*args, **kwargs)

    return run


def _begin(profile: profile_memory) -> None:
    with _lock:
        if not _profiles:
            for name in ("backward", "grad"):
                _entries[name] = getattr(torch.autograd, name)
                setattr(torch.autograd, name, _marked(_entries[name]))
        _profiles.append(profile)


def _end(profile: profile_memory) -> None:
    with _lock:
        _profiles.remove(profile)
        if not _profiles:
            for name, entry in _entries.items():
                setattr(torch.autograd, name, entry)


class profile_memory:
    """The memory of a piece of code: its peak and its course, and those of its phases.

        with longattn.profile_memory() as profile:
            with profile.phase("forward"):
                loss = model(x).sum()
            loss.backward()                       # is marked by itself, as is torch.autograd.grad
        print(profile.peak, profile.phases)
        profile.save_plot("step.png")

        step = longattn.profile_memory(step)      # or as a decorator: step.peak is that of the last call

    device: "cpu" is the resident memory of the process, sampled every `interval` seconds by a thread; "cuda" the memory
        of the current GPU that torch's allocator hands out, from its own record of every allocation. Default: "cuda"
        where torch has begun to use a GPU, else "cpu".
    interval: None leaves out samples and record, and with them the timeline. Peaks stay, and nothing is slowed down.

    peak: bytes above `baseline`, which is what there was at the start. timeline: Samples. phases: Phases, in the order
    in which they ended. seconds: how long it took. save_plot(path) draws them; save(path) writes them as JSON, or for
    "cuda" to a .pickle for https://pytorch.org/memory_viz.

    Resident memory counts what the process holds: also what its allocator keeps of freed blocks, what libraries take
    when they are first used, and what other threads do. Run the code once before for figures of the code alone.
    """

    def __init__(
        self, function: Callable | None = None, *, device: str | None = None, interval: float | None = 1e-3
    ) -> None:
        if function is not None and not callable(function):
            came = _check.describe(function)
            _check.fail("profile_memory", f"what is profiled must be callable or a with block, got {came}", TypeError)
        if device is None:
            device = "cuda" if torch.cuda.is_initialized() else "cpu"
        if device not in GAUGES:
            _check.fail("profile_memory", f"device must be one of {', '.join(GAUGES)}, got {device!r}")
        if device == "cuda" and not torch.cuda.is_available():
            _check.fail("profile_memory", "device='cuda' needs a GPU, and torch finds none; pass device='cpu'")
        if not (interval is None or (isinstance(interval, (int, float)) and interval > 0)):
            _check.fail("profile_memory", f"interval must be a positive number of seconds or None, got {interval!r}")
        self.function, self.device, self.interval = function, device, interval
        self._running: list[str] | None = None
        self._clear()
        if function is not None:
            functools.update_wrapper(self, function)

    def _clear(self) -> None:
        self.peak, self.baseline, self.seconds, self.snapshot = 0, 0, 0.0, None
        self.timeline: list[Sample] = []
        self.phases: list[Phase] = []

    # as a decorator

    def __call__(self, *args, **kwargs):
        if self.function is None:
            return profile_memory(*args, device=self.device, interval=self.interval)
        with self:
            return self.function(*args, **kwargs)

    def __get__(self, instance, owner=None):
        return self if instance is None else functools.partial(self, instance)

    # as a with block

    def __enter__(self) -> profile_memory:
        if self._running is not None:
            raise RuntimeError("profile_memory: this profile is running already; make another for what is inside")
        self._clear()
        self._running, self._thread, self._stop = [], threading.get_ident(), threading.Event()
        self._whole = PeakMemory(self.device).__enter__()
        self.baseline = self._whole.start
        self._began, self._began_us = time.perf_counter(), time.time_ns() / 1e3
        self._sampler = None
        if self.device == "cuda" and self.interval is not None:
            torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)
        elif self.interval is not None:
            self._note()
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        _begin(self)
        return self

    def __exit__(self, *error) -> None:
        _end(self)
        self._stop.set()
        if self._sampler is not None:
            self._sampler.join()
            self._note()
        self._whole.__exit__()
        self.seconds, self.peak, self._running = self._elapsed(), self._whole.bytes, None
        if self.device == "cuda" and self.interval is not None:
            self.snapshot = torch.cuda.memory._snapshot()
            torch.cuda.memory._record_memory_history(enabled=None)
            events = self.snapshot["device_traces"][torch.cuda.current_device()]
            self.timeline = course(events, self._began_us)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Marks what runs inside; phases may nest and come again."""
        if self._running is None:
            raise RuntimeError(f"profile_memory: phase({name!r}) is for inside of the with block")
        self._running.append(name)
        start = self._elapsed()
        try:
            with PeakMemory(self.device) as peak:
                self._note()
                yield
        finally:
            self._note()
            self._running.remove(name)
            self.phases.append(Phase(name, start, self._elapsed(), peak.bytes + peak.start - self.baseline))

    def _elapsed(self) -> float:
        return time.perf_counter() - self._began

    def _note(self) -> None:
        if self.device == "cpu" and self.interval is not None:
            with _lock:
                self.timeline.append(Sample(self._elapsed(), resident() - self.baseline))

    def _sample(self) -> None:
        interval = self.interval
        while not self._stop.wait(interval):
            self._note()
            if len(self.timeline) > MOST_SAMPLES:
                with _lock:
                    self.timeline = thinned(self.timeline)
                interval *= 2

    # what is kept

    def document(self) -> dict:
        """All of it, for JSON."""
        return {
            "device": self.device,
            "baseline_bytes": self.baseline,
            "peak_bytes": self.peak,
            "seconds": self.seconds,
            "phases": [phase._asdict() for phase in self.phases],
            "timeline": {"seconds": [x.seconds for x in self.timeline], "bytes": [x.bytes for x in self.timeline]},
        }

    def save(self, path) -> None:
        """Writes a .json, or for "cuda" a .pickle for memory_viz. Raises ValueError in a sentence for other names."""
        path = Path(path)
        if path.suffix == ".json":
            path.write_text(json.dumps(self.document()) + "\n")
        elif path.suffix == ".pickle" and self.snapshot is not None:
            path.write_bytes(pickle.dumps(self.snapshot))
        else:
            kinds = ".json" if self.snapshot is None else ".json, or .pickle for memory_viz"
            why = " (.pickle holds the record of a GPU)" if path.suffix == ".pickle" else ""
            _check.fail("profile_memory", f"save(path) writes {kinds}, got {str(path)!r}{why}")

    def save_plot(self, path) -> None:
        """Draws memory against time, with the phases: .png, .pdf, .svg. Needs matplotlib."""
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import EngFormatter
        except ImportError:
            raise ImportError("profile_memory: save_plot needs matplotlib; pip install matplotlib") from None
        figure = Figure(figsize=(9, 4), dpi=140, layout="constrained")
        axis = figure.subplots()
        axis.fill_between(*zip(*self.timeline or [Sample(0, 0)], strict=True), color="#0b6fb8", alpha=0.25, lw=0)
        axis.plot(*zip(*self.timeline or [Sample(0, 0)], strict=True), color="#0b6fb8", lw=1.2)
        names = list(dict.fromkeys(phase.name for phase in self.phases))
        for phase in self.phases:
            color = ("#d1495b", "#2a9d6f", "#b07c10", "#7a4fb0")[names.index(phase.name) % 4]
            axis.axvspan(phase.start, phase.end, color=color, alpha=0.12, lw=0)
            axis.hlines(phase.peak, phase.start, phase.end, color=color, lw=1.5)
            middle = (phase.start + phase.end) / 2
            label = f"{phase.name}\n{EngFormatter('B', places=1)(phase.peak)}"
            axis.annotate(label, (middle, phase.peak), ha="center", va="bottom", fontsize=9, color=color)
        axis.axhline(self.peak, color="#222222", ls="--", lw=1)
        what = "resident memory" if self.device == "cpu" else "memory of the GPU"
        axis.set_title(
            f"{what} above the start, peak {EngFormatter('B', places=1)(self.peak)}", loc="left", fontsize=11
        )
        axis.set(xlabel="time", xlim=(0, self.seconds or None), ylim=(None, 1.18 * self.peak or None))
        axis.xaxis.set_major_formatter(EngFormatter("s"))
        axis.yaxis.set_major_formatter(EngFormatter("B"))
        axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(path)


def thinned(samples: list[Sample]) -> list[Sample]:
    """Of each two neighbours the higher one."""
    return [max(samples[i : i + 2], key=lambda sample: sample.bytes) for i in range(0, len(samples), 2)]


def course(events: list[dict], began_us: float) -> list[Sample]:
    """The timeline of torch's record of a GPU's allocations, in bytes beyond its start."""
    held, found = 0, [Sample(0.0, 0)]
    signs = {"alloc": 1, "free_completed": -1}
    for event in events:
        if event["action"] in signs:
            held += signs[event["action"]] * event["size"]
            found.append(Sample(max(0.0, (event["time_us"] - began_us) / 1e6), held))
    return found
