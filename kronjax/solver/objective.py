"""The function that a stage minimises, and its unknowns.

    f(x) = ½ ‖L^{1/2} (T − Σ_k K_k(x_k)) R^{1/2}‖_p²

The unknowns `x_k`, one for each configuration, are points of the manifold, or pairs of
factors (`factored`) where the manifold would cost too much beside a gradient: see
`Problem.is_factored`. If p = 2 is the only stage, the objective is that of
`least_squares`.

>>> from kronjax.kronecker import Configuration
>>> geometry(Problem.of((4, 6), Configuration((2, 3), 1))).__name__
'kronjax.solver.manifold'
"""

from types import ModuleType

import jax
import jax.numpy as jnp

from kronjax.kronecker import rearrange, unrearrange
from kronjax.linalg import spectral
from kronjax.solver import descent, factored, least_squares, manifold
from kronjax.solver.descent import Objective, State
from kronjax.solver.problem import Problem, Stage
from kronjax.solver.whitened import Setting


def geometry(problem: Problem) -> ModuleType:
    """Return the module with the geometry of the unknowns."""
    return factored if problem.is_factored else manifold


def begin(problem: Problem, points: tuple) -> State:
    """Return the state of a descent from points of the manifold."""
    if problem.is_factored:
        return descent.init(tuple(map(factored.split, points)), factored)
    return descent.init(points)


def of(problem: Problem, setting: Setting, stage: Stage) -> Objective:
    """Return the objective of a stage."""
    if problem.is_least_squares:
        return least_squares.objective(problem, setting)

    def objective(points):
        residual = error(problem, setting, points)
        value, gradient = problem.norm.value_and_gradient(residual, stage.squarings)
        return value, tuple(
            geometry(problem).project(
                point, rearrange(-frame.adjoint(gradient), configuration.a_shape)
            )
            for point, configuration, frame in zip(
                points, problem.configurations, setting.frames, strict=True
            )
        )

    return objective


def error(problem: Problem, setting: Setting, points: tuple) -> jax.Array:
    """Return the weighted residual `L^{1/2} (T − Σ_k K_k(x_k)) R^{1/2}`, `[m, n]`."""
    total = jnp.zeros((), setting.target.dtype)
    for configuration, frame, point in zip(
        problem.configurations, setting.frames, points, strict=True
    ):
        shapes = configuration.a_shape, configuration.b_shape(problem.shape)
        ambient = geometry(problem).to_ambient(point)
        total = total + frame.forward(unrearrange(ambient, *shapes))
    return setting.target - total


def spectral_error(
    problem: Problem, setting: Setting, points: tuple, restarts: int = 12
) -> jax.Array:
    """Return the spectral norm of `error`, estimated by `spectral.estimate_norm`."""
    return spectral.estimate_norm(error(problem, setting, points), restarts=restarts)
