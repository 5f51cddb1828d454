"""LSH attention against other packages and exact attention: one process, interleaved, same inputs, same threads.

    python bench/compare_lsh.py --quick                   short lengths; to see that everything works
    python bench/compare_lsh.py                           the whole, quiet machine please
    python bench/compare_lsh.py --parts peers65536        what other packages take at 65,536 tokens: minutes, 17 GB

Shared queries and keys, causal, chunks of 64, B=1, H=8, D=64 unless said; projections are in nobody's call. Prints
tables of ours, theirs, ratio (theirs / ours) and the hardware's floor, and writes one JSON. It asserts no time; it ends
with exit code 1, before any timing, if our results differ from the float64 reference, or Hugging Face's from ours on
the same buckets. What each contender computes: `_contenders_lsh.py`.
"""

from __future__ import annotations

import _comparison
from _comparison import Run

# errors of float32 sums in another order; a wrong mask or scale is far above
AGREEMENT = 1e-4
PEERS = ("Hugging Face", "reformer-pytorch")
DIRECTIONS = ("forward", "forward+backward")
# n, rounds, heads
TABLE = ((16384, 1, 8), (16384, 4, 8), (65536, 4, 8), (1 << 20, 1, 1))
QUICK = ((1024, 1, 8), (1024, 4, 8), (4096, 4, 8), (8192, 1, 1))


def lsh_case(n: int, R: int = 4, H: int = 8, **options):
    from _contenders_lsh import Case

    return Case(n, H=H, n_hashes=R, **options)


def table(run: Run):
    return QUICK if run.options.quick else TABLE


def title(case) -> str:
    heads = "one head" if case.H == 1 else f"{case.H} heads"
    return f"LSH, n={case.n}, R={case.n_hashes}, {heads}, {case.direction}"


def few(run: Run) -> dict:
    return {"seconds": 0, "rounds": (1, 1) if run.options.quick else (3, 3)}


def many(run: Run, seconds: float = 10) -> dict:
    return {"seconds": 1, "rounds": (3, 5)} if run.options.quick else {"seconds": seconds, "rounds": (5, 30)}


# agreement


def check_agreement(names: list[str]) -> list[str]:
    """What differs: ours from the float64 reference, LSH and exact; Hugging Face's from ours on its buckets."""
    import _contenders_lsh as contenders
    import torch

    from longattn.ops.lsh import prepare, run

    wrong, case = [], lsh_case(320, 2, 2, direction="forward+backward")
    inputs = contenders.make_inputs(case)
    exact = type(inputs)(*(x.double() for x in inputs))
    for name in ("longattn", "longattn exact"):
        results = contenders.build(name, case, inputs)()
        # buckets are those of the float32 rows
        expected = contenders.build(name, case._replace(impl="reference", dtype="float64"), exact)()
        wrong += differences(name, results, expected)
    if "Hugging Face" in names:
        theirs = contenders.hugging_face_layer(case)
        theirs.query_key.rows, theirs.value.rows = (x.transpose(1, 2).flatten(2) for x in (inputs.q, inputs.v))
        with torch.no_grad():
            found = theirs(torch.empty(1, case.n, 0))
        buckets = found.buckets - case.options["n_buckets"] * torch.arange(case.n_hashes)[:, None]
        options = {**case.options, "dedupe": False, "wrap": True, "norm_eps": 1e-6 * case.D, "buckets": buckets}
        output = run(prepare("bench", inputs.q, None, inputs.v, **options))
        results = [found.hidden_states.unflatten(-1, (case.H, case.D)).transpose(1, 2)]
        # its constant for queries that see but themselves, -1e5, rounds the weights of its rounds: 0.8 % on such rows
        late = [x[:, :, case.chunk :] for x in (*results, output.double())]
        wrong += differences("Hugging Face, on its buckets, from ours", late[:1], late[1:])
    return wrong


