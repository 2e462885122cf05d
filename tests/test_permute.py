import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from test_greedy import planted

from kronjax import Configuration
from kronjax.permute import permute


def shuffled(matrix, seed, rows=True, columns=True):
    rng = np.random.default_rng(seed)
    p, q = (rng.permutation(k) for k in matrix.shape)
    matrix = matrix[p] if rows else matrix
    return matrix[:, q] if columns else matrix


def relative(matrix, configuration):
    """Return the relative Frobenius error of the nearest sum."""
    m, n = matrix.shape
    m1, n1 = configuration.a_shape
    blocks = matrix.reshape(m1, m // m1, n1, n // n1).swapaxes(1, 2)
    s = np.linalg.svd(blocks.reshape(m1 * n1, -1), compute_uv=False)
    return np.sqrt(np.sum(s[configuration.rank :] ** 2) / np.sum(s**2))


@pytest.mark.parametrize("shape", [(12, 12), (24, 18)])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 1e-2])
def test_a_planted_order_is_found_again(shape, noise):
    configuration = Configuration((4, 3), 1)
    matrix = planted(0, [configuration], shape, noise)
    found = permute(shuffled(matrix, 1), configuration)
    planned = relative(matrix, configuration)
    assert found.error <= 1.01 * planned + 1e-6
    assert found.given_error > 0.5


@pytest.mark.parametrize(("rows", "columns"), [(True, False), (False, True)])
def test_one_side_alone_may_be_permuted(rows, columns):
    configuration = Configuration((3, 4), 1)
    matrix = planted(2, [configuration], (12, 12), 1e-2)
    mixed = shuffled(matrix, 3, rows, columns)
    found = permute(mixed, configuration, rows=rows, columns=columns)
    assert found.error <= 1.01 * relative(matrix, configuration)
    fixed = found.columns if rows else found.rows
    np.testing.assert_array_equal(fixed, np.arange(12))


@hypothesis.settings(max_examples=10)
@hypothesis.given(seed=st.integers(0, 2**20), rank=st.integers(1, 3))
def test_the_result_is_a_permutation_never_worse_than_the_input(seed, rank):
    matrix = np.random.default_rng(seed).standard_normal((6, 8))
    configuration = Configuration((3, 2), rank)
    found = permute(matrix, configuration, num_starts=4)
    assert sorted(found.rows) == list(range(6))
    assert sorted(found.columns) == list(range(8))
    permuted = found.apply(matrix)
    assert found.error == pytest.approx(relative(permuted, configuration))
    assert (
        found.error
        <= found.given_error
        == pytest.approx(relative(matrix, configuration))
    )
    np.testing.assert_array_equal(found.undo(permuted), matrix)
    np.testing.assert_array_equal(found.undo(found.apply(jnp.asarray(matrix))), matrix)


def test_random_matrices_improve_reproducibly():
    matrix = np.random.default_rng(4).standard_normal((12, 12))
    found, again = (permute(matrix, Configuration((3, 4), 2)) for _ in range(2))
    assert found.error < 0.95 * found.given_error
    np.testing.assert_array_equal(found.rows, again.rows)


def test_weights_follow_the_order():
    configuration = Configuration((3, 4), 1)
    matrix = planted(5, [configuration], (12, 12), 1e-3)
    scales = np.exp(np.random.default_rng(6).standard_normal(12))
    # Only under these weights is it a Kronecker product.
    mixed = shuffled(matrix / scales, 7, columns=False)
    right = np.diag(scales**2)
    found = permute(mixed, configuration, right_weight=right, columns=False)
    assert found.error <= 1.01 * relative(matrix, configuration)
    left, turned = found.apply_to_weights(None, right)
    assert left is None
    np.testing.assert_array_equal(turned, right[found.columns][:, found.columns])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="one matrix"):
        permute(np.zeros((2, 6, 8)), Configuration((3, 2), 1))
    with pytest.raises(ValueError, match="5 is not a divisor"):
        permute(np.zeros((6, 8)), Configuration((5, 2), 1))
    assert permute(np.zeros((6, 8)), Configuration((3, 2), 1)).error == 0
