"""How far FAVOR+ is from exact softmax attention, and what that costs: ours and performer-pytorch.

    python bench/accuracy_favor.py --quick                 three minutes at most
    python bench/accuracy_favor.py --output results/x.json the whole; the milliseconds want a quiet machine

The error is the Frobenius norm of the difference from softmax attention in float64, over that of the latter, averaged
over seeds; each seed draws inputs and projections anew. An error above that of `plain averaging of V` says that queries
and keys were of no use. First the ground on which random features do well, queries and keys of unit length and
temperature 1, with the milliseconds of a forward pass beside the error; then the error against the number of features
for kinds, sizes of queries and keys, centred keys and exact_diagonal. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from pathlib import Path

import _comparison

D = E = 64
HEADS = 4
AVERAGING, PERFORMER = "plain averaging of V", "performer-pytorch"
# standard deviations of the coordinates of q and k; the kernel's temperature is sqrt(D)
NORMS = (0.25, 0.5, 1.0)
# coordinates of the mean that all keys share, in the table about centring
KEY_MEAN = 0.5
CLUSTERS = 16
GROUNDS = {
    "independent": "independent directions",
    "clustered": f"directions and values in {CLUSTERS} clusters, cosine 0.64 within",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer seeds, numbers of features and tokens")
    parser.add_argument("--seeds", type=int, help="default 10; 2 if --quick")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    where = "JSON file; default bench/results/favor-accuracy-cpu-...; none if --quick"
    parser.add_argument("--output", type=Path, help=where)
    options = parser.parse_args()
    options.seeds = options.seeds or (2 if options.quick else 10)
    options.features = (64, 256, 1024) if options.quick else (64, 128, 256, 512, 1024)
    options.n = 1024 if options.quick else 2048
    return options


# inputs


def unit_inputs(ground: str, n: int, seed: int):
    """-> q, k, v `[1, HEADS, n, 64]`, q and k of unit length"""
    import torch
    from torch.nn import functional as F

    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int):
        return torch.randn(*shape, generator=generator)

    q, k, v = (normal(1, HEADS, n, width) for width in (D, D, E))
    if ground == "clustered":
        centres, values = F.normalize(normal(HEADS, CLUSTERS, D), dim=-1), normal(HEADS, CLUSTERS, E)
        of_q, of_k = (torch.randint(CLUSTERS, (n,), generator=generator) for _ in range(2))
        # noise of length 3/4: the cosine of two of a cluster is 1 / (1 + 9/16)
        q, k = (centres[:, of] + 0.75 * F.normalize(x, dim=-1) for x, of in ((q, of_q), (k, of_k)))
        v = v + values[:, of_k]
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v


def normal_inputs(norm: float, key_mean: float, n: int, seed: int):
    import torch

    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, HEADS, n, width, generator=generator) for width in (D, D, E))
    mean = key_mean * torch.randn(1, HEADS, 1, D, generator=generator)
    return norm * q, norm * k + mean, v


# attention


def exact(q, k, v, temperature: float, is_causal: bool):
    """Softmax attention in float64, a head at a time: the matrix of one is 34 MB at 2,048 tokens."""
    import torch

    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1) if is_causal else None
    heads = []
    for q_h, k_h, v_h in zip(*(x[0].double() for x in (q, k, v)), strict=True):
        scores = q_h @ k_h.mT / temperature  # [n, n]
        heads.append((scores if future is None else scores.masked_fill_(future, -math.inf)).softmax(-1) @ v_h)
    return torch.stack(heads)[None]


def averaging(v, is_causal: bool):
    import torch

    if not is_causal:
        return v.double().mean(2, keepdim=True).expand(v.shape)
    return v.double().cumsum(2) / torch.arange(1, v.shape[2] + 1)[:, None]


def ours(q, k, v, is_causal: bool, n_features: int, seed: int, temperature: float | None = None, **options):
    """-> the call, without arguments. Centred keys of a causal call: by the mean of these keys, stored before."""
    import torch

    import longattn

    favor = longattn.Favor(D, n_features, temperature=temperature, seed=seed, **options)
    if favor.center_keys and is_causal:
        favor.calibrate(k)
    attend = torch.no_grad()(longattn.linear_attention)
    return lambda: attend(q, k, v, feature_map=favor, is_causal=is_causal, impl="cpu")


def performer(q, k, v, is_causal: bool, n_features: int, seed: int, own_projection: bool = True):
    """Its FastAttention as it is, with its eps of 1e-4. It divides q and k by D^(1/4), so they are multiplied by it:
    temperature 1."""
    import _contenders
    import torch
    from performer_pytorch import performer_pytorch as package

    import longattn

    product = package.causal_linear_attention
    if _contenders.missing("performer-pytorch + C++ product"):
        product = package.causal_linear_attention_noncuda
    torch.manual_seed(seed)
    case = _contenders.Case(q.shape[2], n_features=n_features, is_causal=is_causal)
    projection = None if own_projection else longattn.Favor(D, n_features, seed=seed).projection
    layer = _contenders.performer_layer(case, product, projection)
    q, k = D**0.25 * q, D**0.25 * k
    return torch.no_grad()(lambda: layer(q, k, v))


# tables


def error(out, expected) -> float:
    return ((out.double() - expected).norm() / expected.norm()).item()


def mean_error(errors: list[float]) -> dict:
    """The mean over seeds and the standard error of that mean."""
    spread = statistics.stdev(errors) / len(errors) ** 0.5 if len(errors) > 1 else None
    return {"error": statistics.fmean(errors), "standard_error": spread, "errors": errors}


def contenders(is_causal: bool) -> dict:
    """Label -> (who builds the call, options)."""
    import _contenders

    kinds, found = ("positive", "hyperbolic"), {}
    if not _contenders.missing(PERFORMER):
        found[PERFORMER] = performer, {}
        # tells the luck of a draw from the rest
        found[f"{PERFORMER}, our projection"] = performer, {"own_projection": False}
    for kind in kinds:
        found[f"longattn {kind}"] = ours, {"kind": kind, "temperature": 1.0}
    for kind in kinds:
        found[f"longattn {kind}, regularized"] = ours, {**found[f"longattn {kind}"][1], "scaling": "regularized"}
    for kind in kinds if is_causal else ():
        found[f"longattn {kind}, exact_diagonal"] = ours, {**found[f"longattn {kind}"][1], "exact_diagonal": True}
    return found


def unit_part(options: argparse.Namespace) -> list[dict]:
    """Unit queries and keys, temperature 1: error and milliseconds of a forward pass, ours and performer-pytorch."""
    import _measure

    rows, n = [], options.n
    for is_causal in (False, True):
        chosen, milliseconds = contenders(is_causal), {}

        def calls(inputs, M: int, seed: int, is_causal=is_causal, chosen=chosen) -> dict:
            return {label: make(*inputs, is_causal, M, seed, **how) for label, (make, how) in chosen.items()}

        for M in options.features:
            built = calls(unit_inputs("independent", n, 0), M, 0)
            with _measure.others() as busy:
                times = _measure.interleave(built, 0.0 if options.quick else 2.0, (3, 20))
            milliseconds |= {(label, M): {**_measure.summary(times[label]), **busy} for label in chosen}
        for ground, what in GROUNDS.items():
            errors: dict = {}
            for seed in range(options.seeds):
                inputs = unit_inputs(ground, n, seed)
                expected = exact(*inputs, 1.0, is_causal)
                errors.setdefault((AVERAGING, None), []).append(error(averaging(inputs[2], is_causal), expected))
                for M in options.features:
                    for label, call in calls(inputs, M, seed).items():
                        errors.setdefault((label, M), []).append(error(call(), expected))
            mode = "causal" if is_causal else "bidirectional"
            title = f"unit q and k, temperature 1, {what}, {mode}, n={n}: error, ms"
            for (label, M), found in errors.items():
                row = {"group": title, "ground": ground, "is_causal": is_causal, "n": n, "label": label}
                row |= {"n_features": M, **mean_error(found), **milliseconds.get((label, M), {})}
                rows.append(row)
    return rows


def features_part(options: argparse.Namespace) -> list[dict]:
    """Ours: error against the number of features, temperature sqrt(D)."""
    rows, n = [], options.n
    kinds = ("positive", "hyperbolic", "trig")
    for norm in NORMS:
        for is_causal in (False, True):
            variants = {kind: {"kind": kind} for kind in kinds}
            if is_causal:
                variants |= {f"{kind}, exact_diagonal": {"kind": kind, "exact_diagonal": True} for kind in kinds}
            rows += errors_of(options, f"standard deviation {norm}", norm, 0.0, is_causal, variants, n)
    for is_causal in (False, True):
        variants = {}
        for kind in kinds[:2]:
            for exact_diagonal in (False, True) if is_causal else (False,):
                for centred in (False, True):
                    names = [kind, *["exact_diagonal"] * exact_diagonal, *["centred keys"] * centred]
                    favor = {"kind": kind, "exact_diagonal": exact_diagonal, "center_keys": centred}
                    variants[", ".join(names)] = favor
        what = f"standard deviation 0.5, keys with a mean of length {KEY_MEAN * math.sqrt(D):.0f}"
        rows += errors_of(options, what, 0.5, KEY_MEAN, is_causal, variants, n)
    return rows


def errors_of(options, what: str, norm: float, key_mean: float, is_causal: bool, variants: dict, n: int) -> list[dict]:
    errors: dict = {}
    for seed in range(options.seeds):
        inputs = normal_inputs(norm, key_mean, n, seed)
        expected = exact(*inputs, math.sqrt(D), is_causal)
        errors.setdefault((AVERAGING, None), []).append(error(averaging(inputs[2], is_causal), expected))
        for label, favor in variants.items():
            for M in options.features:
                found = error(ours(*inputs, is_causal, M, seed, **favor)(), expected)
                errors.setdefault((label, M), []).append(found)
    mode = "causal" if is_causal else "bidirectional"
    about = {"group": f"{what}, {mode}, n={n}: error", "is_causal": is_causal, "n": n}
    about |= {"standard_deviation": norm, "key_mean": key_mean}
    return [{**about, "label": label, "n_features": M, **mean_error(e)} for (label, M), e in errors.items()]


def show(rows: list[dict], features: tuple[int, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 150)
    for group in dict.fromkeys(row["group"] for row in rows):
        chosen = [row for row in rows if row["group"] == group]
        table = Table(title=group, title_justify="left", title_style="bold", caption_justify="left")
        table.add_column("who")
        for M in features:
            table.add_column(f"M={M}", justify="right")
        for label in dict.fromkeys(row["label"] for row in chosen):
            cells = {row["n_features"]: cell(row) for row in chosen if row["label"] == label}
            # plain averaging has no features: one number for all
            table.add_row(label, *(cells.get(M, cells.get(None, "")) for M in features))
        busy = max(row.get("others_cores", 0) for row in chosen)
        if busy > 0.1:
            table.caption = f"not a quiet machine: other processes kept up to {busy:.1f} cores busy meanwhile"
        console.print(table)


def cell(row: dict) -> str:
    spread = "" if row["standard_error"] is None else f" ±{row['standard_error']:.1g}"
    text = f"{row['error']:.3g}{spread}"
    return f"{text}, {row['median_ms']:.1f} ms" if "median_ms" in row else text


def main() -> None:
    options = arguments()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import _contenders
    import _measure
    import torch

    torch.set_num_threads(options.threads)
    missing = {name: _contenders.missing(name) for name in ("longattn", PERFORMER, "performer-pytorch + C++ product")}
    if missing["longattn"]:
        sys.exit(f"accuracy_favor: nothing to measure: {missing['longattn']}")
    rows = unit_part(options) + features_part(options)
    show(rows, options.features)
    print(f"±: standard error of the mean over {options.seeds} seeds")
    for name, reason in missing.items():
        if reason:
            print(f"not measured: {name}: {reason}")
    report = {"schema": 1, "machine": _measure.machine(), "versions": _measure.versions(), "quick": options.quick}
    report |= {"settings": _measure.settings(), "seeds": options.seeds, "missing": missing, "rows": rows}
    output = options.output or (None if options.quick else _comparison.default_output("favor-accuracy"))
    if output:
        _comparison.write(output, report)


if __name__ == "__main__":
    main()
