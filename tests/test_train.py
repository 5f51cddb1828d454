"""`longattn train`: it goes on bit for bit, loses nothing, and says what is wrong in one sentence."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from longattn.cli import _checkpoint, _model, _text, _training, train
from longattn.cli._checkpoint import CheckpointError
from longattn.cli.main import main
from longattn.models import Reformer

SAMPLE = b"Where it is a duty to worship the sun, it is pretty sure to be a crime to examine the laws of heat. " * 10
TINY = ("--length", 64, "--layers", 2, "--dim", 16, "--heads", 2, "--chunk-size", 16, "--window", 16)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    # relative names in sentences, and nothing written elsewhere
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[b]text$").write_bytes(SAMPLE)
    return tmp_path


def run(*arguments, output="out"):
    given = ["--text", "[b]text$", "--threads", "1", "--output", output, *map(str, arguments)]
    return main(["train", *given])


def tensors_of(output):
    """All bytes of the newest checkpoint, by file, and how it was reached without its times."""
    path = _checkpoint.newest(output)
    facts = json.loads((path / "training.json").read_text())
    course = [(step, bits) for step, bits, _ in facts["steps"]]
    import safetensors.torch

    found = {}
    for name in ("model.safetensors", "training.safetensors"):
        found |= {f"{name}: {key}": x for key, x in safetensors.torch.load_file(path / name).items()}
    return path.name, course, found


def assert_same_checkpoint(first, second):
    (name, course, tensors), (name2, course2, tensors2) = tensors_of(first), tensors_of(second)
    assert (name, course) == (name2, course2)
    assert tensors.keys() == tensors2.keys()
    assert all(torch.equal(x, tensors2[key]) for key, x in tensors.items())


# going on


@pytest.mark.parametrize(
    "options",
    [
        ("--mechanisms", "lsh,local", "--dropout", 0.2, "--n-hashes", 2),
        ("--mechanisms", "linear,exact,favor", "--no-reversible", "--batch", 2),
        ("--mechanisms", "lsh", "--dtype", "bfloat16", "--layers", 1, "--feed-forward-chunk", 24, "--hidden", 24),
    ],
    ids=["dropout", "plain", "bfloat16"],
)
def test_two_and_two_steps_are_four_bit_for_bit(folder, options):
    assert run(*TINY, *options, "--steps", 4, output="whole") == 0
    assert run(*TINY, *options, "--steps", 2, output="halves") == 0
    # what a process has drawn before must not matter
    torch.rand(100)
    assert run("--resume", "--steps", 4, output="halves") == 0
    assert_same_checkpoint("whole", "halves")


def test_what_may_change_on_the_way_changes_the_model_and_stays(folder):
    assert run(*TINY, "--steps", 1) == 0
    assert run("--resume", "--dropout", 0.5, "--feed-forward-chunk", 24, "--steps", 2) == 0
    assert run("--resume", "--steps", 3) == 0
    model = Reformer.load(_checkpoint.newest("out"))
    assert (model.config.dropout, model.config.feed_forward_chunk) == (0.5, 24)
    resumed = _training.Training.resume(
        _checkpoint.newest("out"),
        facts := _checkpoint.load_facts(_checkpoint.newest("out"), train._check_kept),
        facts["settings"] | {"dropout": 0.25},
        _text.load("[b]text$"),
    )
    assert {x.p for x in resumed.model.modules() if isinstance(x, torch.nn.Dropout)} == {0.25}
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in resumed.model.state_dict().items())


def test_options_of_a_checkpoint_are_judged_with_the_rest_of_its_own(folder):
    # 16 is no multiple of 3, nor is 256
    assert run(*TINY, "--dim", 24, "--heads", 3, "--steps", 1) == 0
    assert run("--resume", "--heads", 3, "--steps", 1) == 0


def test_rotations_go_on_with_their_count(folder):
    assert run(*TINY, "--mechanism", "lsh", "--steps", 3) == 0
    assert run("--resume", "--steps", 5) == 0
    counts = [x for name, x in tensors_of("out")[2].items() if name.endswith("draws.step")]
    assert [int(x) for x in counts] == [5, 5]


def test_a_window_is_the_file_where_it_is_as_long(folder):
    training = _training.Training(_model.DEFAULTS | train.DEFAULTS | {"length": 999}, _text.load("[b]text$"))
    assert bytes(training._window()[0].tolist()) == SAMPLE
    training.settings["length"], training.settings["batch"] = 998, 20
    starts = {bytes(row.tolist()) for row in training._window()}
    assert starts == {SAMPLE[:-1], SAMPLE[1:]}


def test_training_learns_and_its_model_can_be_loaded(folder, capsys):
    assert run(*TINY, "--steps", 40, "--rate", 0.02, "--warmup", 5, "--json", "a.json", "--plot", "a.svg") == 0
    document = json.loads((folder / "a.json").read_text())
    bits = [step["bits_per_byte"] for step in document["steps"]]
    assert document["ended"] == "complete"
    assert [step["step"] for step in document["steps"]] == list(range(1, 41))
    assert bits[0] > 7
    assert sum(bits[-5:]) / 5 < _text.byte_entropy(SAMPLE) - 0.5
    assert document["tokens_per_s"] == pytest.approx(40 * 64 / document["steps"][-1]["seconds"])
    assert document["peak_resident_bytes"] > 1e8
    assert "<svg" in (folder / "a.svg").read_text()
    model = Reformer.load(_checkpoint.newest("out"))
    assert sum(p.numel() for p in model.parameters()) == document["parameters"]
    output = capsys.readouterr()
    assert output.err == ""
    for part in ("step   40", "bits per byte", "bytes/s, peak ", "checkpoint: out/step-00000040", "picture: a.svg"):
        assert part in output.out


def test_a_sample_follows_its_prompt_and_nothing_is_trained_for_it(folder, capsys):
    assert run(*TINY, "--steps", 2) == 0
    before = tensors_of("out")
    capsys.readouterr()
    options = ("--resume", "--steps", 2, "--sample", 8, "--temperature", 0, "--json", "a.json")
    assert run(*options, "--prompt", "Where\x1b[2J") == 0
    sample = json.loads((folder / "a.json").read_text())["sample"]
    # no escape sequence reaches a terminal
    assert sample.startswith("Where\\x1b[2J")
    output = capsys.readouterr().out
    assert sample in output
    assert "\x1b" not in output
    model = Reformer.load(_checkpoint.newest("out"))
    prompt = torch.tensor([list(b"Where\x1b[2J")], dtype=torch.uint8)
    written = bytes(model.generate(prompt, 8, temperature=0)[0].tolist()).decode(errors="replace")
    assert sample == "".join(x if x.isprintable() or x in "\n\t" else f"\\x{ord(x):02x}" for x in written)
    assert_same_checkpoint("out", "out")
    assert before[:2] == tensors_of("out")[:2]


def test_every_so_many_steps_a_checkpoint_replaces_the_last(folder, capsys):
    assert run(*TINY, "--steps", 5, "--every", 2) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("checkpoint")]
    assert said == [f"checkpoint: out/step-0000000{n}" for n in (2, 4, 5)]
    assert os.listdir("out") == ["step-00000005"]


# interruption


# of a block that each step runs twice: step 3 in its forward, in its backward pass
@pytest.mark.parametrize("call", [5, 6])
def test_an_interrupted_step_is_as_if_it_had_not_begun(folder, monkeypatch, capsys, call):
    options = (*TINY, "--mechanisms", "lsh,local", "--dropout", 0.2)
    assert run(*options, "--steps", 2, output="whole") == 0
    start = _training.Training.start

    def interrupted(settings, text):
        training = start(settings, text)
        count = iter(range(1, 100))

        def interrupt(*_):
            if next(count) == call:
                raise KeyboardInterrupt

        training.model.blocks.blocks[0].g.register_forward_pre_hook(interrupt)
        return training

    monkeypatch.setattr(_training.Training, "start", interrupted)
    assert run(*options, "--steps", 9, "--json", "a.json") == 130
    assert capsys.readouterr().err == "longattn train: interrupted after step 2\n"
    assert_same_checkpoint("whole", "out")
    assert json.loads((folder / "a.json").read_text())["ended"] == "interrupted"


def test_ctrl_c_saves_and_exits_130(folder):
    arguments = ["--text", "[b]text$", "--output", "out", "--steps", 10**6, "--threads", 1, *TINY]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # a background job of a shell inherits that Ctrl-C is ignored
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen([sys.executable, "-m", "longattn", "train", *map(str, arguments)], **pipes, **heard)
    line = ""
    while not line.startswith("step    1"):
        line = process.stdout.readline()
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    (name,) = os.listdir("out")
    step = int(name.removeprefix("step-"))
    assert step >= 1
    assert f"checkpoint: out/{name}" in out
    assert err == f"longattn train: interrupted after step {step}\n"
    assert run("--resume", "--steps", step + 1) == 0


def start(*arguments, stdout):
    given = ["--text", "[b]text$", "--output", "out", "--threads", "1", *map(str, arguments)]
    command = [sys.executable, "-m", "longattn", "train", *given]
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True)


def test_a_reader_who_leaves_loses_no_step(folder):
    with start(*TINY, "--steps", 10**6, "--every", 2, stdout=subprocess.PIPE) as process:
        while not process.stdout.readline().startswith("step    1"):
            assert process.poll() is None
        process.stdout.close()
        assert process.stderr.read() == "longattn train: nothing more can be printed: Broken pipe\n"
        assert process.wait(60) == 1
    (name,) = os.listdir("out")
    assert int(name.removeprefix("step-")) >= 2
    assert run("--resume", "--steps", 1) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no file here is always full")
def test_a_log_on_a_full_disk_is_one_sentence(folder):
    with open("/dev/full", "w") as full, start(*TINY, "--steps", 2, stdout=full) as process:
        assert process.stderr.read() == "longattn train: nothing more can be printed: No space left on device\n"
        assert process.wait(60) == 1
    assert os.listdir("out") == ["step-00000000"]


def test_an_interruption_while_saving_waits_for_the_end(folder, monkeypatch):
    rename = os.rename

    def interrupt(*paths):
        os.kill(os.getpid(), signal.SIGINT)
        rename(*paths)

    monkeypatch.setattr(os, "rename", interrupt)
    assert run(*TINY, "--steps", 4, "--every", 2) == 130
    assert os.listdir("out") == ["step-00000002"]


# nothing lost


@pytest.mark.parametrize("place", ["model", "training"])
def test_a_full_disk_leaves_the_old_checkpoint_whole(folder, monkeypatch, capsys, place):
    import safetensors.torch

    assert run(*TINY, "--steps", 2) == 0
    before = tensors_of("out")
    capsys.readouterr()

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, {"model": "save_model", "training": "save_file"}[place], full)
        assert run("--resume", "--steps", 4, "--every", 1) == 1
    output = capsys.readouterr()
    sentence = "a checkpoint cannot be written to out: No space left on device"
    assert output.err == f"longattn train: {sentence}\n"
    # it was said after step 3, and training went on
    assert f"{sentence}; training goes on" in output.out
    assert "step    4" in output.out
    assert os.listdir("out") == ["step-00000002"]
    assert before[:2] == tensors_of("out")[:2]
    assert run("--resume", "--steps", 4) == 0


def test_a_real_write_error_is_a_sentence(folder, monkeypatch, capsys):
    import safetensors

    assert run(*TINY, "--steps", 1) == 0

    def broken(path):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(Reformer, "save", lambda self, path: broken(path))
    capsys.readouterr()
    assert run("--resume", "--steps", 2) == 1
    assert "No space left on device" in capsys.readouterr().err


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def settings(path, **changes):
    edit(path, settings=json.loads(path.read_text())["settings"] | changes)


FACTS = {
    "no object": lambda path: path.write_text("[]"),
    "another version": lambda path: edit(path, version=2),
    "no steps": lambda path: edit(path, steps=None),
    "steps that are missing": lambda path: edit(path, steps=[]),
    "steps that are words": lambda path: edit(path, steps=[[1, "a", "b"]]),
    "steps that are bare": lambda path: edit(path, steps=[1]),
    "steps that are no numbers": lambda path: edit(path, steps=[[1, float("nan"), 1.0]]),
    "another step": lambda path: edit(path, step=10**15),
    "no text": lambda path: edit(path, text=None),
    "no settings": lambda path: edit(path, settings=3),
    "few settings": lambda path: edit(path, settings={"dim": 16}),
    "layers": lambda path: settings(path, layers=-1),
    "length": lambda path: settings(path, length="64"),
    "mechanisms": lambda path: settings(path, mechanisms="magic"),
    "dtype": lambda path: settings(path, dtype=["float32"]),
    "rate": lambda path: settings(path, rate="fast"),
    "warmup": lambda path: settings(path, warmup=None),
    "dropout": lambda path: settings(path, dropout=float("nan")),
}
DAMAGE = {
    "model.safetensors": lambda path: truncate(path, 1000),
    "training.safetensors": lambda path: truncate(path, -1),
    "training.json": lambda path: truncate(path, 50),
    "config.json": lambda path: path.write_text(path.read_text().replace('"depth": 2', '"depth": 3')),
    "missing": lambda path: (path.parent / "config.json").unlink(),
}


def test_a_damaged_checkpoint_is_one_sentence(folder, capsys):
    assert run(*TINY, "--steps", 1) == 0
    path = _checkpoint.newest("out")
    whole = {name: (path / name).read_bytes() for name in _checkpoint.WHOLE}
    damage = [(path / name, harm) for name, harm in DAMAGE.items()]
    damage += [(path / "training.json", harm) for harm in FACTS.values()]
    for file, harm in damage:
        for name, contents in whole.items():
            (path / name).write_bytes(contents)
        harm(file)
        capsys.readouterr()
        assert run("--resume", "--steps", 2) == 1
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.count("\n") == 1
        assert output.err.startswith("longattn train: the checkpoint out/step-00000001 ")
        assert os.listdir("out") == ["step-00000001"]


def test_a_checkpoint_of_another_model_is_refused(folder, capsys):
    assert run(*TINY, "--steps", 1) == 0
    (folder / "other").write_bytes(SAMPLE[::-1])
    before = tensors_of("out")
    capsys.readouterr()
    for arguments, part in (
        (("--resume", "--dim", 32), "was trained with --dim 16, not 32"),
        (("--resume", "--mechanism", "lsh"), "was trained with --mechanisms local,lsh, not lsh"),
        (("--resume", "--n-hashes", 2), "was trained with --n-hashes 1, not 2"),
        (("--resume", "--hidden", 2), "was trained without --hidden"),
        (("--resume", "--no-reversible"), "was trained without --no-reversible"),
        (("--resume", "--text", "other"), "was trained on another text, [b]text$"),
        (("--layers", 2), "holds a checkpoint, step-00000001; pass --resume"),
    ):
        assert run(*arguments) == 1
        output = capsys.readouterr()
        assert part in output.err
        assert output.err.count("\n") == 1
    assert before[:2] == tensors_of("out")[:2]
    # the same again is no contradiction
    assert run("--resume", "--dim", 16, "--steps", 1) == 0


def test_an_optimiser_of_another_model_is_refused(folder):
    assert run(*TINY, "--steps", 1) == 0
    model = Reformer(_model.config(_model.DEFAULTS | {"length": 64, "layers": 2, "dim": 32}))
    with pytest.raises(CheckpointError, match="another model"):
        _checkpoint.load_training(_checkpoint.newest("out"), _training.make_optimizer(model, 1e-3))


@pytest.mark.parametrize("what", ["loss", "gradient", "parameters"])
def test_a_training_that_diverges_keeps_its_last_checkpoint(folder, monkeypatch, capsys, what):
    backward, options = _training.backward, (*TINY, "--every", 2, "--steps", 9)
    count = iter(range(1, 100))

    def diverging(model, *arguments):
        loss, third = backward(model, *arguments), next(count) == 3
        if third and what == "gradient":
            model.norm.weight.grad[0] = float("inf")
        if third and what == "parameters":
            # of a step that is taken, and saved after the next
            model.norm.weight.data[0] = float("nan")
        return float("nan") if third and what == "loss" else loss

    monkeypatch.setattr(_training, "backward", diverging)
    with monkeypatch.context() as patch:
        if what == "parameters":
            patch.setattr(_training.math, "isfinite", lambda _: True)
        assert run(*options) == 1
    sentence = {
        "loss": "the loss of step 3 is nan",
        "gradient": "the gradient of step 3 is inf",
        "parameters": "the parameters after step 4 are no finite numbers",
    }[what]
    kept = "pass a lower --rate than 0.001; the checkpoint of step 2 stays"
    assert capsys.readouterr().err == f"longattn train: {sentence}; {kept}\n"
    assert os.listdir("out") == ["step-00000002"]
    assert all(x.isfinite().all() for x in tensors_of("out")[2].values())
    assert run("--resume", "--steps", 3) == 0


def test_a_step_that_fails_among_the_parameters_is_not_saved(folder, capsys):
    assert run(*TINY, "--rate", 1e300, "--steps", 2) == 1
    error = capsys.readouterr().err
    assert error.endswith("overflow; step 1 has changed some parameters alone; no checkpoint was written\n")
    assert os.listdir("out") == []


def test_what_others_put_beside_a_checkpoint_stays(folder):
    assert run(*TINY, "--steps", 2) == 0
    for name in ("partial/mine", "step-00000001/config.json", "step-00000000/training.json", "step-00000002/notes"):
        (folder / "out" / name).parent.mkdir(exist_ok=True)
        (folder / "out" / name).write_text("{}")
    # a run that was killed has left this
    (folder / "out" / "longattn-partial-1").mkdir()
    (folder / "out" / "longattn-partial-1" / "model.safetensors.partial").write_text("")
    assert run("--resume", "--steps", 3) == 0
    found = sorted(str(path.relative_to("out")) for path in (folder / "out").relative_to(folder).rglob("*[!0-9]"))
    whole = [f"step-00000003/{name}" for name in sorted(_checkpoint.WHOLE)]
    foreign = ["partial", "partial/mine", "step-00000000/training.json", "step-00000001/config.json"]
    assert found == [*foreign, "step-00000002/notes", *whole]


# bad input

FILES = {
    "missing file": (["--text", "no/such/file"], "does not exist"),
    "folder": (["--text", "."], "is a folder"),
    "text too long": (["--text", "x" * 300], "File name too long"),
    "empty file": (["--text", "empty"], "0 bytes"),
    "short file": (["--text", "ten"], "--length 64 is beyond the 10 bytes of ten; pass 9 or less"),
    "sample beyond the length": (["--sample", "60"], "pass --sample 32 or less"),
    "nothing to resume": (["--resume"], "holds no checkpoint"),
}
MISUSE = {
    "length zero": (["--length", "0"], "--length"),
    "dim not a number": (["--dim", "wide"], "'wide'"),
    "heads that do not divide": (["--heads", "3"], "multiple of heads"),
    "unknown mechanism": (["--mechanisms", "lsh,magic"], "'magic'"),
    "unknown dtype": (["--dtype", "float8"], "'float8'"),
    "rate zero": (["--rate", "0"], "--rate"),
    "rate nan": (["--rate", "nan"], "--rate"),
    "dropout one": (["--dropout", "1"], "--dropout"),
    "temperature negative": (["--temperature", "-1"], "--temperature"),
    "empty prompt": (["--prompt", ""], "--prompt"),
    "picture of another kind": (["--plot", "x.jpeg"], ".png"),
    "json in a missing folder": (["--json", "no/such/x.json"], "does not exist"),
    "output that is a file": (["--output", "ten"], "is a file"),
    "threads zero": (["--threads", "0"], "--threads"),
    "output too long": (["--output", "x" * 300], "File name too long"),
    "json too long": (["--json", "x" * 300], "File name too long"),
    "plot too long": (["--plot", "x" * 300 + ".png"], "File name too long"),
}


@pytest.mark.parametrize("name", [*FILES, *MISUSE])
def test_bad_input_gets_one_sentence(name, folder, capsys):
    for file, size in {"empty": 0, "ten": 10}.items():
        (folder / file).write_bytes(SAMPLE[:size])
    arguments, part = (FILES | MISUSE)[name]
    assert run(*TINY, *arguments) == (1 if name in FILES else 2)
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("longattn train: ")
    assert part in output.err
    assert output.err.count("\n") == 1
    assert not (folder / "out").exists()


def test_any_bytes_are_a_text(folder):
    (folder / "binary").write_bytes(bytes(range(256)))
    assert run(*TINY, "--text", "binary", "--steps", 1, "--length", 255, "--sample", 4) == 0


def test_an_output_folder_that_cannot_be_made_is_a_sentence_before_the_first_step(folder, capsys, monkeypatch):
    monkeypatch.setattr(_training.Training, "step", lambda self: pytest.fail("a step was taken"))
    places = {"[b]text$/out": "cannot be read: Not a directory"}
    if sys.platform == "linux":
        places["/proc/longattn"] = "cannot be written: No such file or directory"
    for place, sentence in places.items():
        assert run(*TINY, "--steps", 1, output=place) == 1
        assert capsys.readouterr().err == f"longattn train: --output {place} {sentence}\n"
