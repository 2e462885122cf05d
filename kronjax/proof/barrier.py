"""Along the central path: an interior-point method for the spectral norm.

`min t` subject to `Z = tI − J(E) ⪰ 0`, `J(E) = [[0, E], [Eᵀ, 0]]`, has multipliers
`X ⪰ 0` of trace one. For a falling μ, Newton's method on

    2 𝒫(X_12) = 0,    tr X = 1,    X Z = μ I

with X in the direction of Helmberg, Kojima and Monteiro leads along the central path:
with `S(ξ) = tr(X J(D) Z⁻¹ J(D))` for `D = L^{1/2} ξ R^{1/2}` and the curvature B of the
manifold, a step solves

    [[S + B, c], [cᵀ, tr X Z⁻¹]] [ξ; τ] = [2 μ 𝒫(Z⁻¹_12); μ tr Z⁻¹ − 1]

with `c = 2 𝒫(sym(X Z⁻¹)_12)`. Where the matrix is not positive definite its negative
eigenvalues count as positive: ξ always descends `min_t t − μ log det Z`, and is
shortened until that falls. The minimising t is taken, not `t + τ`: with it steps that
follow a curved boundary are several times as long. Nothing needs to be known of the
leading singular values that will coincide: at the end those are the ones of which `X`
has not vanished. `2 X_12`, whose nuclear norm is at most one, certifies what is reached
up to `(m + n) μ`.

All of it is NumPy: the work is in products, Cholesky factors and eigenvalues, which are
BLAS and LAPACK already. Compiled by jax the products of a step took 1.2 times as long
at order 768 on a CPU, and three times as long at 36.

References: Helmberg, Rendl, Vanderbei and Wolkowicz (1996); Forsgren, Gill and Wright
(2002), for the treatment of what is not convex.

>>> import numpy as np
>>> from kronjax.kronecker import KroneckerTerms
>>> one = KroneckerTerms(np.eye(2)[None], np.eye(2)[None])
>>> found = descend(ClusterProblem.of(np.diag([1.0, 0.0, 0.0, 1.0]), (one,)))
>>> error = found.space.scale * np.linalg.norm(found.error, 2)
>>> bool(abs(error - 0.5) < 1e-6)
True
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import numpy as np

from kronjax.proof.cluster import Blocks, ClusterProblem
from kronjax.proof.tangent_coordinates import Sheet

BEGIN = 1e-2
"""Relative gap `(m + n) μ` of the point of the central path that is aimed at first."""

END = 1e-8
"""Of the last one."""

LARGEST = 5000
"""Unknowns of the largest dense system; larger ones take conjugate gradients."""

PRODUCTS = 100
"""Of those, at most, in a step."""

ENOUGH = 0.03
"""To which part of its length the residual is reduced."""

FALL = 0.1
"""By what μ is multiplied."""

CENTRED = 1.0
"""Newton decrement, over μ, below which μ falls."""

STEPS = 150
"""Newton steps at most."""

SHORTER = 0.8
"""By what steps are shortened that leave the interior or do not descend."""

FLAT = 0.1
"""Curvature, over the largest of the manifold, that counts at least, at first.

