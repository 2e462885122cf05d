"""Training: results, resuming, hooks, checkpoints and refused arguments."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import as_users_run_it

from kronjax import nn
from kronjax.io import matrices
from kronjax.lm.models import gpt2, likelihood, sizes
from kronjax.lm.training import history, loop, step, trainer
from kronjax.lm.training.settings import Optimizer, Settings

CONFIG = gpt2.Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2)
TOKENS = np.tile(np.arange(48, dtype=np.int32), 12)
SETTINGS = Settings(
    steps=6,
    batch=4,
    length=16,
    optimizer=Optimizer(rate=1e-2, warmup=2),
    evaluate_every=3,
    evaluate_blocks=2,
    checkpoint_every=2,
)


@pytest.fixture(scope="module")
def model():
    with as_users_run_it():
        return gpt2.Model(CONFIG, rngs=nnx.Rngs(0))


def run(model, settings=SETTINGS, **keywords):
    return trainer.train(model, TOKENS, settings, progress=False, **keywords)


def curve(result):
    names = ("step", "loss", "grad_norm", "rate", "held_out")
    return [{k: x[k] for k in names if k in x} for x in result.history.lines]


def arrays(model):
    return [np.asarray(x) for x in jax.tree.leaves(nnx.state(model))]


def names(model):
    return [".".join(path[-2:]) for path, _ in nnx.to_flat_state(nnx.state(model))]


def same(first, second):
    return all(map(np.array_equal, arrays(first), arrays(second)))


@pytest.fixture(scope="module")
def whole(model):
    with as_users_run_it():
        return run(model)


def test_training_equals_a_loop_written_by_hand(model, whole):
    graph, state = nnx.split(model)
    blocks = trainer.Blocks(TOKENS[: -(2 * 16 + 1)], 16, 0)
    rate = optax.join_schedules(
        [
            optax.linear_schedule(5e-3, 1e-2, 1),
            optax.cosine_decay_schedule(1e-2, 4, 0.1),
        ],
        [2],
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            rate,
            b2=0.98,
            weight_decay=0.1,
            mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
        ),
    )
    moments = optimizer.init(state)

    def by_hand(state, moments, windows):
        def loss(state):
            return likelihood.token_losses(nnx.merge(graph, state), windows).mean()

        value, gradient = jax.value_and_grad(loss)(state)
        updates, moments = optimizer.update(gradient, moments, state)
        return optax.apply_updates(state, updates), moments, value

    program = jax.jit(by_hand).lower(state, moments, blocks.take(0, 4))
    update = program.compile(compiler_options=step.COMPILER)
    for i, line in enumerate(whole.history.steps):
        state, moments, value = update(state, moments, blocks.take(4 * i, 4))
        assert line["loss"] == pytest.approx(float(value), rel=1e-5)
    theirs = arrays(nnx.merge(graph, state))
    for name, x, y in zip(names(model), arrays(whole.model), theirs, strict=True):
        # The gradient of the biases of keys is 0 up to rounding, which Adam scales.
        if name != "c_attn.bias":
            np.testing.assert_allclose(x, y, atol=1e-5)


def test_losses_fall_and_the_given_model_is_not_modified(model, whole):
    tests = whole.history.evaluations
    assert [line["step"] for line in tests] == [0, 3, 6]
    assert tests[0]["held_out"] == pytest.approx(np.log(64), rel=0.1)
    assert tests[-1]["held_out"] < tests[0]["held_out"] - 0.3
    assert same(model, gpt2.Model(CONFIG, rngs=nnx.Rngs(0)))
    assert whole.record["trained"] == whole.record["parameters"]


class Interrupting:
    """A hook that raises once, like a crash."""

    def __init__(self, at):
        self.at, self.calls = at, []

    def __repr__(self):
        return "Interrupting()"

    def due(self, step):
        return step in (0, 3, self.at)

    def __call__(self, step, model):
        if step == self.at:
            raise KeyboardInterrupt
        self.calls.append(step)

    def state(self):
        return {"calls": self.calls}

    def restore(self, state):
        self.calls = list(state["calls"])


def test_an_interrupted_run_is_resumed_bitwise(model, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(model, folder=tmp_path, hook=Interrupting(5))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] in (4, 5)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # truncated by the crash
    hook = Interrupting(None)
    rest = run(model, folder=tmp_path, hook=hook)
    assert hook.calls == [0, 3]  # the call of step 3 is not repeated
    assert curve(rest) == curve(whole)
    assert same(rest.model, whole.model)
    stored = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in stored] == rest.history.lines
    assert {x.name for x in (tmp_path / trainer.STATE).iterdir()} == {"4", "6"}
    for name in ("loss.png", "training.md", "training.json"):
        assert (tmp_path / name).stat().st_size > 100
    # A finished run is not computed again.
    again = run(model, folder=tmp_path, hook=Interrupting(None))
    assert again.record["compile_seconds"] == 0
    assert curve(again) == curve(whole) and same(again.model, whole.model)


def test_the_checkpoint_of_another_run_is_refused(model, tmp_path):
    run(model, folder=tmp_path)
    other = dataclasses.replace(SETTINGS, seed=1, batch=2)
    with pytest.raises(ValueError, match="batch was 4 and is 2; seed was 0 and is 1"):
        run(model, other, folder=tmp_path)
    with pytest.raises(ValueError, match="the model differs"):
        run(gpt2.Model(CONFIG, rngs=nnx.Rngs(1)), folder=tmp_path)
    with pytest.raises(ValueError, match="the hook differs"):
        run(model, folder=tmp_path, hook=Interrupting(None))
    # Settings that do not affect the result may change.
    again = dataclasses.replace(SETTINGS, accumulate=2, keep=1, remat=True)
    assert run(model, again, folder=tmp_path).record["steps"] == 6


class Setting:
    """A hook that changes a model at one step."""

    def __init__(self, at, change):
        self.at, self.change = at, change

    def __repr__(self):
        return "Setting()"

    def due(self, step):
        return step == self.at

    def __call__(self, step, model):
        self.change(model)

    def state(self):
        return {}

    def restore(self, state):
        pass


def test_a_loss_that_is_not_finite_ends_the_run_and_is_located(model, tmp_path):
    def damage(model):
        kernel = model.h[0].mlp.c_fc.kernel
        kernel[...] = kernel[...].at[0, 0].set(jnp.inf)

    with pytest.raises(ValueError) as error:
        run(model, folder=tmp_path, hook=Setting(3, damage))
    message = str(error.value)
    assert "at step 4" in message and "the parameter h.0.mlp.c_fc.kernel" in message
    assert "the checkpoint of step 2 is kept" in message
    kept = (tmp_path / trainer.STATE).iterdir()
    assert [x.name for x in kept if x.name.isdigit()] == ["2"]

    def enlarge(model):  # beyond the range of float32
        kernel = model.h[0].mlp.c_proj.kernel
        kernel[...] = jnp.full_like(kernel[...], 3e38)

    with pytest.raises(
        ValueError, match=r"at step 1.* output of the layer h\.0\.mlp\.c_p"
    ):
        run(model, hook=Setting(0, enlarge))


def test_a_hook_may_change_numbers_and_nothing_else(model):
    def shorten(model):
        model.h[0].mlp.c_fc.bias = nnx.Param(jnp.zeros(3))

    with pytest.raises(ValueError, match="changed more than numbers at step 0"):
        run(model, hook=Setting(0, shorten))


def test_masks_are_data(model, tmp_path, monkeypatch):
    """Masks change without compilation, are restored, and stay in force."""
    pruned = nnx.merge(*nnx.split(model))
    layer = pruned.h[0].mlp.c_fc
    kernel, bias = layer.kernel[...], layer.bias[...]
    nn.replace(
        pruned,
        "h.0.mlp.c_fc",
        nn.MaskedLinear(kernel, jnp.ones(kernel.shape, bool), bias),
    )

    def prune(model):
        mask = model.h[0].mlp.c_fc.mask
        mask[...] = jnp.abs(model.h[0].mlp.c_fc.kernel[...]) > 0.2

    settings = dataclasses.replace(SETTINGS, freeze=("wpe", "h.*.ln_1"))
    hook = Setting(3, prune)
    compiled = []
    compile_step = loop.compile_step
    monkeypatch.setattr(
        loop, "compile_step", lambda *x: compiled.append(1) or compile_step(*x)
    )
    result = run(pruned, settings, hook=hook, folder=tmp_path)
    assert compiled == [1]
    mask = np.asarray(result.model.h[0].mlp.c_fc.mask[...])
    assert 0.1 < mask.mean() < 0.9
    again = run(pruned, settings, hook=Setting(3, prune), folder=tmp_path)
    assert np.array_equal(again.model.h[0].mlp.c_fc.mask[...], mask)
    # Exactly the frozen parameters are unchanged.
    changed = [
        not np.array_equal(*x)
        for x in zip(arrays(pruned), arrays(result.model), strict=True)
    ]
    unchanged = {
        name for name, moved in zip(names(pruned), changed, strict=True) if not moved
    }
    assert unchanged == {"wpe.embedding", "ln_1.scale", "ln_1.bias"}


def test_training_stops_with_the_best_parameters(model, whole, tmp_path):
    def spoil(model):
        model.wte.embedding[...] = model.wte.embedding[...][::-1]

    settings = dataclasses.replace(SETTINGS, evaluate_every=1, patience=2)
    hook = Setting(2, spoil)
    result = run(model, settings, hook=hook, folder=tmp_path)
    assert [x["step"] for x in result.history.evaluations] == [0, 1, 2, 3]
    assert result.record["best_step"] == 1
    assert result.record["ended"] == "no lower loss since step 1"
    kept = {x.name for x in (tmp_path / trainer.STATE).iterdir()}
    assert kept == {"1", "2", "3"}
    again = run(model, settings, hook=Setting(2, spoil), folder=tmp_path)
    assert same(again.model, result.model)
    assert again.record["ended"] == result.record["ended"]
    # Without the hook the loss falls until the end.
    whole = run(model, dataclasses.replace(SETTINGS, patience=1))
    assert whole.record["best_step"] == 6


def test_a_signal_stops_the_run_after_its_state_is_saved(model, whole, tmp_path):
    def stop(model):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(trainer.Stopped, match="SIGTERM after step 3"):
        run(model, hook=Setting(3, stop), folder=tmp_path)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert (tmp_path / trainer.STATE / "3").is_dir()
    rest = run(model, hook=Setting(3, stop), folder=tmp_path)
    assert curve(rest) == curve(whole)


def test_utilisation_is_reported_if_the_peak_speed_is_known(model, monkeypatch):
    monkeypatch.setitem(history.PEAKS, jax.devices()[0].device_kind, (2e9, 1e9))
    result = run(model)
    flops = 3 * sizes.count(model).flops
    for line in result.history.steps:
        expected = line["tokens_per_second"] * flops / 1e9
        assert line["utilisation"] == pytest.approx(expected, abs=1e-4, rel=1e-3)
    table = dict(history.rows(result.record))
    assert table["model FLOP utilisation"].endswith(" %")


def test_a_checkpoint_larger_than_the_free_space_is_refused(
    model, tmp_path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="it takes 0 MiB, and 0 are free.*none before it"):
        run(model, folder=tmp_path)
    assert not list((tmp_path / trainer.STATE).iterdir())


def test_results_print_in_a_few_lines(whole, model):
    text = repr(whole)
    assert text.count("\n") < 10 and "6 of 6" in text and "array" not in text.lower()
    table = whole._repr_html_()
    assert table.startswith("<table>") and "<td" in table and "6 of 6" in table
    lines = repr(whole.history).splitlines()
    assert lines[0] == "6 steps, 3 evaluations" and len(lines) == 3
    assert lines[1].startswith("loss: 4.") and "lowest" in lines[2]
    assert repr(history.History()) == "0 steps, 0 evaluations"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 2, "optimizer": Optimizer(warmup=2)}, "warm-up of 2 steps does not"),
        ({"length": 17}, "the model has a context of 16"),
        ({"freeze": ("h.*", "wte", "wpe", "ln_f")}, "everything is frozen"),
        ({"freeze": ("h.*.attention",)}, r"nothing is called 'h\.\*\.attention'"),
        ({"held_out": 0.0, "patience": 1}, "patience needs held-out text"),
        ({"held_out": 0.99}, "the text has 576 tokens"),
    ],
)
def test_settings_that_do_not_fit_are_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        run(model, dataclasses.replace(SETTINGS, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch": 6, "accumulate": 4}, "no 4 equal parts"),
        ({"precision": "float16"}, "write float32 or bfloat16"),
    ],
)
def test_invalid_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **change)


def test_teachers_that_do_not_fit_are_refused(model):
    config = dataclasses.replace(CONFIG, vocab_size=65)
    teacher = gpt2.Model(config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="teacher has a vocabulary of 65.* one of 64"):
        run(model, teacher=teacher)
    config = dataclasses.replace(CONFIG, n_positions=8)
    teacher = gpt2.Model(config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="teacher has a context of 8"):
        run(model, teacher=teacher)


def test_a_batch_that_is_too_large_asks_for_parts(model, monkeypatch):
    monkeypatch.setattr(matrices, "physical_memory", lambda: 1000)
    with pytest.raises(ValueError, match="4 windows of 16 .*--accumulate 2 makes"):
        run(model)
