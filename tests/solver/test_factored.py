import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kronjax.solver import descent, factored, manifold
from kronjax.solver.descent import Limits, Status
from kronjax.solver.factored import Pair

D1, D2, RANK = 8, 6, 3


def draw(seed, rank=RANK):
    rng = np.random.default_rng(seed)
    low = rng.standard_normal((D1, rank)) @ rng.standard_normal((rank, D2))
    return jnp.asarray(low)


def product(pair):
    return pair.a.T @ pair.b


def distance_to(target):
    """½ ‖target − Σ aᵀ b‖_F² of pairs, by automatic differentiation."""

    def objective(pairs):
        def value(pairs):
            return jnp.sum((target - sum(map(product, pairs))) ** 2) / 2

        return jax.value_and_grad(value)(pairs)

    return objective


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, RANK))
def test_splitting_and_joining_keep_the_sum(seed, rank):
    point = manifold.nearest(draw(seed, rank), RANK)
    pair = factored.split(point)
    again = factored.join(pair)
    scale = jnp.linalg.norm(point.core)
    np.testing.assert_allclose(
        product(pair), manifold.to_ambient(point), atol=1e-12 * scale
    )
    np.testing.assert_allclose(
        manifold.to_ambient(again), manifold.to_ambient(point), atol=1e-12 * scale
    )
    np.testing.assert_allclose(again.a @ again.a.T, jnp.eye(RANK), atol=1e-12)
    np.testing.assert_allclose(again.b @ again.b.T, jnp.eye(RANK), atol=1e-12)


def test_a_term_that_vanishes_can_grow_again():
    pair = factored.split(manifold.nearest(draw(0, rank=1), RANK))
    target = draw(0, rank=1) + draw(1, rank=2)
    _, (gradient,) = distance_to(target)((pair,))
    assert jnp.linalg.norm(gradient.a[1:]) > 1e-3


def test_the_zero_matrix_splits_and_joins():
    pair = factored.split(manifold.nearest(jnp.zeros((D1, D2)), RANK))
    point = factored.join(pair)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((pair, point)))
    assert not manifold.to_ambient(point).any()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_descent_reaches_the_closed_form(seed):
    target = draw(seed, rank=D2)
    start = factored.split(manifold.nearest(draw(seed + 9), RANK))
    objective = distance_to(target)
    state = descent.restart(descent.init((start,), factored), geometry=factored)
    state = descent.minimize(objective, state, Limits(1e-14, 400), factored)
    s = jnp.linalg.svd(target, compute_uv=False)
    assert state.status == Status.CONVERGED
    np.testing.assert_allclose(2 * state.value, jnp.sum(s[RANK:] ** 2), rtol=1e-9)


def test_project_is_the_gradient_and_displacements_reach_their_end():
    pair = factored.split(manifold.nearest(draw(3), RANK))
    ambient, other = draw(4), factored.split(manifold.nearest(draw(5), RANK))
    np.testing.assert_allclose(factored.to_ambient(pair), product(pair), atol=1e-14)
    expected = jax.grad(lambda x: jnp.vdot(ambient, product(x)))(pair)
    found = factored.project(pair, ambient)
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-12)
    moved = factored.retract(pair, factored.displacement(pair, other))
    np.testing.assert_allclose(product(moved), product(other), atol=1e-12)


def test_transport_leaves_vectors_unchanged():
    x = Pair(jnp.ones((RANK, D1)), jnp.ones((RANK, D2)))
    moved = factored.transport(x, x)
    assert factored.inner(moved, moved) == RANK * (D1 + D2)
    assert factored.inner(factored.zero(x), x) == 0
    np.testing.assert_array_equal(factored.retract(x, moved).a, 2 * x.a)
