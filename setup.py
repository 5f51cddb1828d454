"""Builds longattn._C (C++ for every instruction set, CUDA when nvcc is there) with ninja and without torch.

Switches, all environment variables: LONGATTN_NO_EXT=1 (pure Python), LONGATTN_CUDA=auto|0|1,
LONGATTN_CUDA_ARCHS="80;90a;100", LONGATTN_WERROR=1 (warnings are errors), LONGATTN_EMULATE=1 (wide kernels for narrow
registers, for tests), MAX_JOBS, CXX, CUDA_HOME. What was built, and why something was not, is printed in one line and
kept in longattn/_build.json for `longattn doctor`.
"""

import functools
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OBJECTS = ROOT / "build" / f"objects-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"

# lowest level first: the linker keeps the first copy of an inline function, which must run on every machine
X86_ISAS = {
    "v2": "-march=x86-64-v2",
    "v3": "-march=x86-64-v3",
    "v4": "-march=x86-64-v4 -mprefer-vector-width=512",
    "v4bf16": "-march=x86-64-v4 -mprefer-vector-width=512 -mavx512bf16",
}
# the widest kernels on narrow registers: any machine can test their logic, none chooses them by itself
EMULATED = {"emulated": "-march=x86-64-v3 -Wno-psabi -DLONGATTN_VECTOR_BYTES=64 -DLONGATTN_BF16_PAIRS"}
ISAS = X86_ISAS if platform.machine().lower() in ("x86_64", "amd64") else {"generic": ""}
CUDA_ARCHS = "80;90a;100"
# gcc 12 finds its own AVX-512 intrinsics uninitialised
COMPILE = "-O3 -std=c++17 -fPIC -fopenmp -ffp-contract=fast -fvisibility=hidden -Wall -Wextra -Wno-maybe-uninitialized"
HARDEN = "-fstack-protector-strong -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2"
# a static cudart must not mix its symbols with the libcudart.so that torch loads
LINK = "-shared -fopenmp -Wl,-z,relro,-z,now -Wl,--exclude-libs,ALL"
PROBE = "#include <Python.h>\n#include <omp.h>\n#include <vector>\nint probe() { return omp_get_max_threads(); }\n"


def switch(name, default, allowed):
    value = os.environ.get(name) or default
    if value not in allowed:
        raise SystemExit(f"longattn: {name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


NO_EXT = switch("LONGATTN_NO_EXT", "0", ("0", "1")) == "1"
CUDA = switch("LONGATTN_CUDA", "auto", ("auto", "0", "1"))
WERROR = switch("LONGATTN_WERROR", "0", ("0", "1")) == "1"
if switch("LONGATTN_EMULATE", "0", ("0", "1")) == "1" and ISAS is X86_ISAS:
    ISAS = ISAS | EMULATED
ASKED_ARCHS = os.environ.get("LONGATTN_CUDA_ARCHS")
ARCHS = re.split(r"[;,\s]+", (ASKED_ARCHS or CUDA_ARCHS).strip(" ;,"))
if not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in ARCHS):
    raise SystemExit(f'longattn: LONGATTN_CUDA_ARCHS must look like "{CUDA_ARCHS}", got {ASKED_ARCHS!r}')
JOBS = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
if not re.fullmatch("0*[1-9][0-9]*", JOBS):
    raise SystemExit(f"longattn: MAX_JOBS must be a positive whole number, got {JOBS!r}")


