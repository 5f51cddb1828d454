"""The `longattn` command. One module per subcommand, with `add_parser(subparsers)` and `run(args) -> exit code`."""

import importlib.util
import sys


def require(command: str, *modules: str) -> None:
    """Leaves with exit code 2 and one sentence unless all of the command's optional modules are installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        print(f"longattn {command}: needs {' and '.join(missing)}; pip install 'longattn[cli]'", file=sys.stderr)
        raise SystemExit(2)
