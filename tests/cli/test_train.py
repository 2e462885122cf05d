"""The command `kronjax train` as a user runs it."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from flax import nnx
from helpers import SENTENCES, free_port

from kronjax import lm
from kronjax.cli.main import main
from kronjax.lm.checkpoints import hugging_face
from kronjax.lm.models import gpt2
from kronjax.lm.text.tokenizer import Tokenizer
from kronjax.lm.training import loop


@pytest.fixture
def small(tokenizer):
    """A GPT-2 of one block, because compilation dominates the time."""
    config = gpt2.Config(vocab_size=300, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    model = gpt2.Model(config, rngs=nnx.Rngs(0))
    model.tokenizer = tokenizer
    return model


@pytest.fixture
def folder(small, tmp_path):
    """A folder with a model and a text."""
    hugging_face.save(hugging_face.cast(small, "bfloat16"), tmp_path / "small")
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES * 60))
    return tmp_path


LINE = ["--batch", "2", "--length", "16", "--rate", "0.01"]


def command(folder, *more):
    here = [str(folder / "small"), "--data", str(folder / "text.txt")]
    return ["train", *here, *LINE, *more]


def curve(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines
    ]


def test_a_killed_run_is_resumed_bitwise(folder):
    """SIGKILL allows no cleaning up."""
    more = ["--steps", "120", "--checkpoint-every", "20"]

    def start(out):
        line = command(folder, *more, "--out", str(folder / out))
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "kronjax", *line],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    killed, deadline = start("killed"), time.monotonic() + 300
    state = folder / "killed" / ".training"
    while not (state / "40").exists():
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (folder / "killed" / "model.safetensors").exists()
    for out in ("killed", "whole"):
        process = start(out)
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        assert "120 of 120" in output
    assert not state.exists()
    assert curve(folder / "killed") == curve(folder / "whole")
    assert len(curve(folder / "whole")) == 120 + 11
    whole, killed = (
        (folder / x / "model.safetensors").read_bytes() for x in ("whole", "killed")
    )
    assert whole == killed


@pytest.mark.slow
def test_processes_train_together_and_resume_together(folder):
    """One is killed, later one gets SIGTERM: the losses equal those of one process."""
    more = ["--steps", "60", "--checkpoint-every", "10", "--shard", "full"]
    state = folder / "together" / ".training"

    def start(out, *more_still, flags=""):
        line = command(folder, *more, "--out", str(folder / out), *more_still)
        return subprocess.Popen(
            [sys.executable, "-m", "kronjax", *line],
            env={**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"] + flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def start_both():
        where = ["--distributed", "--coordinator", f"127.0.0.1:{free_port()}"]
        where += ["--processes", "2", "--process"]
        return start("together", *where, "0"), start("together", *where, "1")

    def interrupt(step, who, number):
        both, deadline = start_both(), time.monotonic() + 300
        while not (state / step).exists():
            assert all(process.poll() is None for process in both)
            assert time.monotonic() < deadline
            time.sleep(0.002)
        both[who].send_signal(number)
        errors = [process.communicate(timeout=300)[1] for process in both]
        assert not (folder / "together" / "model.safetensors").exists()
        return [process.returncode for process in both], errors

    # The other process cannot continue, and ends.
    codes, _ = interrupt("10", 0, signal.SIGKILL)
    assert codes[0] == -signal.SIGKILL and codes[1] != 0
    codes, errors = interrupt("30", 1, signal.SIGTERM)
    assert codes == [128 + signal.SIGTERM] * 2
    steps = [re.search(r"stopped by SIGTERM after step (\d+)", x) for x in errors]
    assert steps[0] and steps[1] and steps[0][1] == steps[1][1]
    assert (state / steps[0][1]).is_dir()
    first, second = start_both()
    alone = start("alone", flags=" --xla_force_host_platform_device_count=2")
    for process, text in ((first, "60 of 60"), (second, ""), (alone, "60 of 60")):
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert text in output if text else not output
    assert not state.exists()
    for ours, theirs in zip(
        curve(folder / "together"), curve(folder / "alone"), strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_distributed_training_needs_sharding_and_complete_options(folder, capsys):
    assert main(command(folder, "--distributed")) == 2
    assert "--distributed needs --shard data or full" in capsys.readouterr().err
    assert main(command(folder, "--processes", "2")) == 2
    assert "--process go with --distributed" in capsys.readouterr().err


def test_a_student_matches_its_teacher(folder, small, capsys):
    hugging_face.save(small, folder / "teacher")
    more = ["--steps", "4", "--teacher", str(folder / "teacher"), "--hidden-weight"]
    more += ["1", "--layer-map", "0:0", "--accumulate", "2", "--remat", "--json"]
    assert main(command(folder, *more, "--precision", "bfloat16")) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["steps"] == 4
    assert record["settings"]["weights"]["layers"] == [[0, 0]]
    out = folder / "small-trained"
    trained = lm.load(out)
    assert (
        str(trained.wte.embedding.dtype) == "bfloat16"
    )  # the dtype of the given model
    line = curve(out)[1]
    assert line["loss"] == pytest.approx(
        line["next_token"] + line["logits"] + line["hidden"], rel=1e-5
    )
    # The student equals the teacher up to rounding.
    assert line["logits"] < 0.05 and line["hidden"] < 0.05
    assert main(command(folder, *more)) == 2
    assert "already holds a model; --force replaces it" in capsys.readouterr().err
    # The same command again is finished, until a file that it reads changes.
    given = command(folder, *more, "--precision", "bfloat16")
    assert main(given) == 0
    assert json.loads(capsys.readouterr().out) == record
    assert main([x for x in given if x != "--json"]) == 0
    assert "finished already" in capsys.readouterr().out
    os.utime(folder / "teacher/model.safetensors", (0, 0))
    assert main(given) == 2


def test_sigterm_saves_the_state(folder, monkeypatch, capsys):
    keep = loop.Loop._test

    def stop(self, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        keep(self, step)

    monkeypatch.setattr(loop.Loop, "_test", stop)
    more = ["--steps", "4", "--evaluate-every", "2"]
    assert main(command(folder, *more)) == 128 + signal.SIGTERM
    assert "SIGTERM after step 2; run the same command again" in capsys.readouterr().err
    assert (folder / "small-trained" / ".training" / "2").is_dir()
    assert main(command(folder, *more, "--steps", "5")) == 2
    assert "steps was 4 and is 5" in capsys.readouterr().err
    assert main(command(folder, *more)) == 0
    assert "4 of 4" in capsys.readouterr().out


# No file can grow beyond the limit, as on a full disk. In a separate process, because
# Orbax leaves coroutines behind that are never awaited.
FULL_FROM_STEP_3 = """
import resource, sys
from kronjax.cli.main import main
from kronjax.lm.training import loop

