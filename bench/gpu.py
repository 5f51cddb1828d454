"""Run on a machine with an NVIDIA GPU (`make gpu`): the GPU tests, then times against exact attention and the floor.

    python bench/gpu.py [--minutes 8] [--no-tests] [--output FILE]

1. Gate: `pytest tests -m gpu`, then the shapes measured here against the float64 reference. If anything is red, nothing
   is timed and the exit code is 1. Without a GPU: one sentence and exit code 2.
2. Linear attention in Triton, 1k to 1M tokens, 16 heads, D = E = 64, raw features M = 256 and FAVOR+ of 256 features,
   forward and backward, beside torch's causal SDPA; the decode step in CUDA C++; floors from this GPU's own copy and
   matmul rates.
3. The tile engine in Triton at the same lengths: LSH of 4 rounds and of 1, its hash and its sort, and exact attention.
4. Relative positions: prefix, tiles and FFT beside exact attention with the same bias, and where they cross.
What does not fit into the minutes or the memory is listed as not run. One JSON goes to bench/results/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import _floors  # noqa: E402
import _gpu_lsh  # noqa: E402
import _gpu_toeplitz  # noqa: E402
import _measure  # noqa: E402
from _contenders import Case, directed, linear, make_inputs  # noqa: E402

from longattn._memory import peak_of  # noqa: E402

HEADS = 16
# most telling first: the minutes may run out
LENGTHS = (65536, 1048576, 16384, 262144, 4096, 1024)
# one call of exact attention above this many seconds is left out, above a tenth of it is timed once
LONGEST = 4.0
FLASH = "torch SDPA, flash"
CUDNN = "torch SDPA, cuDNN"
EFFICIENT = "torch SDPA, efficient"
BACKENDS = {
    FLASH: (SDPBackend.FLASH_ATTENTION, ("bfloat16", "float16")),
    CUDNN: (SDPBackend.CUDNN_ATTENTION, ("bfloat16", "float16")),
    EFFICIENT: (SDPBackend.EFFICIENT_ATTENTION, ("float32",)),
}


# the gate


def run_tests(seconds: float) -> str | None:
    """None if the GPU tests pass, else a sentence."""
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    try:
        code = subprocess.run(command, cwd=HERE.parent, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return f"the GPU tests took longer than {seconds:.0f} s"
    return None if code == 0 else f"the GPU tests ended with exit code {code}"


def check_shapes() -> str | None:
    """None if Triton and the decode step agree with the float64 reference at the shapes measured here."""
    from longattn.testing.assertions import check_linear
    from longattn.testing.cases import FavorCase, LinearCase

    for (D, feature), dtype in itertools.product(((64, "elu"), (256, "identity")), (torch.bfloat16, torch.float32)):
        name = f"bench {feature}"
        cases = [LinearCase(name, B=1, H=4, L=1500, D=D, E=64, feature=feature, is_causal=True, normalize=D == 64)]
        if feature == "elu":
            favor = FavorCase(n_features=256, spread=0.5)
            cases.append(LinearCase("bench favor", B=1, H=4, L=1500, D=64, E=64, is_causal=True, favor=favor))
        for case in cases:
            try:
                check_linear(case, dtype, "triton", "cuda")
            except AssertionError as error:
                return str(error)
    return _gpu_lsh.check() or _gpu_toeplitz.check() or check_decode()


def check_decode(steps: int = 32) -> str | None:
    from longattn import LinearState, linear_attention, linear_attention_with_state, native

    if native.missing_cuda():
        return None
    q, k, v = torch.randn(3, 2, 4, steps, 64, generator=torch.Generator().manual_seed(0)).unbind()
    expected = linear_attention(q.double(), k.double(), v.double(), is_causal=True, impl="reference")
    state, outputs = LinearState.zeros(2, 4, 64, 64, device="cuda"), []
    for t in range(steps):
        token = [x[:, :, t : t + 1].cuda() for x in (q, k, v)]
        out, state = linear_attention_with_state(*token, state=state, is_causal=True, impl="cuda")
        outputs.append(out.cpu())
    error = (torch.cat(outputs, 2) - expected).abs().max().item()
    return None if error < 1e-5 else f"the CUDA decode step is off by {error:.1e} after {steps} tokens"


# measuring


def interleave(calls: dict[str, Callable], seconds: float, rounds: tuple[int, int]) -> dict[str, list[float]]:
    """Seconds of every call between two events, in turns, each after the L2 cache was flushed; launches included."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    for call in calls.values() if rounds[1] > 1 else ():
        call()
    times, began = {name: [] for name in calls}, time.perf_counter()
    for done in range(rounds[1]):
        if done >= rounds[0] and time.perf_counter() - began > seconds:
            break
        for name, call in calls.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times[name].append(1e-3 * start.elapsed_time(stop))
    return times


