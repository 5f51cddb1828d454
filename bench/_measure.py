"""How things are measured: interleaved times, peak memory in a fresh process, the machine and what it can do."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from _floors import Rates

from longattn import native

HERE = Path(__file__).resolve().parent
PEERS = (
    "pytorch-fast-transformers", "performer-pytorch", "linear-attention-transformer",
    "transformers", "reformer-pytorch",
)  # fmt: skip
PACKAGES = ("longattn", "torch", "triton", *PEERS)

# large blocks come from the system and go back when freed: the peak is what is alive, not what glibc's heap keeps
PEAK_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "262144"}
# OpenMP's idle threads spin for some milliseconds after a region; a pause lets them sleep before somebody else's turn
PAUSE = 0.02


def interleave(
    contenders: dict[str, Callable[[], object]], seconds: float, rounds: tuple[int, int] = (3, 50)
) -> dict[str, list[float]]:
    """Seconds of each call, taken in turns: what slows the machine down for a while hits all alike.

    One warm-up call each, then rounds until `seconds` are spent, at least rounds[0] and at most rounds[1].
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    began = time.perf_counter()
    for done in range(rounds[1]):
        if done >= rounds[0] and time.perf_counter() - began > seconds:
            break
        for name, call in contenders.items():
            gc.collect()
            time.sleep(PAUSE)
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def summary(times: list[float]) -> dict:
    return {
        "median_ms": 1e3 * statistics.median(times),
        "min_ms": 1e3 * min(times),
        "max_ms": 1e3 * max(times),
        "rounds": len(times),
    }


@contextlib.contextmanager
def others() -> Iterator[dict]:
    """Yields a dict that afterwards holds how many cores other processes kept busy meanwhile."""

    def busy() -> float:
        spent, own = psutil.cpu_times(), psutil.Process().cpu_times()
        # guest time is inside user time on Linux, idle and iowait are not work
        total = sum(getattr(spent, field, 0.0) for field in ("user", "nice", "system", "irq", "softirq", "steal"))
        return total - own.user - own.system

    result: dict = {}
    wall, before = time.perf_counter(), busy()
    yield result
    result["others_cores"] = round(max(0.0, busy() - before) / (time.perf_counter() - wall), 2)


# peak memory


def fresh_peak(
    contender: str, case: dict, threads: int, timeout: float = 900, device: str = "cpu", module: str = "_contenders"
) -> dict:
    """`longattn._memory.peak_of` in a process of its own (`_peak.py`): {"peak_mb": ...}, or {"peak_skipped": why}."""
    environment = {**os.environ, **PEAK_ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    environment.pop("THP_MEM_ALLOC_ENABLE", None)
    job = json.dumps({"module": module, "contender": contender, "case": case, "device": device})
    command = [sys.executable, str(HERE / "_peak.py"), job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"peak_skipped": f"took longer than {timeout:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"peak_skipped": lines[-1] if lines else f"exit code {done.returncode}"}
    return {"peak_mb": json.loads(done.stdout.splitlines()[-1])["peak_bytes"] / 1e6}


# the machine


def cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return set(next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), []))


def machine() -> dict:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd")
    thp = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "family_model": f"{fields.get('cpu family', '?')}/{fields.get('model', '?')}",
        "flags": [flag for flag in wanted if flag in cpu_flags()],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "longattn_isa": native.extension().isa() if native.missing() is None else None,
        "transparent_hugepages": thp.read_text().strip() if thp.exists() else "unknown",
    }


def versions() -> dict:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def settings() -> dict:
    malloc = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "thp_mem_alloc_enable": os.environ.get("THP_MEM_ALLOC_ENABLE", "unset"),
        "malloc": malloc or "glibc's defaults",
        "peak_memory": {"how": "growth of the resident set during one call, fresh process", **PEAK_ENVIRONMENT},
        "load_average": os.getloadavg()[0],
    }


def probe(threads: int) -> dict:
    """What the machine allows: float32 register tiles, copying, first touch of fresh memory; torch.mm for context."""
    a, b = torch.rand(2, 2048, 2048).unbind()
    source, target = torch.rand(2, 1 << 26).unbind()
    times = interleave(
        {
            "mm": lambda: torch.mm(a, b),
            "copy": lambda: target.copy_(source),
            "touch": lambda: torch.zeros(1 << 26).fill_(0),
        },
        seconds=2,
        rounds=(5, 20),
    )
    best = {name: min(taken) for name, taken in times.items()}
    tiles = tile_gflops(threads)
    return {
        "tile_gflops": tiles[0],
        "tile_source": tiles[1],
        "own_tile_gflops_one_thread": native.extension().peak_gflops() if native.missing() is None else None,
        "mm_gflops": 2 * 2048**3 / best["mm"] / 1e9,
        "copy_gb_s": 2 * 4 * (1 << 26) / best["copy"] / 1e9,
        "first_touch_gb_s": 4 * (1 << 26) / best["touch"] / 1e9,
    }


def rates(probed: dict) -> Rates:
    return Rates(probed["tile_gflops"] * 1e9, probed["copy_gb_s"] * 1e9)


def tile_gflops(threads: int) -> tuple[float, str]:
    """(GFLOP/s of all threads together, how it was found): probe.cpp on every core at once, or an estimate."""
    compiler = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is not None:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, "probe.so")
            command = [compiler, "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", str(HERE / "probe.cpp")]
            done = subprocess.run([*command, "-o", str(library)], capture_output=True)
            if done.returncode == 0:
                return _tile_gflops(library, threads), f"measured: probe.cpp, {threads} threads at once"
    wide = {"avx512f": 64, "avx2": 32, "asimd": 16}
    per_cycle = next((flops for flag, flops in wide.items() if flag in cpu_flags()), 8)
    clock = psutil.cpu_freq()
    ghz = (clock.max or clock.current) / 1e3 if clock else 3.0
    formula = f"{threads} threads x {ghz:.1f} GHz x {per_cycle}"
    return threads * per_cycle * ghz, f"estimated, not measured, no C++ compiler works: {formula}"


def _tile_gflops(library: Path, threads: int) -> float:
    run = ctypes.CDLL(str(library)).tile_flops
    run.restype, run.argtypes = ctypes.c_double, [ctypes.c_int]
    found = [0.0] * threads

    # a call through ctypes lets go of the interpreter lock
    def work(index: int) -> None:
        found[index] = run(200)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(found) / 1e9