def differences(label: str, results, expected) -> list[str]:
    whats = ("output", "dq", "dv") if len(expected) == 3 else ("output", "dq", "dk", "dv")
    found = []
    for what, x, y in zip(whats, results, expected, strict=False):
        error = ((x.double() - y).abs().max() / y.abs().max()).item()
        if not error < AGREEMENT:
            found.append(f"{label}: {what} is off by {error:.1e}")
    return found


# parts


def table_part(run: Run) -> None:
    """The peers, torch's exact attention and ours at lengths that take them seconds."""
    cases = [lsh_case(n, R, H, direction=direction) for n, R, H in table(run) for direction in DIRECTIONS]
    for case in cases:
        if case.n == table(run)[2][0]:
            # minutes: the part peers65536 has them
            continue
        names = ["longattn", "longattn exact", "torch SDPA", *PEERS]
        if case.n == table(run)[3][0]:
            names = ["longattn", "Hugging Face"]
            why = "its hash is quadratic in n" if case.n > 1 << 17 else "as at full length"
            run.skip(title(case), "reformer-pytorch", case, why)
        run.group(title(case), case, names, **few(run))


def peers_part(run: Run) -> None:
    """The peers and exact attention at 65,536 tokens: up to a minute for each call, and up to 17 GB."""
    n, R, H = table(run)[2]
    for direction in DIRECTIONS:
        case = lsh_case(n, R, H, direction=direction)
        names = ["longattn", "longattn exact", "torch SDPA", *PEERS]
        run.group(title(case) + ", peers", case, names, seconds=0, rounds=(1, 1))


def alone_part(run: Run) -> None:
    """Ours alone at every case of the table, and what it takes beside inputs and results."""
    for n, R, H in table(run):
        for direction in DIRECTIONS:
            case = lsh_case(n, R, H, direction=direction)
            for row in run.group(f"ours alone, n={n}, R={R}", case, ["longattn"], **many(run)):
                row["ratio"] = None
                if "peak_mb" in row:
                    beside = round(row["peak_mb"] - row["floor_mb"], 1)
                    run.findings[f"MB beyond inputs and results, {title(case)}"] = beside


def stages_part(run: Run) -> None:
    """Hash, sort and tiles alone. GFLOP/s of the tiles: 8 c D flop for each token, head and round, 2.5 times as many
    backward."""
    for n, R, H in table(run)[:2]:
        names = ["longattn", "longattn hash", "longattn sort", "longattn tiles"]
        case = lsh_case(n, R, H)
        rows = run.group(f"stages, n={n}, R={R}", case, names, **many(run))
        both = case._replace(direction="forward+backward")
        rows += run.group(f"stages, n={n}, R={R}", both, ["longattn tiles"], **many(run), peak=False)
        for row in rows:
            if row["contender"] != "longattn":
                row |= {"floor_ms": 1e3 * stage_floor(case.shape, row["label"], row["direction"], run.rates)}
                del row["floor_mb"]
            if row["contender"] == "longattn tiles":
                flops = case.shape.token_heads * case.shape.pair_flops * (1 if row["direction"] == "forward" else 3.5)
                row["gflops_per_core"] = flops / row["median_ms"] / 1e6 / run.options.threads
                label = f"tile stage, n={n}, R={R}, {row['direction']}, GFLOP/s per core"
                run.findings[label] = round(row["gflops_per_core"], 1)


def stage_floor(shape, label: str, direction: str, rates) -> float:
    import _floors

    stage = label.split()[-1]
    if stage in ("hash", "sort"):
        return _floors.part_floor(shape, stage, rates)
    return _floors.floor(shape._replace(columns=0), direction, rates)


def growth_part(run: Run) -> None:
    """Time of a token from 65,536 to 1,048,576 tokens of one head, in turns."""
    lengths = (4096, 16384) if run.options.quick else (65536, 262144, 1 << 20)
    for direction in DIRECTIONS:
        entries = {f"longattn n={n}": ("longattn", lsh_case(n, 1, 1, direction=direction)) for n in lengths}
        rows = run.variants(f"growth, one head, R=1, {direction}", entries, **many(run, 30), peak=False)
        for row in rows:
            row["ns_per_token_head"] = 1e6 * row["median_ms"] / row["n"]
            row["ratio"] = row["ns_per_token_head"] / rows[0]["ns_per_token_head"]
        label = f"time per token, n={lengths[-1]} over n={lengths[0]}, {direction}"
        run.findings[label] = round(rows[-1]["ratio"], 3)


