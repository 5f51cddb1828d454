"""Linear attention with relative positions: its three methods beside torch's ways to write it, same features and bias.

    python bench/compare_toeplitz.py --quick              short lengths; to see that everything works
    python bench/compare_toeplitz.py                      the whole, 10 GB of free memory, quiet machine please
    python bench/compare_toeplitz.py --parts long         1,048,576 tokens by prefix, two heads, ours alone (6 GB)
    python bench/compare_toeplitz.py --parts crossover    from which length the FFT is faster than tiles, for the data

B=1, H=8, M=E=64, float32, causal, a bias with a number for every offset unless said; features are in nobody's call but
those named so, the gradient of the bias in everybody's backward pass. Prints tables of ours, theirs, ratio (theirs /
ours) and the hardware's floor, and writes one JSON. It asserts no time; it ends with exit code 1, before any timing, if
results differ from the float64 reference. What each contender computes: `_contenders_toeplitz.py`.
"""

from __future__ import annotations

import math

import _comparison
from _comparison import Run

# float32 sums in another order; FFTs round in units of the largest of all rows
AGREEMENT, FFT_AGREEMENT = 1e-4, 5e-3
DIRECTIONS = ("forward", "forward+backward")
K = 128


def case_of(n: int, **options):
    from _contenders_toeplitz import Case

    return Case(n, **options)


def ours(case, *methods: str) -> dict:
    """Label -> entry of the variants of ours."""
    return {f"longattn {method}": ("longattn", case._replace(method=method)) for method in methods}


def few(run: Run) -> dict:
    return {"seconds": 0, "rounds": (1, 1) if run.options.quick else (3, 3)}


# agreement


def check_agreement(names: list[str]) -> list[str]:
    """What differs from the float64 reference: all but SDPA, which is another function."""
    import _contenders_toeplitz as contenders

    wrong = []
    for is_causal in (True, False):
        for reach in (None, 40):
            case = case_of(320, H=2, is_causal=is_causal, reach=reach, direction="forward+backward")
            inputs = contenders.make_inputs(case)
            exact = type(inputs)(*(x.double() for x in inputs))
            expected = contenders.build("longattn", case._replace(impl="reference", dtype="float64"), exact)()
            entries = ours(case, *contenders.METHODS)
            entries |= {name: (name, case) for name in ("torch.fft, straight", "torch n x n") if name in names}
            for label, (name, variant) in entries.items():
                tolerance = FFT_AGREEMENT if "fft" in label else AGREEMENT
                where = f"{label}, {'causal' if is_causal else 'bidirectional'}, reach {reach}"
                results = contenders.build(name, variant, inputs)()
                wrong += _comparison.differences(where, results, expected, tolerance)
    return wrong


# parts


def table_part(run: Run) -> None:
    """Every offset with a number of its own. The straight form of the FFT is last: its memory is returned late."""
    for n in (1024,) if run.options.quick else (1024, 4096):
        for direction in DIRECTIONS:
            case = case_of(n, direction=direction)
            entries = {**ours(case, "tiles", "fft"), "torch n x n": ("torch n x n", case)}
            entries["torch SDPA, dense bias"] = ("torch SDPA", case)
            fixed = case._replace(learned=False)
            if direction != "forward":
                entries["longattn tiles, fixed bias"] = ("longattn", fixed)
                entries["torch SDPA, fixed bias"] = ("torch SDPA", fixed)
            entries["torch.fft, straight"] = ("torch.fft, straight", case)
            run.variants(f"every offset, n={n}, {direction}", entries, **few(run))


def methods_part(run: Run) -> None:
    """Ours at lengths that torch's forms do not reach."""
    for n in (4096,) if run.options.quick else (16384, 65536):
        for direction in DIRECTIONS:
            clipped = case_of(n, direction=direction, reach=K, method="prefix")
            entries = {f"longattn prefix, K={K}": ("longattn", clipped)}
            favor = {"feature": "favor", "n_features": 64}
            entries["the same, features of l2 rows too"] = ("longattn", clipped._replace(**favor))
            bidirectional = clipped._replace(is_causal=False)
            entries["the same, bidirectional"] = ("longattn", bidirectional)
            run.variants(f"clipped, n={n}, {direction}", entries, **few(run))
            one = case_of(n, H=1, direction=direction)
            run.variants(f"every offset, one head, n={n}, {direction}", ours(one, "fft", "tiles"), **few(run))


def by_length(run: Run, title: str, lengths, H: int, **how) -> None:
    """Time of a token by prefix."""
    for direction in DIRECTIONS:
        for n in lengths:
            case = case_of(n, H=H, direction=direction, reach=K, method="prefix")
            entries = {f"longattn prefix, K={K}": ("longattn", case)}
            for row in run.variants(f"{title}, {direction}", entries, **how):
                row["ns_per_token_head"], row["ratio"] = 1e6 * row["median_ms"] / case.shape.token_heads, None


def growth_part(run: Run) -> None:
    by_length(run, "growth", (4096, 16384) if run.options.quick else (16384, 65536, 262144), 8, **few(run))


def decode_part(run: Run) -> None:
    case = case_of(1, reach=K, method="prefix")
    entries = {f"longattn, K={K}": ("longattn", case)}
    entries["the same, features of l2 rows too"] = ("longattn", case._replace(feature="favor"))
    run.decode("one decode step", entries)


def long_part(run: Run) -> None:
    by_length(run, "long", (65536, 1 << 20), 2, **few(run))


def crossover_part(run: Run) -> None:
    """Tiles and FFT at lengths twice each other, until the FFT is ahead; between two lengths by the slopes."""
    longest = 8192 if run.options.quick else 1 << 18
    found: dict = {"causal": [], "full": []}
    for mode, is_causal in (("causal", True), ("full", False)):
        for M in (16, 32, 64):
            before, n = None, 1024
            while n <= longest:
                case = case_of(n, H=2, D=M, is_causal=is_causal, direction="forward+backward")
                title = f"crossover, M={M}, {mode}, n={n}"
                rows = run.variants(title, ours(case, "tiles", "fft"), peak=False, seconds=0, rounds=(1, 2))
                tiles, fft = (math.log(row["median_ms"]) for row in rows)
                if fft < tiles:
                    break
                before, n = (n, fft - tiles), 2 * n
            else:
                continue
            if before is not None:
                ahead = tiles - fft
                n = round(before[0] * 2 ** (before[1] / (before[1] + ahead)))
            found[mode].append([M, n])
    run.findings["[features, tokens] from which the FFT is ahead of tiles"] = found


PARTS = {
    "table": table_part, "methods": methods_part, "growth": growth_part, "decode": decode_part, "long": long_part,
    "crossover": crossover_part,
}  # fmt: skip

if __name__ == "__main__":
    rest = {"on_request": ("long", "crossover"), "thp": (), "contenders": "_contenders_toeplitz"}
    _comparison.main(_comparison.Script(__file__, __doc__, "toeplitz", PARTS, check_agreement, **rest))
