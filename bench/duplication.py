"""A one-layer LSH model learns to repeat what it has read: trained with R rounds of hashing, evaluated with R'.

    python bench/duplication.py                      a row for each R, and for exact attention; minutes
    python bench/duplication.py --seconds 60         no training longer than that
    python bench/duplication.py --rounds 4 --target 0.99 --output results/duplication.json

A sequence is 0 w 0 w with a random w of symbols 1 .. 63, 256 tokens in all (Kitaev et al. 2020, arXiv 2001.04451,
section 5.1, with 127 symbols and 1,024 tokens there). Accuracy is the share of the second w that is guessed token by
token from what stands before it; loss too is of the second w alone. One round in one chunk of all tokens is exact
attention with the same weights, shared queries and keys: a row of its own, and the column "exact". Everything is drawn
from --seed: sequences, weights, rotations; the evaluation draws rotations of its own, several times.

A training ends at --target (of sequences it is not trained on), after --steps, or after --seconds, whatever comes
first. Nothing is asserted; the table says what was reached, and when.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import _measure
import torch
from torch import Tensor

from longattn.models import Reformer, ReformerConfig

SYMBOLS, LENGTH = 64, 256
HALF = LENGTH // 2
EXACT = "exact"
BATCH, RATE, WARM_UP_STEPS = 8, 3e-3, 50
# the model knows places by nothing but these, so they are as large as what it knows of symbols
POSITION_STD = 0.3
# between looks at the accuracy; sequences of a look; of the table, which also draws rotations so many times
LOOK_STEPS, LOOK, TABLE, ROTATIONS = 50, 16, 32, 4


class Run(NamedTuple):
    """One training. rounds: a number or "exact"; accuracy: by R' of the evaluation."""

    rounds: int | str
    steps: int
    seconds: float
    seen: float
    accuracy: dict[int | str, float]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", default="exact,8,4,2,1", help="to train with (default: %(default)s)")
    parser.add_argument("--evaluate", default="exact,8,4,2,1", help="to evaluate with (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6000, help="of each training at most (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=600, help="of each training at most (default: %(default)s)")
    parser.add_argument("--target", type=float, default=0.999, help="accuracy that ends it (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=32, help="tokens of a chunk (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=64, help="width of the model (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, help="JSON file (default: none)")
    options = parser.parse_args()
    for name in ("rounds", "evaluate"):
        given = getattr(options, name).split(",")
        setattr(options, name, [x if x == EXACT else int(x) for x in given])
    return options


# the task


def sequences(count: int, generator: torch.Generator) -> Tensor:
    """-> 0 w 0 w, `[count, LENGTH]`"""
    word = torch.randint(1, SYMBOLS, (count, HALF - 1), generator=generator)
    zero = torch.zeros(count, 1, dtype=word.dtype)
    return torch.cat([zero, word, zero, word], 1)


def targets(tokens: Tensor) -> Tensor:
    """What is to be guessed after each token: the second word, and nothing of the first."""
    found = torch.full_like(tokens, -100)
    found[:, HALF:-1] = tokens[:, HALF + 1 :]
    return found


@torch.no_grad()
def accuracy(model: Reformer, tokens: Tensor) -> float:
    training = model.training
    guessed = model.eval()(tokens)[:, HALF:-1].argmax(-1)
    model.train(training)
    return (guessed == tokens[:, HALF + 1 :]).double().mean().item()


# the model


def config(rounds: int | str, options: argparse.Namespace, seed: int) -> ReformerConfig:
    chunk, n_hashes = (LENGTH, 1) if rounds == EXACT else (options.chunk, rounds)
    return ReformerConfig(
        vocab=SYMBOLS, dim=options.dim, depth=1, heads=2, hidden=options.dim, mechanisms=("lsh",), max_length=LENGTH,
        positions="learned", chunk_size=chunk, n_hashes=n_hashes, tied=False, seed=seed,
    )  # fmt: skip


def train(rounds: int | str, options: argparse.Namespace, say) -> tuple[Reformer, int, float, float]:
    """-> the model, its steps, the seconds they took, and the accuracy when it was last looked at"""
    torch.manual_seed(options.seed)
    model = Reformer(config(rounds, options, options.seed))
    torch.nn.init.normal_(model.positions.weights[0], std=POSITION_STD)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, betas=(0.9, 0.98))
    generator, other = (torch.Generator().manual_seed(options.seed + i) for i in (1, 2))
    unseen = sequences(LOOK, other)
    start, seen, step = time.perf_counter(), 0.0, 0
    while step < options.steps and time.perf_counter() - start < options.seconds and seen < options.target:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP_STEPS)
        tokens = sequences(BATCH, generator)
        loss = model.loss(tokens, targets(tokens))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % LOOK_STEPS == 0:
            seen = accuracy(model, unseen)
            say(f"R = {rounds}: step {step}, loss {loss.item():.3f}, accuracy {100 * seen:.1f} %")
    return model, step, time.perf_counter() - start, seen


def evaluate(model: Reformer, rounds: int | str, options: argparse.Namespace) -> float:
    """The mean over draws of rotations that no training has met; exact attention draws nothing."""
    tokens = sequences(TABLE, torch.Generator().manual_seed(options.seed + 3))
    found = []
    for draw in range(1 if rounds == EXACT else ROTATIONS):
        other = Reformer(config(rounds, options, options.seed + 1000 + draw))
        other.load_state_dict(model.state_dict())
        found.append(accuracy(other, tokens))
    return sum(found) / len(found)


# what is said


def say(line: str) -> None:
    """Over the line before, where somebody looks on."""
    if sys.stderr.isatty():
        print(f"\r{line:<79}", end="", file=sys.stderr, flush=True)


def table(runs: list[Run], options: argparse.Namespace) -> str:
    head = "".join(f"{f'R={x}' if x != EXACT else x:>9}" for x in options.evaluate)
    lines = [f"{'trained with':<14}{head}{'steps':>9}{'seconds':>9}"]
    for run in runs:
        cells = "".join(f"{100 * run.accuracy[x]:>8.1f}%" for x in options.evaluate)
        name = EXACT if run.rounds == EXACT else f"R={run.rounds}"
        lines.append(f"{name:<14}{cells}{run.steps:>9}{run.seconds:>9.0f}")
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    runs = []
    print(
        f"0w0w, {SYMBOLS} symbols, {LENGTH} tokens: second w guessed, evaluated with R rounds or exact attention",
        flush=True,
    )
    with _measure.others() as busy:
        for rounds in options.rounds:
            model, steps, seconds, seen = train(rounds, options, say)
            found = {other: evaluate(model, other, options) for other in options.evaluate}
            runs.append(Run(rounds, steps, seconds, seen, found))
            say("")
            print(table(runs, options) if len(runs) == 1 else table(runs, options).splitlines()[-1], flush=True)
    print(f"{options.threads} threads, seed {options.seed}; others kept {busy['others_cores']} cores busy")
    if options.output is not None:
        given = {name: x for name, x in vars(options).items() if name != "output"}
        model = dataclasses.asdict(config(EXACT, options, options.seed)) | {"chunk_size": options.chunk}
        document = {"options": given, "model": model, "runs": [run._asdict() for run in runs]}
        about = {"machine": _measure.machine(), "versions": _measure.versions(), "settings": _measure.settings() | busy}
        options.output.write_text(json.dumps(about | document, indent=1) + "\n")
        print(f"written: {options.output}")


if __name__ == "__main__":
    main()
