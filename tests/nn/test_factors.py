"""Masked factors and factors of low rank against dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kronjax import nn
from kronjax.kronecker import KroneckerTerms
from kronjax.nn import factors


def layer(dtype=jnp.float64):
    """A sum of two configurations; the first has a mask in `a` and low rank in `b`."""
    rng = np.random.default_rng(0)
    shapes = ((2, 2, 3), (2, 4, 5)), ((1, 8, 1), (1, 1, 15))
    draws = [[jnp.asarray(rng.normal(size=x), dtype) for x in pair] for pair in shapes]
    made = nn.KroneckerLinear(
        [KroneckerTerms(*pair) for pair in draws], jnp.ones(15, dtype)
    )
    mask = rng.random((2, 2, 3)) < 0.5
    made.a[0] = nn.MaskedFactor(draws[0][0], jnp.asarray(mask))
    left, right = rng.normal(size=(2, 4, 2)), rng.normal(size=(2, 2, 5))
    made.b[0] = nn.LowRankFactor(jnp.asarray(left, dtype), jnp.asarray(right, dtype))
    a, b = np.asarray(draws[0][0]) * mask, left @ right
    kernel = sum(np.kron(a[k], b[k]) for k in range(2))
    return made, kernel + np.kron(*(np.asarray(x[0]) for x in draws[1])), mask


def test_a_layer_multiplies_by_its_dense_equivalent():
    made, kernel, mask = layer()
    x = np.random.default_rng(1).normal(size=(3, 8))
    np.testing.assert_allclose(made.materialize(), kernel, atol=1e-12)
    np.testing.assert_allclose(made(jnp.asarray(x)), x @ kernel + 1, atol=1e-12)
    cost, kept = nn.cost(made), int(mask.sum())
    thin = 2 * (4 * 2 + 2 * 5)
    assert cost.held == 12 + thin + 8 + 15 + 15
    assert cost.parameters == cost.held - 12 + kept


def test_masked_entries_get_no_gradient():
    made, _, mask = layer(jnp.float32)
    graph, parameters, rest = nnx.split(made, nnx.Param, ...)
    x = jnp.ones((2, 8), jnp.float32)
    gradient = jax.grad(lambda p: jnp.sum(nnx.merge(graph, p, rest)(x) ** 2))(
        parameters
    )
    found = dict(nnx.to_flat_state(gradient))
    assert np.array_equal(np.asarray(found["a", 0, "value"][...]) != 0, mask)
    assert np.all(np.asarray(found["b", 0, "left"][...]) != 0)


def test_changing_a_mask_compiles_nothing():
    made, _, _ = layer(jnp.float32)
    traced = []

    @jax.jit
    def run(graph_state, x):
        traced.append(0)
        return nnx.merge(graph, graph_state)(x)

    graph, state = nnx.split(made)
    before = run(state, jnp.ones((2, 8), jnp.float32))
    made.a[0].mask[...] = ~made.a[0].mask[...]
    other, state = nnx.split(made)
    assert other == graph
    after = run(state, jnp.ones((2, 8), jnp.float32))
    assert len(traced) == 1
    assert not np.allclose(before, after)


def test_descriptions_record_how_factors_are_stored():
    made, _, _ = layer(jnp.float32)
    described = nn.describe(made)
    assert described["terms"][0]["held"] == {"a": "masked", "b": {"rank": 2}}
    assert "held" not in described["terms"][1]
    assert nn.describe(nn.from_description(described)) == described
    low = nn.InterpolativeLinear.of(np.ones((6, 2)), np.eye(2, 5), dtype=jnp.float32)
    low.rest = nn.MaskedFactor(low.rest[...], jnp.ones(low.rest.shape, bool))
    described = nn.describe(low)
    assert nn.describe(nn.from_description(described)) == described
    assert nn.cost(low).held == nn.cost(low).parameters == 12 + 6


@pytest.mark.parametrize("how", ["half", {"rank": 9}, {"rank": True}, {"q": 1}, 3])
def test_invalid_descriptions_of_factors_are_refused(how):
    made, _, _ = layer(jnp.float32)
    described = nn.describe(made)
    described["terms"][0]["held"] = {"a": how}
    with pytest.raises(ValueError, match="describes no layer"):
        nn.from_description(described)
    described["terms"][0]["held"] = {"c": "masked"}
    with pytest.raises(ValueError, match="describes no layer"):
        nn.from_description(described)


def test_mismatched_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        nn.MaskedFactor(jnp.ones((2, 3)), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="low rank"):
        nn.LowRankFactor(jnp.ones((2, 3)), jnp.ones((2, 3)))
    assert factors.num_held(nn.LowRankFactor(jnp.ones((4, 1)), jnp.ones((1, 4)))) == 8
