"""mechanism="auto": exact attention below a break-even length, another mechanism from there on; `longattn tune`."""

import json
import math
import re
import warnings

import pytest
import torch
from _attention import E, build, draw, gradients

import longattn
from longattn import Auto, Favor
from longattn.cli import tune
from longattn.cli.main import main
from longattn.nn import MultiheadAttention, auto
from longattn.nn.auto import Row, predicted, read, users_table, write
from longattn.testing.assertions import assert_same_bits

LOCAL, N = longattn.Local(4), 8


def row(length=100, **changes):
    return Row("cpu", "lsh", 64, False, "float32", 256.0, length, 8192)._replace(**changes)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache directory of the test's own."""
    monkeypatch.setenv("LONGATTN_CACHE", str(tmp_path))
    auto.forget()
    yield tmp_path
    auto.forget()


# which runs


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("L", "exact"), [(0, True), (1, True), (N - 1, True), (N, False), (30, False)])
def test_the_length_decides(L, exact, is_causal):
    module, x = build(Auto(LOCAL, break_even=N)), draw(2, L, E)
    other = build("exact" if exact else LOCAL)
    results = [m(x, x, x, need_weights=False, is_causal=is_causal)[0] for m in (module, other)]
    assert_same_bits("output", *results)
    for a, b in zip(*(gradients(m, y) for m, y in zip((module, other), results, strict=True)), strict=True):
        assert_same_bits("gradient", a, b)
    explained = longattn.explain(module, x, x, x, is_causal=is_causal)
    assert explained.chosen == ("Exact()" if exact else "Local(window=4)")
    assert str(explained).splitlines()[-1] == "  exact below 8 tokens, as given"


@pytest.mark.parametrize(("L", "S", "exact"), [(1, 1000, True), (5, 20, False), (5, 9, True), (6, 12, False)])
def test_other_keys_count_by_the_harmonic_mean(L, S, exact):
    assert (2 * L * S / (L + S) < N) == exact
    module, x, memory = build(Auto(LOCAL, break_even=N)), draw(2, L, E), draw(2, S, E)
    expected = build("exact" if exact else LOCAL)(x, memory, memory, need_weights=False)[0]
    assert_same_bits("output", module(x, memory, memory, need_weights=False)[0], expected)


def test_what_the_mechanism_cannot_honour_is_exact_at_any_length():
    module, exact, x = build(Auto(longattn.Linear(), break_even=N)), build(), draw(2, 12, E)
    band = torch.ones(12, 12, dtype=torch.bool).triu(2)
    biased = draw(2, 12, seed=3)
    memory = draw(2, 20, E)
    for inputs, masks in (
        ((x, x, x), {"attn_mask": band}),
        ((x, x, x), {"key_padding_mask": biased}),
        ((x, memory, memory), {"is_causal": True}),
    ):
        assert_same_bits("output", module(*inputs, **masks)[0], exact(*inputs, **masks)[0])
        assert longattn.explain(module, *inputs, **masks).chosen == "Exact()"
    plain = torch.zeros(2, 12).masked_fill(torch.arange(12) >= torch.tensor([[12], [5]]), -torch.inf)
    causal = torch.ones(12, 12, dtype=torch.bool).triu(1)
    for masks in ({"key_padding_mask": plain}, {"attn_mask": causal}, {"attn_mask": band, "is_causal": True}):
        assert longattn.explain(module, x, x, x, **masks).chosen == "Linear()"


def test_the_default_is_lsh_by_the_measured_table():
    module = MultiheadAttention(128, 2, mechanism="auto", causal=True)
    assert module.mechanism == Auto(longattn.LSH()) == Auto("lsh")
    n, source = module.mechanism.break_even_for(64, module.in_proj_weight, True)
    assert source == "measured for this package"
    assert 64 < n < 65536
    assert f"mechanism=Auto(LSH()) (exact below {n} tokens, measured for this package), causal=True" in repr(module)
    x = torch.zeros(n, 1, 128)
    assert longattn.explain(module, x, x, x).chosen == "LSH()"
    assert longattn.explain(module, x[1:], x[1:], x[1:]).chosen == "Exact()"
    # its counter of steps is the module's
    assert "draws.step" in module.state_dict()


def test_the_package_has_a_row_for_each_kind():
    rows = read(auto.MEASURED)
    found = {(row.kind, row.is_causal) for row in rows if row.device == "cpu" and row.dtype == "float32"}
    assert found >= {(kind, causal) for kind in ("lsh", "linear", "favor", "local") for causal in (False, True)}


