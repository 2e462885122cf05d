import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import kronecker_sum_reference, rearrange_reference, tolerance
from hypothesis import given
from hypothesis import strategies as st

from kronjax.kronecker import (
    Configuration,
    KroneckerTerms,
    divisors,
    interpolative_rank,
    matmul,
    matmul_cost,
    rearrange,
    unrearrange,
)

SHAPES = [((2, 3), (4, 5)), ((6, 1), (1, 4)), ((1, 1), (3, 3)), ((5, 2), (2, 5))]


def draw(seed, a_shape, b_shape, rank=2):
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal((rank, *shape)) for shape in (a_shape, b_shape))
    return KroneckerTerms(jnp.asarray(a), jnp.asarray(b))


@given(st.integers(0, 99), st.sampled_from(SHAPES))
def test_rearrange_agrees_with_blocks_and_inverts(seed, shapes):
    (m1, n1), (m2, n2) = shapes
    matrix = np.random.default_rng(seed).standard_normal((m1 * m2, n1 * n2))
    moved = rearrange(jnp.asarray(matrix), (m1, n1))
    np.testing.assert_array_equal(moved, rearrange_reference(matrix, (m1, n1)))
    np.testing.assert_array_equal(unrearrange(moved, *shapes), matrix)


@given(st.integers(0, 99), st.sampled_from(SHAPES))
def test_rearranged_product_is_an_outer_product(seed, shapes):
    terms = draw(seed, *shapes, rank=1)
    moved = rearrange(terms.to_matrix(), shapes[0])
    outer = np.outer(terms.a[0].ravel(), terms.b[0].ravel())
    np.testing.assert_allclose(moved, outer, rtol=1e-14)


@given(st.integers(0, 99), st.sampled_from(SHAPES))
def test_to_matrix_agrees_with_kron(seed, shapes):
    terms = draw(seed, *shapes, rank=3)
    expected = kronecker_sum_reference(terms.a, terms.b)
    np.testing.assert_allclose(terms.to_matrix(), expected, atol=1e-13)
    assert terms.shape == expected.shape
    assert terms.rank == 3
    assert terms.num_parameters == terms.a.size + terms.b.size


@given(st.integers(0, 99), st.sampled_from(SHAPES))
def test_a_transposed_sum_is_that_of_a_transposed_configuration(seed, shapes):
    terms, one = draw(seed, *shapes), Configuration(shapes[0], 2)
    np.testing.assert_array_equal(terms.T.to_matrix(), terms.to_matrix().T)
    assert terms.T.a.shape[1:] == one.T.a_shape
    assert terms.T.b.shape[1:] == one.T.b_shape(terms.shape[::-1])


def test_batches_of_sums_are_multiplied_out_one_by_one():
    one, two = draw(0, (2, 3), (4, 5)), draw(1, (2, 3), (4, 5))
    both = jax.tree.map(lambda *x: jnp.stack(x), one, two)
    expected = np.stack([one.to_matrix(), two.to_matrix()])
    np.testing.assert_allclose(both.to_matrix(), expected, rtol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@given(seed=st.integers(0, 99), shapes=st.sampled_from(SHAPES))
def test_matmul_agrees_with_the_dense_product(dtype, seed, shapes):
    terms = jax.tree.map(lambda x: x.astype(dtype), draw(seed, *shapes))
    x = np.random.default_rng(seed).standard_normal((7, terms.shape[0])).astype(dtype)
    dense = x.astype(np.float64) @ kronecker_sum_reference(terms.a, terms.b)
    got = matmul(jnp.asarray(x), terms)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, dense, atol=tolerance(dtype) * np.abs(dense).max())


@pytest.mark.parametrize("shapes", SHAPES)
def test_matmul_costs_what_matmul_cost_returns(shapes):
    terms = draw(0, *shapes, rank=4)
    (m1, n1), (m2, n2) = shapes
    orders = [m2 * n1 * (m1 + n2), m1 * n2 * (m2 + n1)]
    assert matmul_cost(terms) == 4 * min(orders)
    x = jnp.ones((1, m1 * m2))
    products = [
        eqn
        for eqn in jax.make_jaxpr(matmul)(x, terms).eqns
        if eqn.primitive.name == "dot_general"
    ]
    spent = 0
    for eqn in products:
        (contracted, _), _ = eqn.params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        spent += np.prod([left[i] for i in contracted]) * eqn.outvars[0].aval.size
    assert spent == matmul_cost(terms)


def test_matmul_refuses_a_wrong_length():
    with pytest.raises(ValueError, match="x has 7 columns .* 8 rows"):
        matmul(jnp.ones(7), draw(0, (2, 3), (4, 5)))


def test_configuration_names_the_divisors_that_would_do():
    with pytest.raises(ValueError, match="5 is not a divisor of its 12 rows.*1, 2, 3"):
        Configuration((5, 2), 1).b_shape((12, 8))


@pytest.mark.parametrize(
    ("a_shape", "rank"),
    [((0, 2), 1), ((2,), 1), ((2, 3), 0), ((2, 1.5), 1), ((2, 3), True), ("ab", 1)],
)
def test_configuration_refuses_what_is_not_a_positive_integer(a_shape, rank):
    with pytest.raises(ValueError, match="positive integers"):
        Configuration(a_shape, rank)


def test_configuration_counts():
    configuration = Configuration([24, 32], rank=np.int64(32))
    assert configuration == Configuration((24, 32), 32)
    assert configuration.num_parameters((768, 768)) == 32 * (768 + 768)
    assert Configuration((768, 1), 4).num_parameters((768, 768)) == 4 * 2 * 768
    assert Configuration((2, 3), 99).max_rank((8, 15)) == 6


@given(st.integers(1, 3000))
def test_divisors(number):
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


@pytest.mark.parametrize("shape", [(7, 9), (12, 5), (1, 6)])
def test_interpolative_ranks_use_the_available_parameters(shape):
    m, n = shape
    for parameters in range(1, m * n + 1):
        rank = interpolative_rank(shape, parameters)
        assert rank * (m + n - rank) <= parameters
        if rank < min(shape):
            assert (rank + 1) * (m + n - rank - 1) > parameters
    assert interpolative_rank(shape, m * n) == min(shape)
