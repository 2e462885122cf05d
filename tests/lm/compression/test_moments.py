"""Moments against those of activations and gradients that were taken one by one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import as_users_run_it

from kronjax import nn
from kronjax.lm.compression.moments import (
    load_moments,
    measure_moments,
    memory,
    save_moments,
)
from kronjax.lm.models import likelihood, llama

CONFIG = {
    "vocab_size": 50,
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
CONTEXT = 16


@pytest.fixture(scope="module")
def model():
    with as_users_run_it():
        return llama.Model(llama.Config(**CONFIG), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 50, 20 * CONTEXT + 5)


@pytest.fixture(scope="module")
def moments(model, tokens):
    with as_users_run_it():
        return measure_moments(model, tokens, gradients=True, context=CONTEXT, batch=6)


def reference(model, tokens, name):
    """Gram matrices of one layer, from its input and a perturbation of its output."""
    windows = np.stack([tokens[i * CONTEXT : (i + 1) * CONTEXT + 1] for i in range(20)])
    layer = nn.linear_layers(model)[name]
    graph, state = nnx.split(model)
    inputs = []

    def loss(shift):
        merged = nnx.merge(graph, state)

        def call(x):
            inputs.append(jax.lax.stop_gradient(x))
            return layer(x) + shift

        nn.put(merged, name, call)
        logits = merged(jnp.asarray(windows[:, :-1]))
        ranked = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(ranked, jnp.asarray(windows[:, 1:, None]), 2)
        return -jnp.sum(picked)

    shift = jnp.zeros((20, CONTEXT, layer.out_features))
    g = np.asarray(jax.grad(loss)(shift), np.float64).reshape(20 * CONTEXT, -1)
    nn.put(model, name, layer)
    x = np.asarray(layer_input(model, windows, name), np.float64)
    x = x.reshape(20 * CONTEXT, -1)
    return x.T @ x / len(x), g.T @ g / len(g)


def layer_input(model, windows, name):
    seen = []
    layer = nn.linear_layers(model)[name]
    clone = nnx.clone(model)
    nn.put(clone, name, lambda x: seen.append(x) or layer(x))
    clone(jnp.asarray(windows[:, :-1]))
    return seen[0]


@pytest.mark.parametrize(
    "name", ["layers.0.mlp.down_proj", "layers.1.self_attn.v_proj"]
)
def test_moments_are_those_of_inputs_and_gradients(model, tokens, moments, name):
    c, g = reference(model, tokens, name)
    found = moments.inputs[moments.sources[name]]
    np.testing.assert_allclose(found, c, atol=1e-5 * np.abs(c).max())
    np.testing.assert_allclose(moments.outputs[name], g, atol=1e-5 * np.abs(g).max())
    assert moments.tokens == 20 * CONTEXT


def test_moments_that_do_not_fit_are_measured_in_parts(model, tokens, moments):
    # What one group of layers takes here: three passes or more.
    again = measure_moments(
        model, tokens, gradients=True, context=CONTEXT, batch=6, limit=4 * 4 * 16**2
    )
    assert set(again.inputs) == set(moments.inputs)
    for name in moments.sources:
        for ours, theirs in (
            (again.input(name), moments.input(name)),
            (again.output(name), moments.output(name)),
        ):
            # As sums of float32 are: what nearly cancels has the rounding of the rest.
            atol = 2e-7 * np.max(theirs)
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=atol)
    assert again.nll == pytest.approx(moments.nll)


def test_the_loss_on_the_text_is_told(model, tokens, moments):
    windows = tokens[: 20 * CONTEXT + 1]
    parts = [windows[k : k + CONTEXT + 1] for k in range(0, 20 * CONTEXT, CONTEXT)]
    with as_users_run_it():
        expected = likelihood.token_losses(model, jnp.asarray(np.stack(parts))).mean()
    assert moments.nll == pytest.approx(float(expected), rel=1e-5)


def test_layers_that_read_the_same_share_it(moments):
    shared = {"q_proj", "k_proj", "v_proj"}
    own = {name for name, source in moments.sources.items() if "self_attn" in source}
    assert {name.split(".")[-1] for name in own} == {*shared, "o_proj"}
    assert len(moments.inputs) == 2 * 4 and len(moments.outputs) == 2 * 7
    assert "lm_head" not in moments.sources


@pytest.mark.parametrize("shrinkage", [0.0, 0.25, 1.0])
def test_shrinkage_keeps_the_trace_and_narrows_the_spectrum(moments, shrinkage):
    shrunk = dataclasses.replace(moments, shrinkage=shrinkage)
    for name in moments.sources:
        for raw, found in (
            (moments.inputs[moments.sources[name]], shrunk.input(name)),
            (moments.outputs[name], shrunk.output(name)),
        ):
            assert found.dtype == np.float32
            values = np.linalg.eigvalsh(raw.astype(np.float64))
            expected = (1 - shrinkage) * values + shrinkage * values.mean()
            ours = np.linalg.eigvalsh(found.astype(np.float64))
            np.testing.assert_allclose(ours, expected, atol=1e-5 * values.max())


def test_without_gradients_the_inputs_are_the_same(model, tokens, moments):
    plain = measure_moments(model, tokens, context=CONTEXT, batch=7)
    assert plain.outputs == {} and plain.nll is None
    for name, moment in plain.inputs.items():
        np.testing.assert_allclose(moment, moments.inputs[name], atol=1e-5)
    sizes = [x.nbytes for x in plain.inputs.values()]
    assert memory(model) == sum(sizes)


def test_moments_are_written_and_read(moments, tmp_path):
    save_moments(moments, tmp_path / "moments.safetensors")
    back = load_moments(tmp_path / "moments.safetensors")
    assert back.sources == moments.sources and back.tokens == moments.tokens
    assert back.tokens_sha256 == moments.tokens_sha256 and back.nll == moments.nll
    for kind in ("inputs", "outputs"):
        ours, theirs = getattr(back, kind), getattr(moments, kind)
        assert set(ours) == set(theirs)
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_another_file_is_refused(tmp_path):
    import safetensors.numpy

    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"a": np.ones(2)}, path)
    with pytest.raises(ValueError, match="holds no moments"):
        load_moments(path)


def test_bad_text_and_bad_models_are_told(model, tokens):
    with pytest.raises(ValueError, match="257 tokens or more, the text has 100"):
        measure_moments(model, tokens[:100])
    with pytest.raises(ValueError, match="vocabulary"):
        measure_moments(model, tokens + 50)
    broken = nnx.clone(model)
    broken.layers[0].mlp.up_proj.kernel[...] = jnp.full((12, 16), jnp.nan)
    words = r"calibrated: layers\.0\.mlp\.up_proj\.kernel holds NaN"
    for gradients in (False, True):
        with pytest.raises(ValueError, match=words):
            measure_moments(broken, tokens, gradients=gradients, context=CONTEXT)
    # Without a damaged parameter, the first layer that reads what overflowed is named.
    large = nnx.clone(model)
    large.layers[0].self_attn.v_proj.kernel[...] *= 1e38
    words = r"calibrated: the moments of layers\.0\.self_attn\.o_proj are not finite"
    with pytest.raises(ValueError, match=words):
        measure_moments(large, tokens, context=CONTEXT)
