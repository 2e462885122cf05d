"""An interior-point method for the spectral norm, which follows the central path.

`min t` subject to `Z = tI − J(E) ⪰ 0`, `J(E) = [[0, E], [Eᵀ, 0]]`, has multipliers
`X ⪰ 0` of trace one. For a falling μ, Newton's method on

    2 𝒫(X_12) = 0,    tr X = 1,    X Z = μ I

with X in the direction of Helmberg, Kojima and Monteiro leads along the central path:
with `S(ξ) = tr(X J(D) Z⁻¹ J(D))` for `D = L^{1/2} ξ R^{1/2}` and the curvature B of the
manifold, a step solves

    [[S + B, c], [cᵀ, tr X Z⁻¹]] [ξ; τ] = [2 μ 𝒫(Z⁻¹_12); μ tr Z⁻¹ − 1]

with `c = 2 𝒫(sym(X Z⁻¹)_12)`. Where the matrix is not positive definite its negative
eigenvalues are replaced by their moduli: ξ is always a direction of descent of
`min_t t − μ log det Z`, and is shortened until that falls. The next t is the minimising
t, not `t + τ`: this allows steps along a curved boundary that are several times as
long. The method needs to know nothing about the leading singular values that will
coincide: at the end they are the ones for which `X` has not vanished. `2 X_12`, whose
nuclear norm is at most one, certifies the result up to `(m + n) μ`.

The module is NumPy only: its work is in products, Cholesky factors and eigenvalues,
which are calls to BLAS and LAPACK already. Compiled by jax the products of a step took
1.2 times as long at order 768 on a CPU, and three times as long at order 36.

References: Helmberg, Rendl, Vanderbei and Wolkowicz (1996); Forsgren, Gill and Wright
(2002), for the treatment of nonconvexity.

>>> import numpy as np
>>> from kronjax.kronecker import KroneckerTerms
>>> eye = KroneckerTerms(np.eye(2)[None], np.eye(2)[None])
>>> inner = descend(ClusterProblem.of(np.diag([1.0, 0.0, 0.0, 1.0]), (eye,)))
>>> error = inner.space.scale * np.linalg.norm(inner.error, 2)
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
"""Relative gap `(m + n) μ` of the first target on the central path."""

END = 1e-8
"""Relative gap of the last target on the central path."""

LARGEST = 5000
"""Unknowns of the largest dense system; conjugate gradients solve larger systems."""

PRODUCTS = 100
"""Limit on conjugate gradient iterations in a step."""

ENOUGH = 0.03
"""Factor by which conjugate gradients reduce the norm of the residual."""

FALL = 0.1
"""Factor by which μ is reduced."""

CENTRED = 1.0
"""Newton decrement, over μ, below which μ falls."""

STEPS = 150
"""Limit on Newton steps."""

SHORTER = 0.8
"""Factor by which steps are shortened that leave the interior or do not descend."""

FLAT = 0.1
"""Initial lower limit of the curvature, over the largest curvature of the manifold.

The limit is multiplied by four after a step that had to be shortened much, and divided
by four after a full step.
"""

FLATTEST = 1e-3
"""Smallest value of that limit."""


@dataclasses.dataclass(frozen=True)
class Inner:
    """A point in the interior, and its multipliers.

    Attributes:
        space: The problem.
        sheets: Tangent spaces at the sum.
        error: E, `[m, n]`.
        t: Upper bound on `‖E‖_2`, strict.
        x: X, `[m + n, m + n]`.
        steps: Number of steps so far.
    """

    space: ClusterProblem
    sheets: tuple[Sheet, ...]
    error: np.ndarray
    t: float
    x: np.ndarray
    steps: int = 0

    @functools.cached_property
    def inverse(self) -> Blocks:
        """The blocks of `Z⁻¹`."""
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
        """Norm of the tangential part of the dual."""
        return float(np.linalg.norm(self.space.project(self.sheets, self.dual)))

    @property
    def gap(self) -> float:
        """The duality gap `<X, Z>` over t."""
        return 1 - float(np.sum(self.dual * self.error)) / self.t


def levels(
    space: ClusterProblem,
    *,
    begin: float = BEGIN,
    end: float = END,
    steps: int = STEPS,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[Inner]:
    """Follow the central path; yield a point near it for every μ, and the last point.

    Args:
        space: The problem, with the sum to begin with.
        begin: Relative gap of the first target on the path.
        end: Relative gap of the last target.
        steps: Limit on steps of Newton's method.
        tell: Callback for a progress message after every step.
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
    """Return the last point of `levels`."""
    *_, last = levels(space, **keywords)
    return last


@dataclasses.dataclass(frozen=True)
class _System:
    """The linear system of a Newton step, `[[S + B, c], [cᵀ, e]] [ξ; τ] = [f; g]`."""

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
        """Solve the system; if it is indefinite, with moduli of eigenvalues.

        The moduli are at least `flat` times the norm of the curvature of the manifold.
        """
        here, size = self.here, len(self.c)
        bend = here.space.bend(here.sheets, here.dual)
        matrix = np.empty((size + 1, size + 1))
        whole = here.space.form(here.sheets, here.multipliers, here.inverse)
        matrix[:size, :size] = whole + bend
        matrix[size, :size] = matrix[:size, size] = self.c
        matrix[size, size] = self.e
        right = np.append(self.f, self.g)
        try:
            np.linalg.cholesky(matrix)
            # May be singular all the same: condition numbers reach 1e18 at the end.
            solution = np.linalg.solve(matrix, right)
        except np.linalg.LinAlgError:
            values, vectors = np.linalg.eigh(matrix)
            moduli = np.maximum(np.abs(values), flat * _norm(bend))
            solution = vectors @ ((right @ vectors) / moduli)
        return solution[:size], float(solution[size])

    def free(self):
        """Solve the system by conjugate gradients, which stop at negative curvature."""
        right = self.f - self.c * (self.g / self.e)
        xi, rest, direction = np.zeros(len(right)), right, right
        size = limit = rest @ rest
        for _ in range(PRODUCTS):
            image = self._product(direction)
            curvature = direction @ image
            if curvature <= 0:
                break
            xi = xi + size / curvature * direction
            rest = rest - size / curvature * image
            size, last = rest @ rest, size
            if size < ENOUGH**2 * limit:
                break
            direction = rest + size / last * direction
        if not xi.any():
            xi = right
        return xi, float((self.g - self.c @ xi) / self.e)

    def _product(self, xi):
        """Return `(S + B − c cᵀ / e) ξ`."""
        here = self.here
        image = here.space.curve(here.sheets, here.multipliers, here.inverse, xi)
        image += here.space.bent(here.sheets, here.dual, xi)
        return image - self.c * (self.c @ xi / self.e)


def _searched(here: Inner, mu, xi, rise, decrement):
    """Return the next point, or None, and the fraction of the step that was taken."""
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
    """Return `t − μ log det Z`, or infinity outside of the interior."""
    m, n = error.shape
    if t <= 0:
        return math.inf
    try:
        root = np.linalg.cholesky(t * t * np.eye(n) - error.T @ error)
    except np.linalg.LinAlgError:
        return math.inf
    return t - mu * (2 * np.log(np.diag(root)).sum() + (m - n) * math.log(t))


def _multiplied(here: Inner, mu, xi, rise) -> np.ndarray:
    """Return the multipliers after the step, shortened to keep them positive."""
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
    """Return an estimate of the spectral norm by the power method."""
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