def test_autocast_counts_as_its_dtype():
    write(users_table(), [row(50, kind="linear", work=1.0), row(90, kind="linear", work=1.0, dtype="bfloat16")], {})
    found, like = Auto("linear"), torch.zeros(1)
    assert found.break_even_for(64, like, False).length == 50
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert found.break_even_for(64, like, False).length == 90


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_module_keeps_one_graph_on_each_side():
    torch._dynamo.reset()
    module = build(Auto(longattn.Linear(), break_even=40)).eval()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for L in (70, 39, 40, 5, 1000, 64):
        x = draw(2, L, E, seed=L)
        torch._dynamo.mark_dynamic(x, 1)
        # below 64 tokens eager calls take torch's kernel, which a graph of every length does not
        torch.testing.assert_close(compiled(x, x, x, need_weights=False), module(x, x, x, need_weights=False))
    assert len(graphs) == 2


BAD = {
    "exact": (lambda: Auto("exact"), ValueError, "mechanism must be an efficient one, such as longattn.LSH(), got E"),
    "auto": (lambda: Auto(Auto()), ValueError, "such as longattn.LSH(), got Auto(LSH())"),
    "shared": (lambda: Auto(longattn.LSH(share_qk=True)), ValueError, "exact attention has keys of its own, LSH("),
    "length": (lambda: Auto(break_even=-1), ValueError, "Auto: break_even must be a length or None, got -1"),
    "bool": (lambda: Auto(break_even=True), ValueError, "got True"),
    "kind": (lambda: Auto(3), TypeError, "mechanism must be a name or a description"),
    "head_dim": (lambda: build(Auto(Favor(8))), ValueError, "the Favor is for head_dim 8, but the attention has"),
    "bias": (lambda: build("auto", add_bias_kv=True), ValueError, "add_bias_kv and add_zero_attn need mechanism="),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "sentence"), BAD.values(), ids=BAD)
