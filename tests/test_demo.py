"""`longattn demo`: its arithmetic, its measurements, its manners."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from torch.nn import functional as F

from longattn._memory import PeakMemory
from longattn.cli import _compare, _measure, _table, _text, _train, _units, demo
from longattn.cli._attentions import Shape
from longattn.cli._compare import BreakEven, Point
from longattn.cli.main import main
from longattn.models import ByteLM

SAMPLE = b"Where it is a duty to worship the sun, it is pretty sure to be a crime to examine the laws of heat. " * 30


@pytest.fixture
def sample(tmp_path):
    # a name that neither rich nor matplotlib may interpret
    file = tmp_path / "[b]sample$_$.txt"
    file.write_bytes(SAMPLE)
    return file


# the text


def test_byte_entropy_of_known_distributions():
    assert _text.byte_entropy(b"aaaa") == 0
    assert _text.byte_entropy(b"abab") == pytest.approx(1)
    assert _text.byte_entropy(b"aaab") == pytest.approx(2 - 0.75 * math.log2(3))
    assert _text.byte_entropy(bytes(range(256)) * 3) == pytest.approx(8)


def test_bigram_entropy_of_known_pairs():
    # pairs aa, ab: after a either follows
    assert _text.bigram_entropy(b"aab") == pytest.approx(1)
    # pairs ab, ba, ab, ba: each byte determines the next
    assert _text.bigram_entropy(b"ababa") == pytest.approx(0, abs=1e-12)
    # a is followed by a, b, b, b (H = 2 - 0.75 log2 3), b by a, a (H = 0)
    assert _text.bigram_entropy(b"aababab") == pytest.approx(4 / 6 * (2 - 0.75 * math.log2(3)))


def test_training_and_held_out_are_the_text():
    text = _text.Text("", SAMPLE[:1005])
    assert text.training + text.held_out == SAMPLE[:1005]
    assert len(text.held_out) == 100


def test_standard_library_is_sorted_sources():
    data = _text.standard_library().data
    assert len(data) > 1_000_000
    assert data.index(b"def total_ordering(") < data.index(b"class TextWrapper:")


# the comparison


def test_lengths_halve_from_the_longest():
    assert _compare.lengths(1000, 128) == [250, 500, 1000]
    assert _compare.lengths(64, 128) == [64]


def test_break_even_of_power_laws_is_where_they_cross():
    at = [128, 256, 512, 1024, 2048]
    found = _compare.break_even(at, [1e-9 * n**2 for n in at], [3e-7 * n for n in at])
    assert found.below is False
    assert found.length == pytest.approx(300)


def test_break_even_takes_the_last_crossing():
    found = _compare.break_even([1, 10, 100, 1000], [1, 9, 1, 100], [3, 1, 3, 3])
    assert 100 < found.length < 1000


def test_break_even_below_and_nowhere():
    assert _compare.break_even([128, 256], [4, 9], [1, 1]) == BreakEven(128.0, below=True)
    assert _compare.break_even([128, 256], [1, 1], [2, 2]) == BreakEven(None)
    assert _compare.break_even([], [], []) == BreakEven(None)


@pytest.fixture
def measured(monkeypatch):
    """Replaces measuring: exact takes n^2 microseconds, the others 100 n. Returns what was asked for."""
    asked = []

    def call(function, mechanism, length, *_):
        asked.append((mechanism, length))
        seconds = 1e-6 * length**2 if mechanism == "exact" else 1e-4 * length
        return Point(mechanism, length, True, seconds, length, 2 * seconds, 10 * length)

    monkeypatch.setattr(_measure, "call", call)
    return asked


def all_points(**limits):
    at = [100, 200, 400, 800, 1600]
    return list(_compare.points(at, shape=Shape(2, 8), threads=1, seed=0, **limits))


def test_points_beyond_the_time_limit_are_predicted_and_say_so(measured):
    found = all_points(limit_s=0.5, memory=10**9)
    assert len(found) == 20
    assert [(p.mechanism, p.length) for p in found if p.measured] == measured
    exact = {p.length: p for p in found if p.mechanism == "exact"}
    # 3 n^2 microseconds reach 0.5 s between 400 and 800
    assert [n for n, p in exact.items() if not p.measured] == [800, 1600]
    assert exact[1600].forward_s == pytest.approx(1e-6 * 1600**2)
    assert exact[1600].training_s == pytest.approx(2e-6 * 1600**2)
    linear = {p.length: p for p in found if p.mechanism == "linear"}
    assert linear[1600].measured
    assert _compare.break_evens(found)["linear"]["forward"].length == pytest.approx(100)


def test_points_beyond_the_memory_are_predicted(measured):
    found = all_points(limit_s=1e9, memory=400 * 16 * 16 + 4000)
    assert {p.length for p in found if p.measured} == {100, 200, 400}


def test_scores_are_four_bytes_for_each_pair_and_head():
    assert _compare.scores_bytes(65_536, 4) == 4 * 4 * 65_536**2


# measuring in fresh processes


def allocate(megabytes):
    """Frees a block before and holds another of twice the size for a moment, beside one of 8 MB outside."""
    outside = torch.ones(2 * 10**6)
    torch.ones(megabytes * 10**6 // 4)
    with PeakMemory() as peak:
        torch.ones(megabytes * 10**6 // 2)
    yield peak.bytes, float(outside.sum())


def identity():
    yield os.getpid()
    time.sleep(60)


def fail():
    yield 1
    raise ValueError("a reason")


def die():
    yield os._exit(3)


def test_peak_memory_is_what_was_held_at_once():
    size, _ = _measure.call(allocate, 50)
    assert 99e6 < size < 106e6


def test_leaving_a_stream_ends_its_process():
    values = _measure.stream(identity)
    pid = next(values)
    assert pid != os.getpid()
    assert psutil.pid_exists(pid)
    values.close()
    assert not psutil.pid_exists(pid)


def test_failures_of_a_worker_are_sentences():
    values = _measure.stream(fail)
    assert next(values) == 1
    with pytest.raises(_measure.WorkerError, match="ValueError: a reason"):
        next(values)
    with pytest.raises(_measure.WorkerError, match="exit code 3"):
        _measure.call(die)


# the model


def text_of(length):
    return torch.frombuffer(bytearray(SAMPLE[:length]), dtype=torch.uint8)[None]


def model_of(**arguments):
    torch.manual_seed(0)
    model = ByteLM(width=16, heads=2, **arguments)
    # the zero initial weights hide most of the model
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def test_later_bytes_do_not_change_earlier_predictions():
    model, text = model_of(), text_of(200)
    changed = text.clone()
    changed[:, 120:] = 7
    before, after = model(text), model(changed)
    assert torch.equal(before[:, :120], after[:, :120])
    assert not torch.equal(before[:, 120], after[:, 120])


def test_loss_in_chunks_is_the_cross_entropy(monkeypatch):
    monkeypatch.setattr(ByteLM, "loss_chunk", 64)
    model, text = model_of(), text_of(201).expand(2, -1)
    expected = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten().long())
    torch.testing.assert_close(model.loss(text), expected)


def test_recomputing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        model = model_of(recompute=recompute)
        model.loss(text_of(201)).backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_training_follows_the_seed_and_learns():
    plan = _train.Plan(length=256, steps=30, seconds=1, seed=3, threads=1, width=32, heads=2, layers=1)
    runs = [list(_train.train(SAMPLE, SAMPLE[:500], plan)) for _ in range(2)]
    losses = [[s.bits_per_byte for s in run[:-1]] for run in runs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == runs[0][-1].steps == 30
    assert runs[0][-1].held_out_bits < _text.byte_entropy(SAMPLE) - 1


def test_learning_rate_rises_stays_and_falls_to_zero():
    factors = [_train.rate_factor(step, step / 100) for step in range(100)]
    assert factors[0] == 0.25
    assert max(factors) == factors[20] == 1
    assert 0 < factors[99] < 0.02


# the command


def test_quantities_have_three_digits_and_a_unit():
    assert [_units.seconds(x) for x in (1.2e-4, 0.0345, 5.214, 119, 300, 36000)] == [
        "120 us", "34.5 ms", "5.21 s", "119 s", "5.0 min", "10.0 h",
    ]  # fmt: skip
    assert [_units.size(x) for x in (291_000, 1.37e6, 549e6, 51.5e9, 4.4e12)] == [
        "291 kB", "1.37 MB", "549 MB", "51.5 GB", "4.40 TB",
    ]  # fmt: skip


BAD = {
    "missing file": (["--text", "no/such/file"], "does not exist"),
    "folder": (["--text", "."], "is a folder"),
    "empty file": (["--text", "empty"], "0 bytes"),
    "ten bytes": (["--text", "ten"], "10 bytes"),
    "length beyond the file": (["--text", "thousand", "--length", "1000"], "--length 899 or less"),
    "default length beyond the file": (["--text", "thousand"], "beyond"),
    "length not a number": (["--length", "long"], "'long'"),
    "length zero": (["--length", "0"], "'0'"),
    "length negative": (["--length", "-5"], "'-5'"),
    "steps zero": (["--steps", "0"], "--steps"),
    "steps not whole": (["--steps", "1.5"], "--steps"),
    "seconds nan": (["--seconds", "nan"], "--seconds"),
    "seconds negative": (["--seconds", "-1"], "--seconds"),
    "seed negative": (["--seed", "-1"], "--seed"),
    "threads zero": (["--threads", "0"], "--threads"),
    "picture in a missing folder": (["--output", "no/such/folder/x.png"], "does not exist"),
    "picture of another kind": (["--output", "x.jpeg"], ".png"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence_and_exit_code_2(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for file, size in {"empty": 0, "ten": 10, "thousand": 1000}.items():
        (tmp_path / file).write_bytes(SAMPLE[:size])
    arguments, part = BAD[name]
    assert main(["demo", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("longattn demo: ")
    assert part in output.err
    assert output.err.count("\n") == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read and write everything")
def test_unreadable_file_and_unwritable_folder(sample, tmp_path, capsys):
    folder = tmp_path / "closed"
    folder.mkdir(0o500)
    assert main(["demo", "--output", str(folder)]) == 2
    sample.chmod(0)
    assert main(["demo", "--text", str(sample), "--output", str(tmp_path)]) == 2
    assert "cannot be read: Permission denied" in capsys.readouterr().err


def test_missing_kernels_at_a_long_length_are_said(monkeypatch, capsys):
    monkeypatch.setattr(demo.native, "missing", lambda: "no compiler was found")
    assert main(["demo"]) == 2
    assert "no compiler was found" in capsys.readouterr().err


def test_missing_extras_are_named(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(SystemExit) as end:
        main(["demo"])
    assert end.value.code == 2
    assert "matplotlib" in capsys.readouterr().err


def test_plain_output_tells_the_whole_story(sample, tmp_path, capsys):
    arguments = ["--text", str(sample), "--length", "256", "--steps", "2", "--output", str(tmp_path)]
    assert main(["demo", *arguments]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    for part in ("(the line to beat)", "faster than exact", "lsh, recall at", "step    2", "held out", "picture: "):
        assert part in output.out
    assert (tmp_path / demo.PICTURE).read_bytes().startswith(b"\x89PNG")


def command(*arguments):
    return [sys.executable, "-m", "longattn", "demo", *map(str, arguments)]


def test_json_document(sample, tmp_path):
    picture = tmp_path / "out.svg"
    arguments = ("--text", sample, "--length", 256, "--steps", 2, "--threads", 1, "--json", "--output", picture)
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    assert document["ended"] == "complete"
    assert document["text"]["bytes"] == len(SAMPLE)
    assert document["text"]["byte_entropy_bits"] == pytest.approx(_text.byte_entropy(SAMPLE))
    points = document["comparison"]["points"]
    assert [(p["mechanism"], p["length"]) for p in points] == [
        (name, n) for n in (128, 256) for name in _compare.MECHANISMS
    ]
    assert all(p["measured"] and p["forward_s"] > 0 and p["training_s"] > 0 for p in points)
    # the output and a gradient of each input at least; queries of LSH are its keys
    tensors = {"lsh": 2.5}
    assert all(p["training_bytes"] > tensors.get(p["mechanism"], 3) * 4 * 512 * p["length"] for p in points)
    assert set(document["comparison"]["break_even"]["linear"]) == {"forward", "training"}
    errors = {p["mechanism"]: p["error"] for p in points if p["length"] == 256}
    assert errors["exact"] is errors["linear"] is None
    assert 0 < errors["favor"] < 1
    recalls = {p["mechanism"]: (p["recall"], p["unrelated_recall"]) for p in points if p["length"] == 256}
    assert [name for name, found in recalls.items() if found != (None, None)] == ["lsh"]
    assert 0 < recalls["lsh"][1] <= recalls["lsh"][0] <= 1 + 1e-6
    training = document["training"]
    assert [step["step"] for step in training["steps"]] == [1, 2]
    assert training["result"]["steps"] == 2
    assert training["result"]["peak_bytes"] > 0
    assert training["exact_attention_of_one_layer"]["measured"] is True
    assert document["picture"] == str(picture)
    assert "<svg" in picture.read_text()


def test_recall_is_of_clusters_at_affordable_lengths_and_said_for_the_longest():
    shape = Shape(2, 64)
    rows = _compare.clusters(1024, shape, seed=0)
    assert rows.shape == (1, 2, 1024, 64)
    assert rows.var().item() == pytest.approx(1, rel=0.05)
    # the nearest other row is one of the same cluster
    near = torch.nn.functional.normalize(rows, dim=-1)
    assert (near @ near.mT - torch.eye(1024)).amax(-1).mean() > 0.85
    recall, unrelated = _compare._recalls("lsh", 1024, shape, 0)
    assert 0.8 < recall < 1 + 1e-6
    assert unrelated < recall
    assert _compare._recalls("lsh", 2 * _compare.RECALL_LENGTH, shape, 0) == (None, None)
    assert _compare._recalls("favor", 1024, shape, 0) == (None, None)
    costs = (0.1, 1, 0.3, 2, None)
    points = [
        Point("lsh", n, True, *costs, *found) for n, found in ((512, (0.9, 0.5)), (1024, (recall, 0.25)), (4096, ()))
    ]
    assert _table.recall_sentence(points).startswith(
        f"lsh, recall at 1,024 tokens: {100 * recall:.0f} % in clusters of 64, 25 %"
    )
    assert _table.recall_sentence(points[2:]) is None


def test_interruption_keeps_what_was_measured_and_leaves_nothing_running(sample, tmp_path):
    picture = tmp_path / "out.png"
    arguments = ("--text", sample, "--length", 128, "--seconds", 300, "--threads", 1, "--json", "--output", picture)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # a background job of a shell inherits that Ctrl-C is ignored
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(command(*arguments), **pipes, **heard)
    lines = []
    while not lines or "step" not in lines[-1]:
        lines.append(process.stderr.readline())
        assert process.poll() is None, lines
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    last = err.splitlines()[-1]
    assert last.startswith("longattn demo: interrupted; kept 4 of the points and ")
    assert "Traceback" not in err
    document = json.loads(out)
    assert document["ended"] == "interrupted"
    assert document["training"]["steps"]
    assert document["training"]["result"] is None
    assert picture.exists()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
