"""Proofs of definiteness never hold for a matrix that is not definite."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kronjax.operators import definite


def exactly_definite(matrix):
    """Decide by Gaussian elimination in rational numbers."""
    rows = [[Fraction(float(x)) for x in row] for row in matrix]
    for k in range(len(rows)):
        if rows[k][k] <= 0:
            return False
        for i in range(k + 1, len(rows)):
            ratio = rows[i][k] / rows[k][k]
            rows[i] = [x - ratio * y for x, y in zip(rows[i], rows[k], strict=True)]
    return True


@given(st.integers(1, 5), st.integers(0, 999), st.integers(-20, 0))
def test_what_is_proven_is_true(n, seed, exponent):
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    values = np.append(rng.uniform(0.1, 1, n - 1), rng.choice([-1, 1]) * 10.0**exponent)
    matrix = (q * values) @ q.T
    matrix = (matrix + matrix.T) / 2
    proven = definite.is_definite(matrix)
    assert exactly_definite(matrix) or not proven
    assert proven or values[-1] < 1e-13


def test_rounding_is_allowed_for():
    matrix = np.eye(3) * 1e-3
    assert definite.is_definite(matrix, 4e-4)
    assert not definite.is_definite(matrix, 6e-4)
    assert not definite.is_definite(np.full((2, 2), np.nan))


def test_scaling_commits_no_rounding():
    rng = np.random.default_rng(0)
    half = rng.standard_normal((4, 4)) * np.logspace(-12, 9, 4)[:, None]
    matrix = half @ half.T
    d = definite.equilibrated(matrix)
    scaled = definite.scaled(matrix, d)
    assert np.all((np.diagonal(scaled) >= 0.25) & (np.diagonal(scaled) <= 1))
    np.testing.assert_array_equal(definite.scaled(scaled, 1 / d), matrix)


@pytest.mark.parametrize("pencil", [definite.forward, definite.inverse])
def test_bounds_of_a_pencil_hold_and_are_sharp(pencil):
    rng = np.random.default_rng(0)
    half = rng.standard_normal((6, 8))
    matrix = half @ half.T
    a, b = np.eye(2)[None] + 0.1, np.diag([1.0, 2.0, 3.0])[None]
    near = np.kron(a[0], b[0])
    if pencil is definite.inverse:
        values = np.linalg.eigvals(near @ matrix).real
    else:
        values = np.linalg.eigvals(np.linalg.solve(matrix, near)).real
    low, high = pencil(matrix, a, b).bounds(values.min(), values.max())
    assert low < values.min() < low * (1 + 1e-6)
    assert high > values.max() > high * (1 - 1e-6)
