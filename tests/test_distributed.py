"""Attention in parallel training: two processes of DDP or of FSDP2 take the steps that one takes on the whole batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _attention import MECHANISMS

NAMES = [f"{kind} {name}" for name in [*MECHANISMS, "lsh that draws anew"] for kind in ("ddp", "fsdp")]


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    """Of all parameters and buffers, by kind and mechanism, in each process."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder, script = tmp_path_factory.mktemp("ranks"), Path(__file__).with_name("distributed_attention.py")
    started = [
        subprocess.Popen([sys.executable, script, str(rank), folder], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n".join(said)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_as_one_does(name, differences):
    for found in differences:
        assert found[name] < 1e-10
