"""Layers against dense matrices, and surgery on models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import KRONY_PT, kronecker_sum_reference
from hypothesis import given, settings
from hypothesis import strategies as st

import kronjax
from kronjax import nn
from kronjax.kronecker import KroneckerTerms
from kronjax.lm.models import gpt2
from kronjax.nn import layers

SHAPES = [((2, 3), (4, 5)), ((8, 1), (1, 15)), ((1, 15), (8, 1)), ((4, 5), (2, 3))]


def terms_of(shapes, rank, seed, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    return [
        KroneckerTerms(
            jnp.asarray(rng.normal(size=(rank, *a)), dtype),
            jnp.asarray(rng.normal(size=(rank, *b)), dtype),
        )
        for a, b in shapes
    ]


@given(
    chosen=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3),
    rank=st.integers(1, 2),
    seed=st.integers(0, 99),
    with_bias=st.booleans(),
)
def test_a_kronecker_layer_multiplies_by_its_matrix(chosen, rank, seed, with_bias):
    rng = np.random.default_rng(seed)
    bias = jnp.asarray(rng.normal(size=15)) if with_bias else None
    terms = terms_of(chosen, rank, seed)
    layer = nn.KroneckerLinear(terms, bias)
    x = rng.normal(size=(2, 3, 8))
    matrix = sum(kronecker_sum_reference(x.a, x.b) for x in terms)
    expected = x @ matrix + (0 if bias is None else np.asarray(bias))
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, atol=1e-12)
    np.testing.assert_allclose(layer.materialize(), matrix, atol=1e-12)


@given(
    chosen=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3),
    rank=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_a_kronecker_embedding_has_the_rows_of_its_matrix(chosen, rank, seed):
    terms = terms_of(chosen, rank, seed)
    table = nn.KroneckerEmbedding(terms)
    matrix = sum(kronecker_sum_reference(x.a, x.b) for x in terms)
    tokens = jnp.arange(8).reshape(2, 2, 2)
    np.testing.assert_allclose(table(tokens), matrix.reshape(2, 2, 2, 15), atol=1e-12)
    np.testing.assert_allclose(table.materialize(), matrix, atol=1e-12)
    x = np.random.default_rng(seed).normal(size=(2, 3, 15))
    np.testing.assert_allclose(table.attend(jnp.asarray(x)), x @ matrix.T, atol=1e-12)
    cost = nn.cost(table)
    turned = [KroneckerTerms(x.a.swapaxes(1, 2), x.b.swapaxes(1, 2)) for x in terms]
    layer = nn.cost(nn.KroneckerLinear(turned))
    assert (cost.parameters, cost.flops) == (layer.parameters, layer.flops)


def test_a_table_can_replace_a_table_only():
    model = abstract_gpt2()
    described = {"kind": "kronecker-embedding"}
    described["terms"] = [{"a": [1, 300, 4], "b": [1, 1, 2]}]
    table = nn.from_description(described)
    with pytest.raises(ValueError, match="no layer h.0.mlp.c_fc"):
        nn.replace(model, "h.0.mlp.c_fc", table)
    for name in ("h.00.mlp.c_fc", "h.-1.mlp.c_fc", "h.x", "h.0.mlp.c_fc.__class__"):
        with pytest.raises(ValueError, match="no layer"):
            nn.replace(model, name, nn.linear(jnp.ones((768, 3072)), None))
    with pytest.raises(ValueError, match="wte maps"):
        nn.replace(model, "wte", table)
    assert nn.describe(table) == described


def test_a_layer_holds_the_terms_of_an_approximation():
    matrix = np.random.default_rng(0).normal(size=(12, 12))
    approx = kronjax.approximate(
        matrix, kronjax.Configuration((3, 4), 2), norm="frobenius", progress=False
    )
    layer = nn.KroneckerLinear(approx.terms)
    np.testing.assert_allclose(layer.materialize(), approx.matrix(), atol=1e-12)
    assert layer.terms[0].a is approx.terms[0].a or np.array_equal(
        layer.terms[0].a, approx.terms[0].a
    )


def test_a_layer_trains_under_jit_and_grad():
    layer = nn.KroneckerLinear(
        terms_of(SHAPES[:2], 2, 0, jnp.float32), jnp.zeros(15, jnp.float32)
    )
    graph, state = nnx.split(layer)

    @jax.jit
    def gradient(state, x):
        return jax.grad(lambda s: (nnx.merge(graph, s)(x) ** 2).mean())(state)

    flat = nnx.to_flat_state(gradient(state, jnp.ones((4, 8), jnp.float32)))
    assert len(flat) == 5
    assert all(float(jnp.abs(leaf.get_value()).max()) > 0 for _, leaf in flat)


def test_a_masked_layer_uses_and_trains_kept_entries_only():
    rng = np.random.default_rng(0)
    kernel, mask = rng.normal(size=(8, 15)), rng.random((8, 15)) < 0.4
    layer = nn.MaskedLinear(jnp.asarray(kernel), jnp.asarray(mask), jnp.ones(15))
    x = rng.normal(size=(3, 8))
    np.testing.assert_allclose(
        layer(jnp.asarray(x)), x @ (kernel * mask) + 1, atol=1e-12
    )
    graph, parameters, rest = nnx.split(layer, nnx.Param, ...)
    gradient = jax.grad(lambda p: nnx.merge(graph, p, rest)(jnp.asarray(x)).sum())(
        parameters
    )
    entries = dict(nnx.to_flat_state(gradient))
    assert set(entries) == {("kernel",), ("bias",)}
    assert np.array_equal(np.asarray(entries["kernel",].get_value()) != 0, mask)
    assert nn.cost(layer).parameters == mask.sum() + 15


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.KroneckerLinear([]), "none"),
        (
            lambda: nn.KroneckerLinear(terms_of([SHAPES[0], ((2, 2), (2, 2))], 1, 0)),
            "4",
        ),
        (
            lambda: nn.KroneckerLinear(terms_of(SHAPES[:1], 1, 0), jnp.ones(8)),
            "15 outputs",
        ),
        (
            lambda: nn.KroneckerLinear(
                [KroneckerTerms(jnp.ones((2, 1, 2, 3)), jnp.ones((2, 1, 4, 5)))]
            ),
            "one matrix",
        ),
        (lambda: nn.MaskedLinear(jnp.ones((2, 3)), jnp.ones((3, 2))), "one shape"),
        (
            lambda: nn.from_description({"kind": "tensor", "bias": True}),
            "unknown|shape",
        ),
        (
            lambda: nn.from_description(
                {"kind": "masked", "bias": True, "shape": [3, -1]}
            ),
            "no layer",
        ),
    ],
)
def test_invalid_layers_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_costs_are_counted():
    layer = nn.KroneckerLinear(terms_of(SHAPES[:1], 2, 0), jnp.ones(15))
    counted = nn.cost(layer)
    assert counted.parameters == 2 * (6 + 20) + 15
    assert counted.bytes == 8 * counted.parameters
    # Two products for each term: [4, 2] by [2, 3], then [3, 4] by [4, 5], or the
    # other way round: [2, 4] by [4, 5], then [5, 2] by [2, 3].
    assert counted.flops == 2 * 2 * min(24 + 60, 40 + 30) + 15
    dense = nn.dense(layer)
    assert nn.cost(dense).flops == 2 * 8 * 15 + 15


def abstract_gpt2():
    return nnx.eval_shape(lambda: gpt2.Model(gpt2.Config(), rngs=nnx.Rngs(0)))


def parameters_of(model):
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    return sum(int(np.prod(leaf.shape)) for leaf in leaves)


def test_parameters_of_gpt2_with_one_kronecker_product():
    model = abstract_gpt2()
    assert parameters_of(model) == 124_439_808
    layers = {k: x for k, x in nn.linear_layers(model).items() if ".mlp." in k}
    assert len(layers) == 24
    for (m1, n1), total in KRONY_PT.items():
        for name, layer in layers.items():
            # The table is for [3072, 768]; c_fc is stored as its transpose.
            a, b = (m1, n1), (3072 // m1, 768 // n1)
            if layer.in_features == 768:
                a, b = a[::-1], b[::-1]
            described = {"kind": "kronecker", "bias": True}
            described["terms"] = [{"a": [1, *a], "b": [1, *b]}]
            nn.replace(model, name, nn.from_description(described))
        assert parameters_of(model) == total


def test_layers_are_found_in_the_order_of_the_blocks():
    names = list(nn.linear_layers(abstract_gpt2()))
    assert len(names) == 48
    assert [int(name.split(".")[1]) for name in names] == sorted(list(range(12)) * 4)


def test_a_replacement_must_fit():
    model = abstract_gpt2()
    layer = nn.linear_layers(model)["h.0.mlp.c_fc"]
    with pytest.raises(ValueError, match=r"h\.0\.mlp\.c_proj"):
        nn.replace(model, "h.0.mlp.c_prj", layer)
    with pytest.raises(ValueError, match="3072 to 768, the new layer 768 to 3072"):
        nn.replace(model, "h.0.mlp.c_proj", layer)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.sampled_from([(7, 9), (9, 6)]))
def test_interpolative_layers_have_low_rank_and_fewer_parameters(seed, rank, shape):
    rng = np.random.default_rng(seed)
    left = rng.standard_normal((shape[0], rank))
    right = rng.standard_normal((rank, shape[1])) * rng.choice([1e-3, 1.0, 1e3])
    bias = jnp.asarray(rng.standard_normal(shape[1]))
    layer = nn.InterpolativeLinear.of(jnp.asarray(left), jnp.asarray(right), bias)
    scale = np.linalg.norm(left @ right)
    np.testing.assert_allclose(layer.materialize(), left @ right, atol=1e-10 * scale)
    x = jnp.asarray(rng.standard_normal((2, 3, shape[0])))
    np.testing.assert_allclose(
        layer(x), x @ layer.materialize() + bias[None, None], atol=1e-10 * (1 + scale)
    )
    numbers = rank * (sum(shape) - rank)
    found = nn.cost(layer)
    assert found.parameters == numbers + shape[1]
    assert found.flops == 2 * numbers + shape[1]
    # The picked columns are stored unchanged, so the combinations stay small.
    assert np.abs(layer.rest[...]).max(initial=0) < 1e3


def test_interpolative_layers_of_rank_deficient_kernels():
    left, right = jnp.ones((4, 3)), jnp.ones((3, 5))
    layer = nn.InterpolativeLinear.of(left, right)
    np.testing.assert_allclose(layer.materialize(), 3 * np.ones((4, 5)), atol=1e-12)
    nothing = nn.InterpolativeLinear.of(jnp.zeros((4, 2)), right[:2])
    assert not nothing.materialize().any()


def test_interpolative_layers_are_described():
    layer = nn.InterpolativeLinear.of(jnp.ones((4, 2)), jnp.eye(5)[:2], jnp.ones(5))
    again = nn.from_description(nn.describe(layer))
    assert nn.describe(again) == nn.describe(layer)
    shapes = [jax.tree.map(jnp.shape, nnx.state(x)) for x in (layer, again)]
    assert str(shapes[0]) == str(shapes[1])
    with pytest.raises(ValueError, match="must be matrices"):
        nn.InterpolativeLinear(jnp.ones((4, 2)), jnp.ones((3, 5)), np.arange(8))
    with pytest.raises(ValueError, match="permutation"):
        nn.InterpolativeLinear(jnp.ones((4, 2)), jnp.ones((2, 3)), np.zeros(5, int))


def test_scales_multiply_the_terms_and_are_parameters():
    terms = terms_of(SHAPES[:2], 2, 0)
    scales = [jnp.array([2.0, -1.0]), jnp.array([0.5, 3.0])]
    layer = nn.KroneckerLinear(terms, scales=scales)
    scaled = [
        KroneckerTerms(x.a * scale[:, None, None], x.b)
        for x, scale in zip(terms, scales, strict=True)
    ]
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 8)))
    plain = nn.KroneckerLinear(scaled)
    np.testing.assert_allclose(layer(x), plain(x), atol=1e-12)
    np.testing.assert_allclose(layer.materialize(), plain.materialize(), atol=1e-12)
    assert nn.cost(layer).parameters == nn.cost(plain).parameters + 4
    again = nn.from_description(nn.describe(layer))
    assert nn.describe(again) == nn.describe(layer)
    gradient = nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)
    assert [x[...].shape for x in gradient["scales"].values()] == [(2,), (2,)]
    with pytest.raises(ValueError, match="one \\[r\\] for each of the 2"):
        nn.KroneckerLinear(terms, scales=scales[:1])


def test_a_layer_class_is_registered_in_one_place(monkeypatch):
    # The kind is removed again after the test.
    monkeypatch.setitem(layers.KINDS, "diagonal", nn.LinearLayer)
    del layers.KINDS["diagonal"]

    @nn.register
    class Diagonal(nn.LinearLayer):
        """A square layer with a diagonal kernel."""

        kind = "diagonal"

        def __init__(self, values):
            self.in_features = self.out_features = len(values)
            self.values, self.bias = nnx.Param(values), None

        @classmethod
        def outline(cls, description):
            size, _ = description["shape"]
            return nnx.eval_shape(cls, jax.ShapeDtypeStruct((size,), jnp.float32))

        def parts(self):
            return {"values": self.values}

        def materialize(self):
            return jnp.diag(self.values[...])

        def __call__(self, x):
            return x * self.values[...]

    layer = Diagonal(jnp.arange(1.0, 4))
    cost = nn.cost(layer)
    assert (cost.parameters, cost.flops, cost.bytes) == (3, 6, 24)
    described = nn.describe(layer)
    assert described == {"kind": "diagonal", "shape": [3, 3], "bias": False}
    assert nn.describe(nn.from_description(described)) == described
    np.testing.assert_array_equal(nn.dense(layer).kernel[...], np.diag([1.0, 2, 3]))
    with pytest.raises(ValueError, match="diagonal cannot be pruned"):
        layer.scores(None)
    model = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    nn.replace(model, "layers.0", layer)
    assert nn.linear_layers(model) == {"layers.0": layer}

    class Other(nn.LinearLayer):
        kind = "diagonal"

    with pytest.raises(ValueError, match="belongs to"):
        nn.register(Other)


def test_an_adapter_shares_the_variables_of_a_layer_of_flax():
    layer = nn.linear(jnp.ones((2, 3)), jnp.zeros(3))
    adapter = nn.as_layer(layer)
    adapter.parts()["kernel"][...] = jnp.full((2, 3), 5.0)
    assert layer.kernel[...].tolist() == [[5.0] * 3] * 2
    assert nn.is_dense(layer) and not nn.is_dense(adapter.with_masks())
    assert nn.as_layer(adapter) is adapter
