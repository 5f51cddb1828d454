"""Threads, processes, instruction sets and the state of the machine around a call."""

import os
import random
import subprocess
import sys
import threading

import pytest
import torch

from longattn import linear_attention, linear_attention_with_state, native
from longattn.testing.assertions import assert_same_bits, run_linear
from longattn.testing.cases import FAVOR, LINEAR, FavorCase, LinearCase, build, segments_of

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"cpu: {native.missing()}")

# more segments than threads, and fewer
LONG = (
    LinearCase("one head, long", B=1, H=1, L=5000, D=16, E=16, is_causal=True, state=True),
    LinearCase("one head, long, not causal", B=1, H=1, L=5000, D=16, E=16, mask="random"),
    LinearCase("two heads share keys", B=1, H=1, L=3000, D=8, E=8, groups=2, is_causal=True, normalize=False),
    LinearCase("large state", B=1, H=1, L=900, D=128, E=96, is_causal=True, segment=256),
    LinearCase("many heads", B=4, H=8, L=200, is_causal=True),
    LinearCase("packed, one long", B=1, H=1, L=3203, D=8, E=8, lengths=(2100, 0, 3, 1100), is_causal=True, state=True),
    LinearCase("packed, not causal", B=1, H=1, L=3203, D=8, E=8, lengths=(2100, 0, 3, 1100)),
    LinearCase("favor, one head, long", B=1, H=1, L=3000, D=8, E=8, is_causal=True, state=True, favor=FavorCase()),
    LinearCase("favor, one head, not causal", B=1, H=1, L=3000, D=8, E=8, mask="random", favor=FavorCase("hyperbolic")),
    LinearCase("favor, exact, long", B=1, H=1, L=3000, D=8, E=8, is_causal=True, favor=FavorCase(exact=True)),
    LinearCase(
        "favor, packed, one long", B=1, H=1, L=3203, D=8, E=8, lengths=(2100, 0, 3, 1100), is_causal=True, state=True,
        favor=FavorCase(),
    ),
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*LINEAR, *FAVOR[::3], *LONG], ids=lambda case: case.name)
def test_the_number_of_threads_changes_no_bit(case, dtype):
    inputs = build(case, dtype)
    with segments_of(case.segment):
        expected = run_linear(inputs, "cpu")
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            for name, x in run_linear(inputs, "cpu").items():
                assert_same_bits(f"{name} with {threads} threads", x, expected[name])


def test_torch_keeps_its_number_of_threads():
    for threads in (2, 3):
        torch.set_num_threads(threads)
        run_linear(build(LONG[0], torch.float32), "cpu")
        assert torch.get_num_threads() == threads


def test_several_python_threads_at_once_give_the_bits_of_one():
    cases = [LONG[0], LONG[4], LONG[5], *LINEAR[:5]]
    inputs = [build(case, torch.float32) for case in cases]
    expected = [run_linear(x, "cpu") for x in inputs]
    wrong = []

    def work(start):
        try:
            for i in range(6):
                n = (start + i) % len(cases)
                for name, x in run_linear(inputs[n], "cpu").items():
                    assert_same_bits(f"{name} of {cases[n].name!r}", x, expected[n][name])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]


def python(script, *, timeout=120, **environment):
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment}, check=False
    )


FORK = """
import os, torch
from longattn import linear_attention
torch.set_num_threads(2)
q, k, v = (torch.randn(1, 1, 5000, 16) for _ in range(3))
expected = linear_attention(q, k, v, is_causal=True, impl="cpu")
torch.mm(torch.ones(600, 600), torch.ones(600, 600))
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    same = torch.equal(linear_attention(q, k, v, is_causal=True, impl="cpu"), expected)
    os._exit(0 if same else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(linear_attention(q, k, v, is_causal=True, impl="cpu"), expected)
print("finished")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_worker_finishes_with_the_same_bits():
    # one thread in the child, as torch's DataLoader sets: an OpenMP runtime's threads do not survive a fork
    result = python(FORK, timeout=60)
    assert result.stdout.strip() == "finished", result.stderr


# instruction sets

LEVEL = """
import sys, torch
from longattn import lsh_buckets, native
from longattn.testing.assertions import check_linear
from longattn.testing.cases import DTYPES, FAVOR, LINEAR
from longattn.testing.lsh import LSH, check_lsh
from longattn.testing.toeplitz import TOEPLITZ, check_toeplitz
torch.set_num_threads(1)
assert native.extension().isa() == sys.argv[1], native.extension().isa()
names = {names}
def check_prefix(case, dtype, impl):
    check_toeplitz(case, dtype, impl, "prefix")
kinds = ("", (*LINEAR, *FAVOR), check_linear), ("lsh, ", LSH, check_lsh), ("rpe, ", TOEPLITZ, check_prefix)
for kind, cases, check in kinds:
    for case in cases:
        if kind + case.name in names:
            for dtype in DTYPES:
                check(case, dtype, "cpu")
                names[kind + case.name] += 1
