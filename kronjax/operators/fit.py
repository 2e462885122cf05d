"""The symmetric sum of Kronecker products that minimises `‖I − Q K Qᵀ‖_2`.

With `A = L Lᵀ` and `Q = L⁻¹ C^{1/2}` the sum `C^{1/2} K C^{1/2}` approximates `A`, and
with `Q = Lᵀ C^{-1/2}` the sum `C^{-1/2} K C^{-1/2}` approximates `A⁻¹`, where
`C = C1 ⊗ C2` is a Kronecker product near `A`. If the norm is `e < 1`, the condition
number of the preconditioned matrix is at most `(1 + e) / (1 − e)`, and this is attained
at the best scale: to minimise the norm is to minimise the condition number.

The descent works as `solver.continuation` does, from p = 2 upwards, on points in the
coordinates of `symmetric`, several starts one after the other. Where the norm stays
near one it hardly depends on the condition number, and no start may be definite: then
`log (‖M‖_q ‖M⁻¹‖_q)` of `M = Q K Qᵀ` is minimised, with q rising from 2, from the best
definite start and from `C` itself.

>>> found = fit(np.eye(4), np.kron(np.eye(2), [[2.0, 1.0], [1.0, 2.0]]), (2, 2), 1)
>>> found.ranks, bool(found.error < 1e-3)
((1, 0), True)
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kronjax.kronecker import KroneckerTerms, matmul, rearrange
from kronjax.linalg import compiling, schatten, spectral
from kronjax.operators.symmetric import (
    SKEW,
    SYMMETRIC,
    ambient_of,
    dimension,
    terms_of,
)
from kronjax.solver import descent, manifold
from kronjax.solver.descent import Limits, State

PARITIES = SYMMETRIC, SKEW

SQUARINGS = (-1, *range(12))
"""Stages: p = 2, then `2^{j+1} + 2` up to 4098."""

RACE = 4
"""Number of stages of every start; the best one goes on."""

EVALUATIONS = 150
"""Largest number of evaluations of a stage; p = 2 has four times as many."""

TOLERANCE = 1e-6
"""Predicted relative decrease of the squared norm that ends a stage."""

SETTLED = 2e-4
"""Relative decrease of the spectral norm over a stage after which it is the last."""

LEAST = 7
"""Squarings of the first stage that may be the last: p = 258."""

FLAT = 0.8
"""Error above which the condition number itself is minimised at the end."""

EXPONENTS = 2.0, 8.0, 32.0, 128.0, 512.0, 2048.0
"""Exponents q of the norms in that condition number."""

LITTLE = 1e-2
"""Relative norm of what is added to the identity for the last resort of all starts."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A sum in the coordinates of `C`.

    Attributes:
        terms: Factors `[r, n1, n1]` and `[r, n2, n2]`, symmetric or both skew.
        error: `‖I − Q K Qᵀ‖_2`.
        ranks: Numbers of symmetric and of skew-symmetric products.
    """

    terms: KroneckerTerms
    error: float
    ranks: tuple[int, int]


def _sum(points, sizes) -> KroneckerTerms:
    parts = [
        terms_of(point, sizes, parity)
        for point, parity in zip(points, PARITIES, strict=True)
        if point is not None
    ]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def _image(q, terms):
    """Return `Q K Qᵀ`."""
    return jnp.matmul(matmul(q, terms), q.T, precision="highest")


def _norm_of_error(image, squarings):
    """Return `½‖I − M‖_p²` of a symmetric matrix and its gradient."""
    error = jnp.eye(len(image), dtype=image.dtype) - image
    value, gradient = schatten.value_and_gradient(error, squarings)
    return value, -(gradient + gradient.T) / 2


def _log_condition(image, exponent):
    """Return `log (‖M‖_q ‖M⁻¹‖_q)` of a definite matrix and its gradient.

    It is infinite where the matrix is not definite.
    """
    values, vectors = jnp.linalg.eigh((image + image.T) / 2)
    definite = values[0] > 0
    safe = jnp.where(definite, values, 1)
    logs = exponent * jnp.log(safe)
    value = (jax.nn.logsumexp(logs) + jax.nn.logsumexp(-logs)) / exponent
    weights = (jax.nn.softmax(logs) - jax.nn.softmax(-logs)) / safe
    gradient = jnp.matmul(vectors * weights[None], vectors.T, precision="highest")
    return jnp.where(definite, value, jnp.inf), gradient


OBJECTIVES = {"norm": _norm_of_error, "condition": _log_condition}


def _objective(q, sizes, kind, exponent, present):
    def objective(points):
        full = _placed(points, present)
        image = _image(q, _sum(full, sizes))
        value, gradient = OBJECTIVES[kind](image, exponent)
        slope = jnp.matmul(gradient, q, precision="highest")
        return value, tuple(
            _projected(point, parity, q, slope, sizes)
            for point, parity in zip(full, PARITIES, strict=True)
            if point is not None
        )

    return objective


def _projected(point, parity, q, slope, sizes):
    """Return the Riemannian gradient at a point; `slope` is `G Q`, `[n, n]`.

    Derivatives by the factors of `Σ_k A_k ⊗ B_k` are those products of the gradient
    with factors that the projection consists of, without the gradient itself.
    """

    def paired(a, b):
        plain = manifold.Point(a, jnp.eye(len(a), dtype=a.dtype), b)
        return jnp.vdot(
            slope, matmul(q, terms_of(plain, sizes, parity)), precision="highest"
        )

    bz, az = jax.grad(paired, (0, 1))(point.a, point.b)
    core = jnp.matmul(az, point.b.T, precision="highest")
    mm = functools.partial(jnp.matmul, precision="highest")
    return manifold.Tangent(bz - mm(core.T, point.a), core, az - mm(core, point.b))


def _placed(points, present):
    given = iter(points)
    return tuple(next(given) if has else None for has in present)


def _stage(sizes, present, kind, q, state, exponent, evaluations):
    """Return the state after a stage, and the ends of the spectrum of `Q K Qᵀ`."""
    state = descent.restart(state)
    limits = Limits(TOLERANCE, evaluations)
    objective = _objective(q, sizes, kind, exponent, present)
    state = descent.minimize(objective, state, limits)
    image = _image(q, _sum(_placed(state.points, present), sizes))
    ends = jnp.linalg.eigvalsh((image + image.T) / 2)
    return state, ends[jnp.array([0, -1])]


@functools.lru_cache(maxsize=64)
def _compiled(sizes, present, kind, entries):
    call = functools.partial(_stage, sizes, present, kind)
    return jax.jit(call, compiler_options=compiling.options(entries))


@dataclasses.dataclass
class _Start:
    """A start on its way."""

    state: State
    present: tuple[bool, bool]
    ranks: tuple[int, int]
    best: Any
    ends: np.ndarray

    @property
    def error(self) -> float:
        return _error(self.ends)


def _error(ends) -> float:
    """Return the error at the best scale, from the ends of the spectrum; 1 if none."""
    low, high = map(float, ends)
    return (high - low) / (high + low) if low > 0 else 1.0


def fit(
    q: np.ndarray,
    begin: np.ndarray,
    sizes: tuple[int, int],
    rank: int,
    *,
    squarings: Sequence[int] = SQUARINGS,
    num_starts: int = 4,
    seed: int = 0,
    tell: Callable[[str], None] = lambda text: None,
) -> Fitted:
    """Minimise `‖I − Q K Qᵀ‖_2` over symmetric sums of `rank` products.

    Args:
        q: `Q`, `[n, n]`.
        begin: `[n, n]`, symmetric: its nearest sums are the starts.
        sizes: `(n1, n2)`.
        rank: Number of products.
        squarings: The stages; -1 alone gives the least Frobenius norm.
        num_starts: Number of starts: divisions of the rank among both kinds, and
            perturbations of the best of them.
        seed: Seed of the perturbations.
        tell: Called with the state of affairs after every stage.
    """
    given = jnp.asarray(q)
    # Gradients are then at most of the size of the error, and steps of one are safe.
    norm = spectral.estimate_norm(given)
    scaled = given / norm
    rearranged = rearrange(jnp.asarray(begin, given.dtype), (sizes[0], sizes[0]))
    ambients = [ambient_of(rearranged, sizes, parity) for parity in PARITIES]
    wanted = _divisions(ambients, rank, sizes)
    starts = [_start(scaled, sizes, ambients, ranks) for ranks in wanted[:num_starts]]
    key = jax.random.key(seed)
    while len(starts) < num_starts:
        key, own = jax.random.split(key)
        ranks = starts[0].ranks
        noisy = [
            x + 0.3 * jnp.linalg.norm(x) * _noise(own, x.shape, x.dtype)
            for x in ambients
        ]
        starts.append(_start(scaled, sizes, noisy, ranks))
    for start in starts:
        for j in squarings[:RACE]:
            _advance(start, scaled, sizes, "norm", j, tell)
    best = min(starts, key=lambda x: x.error)
    last = best.error
    for j in squarings[RACE:]:
        _advance(best, scaled, sizes, "norm", j, tell)
        if last - best.error <= SETTLED * best.error and j >= LEAST:
            break
        last = best.error
    if best.error > FLAT and len(squarings) > RACE:
        # Where the norm is near one it hardly depends on the condition number.
        again = [_again(best)] if best.error < 1 else []
        near = _near_identity(ambients, sizes)
        again.append(_start(scaled, sizes, near, (rank, 0)))
        for start in again:
            for exponent in EXPONENTS:
                _advance(start, scaled, sizes, "condition", exponent, tell)
        best = min([best, *again], key=lambda x: x.error)
    low, high = map(float, best.ends)
    terms = _sum(_placed(best.best, best.present), sizes)
    terms = KroneckerTerms(terms.a * (2 / (low + high) / norm**2), terms.b)
    return Fitted(
        terms=jax.tree.map(np.asarray, terms),
        error=best.error,
        ranks=best.ranks,
    )


def _again(start) -> _Start:
    """Return a start at the best points of another one."""
    return dataclasses.replace(start, state=descent.init(start.best))


def _near_identity(ambients, sizes):
    """Return ambient matrices of the identity and a little of everything else."""
    eye = jnp.eye(sizes[0] * sizes[1], dtype=ambients[0].dtype)
    rearranged = rearrange(eye, (sizes[0], sizes[0]))
    found = []
    for parity, other in zip(PARITIES, ambients, strict=True):
        own = ambient_of(rearranged, sizes, parity)
        norm = jnp.linalg.norm(other)
        share = LITTLE * jnp.linalg.norm(rearranged) / jnp.where(norm > 0, norm, 1)
        found.append(own + share * other)
    return found


def _noise(key, shape, dtype):
    noise = jax.random.normal(key, shape, dtype)
    return noise / jnp.linalg.norm(noise)


def _divisions(ambients, rank, sizes) -> list[tuple[int, int]]:
    """Return divisions of the rank into both kinds, the likeliest first."""
    most = [min(dimension(n, parity) for n in sizes) for parity in PARITIES]
    values = [
        np.linalg.svd(np.asarray(x), compute_uv=False) if x.size else np.zeros(0)
        for x in ambients
    ]
    leading = sorted(
        ((value, kind) for kind in (0, 1) for value in values[kind]), reverse=True
    )[:rank]
    natural = sum(kind for _, kind in leading)
    found = []
    for number in (natural, natural - 1, natural + 1, 0):
        number = min(max(number, 0), rank - 1, most[1])
        ranks = min(rank - number, most[0]), number
        if ranks not in found:
            found.append(ranks)
    return found


def _start(q, sizes, ambients, ranks) -> _Start:
    """Return a start at the nearest sum, at the scale that is best for p = 2."""
    present = ranks[0] > 0, ranks[1] > 0
    points = tuple(
        manifold.nearest(x, r) for x, r in zip(ambients, ranks, strict=True) if r
    )
    image = _image(q, _sum(_placed(points, present), sizes))
    scale = jnp.trace(image) / jnp.sum(image**2)
    points = tuple(
        dataclasses.replace(x, core=x.core * jnp.where(scale > 0, scale, 1))
        for x in points
    )
    return _Start(descent.init(points), present, ranks, points, np.zeros(2))


def _advance(start, q, sizes, kind, exponent, tell):
    """Run a stage, and keep its points if they are better than all before."""
    allowed = EVALUATIONS * (4 if kind == "norm" and exponent < 0 else 1)
    stage = _compiled(sizes, start.present, kind, q.size)
    start.state, ends = stage(q, start.state, exponent, allowed)
    ends = np.asarray(ends)
    if _error(ends) < start.error or not start.ends.any():
        start.best, start.ends = start.state.points, ends
    tell(f"error {start.error:.6g}")
