"""Along the central path: an interior-point method for the spectral norm.

`min t` subject to `Z = tI − J(E) ⪰ 0`, `J(E) = [[0, E], [Eᵀ, 0]]`, has multipliers
`X ⪰ 0` of trace one. For a falling μ, Newton's method on

    2 𝒫(X_12) = 0,    tr X = 1,    X Z = μ I

with X in the direction of Helmberg, Kojima and Monteiro leads along the central path:
with `S(ξ) = tr(X J(D) Z⁻¹ J(D))` for `D = L^{1/2} ξ R^{1/2}` and the curvature B of the
manifold, a step solves

    [[S + B, c], [cᵀ, tr X Z⁻¹]] [ξ; τ] = [2 μ 𝒫(Z⁻¹_12); μ tr Z⁻¹ − 1]

with `c = 2 𝒫(sym(X Z⁻¹)_12)`. Where the matrix is not positive definite a multiple of
the identity is added: the step then descends `t − μ log det Z`. Nothing needs to be
known of the leading singular values that will coincide: at the end those are the ones
of which `X` has not vanished. `2 X_12`, whose nuclear norm is at most one, certifies
what is reached up to `(m + n) μ`.

References: Helmberg, Rendl, Vanderbei and Wolkowicz (1996); Forsgren, Gill and Wright
(2002), for the treatment of what is not convex.

>>> import numpy as np
>>> from kronjax.kronecker import KroneckerTerms
>>> one = KroneckerTerms(np.eye(2)[None], np.eye(2)[None])
>>> found = descend(Space.of(np.diag([1.0, 0.0, 0.0, 1.0]), (one,)))
>>> error = found.space.scale * np.linalg.norm(found.error, 2)
>>> bool(abs(error - 0.5) < 1e-6)
True
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

from kronjax.cluster import Blocks, Space
from kronjax.sheet import Sheet

BEGIN = 1e-2
"""Relative gap `(m + n) μ` of the point of the central path that is aimed at first."""

END = 1e-9
"""Of the last one."""

FALL = 0.2
"""By what μ is multiplied."""

CENTRED = 2.0
"""Newton decrement, over μ, below which μ falls."""

STEPS = 150
"""Newton steps at most."""

SHORTER = 0.8
"""By what steps are shortened that leave the interior or do not descend."""

SHIFTS = (0.0, 0.02, 0.1, 0.3, 1.0)
"""What is added to the matrix of a step, as a part of the largest curvature."""


@dataclasses.dataclass(frozen=True)
class Inner:
    """A point inside, and its multipliers.

    Attributes:
        space: The problem.
        sheets: Where it is.
        error: E, `[m, n]`.
        t: More than `‖E‖_2`.
        x: X, `[m + n, m + n]`.
    """

    space: Space
    sheets: tuple[Sheet, ...]
    error: np.ndarray
    t: float
    x: np.ndarray

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


def descend(
    space: Space,
    *,
    begin: float = BEGIN,
    end: float = END,
    steps: int = STEPS,
    tell: Callable[[str], None] = lambda text: None,
) -> Inner:
    """Return a point near the end of the central path.

    Args:
        space: The problem, with the sum to begin with.
        begin: Relative gap of the first point of the path.
        end: Of the last one.
        steps: Of Newton's method, at most.
        tell: Told how far it is, after every step.
    """
    sheets = space.sheets
    error = space.error(sheets)
    s = np.linalg.svd(error, compute_uv=False)
    order = sum(error.shape)
    mu, last = begin * s[0] / order, end * s[0] / order
    t = _level(s, mu, order)
    here = Inner(space, sheets, error, t, np.zeros((0, 0)))
    here = dataclasses.replace(here, x=mu * _whole(here.inverse))
    shift = 0.0
    for count in range(steps):
        xi, rise, shift, decrement = _direction(here, mu, shift)
        there, length = _searched(here, mu, xi, rise, decrement)
        if there is None:
            break
        here = there
        tell(f"interior point {count + 1}: gap {here.gap:.0e}")
        if decrement < CENTRED * mu and length == 1:
            if mu <= last:
                break
            mu = max(FALL * mu, last)
    return here


def _direction(here: Inner, mu: float, shift: float):
    """Return the step, that of t, the shift and the decrement.

    `shift` is the last one that was needed.
    """
    space, sheets, inverse = here.space, here.sheets, here.inverse
    x, order = here.multipliers, sum(here.error.shape)
    across = x.uu @ inverse.uv + x.uv @ inverse.vv
    other = inverse.uu @ x.uv + inverse.uv @ x.vv
    trace = np.trace(inverse.uu) + np.trace(inverse.vv)
    size = space.dimension
    system = np.empty((size + 1, size + 1))
    system[:size, :size] = space.form(sheets, x, inverse)
    bend = space.bend(sheets, here.dual)
    system[:size, :size] += bend
    system[size, :size] = system[:size, size] = space.project(sheets, across + other)
    both = sum(
        np.sum(getattr(x, k) * getattr(inverse, k)) * (1 + (k == "uv"))
        for k in ("uu", "uv", "vv")
    )
    system[size, size] = both
    right = np.append(space.project(sheets, 2 * mu * inverse.uv), mu * trace - 1)
    largest, diagonal = None, np.arange(size)
    for part in SHIFTS:
        if part < shift / 8:
            continue
        if part and largest is None:
            largest = np.linalg.norm(bend, 2)
        added = part * largest if part else 0.0
        system[diagonal, diagonal] += added
        if _is_positive(system) or part == SHIFTS[-1]:
            break
        system[diagonal, diagonal] -= added
    found = np.linalg.solve(system, right)
    return found[:size], found[size], part, float(found @ right)


def _searched(here: Inner, mu, xi, rise, decrement):
    """Return the next point, or None, and how much of the step was taken."""
    value, length = _value(here.error, here.t, mu), 1.0
    while length > 1e-4:
        sheets = here.space.moved(here.sheets, length * xi)
        t = here.t + length * rise
        if sheets is not None:
            error = here.space.error(sheets)
            slack = 1e-4 * length * decrement - 1e-13 * abs(value)
            if _value(error, t, mu) <= value - slack:
                x = _multiplied(here, mu, xi, rise)
                return Inner(here.space, sheets, error, t, x), length
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
