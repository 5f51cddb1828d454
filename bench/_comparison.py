"""What the comparisons with other packages share: options, rows, sweeps over lengths, tables, the report.

torch is loaded by `main`, not by importing this: the number of threads has to be set first.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

HERE = Path(__file__).resolve().parent


class Script(NamedTuple):
    """One comparison. parts: what each measures; on_request: those left out unless named; thp: those to run again
    where torch asks for huge pages; agree: given the names that take part, what differs from the reference;
    contenders: the module that builds them."""

    file: str
    doc: str
    subject: str
    parts: dict[str, Callable[[Run], None]]
    agree: Callable[[list[str]], list[str]]
    on_request: tuple[str, ...] = ()
    thp: tuple[str, ...] = ("table", "dtypes")
    contenders: str = "_contenders"

    @property
    def name(self) -> str:
        return Path(self.file).stem


def arguments(script: Script) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=script.doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter runs and lengths; to see that everything works")
    asked = f" and {', '.join(script.on_request)}" if script.on_request else ""
    whole = f"default: all but {', '.join(script.on_request)}" if asked else "default: all"
    parser.add_argument("--parts", nargs="+", choices=script.parts, help=f"{whole}; if --quick, all but sweep{asked}")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    where = f"JSON file; default bench/results/{script.subject}-cpu-...; none if --quick"
    parser.add_argument("--output", type=Path, help=where)
    parser.add_argument("--no-peak", action="store_true", help="leave out the memory runs in fresh processes")
    parser.add_argument("--no-thp", action="store_true", help="leave out the second run with THP_MEM_ALLOC_ENABLE=1")
    parser.add_argument("--rows-to", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    left_out = (*script.on_request, *["sweep"] * options.quick)
    options.parts = options.parts or [part for part in script.parts if part not in left_out]
    return options


# agreement


def differences(label: str, results, expected, tolerance: float) -> list[str]:
    """A sentence for each of output, dq, dk, dv and what else there is (dbias) that is further from the reference than
    `tolerance` of its largest."""
    import torch

    wrong = []
    whats = ("output", "dq", "dk", "dv", "dbias")[: len(expected)]
    for what, x, y in zip(whats, results, expected, strict=True):
        error = ((x.double() - y).abs().max() / y.abs().max()).item()
        if not error < tolerance or not torch.isfinite(x).all():
            wrong.append(f"{label}: {what} is off by {error:.1e}")
    return wrong


def reference_of(case, inputs):
    """Output and gradients of the dense reference in float64; case.direction must be "forward+backward"."""
    import _contenders

    exact = type(inputs)(*(x.double() for x in inputs))
    return _contenders.build("longattn", case._replace(impl="reference", dtype="float64"), exact)()


# measuring


class Run:
    """The rows measured so far and how they are measured. findings: sentence -> number, made of rows."""

    def __init__(self, options: argparse.Namespace, probed: dict, contenders: ModuleType):
        import _measure

        self.options, self.probed, self.rates, self.rows = options, probed, _measure.rates(probed), []
        self.contenders, self.findings = contenders, {}
        self.missing = {name: contenders.missing(name) for name in contenders.CONTENDERS}
        self.available = [name for name, reason in self.missing.items() if reason is None]

    @property
    def thp(self) -> bool:
        return os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"

    def group(self, title: str, case, names, **how) -> list[dict]:
        """Measures the contenders of one case in turns and adds their rows."""
        return self.variants(title, {name: (name, case) for name in names}, **how)

    def variants(self, title: str, entries: dict, *, seconds: float, rounds=(3, 30), peak=True) -> list[dict]:
        """The same for cases that differ. entries: label -> (contender, case); ratios are over the first."""
        import _floors
        import _measure

        print(f"  {title}", file=sys.stderr, flush=True)
        entries = {label: entry for label, entry in entries.items() if entry[0] in self.available}
        inputs, calls = {}, {}
        for label, (name, case) in entries.items():
            if case.drawn not in inputs:
                inputs[case.drawn] = self.contenders.make_inputs(case)
            calls[label] = self.contenders.build(name, case, inputs[case.drawn])
        with _measure.others() as busy:
            times = _measure.interleave(calls, seconds, rounds)
        del calls, inputs
        added = []
        for label, (name, case) in entries.items():
            row = {"group": title, "contender": name, "label": label, **case._asdict(), "thp": self.thp, **busy}
            row |= _measure.summary(times[label])
            row |= {"ratio": row["median_ms"] / _measure.summary(times[next(iter(entries))])["median_ms"]}
            row["floor_ms"] = 1e3 * _floors.floor(case.shape, case.direction, self.rates)
            row["floor_mb"] = _floors.output_bytes(case.shape, case.direction) / 1e6
            if peak and not self.options.no_peak and not self.thp:
                row |= _measure.fresh_peak(name, case._asdict(), self.options.threads, module=self.contenders.__name__)
            added.append(row)
        self.rows += added
        return added

    def skip(self, title: str, name: str, case, why: str) -> None:
        row = {"group": title, "contender": name, "label": name, **case._asdict(), "thp": self.thp}
        self.rows.append({**row, "skipped": f"not run: {why}"})

    def decode(self, title: str, entries: dict, batch: int = 200) -> None:
        """One token with a state, from Python: times of a call, in batches of calls taken in turns."""
        import _floors
        import _measure

        entries = {label: entry for label, entry in entries.items() if entry[0] in self.available}
        calls = {}
        for label, (name, case) in entries.items():
            step = self.contenders.DECODERS[name](case)

            def many(step=step):
                for _ in range(batch):
                    step()

            calls[label] = many
        with _measure.others() as busy:
            times = _measure.interleave(calls, 2 if self.options.quick else 10, (10, 200))
        times = {label: _measure.summary([taken / batch for taken in took]) for label, took in times.items()}
        for label, (name, case) in entries.items():
            row = {"group": title, "contender": name, "label": label, **case._asdict(), "thp": self.thp, **busy}
            row |= times[label]
            row["ratio"] = row["median_ms"] / times[next(iter(entries))]["median_ms"]
            row["floor_ms"] = 1e3 * _floors.decode_floor(case.shape, self.rates)
            self.rows.append(row)

    def sweep(self, case, names, lengths, growth: dict[str, float]) -> None:
        """Time and memory against length. What would take too long is left out and its prediction noted.

        growth: by how much time grows from a length to the next; 4.2 if not named.
        """
        import psutil

        limit, title = 4.0 if self.options.quick else 60.0, f"sweep, {case.direction}"
        for name in names:
            predicted, peak = 0.0, 0.0
            for n in lengths:
                case = case._replace(n=n)
                need = 4 * n * case.B * case.H * case.D * 4 + 4e6 * peak
                if predicted > limit:
                    self.skip(title, name, case, f"about {predicted:.0f} s by growth")
                    break
                if need > 0.8 * psutil.virtual_memory().available:
                    self.skip(title, name, case, f"about {need / 1e9:.0f} GB by growth")
                    break
                rounds = (1, 1) if predicted > limit / 8 else (3, 12)
                added = self.group(title, case, [name], seconds=1, rounds=rounds)
                if not added:
                    break
                predicted = 1e-3 * added[0]["median_ms"] * growth.get(name, 4.2)
                peak = added[0].get("peak_mb", added[0]["floor_mb"])
                added[0]["ratio"] = None


# the report


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
            cells = [row["label"], f"{row['n']:,}", str(row["H"]), row["dtype"], row["direction"]]
            if "skipped" in row:
                table.add_row(*cells, row["skipped"])
                continue
            digits = 4 if row["median_ms"] < 1 else 2
            ratio = "" if row.get("ratio") is None else f"{row['ratio']:.2f}"
            if "ns_per_token_head" in row:
                ratio = f"{row['ns_per_token_head']:.1f} ns/token/head"
            if "gflops_per_core" in row:
                ratio = f"{row['gflops_per_core']:.0f} GFLOP/s/core"
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
                console.print(f"no peak memory of {row['label']}, n={row['n']:,}: {row['peak_skipped']}")


def default_output(subject: str) -> Path:
    import _measure

    flags = _measure.machine()["flags"]
    isa = next((name for name in ("avx512_bf16", "avx512f", "avx2", "asimd") if name in flags), "generic")
    return HERE / "results" / f"{subject}-cpu-{isa}-{time.strftime('%Y%m%d')}.json"


def with_thp(script: Script, options: argparse.Namespace) -> list[dict]:
    """The rows of some parts again, in a process where torch asks for huge pages."""
    parts = [part for part in options.parts if part in script.thp]
    if not parts:
        return []
    print("again with huge pages ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        command = [sys.executable, script.file, "--rows-to", str(file), "--threads", str(options.threads)]
        command += ["--parts", *parts]
        environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}
        subprocess.run(command + ["--quick"] * options.quick, env=environment, check=True)
        return json.loads(file.read_text())


def write(output: Path, report: dict) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {output}")


def main(script: Script) -> None:
    options = arguments(script)
    # before torch is loaded: every package's OpenMP then has the same number of threads
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import _measure
    import torch

    torch.set_num_threads(options.threads)
    probed = _measure.probe(options.threads)
    run = Run(options, probed, importlib.import_module(script.contenders))
    if run.missing["longattn"]:
        sys.exit(f"{script.name}: nothing to compare: {run.missing['longattn']}")
    wrong = script.agree(run.available)
    if wrong:
        sys.exit(f"{script.name}: no times, because results differ from the reference:\n  " + "\n  ".join(wrong))
    for name in options.parts:
        print(f"{name} ...", file=sys.stderr, flush=True)
        script.parts[name](run)
    if options.rows_to:
        options.rows_to.write_text(json.dumps(run.rows))
        return
    if not options.no_thp:
        run.rows += with_thp(script, options)
    show(run)
    for name, reason in run.missing.items():
        if reason:
            print(f"not compared: {name}: {reason}")
    report = {"schema": 1, "machine": _measure.machine(), "versions": _measure.versions(), "quick": options.quick}
    report |= {"settings": _measure.settings(), "probe": probed, "missing": run.missing, "rows": run.rows}
    report |= {"findings": run.findings} if run.findings else {}
    for sentence, found in run.findings.items():
        print(f"{sentence}: {found}")
    print(json.dumps({key: report[key] for key in ("machine", "settings", "probe", "versions")}, indent=1))
    output = options.output or (None if options.quick else default_output(script.subject))
    if output:
        write(output, report)