Four times as much after a step that had to be shortened much, and a quarter after one
that was not.
"""

FLATTEST = 1e-3
"""The least it becomes."""


@dataclasses.dataclass(frozen=True)
class Inner:
    """A point inside, and its multipliers.

    Attributes:
        space: The problem.
        sheets: Where it is.
        error: E, `[m, n]`.
        t: More than `‖E‖_2`.
        x: X, `[m + n, m + n]`.
        steps: Taken.
    """

    space: ClusterProblem
    sheets: tuple[Sheet, ...]
    error: np.ndarray
    t: float
    x: np.ndarray
    steps: int = 0

    @functools.cached_property
    def inverse(self) -> Blocks:
        """`Z⁻¹`."""
        e, t = self.error, self.t
        core = np.linalg.inv(t * t * np.eye(e.shape[1]) - e.T @ e)
        core = (core + core.T) / 2
        across = e @ core
        return Blocks((np.eye(len(e)) + across @ e.T) / t, across, t * core)

    @property
    def multipliers(self) -> Blocks:
        """The blocks of X."""
        m = len(self.error)
        return Blocks(self.x[:m, :m], self.x[:m, m:], self.x[m:, m:])

    @property
    def dual(self) -> np.ndarray:
        """`2 X_12`, `[m, n]`."""
        return 2 * self.multipliers.uv

    @property
    def residual(self) -> float:
        """Length of the tangential part of the dual."""
        return float(np.linalg.norm(self.space.project(self.sheets, self.dual)))

    @property
    def gap(self) -> float:
        """`<X, Z>` over t."""
        return 1 - float(np.sum(self.dual * self.error)) / self.t


def levels(
    space: ClusterProblem,
    *,
    begin: float = BEGIN,
    end: float = END,
    steps: int = STEPS,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[Inner]:
    """Go along the central path; yield a point near it for every μ, and the last one.

    Args:
        space: The problem, with the sum to begin with.
        begin: Relative gap of the first point of the path.
        end: Of the last one.
        steps: Of Newton's method, at most.
        tell: Told how far it is, after every step.
    """
    error = space.error(space.sheets)
    s = np.linalg.svd(error, compute_uv=False)
    order = sum(error.shape)
    mu, last = begin * s[0] / order, end * s[0] / order
    t = _level(s, mu, order)
    here = Inner(space, space.sheets, error, t, np.zeros((0, 0)))
    here = dataclasses.replace(here, x=mu * _whole(here.inverse))
    flat = FLAT
    for count in range(steps):
        system = _System.of(here, mu)
        is_dense = space.dimension <= LARGEST
        xi, rise = system.dense(flat) if is_dense else system.free()
        decrement = float(system.f @ xi + system.g * rise)
        there, length = _searched(here, mu, xi, rise, decrement)
        if there is None:
            break
        here = there
        tell(f"interior point {count + 1}: gap {here.gap:.0e}")
        if length < 0.3:
            flat = min(4 * flat, 1.0)
        elif length == 1:
            flat = max(flat / 4, FLATTEST)
        is_centred = decrement < CENTRED * mu and here.gap * here.t < 2 * order * mu
        if is_centred and length == 1:
            if mu <= last:
                break
            yield here
            mu = max(FALL * mu, last)
    yield here


def descend(space: ClusterProblem, **keywords) -> Inner:
    """Return the last of the `levels`."""
    *_, last = levels(space, **keywords)
    return last


@dataclasses.dataclass(frozen=True)
class _System:
    """What a Newton step solves, `[[S + B, c], [cᵀ, e]] [ξ; τ] = [f; g]`."""

    here: Inner
    c: np.ndarray
    e: float
    f: np.ndarray
    g: float

    @classmethod
    def of(cls, here: Inner, mu: float) -> "_System":
        space, x, z = here.space, here.multipliers, here.inverse
        across = x.uu @ z.uv + x.uv @ z.vv + z.uu @ x.uv + z.uv @ x.vv
        c = space.project(here.sheets, across)
        e = np.sum(x.uu * z.uu) + 2 * np.sum(x.uv * z.uv) + np.sum(x.vv * z.vv)
        f = 2 * mu * space.project(here.sheets, z.uv)
        return cls(here, c, float(e), f, mu * (np.trace(z.uu) + np.trace(z.vv)) - 1)

    def dense(self, flat: float):
        """Solve it; what is not positive is made so, and at least `flat`."""
        here, size = self.here, len(self.c)
        bend = here.space.bend(here.sheets, here.dual)
        matrix = np.empty((size + 1, size + 1))
        whole = here.space.form(here.sheets, here.multipliers, here.inverse)
        matrix[:size, :size] = whole + bend
        matrix[size, :size] = matrix[:size, size] = self.c
        matrix[size, size] = self.e
        right = np.append(self.f, self.g)
        if _is_positive(matrix):
            found = np.linalg.solve(matrix, right)
        else:
            values, vectors = np.linalg.eigh(matrix)
            moduli = np.maximum(np.abs(values), flat * _norm(bend))
            found = vectors @ ((right @ vectors) / moduli)
        return found[:size], float(found[size])

    def free(self):
        """Solve it by conjugate gradients, until the curvature is negative."""
        right = self.f - self.c * (self.g / self.e)
        found, rest, direction = np.zeros(len(right)), right, right
        size = limit = rest @ rest
        for _ in range(PRODUCTS):
            image = self._product(direction)
            curvature = direction @ image
            if curvature <= 0:
                break
            found = found + size / curvature * direction
            rest = rest - size / curvature * image
            size, last = rest @ rest, size
            if size < ENOUGH**2 * limit:
                break
            direction = rest + size / last * direction
        if not found.any():
            found = right
        return found, float((self.g - self.c @ found) / self.e)

    def _product(self, xi):
        """Return `(S + B − c cᵀ / e) ξ`."""
        here = self.here
        image = here.space.curve(here.sheets, here.multipliers, here.inverse, xi)
        image += here.space.bent(here.sheets, here.dual, xi)
        return image - self.c * (self.c @ xi / self.e)


def _searched(here: Inner, mu, xi, rise, decrement):
    """Return the next point, or None, and how much of the step was taken."""
    value, length = _value(here.error, here.t, mu), 1.0
    order = sum(here.error.shape)
    while length > 1e-4:
        sheets = here.space.moved(here.sheets, length * xi)
        if sheets is not None:
            error = here.space.error(sheets)
            s = np.linalg.svd(error, compute_uv=False)
            t = _level(s, mu, order)
            slack = 1e-4 * length * decrement - 1e-13 * abs(value)
            if _value(error, t, mu) <= value - slack:
                x = _multiplied(here, mu, xi, rise)
                return Inner(here.space, sheets, error, t, x, here.steps + 1), length
        length *= SHORTER
    return None, 0.0


def _value(error, t, mu) -> float:
    """Return `t − μ log det Z`, infinite outside."""
    m, n = error.shape
    if t <= 0:
        return math.inf
    try:
        root = np.linalg.cholesky(t * t * np.eye(n) - error.T @ error)
    except np.linalg.LinAlgError:
        return math.inf
    return t - mu * (2 * np.log(np.diag(root)).sum() + (m - n) * math.log(t))


def _multiplied(here: Inner, mu, xi, rise) -> np.ndarray:
    """Return the multipliers after the step, as far as they stay positive."""
    x, inverse = here.x, _whole(here.inverse)
    d = here.space.push(here.sheets, xi)
    m, n = d.shape
    change = np.block([[rise * np.eye(m), d], [d.T, rise * np.eye(n)]])
    moved = x @ change @ inverse
    step, length = mu * inverse - x - (moved + moved.T) / 2, 1.0
    if _is_positive(x + step):
        return x + step
    while length > 1e-4:
        length *= SHORTER
        if _is_positive(x + length * step):
            return x + 0.9 * length * step
    return x


def _is_positive(matrix) -> bool:
    try:
        np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return False
    return True


def _norm(symmetric) -> float:
    """Return about the spectral norm, by the power method."""
    vector = np.random.default_rng(0).standard_normal(len(symmetric))
    for _ in range(20):
        vector = symmetric @ (vector / max(np.linalg.norm(vector), 1e-300))
    return float(np.linalg.norm(vector))


def _level(s, mu, order) -> float:
    """Return the t that minimises `t − μ log det Z`."""
    low, high = 0.5 * mu, 2 * order * mu

    def trace(t):
        rest = (order - 2 * len(s)) / t
        return mu * (np.sum(1 / (t - s) + 1 / (t + s)) + rest)

    for _ in range(60):
        middle = math.sqrt(low * high)
        if trace(s[0] + middle) > 1:
            low = middle
        else:
            high = middle
    return s[0] + high


def _whole(blocks: Blocks) -> np.ndarray:
    return np.block([[blocks.uu, blocks.uv], [blocks.uv.T, blocks.vv]])
