"""Run by test_triton_linear.py in a process of its own: cases of the table and some smaller ones through Triton's
interpreter, on the CPU.
"""

import sys

import torch

from longattn.ops import _dispatch
from longattn.testing.assertions import check_linear
from longattn.testing.cases import LINEAR, LinearCase

# the table's options for fewer heads: the interpreter takes long for every program
SMALL = tuple(
    LinearCase(name, **{"H": 1, "is_causal": True} | options)
    for name, options in {
        "one head, relu, unnormalized": {"B": 1, "feature": "relu", "normalize": False, "scale": -0.3},
        "one head, identity": {"B": 1, "feature": "identity", "scale": 0.3},
        "one head, masked": {"L": 130, "mask": "random", "segment": 64},
        "one head, all masked": {"B": 1, "L": 70, "mask": "all"},
        "one head, state": {"B": 1, "L": 150, "state": True, "mask": "random", "segment": 64, "feature": "relu"},
    }.items()
)


def past_sees_no_future() -> None:
    import longattn

    q, k, v = (torch.randn(1, 1, 70, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    before = longattn.linear_attention(q, k, v, is_causal=True, impl="triton")
    for strange in (float("nan"), float("inf"), 1e30):
        for x in (q, k, v):
            changed = [y.clone() for y in (q, k, v)]
            changed[[y is x for y in (q, k, v)].index(True)][:, :, 40:] = strange
            after = longattn.linear_attention(*changed, is_causal=True, impl="triton")
            assert torch.equal(before[:, :, :40], after[:, :, :40]), f"a future {strange} reached the past"


if __name__ == "__main__":
    assert _dispatch._interpreting(), "set TRITON_INTERPRET=1"
    torch.set_num_threads(1)
    dtype = getattr(torch, sys.argv[1])
    table = {case.name: case for case in (*LINEAR, *SMALL)}
    for name in sys.argv[2:]:
        if name == "law":
            past_sees_no_future()
            print("law: kept", flush=True)
            continue
        used = check_linear(table[name], dtype, "triton")
        print(f"{name}: {max(used.values(), default=0):.2f} of the budget", flush=True)
