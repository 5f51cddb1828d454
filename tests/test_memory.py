"""`longattn memory`: its parts are the total, depth costs parameters alone, and a step takes what was predicted."""

import json

import pytest

from longattn import native
from longattn.cli import _budget, _measure, _model, memory
from longattn.cli.main import main
from longattn.models import Reformer

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="what is counted are the kernels' tensors")

SMALL = {"length": 2048, "layers": 4, "dim": 32, "heads": 2, "feed_forward_chunk": 256}


def budget(**given):
    settings = _model.DEFAULTS | SMALL | given
    config = _model.config(settings)
    return _budget.Budget(config, settings["length"], settings["batch"], settings["dtype"], 1)


def run(*arguments):
    return main(["memory", "--threads", "1", *map(str, arguments)])


# the prediction


@pytest.mark.parametrize("mechanism", _model.MECHANISMS)
@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("dtype", _model.DTYPES)
def test_parts_are_the_total_and_the_peak_is_the_fullest_moment(mechanism, reversible, dtype):
    found = budget(mechanisms=mechanism, reversible=reversible, dtype=dtype)
    moments = found.moments()
    assert [moment.name for moment in moments] == ["attention", "feed-forward", "loss", "optimiser"]
    for moment in moments:
        assert set(moment.parts) == set(memory.NAMES)
        assert min(moment.parts.values()) >= 0
        assert moment.total == sum(moment.parts.values())
        assert moment.parts["parameters"] == 4 * found.parameters
        assert moment.total <= found.peak().total
    assert (found.peak().parts["kept"] > 0) is not reversible


@pytest.mark.parametrize("names", ["lsh", "local", "lsh,local,exact", "linear,favor"])
@pytest.mark.parametrize("options", [{}, {"head_dim": 24, "hidden": 40, "layers": 5, "length": 1000}])
def test_parameters_are_those_of_the_model(names, options):
    settings = _model.DEFAULTS | SMALL | {"mechanisms": names} | options
    model = Reformer(_model.config(settings))
    assert budget(mechanisms=names, **options).parameters == sum(p.numel() for p in model.parameters())


def test_a_reversible_layer_costs_its_parameters_gradients_and_optimiser_alone():
    shallow, deep = (budget(mechanisms="local", layers=n) for n in (6, 24))
    more = deep.parameters - shallow.parameters
    # parameters, gradients, Adam's two means, in float32
    assert deep.moments()[0].total - shallow.moments()[0].total == 16 * more
    plain = [budget(mechanisms="local", layers=n, reversible=False).peak().total for n in (6, 24)]
    # at least what enters norm, projections, attention, output and feed-forward of each layer
    assert plain[1] - plain[0] > 18 * 8 * deep.stream


def test_tokens_and_chunks_cost_in_proportion():
    sizes = ((8192, 1), (16384, 1), (8192, 2))
    first, second, batched = (budget(length=n, batch=b).moments()[0] for n, b in sizes)
    for part in ("streams", "block"):
        assert first.parts[part] * 2 == second.parts[part] == batched.parts[part]
    narrow, wide = (budget(feed_forward_chunk=n).moments()[1].parts["block"] for n in (256, 512))
    assert wide - narrow == 256 * 4 * (3 * 128 + 2 * 32)


def test_lsh_keeps_orders_and_ranks_of_each_round():
    one, three = (budget(mechanisms="lsh", n_hashes=n).cycle[0].bookkeeping for n in (1, 3))
    assert three - one == 2 * 8 * SMALL["length"] * SMALL["heads"]


def test_a_prediction_of_any_depth_is_immediate():
    assert budget(layers=2**40, mechanisms="lsh,local").peak().total > 2**40
    # what is summed in closed form is the sum over layers
    assert budget(layers=7, mechanisms="lsh,local").parameters == (
        budget(layers=1, mechanisms="lsh").parameters
        + 3 * sum(budget(mechanisms="lsh").cycle[0].parameters)
        + 3 * sum(budget(mechanisms="local").cycle[0].parameters)
    )


# the command


def test_a_step_takes_what_was_predicted(tmp_path, capsys):
    shape = ("--layers", 2, "--dim", 64, "--heads", 2, "--length", 8192, "--mechanisms", "lsh,local")
    assert run(*shape, "--measure", "--json", tmp_path / "a.json") == 0
    output = capsys.readouterr()
    assert output.err == ""
    for part in ("predicted  ", "measured   ", "parameters", "optimiser", "gradients", "streams", "loss", "in all"):
        assert part in output.out
    document = json.loads((tmp_path / "a.json").read_text())
    peak, found = document["peak"], document["measured_bytes"]
    assert document["settings"]["mechanisms"] == "lsh,local"
    assert peak["bytes"] == sum(peak["parts"].values())
    assert peak["bytes"] == max(moment["bytes"] for moment in document["moments"].values())
    assert document["predicted_to_measured"] == pytest.approx(peak["bytes"] / found)
    # 15 %, and the pages of the process around it
    assert peak["bytes"] == pytest.approx(found, rel=0.15, abs=4e6)


def test_nothing_runs_unless_measured(monkeypatch, capsys):
    monkeypatch.setattr(_measure, "call", lambda *_: pytest.fail("a process was started"))
    assert run("--length", 2**20, "--dim", 1024, "--layers", 96) == 0
    output = capsys.readouterr().out
    assert "GB" in output
    assert "measured" not in output


def test_a_measurement_that_fails_is_a_sentence(monkeypatch, capsys):
    def killed(*_):
        raise _measure.WorkerError("the worker process was killed, perhaps for its memory (exit code -9)")

    monkeypatch.setattr(_measure, "call", killed)
    assert run("--length", 64, "--dim", 16, "--measure") == 1
    output = capsys.readouterr()
    assert "predicted  " in output.out
    assert output.err == (
        "longattn memory: the step could not be measured: the worker process was killed, perhaps for its memory "
        "(exit code -9)\n"
    )


MISUSE = {
    "length zero": (["--length", "0"], "--length"),
    "layers not a number": (["--layers", "many"], "'many'"),
    "heads that do not divide": (["--heads", "3"], "multiple of heads"),
    "unknown mechanism": (["--mechanism", "magic"], "'magic'"),
    "unknown dtype": (["--dtype", "float8"], "'float8'"),
    "threads zero": (["--threads", "0"], "--threads"),
    "json in a missing folder": (["--json", "no/such/x.json"], "does not exist"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_bad_input_gets_one_sentence(name, capsys):
    arguments, part = MISUSE[name]
    assert run(*arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("longattn memory: ")
    assert part in output.err
    assert output.err.count("\n") == 1


def test_without_the_kernels_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(native, "missing", lambda: "the extension was not built: no compiler")
    assert run() == 1
    assert capsys.readouterr().err == (
        "longattn memory: what is counted are the tensors of the compiled kernels; the extension was not built: "
        "no compiler\n"
    )
