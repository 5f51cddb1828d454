"""What setup.py builds: pure Python without a compiler, an error in our sources, the switches, what a wheel holds."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
SWITCHES = ("NO_EXT", "CUDA", "CUDA_ARCHS", "EMULATE", "WERROR")
OURS = {"MAX_JOBS", "CXX", "PYTHONPATH", *(f"LONGATTN_{name}" for name in SWITCHES)}

pytest.importorskip("setuptools", minversion="77")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")

# a module of the C API alone compiles in a second
SMALL_SOURCES = {
    "csrc/bindings.cpp": """
#include <Python.h>
#define X(isa) namespace isa { int level(); }
LONGATTN_ISAS
#undef X
#define X(isa) PyList_Append(isas, PyUnicode_FromString(isa::level() == 1 ? #isa : ""));
int cuda_devices();
static PyObject* facts(PyObject*, PyObject*) {
  PyObject* isas = PyList_New(0);
  LONGATTN_ISAS
#ifdef LONGATTN_WITH_CUDA
  return Py_BuildValue("(Oi)", isas, cuda_devices());
#else
  return Py_BuildValue("(Oi)", isas, -1);
#endif
}
static PyMethodDef methods[] = {{"facts", facts, METH_NOARGS, nullptr}, {}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
""",
    "csrc/common/level.h": "constexpr int base = 1;\n",
    "csrc/cpu/level.cpp": '#include "common/level.h"\nnamespace LONGATTN_ISA { int level() { return base; } }\n',
    "csrc/cpu/other.cpp": "namespace LONGATTN_ISA { int other() { return 2; } }\n",
    "csrc/cuda/devices.cu": """
#include "common/level.h"
int cuda_devices() { int n = 0; return cudaGetDeviceCount(&n) == cudaSuccess ? n : 0; }
""",
}


def environment(**changes):
    """This environment without the switches of the build; None takes a variable away."""
    kept = {name: value for name, value in os.environ.items() if name not in OURS}
    return {name: value for name, value in {**kept, **changes}.items() if value is not None}


def run(*command, cwd, **changes):
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment(**changes),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def succeed(*command, cwd, **changes):
    done = run(*command, cwd=cwd, **changes)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources, with a compiled module that an earlier build may have left in it."""
    folder = tmp_path / "checkout"
    skip = shutil.ignore_patterns("build", "dist", "results", "*.egg-info", "_build.json", "*.so", ".*", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=skip)
    (folder / "longattn" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"stale")
    return folder


@pytest.fixture
def small(tmp_path):
    """setup.py with sources so small that a build takes seconds."""
    folder = tmp_path / "small"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "longattn").mkdir()
    for name, text in SMALL_SOURCES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def wheel_of(source, folder, **changes):
    """Builds a wheel as pip does, through the hook; (its path, what it holds, what was printed)."""
    folder.mkdir()
    hook = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    output = succeed(sys.executable, "-c", hook, cwd=source, **changes)
    (wheel,) = folder.glob("*.whl")
    return wheel, zipfile.ZipFile(wheel), output


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"LONGATTN_NO_EXT": "1"}, "LONGATTN_NO_EXT=1"),
        ({"PATH": "/nonexistent"}, "no C++ compiler: c++ is not on PATH"),
        ({"CXX": "false"}, "no working C++ compiler: it failed silently"),
    ],
    ids=["asked-for", "no-compiler", "broken-compiler"],
)
def test_without_a_compiler_the_install_is_pure_python_and_says_so(changes, why, checkout, tmp_path):
    wheel, held, output = wheel_of(checkout, tmp_path / "wheels", **changes)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert f"longattn: pure Python, without the compiled extension: {why}" in output
    names = held.namelist()
    assert not [name for name in names if name.endswith((".so", ".cpp", ".cu"))]
    summary = json.loads(held.read("longattn/_build.json"))
    assert summary["extension"] is False
    assert summary["why_no_extension"] == why


