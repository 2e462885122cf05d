import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kronjax.kronecker import rearrange
from kronjax.operators import symmetric
from kronjax.operators.symmetric import SKEW, SYMMETRIC

parities = pytest.mark.parametrize("parity", [SYMMETRIC, SKEW])


@parities
@given(st.integers(1, 6), st.integers(0, 99))
def test_coordinates_are_orthonormal_and_complete(parity, n, seed):
    matrix = np.random.default_rng(seed).standard_normal((n, n))
    part = (matrix + parity * matrix.T) / 2
    found = symmetric.compress(jnp.asarray(matrix.ravel()), n, parity)
    assert found.shape == (symmetric.dimension(n, parity),)
    again = symmetric.expand(found, n, parity).reshape(n, n)
    np.testing.assert_allclose(again, part, atol=1e-14)
    assert float(found @ found) == pytest.approx(np.sum(part**2))


@parities
def test_the_ambient_part_is_the_rearranged_sum(parity):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 3)), rng.standard_normal((4, 4))
    matrix = np.kron(a + parity * a.T, b + parity * b.T)
    own = symmetric.ambient_of(rearrange(jnp.asarray(matrix), (3, 3)), (3, 4), parity)
    other = symmetric.ambient_of(
        rearrange(jnp.asarray(matrix), (3, 3)), (3, 4), -parity
    )
    assert float(jnp.linalg.norm(own)) == pytest.approx(np.linalg.norm(matrix))
    assert np.linalg.matrix_rank(own) == 1
    np.testing.assert_allclose(other, 0, atol=1e-12)
