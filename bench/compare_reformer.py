"""A training step of longattn's Reformer beside other packages' and beside exact attention: one process, in turns.

    python bench/compare_reformer.py --quick            short; to see that everything works
    python bench/compare_reformer.py                    4,096 and 16,384 tokens, ours to 65,536; quiet machine please

Six layers, width 256, four heads, over bytes. Two models: every layer LSH with four rounds and a feed-forward of 1024,
as reformer-pytorch's ReformerLM; local and LSH attention in turn with one round and 512, as Hugging Face's Reformer.
Prints time, its ratio to ours, the floor of the arithmetic, and the growth of memory in a step, which includes the
gradients of the parameters. It asserts no time; it ends with exit code 1, before any timing, where a loss is not near
that of guessing or our reversible layers' gradients are not those of plain autograd.
"""

from __future__ import annotations

import math

import _comparison
from _comparison import Run

AGREEMENT = 1e-4
RP = {"mechanisms": ("lsh",), "n_hashes": 4, "hidden": 1024}
HF = {"mechanisms": ("local", "lsh"), "n_hashes": 1, "hidden": 512}


def reformer_case(n: int, **options):
    from _contenders_reformer import Case

    return Case(n, **options)


def check_agreement(names: list[str]) -> list[str]:
    import _contenders_reformer as contenders
    import torch

    wrong, grads = [], {}
    case = reformer_case(256, layers=2, H=2, D=32, hidden=128)
    tokens = contenders.make_inputs(case)
    for name in names:
        torch.manual_seed(0)
        model = contenders.MODELS[name](case)
        loss = model.loss(tokens)
        loss.backward()
        # untrained models guess, some of them wildly
        if not 0.5 * math.log(contenders.VOCAB) < loss.item() < 20 * math.log(contenders.VOCAB):
            wrong.append(f"{name}: a loss of {loss.item():.2f} nats before any training")
        grads[name] = [p.grad.double() for p in model.parameters() if p.grad is not None]
    pairs = zip(grads["longattn"], grads["longattn plain"], strict=True)
    error = max(((a - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in pairs)
    if not error < AGREEMENT:
        wrong.append(f"longattn: gradients are off plain autograd's by {error:.1e}")
    return wrong


def table_part(run: Run) -> None:
    for n in (1024,) if run.options.quick else (4096, 16384):
        # a step of the others takes a minute at the longer one
        how = {"seconds": 0, "rounds": (3, 3) if n == 4096 else (1, 1)}
        case, half = reformer_case(n, **RP), reformer_case(n, **RP, autocast=True)
        entries = {"longattn": ("longattn", case), "longattn bf16 autocast": ("longattn", half)}
        entries |= {"longattn plain": ("longattn plain", case)}
        entries |= {name: (name, case) for name in ("reformer-pytorch", "Hugging Face")}
        entries |= {"torch exact": ("torch exact", case._replace(mechanisms=("exact",)))}
        run.variants(f"every layer LSH, 4 rounds, n={n}", entries, **how)
        case = reformer_case(n, **HF)
        run.group(f"local and LSH in turn, 1 round, n={n}", case, ("longattn", "Hugging Face"), **how)


def growth_part(run: Run) -> None:
    """Time per token of ours as the sequence grows."""
    lengths = (1024, 2048) if run.options.quick else (4096, 16384, 65536)
    for name, options in (("every layer LSH, 4 rounds", RP), ("local and LSH in turn, 1 round", HF)):
        each = []
        for n in lengths:
            case = reformer_case(n, **options)
            added = run.group(f"growth, {name}", case, ("longattn",), seconds=0, rounds=(1, 2))
            each += [row["min_ms"] / row["n"] for row in added]
            for row in added:
                row["ratio"] = None
        if len(each) > 1:
            run.findings[f"time per token, {lengths[-1]} over {lengths[0]}, {name}"] = round(each[-1] / each[0], 3)


SCRIPT = _comparison.Script(
    file=__file__,
    doc=__doc__,
    subject="reformer",
    parts={"table": table_part, "growth": growth_part},
    agree=check_agreement,
    thp=(),
    contenders="_contenders_reformer",
)

if __name__ == "__main__":
    _comparison.main(SCRIPT)
