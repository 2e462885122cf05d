"""Laws that every port keeps; that they compute the right thing, see test_parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import as_users_run_it

from kronjax.lm.models import gpt2, llama, opt
from kronjax.lm.models.base import activation

MODELS = {
    "gpt2": (gpt2, {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "opt": (
        opt,
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "ffn_dim": 24,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "do_layer_norm_before": False,
            "word_embed_proj_dim": 8,
        },
    ),
    "llama": (
        llama,
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    ),
}
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 9)).astype(np.int32)


@pytest.fixture(scope="module", params=sorted(MODELS))
def model(request):
    port, values = MODELS[request.param]
    with as_users_run_it():
        return port.Model(port.Config(vocab_size=50, **values), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def call(model):
    graph, state = nnx.split(model)
    jitted = jax.jit(lambda state, x, mask: nnx.merge(graph, state)(x, mask=mask))
    return lambda x, mask: np.asarray(jitted(state, x, mask))


def test_no_logit_sees_a_later_token(call):
    mask = np.ones(TOKENS.shape, bool)
    changed = TOKENS.copy()
    changed[:, 5] = (changed[:, 5] + 1) % 50
    before, after = call(TOKENS, mask), call(changed, mask)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.abs(before[:, 5:] - after[:, 5:]).max(axis=-1).min() > 1e-4


def test_padding_on_either_side_changes_nothing(call):
    mask = np.ones(TOKENS.shape, bool)
    expected = call(TOKENS, mask)[:, :6]
    for first in (0, 3):
        padded, mask = np.full(TOKENS.shape, 7, np.int32), np.zeros(TOKENS.shape, bool)
        padded[:, first : first + 6] = TOKENS[:, :6]
        mask[:, first : first + 6] = True
        got = call(padded, mask)[:, first : first + 6]
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_steps_through_a_cache_are_one_call(model, call):
    mask = np.ones(TOKENS.shape, bool)
    mask[0, :2] = False
    expected = call(TOKENS, mask)
    graph, state = nnx.split(model)

    @jax.jit
    def step(state, tokens, cache, mask):
        return nnx.merge(graph, state).step(tokens, cache, mask=mask)

    logits, cache = step(state, TOKENS[:, :5], model.empty_cache(2, 12), mask[:, :5])
    np.testing.assert_allclose(logits, expected[:, 4], atol=2e-5)
    for i in range(5, 9):
        logits, cache = step(state, TOKENS[:, [i]], cache, mask[:, [i]])
        np.testing.assert_allclose(logits, expected[:, i], atol=2e-5)


def test_a_config_survives_its_json(model):
    values = model.config.to_hugging_face()
    assert type(model.config).from_hugging_face(values) == model.config
    extra = type(model.config).from_hugging_face({**values, "summary_type": "x"})
    assert extra.to_hugging_face()["summary_type"] == "x"


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (gpt2, {"n_embd": 10, "n_head": 3}, "multiple of n_head"),
        (gpt2, {"n_layer": True}, "n_layer is True"),
        (gpt2, {"n_layer": 2.5}, "n_layer is 2.5"),
        (gpt2, {"layer_norm_epsilon": "x"}, "no float"),
        (gpt2, {"scale_attn_by_inverse_layer_idx": True}, "scalings of attention"),
        (opt, {"hidden_size": 10, "num_attention_heads": 3}, "multiple"),
        (opt, {"activation_function": "swish2"}, "'swish2'; known are gelu"),
        (opt, {"_remove_final_layer_norm": True}, "not supported"),
        (llama, {"num_attention_heads": 6, "num_key_value_heads": 4}, "multiple"),
        (llama, {"hidden_size": 10, "num_attention_heads": 4}, "multiple"),
        (llama, {"hidden_size": 12, "num_attention_heads": 4}, "no pairs"),
        (llama, {"rope_scaling": {"rope_type": "yarn"}}, "'yarn' is not supported"),
        (llama, {"rope_scaling": "linear"}, "not a mapping"),
        (
            llama,
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "llama3 lacks high_freq_factor, low_freq_factor, original_max",
        ),
        (llama, {"rope_theta": 0.0}, "rope_theta is 0.0; it must be positive"),
        (gpt2, {"layer_norm_epsilon": float("nan")}, "epsilon is nan"),
    ],
)
def test_settings_that_cannot_be_computed_are_told(kind, values, words):
    with pytest.raises(ValueError, match=words):
        kind.Config.from_hugging_face(values)


def test_both_spellings_of_rotary_settings_are_read():
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}
    new = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}
    made = [llama.Config.from_hugging_face(values) for values in (old, new)]
    assert made[0] == made[1]
    assert made[0].rope_factor == 2 and made[0].rope_theta == 5e5
    plain = llama.Config(rope_theta=5e5)
    np.testing.assert_allclose(2 * made[0].frequencies(), plain.frequencies())


def test_llama3_leaves_fast_pairs_and_slows_down_slow_ones():
    scaled = llama.Config(rope_type="llama3", rope_factor=8.0, rope_theta=5e5)
    ratio = scaled.frequencies() / llama.Config(rope_theta=5e5).frequencies()
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(1 / 8)
    assert (np.diff(ratio) <= 1e-6).all() and ((ratio > 0.13) & (ratio < 0.99)).any()


def test_more_tokens_than_positions_are_told(model):
    context = model.config.context
    with pytest.raises(ValueError, match=f"the model has {context} positions"):
        jax.eval_shape(model, jax.ShapeDtypeStruct((1, context + 1), jnp.int32))
    with pytest.raises(ValueError, match="5 tokens do not fit into 4 slots"):
        model.step(TOKENS[:, :5], model.empty_cache(2, 4))


def test_a_prefill_is_a_step_on_an_empty_cache(model):
    mask = np.ones((2, 5), bool)
    mask[0, :2] = False
    ours, cache = model.prefill(TOKENS[:, :5], 8, mask=jnp.asarray(mask))
    theirs, other = model.step(
        TOKENS[:, :5], model.empty_cache(2, 8), mask=jnp.asarray(mask)
    )
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    valid = np.asarray(cache.valid)
    np.testing.assert_array_equal(valid, other.valid)
    assert int(cache.length) == int(other.length) == 5
    held = jax.tree.leaves(cache.layers), jax.tree.leaves(other.layers)
    for one, two in zip(*held, strict=True):  # what padding holds means nothing
        np.testing.assert_allclose(
            np.asarray(one)[valid], np.asarray(two)[valid], atol=2e-5
        )


def test_activations():
    x = jnp.linspace(-3, 3, 7)
    np.testing.assert_allclose(
        activation("gelu_new")(x), activation("gelu")(x), atol=3e-3
    )
    assert (np.asarray(activation("gelu_new")(x)) != activation("gelu")(x)).any()
    with pytest.raises(ValueError, match="'tanhh'; known are"):
        activation("tanhh")
