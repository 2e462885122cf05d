"""Newton's method on the cluster of leading singular values, in float64 on the host.

At a minimiser of `‖T − K‖_2` several leading singular values of the error coincide.
With their vectors `U_1`, `V_1`, a tangent vector ξ and the matrices of `cluster`, each
step minimises `t + ½ H[ξ, ξ]` subject to the `k` leading values all becoming `t` to
first order,

    [[H, 𝒜ᵀ, 0], [𝒜, 0, −e], [0, −eᵀ, 0]] [ξ; y; t] = [0; −svec diag(σ_1 … σ_k); −1],

and retracts; it is solved on the null space of 𝒜 less its trace, where negative
curvature counts as positive. `k` is where the values fall most, or one of its
neighbours. A step is taken only if the spectral norm falls: what comes back is never
worse than what came.
Near a minimiser with positive multipliers and positive projected Hessian the steps
converge quadratically, in practice to the last digit.

References: Overton (1988); Overton and Womersley (1995); Absil and Malick (2012).

>>> import numpy as np
>>> from kronjax.kronecker import KroneckerTerms
>>> one = KroneckerTerms(np.ones((1, 2, 2)), np.ones((1, 2, 2)))
>>> found = finish(np.kron(np.ones((2, 2)), np.ones((2, 2))), (one,))
>>> found.status, found.steps
('exact', 0)
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import numpy as np

from kronjax.cluster import Cluster, Space
from kronjax.errors import measure
from kronjax.kronecker import KroneckerTerms

ROUNDS = 40
"""Steps at most; five are enough where they converge quadratically."""

LARGEST = 5000
"""Unknowns, coordinates and multipliers together, of the largest dense system."""

SETTLED = 1e-13
"""Spread of the cluster, relative, and KKT residual at which there is no more to do."""

DAMPING = (0.0, 1e-3, 1e-2, 1e-1)
"""Parts of the largest curvature that are added to all, one after the other."""

RELEASES = (0.1, 0.01, 0.001)
"""By how much what has a negative multiplier is sent below the cluster, relatively."""

LENGTHS = (1.0, 0.3, 0.1)
"""Parts of a step that are tried."""

POSITIVE = 1e-8
"""What a relative eigenvalue has to exceed to be positive beyond rounding."""

GATHERED = 2
"""Steps back onto the surface where the cluster coincides, after a step along it."""

CHASED = 3
"""Full steps in a row before the norm has to be smaller."""


@dataclasses.dataclass(frozen=True)
class Finish:
    """What the second-order finish returns.

    Attributes:
        terms: One `KroneckerTerms` for each that was given, float64.
        spectral_error: `‖L^{1/2} (T − K) R^{1/2}‖_2`.
        steps: Taken.
        cluster: Leading singular values that coincide; 0 where none were looked at.
        kkt_residual: Norm of the stationarity residual `𝒜ᵀy` at multipliers of trace
            one, and of the relative spread of the cluster.
        multipliers_min: Smallest eigenvalue of the multipliers, relative to `1 / k`.
        hessian_min: Smallest eigenvalue of the Hessian on the directions that keep the
            cluster together, relative to its norm; infinite if there are none.
        dual: `U_1 Λ V_1ᵀ`, `[m, n]`: what certifies it; zeros without a cluster.
        status: "converged", "stalled", "max_steps", "exact" (nothing is left),
            "too_large" or "rank_deficient" (both as they came).
    """

    terms: tuple[KroneckerTerms, ...] = dataclasses.field(repr=False)
    spectral_error: float
    steps: int
    cluster: int
    kkt_residual: float
    multipliers_min: float
    hessian_min: float
    dual: np.ndarray = dataclasses.field(repr=False)
    status: str

    @property
    def is_strict_minimum(self) -> bool:
        """Whether the second-order conditions of a strict local minimum hold."""
        positive = min(self.multipliers_min, self.hessian_min) > POSITIVE
        return self.status == "converged" and positive


def finish(
    matrix: np.ndarray,
    terms: Sequence[KroneckerTerms],
    left_weight: np.ndarray | None = None,
    right_weight: np.ndarray | None = None,
    *,
    rounds: int = ROUNDS,
) -> Finish:
    """Return the local minimum near a sum, or as far as its error could be lowered.

    Args:
        matrix: `T`, `[m, n]`, finite.
        terms: The sum to begin with, one for each configuration.
        left_weight: `[m, m]`, as for `solve`, or None.
        right_weight: `[n, n]`, likewise.
        rounds: Steps at most.

    Returns:
        `Finish`; its error is at most that of `terms`.
    """
    space = Space.of(matrix, terms, left_weight, right_weight)
    if space is None:
        return _as_given(matrix, terms, left_weight, right_weight, "rank_deficient")
    if space.dimension > LARGEST:
        return _as_given(matrix, terms, left_weight, right_weight, "too_large")
    here = space.cluster()
    status, steps = "max_steps", 0
    if here.is_exact:
        return _result(here, None, 0, "exact")
    size = 1
    for _ in range(rounds):
        size, count, there = _improve(here)
        if there is None:
            status = "stalled"
            break
        steps, here = steps + count, there
        if here.is_exact:
            return _result(here, None, steps, "exact")
    found = here.view(size)
    if found.residual < 1e-9:
        status = "converged"
    return _result(here, found, steps, status)


def _improve(here: Cluster):
    """Return the size of the cluster, steps, and the next one of smaller norm or None.

    Full steps first: on a curved manifold one of them may raise the norm and the next
    one bring it below. Then shorter and damped ones, as far as they lower it at once.
    """
    views = sorted(map(here.view, _sizes(here)), key=lambda view: view.residual)
    first = views[0]
    if first.residual < SETTLED and first.multipliers[0] >= 0:
        return first.size, 0, None
    if first.multipliers[0] < 0 and first.residual < 1e-6:
        there = _search(here, first, 0.0, RELEASES)
        if there is not None:
            return first.size, 1, there
    best = None
    for view in views:
        count, there = _chase(here, view)
        if there is not None and (best is None or there.s[0] < best[2].s[0]):
            best = view.size, count, there
            if _lands(here, there, view.size):
                return best
    for damping in DAMPING:
        there = _search(here, first, damping, (0.0,))
        if there is not None and (best is None or there.s[0] < best[2].s[0]):
            return first.size, 1, there
    if best is None:
        for view in views:
            if view.multipliers[0] < 0:
                there = _search(here, view, 0.0, RELEASES)
                if there is not None:
                    return view.size, 1, there
    return best or (first.size, 0, None)


def _search(here: Cluster, view, damping: float, releases):
    """Shorten a step until the norm falls, once the cluster is gathered again."""
    for release, length in itertools.product(releases, LENGTHS):
        step = view.step(damping, release * here.s[0])
        there = here.moved(length * step)
        for _ in range(GATHERED):
            if there is None or there.s[0] < here.s[0]:
                break
            there = there.moved(there.view(view.size).gather())
        if there is not None and there.s[0] < here.s[0]:
            return there
    return None


def _chase(here: Cluster, view):
    """Take full steps until the norm is below where it was; say how many."""
    for count in range(1, CHASED + 1):
        there = view.cluster.moved(view.step())
        if there is None or there.s[0] > 2 * here.s[0]:
            break
        if there.s[0] < here.s[0]:
            return count, there
        view = there.view(view.size)
    return 0, None


def _lands(here: Cluster, there: Cluster, k: int) -> bool:
    """Return whether a step has brought the cluster much closer together."""
    before, after = (one.s[0] - one.s[k - 1] for one in (here, there))
    return after < 0.1 * before


def _sizes(here: Cluster) -> list[int]:
    """Return sizes of the cluster, by how much the singular values fall after it."""
    s = here.s
    most = here.space.most
    near = [k for k in range(1, min(len(s), most + 1)) if s[k - 1] > 0.5 * s[0]]
    # Where the spread of what is inside is small against the fall.
    falls = {k: (s[k - 1] - s[k]) / (s[0] - s[k - 1] + 1e-3 * s[0]) for k in near}
    if len(s) <= most and s[-1] > 0.5 * s[0]:
        falls[len(s)] = s[-1] / (s[0] - s[-1] + 1e-3 * s[0])
    best = sorted(falls, key=lambda k: -falls[k])[:2] or [1]
    around = [best[0], best[0] + 1, best[0] - 1, *best[1:]]
    return [k for k in dict.fromkeys(around) if 1 <= k <= min(len(s), most)]


def _result(here: Cluster, view, steps: int, status: str) -> Finish:
    space = here.space
    return Finish(
        terms=here.terms(),
        spectral_error=float(here.s[0] * space.scale),
        steps=steps,
        cluster=view.size if view else 0,
        kkt_residual=float(view.residual) if view else 0.0,
        multipliers_min=float(view.size * view.multipliers[0]) if view else 0.0,
        hessian_min=view.hessian_min() if view else 0.0,
        dual=view.dual() if view else np.zeros((len(here.u), len(here.v))),
        status=status,
    )


def _as_given(matrix, terms, left, right, status: str) -> Finish:
    given = jax.tree.map(lambda x: np.asarray(x, np.float64), tuple(terms))
    error = measure(np.asarray(matrix), given, left, right).spectral
    zeros = np.zeros(np.shape(matrix))
    return Finish(given, float(error), 0, 0, np.inf, 0.0, 0.0, zeros, status)
