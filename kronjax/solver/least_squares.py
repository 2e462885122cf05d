"""p = 2: where every solve begins, and fits of many sizes by one program.

    ½ ‖L^{1/2} (T − Σ_k A_k ⊗ B_k) R^{1/2}‖_F²

`begin` takes Van Loan's solution of one configuration after the other, which solves the
problem if there is one configuration and no weight. Otherwise `objective` is what
`descent` minimises over pairs of factors (`factored`). `fit` does both with the ranks
traced: one compilation serves all sizes of a mixture, as plans for a budget need them.

>>> import jax
>>> from kronjax.kronecker import Configuration
>>> from kronjax.solver.whitened import prepare
>>> matrix = jax.random.normal(jax.random.key(0), (6, 6))
>>> problem = Problem.of((6, 6), [Configuration((6, 1), 3), Configuration((2, 3), 2)])
>>> setting, inverses = prepare(problem, matrix)
>>> found = fit(problem, setting, inverses, jnp.array([1, 2]))
>>> [int(jnp.sum(jnp.any(one.a != 0, axis=(1, 2)))) for one in found.terms]
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
    """What `fit` returns.

    Attributes:
        terms: For each configuration `a: [r, m1, n1]` and `b: [r, m2, n2]`, of falling
            norm; those beyond its rank are zero.
        relative: Weighted Frobenius error over that of the matrix.
        start: The same where the descent began.
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
        problem: Its ranks are the largest that may be asked for.
        setting: Of `whitened.prepare`, as are the `inverses`.
        inverses: Of the frames.
        ranks: `[configurations]`, integers up to those of the problem; 0 leaves a
            configuration out.
        evaluations: Values and gradients to spend.
        tolerance: Predicted relative decrease of the squared error that is not worth a
            step.

    Returns:
        `Fit`, never worse than its start.
    """
    points = begin(problem, setting, inverses, ranks)
    pairs = tuple(
        jax.tree.map(lambda x, keep=keep: x * keep, factored.split(point))
        for point, keep in zip(points, _kept(problem, setting, ranks), strict=True)
    )
    function = objective(problem, setting)
    state = descent.restart(function, descent.init(pairs, factored), geometry=factored)
    limits = descent.Limits(tolerance, evaluations)
    started = state.value
    state = descent.minimize(function, state, limits, factored)
    found = in_turn(factored.join, state.points)
    terms = to_terms(problem, setting, found, state.value)
    return Fit(
        terms=tuple(
            jax.tree.map(lambda x, keep=keep: x * keep[..., None], one)
            for one, keep in zip(terms, _kept(problem, setting, ranks), strict=True)
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
        problem: What is looked for.
        setting: Of `whitened.prepare`, as are the `inverses`. The weights are replaced
            by their nearest Kronecker-factored ones.
        inverses: Of the frames.
        ranks: `[configurations]`, if only that many terms of each are to count.

    Returns:
        The points, with all terms of the problem.
    """
    plain, points = setting.plain, []
    keeps = [jnp.ones((1, 1), plain.dtype)] * len(inverses)
    if ranks is not None:
        keeps = _kept(problem, setting, ranks)
    # Decompositions in turn: those of the frames come first.
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
        # Not by tr(E R Eᵀ), whose rounding is that of the largest eigenvalue of R.
        return weighted.whiten(sum(rest, first), *setting.roots) - setting.target

    def value_and_gradient(pairs):
        residual, pull = jax.vjp(error, pairs)
        return jnp.sum(residual**2) / 2, pull(residual)[0]

    return value_and_gradient


def _kept(problem, setting, ranks):
    """Return for each configuration `[r, 1]` ones up to its rank, then zeros."""
    return [
        (jnp.arange(one.rank)[:, None] < rank).astype(setting.plain.dtype)
        for one, rank in zip(problem.configurations, ranks, strict=True)
    ]
