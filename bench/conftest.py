"""`--no-peak` leaves out the memory runs, each of which starts a process."""

import torch


def pytest_addoption(parser):
    parser.addoption("--no-peak", action="store_true", help="no peak memory: fewer processes, less time")


def pytest_benchmark_update_machine_info(config, machine_info):
    import _measure

    machine_info["longattn"] = {
        "machine": _measure.machine(),
        "versions": _measure.versions(),
        "settings": _measure.settings(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
