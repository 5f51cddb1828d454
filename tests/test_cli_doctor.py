"""`longattn doctor`, and the command line around it."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import longattn
from longattn.cli.doctor import SWITCHES
from longattn.cli.main import COMMANDS, main
from longattn.ops import _dispatch

ROOT = Path(__file__).resolve().parent.parent


def doctor_json(capsys):
    assert main(["doctor", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_every_backend_and_a_reason_for_each_that_cannot_run(capsys):
    facts = doctor_json(capsys)
    assert [backend["name"] for backend in facts["backends"]] == list(_dispatch.IMPLS)
    for backend in facts["backends"]:
        assert backend["usable"] == (backend["reason"] == "")
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["longattn"] == longattn.__version__
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert len(facts["gpus"]) == torch.cuda.device_count()


def test_instruction_set_in_use_is_one_that_was_built_and_runs_here(capsys):
    cpu = doctor_json(capsys)["cpu"]
    if cpu["isa"] is None:
        assert cpu["why_no_isa"]
    else:
        assert cpu["isa"] in cpu["isas_built"]
        assert cpu["isa"] in cpu["isas_supported"]


def test_table_says_what_the_json_says(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("MAX_JOBS", "7")
    facts = doctor_json(capsys)
    assert facts["environment"]["MAX_JOBS"] == "7"
    assert main(["doctor"]) == 0
    table = capsys.readouterr().out
    for name, value in facts["versions"].items():
        assert f"{name} " in table
        assert (value or "none") in table
    for backend in facts["backends"]:
        assert backend["reason"] in table
    assert "MAX_JOBS" in table


def test_without_rich_one_sentence_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(SystemExit) as left:
        main(["doctor"])
    assert left.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "longattn doctor: needs rich; pip install 'longattn[cli]'\n"
    doctor_json(capsys)


@pytest.mark.parametrize("argv", [[], ["docter"], ["doctor", "--jsno"]])
def test_misuse_is_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    assert "usage: longattn" in capsys.readouterr().err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"  {command} " in printed for command in COMMANDS)


def test_version_is_the_installed_one(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"longattn {importlib.metadata.version('longattn')}\n"


def test_unusable_instruction_set_is_reported_and_other_commands_are_not_loaded(tmp_path):
    if _dispatch.missing("cpu"):
        pytest.skip(_dispatch.missing("cpu"))
    script = "import sys; from longattn.cli.main import main; code = main(['doctor', '--json']); "
    script += "print(*sys.modules, file=sys.stderr); sys.exit(code)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "LONGATTN_CPU_ISA": "abacus"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    facts = json.loads(done.stdout)
    assert facts["cpu"]["isa"] is None
    assert "abacus" in facts["cpu"]["why_no_isa"]
    assert facts["environment"]["LONGATTN_CPU_ISA"] == "abacus"
    assert "longattn.cli.doctor" in done.stderr.split()
    assert not {"longattn.cli.demo", "rich", "matplotlib"} & set(done.stderr.split())


def test_every_switch_that_is_read_is_reported_and_documented():
    read = re.compile(r"""(?:environ(?:\.get\(|\[)|getenv\(|switch\()\s*["'](LONGATTN_[A-Z_]+)["']""")
    sources = [ROOT / "setup.py", *(ROOT / "longattn").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp")]
    found = {name for source in sources for name in read.findall(source.read_text())}
    assert found == {name for name in SWITCHES if name.startswith("LONGATTN_")}
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    assert not [name for name in found if f"| `{name}` |" not in guide]


def test_ctrl_c_is_exit_code_130(capsys, monkeypatch):
    from longattn.cli import doctor

    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupt)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "longattn doctor: interrupted\n"
