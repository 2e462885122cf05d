"""Folding changes the order of channels, but not the function of a model."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kronjax import lm, nn
from kronjax.kronecker import KroneckerTerms
from kronjax.lm.compression.fold import fold, reorder_inputs, reorder_outputs
from kronjax.lm.models import gpt2, llama, opt

TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)


def permuted(layer, rng, *, rows=True, columns=True, heads=None):
    """A layer of random factors, with random orders; of columns within heads."""
    m, n = layer.in_features, layer.out_features
    a, b = rng.normal(size=(2, m // 2, n // 2)), rng.normal(size=(2, 2, 2))
    terms = KroneckerTerms(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    order = rng.permutation(n)
    if heads:
        d = n // heads
        order = np.concatenate([i * d + rng.permutation(d) for i in range(heads)])
    bias = None if layer.bias is None else jnp.asarray(rng.normal(size=n), jnp.float32)
    return nn.KroneckerLinear(
        [terms],
        bias,
        rows=rng.permutation(m) if rows else None,
        columns=order if columns else None,
    )


def make(kind):
    if kind == "gpt2":
        config = gpt2.Config(
            vocab_size=50, n_embd=8, n_layer=2, n_head=2, n_positions=16
        )
        return gpt2.Model(config, rngs=nnx.Rngs(0))
    if kind == "opt":
        config = opt.Config(
            vocab_size=50, hidden_size=8, num_hidden_layers=2, ffn_dim=12,
            num_attention_heads=2, max_position_embeddings=16,
        )  # fmt: skip
        return opt.Model(config, rngs=nnx.Rngs(0))
    config = llama.Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, intermediate_size=12,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return llama.Model(config, rngs=nnx.Rngs(0))


def test_a_permuted_layer_multiplies_by_the_permuted_matrix():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(6, 8)).astype(np.float32)
    rows, columns = rng.permutation(6), rng.permutation(8)
    sum_of = kernel[rows][:, columns]
    terms = KroneckerTerms(jnp.asarray(sum_of[None]), jnp.ones((1, 1, 1)))
    layer = nn.KroneckerLinear([terms], jnp.ones(8), rows=rows, columns=columns)
    np.testing.assert_array_equal(layer.materialize(), kernel)
    x = rng.normal(size=(3, 6)).astype(np.float32)
    np.testing.assert_allclose(layer(jnp.asarray(x)), x @ kernel + 1, atol=1e-5)
    # Orders are not parameters, and the identity is not stored.
    assert nn.cost(layer).parameters == 48 + 1 + 8
    plain = nn.KroneckerLinear([terms], rows=np.arange(6), columns=np.arange(8))
    assert plain.inputs is None and plain.outputs is None
    with pytest.raises(ValueError, match="rows must be a permutation of 0 to 5"):
        nn.KroneckerLinear([terms], rows=np.zeros(6, int))


@pytest.mark.parametrize("kind", ["kronecker", "dense", "masked", "masked factors"])
def test_a_reordered_layer_permutes_its_inputs_or_outputs(kind):
    rng = np.random.default_rng(1)
    kernel = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=6), jnp.float32)
    layer = nn.MaskedLinear(kernel, kernel > 0, bias)
    if kind == "dense":
        layer = nn.dense(layer)
    elif kind != "masked":
        layer = permuted(layer, rng)
        if kind == "masked factors":
            a = layer.a[0][...]
            layer.a[0] = nn.MaskedFactor(a, a > 0)
    x = rng.normal(size=(3, 4)).astype(np.float32)
    expected = np.asarray(layer(jnp.asarray(x)))
    order = rng.permutation(6)
    got = reorder_outputs(layer, order)(jnp.asarray(x))
    np.testing.assert_allclose(got, expected[:, order], atol=1e-6)
    order = rng.permutation(4)
    got = reorder_inputs(layer, order)(jnp.asarray(x[:, order]))
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "names", "removed"),
    [
        ("gpt2", ["h.0.mlp.c_fc"], 1),
        ("gpt2", ["h.1.mlp.c_fc", "h.1.mlp.c_proj"], 1),
        ("opt", ["layers.0.fc1", "layers.1.fc1"], 2),
        ("llama", ["layers.1.mlp.up_proj"], 1),
        ("llama", ["layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"], 1),
    ],
)
def test_hidden_units_take_the_order_of_a_permuted_sum(kind, names, removed):
    model, rng = make(kind), np.random.default_rng(2)
    for name in names:
        nn.replace(model, name, permuted(nn.linear_layers(model)[name], rng))
    expected = np.asarray(model(TOKENS))
    before = gathers(model)
    assert fold(model) == removed == before - gathers(model)
    np.testing.assert_allclose(model(TOKENS), expected, atol=1e-4)
    assert fold(model) == 0
    np.testing.assert_allclose(model(TOKENS), expected, atol=1e-4)


def gathers(model):
    orders = (
        order
        for layer in nn.linear_layers(model).values()
        if isinstance(layer, nn.KroneckerLinear)
        for order in (layer.inputs, layer.outputs)
    )
    return sum(order is not None for order in orders)


def test_an_order_stays_if_its_neighbours_would_need_gathers():
    model, rng = make("llama"), np.random.default_rng(5)
    for name, columns in (("gate", True), ("up", False), ("down", False)):
        name = f"layers.0.mlp.{name}_proj"
        layer = permuted(
            nn.linear_layers(model)[name], rng, rows=False, columns=columns
        )
        nn.replace(model, name, layer)
    assert fold(model) == 0 and gathers(model) == 1


@pytest.mark.parametrize(
    ("kind", "name", "heads"),
    [
        ("opt", "layers.0.self_attn.v_proj", 2),
        ("llama", "layers.1.self_attn.v_proj", 2),
    ],
)
def test_values_may_be_reordered_within_heads_only(kind, name, heads):
    model, rng = make(kind), np.random.default_rng(3)
    layer = permuted(nn.linear_layers(model)[name], rng, heads=heads)
    nn.replace(model, name, layer)
    expected = np.asarray(model(TOKENS))
    assert fold(model) == 1
    np.testing.assert_allclose(model(TOKENS), expected, atol=1e-4)
    across = permuted(nn.linear_layers(model)[name], rng)
    nn.replace(model, name, across)
    assert fold(model) == 0


def test_orders_are_saved(tmp_path):
    model, rng = make("opt"), np.random.default_rng(4)
    for name in ("layers.0.fc1", "layers.1.self_attn.q_proj"):
        layer = permuted(nn.linear_layers(model)[name], rng, rows="fc1" in name)
        nn.replace(model, name, layer)
    expected = np.asarray(model(TOKENS))
    lm.save(model, tmp_path / "out")
    back = lm.load(tmp_path / "out")
    np.testing.assert_array_equal(back(TOKENS), expected)
    lm.export(model, tmp_path / "dense")
    dense = lm.load(tmp_path / "dense")
    np.testing.assert_allclose(dense(TOKENS), expected, atol=1e-4)
