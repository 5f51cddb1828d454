"""`longattn bench`: what it measures, what it predicts, what it writes, its manners."""

import csv
import importlib.util
import json

import pytest
import torch
from torch.nn import functional as F

from longattn.cli import _attentions, _measure, _plot, _table, bench
from longattn.cli._attentions import ATTENTIONS, Shape
from longattn.cli._compare import Point
from longattn.cli.main import main

# microseconds of a forward pass, for each token or each pair
COSTS = {"exact": 1, "softmax": 0.5, "linear": 300, "lsh": 1000, "hf-lsh": 5000}


@pytest.fixture
def measured(monkeypatch):
    """Replaces measuring by arithmetic; what it returns may hold a failure, by name and length."""
    failures = {}

    def call(function, mechanism, length, shape, threads, seed, wanted):
        if (mechanism, length) in failures:
            raise failures[mechanism, length]
        seconds = 1e-6 * COSTS[mechanism] * length ** ATTENTIONS[mechanism].power
        memory = 100 * length if wanted.memory else None
        training = (2 * seconds, memory) if wanted.backward else (None, None)
        return Point(mechanism, length, True, seconds, memory, *training, forward_spread=0.05)

    monkeypatch.setattr(_measure, "call", call)
    return failures


def run(*arguments):
    return main(["bench", "--no-peers", "--threads", "1", *map(str, arguments)])


def test_a_real_run_writes_what_it_measured(tmp_path, capsys):
    files = {name: tmp_path / f"out.{name}" for name in ("json", "csv", "png")}
    written = ("--json", files["json"], "--csv", files["csv"], "--plot", files["png"])
    options = ("--length", 300, "--heads", 1, "--head-dim", 8, "--batch", 2, "--no-causal", "--backward", "--memory")
    assert run("--mechanism", "lsh", *options, *written) == 0
    document = json.loads(files["json"].read_text())
    assert document["ended"] == "complete"
    assert document["shape"] == {
        "heads": 1, "head_dim": 8, "batch": 2, "dtype": "float32", "device": "cpu", "causal": False,
    }  # fmt: skip
    assert [(p["mechanism"], p["length"], p["measured"]) for p in document["points"]] == [
        ("exact", 300, True), ("lsh", 300, True),
    ]  # fmt: skip
    for point in document["points"]:
        assert 0 < point["forward_s"] < point["training_s"]
        assert point["forward_spread"] >= 0
        assert 0 <= point["forward_bytes"] <= point["training_bytes"]
        assert point["error"] is point["recall"] is None
    with files["csv"].open() as stream:
        rows = list(csv.DictReader(stream))
    exact, lsh = document["points"]
    assert float(rows[1]["speed_up"]) == pytest.approx(exact["training_s"] / lsh["training_s"])
    assert rows[1]["causal"] == "False"
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr()
    assert output.err == ""
    for part in ("Attention, float32, 1 heads of 8, batch 2", "n = 300  lsh  forward", "+ backward", "written: "):
        assert part in output.out


def test_only_what_was_asked_for_is_measured(measured, capsys):
    assert run("--mechanism", "linear,softmax", "--length", "100,1000") == 0
    output = capsys.readouterr().out
    assert "memory" not in output
    assert "backward" not in output
    # n^2 and 300 n microseconds
    assert "linear, forward: faster than exact from 300 tokens on (where the measured curves cross)" in output
    assert "softmax, forward: faster than exact from 100 tokens on (the shortest measured)" in output
    assert "lsh" not in output


def test_what_would_take_too_long_is_predicted_and_marked(measured, tmp_path, capsys):
    path = tmp_path / "out.csv"
    assert run("--mechanism", "linear", "--length", "1000,4000", "--limit", 10, "--csv", path) == 0
    assert "~16.0 s" in capsys.readouterr().out
    with path.open() as stream:
        rows = {(row["mechanism"], row["length"]): row for row in csv.DictReader(stream)}
    assert rows["exact", "4000"]["measured"] == "False"
    assert float(rows["exact", "4000"]["forward_s"]) == pytest.approx(16)
    assert rows["linear", "4000"]["measured"] == "True"
    assert float(rows["linear", "4000"]["speed_up"]) == pytest.approx(16 / 1.2)
    assert rows["linear", "4000"]["training_s"] == ""


def test_without_rich_there_are_plain_lines(measured, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else find(name))
    assert run("--mechanism", "linear", "--length", "100,1000", "--backward", "--memory") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "n = 1,000  linear  forward 300 ms, 100 kB  + backward 600 ms, 100 kB  3.33x exact" in lines
    header = next(i for i, line in enumerate(lines) if line.startswith("length"))
    assert lines[header].split() == [
        "length",
        "attention",
        "forward",
        "±",
        "memory",
        "+",
        "backward",
        "memory",
        "speed-up",
    ]
    assert lines[header + 4].split() == [
        "linear",
        "300",
        "ms",
        "5",
        "%",
        "100",
        "kB",
        "600",
        "ms",
        "100",
        "kB",
        "3.33x",
    ]
    assert len({line.rfind("x") for line in lines[header + 2 : header + 5 : 2]}) == 1


