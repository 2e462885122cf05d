import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kronjax.solver import descent, manifold
from kronjax.solver.descent import Limits, Status

D, RANK = 12, 2


def frobenius(target):
    """½ ‖target − Σ points‖_F², whose minimiser over one manifold is known."""

    def objective(points):
        error = target - sum(manifold.to_ambient(point) for point in points)
        gradient = tuple(manifold.project(point, -error) for point in points)
        return jnp.sum(error**2) / 2, gradient

    return objective


def draw(seed, count=1):
    rng = np.random.default_rng(seed)
    target = jnp.asarray(rng.standard_normal((D, D)))
    points = tuple(
        manifold.nearest(jnp.asarray(rng.standard_normal((D, D))), RANK)
        for _ in range(count)
    )
    return target, points


def minimize(target, points, tolerance=1e-14, max_evaluations=400):
    objective = frobenius(target)
    state = descent.restart(descent.init(points), 1.0)
    return descent.minimize(objective, state, Limits(tolerance, max_evaluations))


run = jax.jit(minimize)


@pytest.mark.parametrize("seed", range(3))
def test_reaches_the_closed_form(seed):
    target, points = draw(seed)
    state = run(target, points)
    s = np.linalg.svd(target, compute_uv=False)
    assert state.status == Status.CONVERGED
    assert float(state.value) == pytest.approx((s[RANK:] ** 2).sum() / 2, rel=1e-9)
    # Superlinear, not gradient descent: far fewer than unknowns squared.
    assert state.evaluations < 100


def test_a_product_of_manifolds_is_minimised_jointly():
    target, points = draw(0, count=2)
    state = run(target, points)
    s = np.linalg.svd(target, compute_uv=False)
    # Two points of rank two make one of rank four.
    assert float(state.value) == pytest.approx((s[2 * RANK :] ** 2).sum() / 2, rel=1e-6)


def test_values_fall_and_trials_are_counted():
    target, points = draw(1)
    objective = frobenius(target)
    step = jax.jit(lambda state: descent.step(objective, state, Limits(1e-14, 100)))
    state = descent.restart(descent.init(points), 1.0)
    assert state.evaluations == 0
    state = step(state)
    # The first trial is the iterate itself.
    np.testing.assert_allclose(state.value, objective(points)[0], rtol=1e-14)
    assert (state.evaluations, state.steps) == (1, 0)
    assert (state.points[0].core == points[0].core).all()
    for count in range(2, 12):
        new = step(state)
        assert new.value <= state.value
        assert new.evaluations == count
        assert new.steps - state.steps == int(new.value < state.value)
        state = new


def test_runs_out_of_evaluations():
    target, points = draw(2)
    state = run(target, points, 1e-14, 5)
    assert state.status == Status.MAX_STEPS
    assert state.evaluations == 5


def test_a_wrong_gradient_fails_the_line_search():
    target, points = draw(3)

    def objective(points):
        value, (gradient,) = frobenius(target)(points)
        return value, (jax.tree.map(jnp.negative, gradient),)

    state = descent.restart(descent.init(points), 1.0)
    state = descent.minimize(objective, state, Limits(1e-14, 100))
    assert state.status == Status.LINE_SEARCH_FAILED
    assert state.steps == 0


def test_nonfinite_trials_are_rejected():
    target, points = draw(4)

    def objective(points):
        value, gradient = frobenius(target)(points)
        return jnp.where(value < 40, jnp.nan, value), gradient

    state = descent.restart(descent.init(points), 1.0)
    state = descent.minimize(objective, state, Limits(1e-14, 60))
    assert state.steps > 0
    assert jnp.isfinite(state.value)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state.points))


def test_a_value_below_the_floor_has_converged():
    target, points = draw(5)
    objective = frobenius(target)
    state = descent.restart(descent.init(points), 1.0)
    done = descent.minimize(objective, state, Limits(1e-14, 100, floor=1e3))
    assert done.status == Status.CONVERGED
    assert done.evaluations == 1
    halfway = float(done.value) * 0.9
    done = descent.minimize(objective, state, Limits(0.0, 100, floor=halfway))
    assert done.status == Status.CONVERGED
    assert done.value <= halfway


def test_a_nonfinite_start_is_reported():
    target, points = draw(5)
    state = run(target * jnp.nan, points)
    assert state.status == Status.NONFINITE
    assert state.evaluations == 1


