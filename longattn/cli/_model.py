"""The Reformer that a command is to make: its options, and the configuration they make."""

from __future__ import annotations

from ..models import ReformerConfig
from . import _arguments
from ._text import InputError

MECHANISMS = ("lsh", "local", "exact", "linear", "favor")
DTYPES = ("float32", "bfloat16")
# name -> default, what it is; all are whole numbers
NUMBERS = {
    "length": (4096, "bytes in one sequence"),
    "layers": (6, "reversible blocks"),
    "dim": (256, "width of each of the two streams"),
    "heads": (4, "attention heads"),
    "head_dim": (None, "width of a head (default: dim / heads)"),
    "hidden": (None, "width of the feed-forward layers (default: 4 dim)"),
    "chunk_size": (64, "tokens of a chunk of lsh"),
    "n_hashes": (1, "hash rounds of lsh"),
    "window": (128, "tokens that local looks back on"),
    "feed_forward_chunk": (4096, "tokens whose feed-forward layers exist at once"),
    "batch": (1, "sequences of a step"),
}
DEFAULTS = {name: default for name, (default, _) in NUMBERS.items()} | {
    "mechanisms": "local,lsh",
    "dtype": "float32",
    "reversible": True,
    "seed": 0,
}
# the same weights may be trained on with others of these
FREE = ("batch", "dtype", "feed_forward_chunk")
LONGEST = 2**40


def option(name: str) -> str:
    return "--no-reversible" if name == "reversible" else "--" + name.replace("_", "-")


def add_options(parser) -> None:
    # numbers stay text here: values() says in one sentence what is wrong with them
    for name, (default, what) in NUMBERS.items():
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(option(name), metavar="N", help=what + shown)
    parser.add_argument(
        "--mechanisms",
        "--mechanism",
        metavar="NAMES",
        help=f"of the layers in turn, of {', '.join(MECHANISMS)} (default: {DEFAULTS['mechanisms']})",
    )
    parser.add_argument("--dtype", help=f"{' or '.join(DTYPES)}: that of the products (default: float32)")
    parser.add_argument(
        "--no-reversible", dest="reversible", action="store_false", default=None, help="keep all activations"
    )
    parser.add_argument("--threads", metavar="N", help="CPU threads (default: torch's)")


def values(args) -> dict:
    """What was given, by name; InputError in a sentence."""
    found = {}
    for name in NUMBERS:
        given = getattr(args, name)
        if given is not None:
            found[name] = _arguments.integer(option(name), given, 1, LONGEST)
    if args.mechanisms is not None:
        names = args.mechanisms.split(",")
        found["mechanisms"] = ",".join(_arguments.choice("--mechanisms", x, MECHANISMS) for x in names)
    if args.dtype is not None:
        found["dtype"] = _arguments.choice("--dtype", args.dtype, DTYPES)
    if args.reversible is not None:
        found["reversible"] = args.reversible
    return found


def check(settings: dict) -> None:
    """ValueError where these, read from a file, are not what `values` and `DEFAULTS` give."""
    missing = DEFAULTS.keys() - settings.keys()
    if missing:
        raise ValueError(f"its settings lack {', '.join(sorted(missing))}")
    wrong = [name for name, (default, _) in NUMBERS.items() if not _is_number(settings[name], default)]
    wrong += [name for name, kind in (("reversible", bool), ("seed", int)) if type(settings[name]) is not kind]
    wrong += [] if settings["dtype"] in DTYPES else ["dtype"]
    names = settings["mechanisms"]
    wrong += [] if isinstance(names, str) and set(names.split(",")) <= set(MECHANISMS) else ["mechanisms"]
    if wrong:
        raise ValueError("; ".join(f"its {name} is {settings[name]!r}" for name in wrong))


def _is_number(x, default: int | None) -> bool:
    return x is default if x is None else type(x) is int and 1 <= x <= LONGEST


def config(settings: dict) -> ReformerConfig:
    """Of a byte model; InputError where there is none."""
    names = ("dim", "heads", "head_dim", "hidden", "chunk_size", "n_hashes", "window", "feed_forward_chunk")
    options = {name: settings[name] for name in (*names, "reversible", "seed")}
    mechanisms = tuple(settings["mechanisms"].split(","))
    try:
        return ReformerConfig(
            depth=settings["layers"],
            max_length=settings["length"],
            mechanisms=mechanisms,
            dropout=settings.get("dropout", 0.0),
            **options,
        )
    except ValueError as error:
        raise InputError(str(error)) from None
