"""The examples run, and do what they say, with tiny settings."""

import importlib.util
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("mechanism", "most"), [("exact", 1e-5), ("local", 0.5), ("lsh", 0.5)])
def test_an_encoder_with_replaced_attention(mechanism, most, capsys):
    sizes = ("--length", "320", "--dim", "32", "--heads", "2", "--layers", "2", "--mechanism", mechanism)
    found = load("encoder").main(sizes)
    assert found["restored"] == 0
    assert 0 <= found["change"] < most
    assert (found["change"] > 1e-3) is (mechanism != "exact")
    assert "2 of 2 attentions now compute" in capsys.readouterr().out


def test_a_hugging_face_model(capsys):
    pytest.importorskip("transformers", minversion="5")
    found = load("huggingface").main(["--length", "300", "--window", "32"])
    assert found["sdpa"] == 0
    assert found["longattn_exact"] < 1e-5
    assert 1e-4 < found["near"] < 1
    assert 1e-6 < found["longattn_lsh"] < 0.5
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("generated"))
    assert len(re.findall(r"\d+", line)) == 32


def test_long_documents_are_learnt(capsys):
    module = load("long_document")
    tokens, same = module.documents(200, 100, seed=1)
    digits = [[x for x in row if x >= module.LETTERS] for row in tokens.tolist()]
    assert all(len(row) == 2 for row in digits)
    assert [a == b for a, b in digits] == same.tolist()
    assert 60 < same.sum() < 140
    assert module.main(["--length", "256", "--steps", "60"]) > 0.9
    assert "step   60" in capsys.readouterr().out
