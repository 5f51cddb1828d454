"""Importing longattn has no side effects. Seen from fresh processes, since this one has imported everything already."""

import json
import os
import subprocess
import sys

PROBE = """
import ctypes, ctypes.util, json, platform, random, sys

def fp_mode():
    # the control bits of glibc's fenv_t: MXCSR without its sticky flags on x86-64, FPCR on aarch64
    state = ctypes.create_string_buffer(64)
    ctypes.CDLL(ctypes.util.find_library("m")).fegetenv(state)
    words = ctypes.cast(state, ctypes.POINTER(ctypes.c_uint32))
    control = words[7] & 0xFFC0 if platform.machine() == "x86_64" else words[0]
    return control, sys.float_info.min / 2 > 0

mode = fp_mode()
import torch
before = torch.get_rng_state().tolist(), random.getstate(), torch.get_num_threads(), str(torch.get_default_dtype())
{code}
after = torch.get_rng_state().tolist(), random.getstate(), torch.get_num_threads(), str(torch.get_default_dtype())
print(json.dumps({{
    "modules": sorted(sys.modules),
    "cuda": torch.cuda.is_initialized(),
    "fp_mode_kept": fp_mode() == mode,
    "globals_kept": before == after,
}}))
"""


def facts_after(code, folder):
    """What a fresh process sees after `code`, run in `folder` with every place for files inside it."""
    places = {
        name: str(folder) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "TRITON_HOME", "TORCHINDUCTOR_CACHE_DIR")
    }
    done = subprocess.run(
        [sys.executable, "-B", "-c", PROBE.format(code=code)],
        cwd=folder,
        env={**os.environ, **places},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_import_has_no_side_effects(tmp_path):
    facts, printed = facts_after("import longattn", tmp_path)
    loaded = {name.partition(".")[0] for name in facts["modules"]}
    assert "longattn" in loaded
    assert not loaded & {"triton", "rich", "matplotlib", "psutil", "pytest"}
    # compiled code is loaded by the first call that wants it
    assert "longattn._C" not in facts["modules"]
    assert "longattn.kernels" not in facts["modules"]
    assert not facts["cuda"]
    assert facts["fp_mode_kept"]
    assert facts["globals_kept"]
    assert list(tmp_path.iterdir()) == []
    assert printed == ""


def test_first_call_keeps_fp_mode_and_global_rng(tmp_path):
    code = """
import warnings
warnings.simplefilter("ignore")
import longattn
q = torch.linspace(-1, 1, 2 * 40 * 8).reshape(1, 2, 40, 8).requires_grad_()
longattn.linear_attention(q, q, q, is_causal=True).sum().backward()
"""
    facts, _ = facts_after(code, tmp_path)
    assert facts["fp_mode_kept"]
    assert facts["globals_kept"]
    assert not facts["cuda"]
