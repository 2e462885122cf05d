"""Least squares, p = 2: the start of every solve, and fits of many sizes.

    ½ ‖L^{1/2} (T − Σ_k A_k ⊗ B_k) R^{1/2}‖_F²

`begin` takes Van Loan's solution of one configuration after the other, which solves the
problem if there is one configuration and no weight. Otherwise `descent` minimises
`objective` over pairs of factors (`factored`). `fit` does both with traced ranks: one
compilation serves all sizes of a mixture, as plans for a budget need them.

>>> import jax
>>> from kronjax.kronecker import Configuration
>>> from kronjax.solver.whitened import prepare
>>> matrix = jax.random.normal(jax.random.key(0), (6, 6))
>>> problem = Problem.of((6, 6), [Configuration((6, 1), 3), Configuration((2, 3), 2)])
>>> setting, inverses = prepare(problem, matrix)
>>> result = fit(problem, setting, inverses, jnp.array([1, 2]))
>>> [int(jnp.sum(jnp.any(terms.a != 0, axis=(1, 2)))) for terms in result.terms]
[1, 2]
"""

import dataclasses

import jax
import jax.numpy as jnp

from kronjax.kronecker import KroneckerTerms, rearrange
from kronjax.linalg.batching import after, in_turn
from kronjax.solver import descent, factored, manifold, weighted
from kronjax.solver.factored import Pair
from kronjax.solver.manifold import Point
from kronjax.solver.problem import Problem
from kronjax.solver.whitened import Setting, factors, to_terms


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fit:
    """The result of `fit`.

    Attributes:
        terms: Factors `a: [r, m1, n1]` and `b: [r, m2, n2]` for each configuration, of
            falling norm; terms beyond its rank are zero.
        relative: Weighted Frobenius norm of the error over that of the matrix.
        start: The value of `relative` at the start of the descent.
        status: `Status`.
    """

    terms: tuple[KroneckerTerms, ...]
    relative: jax.Array
    start: jax.Array
    status: jax.Array


def fit(
    problem: Problem,
    setting: Setting,
    inverses: tuple,
    ranks: jax.Array,
    evaluations: int | jax.Array = 100,
    tolerance: float | jax.Array = 1e-5,
) -> Fit:
    """Minimise the weighted Frobenius error for traced ranks; pure.

    Args:
        problem: The problem, with the largest ranks that may be requested.
        setting: The setting from `whitened.prepare`.
        inverses: The inverses of the frames, from `whitened.prepare`.
        ranks: `[configurations]`, integers up to those of the problem; 0 leaves a
            configuration out.
        evaluations: Largest number of values and gradients.
        tolerance: Predicted relative decrease of the squared error below which to stop.

    Returns:
        `Fit`, never worse than its start.
    """
    points = begin(problem, setting, inverses, ranks)
    pairs = tuple(
        jax.tree.map(lambda x, keep=keep: x * keep, factored.split(point))
        for point, keep in zip(points, _kept(problem, setting, ranks), strict=True)
    )
    function = objective(problem, setting)
    started, _ = function(pairs)
    state = descent.restart(descent.init(pairs, factored), geometry=factored)
    limits = descent.Limits(tolerance, evaluations)
    state = descent.minimize(function, state, limits, factored)
    points = in_turn(factored.join, state.points)
    every = to_terms(problem, setting, points, state.value)
    return Fit(
        terms=tuple(
            jax.tree.map(lambda x, keep=keep: x * keep[..., None], terms)
            for terms, keep in zip(every, _kept(problem, setting, ranks), strict=True)
        ),
        relative=jnp.sqrt(2 * state.value),
        start=jnp.sqrt(2 * started),
        status=state.status,
    )


def begin(
    problem: Problem,
    setting: Setting,
    inverses: tuple,
    ranks: jax.Array | None = None,
) -> tuple[Point, ...]:
    """Return Van Loan's solution, one configuration after the other.

    Args:
        problem: The problem.
        setting: The setting from `whitened.prepare`. The weights are replaced by their
            nearest Kronecker products.
        inverses: The inverses of the frames, from `whitened.prepare`.
        ranks: Number of terms to use for each configuration, `[configurations]`; all by
            default.

    Returns:
        The points, with all terms of the problem.
    """
    plain, points = setting.plain, []
    keeps = [jnp.ones((1, 1), plain.dtype)] * len(inverses)
    if ranks is not None:
        keeps = _kept(problem, setting, ranks)
    # Decompositions are made in turn, those of the frames first.
    last = sum(map(jnp.sum, jax.tree.leaves(inverses)), jnp.zeros_like(plain[0, 0]))
    for configuration, frame, backs, keep in zip(
        problem.configurations, setting.frames, inverses, keeps, strict=True
    ):
        ambient = weighted.to_start(after(plain, last), *backs)
        point = manifold.nearest(
            rearrange(ambient, configuration.a_shape), configuration.rank
        )
        points.append(point)
        right = keep * jnp.matmul(point.core, point.b, precision="highest")
        terms = factors(problem, configuration, point.a, right)
        plain, last = plain - frame.to_terms(terms).to_matrix(), point.a
    return tuple(points)


def objective(problem: Problem, setting: Setting) -> descent.Objective:
    """Return half the squared weighted error of pairs of factors, and its gradient."""

    def error(pairs: tuple[Pair, ...]):
        parts = zip(problem.configurations, setting.frames, pairs, strict=True)
        first, *rest = (
            frame.to_terms(factors(problem, c, pair.a, pair.b)).to_matrix()
            for c, frame, pair in parts
        )
        # Not by tr(E R Eᵀ), whose rounding grows with the largest eigenvalue of R.
        return weighted.whiten(sum(rest, first), *setting.roots) - setting.target

    def value_and_gradient(pairs):
        residual, pull = jax.vjp(error, pairs)
        return jnp.sum(residual**2) / 2, pull(residual)[0]

    return value_and_gradient


def _kept(problem, setting, ranks):
    """Return for each configuration `[r, 1]` ones up to its rank, then zeros."""
    return [
        (jnp.arange(configuration.rank)[:, None] < rank).astype(setting.plain.dtype)
        for configuration, rank in zip(problem.configurations, ranks, strict=True)
    ]