def worst_part(run: Run) -> None:
    """Equal tokens, and one bucket for all, against random rows."""
    n, R, H = table(run)[1]
    for direction in DIRECTIONS:
        contents = ("random", "equal", "one bucket")
        entries = {x: ("longattn", lsh_case(n, R, H, direction=direction, content=x)) for x in contents}
        for row in run.variants(f"contents, n={n}, R={R}, {direction}", entries, **many(run, 20), peak=False)[1:]:
            run.findings[f"{row['label']} over random, n={n}, R={R}, {direction}"] = round(row["ratio"], 3)


def even_part(run: Run) -> None:
    """From which length on R=4 is faster than exact attention, torch's and our own."""
    from longattn.cli._compare import break_even

    lengths = (256, 1024) if run.options.quick else (1024, 2048, 4096, 8192, 16384)
    for direction in DIRECTIONS:
        names = ("longattn", "longattn exact", "torch SDPA")
        times: dict[str, list[float]] = {name: [] for name in names}
        for n in lengths:
            case = lsh_case(n, direction=direction)
            for row in run.group(f"break-even, R=4, {direction}", case, names, **many(run), peak=False):
                times[row["contender"]].append(row["median_ms"])
        for name in names[1:]:
            found = break_even(lengths, times[name], times["longattn"])
            length = "slower at all lengths" if found.length is None else round(found.length)
            length = f"below {length}" if found.below else length
            run.findings[f"break-even with {name}, R=4, {direction}, tokens"] = length


def dtypes_part(run: Run) -> None:
    """Other dtypes against our own float32, in turns."""
    n, R, H = table(run)[1]
    for direction in DIRECTIONS:
        dtypes = ("float32", "bfloat16", "float16")
        entries = {f"longattn {x}": ("longattn", lsh_case(n, R, H, dtype=x, direction=direction)) for x in dtypes}
        run.variants(f"dtypes, n={n}, R={R}, {direction}", entries, **many(run, 20), peak=False)


def dense_part(run: Run) -> None:
    """Exact causal attention: our tile engine against torch's; ratio is torch's time over ours."""
    for n in (512, 1024) if run.options.quick else (4096, 16384):
        for dtype in ("float32", "bfloat16"):
            for direction in DIRECTIONS:
                case = lsh_case(n, 0, dtype=dtype, direction=direction)
                name = f"exact, causal, n={n}, {dtype}, {direction}"
                how = few(run) if n > 4096 else many(run)
                rows = run.group(name, case, ["longattn exact", "torch SDPA"], **how)
                run.findings[f"{name}: ours over torch's"] = round(1 / rows[1]["ratio"], 3)


def sweep_part(run: Run) -> None:
    lengths = (256, 1024, 4096) if run.options.quick else tuple(1 << p for p in range(8, 19, 2))
    for direction in DIRECTIONS:
        case = lsh_case(lengths[0], direction=direction)
        exact = {"longattn exact": 16, "torch SDPA": 16}
        run.sweep(case, ("longattn", *exact, *PEERS), lengths, exact | {"reformer-pytorch": 8})


PARTS = {
    "table": table_part,
    "alone": alone_part,
    "stages": stages_part,
    "growth": growth_part,
    "worst": worst_part,
    "even": even_part,
    "dtypes": dtypes_part,
    "dense": dense_part,
    "sweep": sweep_part,
    "peers65536": peers_part,
}

if __name__ == "__main__":
    how = {"on_request": ("peers65536",), "thp": ("alone", "dtypes"), "contenders": "_contenders_lsh"}
    _comparison.main(_comparison.Script(__file__, __doc__, "lsh", PARTS, check_agreement, **how))
