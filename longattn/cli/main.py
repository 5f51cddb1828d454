"""The entry point of the `longattn` command: finds the subcommand and loads its module alone."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from .._version import __version__

COMMANDS = ("bench", "demo", "doctor", "fidelity", "memory", "train", "tune")


def _parser(names: tuple[str, ...]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="longattn", description="Long-context attention for PyTorch.")
    parser.add_argument("--version", action="version", version=f"longattn {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name in names:
        importlib.import_module(f".{name}", __package__).add_parser(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs `longattn ARGV`; returns the exit code: 0 done, 1 failed, 2 misused, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    named = tuple(argv[:1]) if argv[:1] and argv[0] in COMMANDS else COMMANDS
    args = _parser(named).parse_args(argv)
    command = importlib.import_module(f".{args.command}", __package__)
    try:
        return command.run(args) or 0
    except KeyboardInterrupt:
        print(f"longattn {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of a pipe has left; python would complain once more when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