def test_bad_descriptions_are_refused_in_a_sentence(call, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        call()


# the tables


TABLE = [
    row(100, work=100.0),
    row(300, work=300.0),
    row(900, work=300.0, is_causal=True),
    row(50, work=100.0, head_dim=128),
    row(None, work=100.0, dtype="bfloat16"),
]


@pytest.mark.parametrize(
    ("head_dim", "is_causal", "dtype", "work", "length"),
    [
        (64, False, "float32", 100.0, 100),
        (64, False, "float32", 200.0, 200),
        (64, False, "float32", 600.0, 600),
        # no less for less work: what does not depend on it is unknown
        (64, False, "float32", 10.0, 100),
        (64, True, "float32", 300.0, 900),
        (200, False, "float32", 100.0, 50),
        (32, False, "float32", 100.0, 100),
        (64, False, "bfloat16", 100.0, None),
        (64, False, "float16", 100.0, 100),
    ],
)
def test_the_nearest_rows_predict_a_length(head_dim, is_causal, dtype, work, length):
    rows = [x for x in TABLE if dtype == "bfloat16" or x.dtype == "float32"]
    assert predicted(rows, head_dim, is_causal, dtype, work) == length


def test_the_users_table_goes_first_and_keeps_other_rows(cache):
    found, like = Auto("lsh"), torch.zeros(1)
    write(users_table(), [row(1000), row(2000, is_causal=True)], {"machine": "a"})
    write(users_table(), [row(3000)], {"machine": "b"})
    assert users_table() == cache / "break_even.json"
    assert [x.name for x in cache.iterdir()] == ["break_even.json"]
    assert json.loads(users_table().read_text())["about"] == [{"machine": "a"}, {"machine": "b"}]
    assert read(users_table()) == [row(3000), row(2000, is_causal=True)]
    for is_causal, length in ((False, 3000 * 3), (True, 2000 * 2)):
        assert found.break_even_for(64, like, is_causal) == (length, "measured on this machine")
    # nothing of it is in the user's table
    assert Auto("linear").break_even_for(64, like, False).source == "measured for this package"


BROKEN = ["", "{}", '{"rows": [{"device": "cpu"}]}', '{"rows": [1]}']
BROKEN += [json.dumps({"rows": [row(**changes)._asdict()]}) for changes in ({"work": -1.0}, {"head_dim": "64"})]
BROKEN = [text.encode() for text in BROKEN] + [b"\xff\xfe"]


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_table_is_named_and_not_used(text, cache):
    users_table().write_bytes(text)
    with pytest.warns(UserWarning, match=r"break_even\.json is no table of break-even lengths: .*; it is not used"):
        found = Auto("lsh").break_even_for(64, torch.zeros(1), False)
    assert found.source == "measured for this package"


def test_places_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("LONGATTN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert users_table() == tmp_path / "xdg" / "longattn" / "break_even.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert users_table() == tmp_path / ".cache" / "longattn" / "break_even.json"


def test_where_nothing_was_measured_exact_attention_runs_and_says_so():
    found, like = Auto("linear"), torch.zeros(1, device="meta")
    with pytest.warns(UserWarning, match="no break-even length of linear is known on meta, so exact attention runs"):
        assert found.break_even_for(64, like, False).length is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found.chosen(10**6, 10**6, 64, like, False) == longattn.nn.Exact()
    assert found.note(64, like, False) == "exact at every length, not measured on meta; `longattn tune` does"
    assert Auto(longattn.NPRF(64)).note(64, like, False).endswith("says nothing of its work; pass break_even")


# longattn tune


@pytest.mark.parametrize("truth", [64, 65, 100, 777, 5000, 16384, None])
def test_the_search_encloses_the_break_even(truth):
    asked = []
    found = tune.search(lambda n: asked.append(n) or truth is None or n < truth, 16384)
    assert (found is None) == (truth is None)
    assert truth is None or truth <= found <= max(truth * tune.CLOSE, truth + tune.GRAIN)
    assert len(asked) < 24
    assert max(asked) <= 16384


def test_a_lucky_length_does_not_end_the_search():
    assert tune.search(lambda n: n < 1000 and n != 128, 16384) == pytest.approx(1000, rel=0.05)


def run(capsys, *argv):
    code = main(["tune", *argv])
    return code, *capsys.readouterr()


def test_a_quick_run_measures_and_writes(capsys):
    argv = ("local:window=8", "--head-dim", "8", "--heads", "1", "--longest", "128", "--seconds", "0.001")
    code, printed, _ = run(capsys, *argv, "--causal", "yes", "--threads", "1")
    assert code == 0
    (found,) = read(users_table())
    assert found.key == ("cpu", "local", 8, True, "float32", 8.0)
    assert found.limit == 128
    assert found.length is None or 64 <= found.length <= 128
    assert "local:window=8, head_dim 8, causal" in printed
    assert f"mechanism='auto' goes by {users_table()}" in printed
    assert json.loads(users_table().read_text())["about"][0]["threads"] == 1


def test_rows_are_what_was_measured(capsys, monkeypatch, tmp_path):
    # breaks even at so many tokens
    truth = {"linear": 200, "lsh": 1000, "favor": math.inf}
    monkeypatch.setattr(tune, "compare", lambda case, settings, n: truth[case.name.partition(":")[0]] / n)
    output = tmp_path / "table.json"
    code, printed, _ = run(capsys, "linear", "lsh:n_hashes=2", "favor", "--head-dim", "64", "--output", str(output))
    assert code == 0
    rows = {(row.kind, row.is_causal): row for row in read(output)}
    assert len(rows) == 6
    for name, n in truth.items():
        for is_causal in (False, True):
            length = rows[name, is_causal].length
            assert length is None if n == math.inf else n <= length <= n * 1.1
    assert rows["lsh", True].work == longattn.LSH(n_hashes=2).work(True)[1]
    assert re.search(r"favor, head_dim 64 +not up to 16,384 tokens", printed)


def test_an_interruption_keeps_what_was_measured(capsys, monkeypatch):
    def compare(case, settings, n):
        if case.is_causal:
            raise KeyboardInterrupt
        return 0.5

    monkeypatch.setattr(tune, "compare", compare)
    code, _, said = run(capsys, "linear", "--head-dim", "64")
    assert (code, said) == (130, "longattn tune: interrupted\n")
    assert [row.length for row in read(users_table())] == [64]


@pytest.mark.parametrize("given", [(), ("--output",)])
def test_a_broken_table_is_neither_measured_for_nor_lost(given, cache, capsys):
    users_table().write_text('{"rows": 3}')
    code, _, said = run(capsys, "linear", *given, *(str(users_table()) for _ in given))
    assert code == 2
    assert re.search(r"^longattn tune: .*break_even\.json is no table .*; remove it, and `longattn tune` writes", said)
    assert users_table().read_text() == '{"rows": 3}'


def test_rows_without_their_machine_are_kept(cache):
    users_table().write_text(json.dumps({"rows": [row(1000)._asdict()]}))
    write(users_table(), [row(2000, is_causal=True)], {"machine": "b"})
    assert read(users_table()) == [row(1000), row(2000, is_causal=True)]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["quick"], "'quick' describes no mechanism: MultiheadAttention: mechanism must be one of 'exact'"),
        (["lsh:n_hashes=0"], "'lsh:n_hashes=0' describes no mechanism: LSH: n_hashes must be a whole number"),
        (["lsh:rounds=2"], "'lsh:rounds=2' describes no mechanism: "),
        (["lsh:n_hashes=os"], "'lsh:n_hashes=os' describes no mechanism: malformed"),
        (["exact"], "'exact' is what mechanisms are held against; name another"),
        (["--head-dim", "x"], "--head-dim must be a whole number from 1 to 4096, got 'x'"),
        (["--causal", "maybe"], "--causal must be one of yes, no, both, got 'maybe'"),
        (["--output", "/nowhere/at/all"], "--output /nowhere/at/all lies in a folder that does not exist"),
    ],
)
def test_misuse_gets_one_sentence(argv, sentence, capsys):
    code, printed, said = run(capsys, *argv)
    assert (code, printed) == (2, "")
    assert said.startswith(f"longattn tune: {sentence}")
    assert said.count("\n") == 1