assert set(names.values()) == {{len(DTYPES)}}, names
x = torch.randn(1, 4, 3000, 40, generator=torch.Generator().manual_seed(0))
buckets = lsh_buckets(x, n_buckets=512, impl="cpu")
print("agrees", int((buckets.long() * torch.arange(1, buckets.numel() + 1).view(buckets.shape)).sum()))
"""
AT_EACH_LEVEL = (
    "causal L=1 after a state",
    "causal L=100",
    "causal L=257 in segments of 128, few features",
    "head dims 1 and 5, causal=True",
    "head dims 16 and 31, causal=True",
    "head dims 100 and 64, causal=False",
    "head dims 17 and 256, causal=True",
    "256 raw features",
    "relu, normalize=False, scale=-0.3",
    "GQA causal",
    "random masked, causal=False",
    "packed with everything",
    "packed with states, not causal",
    "favor, L=1 after a state",
    "favor, hyperbolic, causal=True",
    "favor, trig, causal=False",
    "favor, head dims 1 and 5, 2 hyperbolic features",
    "favor, head dims 31 and 16, 17 positive features",
    "favor, head dims 64 and 64, 256 positive features",
    "favor, exact diagonal with everything",
    "favor, GQA causal",
    "favor, packed with everything",
    "lsh, causal L=257, chunk 16",
    "lsh, chunk 1",
    "lsh, head dims 31 and 16",
    "lsh, head dims 128 and 100",
    "lsh, eight rounds, each counted",
    "lsh, packed, separate",
    "lsh, separate, dropout",
    "lsh, wrapped, far",
    "rpe, causal, L=130, reach 40",
    "rpe, full, L=210 S=50",
    "rpe, full, Favor",
    "rpe, causal, Favor, hyperbolic, key mean",
    "rpe, causal, packed with everything",
)


BUCKETS: dict[str, str] = {}


def levels():
    return native.extension().supported_isas() if native.missing() is None else []


@pytest.mark.parametrize("level", levels())
def test_every_instruction_set_stays_within_the_budget(level):
    script = LEVEL.format(names=dict.fromkeys(AT_EACH_LEVEL, 0)).replace("sys.argv[1]", repr(level))
    result = python(script, timeout=400, LONGATTN_CPU_ISA=level)
    agreement = result.stdout.strip()
    assert agreement.startswith("agrees"), result.stderr
    # the buckets are the same numbers at every level
    assert BUCKETS.setdefault("sum", agreement) == agreement


def test_an_unknown_instruction_set_is_refused_in_a_sentence():
    script = "import torch, longattn; x = torch.ones(1, 1, 2, 2); longattn.linear_attention(x, x, x, impl='cpu')"
    result = python(script, LONGATTN_CPU_ISA="v5")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    for part in ("ValueError", "LONGATTN_CPU_ISA must be one of", "got v5", *levels()):
        assert part in last, result.stderr


# what a call leaves alone


def floating_point_mode():
    """Rounding to nearest, and subnormals neither flushed nor read as 0, in this thread and in torch's."""
    tiny = torch.full((1 << 17,), 1e-40)
    third = torch.ones(1 << 17) / 3
    return {
        "python subnormal": 1e-310 * 0.5,
        "python third": 1.0 / 3.0,
        "subnormal products": (tiny * 0.5).unique().tolist(),
        "thirds": third.unique().tolist(),
    }


def test_the_floating_point_mode_is_left_alone():
    torch.set_num_threads(3)
    before = floating_point_mode()
    assert before["python subnormal"] > 0
    assert before["subnormal products"][0] > 0
    for case in (LONG[0], LONG[4]):
        run_linear(build(case, torch.float32), "cpu")
    assert floating_point_mode() == before
    after = {}
    thread = threading.Thread(target=lambda: after.update(floating_point_mode()))
    thread.start()
    thread.join()
    assert after == before


def test_importing_changes_neither_floating_point_nor_threads():
    result = python(
        "import torch; torch.set_num_threads(2); before = 1e-310 * 0.5, (torch.full((9,), 1e-40) * 0.5).tolist()\n"
        "import longattn, longattn.native; longattn.native.extension()\n"
        "assert before[0] > 0 and before[1][0] > 0 and torch.get_num_threads() == 2\n"
        "assert (1e-310 * 0.5, (torch.full((9,), 1e-40) * 0.5).tolist()) == before; print('same')"
    )
    assert result.stdout.strip() == "same", result.stderr


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_no_random_state_is_touched(impl):
    inputs = build(LinearCase("rng", L=70, is_causal=True, mask="random"), torch.float32)
    torch_before, python_before = torch.get_rng_state(), random.getstate()
    run_linear(inputs, impl)
    linear_attention(*inputs[:3], impl="auto")
    linear_attention_with_state(*inputs[:3], impl=impl)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert random.getstate() == python_before
