"""The loop: what it computes, what it keeps, and what it refuses."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import as_users_run_it

from kronjax.lm import gpt2, losses, train
from kronjax.lm.optimizer import Optimizer
from kronjax.lm.regimen import Settings

CONFIG = gpt2.Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2)
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
    return train.run(model, TOKENS, settings, progress=False, **keywords)


def curve(result):
    names = ("step", "loss", "grad_norm", "rate", "held_out")
    return [{k: x[k] for k in names if k in x} for x in result.history.lines]


def arrays(model):
    return [np.asarray(x) for x in jax.tree.leaves(nnx.state(model))]


def names(model):
    return [".".join(path[-2:]) for path, _ in nnx.to_flat_state(nnx.state(model))]


def same(one, other):
    return all(map(np.array_equal, arrays(one), arrays(other)))


@pytest.fixture(scope="module")
def whole(model):
    with as_users_run_it():
        return run(model)


def test_training_is_that_of_a_loop_written_by_hand(model, whole):
    graph, state = nnx.split(model)
    blocks = train.Blocks(TOKENS[: -(2 * 16 + 1)], 16, 0)
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

    @jax.jit
    def step(state, moments, windows):
        def loss(state):
            return losses.token_losses(nnx.merge(graph, state), windows).mean()

        value, gradient = jax.value_and_grad(loss)(state)
        updates, moments = optimizer.update(gradient, moments, state)
        return optax.apply_updates(state, updates), moments, value

    for i, line in enumerate(whole.history.steps):
        state, moments, value = step(state, moments, blocks.take(4 * i, 4))
        assert line["loss"] == pytest.approx(float(value), rel=1e-5)
    theirs = arrays(nnx.merge(graph, state))
    for name, x, y in zip(names(model), arrays(whole.model), theirs, strict=True):
        # The gradient at the biases of keys is 0 but for rounding, which Adam scales.
        if name != "c_attn.bias":
            np.testing.assert_allclose(x, y, atol=1e-5)


def test_losses_fall_and_the_model_given_stays(model, whole):
    tests = whole.history.evaluations
    assert [line["step"] for line in tests] == [0, 3, 6]
    assert tests[0]["held_out"] == pytest.approx(np.log(64), rel=0.1)
    assert tests[-1]["held_out"] < tests[0]["held_out"] - 0.3
    assert same(model, gpt2.Model(CONFIG, rngs=nnx.Rngs(0)))
    assert whole.record["trained"] == whole.record["parameters"]
