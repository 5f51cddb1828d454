"""Linear attention against other packages and torch's exact attention: one process, interleaved, same inputs.

    python bench/compare_linear.py --quick                 everything once, a few minutes
    python bench/compare_linear.py --output results/x.json the whole, quiet machine please

Prints tables of ours, theirs, ratio (theirs / ours) and the hardware's floor, and writes one JSON. It asserts no time;
it ends with exit code 1, before any timing, if a package that computes our function disagrees with us.
"""

from __future__ import annotations

import _comparison
from _comparison import Run

# errors of float32 sums in another order; a wrong mask or map is far above
AGREEMENT = 1e-4
PEERS = ("fast-transformers", "linear-attention-transformer", "performer-pytorch + C++ product", "performer-pytorch")


def check_agreement(names: list[str]) -> list[str]:
    """What differs from the float64 reference, among the packages that compute our function."""
    import _contenders

    wrong = []
    for feature, D, normalize in (("elu", 64, True), ("raw", 256, False), ("raw", 256, True)):
        case = _contenders.Case(320, H=1, D=D, feature=feature, normalize=normalize, direction="forward+backward")
        inputs = _contenders.make_inputs(case)
        expected = _comparison.reference_of(case, inputs)
        for name in names:
            if not _contenders.CONTENDERS[name].same or (name.startswith("performer") and not normalize):
                continue
            results = _contenders.build(name, case, inputs)()
            if name == "fast-transformers" and normalize:
                results = [x.transpose(1, 2) for x in results]
            label = f"{name}, {feature} D={D} normalize={normalize}"
            wrong += _comparison.differences(label, results, expected, AGREEMENT)
    return wrong


def table_part(run: Run) -> None:
    from _contenders import Case

    quick = run.options.quick
    seconds, rounds = (2, (2, 5)) if quick else (20, (5, 30))
    for direction in ("forward", "forward+backward"):
        for D, feature, normalize, peers in (
            (64, "elu", True, PEERS[:3]),
            (256, "raw", False, PEERS[:1]),
            (256, "raw", True, (PEERS[0], PEERS[2])),
        ):
            case = Case(16384, D=D, feature=feature, normalize=normalize, direction=direction)
            title = f"{feature} M={D}{'' if normalize else ', not normalised'}, n=16384"
            run.group(title, case, ["longattn", *peers], seconds=seconds, rounds=rounds)
        # far slower than the others: few rounds of their own, next to ours again
        n = 4096 if quick else 16384
        for name, why in (("torch SDPA", "exact attention"), (PEERS[3], "performer-pytorch as installed")):
            case, title = Case(n, direction=direction), f"elu M=64, n={n}, {why}"
            run.group(title, case, ["longattn", name], seconds=0, rounds=(2, 2) if quick else (3, 3))


def dtypes_part(run: Run) -> None:
    """Other dtypes against our own float32, in turns."""
    from _contenders import Case

    n = 16384
    entries = {f"longattn {x}": ("longattn", Case(n, dtype=x)) for x in ("float32", "bfloat16", "float16")}
    run.variants(f"dtypes, elu M=64, n={n}", entries, seconds=3 if run.options.quick else 15, rounds=(5, 60))


def long_part(run: Run) -> None:
    """Time per token from 65,536 to 1,048,576 tokens; as many heads as the memory holds, the same for all lengths."""
    import _contenders
    import psutil

    lengths = (16384, 65536, 262144) if run.options.quick else (65536, 262144, 1048576)
    for direction, tensors in (("forward", 5), ("forward+backward", 9)):
        longest = tensors * lengths[-1] * 64 * 4
        H = max(h for h in (1, 2, 4, 8) if h == 1 or h * longest < 0.6 * psutil.virtual_memory().available)
        if run.options.quick:
            H = min(H, 2)
        for n in lengths:
            case = _contenders.Case(n, H=H, direction=direction)
            title = f"time per token, elu M=64, H={H}"
            for row in run.group(title, case, ["longattn"], seconds=5, rounds=(3, 20), peak=False):
                row["ns_per_token_head"] = 1e6 * row["median_ms"] / (n * H)
                row["ratio"] = None


def decode_part(run: Run) -> None:
    import _contenders

    case = _contenders.Case(1, B=8, H=8)
    run.decode("one decode step, B=8", {name: (name, case) for name in _contenders.DECODERS})


def sweep_part(run: Run) -> None:
    from _contenders import Case

    lengths = (1024, 4096, 16384, 65536) if run.options.quick else tuple(1 << p for p in range(8, 21, 2))
    names = ("longattn", "torch SDPA", "fast-transformers", "linear-attention-transformer")
    for direction in ("forward", "forward+backward"):
        run.sweep(Case(lengths[0], direction=direction), names, lengths, {"torch SDPA": 16})


PARTS = {"table": table_part, "dtypes": dtypes_part, "long": long_part, "decode": decode_part, "sweep": sweep_part}

if __name__ == "__main__":
    _comparison.main(_comparison.Script(__file__, __doc__, "linear", PARTS, check_agreement))