@pytest.mark.parametrize(("name", "code"), [("hf-lsh", 0), ("lsh", 1)])
def test_one_that_fails_leaves_the_others(name, code, measured, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "missing", lambda name: None if name != "reformer-pytorch" else "not here")
    measured[name, 200] = _measure.WorkerError("AssertionError: 200 is odd")
    path = tmp_path / "out.json"
    arguments = ["--mechanism", "lsh", "--length", "100,200,400", "--json", str(path)]
    assert main(["bench", *arguments]) == code
    output = capsys.readouterr()
    sentence = f"{name} did not run at 200: AssertionError: 200 is odd"
    assert sentence in output.out
    assert (sentence in output.err) is bool(code)
    document = json.loads(path.read_text())
    assert document["failures"] == [sentence]
    lengths = [p["length"] for p in document["points"] if p["mechanism"] == name]
    assert lengths == [100]
    assert sum(p["mechanism"] == "exact" for p in document["points"]) == 3


def test_an_interruption_keeps_what_there_is(measured, capsys, tmp_path):
    measured["linear", 1000] = KeyboardInterrupt()
    path = tmp_path / "out.json"
    assert run("--mechanism", "linear", "--length", "100,1000", "--json", path) == 130
    assert "interrupted; kept 3 points" in capsys.readouterr().err
    document = json.loads(path.read_text())
    assert document["ended"] == "interrupted"
    assert len(document["points"]) == 3


BAD = {
    "mechanism": (["--mechanism", "quadratic"], "--mechanism must be one of exact, softmax"),
    "length": (["--length", "10,x"], "--length must be a whole number"),
    "dtype": (["--dtype", "int8"], "--dtype must be one of float32"),
    "device": (["--device", "tpu"], "--device must be one of cpu, cuda"),
    "heads": (["--heads", "0"], "--heads must be"),
    "head dim": (["--head-dim", "-3"], "--head-dim must be"),
    "limit": (["--limit", "0"], "--limit must be a positive"),
    "plot": (["--plot", "x.jpeg"], "must end in .png"),
    "json": (["--json", "no/such/folder/x.json"], "does not exist"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_gets_one_sentence_and_exit_code_2(what, capsys):
    arguments, part = BAD[what]
    assert run(*arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("longattn bench: ")
    assert part in output.err
    assert output.err.count("\n") == 1


def test_a_package_that_is_not_here_is_named(monkeypatch, capsys):
    monkeypatch.setattr(_attentions.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "--mechanism", "performer-pytorch"]) == 2
    assert "needs performer-pytorch; pip install performer-pytorch" in capsys.readouterr().err
    assert "performer-pytorch" not in bench._peers(tuple(ATTENTIONS))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here_is_said(capsys):
    assert run("--device", "cuda") == 2
    assert "torch finds none" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_attention_attends(name, causal):
    if _attentions.missing(name):
        pytest.skip(_attentions.missing(name))
    shape = Shape(heads=2, head_dim=16, batch=2, causal=causal)
    attend = ATTENTIONS[name].make(shape, 256)
    torch.manual_seed(0)
    q, k, v = (0.4 * torch.randn(2, 2, 256, 16) for _ in range(3))
    v.requires_grad_()
    # as a measurement does: a short call, then one of the length
    attend(q[:, :, :128], k[:, :, :128], v[:, :, :128])
    output = attend(q, k, v)
    assert output.shape == v.shape
    (gradient,) = torch.autograd.grad(output.sum(), v)
    assert gradient.isfinite().all()
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    if name in ("exact", "softmax"):
        torch.testing.assert_close(output, exact)
    if name in ("favor", "performer-pytorch"):
        # the mean of the values is about as far as 0 is
        assert (output - exact).norm() < (exact - 0).norm()
    if causal:
        # the last key is seen by the last query alone
        assert gradient[:, :, -1].abs().sum() < gradient[:, :, 0].abs().sum()


def test_pictures_mark_where_curves_cross(tmp_path):
    points = [
        Point(name, n, True, 1e-6 * COSTS[name] * n ** ATTENTIONS[name].power, None, None, None)
        for n in (100, 1000)
        for name in ("exact", "linear")
    ]
    path = tmp_path / "out.svg"
    _plot.save_comparison(str(path), title="a title", points=points, shape=Shape())
    # text is drawn as paths, and named in comments
    assert "<!-- 300 -->" in path.read_text()
    assert "1,000" in _table.line(points[-1], points, Shape())
