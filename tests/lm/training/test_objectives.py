"""Terms of the loss against float64 definitions, and refused arguments."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import as_users_run_it, losses_reference
from language_models import make_llama

from kronjax.lm.models import attention, gpt2
from kronjax.lm.training import objectives
from kronjax.lm.training.settings import Weights

CONFIG = gpt2.Config(vocab_size=40, n_positions=12, n_embd=8, n_layer=2, n_head=2)
WINDOWS = np.random.default_rng(0).integers(0, 40, (3, 9)).astype(np.int32)
ALL = Weights(1.0, 0.5, 0.25, 2.0, temperature=2.0)


def softmax(x):
    x = np.asarray(x, np.float64)
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def pair():
    with as_users_run_it():
        student, teacher = (gpt2.Model(CONFIG, rngs=nnx.Rngs(i)) for i in (0, 1))
        for model in (student, teacher):
            model.wte.embedding[...] *= 3
        return student, teacher


def computed(function, *models):
    """Return the value of a function of models, compiled without optimisation."""
    graphs, states = zip(*map(nnx.split, models), strict=True)
    program = jax.jit(lambda states: function(*map(nnx.merge, graphs, states)))
    options = {"xla_backend_optimization_level": 0}
    return program.lower(states).compile(compiler_options=options)(states)


def terms(student, teacher, weights=ALL, **keywords):
    def both(student, teacher):
        return objectives.objective(student, teacher, WINDOWS, weights, **keywords)

    total, parts = computed(both, student, teacher)
    return float(total), {name: float(x) for name, x in parts.items()}


def walk(model):
    states = objectives.walk(model, WINDOWS[:, :-1], inside=True)
    return states, model.head(states.last)


def test_terms_equal_their_definitions(pair):
    student, teacher = pair
    total, values = terms(student, teacher)
    nll = np.mean([losses_reference(student, row)[0] for row in WINDOWS])
    assert values["next_token"] == pytest.approx(nll, rel=1e-5)
    (ours, x), (theirs, y) = (computed(walk, model) for model in pair)
    p, q = softmax(y / 2), softmax(x / 2)
    divergence = 4 * np.mean(np.sum(p * np.log(p / q), axis=-1))
    assert values["logits"] == pytest.approx(divergence, rel=1e-4)
    errors = [
        np.mean((np.asarray(x) - y) ** 2) / np.mean(np.asarray(y) ** 2)
        for x, y in zip(ours.states, theirs.states, strict=True)
    ]
    assert len(errors) == 3
    assert values["hidden"] == pytest.approx(np.mean(errors), rel=1e-4)
    errors = []
    for pair_of_heads in zip(ours.heads, theirs.heads, strict=True):
        q, p = (np.asarray(probabilities(*heads)) for heads in pair_of_heads)
        ratio = np.where(p > 0, p / np.where(p > 0, q, 1), 1)
        errors.append(np.mean(np.sum(p * np.log(ratio), axis=-1)))
    assert values["attention"] == pytest.approx(np.mean(errors), rel=1e-4)
    parts = (
        values["next_token"],
        values["logits"],
        values["hidden"],
        values["attention"],
    )
    assert total == pytest.approx(np.dot((1.0, 0.5, 0.25, 2.0), parts), rel=1e-5)


def probabilities(q, k):
    """The causal attention of each query to each key: [b, h, t, t]."""
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    group = q.shape[2] // k.shape[2]
    k = np.repeat(k, group, axis=2)
    scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[3])
    t = q.shape[1]
    return softmax(np.where(np.tri(t, dtype=bool), scores, -np.inf))


def test_attention_of_grouped_heads_is_compared_head_by_head():
    draw = np.random.default_rng(1).normal
    q, k = draw(size=(2, 5, 4, 3)), draw(size=(2, 5, 2, 3))
    ours = attention.log_probabilities(*(x.astype(np.float32) for x in (q, k)))
    np.testing.assert_allclose(np.exp(ours), probabilities(q, k), atol=1e-6)


def test_a_model_has_no_distance_to_itself(pair):
    _, values = terms(pair[0], pair[0])
    assert max(values["logits"], values["hidden"], values["attention"]) < 1e-6


def test_no_gradient_reaches_the_teacher(pair):
    student, teacher = pair

    def total(student, teacher):
        return objectives.objective(student, teacher, WINDOWS, ALL)[0]

    ours, theirs = computed(nnx.grad(total, argnums=(0, 1)), student, teacher)
    assert all(np.any(x != 0) for x in jax.tree.leaves(ours))
    assert not any(np.any(x != 0) for x in jax.tree.leaves(theirs))


def test_saving_memory_changes_nothing(pair, monkeypatch):
    plain = terms(*pair)
    # Seven tokens at a time, of which 24 is not a multiple.
    monkeypatch.setattr(objectives, "_LOGITS", 7 * 40)
    saving = terms(*pair, remat=True)
    assert saving[0] == pytest.approx(plain[0], rel=1e-5)
    assert saving[1] == pytest.approx(plain[1], rel=1e-4)


def test_other_architectures_can_be_walked_through():
    model = make_llama(
        vocab_size=40, hidden_size=8, num_hidden_layers=1, num_key_value_heads=1
    )
    states, logits = computed(walk, model)
    expected = computed(lambda model: model(WINDOWS[:, :-1]), model)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert [x.shape for x in states.states] == [(3, 8, 8)] * 2
    assert states.heads[0][0].shape == (3, 8, 2, 4)


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        (2, 6, ((0, 2), (1, 5))),
        (3, 3, ((0, 0), (1, 1), (2, 2))),
        (3, 2, ((0, 0), (1, 0), (2, 1))),
    ],
)
def test_blocks_are_spread_evenly(student, teacher, pairs):
    assert objectives.uniform_map(student, teacher) == pairs


def test_a_teacher_of_another_shape_is_refused_if_states_are_compared(pair):
    narrow = gpt2.Model(
        dataclasses.replace(CONFIG, n_embd=4, n_head=1), rngs=nnx.Rngs(0)
    )

    def outline(weights):
        return jax.eval_shape(
            lambda: objectives.objective(pair[0], narrow, WINDOWS, weights)
        )

    assert set(outline(Weights())[1]) == {"next_token", "logits"}
    with pytest.raises(ValueError, match="8 channels in the student, 4 in the teacher"):
        outline(Weights(hidden=1.0))
    with pytest.raises(ValueError, match="2 heads in the student, 1 in the teacher"):
        outline(Weights(attention=1.0))
    with pytest.raises(ValueError, match="block 0 .* match block 2 of the teacher"):
        objectives.check(*pair, Weights(hidden=1.0, layers=((0, 2),)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"next_token": -1.0}, "at least 0"),
        ({"next_token": 0.0, "logits": 0.0}, "at least 0, and one positive"),
        ({"temperature": 0.0}, "must be positive"),
        ({"hidden": float("nan")}, "at least 0"),
    ],
)
def test_invalid_weights_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Weights(**settings)
