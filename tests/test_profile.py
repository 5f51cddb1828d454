"""`longattn.profile_memory`: peaks, timelines and phases of code whose memory is known."""

import json
import pickle
import time

import pytest
import torch

import longattn
from longattn import profile as module
from longattn.profile import Phase, Sample

MB = 10**6
BACKWARD, GRAD = torch.autograd.backward, torch.autograd.grad


def hold(megabytes, seconds=0.03):
    x = torch.ones(megabytes * MB // 4)
    time.sleep(seconds)
    return float(x[0])


def test_peak_and_timeline_follow_what_is_held():
    hold(1)
    with longattn.profile_memory() as profile:
        kept = torch.ones(20 * MB // 4)
        hold(60)
        time.sleep(0.03)
    assert 79 * MB < profile.peak < 85 * MB
    highest = max(profile.timeline, key=lambda sample: sample.bytes)
    assert 0.97 * profile.peak < highest.bytes < profile.peak + MB
    assert 0.02 < highest.seconds < profile.seconds
    # what was freed is gone at the end, what was kept is not
    assert 19 * MB < profile.timeline[-1].bytes < 25 * MB < kept.nbytes + 6 * MB
    times = [sample.seconds for sample in profile.timeline]
    assert times == sorted(times)
    assert times[0] < 0.01
    assert len(times) > 10
    assert profile.baseline > 10 * MB


def model():
    """Its forward keeps 8 results of 4 MB, its backward frees them."""
    layers = [layer for _ in range(4) for layer in (torch.nn.Linear(64, 64), torch.nn.Tanh())]
    return torch.nn.Sequential(*layers), torch.ones(16384, 64)


def test_backward_is_marked_by_itself_wherever_it_starts():
    net, x = model()
    for backward in (
        lambda loss: loss.backward(),
        lambda loss: torch.autograd.backward(loss),
        lambda loss: torch.autograd.grad(loss, list(net.parameters())),
    ):
        net(x).sum().backward()
        with longattn.profile_memory() as profile:
            with profile.phase("forward"):
                loss = net(x).square().sum()
            backward(loss)
        assert [phase.name for phase in profile.phases] == ["forward", "backward"]
        forward, back = profile.phases
        assert 0 <= forward.start < forward.end <= back.start < back.end <= profile.seconds
        # some are blocks that the heap had kept, which are used again unseen
        assert 5 * 4 * MB < forward.peak <= profile.peak
        assert forward.peak < back.peak + MB <= profile.peak + MB
    assert (torch.autograd.backward, torch.autograd.grad) == (BACKWARD, GRAD)


class Recomputed(torch.autograd.Function):
    """x^2, with a backward pass inside its backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            return torch.autograd.grad((x**2).sum(), x)[0] * grad


def test_a_backward_inside_another_is_part_of_it():
    x = torch.ones(5, requires_grad=True)
    with longattn.profile_memory() as profile:
        Recomputed.apply(x).sum().backward()
    assert [phase.name for phase in profile.phases] == ["backward"]
    assert x.grad.eq(2).all()


def test_phases_and_profiles_nest():
    with longattn.profile_memory() as outer:
        hold(60, 0)
        with outer.phase("both"):
            hold(20, 0)
            with longattn.profile_memory(interval=None) as inner, outer.phase("second"):
                hold(40, 0)
    peaks = {phase.name: phase.peak for phase in outer.phases}
    found = (outer.peak, peaks["both"], peaks["second"], inner.peak)
    assert found == pytest.approx((60 * MB, 40 * MB, 40 * MB, 40 * MB), rel=0.1)
    assert inner.timeline == []


def test_decorators_return_what_is_returned():
    profiled = longattn.profile_memory(hold)
    assert profiled.__name__ == "hold"
    assert profiled(30) == 1.0
    assert 29 * MB < profiled.peak < 36 * MB
    assert profiled(10) == 1.0
    assert 9 * MB < profiled.peak < 16 * MB

    class Holder:
        @longattn.profile_memory(interval=0.005)
        def run(self, megabytes):
            return self, hold(megabytes)

    holder = Holder()
    assert holder.run(20) == (holder, 1.0)
    assert 19 * MB < Holder.run.peak < 26 * MB


def test_an_exception_passes_and_leaves_all_as_it_was():
    profile = longattn.profile_memory()

    @longattn.profile_memory()
    def fail():
        with profile, profile.phase("first"):
            hold(10, 0)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert profile.peak > 9 * MB
    assert [phase.name for phase in profile.phases] == ["first"]
    assert (torch.autograd.backward, torch.autograd.grad) == (BACKWARD, GRAD)
    with profile:
        pass
    assert profile.phases == []


def test_what_is_saved(tmp_path):
    with longattn.profile_memory() as profile, profile.phase("only $one$"):
        hold(10)
    profile.save(tmp_path / "out.json")
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["peak_bytes"] == profile.peak
    assert document["phases"] == [profile.phases[0]._asdict()]
    assert len(document["timeline"]["bytes"]) == len(document["timeline"]["seconds"]) == len(profile.timeline)
    for name, start in (("out.png", b"\x89PNG"), ("out.svg", b"<?xml")):
        profile.save_plot(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    for name in ("out.pickle", "out.txt"):
        with pytest.raises(ValueError, match=r"save\(path\) writes \.json, got"):
            profile.save(tmp_path / name)


def test_a_profile_that_never_ran_draws_nothing_and_says_nothing_wrong(tmp_path):
    profile = longattn.profile_memory(hold)
    profile.save_plot(tmp_path / "out.png")
    assert (profile.peak, profile.timeline, profile.phases) == (0, [], [])


BAD = {
    "not callable": (lambda: longattn.profile_memory(3), TypeError, "must be callable or a with block"),
    "device": (lambda: longattn.profile_memory(device="tpu"), ValueError, "device must be one of cpu, cuda"),
    "interval": (lambda: longattn.profile_memory(interval=0), ValueError, "interval must be a positive number"),
    "phase outside": (lambda: longattn.profile_memory().phase("x").__enter__(), RuntimeError, "inside of the with"),
}


@pytest.mark.parametrize("what", BAD)
def test_misuse_gets_a_sentence(what):
    make, error, sentence = BAD[what]
    with pytest.raises(error, match=sentence):
        make()


def test_running_twice_at_once_is_refused():
    with longattn.profile_memory() as profile, pytest.raises(RuntimeError, match="running already"):
        profile.__enter__()


def test_long_timelines_keep_their_heights():
    samples = [Sample(float(i), (i * 37) % 101) for i in range(201)]
    found = module.thinned(samples)
    assert len(found) == 101
    assert max(x.bytes for x in found) == 100
    assert found[0] == max(samples[:2], key=lambda x: x.bytes)
    assert found[-1] == samples[-1]


def test_the_course_of_recorded_allocations():
    events = [("alloc", 100, 1e6), ("alloc", 50, 2e6), ("segment_alloc", 999, 2e6), ("free_requested", 100, 3e6)]
    events += [("free_completed", 100, 3e6), ("oom", 7, 4e6)]
    events = [{"action": action, "size": size, "time_us": at} for action, size, at in events]
    expected = [Sample(0, 0), Sample(0.5, 100), Sample(1.5, 150), Sample(2.5, 50)]
    assert module.course(events, 5e5) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_memory_of_a_gpu(tmp_path):
    x = torch.ones(4 * MB, device="cuda", requires_grad=True)
    with longattn.profile_memory() as profile:
        with profile.phase("forward"):
            y = (x * 2).exp()
        y.sum().backward()
    assert profile.device == "cuda"
    assert [phase.name for phase in profile.phases] == ["forward", "backward"]
    assert 32 * MB <= profile.phases[0].peak <= profile.peak
    assert max(sample.bytes for sample in profile.timeline) == pytest.approx(profile.peak, rel=0.05)
    profile.save(tmp_path / "out.pickle")
    assert "device_traces" in pickle.loads((tmp_path / "out.pickle").read_bytes())
    assert isinstance(profile.phases[0], Phase)