def test_pure_python_wheel_works_without_the_checkout_and_takes_no_other_name(checkout, tmp_path):
    _, held, _ = wheel_of(checkout, tmp_path / "wheels", PATH="/nonexistent")
    names = held.namelist()
    # a folder named `kernels` at the top would shadow the package of that name
    assert {re.sub("-.*", "", name.partition("/")[0]) for name in names} == {"longattn"}
    ours = {path.name for path in (ROOT / "kernels" / "triton").glob("*.py")}
    assert {name.rpartition("/")[2] for name in names if name.startswith("longattn/kernels/")} == ours

    site = tmp_path / "site"
    held.extractall(site)
    script = """
import sys
# an editable install of the checkout would find the modules that this wheel lacks
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import torch, longattn, longattn.native
q = torch.randn(1, 2, 8, 4)
longattn.linear_attention(q, q, q, is_causal=True)
print(longattn.__file__)
print(longattn.native.missing())
"""
    done = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    where, missing = done.stdout.splitlines()
    assert Path(where).is_relative_to(site)
    assert "no C++ compiler" in missing
    assert "UserWarning" in done.stderr
    assert "no C++ compiler" in done.stderr


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"LONGATTN_CUDA": "yes"}, "longattn: LONGATTN_CUDA must be one of auto, 0, 1, got 'yes'"),
        ({"LONGATTN_NO_EXT": "2"}, "longattn: LONGATTN_NO_EXT must be one of 0, 1, got '2'"),
        ({"LONGATTN_WERROR": "on"}, "longattn: LONGATTN_WERROR must be one of 0, 1, got 'on'"),
        ({"LONGATTN_CUDA_ARCHS": "sm_80"}, "longattn: LONGATTN_CUDA_ARCHS must look like \"80;90a;100\", got 'sm_80'"),
        ({"MAX_JOBS": "0"}, "longattn: MAX_JOBS must be a positive whole number, got '0'"),
        ({"LONGATTN_CUDA": "1", "LONGATTN_NO_EXT": "1"}, "longattn: LONGATTN_CUDA=1, but LONGATTN_NO_EXT=1"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_unknown_switch_is_refused_in_one_sentence(changes, sentence):
    done = run(sys.executable, "setup.py", "--version", cwd=ROOT, **changes)
    assert done.returncode == 1
    assert done.stderr.strip() == sentence


@needs_compiler
def test_error_in_our_own_sources_fails_the_build(small):
    (small / "csrc" / "bindings.cpp").write_text("#error this source is broken\n")
    done = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=small, LONGATTN_CUDA="0")
    assert done.returncode != 0
    assert "this source is broken" in done.stdout
    assert "LONGATTN_NO_EXT=1 installs without it" in done.stderr
    assert not list((small / "longattn").iterdir())


def build(folder, **changes):
    """Builds in place; what was built, and what the module says of itself in a process of its own."""
    succeed(sys.executable, "setup.py", "build_ext", "--inplace", cwd=folder, **changes)
    facts = succeed(sys.executable, "-c", "import _C, json; print(json.dumps(_C.facts()))", cwd=folder / "longattn")
    return json.loads((folder / "longattn" / "_build.json").read_text()), json.loads(facts)


@needs_compiler
def test_every_instruction_set_is_built_and_only_what_changed_is_built_again(small):
    summary, (isas, devices) = build(small, LONGATTN_CUDA="0")
    assert summary["isas"] == isas
    assert devices == -1
    assert summary["cuda"] is None
    assert summary["why_no_cuda"] == "LONGATTN_CUDA=0"
    # what runs everywhere comes first: the linker keeps the first copy of an inline function
    (link,) = (
        line for line in next((small / "build").rglob("build.ninja")).read_text().splitlines() if ": link " in line
    )
    levels = [f"cpu.{stem}.{isa}.o" for isa in isas for stem in ("level", "other")]
    assert [Path(name).name for name in link.partition(": link ")[2].split()] == ["bindings.o", *levels]

    made = list((small / "build").rglob("*.o"))
    assert len(made) == 1 + 2 * len(isas)

    def changed_since(before):
        return {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}

    times = {path: path.stat().st_mtime_ns for path in made}
    build(small, LONGATTN_CUDA="0")
    assert changed_since(times) == set()
    header = small / "csrc" / "common" / "level.h"
    header.write_text(header.read_text() + "constexpr int more = 2;\n")
    build(small, LONGATTN_CUDA="0")
    assert changed_since(times) == {f"cpu.level.{isa}.o" for isa in isas}


@needs_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_extension_with_cuda_imports_with_or_without_a_gpu(small):
    summary, (_, devices) = build(small, LONGATTN_CUDA="1", LONGATTN_CUDA_ARCHS="80", CUDA_VISIBLE_DEVICES="")
    assert re.fullmatch(r"[\d.]+", summary["cuda"])
    assert summary["cuda_archs"] == ["80"]
    assert devices >= 0


@pytest.mark.slow
def test_wheel_and_sdist_install_into_an_empty_environment(checkout, tmp_path):
    """Takes minutes and the network: python -m build, then a new environment for each, used from another folder."""
    pytest.importorskip("build")
    succeed(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", checkout, cwd=tmp_path)
    dist = list((tmp_path / "dist").iterdir())
    assert len(dist) == 2
    script = """
import json, torch, longattn, longattn.kernels
from longattn.ops import _dispatch
q = torch.randn(1, 2, 300, 16, requires_grad=True)
longattn.linear_attention(q, q, q, is_causal=True).sum().backward()
finite = bool(q.grad.isfinite().all())
print(json.dumps([longattn.__file__, longattn.kernels.__file__, _dispatch.missing("cpu"), finite]))
"""
    for archive in dist:
        home = tmp_path / f"env-{archive.suffix[1:]}"
        venv.create(home, with_pip=True)
        python = home / "bin" / "python"
        version = torch.__version__.partition("+")[0]
        succeed(python, "-m", "pip", "install", "-q", f"torch=={version}", archive, cwd=tmp_path)
        package, kernels, missing, finite = json.loads(succeed(python, "-W", "ignore", "-c", script, cwd=tmp_path))
        assert Path(package).is_relative_to(home)
        assert Path(kernels).is_relative_to(home)
        assert missing is None or COMPILER is None
        assert finite
        facts = json.loads(succeed(home / "bin" / "longattn", "doctor", "--json", cwd=tmp_path))
        assert facts["build"]["extension"] == (COMPILER is not None)
        assert run(python, "-c", "import kernels", cwd=tmp_path).returncode == 1
