"""Prints the peak memory of one call in this fresh process as JSON; started by `_measure.fresh_peak`."""

from __future__ import annotations

import importlib
import json
import os
import sys

import torch

from longattn._memory import peak_of

# pages, pools and code that any first call takes, paid before the count begins
WARM_UP_LENGTH = 256


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    contenders, device = importlib.import_module(job["module"]), job["device"]
    case = contenders.Case(**job["case"])

    def build(case):
        return contenders.build(job["contender"], case, contenders.make_inputs(case, device))

    build(case._replace(n=WARM_UP_LENGTH))()
    print(json.dumps({"peak_bytes": peak_of(build(case), device)}))


if __name__ == "__main__":
    main()