def fill(self, step, keep=loop.Loop._test):
    if step == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, resource.RLIM_INFINITY))
    keep(self, step)

loop.Loop._test = fill
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_leaves_the_previous_checkpoint_intact(folder):
    more = ["--steps", "6", "--evaluate-every", "3", "--checkpoint-every", "2"]

    def train(out, *python):
        line = command(folder, *more, "--out", str(folder / out))
        return subprocess.run(
            [sys.executable, *python, *line], capture_output=True, text=True
        )

    full = train("full", "-c", FULL_FROM_STEP_3)
    assert full.returncode == 2
    assert re.search(r"step 4 .*too large.*step 2 is intact", full.stderr)
    for out in ("full", "whole"):
        assert train(out, "-m", "kronjax").returncode == 0
    assert curve(folder / "full") == curve(folder / "whole")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layer-map", "0-1"], "write it like 0:1,1:3"),
        (["--steps", "5", "--warmup", "9"], "warm-up of 9 steps does not fit"),
        (["--length", "65"], "the model has a context of 64"),
        (["--batch", "0"], "batch is 0"),
        (["--freeze", "nothing"], "nothing is called 'nothing'"),
    ],
)
def test_mistakes_print_one_line(folder, capsys, more, message):
    assert main(command(folder, *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_texts_that_are_too_short_are_refused(folder, capsys):
    for content, message in (("", "is empty"), ("Tiny.", r"the text has \d+ tokens")):
        (folder / "text.txt").write_text(content)
        assert main(command(folder)) == 2
        assert re.search(message, capsys.readouterr().err)


def test_a_teacher_with_another_tokenizer_is_refused(folder, small, capsys):
    files = {**small.tokenizer.files}
    backend = json.loads(files["tokenizer.json"])
    backend["model"]["merges"] = backend["model"]["merges"][:3]
    files["tokenizer.json"] = json.dumps(backend).encode()
    small.tokenizer = Tokenizer(files)
    hugging_face.save(small, folder / "teacher")
    assert main(command(folder, "--teacher", str(folder / "teacher"))) == 2
    assert "the teacher has another tokenizer" in capsys.readouterr().err
