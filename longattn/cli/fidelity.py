"""`longattn fidelity`: what random features would make of each attention of a model, by layer and head."""

from __future__ import annotations

import importlib
import os
import sys
import time

import torch
from torch import nn

from ..favor import SCALINGS, Favor
from ..features import FAVOR_KINDS
from ..nn.report import FidelityReport, fidelity_report
from . import _text
from ._text import InputError

# of the built-in example: long enough for its attention to find words, short enough to wait for
LENGTH, BATCH, STEPS, SECONDS = 256, 8, 60, 3.0


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "fidelity",
        help="what random features (FAVOR+) would make of each attention of a model",
        description="Runs a model once with exact attention and says, for each layer and head, how far its output "
        "would be off with random features, and what to do about it. Without a factory it trains a small byte-level "
        "Transformer with exact attention for some seconds and looks at that.",
    )
    # numbers stay text here: run() says in one sentence what is wrong with them
    parser.add_argument(
        "factory", nargs="?", metavar="module:factory", help="a function without arguments that returns (model, batch)"
    )
    parser.add_argument("--features", metavar="M", default="256", help="random features (default: %(default)s)")
    parser.add_argument("--kind", default="positive", help=f"{', '.join(FAVOR_KINDS)} (default: %(default)s)")
    parser.add_argument("--scaling", default="random", help=f"{' or '.join(SCALINGS)} (default: %(default)s)")
    parser.add_argument("--independent", action="store_true", help="independent projections, not orthogonal ones")
    parser.add_argument("--normalize", metavar="l2", help="queries and keys of unit length (default: as they are)")
    parser.add_argument("--temperature", metavar="T", help="of the kernel (default: sqrt(head_dim), 1 with l2)")
    parser.add_argument("--center-keys", action="store_true", help="subtract the mean of the keys")
    parser.add_argument("--exact-diagonal", action="store_true", help="exact within 64 tokens in causal attention")
    parser.add_argument("--seed", metavar="N", default="0", help="of projections and the built-in model (default: 0)")
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def _number(option: str, given: str | None, kind: type) -> int | float | None:
    try:
        return None if given is None else kind(given)
    except ValueError:
        name = "a whole number" if kind is int else "a number"
        raise InputError(f"{option} must be {name}, got {given!r}") from None


def _load(spec: str) -> tuple[nn.Module, object]:
    """The model and the batch that `module:factory` returns; InputError in a sentence."""
    module, _, name = spec.partition(":")
    if not module or not name:
        raise InputError(f"expected module:factory, a function that returns (model, batch), got {spec!r}")
    # as python -m does
    sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise InputError(f"{module!r} cannot be imported: {error}") from None
    except AttributeError:
        raise InputError(f"{module!r} has no {name!r}") from None
    finally:
        sys.path.remove(os.getcwd())
    if not callable(factory):
        raise InputError(f"{spec} must be a function that returns (model, batch), got {type(factory).__name__}")
    made = factory()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise InputError(f"{spec} must return (model, batch), an nn.Module and its input, got {type(made).__name__}")
    return made


def _example(seed: int, progress) -> tuple[nn.Module, torch.Tensor]:
    """A small Transformer over bytes that has learned some Python with exact attention."""
    from ..models import ByteLM

    data = torch.frombuffer(bytearray(_text.standard_library().data), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ByteLM(mechanism="exact")

    def draw(length: int) -> torch.Tensor:
        starts = torch.randint(len(data) - length, (BATCH, 1), generator=generator)
        return data[starts + torch.arange(length)]

    optimizers, start = model.optimizers(), time.perf_counter()
    for _ in range(STEPS):
        loss = model.loss(draw(LENGTH + 1))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if time.perf_counter() - start > SECONDS:
            break
    bits = loss.item() / torch.log(torch.tensor(2.0)).item()
    spent = time.perf_counter() - start
    print(f"the built-in example: {spent:.0f} s of Python's standard library, {bits:.2f} bits a byte", file=progress)
    return model, draw(LENGTH)


def _head_dim(model: nn.Module) -> int:
    dims = [module.head_dim for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    if not dims:
        raise InputError("the model has no torch.nn.MultiheadAttention or longattn.nn.MultiheadAttention in it")
    return max(dims, key=dims.count)


def _report(args) -> FidelityReport:
    features, seed = _number("--features", args.features, int), _number("--seed", args.seed, int)
    temperature = _number("--temperature", args.temperature, float)
    options = {
        "n_features": features,
        "kind": args.kind,
        "orthogonal": not args.independent,
        "scaling": args.scaling,
        "normalize": args.normalize,
        "temperature": temperature,
        "seed": seed,
        "center_keys": args.center_keys,
        "exact_diagonal": args.exact_diagonal,
    }
    try:
        # before a model is made or trained
        Favor(1, **options)
        progress = sys.stderr if args.json else sys.stdout
        model, batch = _example(seed, progress) if args.factory is None else _load(args.factory)
        favor = Favor(_head_dim(model), **options)
        weight = next(model.parameters())
        return fidelity_report(model, batch, favor.to(weight.device), quiet=True)
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error


def run(args) -> int:
    threads = torch.get_num_threads()
    if args.factory is None:
        # its tensors are small: on a busy machine threads would spend the time waiting for each other
        torch.set_num_threads(1)
    try:
        report = _report(args)
    except InputError as error:
        print(f"longattn fidelity: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    if args.json:
        print(report.to_json())
    else:
        report.print()
    return 0