def run(*command):
    """(succeeded, what it printed) of a command; one that cannot be started has not succeeded."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    except OSError as error:
        return False, str(error)
    return done.returncode == 0, done.stderr + done.stdout


def complaint(output):
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it failed silently"]
    return next((line for line in lines if re.search("error|fatal", line, re.I)), lines[-1])


@functools.cache
def cxx():
    """(command, "") of the C++ compiler, or (None, why there is none). One that works builds Python + OpenMP code."""
    if NO_EXT:
        return None, "LONGATTN_NO_EXT=1"
    if not sys.platform.startswith("linux"):
        return None, f"the extension is built on Linux only, this is {sys.platform}"
    command = shlex.split(os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++"))
    if not shutil.which(command[0]):
        return None, f"no C++ compiler: {command[0]} is not on PATH"
    with tempfile.TemporaryDirectory() as tmp:
        (source := Path(tmp, "probe.cpp")).write_text(PROBE)
        flags = [*COMPILE.split(), *LINK.split(), f"-I{sysconfig.get_path('include')}"]
        worked, output = run(*command, *flags, str(source), "-o", str(Path(tmp, "probe.so")))
    return (command, "") if worked else (None, f"no working C++ compiler: {complaint(output)}")


def isas():
    """The instruction sets whose flags the compiler knows, and why the others are left out."""
    flags, why_not = {}, {}
    for name, march in ISAS.items():
        worked, output = run(*cxx()[0], *march.split(), "-x", "c++", "-fsyntax-only", os.devnull)
        if worked:
            flags[name] = march
        else:
            why_not[name] = f"the compiler refuses {march}: {complaint(output)}"
    return flags, why_not


def cuda():
    """(CUDA toolchain, "") or ({}, why there is none)."""
    if CUDA == "0":
        return {}, "LONGATTN_CUDA=0"
    home = os.path.join(os.environ.get("CUDA_HOME") or "/usr/local/cuda", "bin")
    on_path, at_home = shutil.which("nvcc"), shutil.which("nvcc", path=home)
    if not (nvcc := (at_home or on_path) if "CUDA_HOME" in os.environ else (on_path or at_home)):
        return {}, "nvcc was not found in CUDA_HOME, on PATH or in /usr/local/cuda"
    command = [nvcc, "-ccbin", cxx()[0][0]] if len(cxx()[0]) == 1 else [nvcc]
    with tempfile.TemporaryDirectory() as tmp:
        (source := Path(tmp, "probe.cu")).touch()
        # preprocessing reads the toolkit's own check of the host compiler's version
        worked, output = run(*command, "-E", str(source))
        if not worked:
            return {}, f"{nvcc} does not work with {shlex.join(cxx()[0])}: {complaint(output)}"
        tried = {arch: run(*command, "--dryrun", *gencode([arch]), "-c", str(source)) for arch in ARCHS}
    archs = [arch for arch in ARCHS if tried[arch][0]]
    unknown = [arch for arch in ARCHS if not tried[arch][0]]
    if unknown and ASKED_ARCHS:
        raise SystemExit(f"longattn: LONGATTN_CUDA_ARCHS asks for {unknown[0]}: {complaint(tried[unknown[0]][1])}")
    if not archs:
        return {}, f"{nvcc} knows none of the architectures {CUDA_ARCHS}"
    libraries = re.search(r"^#\$ LIBRARIES=(.*)$", tried[archs[0]][1], re.M)
    link = [*shlex.split(libraries[1] if libraries else ""), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    version = re.search(r"release ([\d.]+)", run(nvcc, "--version")[1])[1]
    return {"command": command, "version": version, "archs": archs, "unknown": unknown, "link": link}, ""


def gencode(archs):
    """Machine code for each architecture; the newest also as PTX, for GPUs that are newer still."""
    newest = max(archs, key=lambda arch: int(arch.rstrip("af")))
    return [f"-gencode=arch=compute_{a},code=" + (f"[sm_{a},compute_{a}]" if a == newest else f"sm_{a}") for a in archs]


def ninja_file(target, flags, toolkit):
    """build.ninja: csrc/*.cpp once, csrc/cpu/*.cpp once per instruction set, csrc/cuda/*.cu when there is a toolkit."""
    import pybind11

    common = [*COMPILE.split(), *HARDEN.split(), f"-I{ROOT / 'csrc'}"] + ["-Werror"] * WERROR
    python = ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]
    binding = [*common, *python, "-DLONGATTN_ISAS=" + " ".join(f"X({name})" for name in flags)]
    binding += ["-DLONGATTN_WITH_CUDA=1"] if toolkit else []
    path = lambda p: str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")  # noqa: E731
    command = lambda words: shlex.join(map(str, words)).replace("$", "$$")  # noqa: E731
    lines, objects = [], []

    def rule(name, compiler, arguments, more=""):
        lines.append(f"rule {name}\n  command = {command(compiler)} {arguments}\n  description = {name} $out\n{more}")

    def compile_(rule_name, source, name, words):
        objects.append(OBJECTS / f"{name}.o")
        lines.append(f"build {path(objects[-1])}: {rule_name} {path(source)}\n  flags = {command(words)}\n")

    depends = "  depfile = $out.d\n  deps = gcc\n"
    rule("cxx", cxx()[0], "$flags -MMD -MF $out.d -c $in -o $out", depends)
    rule("link", cxx()[0], "$in -o $out $flags")
    for source in sorted((ROOT / "csrc").glob("*.cpp")):
        compile_("cxx", source, source.stem, binding)
    for isa, march in flags.items():
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            compile_("cxx", source, f"cpu.{source.stem}.{isa}", [*common, *march.split(), f"-DLONGATTN_ISA={isa}"])
    if toolkit:
        rule("nvcc", toolkit["command"], "$flags -MMD -MF $out.d -c $in -o $out", depends)
        host = "-Xcompiler=" + ",".join(["-fPIC", "-fvisibility=hidden", "-Wall", *HARDEN.split()])
        words = ["-O3", "-std=c++17", "--cudart=static", host, f"-I{ROOT / 'csrc'}", *gencode(toolkit["archs"])]
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            compile_("nvcc", source, f"cuda.{source.stem}", words + ["-Werror=all-warnings"] * WERROR)
    link = LINK.split() + toolkit.get("link", [])
    lines.append(f"build {path(target)}: link {' '.join(map(path, objects))}\n  flags = {command(link)}\n")
    return "\n".join(lines)


def record(command, in_place, why_no_extension="", isas=(), compiler=None, toolkit=None, why_no_cuda="", left_out=None):
    """Keeps what was built beside the package, where `longattn doctor` reads it, and prints it in one line."""
    version, archs = (toolkit["version"], toolkit["archs"]) if toolkit else (None, [])
    summary = {"extension": not why_no_extension, "why_no_extension": why_no_extension, "compiler": compiler}
    summary |= {"isas": list(isas), "cuda": version, "cuda_archs": archs, "why_no_cuda": why_no_cuda}
    summary |= {"left_out": left_out or {}}
    folder = (ROOT if in_place else Path(command.build_lib)) / "longattn"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build.json").write_text(json.dumps(summary, indent=1) + "\n")
    line = f"longattn: pure Python, without the compiled extension: {why_no_extension}"
    if not why_no_extension:
        line = f"longattn: built for {', '.join(isas)} with {compiler}; "
        line += f"CUDA {version} for {', '.join(archs)}" if toolkit else f"no CUDA: {why_no_cuda}"
        line += "".join(f"; no {name}: {why}" for name, why in summary["left_out"].items())
    print(line, flush=True)


def pure(command, in_place):
    """Nothing is compiled; an extension left by an earlier build in place would not be pure Python."""
    for stale in (ROOT / "longattn").glob("_C.*") if in_place else ():
        stale.unlink()
    record(command, in_place, cxx()[1], why_no_cuda="there is no compiled extension")


class BuildExt(build_ext):
    def run(self):
        if not cxx()[0]:
            return pure(self, self.inplace)
        import fcntl

        if missing := [name for name in ("pybind11", "ninja") if not importlib.util.find_spec(name)]:
            raise SystemExit(f"longattn: compiling needs {' and '.join(missing)}; pip install {' '.join(missing)}")
        (flags, left_out), (toolkit, why_no_cuda) = isas(), cuda()
        if CUDA == "1" and not toolkit:
            raise SystemExit(f"longattn: LONGATTN_CUDA=1, but {why_no_cuda}")
        left_out |= {f"sm_{arch}": f"CUDA {toolkit['version']} does not know it" for arch in toolkit.get("unknown", [])}
        filename = Path(self.get_ext_filename("longattn._C"))
        built = OBJECTS / filename.name
        OBJECTS.mkdir(parents=True, exist_ok=True)
        with open(OBJECTS / "lock", "w") as lock:
            # two builds of one checkout take turns
            fcntl.flock(lock, fcntl.LOCK_EX)
            (OBJECTS / "build.ninja").write_text(ninja_file(built, flags, toolkit))
            failed = subprocess.call([sys.executable, "-m", "ninja", "-C", str(OBJECTS), "-j", JOBS])
        if failed:
            raise SystemExit("longattn: the extension did not build, see above; LONGATTN_NO_EXT=1 installs without it")
        for folder in (Path(self.build_lib), ROOT) if self.inplace else (Path(self.build_lib),):
            (folder / filename).parent.mkdir(parents=True, exist_ok=True)
            # replaced, not overwritten: a process that has the old file mapped keeps it
            partial = shutil.copyfile(built, folder / f"{filename}.partial")
            os.replace(partial, folder / filename)
        compiler = run(*cxx()[0], "--version")[1].splitlines()[0]
        record(self, self.inplace, "", flags, compiler, toolkit, why_no_cuda, left_out)


class BuildPy(build_py):
    def run(self):
        super().run()
        if not cxx()[0]:
            pure(self, self.editable_mode)


if CUDA == "1" and not cxx()[0]:
    raise SystemExit(f"longattn: LONGATTN_CUDA=1, but {cxx()[1]}")

setup(
    packages=[*find_packages(include=["longattn", "longattn.*"]), "longattn.kernels"],
    package_dir={"longattn.kernels": "kernels/triton"},
    ext_modules=[Extension("longattn._C", [])] if cxx()[0] else [],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
