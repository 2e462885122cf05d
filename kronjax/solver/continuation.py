"""Continuation in p: from the Frobenius problem to the spectral one.

`f_p(K) = ½ ‖T − K‖_p²` is minimised for p = 4, 6, 10, 18, … in turn, each stage from
the solution and with the curvature pairs of the previous one; at p = 4098 the norm is
within a few parts in ten thousand of the spectral norm. The solution behaves like
`K_∞ + c/p`:

- the line through the last two stages, in 1/p, predicts the solution of the next stage:
  the prediction is the first trial, which is shortened, like any trial, if too long;
- when p doubles, the decrease of the error is about the total decrease in all further
  stages: the solve of a matrix ends when that is well within the tolerance;
- at the end, the last two stages are extrapolated to 1/p = 0, and the result is kept if
  its spectral error is smaller.

The fixed schedule uses only the last of the three. Larger steps in p were tried on
random matrices, without predictions: with four, eight or sixteen times p per stage,
continuations took 5 to 45 % more products than by doubling. p is traced, so all stages
share one compilation.

`solve` is a pure function that composes with `jit`, `vmap`, `scan` and `shard_map`.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kronjax.kronecker import Configuration
from kronjax.linalg import schatten, spectral
from kronjax.linalg.batching import after, any_lane, in_turn, select
from kronjax.norm import Norm
from kronjax.solver import descent, factored, least_squares, manifold, objective
from kronjax.solver.descent import State, Status
from kronjax.solver.problem import Origin, Problem, Stage
from kronjax.solver.solution import Path, Solution, Trace, gather
from kronjax.solver.whitened import Setting, check_weights, prepare, to_terms


def solve(
    matrix: jax.Array,
    configuration: Configuration | Sequence[Configuration],
    *,
    norm: float | str | Norm = "spectral",
    left_weight: jax.Array | None = None,
    right_weight: jax.Array | None = None,
    num_starts: int = 4,
    max_products: int | None = None,
    tolerance: float | jax.Array = 2e-4,
    schedule: str | Sequence[float] = "adaptive",
    key: jax.Array | None = None,
) -> Solution:
    """Minimise `‖L^{1/2} (T − Σ_k A_k ⊗ B_k) R^{1/2}‖` for one matrix; pure.

    The Frobenius solution and `num_starts - 1` perturbations of it race through the
    first few stages and share the products of a single start (with at least four
    evaluations each); the best start goes through the remaining stages. Under
    `jax.shard_map` pass `check_vma=False`: the loops begin from constants, which that
    check treats as unvarying.

    Args:
        matrix: `T`, `[m, n]`, float32 or float64.
        configuration: The configuration, or several whose sum to look for.
        norm: "spectral" (or inf), "frobenius" (or 2), "schatten:P" (or P), or a `Norm`.
        left_weight: `L`, `[m, m]`, symmetric positive semidefinite, of the dtype of
            the matrix; the identity by default. Singular weights are regularised by
            `weighted.RIDGE`; negative eigenvalues count as zero.
        right_weight: `R`, `[n, n]`, likewise.
        num_starts: Number of starts, at least 1; 1 is the Frobenius solution alone,
            which can be a critical point for every p.
        max_products: Largest number of products of the size of `EᵀE` per stage; by
            default `problem.default_max_products`.
        tolerance: Relative tolerance of the error, may be traced. The continuation ends
            when larger p are expected to lower the error by less than half of it, which
            leaves the other half for the unexpected: see `proof.certificate`. A stage
            ends when the model predicts a decrease below a two-hundredth of it.
        schedule: "adaptive", or the same p for every matrix without predictions:
            "fixed", seven values up to 4098, or a list of rising exponents. Larger
            exponents than that of the norm are not used.
        key: Random key of the perturbations, from `jax.random.key`; that of 0 if None.

    Returns:
        `Solution`. A matrix with NaN or infinite entries, or whose Frobenius norm
        overflows, has status `NONFINITE`, zero terms and NaN errors; other matrices of
        the batch are unaffected. Ranks above the maximum are capped: the solution is
        then exact.

    Raises:
        ValueError: If `matrix` is not one matrix or a configuration does not fit.
    """
    matrix = jnp.asarray(matrix)
    if matrix.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(
            f"solve computes in float32 or float64; got {matrix.dtype}. Convert the "
            "matrix, or call kronjax.approximate, which does."
        )
    weights = check_weights(matrix, left_weight, right_weight)
    problem = Problem.of(
        matrix.shape,
        configuration,
        norm,
        num_starts,
        max_products,
        weighted=tuple(weight is not None for weight in weights),
        schedule=schedule,
    )
    key = jax.random.key(0) if key is None else key
    setting, path, first = start(problem, matrix, *weights)
    stages = problem.schedule()
    if not stages:
        return finish(
            problem, setting, path, gather(problem, path.winner, first, first)
        )
    path, lines = jax.lax.scan(
        lambda path, stage: advance(problem, setting, path, stage, tolerance, key),
        path,
        jax.tree.map(lambda *x: jnp.array(x), *stages),
    )
    return finish(problem, setting, path, gather(problem, path.winner, first, lines))


def start(
    problem: Problem, matrix, left_weight=None, right_weight=None
) -> tuple[Setting, Path, Trace]:
    """Return the setting, the path at p = 2, and its line of the trace.

    The path begins with Van Loan's solution, one configuration after the other. Weights
    are replaced by their nearest Kronecker products for that.
    """
    setting, inverses = prepare(problem, matrix, left_weight, right_weight)
    points = least_squares.begin(problem, setting, inverses)
    state = objective.begin(problem, points)
    zero = jnp.array(0)
    error = objective.error(problem, setting, state.points)
    spectral_error = spectral.estimate_norm(error)
    line = Trace(
        p=jnp.full((), 2, error.dtype),
        value=jnp.linalg.norm(error) * setting.unit,
        spectral_error=spectral_error * setting.unit,
        steps=zero,
        products=zero,
    )
    path = Path(
        state=state,
        p=line.p,
        error=spectral_error,
        done=jnp.array(False),
        previous=state.points,
        previous_p=line.p,
        champion=state if problem.num_race_stages else None,
        running=zero,
        winner=zero,
        frobenius=points,
        best=state.points,
        best_error=spectral_error,
    )
    return setting, path, line


def advance(
    problem: Problem, setting: Setting, path: Path, stage: Stage, tolerance, key
):
    """Return the path after one stage, and the line of the trace for that stage.

    A path that is done does not change; its line has zero steps and products.
    """

    def run():
        return _run_stage(problem, setting, path, stage, tolerance, key)

    if problem.is_adaptive:
        new = jax.lax.cond(
            any_lane(~path.done), lambda: select(path.done, path, run()), lambda: path
        )
        idle = path.done
    else:
        new, idle = run(), jnp.array(False)
    line = trace_line(problem, setting, new, stage)
    steps, products = (jnp.where(idle, 0, x) for x in (line.steps, line.products))
    return new, dataclasses.replace(line, steps=steps, products=products)


def trace_line(problem: Problem, setting: Setting, path: Path, stage: Stage) -> Trace:
    """Return the line of the trace for a path at the end of a stage."""
    return Trace(
        p=path.p,
        value=jnp.sqrt(2 * path.state.value) * setting.unit,
        spectral_error=path.error * setting.unit,
        steps=path.state.steps,
        products=path.state.evaluations * problem.norm.num_products(stage.squarings),
    )


def _run_stage(problem, setting, path, stage, tolerance, key):
    path = enter(problem, path, origin(problem, path, stage, key), stage)
    state = descend(problem, setting, path.state, stage, tolerance)
    path = dataclasses.replace(path, state=state)
    return leave(problem, setting, path, stage, tolerance)


def enter(problem: Problem, path: Path, state: State, stage: Stage) -> Path:
    """Return the path at the beginning of a stage, before its first evaluation.

    Args:
        problem: The problem.
        path: The path at the end of the previous stage, or at p = 2.
        state: The state from which the stage begins: see `origin`.
        stage: The stage.
    """
    continues = stage.origin == Origin.PREVIOUS
    from_start = stage.origin == Origin.START
    last_p = jnp.where(from_start, jnp.full_like(path.p, 2), path.p)
    p = schatten.exponent(stage.squarings).astype(path.p.dtype)
    previous, hint = state.points, None
    if problem.is_adaptive:
        known = continues & (path.previous_p > 2)
        ratio = jnp.where(known, _ratio(path.previous_p, path.p, p), 0)
        hint = _extrapolation(problem, path.previous, previous, ratio)
    state = descent.restart(state, geometry=objective.geometry(problem), hint=hint)
    # A lane that is done must not prolong the loop of its batch.
    status = jnp.where(path.done, int(Status.CONVERGED), state.status)
    return dataclasses.replace(
        path,
        state=dataclasses.replace(state, status=status),
        p=p,
        error=jnp.where(continues, path.error, jnp.inf),
        previous=previous,
        previous_p=last_p,
        running=jnp.where(stage.begins >= 0, stage.begins, path.running),
    )


def descend(
    problem: Problem,
    setting: Setting,
    state: State,
    stage: Stage,
    tolerance,
    evaluations=None,
) -> State:
    """Return the state at the end of a stage, or after a number of evaluations.

    The stage has ended when the status is no longer `Status.RUNNING`.
    """
    products = problem.norm.num_products(stage.squarings)
    # The rounding of the target, whose Frobenius norm is one.
    rounding = 10 * float(jnp.finfo(setting.target.dtype).eps)
    limits = descent.Limits(
        tolerance=tolerance / 200,
        max_evaluations=jnp.maximum(stage.max_products // products, 4),
        floor=rounding**2 / 2,
    )
    return descent.minimize(
        objective.of(problem, setting, stage),
        state,
        limits,
        objective.geometry(problem),
        evaluations,
    )


def leave(
    problem: Problem, setting: Setting, path: Path, stage: Stage, tolerance
) -> Path:
    """Return the path after a stage, with `champion`, `best` and `done` updated."""
    state = path.state
    spectral_error = objective.spectral_error(problem, setting, state.points, 3)
    fell = path.error - spectral_error
    settled = (state.status != Status.MAX_STEPS) & (path.p > 6)
    better = spectral_error < path.best_error
    if path.champion is not None:
        wins = stage.ends & (state.value < path.champion.value)
        path = dataclasses.replace(
            path,
            champion=select(wins, state, path.champion),
            winner=jnp.where(wins, path.running, path.winner),
        )
    return dataclasses.replace(
        path,
        error=spectral_error,
        done=stage.final & settled & (2 * fell <= tolerance * spectral_error),
        best=select(better, state.points, path.best),
        best_error=jnp.where(better, spectral_error, path.best_error),
    )


def origin(problem: Problem, path: Path, stage: Stage, key) -> State:
    """Return the state from which a stage begins."""
    if path.champion is None:  # without a race the only start is that of the path
        return path.state
    key = jax.random.fold_in(key, jnp.maximum(stage.begins, 0))
    size = jnp.minimum(stage.begins, 1).astype(path.error.dtype)
    return jax.lax.switch(
        stage.origin,
        [
            lambda: path.state,
            lambda: objective.begin(problem, _perturb(path.frobenius, key, size)),
            lambda: path.champion,
        ],
    )


def finish(problem: Problem, setting: Setting, path: Path, trace: Trace) -> Solution:
    """Return the solution; for the spectral norm, that of the best stage or the limit.

    The limit is the extrapolation of the last two stages to 1/p = 0.
    """
    points, last = path.state.points, path.error
    if problem.norm.is_spectral:
        # If the champion was at the last p already, there is no line to extrapolate.
        ratio = _ratio(path.previous_p, path.p, jnp.inf)
        ratio = jnp.where(path.p > path.previous_p, ratio, 0)
        ahead = _extrapolation(problem, path.previous, points, ratio)
        limit = in_turn(objective.geometry(problem).retract, points, ahead)
        limit_error = objective.spectral_error(problem, setting, limit)
        points = select(limit_error < path.best_error, limit, path.best)
        last = jnp.where(jnp.isfinite(limit_error), limit_error, 0)
    joined = points
    if problem.is_factored:
        joined = in_turn(lambda pair: factored.join(pair, last), points)
        last = joined[-1].core
    terms = to_terms(problem, setting, joined, last)
    frobenius = to_terms(problem, setting, path.frobenius, terms[-1].a)
    # The last in the order of decompositions: XLA drops it where it is not used.
    later = dataclasses.replace(setting, target=after(setting.target, frobenius[-1].a))
    error = objective.spectral_error(problem, later, points)
    valid = jnp.where(setting.finite, 1, jnp.nan).astype(error.dtype)
    status = jnp.where(setting.finite, path.state.status, Status.NONFINITE)
    if not problem.squarings:
        status = jnp.where(setting.finite, Status.CONVERGED, Status.NONFINITE)
    return Solution(
        terms=terms,
        spectral_error=error * setting.unit * valid,
        frobenius=frobenius,
        trace=dataclasses.replace(
            trace,
            value=trace.value * valid,
            spectral_error=trace.spectral_error * valid,
        ),
        status=status,
    )


def _perturb(points, key, size):
    """Move points by random tangent vectors of `size` times their norms."""
    keys = iter(jax.random.split(key, len(points)))

    def move(point):
        shape = point.a.shape[1], point.b.shape[1]
        noise = jax.random.normal(next(keys), shape, point.a.dtype)
        tangent = manifold.project(point, noise)
        length = size * jnp.linalg.norm(point.core)
        length = length / jnp.sqrt(manifold.inner(tangent, tangent))
        return manifold.retract_metric(
            point, jax.tree.map(lambda x: length * x, tangent)
        )

    return in_turn(move, points)


def _ratio(first, second, p):
    """Return the step from `second` to `p` over that from `first`, in 1/p."""
    return (1 / second - 1 / p) / (1 / first - 1 / second)


def _extrapolation(problem, previous, points, ratio):
    """Return `ratio` times the displacement from `previous`, tangent at `points`."""
    displacements = map(objective.geometry(problem).displacement, previous, points)
    return jax.tree.map(lambda x: ratio * x, tuple(displacements))
