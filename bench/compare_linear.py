"""Linear attention against other packages and torch's exact attention: one process, interleaved, same inputs.

    python bench/compare_linear.py --quick                 everything once, a few minutes
    python bench/compare_linear.py --output results/x.json the whole, quiet machine please

Prints tables of ours, theirs, ratio (theirs / ours) and the hardware's floor, and writes one JSON. It asserts no time;
it ends with exit code 1, before any timing, if a package that computes our function disagrees with us.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

PARTS = ("table", "dtypes", "long", "decode", "sweep")
# errors of float32 sums in another order; a wrong mask or map is far above
AGREEMENT = 1e-4
PEERS = ("fast-transformers", "linear-attention-transformer", "performer-pytorch + C++ product", "performer-pytorch")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter runs and lengths; to see that everything works")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=None, help="default: all but sweep if --quick")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, help="JSON file; default bench/results/linear-cpu-...; none if --quick")
    parser.add_argument("--no-peak", action="store_true", help="leave out the memory runs in fresh processes")
    parser.add_argument("--no-thp", action="store_true", help="leave out the second run with THP_MEM_ALLOC_ENABLE=1")
    parser.add_argument("--rows-to", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.parts = options.parts or [part for part in PARTS if part != "sweep" or not options.quick]
    return options


def check_agreement(names: list[str]) -> None:
    """Ends the program if any package that computes our function differs from the float64 reference."""
    import _contenders
    import torch

    wrong = []
    for feature, D, normalize in (("elu", 64, True), ("raw", 256, False), ("raw", 256, True)):
        case = _contenders.Case(320, H=1, D=D, feature=feature, normalize=normalize, direction="forward+backward")
        inputs = _contenders.make_inputs(case)
        exact = type(inputs)(*(x.double() for x in inputs))
        expected = _contenders.build("longattn", case._replace(impl="reference", dtype="float64"), exact)()
        for name in names:
            if not _contenders.CONTENDERS[name].same or (name.startswith("performer") and not normalize):
                continue
            results = _contenders.build(name, case, inputs)()
            if name == "fast-transformers" and normalize:
                results = [x.transpose(1, 2) for x in results]
            for what, x, y in zip(("output", "dq", "dk", "dv"), results, expected, strict=True):
                error = ((x.double() - y).abs().max() / y.abs().max()).item()
                if not error < AGREEMENT or not torch.isfinite(x).all():
                    wrong.append(f"{name}, {feature} D={D} normalize={normalize}: {what} is off by {error:.1e}")
    if wrong:
        sys.exit("compare_linear: no times, because results differ from the reference:\n  " + "\n  ".join(wrong))


class Run:
    """The rows measured so far and how they are measured."""

    def __init__(self, options: argparse.Namespace, probed: dict):
        import _contenders
        import _measure

        self.options, self.probed, self.rates, self.rows = options, probed, _measure.rates(probed), []
        self.missing = {name: _contenders.missing(name) for name in _contenders.CONTENDERS}
        self.available = [name for name, reason in self.missing.items() if reason is None]

    @property
    def thp(self) -> bool:
        return os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"

    def group(self, title: str, case, names, *, seconds: float, rounds=(3, 30), peak=True) -> list[dict]:
        """Measures the contenders of one case in turns and adds their rows."""
        import _contenders
        import _floors
        import _measure

        names = [name for name in names if name in self.available]
        inputs = _contenders.make_inputs(case)
        calls = {name: _contenders.build(name, case, inputs) for name in names}
        with _measure.others() as busy:
            times = _measure.interleave(calls, seconds, rounds)
        del calls, inputs
        added = []
        for name in names:
            row = {"group": title, "contender": name, **case._asdict(), "thp": self.thp, **busy}
            row |= _measure.summary(times[name])
            row |= {"ratio": row["median_ms"] / _measure.summary(times[names[0]])["median_ms"]}
            row["floor_ms"] = 1e3 * _floors.floor(case.shape, case.direction, self.rates)
            row["floor_mb"] = _floors.output_bytes(case.shape, case.direction) / 1e6
            if peak and not self.options.no_peak and not self.thp:
                row |= _measure.fresh_peak(name, case._asdict(), self.options.threads)
            added.append(row)
        self.rows += added
        return added


def table_part(run: Run) -> None:
    from _contenders import Case

    quick = run.options.quick
    seconds, rounds = (2, (2, 5)) if quick else (20, (5, 30))
    for direction in ("forward", "forward+backward"):
        for D, feature, normalize, peers in (
            (64, "elu", True, PEERS[:3]),
            (256, "raw", False, PEERS[:1]),
            (256, "raw", True, (PEERS[0], PEERS[2])),
        ):
            case = Case(16384, D=D, feature=feature, normalize=normalize, direction=direction)
            title = f"{feature} M={D}{'' if normalize else ', not normalised'}, n=16384"
            run.group(title, case, ["longattn", *peers], seconds=seconds, rounds=rounds)
        # far slower than the others: few rounds of their own, next to ours again
        n = 4096 if quick else 16384
        for name, why in (("torch SDPA", "exact attention"), (PEERS[3], "performer-pytorch as installed")):
            case, title = Case(n, direction=direction), f"elu M=64, n={n}, {why}"
            run.group(title, case, ["longattn", name], seconds=0, rounds=(2, 2) if quick else (3, 3))


def dtypes_part(run: Run) -> None:
    """Other dtypes against our own float32, in turns."""
    import _contenders
    import _floors
    import _measure

    for n in (16384,):
        cases = {dtype: _contenders.Case(n, dtype=dtype) for dtype in ("float32", "bfloat16", "float16")}
        calls = {dtype: _contenders.build("longattn", case) for dtype, case in cases.items()}
        with _measure.others() as busy:
            times = _measure.interleave(calls, 3 if run.options.quick else 15, (5, 60))
        for dtype, case in cases.items():
            row = {"group": f"dtypes, elu M=64, n={n}", "contender": "longattn", **case._asdict(), "thp": run.thp}
            row |= busy
            row |= _measure.summary(times[dtype])
            row["ratio"] = row["median_ms"] / _measure.summary(times["float32"])["median_ms"]
            row["floor_ms"] = 1e3 * _floors.floor(case.shape, "forward", run.rates)
            row["floor_mb"] = _floors.output_bytes(case.shape, "forward") / 1e6
            if not run.options.no_peak and not run.thp:
                row |= _measure.fresh_peak("longattn", case._asdict(), run.options.threads)
            run.rows.append(row)


def long_part(run: Run) -> None:
    """Time per token from 65,536 to 1,048,576 tokens; as many heads as the memory holds, the same for all lengths."""
    import _contenders
    import psutil

    lengths = (16384, 65536, 262144) if run.options.quick else (65536, 262144, 1048576)
    for direction, tensors in (("forward", 5), ("forward+backward", 9)):
        longest = tensors * lengths[-1] * 64 * 4
        H = max(h for h in (1, 2, 4, 8) if h == 1 or h * longest < 0.6 * psutil.virtual_memory().available)
        if run.options.quick:
            H = min(H, 2)
        for n in lengths:
            case = _contenders.Case(n, H=H, direction=direction)
            title = f"time per token, elu M=64, H={H}"
            for row in run.group(title, case, ["longattn"], seconds=5, rounds=(3, 20), peak=False):
                row["ns_per_token_head"] = 1e6 * row["median_ms"] / (n * H)
                row["ratio"] = None


def decode_part(run: Run) -> None:
    """One token with a state, from Python: microseconds of a call, in batches of calls taken in turns."""
    import _contenders
    import _floors
    import _measure

    calls, batch = {}, 200
    for name, decoder in _contenders.DECODERS.items():
        if name not in run.available:
            continue
        step = decoder(8, 8, 64, 64)

        def many(step=step):
            for _ in range(batch):
                step()

        calls[name] = many
    with _measure.others() as busy:
        times = _measure.interleave(calls, 2 if run.options.quick else 10, (10, 200))
    for name in calls:
        case = _contenders.Case(1, B=8, H=8)
        row = {"group": "one decode step, B=8", "contender": name, **case._asdict(), "thp": run.thp, **busy}
        row |= _measure.summary([taken / batch for taken in times[name]])
        row["ratio"] = row["median_ms"] / _measure.summary([taken / batch for taken in times["longattn"]])["median_ms"]
        row["floor_ms"] = 1e3 * _floors.decode_floor(case.shape, run.rates)
        run.rows.append(row)


def sweep_part(run: Run) -> None:
    """Time and memory against length, for the plots. What would take too long is left out and its prediction noted."""
    import psutil
    from _contenders import Case

    limit = 4.0 if run.options.quick else 60.0
    lengths = (1024, 4096, 16384, 65536) if run.options.quick else tuple(1 << p for p in range(8, 21, 2))
    growth = {"torch SDPA": 16, "performer-pytorch": 6}
    for direction in ("forward", "forward+backward"):
        for name in ("longattn", "torch SDPA", "fast-transformers", "linear-attention-transformer"):
            predicted, peak = 0.0, 0.0
            for n in lengths:
                case, tensors = Case(n, direction=direction), 8 if direction != "forward" else 4
                need = tensors * n * 64 * 8 * 4 + 4e6 * peak
                title, why = f"sweep, {direction}", None
                if predicted > limit:
                    why = f"not run: about {predicted:.0f} s by growth"
                elif need > 0.8 * psutil.virtual_memory().available:
                    why = f"not run: about {need / 1e9:.0f} GB by growth"
                if why:
                    row = {"group": title, "contender": name, **case._asdict(), "thp": run.thp, "skipped": why}
                    run.rows.append(row)
                    break
                rounds = (1, 1) if predicted > limit / 8 else (3, 12)
                added = run.group(title, case, [name], seconds=1, rounds=rounds)
                if not added:
                    break
                predicted = 1e-3 * added[0]["median_ms"] * growth.get(name, 4.2)
                peak = added[0].get("peak_mb", 0.0)
                added[0]["ratio"] = None


def show(run: Run) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 150)
    for group in dict.fromkeys((row["group"], row["thp"]) for row in run.rows):
        rows = [row for row in run.rows if (row["group"], row["thp"]) == group]
        busy = max(row.get("others_cores", 0) for row in rows)
        title = f"{group[0]}{', THP_MEM_ALLOC_ENABLE=1' if group[1] else ''}"
        table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left")
        for column in ("who", "n", "H", "dtype", "direction"):
            table.add_column(column, overflow="fold")
        for column in ("median ms", "min", "ratio", "floor ms", "peak MB", "results MB"):
            table.add_column(column, justify="right")
        for row in rows:
            cells = [row["contender"], f"{row['n']:,}", str(row["H"]), row["dtype"], row["direction"]]
            if "skipped" in row:
                table.add_row(*cells, row["skipped"])
                continue
            digits = 4 if row["median_ms"] < 1 else 2
            ratio = "" if row.get("ratio") is None else f"{row['ratio']:.2f}"
            if "ns_per_token_head" in row:
                ratio = f"{row['ns_per_token_head']:.1f} ns/token/head"
            cells += [f"{row['median_ms']:.{digits}f}", f"{row['min_ms']:.{digits}f}", ratio]
            cells += [f"{row['floor_ms']:.{digits}f}"]
            cells += [f"{row['peak_mb']:.0f}" if "peak_mb" in row else "-"]
            cells += [f"{row['floor_mb']:.0f}" if "floor_mb" in row else ""]
            table.add_row(*cells)
        if busy > 0.1:
            table.caption = f"not a quiet machine: other processes kept up to {busy:.1f} cores busy meanwhile"
        console.print(table)
        for row in rows:
            if "peak_skipped" in row:
                console.print(f"no peak memory of {row['contender']}, n={row['n']:,}: {row['peak_skipped']}")


def default_output() -> Path:
    import _measure

    flags = _measure.machine()["flags"]
    isa = next((name for name in ("avx512_bf16", "avx512f", "avx2", "asimd") if name in flags), "generic")
    return HERE / "results" / f"linear-cpu-{isa}-{time.strftime('%Y%m%d')}.json"


def with_thp(options: argparse.Namespace) -> list[dict]:
    """The table's and the dtypes' rows again, in a process where torch asks for huge pages."""
    parts = [part for part in options.parts if part in ("table", "dtypes")]
    if not parts:
        return []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        command = [sys.executable, __file__, "--rows-to", str(file), "--threads", str(options.threads)]
        command += ["--parts", *parts]
        environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}
        subprocess.run(command + ["--quick"] * options.quick, env=environment, check=True)
        return json.loads(file.read_text())


def main() -> None:
    options = arguments()
    # before torch is loaded: every package's OpenMP then has the same number of threads
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import _measure
    import torch

    torch.set_num_threads(options.threads)
    probed = _measure.probe(options.threads)
    run = Run(options, probed)
    if run.missing["longattn"]:
        sys.exit(f"compare_linear: nothing to compare: {run.missing['longattn']}")
    check_agreement(run.available)
    parts = {"table": table_part, "dtypes": dtypes_part, "long": long_part, "decode": decode_part, "sweep": sweep_part}
    for name in options.parts:
        print(f"{name} ...", file=sys.stderr, flush=True)
        parts[name](run)
    if options.rows_to:
        options.rows_to.write_text(json.dumps(run.rows))
        return
    if not options.no_thp:
        print("again with huge pages ...", file=sys.stderr, flush=True)
        run.rows += with_thp(options)
    show(run)
    for name, reason in run.missing.items():
        if reason:
            print(f"not compared: {name}: {reason}")
    report = {"schema": 1, "machine": _measure.machine(), "versions": _measure.versions(), "quick": options.quick}
    report |= {"settings": _measure.settings(), "probe": probed, "missing": run.missing, "rows": run.rows}
    print(json.dumps({key: report[key] for key in ("machine", "settings", "probe", "versions")}, indent=1))
    output = options.output or (None if options.quick else default_output())
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written: {output}")


if __name__ == "__main__":
    main()