def probe() -> dict:
    """Copy bandwidth (read plus write) and matmul rates of this GPU."""
    source, target = torch.empty(2, 1 << 29, device="cuda").unbind()
    a, b = torch.randn(2, 8192, 8192, device="cuda").unbind()
    low = a.bfloat16(), b.bfloat16()
    seconds = interleave({"copy": lambda: target.copy_(source), "bf16": lambda: low[0] @ low[1]}, 1, (10, 20))
    # restored below: the rate of float32 rows' floor is the fastest unit that takes float32
    before = torch.get_float32_matmul_precision()
    for name, precision in (("ieee", "highest"), ("tf32", "high")):
        torch.set_float32_matmul_precision(precision)
        seconds |= interleave({name: lambda: a @ b}, 1, (3, 10))
    torch.set_float32_matmul_precision(before)
    flops = {f"{name}_tflops": 2 * 8192**3 / min(seconds[name]) / 1e12 for name in ("bf16", "tf32", "ieee")}
    return {"copy_gb_s": 2 * 4 * (1 << 29) / min(seconds["copy"]) / 1e9, **flops}


def rates(probed: dict, dtype: str) -> _floors.Rates:
    tflops = probed["tf32_tflops" if dtype == "float32" else "bf16_tflops"]
    return _floors.Rates(1e12 * tflops, 1e9 * probed["copy_gb_s"])