def test_lanes_finish_at_different_times_and_do_not_disturb_each_other():
    problems = [draw(seed) for seed in range(4)]
    targets, points = jax.tree.map(lambda *x: jnp.stack(x), *problems)
    targets = targets.at[2].set(jnp.nan)
    batch = jax.jit(jax.vmap(minimize))(targets, points)
    assert batch.status[2] == Status.NONFINITE
    assert batch.evaluations.tolist() == [
        int(run(target, start).evaluations)
        for target, (_, start) in zip(targets, problems, strict=True)
    ]
    for i in (0, 1, 3):
        alone = run(targets[i], problems[i][1])
        assert batch.status[i] == alone.status == Status.CONVERGED
        np.testing.assert_allclose(batch.value[i], alone.value, rtol=1e-9)


def test_finished_lanes_stay_as_they_are():
    problems = [draw(seed) for seed in range(2)]
    targets, points = jax.tree.map(lambda *x: jnp.stack(x), *problems)
    targets = targets.at[0].set(0)
    points = jax.tree.map(lambda x: x.at[0].set(0) if x.ndim == 3 else x, points)
    state = jax.jit(jax.vmap(minimize))(targets, points)
    alone = run(targets[1], problems[1][1])
    assert state.evaluations[1] == alone.evaluations > 10
    assert jnp.isfinite(state.step).all()


def test_a_restart_keeps_the_curvature_of_the_old_objective():
    target, points = draw(6)
    state = run(target, points, 1e-6)
    moved = target + 0.01 * jnp.ones_like(target)
    objective = frobenius(moved)
    warm = descent.restart(state, 1.0)
    assert (warm.pairs.curvature == state.pairs.curvature).all()
    entered = descent.step(objective, warm, Limits(1e-12, 200))
    assert entered.slope < 0
    cold = descent.restart(descent.init(state.points), 1.0)
    spent = [descent.minimize(objective, x, Limits(1e-12, 200)) for x in (warm, cold)]
    np.testing.assert_allclose(spent[0].value, spent[1].value, rtol=1e-8)
    assert spent[0].evaluations < spent[1].evaluations


@pytest.mark.parametrize("lanes", [1, 2])
def test_no_trial_copies_the_pairs(lanes):
    target, points = draw(7)
    state = descent.restart(descent.init(points), 1.0)

    def minimize(state):
        return descent.minimize(frobenius(target), state, Limits(1e-14, 40))

    if lanes > 1:
        state = jax.tree.map(lambda x: jnp.stack([x] * lanes), state)
        minimize = jax.vmap(minimize)
    text = jax.jit(minimize, donate_argnums=0).lower(state).compile().as_text()
    shape = ",".join(map(str, state.pairs.vectors.shape))
    written = r"(dynamic-update-slice|scatter)\("
    assert re.search(rf"f64\[{shape}\]\S* {written}", text)
    assert not re.search(rf"f64\[{shape}\]\S* (copy|select)\(", text)


def test_fewer_pairs_can_be_kept():
    target, points = draw(7)
    objective = frobenius(target)
    ends = []
    for memory in (2, descent.MEMORY):
        state = descent.init(points, memory=memory)
        state = descent.restart(state, 1.0)
        state = descent.minimize(objective, state, Limits(1e-14, 400))
        assert len(state.pairs.curvature) == memory + 1
        ends.append(state)
    np.testing.assert_allclose(ends[0].value, ends[1].value, rtol=1e-8)
    assert ends[0].steps >= ends[1].steps


@pytest.mark.parametrize("sign", [1, -1])
def test_a_hint_is_tried_where_the_objective_decreases_along_it(sign):
    target, points = draw(9)
    objective = frobenius(target)
    _, gradient = objective(points)
    hint = jax.tree.map(lambda x: -sign * 0.1 * x, gradient)
    state = descent.restart(descent.init(points), hint=hint)
    state = descent.step(objective, state, Limits(1e-14, 100))
    away = descent.restart(descent.init(points))
    away = descent.step(objective, away, Limits(1e-14, 100))
    expected, length = (hint, 1) if sign > 0 else (away.direction, 0.5)
    assert state.step == length
    for x, y in zip(
        jax.tree.leaves(state.direction), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(x, y)


def test_the_state_is_a_pytree_of_arrays():
    _, points = draw(8)
    state = descent.init(points)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    assert dataclasses.replace(state, steps=jnp.array(3)).steps == 3
