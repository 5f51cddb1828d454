"""`longattn doctor`: what is installed, what was built, which backends can run here and why the others cannot."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
from pathlib import Path

import torch

from .. import native
from .._version import __version__
from ..ops import _dispatch
from . import require

SWITCHES = (
    "LONGATTN_CACHE",
    "LONGATTN_CPU_ISA",
    "LONGATTN_CUDA",
    "LONGATTN_CUDA_ARCHS",
    "LONGATTN_EMULATE",
    "LONGATTN_HUGE_PAGES",
    "LONGATTN_NO_EXT",
    "LONGATTN_WERROR",
    "MAX_JOBS",
    "CXX",
    "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "THP_MEM_ALLOC_ENABLE",
    "TRITON_INTERPRET",
)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text, re.MULTILINE)
    return found[1].strip() if found else None


def _cpu() -> dict:
    extension = None if native.missing() else native.extension()
    isa, why_no_isa = None, native.missing()
    if extension:
        try:
            isa = extension.isa()
        except ValueError as error:
            why_no_isa = str(error)
    return {
        "model": _first(r"^model name\s*:(.*)$", _read("/proc/cpuinfo")) or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": isa,
        "why_no_isa": why_no_isa,
        "isas_built": list(extension.isas()) if extension else [],
        "isas_supported": list(extension.supported_isas()) if extension else [],
    }


def _gpus() -> list[dict]:
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_bytes": gpu.total_memory} for gpu in found
    ]


def report() -> dict:
    """Everything doctor knows, ready for JSON."""
    return {
        "versions": {
            "longattn": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "triton": _version("triton"),
            "nvidia_driver": _first(r"Kernel Module\D*([\d.]+)", _read("/proc/driver/nvidia/version")),
            "system": platform.platform(),
        },
        "cpu": _cpu(),
        "gpus": _gpus(),
        "backends": [{"name": n, "usable": usable, "reason": reason} for n, usable, reason in _dispatch.backends()],
        "build": native.build_summary(),
        "environment": {name: os.environ[name] for name in SWITCHES if name in os.environ},
    }


def _built(build: dict) -> list[tuple[str, str]]:
    """Rows that say what setup.py built, and why something was not."""
    if not build:
        return [("extension", "no record of a build")]
    if not build["extension"]:
        return [("extension", f"not built: {build['why_no_extension']}")]
    cuda = f"{build['cuda']} for {', '.join(build['cuda_archs'])}" if build["cuda"] else f"no: {build['why_no_cuda']}"
    return [
        ("compiler", build["compiler"]),
        ("instruction sets", ", ".join(build["isas"])),
        ("CUDA", cuda),
        *((f"without {name}", why) for name, why in build["left_out"].items()),
    ]


def _print(facts: dict) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")

    def section(title: str, rows: list[tuple[str, str]]) -> None:
        for index, (name, value) in enumerate(rows):
            last = index == len(rows) - 1
            table.add_row("" if index else title, escape(name), escape(str(value)), end_section=last)

    cpu = facts["cpu"]
    section("versions", [(name, value or "none") for name, value in facts["versions"].items()])
    section(
        "CPU",
        [
            ("model", cpu["model"]),
            ("cores, threads", f"{cpu['cores']} cores, torch uses {cpu['threads']} threads"),
            ("in use", cpu["isa"] or f"none: {cpu['why_no_isa']}"),
            ("built", ", ".join(cpu["isas_built"]) or "none"),
            ("runs here", ", ".join(cpu["isas_supported"]) or "none"),
        ],
    )
    gpus = [
        (f"cuda:{i}", f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB")
        for i, gpu in enumerate(facts["gpus"])
    ]
    section("GPU", gpus or [("none", "torch sees no GPU")])
    backends = [(b["name"], "usable" if b["usable"] else f"no: {b['reason']}") for b in facts["backends"]]
    section("backends", backends)
    section("build", _built(facts["build"]))
    section("environment", list(facts["environment"].items()) or [("none", "no switch is set")])
    Console().print(table)


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("doctor", help="what is built here, which backends can run, and why others cannot")
    parser.add_argument("--json", action="store_true", help="the same as JSON, without the cli extra")


def run(args) -> int:
    if not args.json:
        require("doctor", "rich")
    facts = report()
    if args.json:
        json.dump(facts, sys.stdout, indent=1)
        print()
    else:
        _print(facts)
    return 0
