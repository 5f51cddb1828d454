"""The floors that benchmarks compare with: flop and byte counts against hand counts and measured-rate arithmetic."""

import importlib.util
import math
from pathlib import Path

import pytest

from longattn import native

BENCH = Path(__file__).resolve().parent.parent / "bench"


def load(name):
    spec = importlib.util.spec_from_file_location(f"bench{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


floors = load("_floors")
H200 = floors.Rates(790e12, 4.3e12)


def count_flops(shape):
    """Multiply-adds of one chunk, product by product: forward, and backward with the features recomputed."""
    C, D, E, M, P, values = shape.n, shape.D, shape.E, shape.M, shape.P, shape.E + 1
    wide = D if shape.exact_diagonal else M

    def product(rows, depth, columns):
        return 2 * rows * depth * columns

    features = 2 * product(C, D, P)  # of queries and of keys; pulling gradients back takes as much again
    state, read = product(M, C, values), product(C, M, values)
    if not shape.is_causal:
        # one state forward; backward that of the queries, and dphi(q), dphi(k), dv read from the two
        return features + state + read, 2 * features + state + 3 * read
    forward = features + product(C, wide, C) + product(C, C, E) + state + read
    scores = product(C, values, C) + product(C, wide, C)  # g v^T and phi(q) phi(k)^T
    inside = product(C, C, wide) + product(C, C, wide) + product(C, C, E)  # dphi(q), dphi(k), dv
    return forward, 2 * features + scores + inside + 2 * state + 3 * read  # two states kept, three reads


# C, D, E, M, P: maps element by element, as many features as the head is wide, pairs of features, an odd chunk
SIZES = [
    (64, 64, 64, 64, 0),
    (64, 64, 64, 64, 64),
    (64, 64, 64, 256, 256),
    (64, 64, 64, 256, 128),
    (64, 256, 32, 256, 0),
    (33, 17, 64, 33, 33),
]
PLAIN, FULL, EXACT = {}, {"is_causal": False}, {"exact_diagonal": True}


@pytest.mark.parametrize(("C", "D", "E", "M", "P"), SIZES)
@pytest.mark.parametrize("options", [PLAIN, FULL, EXACT], ids=["causal", "bidirectional", "exact-diagonal"])
def test_flops_count_every_product_of_a_chunk(C, D, E, M, P, options):
    shape = floors.Shape(C, 1, 1, D, E, M, P=P, **options)
    forward, backward = count_flops(shape)
    assert floors.forward_flops(shape, C) == forward
    assert floors.backward_flops(shape, C) == backward


def test_projected_features_cost_their_projection_where_they_are_as_many_as_the_head_is_wide():
    shape = floors.Shape(64, 1, 1, 64, 64, 64)
    projected = shape._replace(P=64)
    assert floors.forward_flops(projected) - floors.forward_flops(shape) == 64 * 4 * 64 * 64
    assert floors.backward_flops(projected) - floors.backward_flops(shape) == 64 * 8 * 64 * 64


@pytest.mark.parametrize(
    ("M", "direction", "expected"),
    [(128, "forward", 0.12), (128, "backward", 0.27), (256, "forward", 0.22), (256, "backward", 0.52)],
)
def test_floor_per_token_and_head_of_projected_features_in_nanoseconds(M, direction, expected):
    one = floors.Shape(1, 1, 1, 64, 64, M, "bfloat16", P=M)
    assert math.isclose(1e9 * floors.floor(one, direction, H200), expected, abs_tol=0.005)


def test_floor_grows_with_tokens_and_takes_the_slower_of_arithmetic_and_memory():
    shape = floors.Shape(65536, 1, 16, 64, 64, 64, "bfloat16")
    moved = 65536 * 16 * 4 * 64 * 2
    assert floors.forward_bytes(shape) == moved
    assert floors.floor(shape, "forward", H200) == moved / 4.3e12
    slow_arithmetic = floors.Rates(1e9, 4.3e12)
    assert floors.floor(shape, "forward", slow_arithmetic) == floors.forward_flops(shape) / 1e9
    both = floors.floor(shape, "forward", H200) + floors.floor(shape, "backward", H200)
    assert floors.floor(shape, "forward+backward", H200) == both


def count_tiles(shape):
    """Multiply-adds of the tiles of one round, product by product: scores and values; backward the scores again."""
    rows, keys = shape.C, 2 * shape.C
    tiles = shape.n // shape.C
    forward = tiles * 2 * rows * keys * (shape.D + shape.E)
    # scores, dp = dO v^T, dv = p^T dO, dq = ds k, dk = ds^T q
    backward = tiles * 2 * rows * keys * (3 * shape.D + 2 * shape.E)
    return shape.R * forward, shape.R * backward


def test_flops_of_tiles_count_every_product_of_every_round():
    shape = floors.Tiles(1024, 1, 1, 64, 64, 4, 64, 0)
    forward, backward = count_tiles(shape)
    assert shape.token_heads * shape.pair_flops == forward == 1024 * 4 * 8 * 64 * 64
    arithmetic = floors.Rates(1e9, 1e30)
    assert floors.floor(shape, "forward", arithmetic) == forward / 1e9
    assert floors.floor(shape, "backward", arithmetic) == backward / 1e9
    hashed = shape._replace(columns=16)
    assert floors.floor(hashed, "backward", arithmetic) == backward / 1e9
    assert math.isclose(floors.floor(hashed, "forward", arithmetic), (forward + 1024 * 4 * 2 * 64 * 16) / 1e9)


def test_relative_positions_count_pairs_in_reach_sums_beyond_it_and_transforms():
    arithmetic, n, M, E = floors.Rates(1.0, 1e30), 100, 64, 32
    tiles = floors.Toeplitz(n, 1, 2, M, E, n - 1, "tiles")
    pairs = 2 * n * (n + 1) / 2
    assert floors.floor(tiles, "forward", arithmetic) == pairs * 2 * (M + E)
    # the weight again and what comes back to it, dq, dk, dv
    assert floors.floor(tiles, "backward", arithmetic) == pairs * 2 * (M + E + 1 + M + M + E)
    # as many offsets as there are: prefix is tiles
    assert floors.floor(tiles._replace(method="prefix"), "forward", arithmetic) == pairs * 2 * (M + E)
    clipped = tiles._replace(method="prefix", reach=9, is_causal=False)
    assert floors.floor(clipped, "forward", arithmetic) == 2 * n * (19 * 2 * (M + E) + 2 * 4 * M * (E + 1))
    fft = tiles._replace(method="fft")
    transforms = 2 * 2 * M * (E + 1) * 2.5 * (2 * n) * math.log2(2 * n)
    assert math.isclose(floors.floor(fft, "forward", arithmetic), transforms)
    assert math.isclose(floors.floor(fft, "backward", arithmetic), 2 * transforms)
    state = 2 * (M * (E + 1) + 9 * (M + E))
    assert floors.decode_floor(clipped, floors.Rates(1e30, 1.0)) == 2 * 4 * state


def test_attention_over_all_keys_counts_the_pairs_that_are_seen():
    shape = floors.Tiles(100, 1, 2, 64, 32, 0, 64, 0)
    arithmetic = floors.Rates(1.0, 1e30)
    assert floors.floor(shape, "forward", arithmetic) == 2 * (100 * 101 / 2) * 2 * (64 + 32)
    assert floors.floor(shape._replace(is_causal=False), "forward", arithmetic) == 2 * 100**2 * 2 * (64 + 32)


def test_shared_queries_and_keys_have_one_gradient():
    shape = floors.Tiles(16384, 1, 8, 64, 64, 4, 64, 24)
    assert floors.output_bytes(shape, "forward+backward") == 3 * 16384 * 8 * 64 * 4
    assert floors.output_bytes(shape._replace(R=0), "backward") == 3 * 16384 * 8 * 64 * 4


def test_results_are_the_output_and_three_gradients():
    shape = floors.Shape(16384, 1, 8, 64, 64, 64)
    assert floors.output_bytes(shape, "forward") == 16384 * 8 * 64 * 4
    assert floors.output_bytes(shape, "forward+backward") == 4 * 16384 * 8 * 64 * 4


def test_decode_floor_reads_and_writes_the_state_once():
    shape = floors.Shape(1, 8, 8, 64, 64, 64)
    assert floors.decode_floor(shape, floors.Rates(1e30, 1e9)) == 8 * 8 * 64 * 65 * 8 / 1e9


def test_decode_floor_makes_the_features_of_one_query_and_one_key():
    shape = floors.Shape(1, 8, 8, 64, 64, 256, P=128)
    assert floors.decode_floor(shape, floors.Rates(1e9, 1e30)) == 64 * (4 * 256 * 65 + 4 * 64 * 128) / 1e9


# the tile engine on a GPU


def test_rounds_gather_their_rows_and_the_hash_reads_once_more():
    # 4 D + 2 D + 8 bytes for each round of bfloat16, 2 D for the hash
    shape = floors.Tiles(1000, 1, 16, 64, 64, 4, 64, 24, "bfloat16")
    assert floors.gathered_bytes(shape, "forward") == 16000 * (4 * (4 * 64 + 2 * 64 + 8) + 2 * 64)
    assert floors.gathered_bytes(shape, "backward") == 16000 * 4 * (4 * 64 + 6 * 64 + 8)
    both = sum(floors.gathered_bytes(shape, direction) for direction in ("forward", "backward"))
    assert floors.gathered_bytes(shape, "forward+backward") == both


def test_hash_and_sort_alone_take_their_products_and_their_tables():
    shape = floors.Tiles(1000, 1, 16, 64, 64, 4, 64, 24, "bfloat16")
    assert floors.part_floor(shape, "hash", floors.Rates(1e9, 1e30)) == 16000 * 2 * 64 * 4 * 24 / 1e9
    assert floors.part_floor(shape, "hash", floors.Rates(1e30, 1e9)) == 16000 * (2 * 64 + 4 * 4) / 1e9
    # a bucket read, a place and a chunk written
    assert floors.part_floor(shape, "sort", floors.Rates(1e30, 1e9)) == 16000 * 4 * 12 / 1e9


# what make gpu prints, without a GPU


@pytest.fixture
def gpu(monkeypatch):
    # its neighbours are imported by their bare names, as when it runs as a script
    monkeypatch.syspath_prepend(str(BENCH))
    return load("gpu")


def row(gpu, contender, n, ms, **options):
    case = gpu.Case(n, H=16, dtype="bfloat16", **options)
    return {"contender": contender, **case._asdict(), "median_ms": ms, "floor_ms": 0.5, "peak_mb": 3, "floor_mb": 2}


def test_speed_up_is_over_the_fastest_exact_attention_of_the_same_call(gpu):
    rows = [
        row(gpu, "longattn", 4096, 2.0),
        row(gpu, gpu.FLASH, 4096, 30.0),
        row(gpu, gpu.CUDNN, 4096, 20.0),
        row(gpu, gpu.FLASH, 1024, 1.0),
        row(gpu, gpu.FLASH, 4096, 1.0, direction="backward"),
        {**row(gpu, gpu.EFFICIENT, 4096, 0.0), "skipped": "not run"},
    ]
    del rows[-1]["median_ms"]
    _, line = gpu.table(rows)
    assert line == ["elu M=64", "bfloat16", "forward", "4,096", "2.000", "0.500", "4.0", "20.000", "10.0x", "3 of 2"]


def test_no_exact_attention_measured_gives_no_speed_up(gpu):
    _, line = gpu.table([row(gpu, "longattn", 1 << 20, 2.0), row(gpu, gpu.FLASH, 4096, 30.0)])
    assert line[7:9] == ["-", "-"]


def test_rows_of_the_tile_engine_name_their_rounds_and_their_parts(gpu):
    directions = {"forward": 30.0, "forward+backward": 90.0}
    rows = [row(gpu, gpu.FLASH, 4096, ms, direction=direction) for direction, ms in directions.items()]
    for case in gpu._gpu_lsh.cases(4096, 16):
        measured = {"median_ms": 2.0, "floor_ms": 0.5}
        measured |= {} if case.direction in gpu._gpu_lsh.PARTS else {"peak_mb": 3, "floor_mb": 2}
        rows.append({"contender": gpu._gpu_lsh.name_of(case), **case._asdict(), **measured})
    lines = {(line[0], line[2]): line for line in gpu.table(rows)[1:]}
    assert set(lines) == {("exact", "forward"), ("exact", "forward+backward")} | {
        (f"LSH R={R}", what) for R in (1, 4) for what in ("forward", "forward+backward", "hash", "sort")
    }
    assert lines["LSH R=4", "forward+backward"][7:] == ["90.000", "45.0x", "3 of 2"]
    assert lines["exact", "forward"][7:9] == ["30.000", "15.0x"]
    assert lines["LSH R=1", "sort"][7:] == ["-", "-", "-"]


@pytest.mark.skipif(native.missing() is not None, reason="the engine measured in place of a GPU's is not built")
def test_what_is_measured_of_the_tile_engine_runs(gpu):
    assert gpu._gpu_lsh.check("cpu", "cpu", 150) is None
    for case in gpu._gpu_lsh.cases(200, 2, impl="cpu", dtype="float32"):
        found = gpu._gpu_lsh.call_of(case, "cpu")()
        outputs = {"forward": 1, "forward+backward": 3 if case.n_hashes else 4, "hash": 2, "sort": 2}[case.direction]
        assert case.direction == "forward" or len(found) == outputs
        assert 0 < gpu._gpu_lsh.floor(case, H200) < 1e-5


@pytest.mark.skipif(native.missing() is not None, reason="the engine measured in place of a GPU's is not built")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_is_measured_of_relative_positions_runs(gpu):
    relative = gpu._gpu_toeplitz
    assert relative.check("cpu", "cpu", 150) is None
    own = [(relative.NAME, case) for case in relative.cases(60, 2, impl="cpu", dtype="float32")]
    # an eager flex_attention has no gradient of its bias
    for name, case in own + relative.opponents(60, 2, dtype="float32")[:3]:
        found = relative.build(name, case, "cpu")()
        assert case.direction == "forward" or len(found) == 5
        assert 0 < relative.floor(case, H200) < 1e-5


def test_ways_of_relative_positions_cross_between_the_lengths_measured(gpu):
    def rows(name, direction, times, **options):
        case = gpu._gpu_toeplitz.Case(0, H=16, dtype="bfloat16", direction=direction, **options)
        return [{"contender": name, **case._replace(n=n)._asdict(), "median_ms": ms} for n, ms in times.items()]

    ours = gpu._gpu_toeplitz.NAME
    measured = rows(ours, "forward", {1024: 1.0, 4096: 16.0, 16384: 256.0}, method="tiles")
    measured += rows(ours, "forward", {1024: 2.0, 4096: 8.0, 16384: 32.0}, method="fft")
    measured += rows(gpu.FLASH, "forward", {1024: 0.5, 4096: 8.0}, method="tiles")
    found = {(x["faster"], x["than"]): x["from_n"] for x in gpu._gpu_toeplitz.crossovers(measured)}
    # half as fast and twice as fast a factor of 4 apart: in the middle of the two
    assert found["rpe fft M=64", "rpe tiles M=64"] == 2048
    assert found["rpe tiles M=64", gpu.FLASH] is None
    assert found["rpe fft M=64", gpu.FLASH] == 4096


def test_time_of_exact_attention_is_predicted_by_the_square_of_the_length(gpu):
    measurement = gpu.Measurement({}, deadline=0.0)
    case = gpu.Case(1 << 20, H=16, dtype="bfloat16")
    measurement.seconds = {(gpu.FLASH, "bfloat16", "forward", n): s for n, s in ((16384, 0.002), (65536, 0.022))}
    assert measurement.predicted(gpu.FLASH, case) == 0.022 * 256
    assert measurement.predicted(gpu.FLASH, case._replace(direction="backward")) > 10


def test_out_of_time_is_said_for_each_call_not_run(gpu):
    measurement = gpu.Measurement({}, deadline=0.0)
    measurement.measure(gpu.Case(4096, H=16))
    assert gpu.table(measurement.rows)[1][-1] == "not run: out of time"


def test_without_a_gpu_one_sentence_and_exit_code_2(gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert gpu.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "NVIDIA GPU" in err
