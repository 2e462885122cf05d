"""Properties that every port has; test_parity compares them with transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import ports
import pytest
from flax import nnx

from kronjax import nn
from kronjax.lm.checkpoints import tensor_names
from kronjax.lm.models import gpt2, llama, opt, registry
from kronjax.lm.models.base import activation, inner_layers

TOKENS = np.random.default_rng(0).integers(0, 50, (2, 9)).astype(np.int32)


@pytest.fixture(scope="module", params=sorted(ports.VARIANTS))
def model(request):
    return ports.make(request.param)


@pytest.fixture(scope="module")
def call(model):
    graph, state = nnx.split(model)
    jitted = jax.jit(lambda state, x, mask: nnx.merge(graph, state)(x, mask=mask))
    return lambda x, mask: np.asarray(jitted(state, x, mask))


def test_logits_do_not_depend_on_later_tokens(call):
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


def test_steps_with_a_cache_equal_one_call(model, call):
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


def test_every_port_has_a_variant_for_the_tests():
    kinds = {values["model_type"] for values in ports.VARIANTS.values()}
    assert kinds == set(registry.PORTS)
    for name, port in registry.PORTS.items():
        assert port.Config.model_type == name
        assert issubclass(port.Model, registry.LanguageModel)


def test_an_unknown_architecture_raises_an_error_that_lists_the_known_ones():
    for values in ({"model_type": "mamba"}, {"model_type": ["gpt2"]}, {}):
        with pytest.raises(ValueError, match="not supported; .* gpt2, opt, llama"):
            registry.port_of(values)


def test_a_port_names_its_embedding_and_its_head(model):
    config = model.config
    assert nn.shape_of(nn.tables(model)[model.EMBEDDING])[0] == config.vocab_size
    others = nn.linear_layers(model).keys() - inner_layers(model).keys()
    assert others == (set() if config.tie_word_embeddings else {model.HEAD})


def test_a_port_says_which_kernels_are_stored_transposed(model):
    port = registry.PORTS[model.config.model_type]
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name = ".".join(map(str, path))
        ndim = len(variable.get_value().shape)
        # Conv1D, of GPT-2 alone, stores [n_in, n_out]; nothing transposes a table.
        linear = name.endswith(".kernel") and (
            port is not gpt2 or name == "lm_head.kernel"
        )
        assert tensor_names.is_transposed(port, name, ndim) == linear


def test_a_model_prints_in_one_line_without_its_arrays(model):
    name = next(iter(nn.linear_layers(model)))
    kernel = nn.linear_layers(model)[name].kernel[...]
    other = nnx.merge(*nnx.split(model))
    nn.replace(other, name, nn.MaskedLinear(kernel, kernel > 0))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    kind = model.config.model_type
    assert repr(model) == (
        f"<{kind} model: 2 blocks, {count:,} parameters, float32, 0 compressed layers>"
    )
    assert "1 compressed layers" in repr(other)


def test_a_config_survives_a_round_trip_through_json(model):
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
        (gpt2, {"layer_norm_epsilon": "x"}, "must be of type float"),
        (
            gpt2,
            {"scale_attn_by_inverse_layer_idx": True},
            "only supported scaling",
        ),
        (opt, {"hidden_size": 10, "num_attention_heads": 3}, "multiple"),
        (opt, {"activation_function": "swish2"}, "'swish2'; known are gelu"),
        (opt, {"_remove_final_layer_norm": True}, "not supported"),
        (llama, {"num_attention_heads": 6, "num_key_value_heads": 4}, "multiple"),
        (llama, {"hidden_size": 10, "num_attention_heads": 4}, "multiple"),
        (
            llama,
            {"hidden_size": 12, "num_attention_heads": 4},
            "must be even",
        ),
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
def test_settings_that_no_port_can_compute_raise_an_error(kind, values, words):
    with pytest.raises(ValueError, match=words):
        kind.Config.from_hugging_face(values)


def test_the_old_and_the_new_form_of_rotary_settings_are_read():
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}
    new = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}
    first, second = (llama.Config.from_hugging_face(values) for values in (old, new))
    assert first == second
    assert first.rope_factor == 2 and first.rope_theta == 5e5
    plain = llama.Config(rope_theta=5e5)
    np.testing.assert_allclose(2 * first.frequencies(), plain.frequencies())


def test_llama3_scales_only_low_frequencies():
    scaled = llama.Config(rope_type="llama3", rope_factor=8.0, rope_theta=5e5)
    ratio = scaled.frequencies() / llama.Config(rope_theta=5e5).frequencies()
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(1 / 8)
    assert (np.diff(ratio) <= 1e-6).all() and ((ratio > 0.13) & (ratio < 0.99)).any()


def test_more_tokens_than_positions_raise_an_error(model):
    context = model.config.context
    with pytest.raises(ValueError, match=f"the model has {context} positions"):
        jax.eval_shape(model, jax.ShapeDtypeStruct((1, context + 1), jnp.int32))
    with pytest.raises(ValueError, match="5 tokens do not fit into 4 slots"):
        model.step(TOKENS[:, :5], model.empty_cache(2, 4))


def test_a_prefill_equals_a_step_on_an_empty_cache(model):
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
    for first, second in zip(*held, strict=True):  # at padding, entries are undefined
        np.testing.assert_allclose(
            np.asarray(first)[valid], np.asarray(second)[valid], atol=2e-5
        )


def test_activations():
    x = jnp.linspace(-3, 3, 7)
    np.testing.assert_allclose(
        activation("gelu_new")(x), activation("gelu")(x), atol=3e-3
    )
    assert (np.asarray(activation("gelu_new")(x)) != activation("gelu")(x)).any()
    with pytest.raises(ValueError, match="'tanhh'; known are"):
        activation("tanhh")
