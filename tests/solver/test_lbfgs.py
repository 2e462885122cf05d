import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kronjax.solver import lbfgs

D, MEMORY = 7, 3


def draw(seed, count):
    """Return pairs of positive curvature, from a quadratic function, and a gradient."""
    rng = np.random.default_rng(seed)
    half = rng.standard_normal((D, D))
    s = rng.standard_normal((count, D))
    return s, s @ (half @ half.T + np.eye(D)), rng.standard_normal(D)


@jax.jit
def remember(given, accepted):
    def one(known, pair):
        return lbfgs.add(known, *pair), None

    empty = lbfgs.empty(given[0][0], MEMORY)
    return jax.lax.scan(one, empty, (*given, accepted))[0]


direction = jax.jit(lbfgs.direction)


def two_loops(s, y, gradient):
    """Return the direction of the textbook two-loop recursion of `MEMORY` pairs."""
    s, y, q, weights = s[-MEMORY:], y[-MEMORY:], gradient.copy(), []
    for a, b in zip(s[::-1], y[::-1], strict=True):
        weights.append(a @ q / (a @ b))
        q -= weights[-1] * b
    if len(s):
        q *= s[-1] @ y[-1] / (y[-1] @ y[-1])
    for a, b, weight in zip(s, y, weights[::-1], strict=True):
        q += a * (weight - b @ q / (a @ b))
    return -q


@given(seed=st.integers(0, 99), count=st.integers(0, 5))
def test_the_direction_is_that_of_the_two_loop_recursion(seed, count):
    s, y, gradient = draw(seed, 5)
    known = remember((s, y), np.arange(5) < count)
    expected = two_loops(s[:count], y[:count], gradient)
    found = direction(known, gradient)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)


@given(seed=st.integers(0, 99))
def test_rejected_pairs_leave_no_trace(seed):
    s, y, _ = draw(seed, 5)
    accepted = np.array([True, False, True, True, False])
    spoiled = np.where(accepted[:, None], y, np.nan)
    found = remember((s, spoiled), accepted)
    assert found.count == 3
    assert found.curvature.tolist()[3] == 0 < min(found.curvature[:3])
    rows, places = np.array([0, 2, 3]), np.array([0, 1, 2, 4, 5, 6])
    exact = np.concatenate([s[rows], y[rows]])
    np.testing.assert_array_equal(found.vectors[places], exact)
    products = found.products[places][:, places]
    np.testing.assert_allclose(products, exact @ exact.T, rtol=1e-12)
    # Slots of rejected pairs hold no NaN: products add them up, times zero.
    assert np.isfinite(found.vectors).all()


@given(seed=st.integers(0, 99))
def test_the_newest_pair_satisfies_the_secant_equation(seed):
    s, y, _ = draw(seed, 5)
    known = remember((s, y), np.full(5, True))
    np.testing.assert_allclose(direction(known, y[-1]), -s[-1], atol=1e-8)


def test_pairs_of_negative_curvature_are_ignored():
    s, y, gradient = draw(0, 3)
    y[1] = -y[1]  # negative curvature
    known = remember((s, y), np.full(3, True))
    assert known.curvature.tolist()[1] == 0
    kept = [0, 2]
    expected = two_loops(s[kept], y[kept], gradient)
    np.testing.assert_allclose(direction(known, gradient), expected, rtol=1e-9)


@pytest.mark.parametrize("accepted", [True, False])
def test_advance_is_add_followed_by_direction(accepted):
    s, y, gradient = draw(1, 5)
    known = remember((s[:4], y[:4]), np.full(4, True))
    one, ahead = lbfgs.advance(known, s[4], y[4], gradient, accepted)
    two = lbfgs.add(known, s[4], y[4], accepted)
    np.testing.assert_allclose(one.products, two.products, rtol=1e-12)
    np.testing.assert_allclose(ahead, direction(two, gradient), rtol=1e-9)


def test_lanes_fill_their_own_slots():
    s, y, gradient = (np.stack(x) for x in zip(draw(2, 5), draw(3, 5), strict=True))
    accepted = np.array([[True] * 5, [True, False, True, False, False]])
    known = jax.vmap(remember)((s, y), accepted)
    assert known.count.tolist() == [5, 2]
    for i, given_ in enumerate(accepted):
        rows = np.flatnonzero(given_)
        expected = two_loops(s[i][rows], y[i][rows], gradient[i])
        found = jax.vmap(lbfgs.direction)(known, gradient)[i]
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-9)


def test_float32_is_kept():
    known = lbfgs.empty(jnp.zeros(D, jnp.float32), MEMORY)
    one = jnp.ones(D, jnp.float32)
    known = lbfgs.add(known, one, one, True)
    assert {x.dtype.name for x in jax.tree.leaves(known)} <= {"float32", "int64"}
    assert lbfgs.direction(known, one).dtype == jnp.float32