def exact(name: str):
    backend, _ = BACKENDS[name]

    def attention(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attention


def whole(case: Case) -> Case:
    """What memory is counted over: a backward pass together with the forward pass that it needs."""
    return case if case.direction == "forward" else case._replace(direction="forward+backward")


class Measurement:
    """The rows so far, and what of exact attention is still affordable."""

    def __init__(self, probed: dict, deadline: float):
        self.probed, self.deadline, self.rows, self.seconds = probed, deadline, [], {}

    def predicted(self, name: str, case, power: float = 2) -> float:
        """Seconds from the longest shorter length measured; exact attention grows with the square."""
        key = (name, case.dtype, case.direction)
        known = [(n, seconds) for (*of, n), seconds in self.seconds.items() if tuple(of) == key and n <= case.n]
        if not known:
            # a safe guess at 65,536 tokens and 16 heads
            guess = (0.1 if case.dtype == "bfloat16" else 1.0) * (1 if case.direction == "forward" else 3)
            return guess * (case.n / 65536) ** power
        n, seconds = max(known)
        return seconds * (case.n / n) ** power

    def skip(self, name: str, case: Case, why: str) -> None:
        self.rows.append({"contender": name, **case._asdict(), "skipped": why})

    def measure(self, case: Case) -> None:
        if time.perf_counter() > self.deadline:
            return self.skip("longattn", case, "not run: out of time")
        need = _floors.output_bytes(case.shape, "forward+backward") * 2.6
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        if need > 0.9 * free:
            why = f"not run: needs about {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
            return self.skip("longattn", case, why)
        self.own(case)
        if case.feature == "elu":
            for name, (_, dtypes) in BACKENDS.items():
                if case.dtype in dtypes:
                    self.opponent(name, case)
        torch.cuda.empty_cache()
        return None

    def record(
        self, name: str, case, times: list[float], peak: int | None, floor: float | None = None, key: str | None = None
    ) -> None:
        """floor: seconds, where it is not that of `_floors.floor`. key: what predictions go by, if not the name."""
        self.seconds[key or name, case.dtype, case.direction, case.n] = statistics.median(times)
        row = {"contender": name, **case._asdict(), **_measure.summary(times)}
        if peak is not None:
            row["peak_mb"] = peak / 1e6
        floor = _floors.floor(case.shape, case.direction, rates(self.probed, case.dtype)) if floor is None else floor
        row["floor_ms"] = 1e3 * floor
        if case.direction not in _gpu_lsh.PARTS:
            row["floor_mb"] = _floors.output_bytes(case.shape, whole(case).direction) / 1e6
        self.rows.append(row)

    def own(self, case: Case) -> None:
        inputs, function = make_inputs(case, "cuda"), linear(case)
        times = interleave({"longattn": directed(case, function, *inputs)}, 1.0, (5, 30))["longattn"]
        self.record("longattn", case, times, peak_of(directed(whole(case), function, *inputs), "cuda"))

    def tiles(self, n: int) -> None:
        """LSH, its parts and exact attention on the tile engine; forward with backward also of torch's attention."""
        for case in _gpu_lsh.cases(n, HEADS):
            name, slow = _gpu_lsh.name_of(case), False
            if time.perf_counter() > self.deadline:
                self.skip(name, case, "not run: out of time")
                continue
            if not case.n_hashes:
                predicted = self.predicted(name, case)
                slow = predicted > LONGEST / 10
                if predicted > LONGEST or time.perf_counter() + 2 * predicted > self.deadline:
                    self.skip(name, case, f"not run: about {predicted:.1f} s by growth with the square of the length")
                    continue
            call, whole_call = _gpu_lsh.call_of(case, "cuda"), case.direction not in _gpu_lsh.PARTS
            times = interleave({name: call}, 0.5 if slow else 1.0, (1, 1) if slow else (5, 30))[name]
            peak = peak_of(call, "cuda") if whole_call and not slow else None
            self.record(name, case, times, peak, _gpu_lsh.floor(case, rates(self.probed, case.dtype)))
            del call
            torch.cuda.empty_cache()
        both = Case(n, H=HEADS, dtype="bfloat16", direction="forward+backward")
        for name in (FLASH, CUDNN):
            if time.perf_counter() < self.deadline:
                self.opponent(name, both)

    def relative(self, n: int) -> None:
        """Relative positions by every method, and exact attention with the same bias."""
        own = [(_gpu_toeplitz.NAME, case) for case in _gpu_toeplitz.cases(n, HEADS)]
        for name, case in own + _gpu_toeplitz.opponents(n, HEADS):
            # methods and widths have times of their own
            key = name if name != _gpu_toeplitz.NAME else f"{name} {case.method} {case.D}"
            predicted = self.predicted(key, case, _gpu_toeplitz.growth(case.method))
            need, free = _gpu_toeplitz.bytes_of(name, case), torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
            if time.perf_counter() > self.deadline:
                self.skip(name, case, "not run: out of time")
            elif predicted > LONGEST or time.perf_counter() + 2 * predicted > self.deadline:
                self.skip(name, case, f"not run: about {predicted:.1f} s by growth with the length")
            elif need > 0.9 * free:
                self.skip(name, case, f"not run: needs about {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
            else:
                slow = predicted > LONGEST / 10
                try:
                    call = _gpu_toeplitz.build(name, case, "cuda")
                    times = interleave({name: call}, 0.5 if slow else 1.0, (1, 1) if slow else (5, 30))[name]
                except RuntimeError as error:
                    # a kernel that torch does not have for this GPU says so in an exception
                    self.skip(name, case, f"not run: {str(error).splitlines()[0]}")
                    continue
                peak = None if slow else peak_of(call, "cuda")
                self.record(name, case, times, peak, key=key)
                del call
                torch.cuda.empty_cache()

    def opponent(self, name: str, case: Case) -> None:
        predicted = self.predicted(name, case)
        if predicted > LONGEST or time.perf_counter() + 2 * predicted > self.deadline:
            return self.skip(name, case, f"not run: about {predicted:.1f} s by growth with the square of the length")
        inputs, function, slow = make_inputs(case, "cuda"), exact(name), predicted > LONGEST / 10
        try:
            times = interleave({name: directed(case, function, *inputs)}, 0.5, (1, 1) if slow else (3, 20))[name]
        except RuntimeError as error:
            # a backend that this GPU, torch or shape lacks says so in an exception
            return self.skip(name, case, f"not run: {str(error).splitlines()[0]}")
        peak = None if slow else peak_of(directed(whole(case), function, *inputs), "cuda")
        self.record(name, case, times, peak)
        return None


def decode(probed: dict) -> list[dict]:
    """One token with a state: microseconds from Python, and of the GPU alone by replaying a CUDA graph of 100 steps."""
    from longattn import LinearState, linear_attention_with_state, native

    rows = []
    for B, dtype in itertools.product((8, 256), ("float32", "bfloat16")):
        case = Case(1, B=B, H=HEADS, dtype=dtype, impl="cuda")
        row = {"contender": "longattn", **case._asdict(), "direction": "decode"}
        if native.missing_cuda():
            rows.append({**row, "skipped": f"not run: {native.missing_cuda()}"})
            continue
        q, k, v = (x.cuda() for x in make_inputs(case)[:3])
        state = LinearState(torch.rand(B, HEADS, 64, 64, device="cuda"), torch.rand(B, HEADS, 64, device="cuda"))

        @torch.no_grad()
        def steps(count, token=(q, k, v), state=state):
            for _ in range(count):
                _, state = linear_attention_with_state(*token, state=state, is_causal=True, impl="cuda")

        steps(10)
        taken = []
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            steps(200)
            torch.cuda.synchronize()
            taken.append((time.perf_counter() - start) / 200)
        row |= _measure.summary(taken)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            steps(100)
        alone = [s / 100 for s in interleave({"graph": graph.replay}, 1, (5, 20))["graph"]]
        row |= {"gpu_us": 1e6 * statistics.median(alone)}
        row["floor_ms"] = 1e3 * _floors.decode_floor(case.shape, rates(probed, dtype))
        rows.append(row)
    return rows


# reporting


def opponent_of(row: dict, rows: list[dict]) -> dict | None:
    """The fastest exact attention of the same length, heads, dtype and direction; head dim 64 also for raw features."""
    same = [
        other
        for other in rows
        if not other["contender"].startswith("longattn")
        and "median_ms" in other
        and all(other[key] == row[key] for key in ("n", "B", "H", "dtype", "direction"))
    ]
    return min(same, key=lambda other: other["median_ms"], default=None)


def table(rows: list[dict]) -> list[list[str]]:
    """Cells of one line for each of our rows, header first."""
    header = "what,dtype,direction,n,ours ms,floor ms,x floor,exact ms,speed-up,peak MB of results"
    lines = [header.split(",")]
    own = [row for row in rows if row["contender"].startswith("longattn") and row["direction"] != "decode"]

    def order(row: dict) -> tuple:
        what = (row["contender"], row["D"], row.get("feature", ""), row.get("method", ""), row.get("n_hashes", 0))
        return *what, row["dtype"], row["direction"] != "forward", row["direction"], row["n"]

    for row in sorted(own, key=order):
        if row["contender"] == _gpu_toeplitz.NAME:
            what = _gpu_toeplitz.label(row)
        elif "feature" in row:
            what = f"{row['feature']} M={row['n_features'] or row['D']}"
        else:
            what = f"LSH R={row['n_hashes']}" if row["n_hashes"] else "exact"
        line = [what, row["dtype"], row["direction"], f"{row['n']:,}"]
        if "skipped" in row:
            lines.append([*line, *[""] * 5, row["skipped"]])
            continue
        other = opponent_of(row, rows)
        line += [f"{row['median_ms']:.3f}", f"{row['floor_ms']:.3f}", f"{row['median_ms'] / row['floor_ms']:.1f}"]
        line += [f"{other['median_ms']:.3f}", f"{other['median_ms'] / row['median_ms']:.1f}x"] if other else ["-", "-"]
        lines.append([*line, f"{row['peak_mb']:.0f} of {row['floor_mb']:.0f}" if "peak_mb" in row else "-"])
    return lines


def show(rows: list[dict], probed: dict) -> None:
    lines = table(rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    for *line, last in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), last, sep="  ")
    print(", ".join(f"{name} {value:.0f}" for name, value in probed.items()))
    for row in rows:
        if row["direction"] == "decode":
            what = f"decode step, B={row['B']}, H={row['H']}, {row['dtype']}"
            floor = f"floor {1e3 * row['floor_ms']:.1f} us" if "floor_ms" in row else ""
            times = f"{1e3 * row['median_ms']:.1f} us from Python, {row['gpu_us']:.1f} us on the GPU" if floor else ""
            print(f"{what}: {row.get('skipped') or f'{times}, {floor}'}")
        elif "skipped" in row and not row["contender"].startswith("longattn"):
            print(f"{row['contender']}, n={row['n']:,}, {row['dtype']}, {row['direction']}: {row['skipped']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for tests and benchmarks together")
    parser.add_argument("--no-tests", action="store_true", help="skip pytest; the shapes measured are still checked")
    parser.add_argument("--output", type=Path, help="JSON file; default bench/results/linear-gpu-...")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu: torch sees no NVIDIA GPU here; run this on a machine that has one", file=sys.stderr)
        return 2
    began = time.perf_counter()
    red = None if options.no_tests else run_tests(0.6 * 60 * options.minutes)
    red = red or check_shapes()
    if red:
        print(f"gpu: no times, because results are wrong: {red}", file=sys.stderr)
        return 1
    probed = probe()
    measurement = Measurement(probed, began + 60 * options.minutes - 20)
    measurement.rows += decode(probed)
    maps = (
        Case(0, H=HEADS, impl="triton"),
        Case(0, H=HEADS, impl="triton", D=256, feature="raw", normalize=False),
        Case(0, H=HEADS, impl="triton", feature="favor-positive", n_features=256),
    )
    for n in LENGTHS:
        for case, dtype, direction in itertools.product(maps, ("bfloat16", "float32"), ("forward", "backward")):
            measurement.measure(case._replace(n=n, dtype=dtype, direction=direction))
        measurement.tiles(n)
        measurement.relative(n)
    show(measurement.rows, probed)
    crossovers = _gpu_toeplitz.crossovers(measurement.rows)
    for found in crossovers:
        at = "at no length measured" if found["from_n"] is None else f"from {found['from_n']:,} tokens"
        print(f"{found['faster']} is faster than {found['than']} {at}, {found['direction']}")
    properties = torch.cuda.get_device_properties(0)
    device = {"name": properties.name, "memory_gb": properties.total_memory / 1e9, "cuda": torch.version.cuda}
    report = {"schema": 1, "device": device, "machine": _measure.machine(), "versions": _measure.versions()}
    report |= {"settings": _measure.settings(), "probe": probed, "rows": measurement.rows, "crossovers": crossovers}
    report["seconds"] = time.perf_counter() - began
    name = "-".join(properties.name.lower().split())
    output = options.output or HERE / "results" / f"linear-gpu-{name}-{time.strftime('%Y%m%d')}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {output}, {report['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
