"""Riemannian L-BFGS on a product of spaces of sums of Kronecker products.

`minimize` takes a tuple of points, one for each configuration, and a function of the
tuple. Tangents are tuples likewise, and every operation of the geometry (a module:
`manifold`, or the flat `factored`) is mapped over the tuple. Each iteration of the loop
evaluates one trial point, that is one value and gradient: a trial with sufficient
decrease (Armijo) becomes the next iterate, otherwise the step is shortened by
interpolation. Under `vmap`, line searches of different matrices are therefore
independent. Curvature pairs are stored as coordinates, see `lbfgs`; only the direction
that they give is projected onto the tangent space.

References: Nocedal and Wright (2006), chapter 7; Huang, Gallivan and Absil (2015).
"""

import dataclasses
import enum
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from kronjax.linalg.batching import any_lane, in_turn, pick, select
from kronjax.solver import lbfgs as curvature
from kronjax.solver import manifold
from kronjax.solver.lbfgs import MEMORY, Memory

ARMIJO = 1e-4
"""Fraction of the predicted decrease that a step must achieve."""


class Status(enum.IntEnum):
    """The status of a minimisation; larger values are worse."""

    CONVERGED = 0
    RUNNING = 1
    MAX_STEPS = 2
    LINE_SEARCH_FAILED = 3
    NONFINITE = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """An iterate, the next trial, and the curvature known so far.

    Attributes:
        points: The iterate.
        value: Objective at the iterate.
        gradient: Riemannian gradient at the iterate.
        direction: Descent direction, tangent at the iterate.
        slope: `<gradient, direction>`, negative.
        step: Length of the next trial along `direction`.
        pairs: The curvature pairs.
        steps: Number of accepted steps.
        evaluations: Number of values and gradients computed, including those of
            rejected trials.
        status: `Status`.
    """

    points: Any
    value: jax.Array
    gradient: Any
    direction: Any
    slope: jax.Array
    step: jax.Array
    pairs: Memory
    steps: jax.Array
    evaluations: jax.Array
    status: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Limits:
    """Stopping criteria; all may be traced.

    Attributes:
        tolerance: Predicted relative decrease of the value below which to stop.
        max_evaluations: Largest number of values and gradients in all.
        floor: Value that counts as zero.
    """

    tolerance: float | jax.Array
    max_evaluations: int | jax.Array
    floor: float | jax.Array = 0.0


Objective = Callable[[Any], tuple[jax.Array, Any]]
"""A function from points to the value and the gradient, a tuple of tangents."""


def init(points: tuple, geometry: ModuleType = manifold, memory: int = MEMORY) -> State:
    """Return a state at `points` without curvature, to be passed to `restart`.

    Args:
        points: The initial points.
        geometry: Module with the geometry of the points.
        memory: Number of curvature pairs that are kept.
    """
    zero = jnp.zeros((), jax.tree.leaves(points)[0].dtype)
    flat = tuple(map(geometry.zero, points))
    return State(
        points=points,
        value=zero + jnp.inf,
        gradient=flat,
        direction=flat,
        slope=zero,
        step=zero,
        pairs=curvature.empty(ravel_pytree(flat)[0], memory),
        steps=jnp.array(0),
        evaluations=jnp.array(0),
        status=jnp.array(int(Status.RUNNING)),
    )


def restart(
    state: State,
    step: float = 0.5,
    geometry: ModuleType = manifold,
    hint: tuple | None = None,
) -> State:
    """Return the state at the same points for another objective, keeping curvature.

    Nothing is evaluated yet: the first trial of `step` is the iterate itself, so that
    a program of many stages contains the objective once.

    Args:
        state: A state from `init`, or the last state for an objective so close to the
            new one that its curvature is useful.
        step: Length of the second trial, along the quasi-Newton direction.
        geometry: Module with the geometry of the points.
        hint: Tangents. The second trial is the step along all of them if the objective
            decreases in that direction; like any trial it is shortened if it is too
            long.
    """
    if hint is None:
        hint = tuple(map(geometry.zero, state.points))
    return dataclasses.replace(
        state,
        value=jnp.full_like(state.value, jnp.inf),
        direction=hint,
        step=jnp.full_like(state.step, step),
        steps=jnp.zeros_like(state.steps),
        evaluations=jnp.zeros_like(state.evaluations),
        status=jnp.full_like(state.status, int(Status.RUNNING)),
    )


