"""Prints the peak memory of one call in this fresh process as JSON; started by `_measure.fresh_peak`."""

from __future__ import annotations

import json
import os
import sys

import _contenders
import _measure
import torch

# pages, pools and code that any first call takes, paid before the count begins
WARM_UP_LENGTH = 256


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    case, device = _contenders.Case(**job["case"]), job["device"]

    def build(case):
        return _contenders.build(job["contender"], case, _contenders.make_inputs(case, device))

    build(case._replace(n=WARM_UP_LENGTH))()
    print(json.dumps({"peak_bytes": _measure.peak_of(build(case), device)}))


if __name__ == "__main__":
    main()
