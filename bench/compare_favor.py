"""FAVOR+ against other packages and torch's exact attention: one process, interleaved, same inputs, same projection.

    python bench/compare_favor.py --quick                 everything once but the longest, some minutes
    python bench/compare_favor.py --parts long            1,048,576 tokens forward and backward, ours alone (18 GB)
    python bench/compare_favor.py --output results/x.json the whole, quiet machine please

Prints tables of ours, theirs, ratio (theirs / ours) and the hardware's floor, and writes one JSON. It asserts no time;
it ends with exit code 1, before any timing, if our results differ from the float64 reference. The peers add an eps to
features or normaliser: another function, whose distance from exact attention accuracy_favor.py measures.
"""

from __future__ import annotations

import _comparison
from _comparison import Run

# errors of float32 sums in another order; a wrong mask or scale is far above
AGREEMENT = 1e-4
# fast-transformers adds 1e-6 to the normaliser: nearly our "hyperbolic", close enough to tell that projections are the
# same and in the same order
NEAR = 1e-2
M = 256
PEERS = ("performer-pytorch + C++ product", "fast-transformers")
AS_INSTALLED = "performer-pytorch"
DIRECTIONS = ("forward", "forward+backward")


def favor_case(n: int, **options):
    from _contenders import Case

    return Case(n, **{"feature": "favor-positive", "n_features": M, **options})


def ours(case) -> dict:
    """Label -> entry of the variants of ours that a case has."""
    entries = {"longattn": ("longattn", case)}
    entries["longattn hyperbolic"] = ("longattn", case._replace(feature="favor-hyperbolic"))
    if case.is_causal:
        entries["longattn exact_diagonal"] = ("longattn", case._replace(exact_diagonal=True))
    return entries


def theirs(case, names) -> dict:
    """Label -> entry of other packages. fast-transformers has pairs of features, exp(u) and exp(-u), alone."""
    paired = case._replace(feature="favor-hyperbolic")
    return {name: (name, paired if name == "fast-transformers" else case) for name in names}


def check_agreement(names: list[str]) -> list[str]:
    """What differs from the float64 reference: ours, and fast-transformers by more than its eps."""
    import _contenders

    wrong = []
    for is_causal in (True, False):
        case = favor_case(320, H=1, is_causal=is_causal, direction="forward+backward")
        inputs = _contenders.make_inputs(case)
        for label, (_, variant) in ours(case).items():
            expected = _comparison.reference_of(variant, inputs)
            results = _contenders.build("longattn", variant, inputs)()
            mode = "causal" if is_causal else "bidirectional"
            wrong += _comparison.differences(f"{label}, {mode}", results, expected, AGREEMENT)
            if variant.kind == "hyperbolic" and "fast-transformers" in names:
                results = [x.transpose(1, 2) for x in _contenders.build("fast-transformers", variant, inputs)()]
                wrong += _comparison.differences(f"fast-transformers, {mode}", results, expected, NEAR)
    return wrong


def table_part(run: Run) -> None:
    quick = run.options.quick
    how = {"seconds": 2, "rounds": (3, 5)} if quick else {"seconds": 20, "rounds": (5, 30)}
    few = {"seconds": 0, "rounds": (1, 1) if quick else (3, 3)}
    n, title = 16384, f"FAVOR+ M={M}"
    for direction in DIRECTIONS:
        case = favor_case(n, direction=direction)
        run.variants(f"{title}, causal, n={n}, {direction}", {**ours(case), **theirs(case, PEERS)}, **how)
        full = case._replace(is_causal=False)
        entries = {**ours(full), **theirs(full, (AS_INSTALLED, "fast-transformers"))}
        run.variants(f"{title}, bidirectional, n={n}, {direction}", entries, **how)
        # far slower than the others: few rounds of their own, next to ours again. What performer-pytorch runs on a CPU
        # takes a minute and more at 16384
        for name, why, length, modes in (
            (AS_INSTALLED, "performer-pytorch as installed", 512 if quick else 1024, (True,)),
            ("torch SDPA", "exact attention", 2048 if quick else 4096, (True, False)),
        ):
            for is_causal in modes:
                mode = "causal" if is_causal else "bidirectional"
                short = case._replace(n=length, is_causal=is_causal)
                where = f"{title}, {mode}, n={length}, {why}, {direction}"
                run.group(where, short, ["longattn", name], **few)


def dtypes_part(run: Run) -> None:
    """Other dtypes against our own float32, in turns."""
    n = 16384
    entries = {f"longattn {x}": ("longattn", favor_case(n, dtype=x)) for x in ("float32", "bfloat16", "float16")}
    run.variants(f"dtypes, FAVOR+ M={M}, n={n}", entries, seconds=3 if run.options.quick else 15, rounds=(3, 60))


def decode_part(run: Run) -> None:
    case = favor_case(1, B=8, H=8)
    # performer-pytorch has no step: it would read all tokens again
    entries = {**ours(case), **theirs(case, ("fast-transformers",))}
    run.decode(f"one decode step, FAVOR+ M={M}, B=8", entries)


def sweep_part(run: Run) -> None:
    lengths = (256, 1024, 4096) if run.options.quick else tuple(1 << p for p in range(8, 19, 2))
    for direction in DIRECTIONS:
        case = favor_case(lengths[0], direction=direction)
        names = ("longattn", "torch SDPA", *PEERS, *[AS_INSTALLED] * (not run.options.quick))
        for name, entry in theirs(case, names).items():
            run.sweep(entry[1], (name,), lengths, {"torch SDPA": 16})


def long_part(run: Run) -> None:
    """1,048,576 tokens, 8 heads, forward and backward: inputs, output and gradients alone are 17 GB."""
    import _floors
    import psutil

    case, title = favor_case(1 << 20, direction="forward+backward"), f"FAVOR+ M={M}, causal, 1,048,576 tokens"
    need = 2 * _floors.output_bytes(case.shape, case.direction) + 1e9
    available = psutil.virtual_memory().available
    if need > available:
        return run.skip(title, "longattn", case, f"needs {need / 1e9:.0f} GB, {available / 1e9:.0f} GB are free")
    for row in run.group(title, case, ["longattn"], seconds=0, rounds=(1, 1) if run.options.quick else (2, 2)):
        row["ns_per_token_head"] = 1e6 * row["median_ms"] / case.shape.token_heads
        row["ratio"] = None
    return None


PARTS = {"table": table_part, "dtypes": dtypes_part, "decode": decode_part, "sweep": sweep_part, "long": long_part}

if __name__ == "__main__":
    _comparison.main(_comparison.Script(__file__, __doc__, "favor", PARTS, check_agreement, on_request=("long",)))