def step(
    objective: Objective,
    state: State,
    limits: Limits,
    geometry: ModuleType = manifold,
) -> State:
    """Make one trial: advance to it or shorten the step.

    A finished state does not change, except in the slot of its next pair.
    """
    running = _is_running(state, limits)
    enters = running & (state.evaluations == 0)
    # A finished lane tries its own point: its last trial may have been unsafe.
    length = jnp.where(running & ~enters, state.step, 0)
    trial = jax.tree.map(lambda x: length * x, state.direction)
    points = in_turn(geometry.retract, state.points, trial)
    value, gradient = objective(points)
    noise = 4 * jnp.finfo(value.dtype).eps * state.value
    wanted = state.value + ARMIJO * length * state.slope + noise
    accepted = running & ~enters & (value <= wanted)
    (flat, back), (old, _) = ravel_pytree(gradient), ravel_pytree(state.gradient)
    displaced = ravel_pytree(trial)[0]
    pairs, direction = curvature.advance(
        state.pairs, displaced, flat - old, flat, accepted
    )
    direction = _map(geometry.transport, points, back(direction))
    new = _Iterate(points, value, gradient, direction)
    advanced = _advance(state, new, enters, limits, geometry)
    # `pairs` is right in both cases, and too large to be copied by the selection.
    advanced, shortened = (
        dataclasses.replace(outcome, pairs=None)
        for outcome in (advanced, _shorten(state, value, running))
    )
    state = pick(accepted | enters, advanced, shortened)
    return dataclasses.replace(state, pairs=pairs)


def minimize(
    objective: Objective,
    state: State,
    limits: Limits,
    geometry: ModuleType = manifold,
    evaluations: int | jax.Array | None = None,
) -> State:
    """Iterate `step` until converged, stuck or out of evaluations.

    Args:
        objective: The `Objective`.
        state: The initial state, with its curvature pairs.
        limits: Stopping criteria.
        geometry: Module with the geometry of the points.
        evaluations: Number of evaluations after which to pause; may be traced.

    Returns:
        The last state, `RUNNING` where it paused. Under `vmap` a finished lane does not
        change until all lanes are finished.
    """
    nearer = limits
    if evaluations is not None:
        spent = state.evaluations
        most = spent + jnp.asarray(evaluations, spent.dtype)
        most = jnp.minimum(limits.max_evaluations, most)
        nearer = dataclasses.replace(limits, max_evaluations=most)
    state = jax.lax.while_loop(
        lambda state: any_lane(_is_running(state, nearer)),
        lambda state: step(objective, state, nearer, geometry),
        state,
    )
    stopped = (state.status == Status.RUNNING) & ~_is_running(state, limits)
    ended = jnp.where(
        state.value <= limits.floor, int(Status.CONVERGED), int(Status.MAX_STEPS)
    )
    status = jnp.where(stopped, ended, state.status)
    return dataclasses.replace(state, status=status)


def _is_running(state, limits):
    in_reach = (state.evaluations < limits.max_evaluations) & (
        state.value > limits.floor
    )
    return (state.status == Status.RUNNING) & in_reach


class _Iterate(NamedTuple):
    """Points, the objective there, and the quasi-Newton direction."""

    points: Any
    value: jax.Array
    gradient: Any
    direction: Any


def _advance(state, new, enters, limits, geometry):
    """Return the state at new points, or at its own where it enters a stage."""
    hinted = enters & (_inner(geometry, new.gradient, state.direction) < 0)
    direction = select(hinted, state.direction, new.direction)
    slope = _inner(geometry, new.gradient, direction)
    descends = slope < 0
    direction = jax.tree.map(
        lambda d, g: jnp.where(descends, d, -g), direction, new.gradient
    )
    slope = jnp.where(descends, slope, -_inner(geometry, new.gradient, new.gradient))
    converged = ~enters & (-slope <= 2 * limits.tolerance * new.value)
    status = jnp.where(converged, Status.CONVERGED, Status.RUNNING)
    return State(
        points=new.points,
        value=new.value,
        gradient=new.gradient,
        direction=direction,
        slope=slope,
        step=jnp.where(enters & ~hinted, state.step, 1),
        pairs=state.pairs,
        steps=state.steps + jnp.where(enters, 0, 1),
        evaluations=state.evaluations + 1,
        status=jnp.where(jnp.isfinite(new.value), status, Status.NONFINITE),
    )


def _shorten(state, value, running):
    excess = value - state.value - state.step * state.slope
    shorter = -state.slope * state.step**2 / (2 * excess)
    shorter = jnp.clip(shorter, 0.1 * state.step, 0.5 * state.step)
    shorter = jnp.where(jnp.isfinite(value), shorter, 0.1 * state.step)
    failed = running & (shorter < 1e-4)
    return dataclasses.replace(
        state,
        step=jnp.where(running, shorter, state.step),
        evaluations=state.evaluations + running.astype(int),
        status=jnp.where(failed, Status.LINE_SEARCH_FAILED, state.status),
    )


def _map(function, *tuples):
    return tuple(function(*each) for each in zip(*tuples, strict=True))


def _inner(geometry, x, y):
    return sum(geometry.inner(a, b) for a, b in zip(x, y, strict=True))
