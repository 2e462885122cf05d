"""Compression methods: their counts against the sizes of their layers."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kronjax import methods, nn
from kronjax.kronecker import KroneckerTerms, from_arrays, to_arrays
from kronjax.recipe import Rule

RULES = [
    {"method": "low-rank", "rank": 2},
    {"method": "low-rank", "fraction": 0.5},
    {"method": "interpolative", "rank": 2},
    {"method": "interpolative", "fraction": 0.5},
    {"method": "kronecker", "terms": [{"a_shape": [2, 3], "rank": 2}]},
    {
        "method": "kronecker",
        "terms": [{"a_shape": [2, 3], "rank": 2}, {"a_shape": [8, 1]}],
        "scalars": True,
    },
]
SHAPE = (8, 15)


def factors_of(method, rule, shape=SHAPE):
    """Random factors of the configurations that a rule asks for."""
    rng = np.random.default_rng(0)
    terms = [
        KroneckerTerms(
            rng.normal(size=(x.rank, *x.a_shape)),
            rng.normal(size=(x.rank, *x.b_shape(shape))),
        )
        for x in method.configurations(rule, shape)
    ]
    return to_arrays(terms)


@pytest.mark.parametrize("facts", RULES)
def test_layers_and_outlines_have_the_size_that_the_method_counts(facts):
    rule = Rule.model_validate({"match": "*", **facts})
    method = methods.find(rule.method)
    dense = nn.linear(jnp.zeros(SHAPE), jnp.ones(15))
    factors = factors_of(method, rule)
    layer = method.layer(factors, dense, jnp.float64, rule)
    np.testing.assert_allclose(layer.materialize(), method.matrix(factors), atol=1e-12)
    np.testing.assert_array_equal(layer.bias[...], np.ones(15))
    outline = method.outline(rule, dense)
    assert nn.describe(outline) == nn.describe(layer)
    counted, planned = nn.cost(layer), nn.cost(outline)
    assert (counted.parameters, counted.flops) == (planned.parameters, planned.flops)
    assert counted.parameters == method.num_parameters(rule, SHAPE) + 15
    assert counted.flops == method.flops(rule, SHAPE) + 15


@pytest.mark.parametrize("facts", RULES)
def test_fields_of_configurations_give_the_same_configurations(facts):
    rule = Rule.model_validate({"match": "*", **facts})
    method = methods.find(rule.method)
    held = method.configurations(rule, SHAPE)
    again = Rule(match="*", method=method.name, **method.fields(held))
    assert method.configurations(again, SHAPE) == held


@pytest.mark.parametrize("facts", RULES)
def test_tables_become_kronecker_embeddings(facts):
    rule = Rule.model_validate({"match": "*", **facts})
    method = methods.find(rule.method)
    if rule.scalars or not method.takes_tables:
        return
    table = nnx.Embed(*SHAPE, rngs=nnx.Rngs(0))
    factors = factors_of(method, rule)
    layer = method.layer(factors, table, jnp.float64, rule)
    np.testing.assert_allclose(layer.materialize(), method.matrix(factors), atol=1e-12)
    assert nn.describe(method.outline(rule, table)) == nn.describe(layer)


def test_a_name_cannot_be_registered_twice(monkeypatch):
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))

    class Other(methods.Method):
        name = "keep"

    class Nameless(methods.Method):
        pass

    for method in (Other(), Nameless()):
        with pytest.raises(ValueError, match="a name of its own"):
            methods.register(method)
    assert not methods.find("keep").changes
    with pytest.raises(ValueError, match="did you mean kronecker"):
        methods.find("kroneker")


def test_terms_come_back_from_named_arrays():
    rule = Rule.model_validate({"match": "*", **RULES[-1]})
    arrays = factors_of(methods.find("kronecker"), rule)
    assert list(arrays) == ["a", "b", "a1", "b1"]
    again = to_arrays(from_arrays(arrays))
    assert all(np.array_equal(again[name], arrays[name]) for name in arrays)
    del arrays["b1"]
    with pytest.raises(KeyError):
        from_arrays(arrays)
