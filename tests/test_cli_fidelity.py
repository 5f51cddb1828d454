"""`longattn fidelity`: the built-in example, models of one's own, and its manners."""

import json
import sys
import textwrap

import pytest
import torch

from longattn import Favor, fidelity_report
from longattn.cli import fidelity
from longattn.cli.main import main

# the reference is chosen where nothing was compiled, and says so
pytestmark = pytest.mark.filterwarnings("ignore:linear_attention. only the dense reference")

FACTORIES = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 3, 32, batch_first=True), 2)
    return encoder, {"src": torch.randn(2, 10, 24), "mask": nn.Transformer.generate_square_subsequent_mask(10)}

def not_a_pair():
    return nn.Linear(2, 2)

def no_attention():
    return nn.Linear(2, 2), torch.zeros(1, 2)

def no_call():
    return nn.ModuleDict({"attention": nn.MultiheadAttention(24, 3)}), 7

constant = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a module of factories in it that no other test has imported."""
    (tmp_path / "factories.py").write_text(textwrap.dedent(FACTORIES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "factories", raising=False)
    yield tmp_path
    sys.modules.pop("factories", None)


def output(capsys, *argv):
    assert main(["fidelity", *argv]) == 0
    return capsys.readouterr()


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_json_is_the_report_of_the_model(folder, capsys):
    options = {"features": 64, "kind": "hyperbolic", "normalize": "l2", "temperature": 0.5, "scaling": "regularized"}
    given = [f"--{name}={value}" for name, value in options.items()]
    path = list(sys.path)
    document = json.loads(output(capsys, "factories:model", *given, "--seed=3", "--independent", "--json").out)
    assert sys.path == path
    model, batch = sys.modules["factories"].model()
    favor = Favor(8, 64, "hyperbolic", False, "regularized", "l2", 0.5, 3)
    assert document == json.loads(fidelity_report(model, batch, favor, quiet=True).to_json())
    assert [row["layer"] for row in document["rows"][::3]] == ["layers.0.self_attn", "layers.1.self_attn"]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("option", ["--center-keys", "--exact-diagonal"])
def test_switches_reach_the_map(option, folder, capsys):
    plain, switched = (
        json.loads(output(capsys, "factories:model", "--json", *extra).out) for extra in ([], [option])
    )
    assert f"{option[2:].replace('-', '_')}=True" in switched["mechanism"]
    errors = [[row["output_error"] for row in document["rows"]] for document in (plain, switched)]
    assert errors[0] != errors[1]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_table_without_json_and_text_without_rich(folder, capsys, monkeypatch):
    assert "layers.0" in output(capsys, "factories:model").out
    monkeypatch.setitem(sys.modules, "rich.console", None)
    text = output(capsys, "factories:model").out
    assert text.startswith("Linear(feature_map=Favor(8, n_features=256, kind='positive'))\nlayer ")


def test_built_in_example_runs_out_of_the_box(capsys, monkeypatch):
    monkeypatch.setattr(fidelity, "STEPS", 2)
    monkeypatch.setattr(fidelity, "SECONDS", 600.0)
    before = torch.get_rng_state()
    printed = output(capsys, "--json", "--features", "32")
    assert torch.equal(torch.get_rng_state(), before)
    rows = json.loads(printed.out)["rows"]
    assert {row["layer"] for row in rows} == {"blocks.0.attention", "blocks.1.attention"}
    assert all(row["output_error"] > 0 for row in rows)
    assert printed.err.startswith("the built-in example: ")
    assert json.loads(output(capsys, "--json", "--features", "32").out)["rows"] == rows
    assert json.loads(output(capsys, "--json", "--features", "32", "--seed", "1").out)["rows"] != rows


def test_built_in_example_learns(monkeypatch):
    monkeypatch.setattr(fidelity, "STEPS", 12)
    monkeypatch.setattr(fidelity, "SECONDS", 600.0)
    lines = []

    class Sink:
        def write(self, text):
            lines.append(text)

    fidelity._example(0, Sink())
    # 8 bits a byte before the first step
    assert float("".join(lines).split(", ")[1].split()[0]) < 6


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["factories"], "expected module:factory, a function that returns (model, batch), got 'factories'"),
        (["factories:"], "expected module:factory, a function that returns (model, batch), got 'factories:'"),
        (["factory:model"], "'factory' cannot be imported: No module named 'factory'"),
        (["factories:other"], "'factories' has no 'other'"),
        (["factories:constant"], "factories:constant must be a function that returns (model, batch), got int"),
        (["factories:not_a_pair"], "factories:not_a_pair must return (model, batch), an nn.Module and its input"),
        (["factories:no_attention"], "the model has no torch.nn.MultiheadAttention or longattn.nn.Multi"),
        (["factories:no_call"], "fidelity_report: batch must be a tensor, a tuple of arguments or a dict"),
        (["--features", "many"], "--features must be a whole number, got 'many'"),
        (["--features", "0"], "Favor: n_features must be a positive integer, got 0"),
        (["--kind", "cosine"], "Favor: kind must be one of 'positive', 'hyperbolic', 'relu', 'trig', got 'cosine'"),
        (["--normalize", "l1"], "Favor: normalize must be one of None, 'l2', got 'l1'"),
        (["--temperature", "nan"], "Favor: temperature must be a positive finite number, got nan"),
        (["--temperature", "warm"], "--temperature must be a number, got 'warm'"),
        (["--kind", "relu", "--exact-diagonal"], "Favor: exact_diagonal mixes the softmax kernel with its estimate"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence_with_exit_code_2(argv, sentence, folder, capsys):
    assert main(["fidelity", *argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"longattn fidelity: {sentence}")
    assert printed.err.count("\n") == 1
