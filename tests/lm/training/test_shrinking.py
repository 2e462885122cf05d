"""Compression during training, from Python and from the command line."""

import json

import numpy as np
import pytest
from flax import nnx
from helpers import SENTENCES

from kronjax import lm, nn
from kronjax.cli.main import main
from kronjax.lm.models import gpt2
from kronjax.lm.training import history, pruning, shrinking
from kronjax.lm.training.settings import Course, Pruning, Settings

SETTINGS = Settings(steps=6, batch=2, length=8)


def masks(model):
    return {
        name: np.asarray(x.mask[...])
        for name, x in nn.linear_layers(model).items()
        if isinstance(x, nn.MaskedLinear)
    }


def test_pruning_is_resumed_bitwise_after_a_crash(dense, tokens, tmp_path, monkeypatch):
    settings = Settings(steps=6, batch=2, length=8, checkpoint_every=1)
    asked = Course(pruning=Pruning(0.5, steps=4, every=1, match="h.*.mlp.*"))
    given = {"teacher": dense, "progress": False}
    whole = shrinking.run(dense, tokens, settings, asked, **given)
    assert pruning.sparsity(whole.model) > 0.3 and pruning.sparsity(dense) == 0
    assert whole.record["held"] - whole.record["parameters"] == 2 * 256
    assert whole.record["analysis"]["log10_bound"] != 0
    original = pruning.Gradual.__call__

    def crash(self, step, model):
        if step == 3:
            raise KeyboardInterrupt
        original(self, step, model)

    with monkeypatch.context() as patch:
        patch.setattr(pruning.Gradual, "__call__", crash)
        with pytest.raises(KeyboardInterrupt):
            shrinking.run(dense, tokens, settings, asked, folder=tmp_path, **given)
    again = shrinking.run(dense, tokens, settings, asked, folder=tmp_path, **given)
    for name, mask in masks(whole.model).items():
        assert np.array_equal(masks(again.model)[name], mask)
        kernel = nn.linear_layers(again.model)[name].materialize()
        theirs = nn.linear_layers(whole.model)[name].materialize()
        np.testing.assert_array_equal(kernel, theirs)
    losses = [x["loss"] for x in again.history.steps]
    assert losses == [x["loss"] for x in whole.history.steps]
    table = (tmp_path / history.SUMMARY).read_text()
    assert "including masked" in table and "Bound" in table


def test_stages_are_reported_as_one_training(dense, tokens, tmp_path):
    asked = Course(low_rank_to=0.5, stages=2, match=("h.*.mlp.c_fc",))
    result = shrinking.run(
        dense, tokens, SETTINGS, asked, folder=tmp_path, progress=False
    )
    lines = (tmp_path / history.METRICS).read_text().splitlines()
    steps = [x for x in map(json.loads, lines) if history.HELD_OUT not in x]
    assert [x["step"] for x in steps] == [1, 2, 3, 4, 5, 6]
    assert [x["stage"] for x in steps] == [1, 1, 1, 2, 2, 2]
    assert result.record["steps"] == result.record["asked_steps"] == 6
    layer = nn.linear_layers(result.model)["h.1.mlp.c_fc"]
    assert isinstance(layer, nn.KroneckerLinear)
    assert nn.cost(layer).parameters - 32 <= 128


def test_contradictions_are_refused(dense, tokens):
    with pytest.raises(ValueError, match="prune in another"):
        Course(Pruning(0.5), low_rank_to=0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Course(low_rank_to=1.5)
    with pytest.raises(ValueError, match="ends at step 9, the run has 6"):
        shrinking.run(dense, tokens, SETTINGS, Course(Pruning(0.5, steps=9)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("dense")
    config = gpt2.Config(vocab_size=300, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    model = gpt2.Model(config, rngs=nnx.Rngs(0))
    model.tokenizer = tokenizer
    lm.save(model, path / "model")
    (path / "text.txt").write_text("\n".join(SENTENCES * 6))
    return path


def test_the_command_prunes_and_writes_masks(folder, capsys):
    out = folder / "pruned"
    args = ["train", str(folder / "model"), "--data", str(folder / "text.txt")]
    args += ["--out", str(out), "--steps", "3", "--batch", "2", "--length", "8"]
    args += ["--teacher", str(folder / "model"), "--pattern", "2:4"]
    args += ["--calibrate", str(folder / "text.txt"), "--json"]
    assert main(args) == 0
    record = json.loads(capsys.readouterr().out)
    model = lm.load(out)
    for mask in masks(model).values():
        assert np.all(mask.reshape(-1, 4, mask.shape[1]).sum(axis=1) == 2)
    assert record["held"] - record["parameters"] == sum(
        (~mask).sum() for mask in masks(model).values()
    )
    lm.export(model, folder / "exported")
    kernel = lm.load(folder / "exported").h[0].mlp.c_fc.kernel[...]
    assert np.mean(np.asarray(kernel) == 0) >= 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sparsity", "1"], "below 1"),
        (["--sparsity", "-0.5"], "below 1"),
        (["--sparsity", "nan"], "below 1"),
        (["--pattern", "half"], "write it like 2:4"),
        (["--pattern", "4:2"], "write 2:4"),
        (["--low-rank-to", "0"], "between 0 and 1"),
        (["--low-rank-to", "0.5", "--stages", "9"], "9 stages need as many steps"),
        (["--sparsity", "0.5", "--low-rank-to", "0.5"], "prune in another"),
        (["--sparsity", "0.5", "--prune-steps", "9"], "give more steps"),
        (["--sparsity", "0.5", "--match", "fc"], "matches no layer"),
        (["--scope", "global"], "give --sparsity"),
        (["--match", "h.*"], "--match selects"),
        (["--calibrate", "text.txt"], "give one of them"),
    ],
)
def test_the_command_refuses_invalid_options(folder, options, words, capsys):
    args = ["train", str(folder / "model"), "--data", str(folder / "text.txt")]
    args += ["--out", str(folder / "refused"), "--steps", "3", "--length", "8"]
    assert main([*args, *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (folder / "refused" / "config.json").exists()
