"""The second-order finish: Newton's method to a local minimum, in float64 on the host.

At a minimiser of `‖T − K‖_2` several leading singular values of the error coincide.
With their vectors `U_1`, `V_1`, a tangent vector ξ and the matrices of `cluster`, each
step of Newton's method minimises `t + ½ H[ξ, ξ]` subject to the `k` leading values all
becoming `t` to first order,

    [[H, 𝒜ᵀ, 0], [𝒜, 0, −e], [0, −eᵀ, 0]] [ξ; y; t] = [0; −svec diag(σ_1 … σ_k); −1],

and retracts. The system is solved on the null space of 𝒜 less its trace, where negative
curvature is replaced by its modulus. Near a minimiser with positive multipliers and
positive projected Hessian the steps converge quadratically, in practice to the last
digit.

The method needs k. Small problems are tried at once, with k where the values fall most,
or a neighbour of it. Where this does not lead to positive multipliers, and for larger
problems, the central path of `barrier` comes first; it does not need k, and reveals k
at its end. The result is never worse than the input.

References: Overton (1988); Overton and Womersley (1995); Absil and Malick (2012).

>>> import numpy as np
>>> from kronjax.kronecker import KroneckerTerms
>>> ones = KroneckerTerms(np.ones((1, 2, 2)), np.ones((1, 2, 2)))
>>> end = finish(np.kron(np.ones((2, 2)), np.ones((2, 2))), (ones,))
>>> end.status, end.steps
('exact', 0)
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from kronjax import display
from kronjax.kronecker import KroneckerTerms
from kronjax.linalg.residuals import measure
from kronjax.proof import barrier
from kronjax.proof.cluster import Cluster, ClusterProblem, View

ROUNDS = 40
"""Limit on steps of Newton's method; five suffice where it converges quickly."""

QUICK = 400
"""Sum of rows and columns up to which Newton's method is tried first."""

SETTLED = 3e-13
"""Residual (KKT, or relative spread of the cluster) at which the method stops."""

CONVERGED = 1e-9
"""Residual below which a point counts as stationary."""

NEAR = 2e-4
"""Gap on the central path from which Newton's method is tried."""

POSITIVE = 1e-8
"""Threshold above which a relative eigenvalue is positive beyond rounding."""

CHASED = 3
"""Largest number of full steps in a row after which the norm must be smaller."""


@dataclasses.dataclass(frozen=True)
class Finish:
    """The result of the second-order finish.

    Attributes:
        terms: One `KroneckerTerms` for each one that was given, float64.
        spectral_error: `‖L^{1/2} (T − K) R^{1/2}‖_2`.
        steps: Number of steps of Newton's method on the cluster.
        path_steps: Number of steps of the interior-point method; 0 where it was not
            needed.
        cluster: Number of leading singular values that coincide; 0 where none were
            examined.
        kkt_residual: The larger of the norm of the stationarity residual `𝒜ᵀy` at
            multipliers of trace one and the relative spread of the cluster.
        multipliers_min: Smallest eigenvalue of the multipliers, relative to `1 / k`.
        hessian_min: Smallest eigenvalue of the Hessian on the directions that keep the
            cluster together, relative to its norm; infinite if there are none.
        dual: `U_1 Λ V_1ᵀ`, or `2 X_12` of the interior-point method where that is
            nearer to a certificate, `[m, n]`; zeros without a cluster.
        status: "converged", "stalled", "max_steps", "exact" (the error is zero up to
            rounding) or "rank_deficient" (the terms are returned as they were given).
    """

    terms: tuple[KroneckerTerms, ...]
    spectral_error: float
    steps: int
    path_steps: int
    cluster: int
    kkt_residual: float
    multipliers_min: float
    hessian_min: float
    dual: np.ndarray
    status: str

    @property
    def is_strict_minimum(self) -> bool:
        """True if the second-order conditions of a strict local minimum hold."""
        positive = min(self.multipliers_min, self.hessian_min) > POSITIVE
        return self.status == "converged" and positive

    def __repr__(self) -> str:
        """Return the status, the error, the steps and the second-order conditions."""
        rows = [
            ("status", self.status + ", strict local minimum" * self.is_strict_minimum),
            ("spectral error", f"{self.spectral_error:.5g}"),
            (
                "steps",
                f"{self.steps} of Newton's method, {self.path_steps} on the path",
            ),
            ("cluster", f"{self.cluster} coinciding singular values"),
            ("KKT residual", f"{self.kkt_residual:.1g}"),
            ("multipliers", f"smallest {self.multipliers_min:.2g} (relative to 1 / k)"),
            ("Hessian", f"smallest eigenvalue {self.hessian_min:.2g} (relative)"),
        ]
        return "\n".join(display.lines("Second-order finish", rows))


def finish(
    matrix: np.ndarray,
    terms: Sequence[KroneckerTerms],
    left_weight: np.ndarray | None = None,
    right_weight: np.ndarray | None = None,
    *,
    rounds: int = ROUNDS,
    tell: Callable[[str], None] = lambda text: None,
) -> Finish:
    """Return the local minimum near a sum, or the best sum on the way to it.

    Args:
        matrix: `T`, `[m, n]`, finite.
        terms: The sum to begin with, one `KroneckerTerms` for each configuration.
        left_weight: Weight of the rows, `[m, m]`, as for `solve`, or None.
        right_weight: Weight of the columns, `[n, n]`, as for `solve`, or None.
        rounds: Limit on steps of Newton's method.
        tell: Callback for progress messages, every few seconds for large problems.

    Returns:
        `Finish`; its error is at most that of `terms`.
    """
    space = ClusterProblem.of(matrix, terms, left_weight, right_weight)
    if space is None:
        return _as_given(matrix, terms, left_weight, right_weight, "rank_deficient")
    direct = _Path(space.cluster(), None, 0)
    if sum(space.target.shape) <= QUICK:
        direct = _converge(direct.here, None, rounds)
    if direct.is_settled or direct.is_cut:
        return direct.result(space, None)
    inner, polished = _along_the_path(space, rounds, tell)
    if polished.here.s[0] <= direct.here.s[0]:
        return polished.result(space, inner)
    return direct.result(space, None)


def _along_the_path(space: ClusterProblem, rounds, tell):
    """Return a point of the central path, and the end of Newton's method from there.

    The point is the first from which the method reaches a strict minimum, or the last.
    """
    inner, polished = None, None
    for inner in barrier.levels(space, tell=tell):
        polished = _Path(space.cluster(inner.sheets), None, 0)
        if space.dimension > barrier.LARGEST or inner.gap > NEAR:
            continue
        tell("Newton's method")
        size = _revealed(polished.here, inner)
        polished = _converge(polished.here, size, rounds)
        if polished.is_strict:
            break
    assert inner is not None and polished is not None
    if polished.view is None and space.dimension <= barrier.LARGEST:
        polished = _converge(polished.here, None, rounds)
    return inner, polished


@dataclasses.dataclass(frozen=True)
class _Path:
    """The end of a run of Newton's method.

    Attributes:
        here: The last point.
        view: View of its cluster, or None.
        steps: Number of steps.
        is_cut: True if the run ended at the limit on steps.
    """

    here: Cluster
    view: View | None
    steps: int
    is_cut: bool = False

    @property
    def is_settled(self) -> bool:
        """True if the point is exact, or stationary with no negative multiplier."""
        if self.here.is_exact:
            return True
        view = self.view
        if view is None:
            return False
        return bool(view.residual < CONVERGED and view.multipliers[0] >= 0)

    @property
    def is_strict(self) -> bool:
        """True if the point is exact or a strict minimum."""
        if not self.is_settled or self.view is None:
            return self.is_settled
        return min(self.view.multipliers[0], self.view.hessian_min()) > POSITIVE

    def result(self, space: ClusterProblem, inner: barrier.Inner | None) -> Finish:
        """Return the finish; `inner` is the last interior point, if there is one."""
        here, view = self.here, self.view
        dual, residual = np.zeros(space.target.shape), 0.0
        status = "max_steps" if self.is_cut else "stalled"
        if here.is_exact:
            view, status = None, "exact"
        if view is not None:
            dual, residual = view.dual(), float(view.residual)
            status = "converged" if residual < CONVERGED else status
        if inner is not None and not self.is_settled:
            dual, residual = inner.dual, max(inner.residual, inner.gap)
        return Finish(
            terms=here.terms(),
            spectral_error=float(here.s[0] * space.scale),
            steps=self.steps,
            path_steps=inner.steps if inner else 0,
            cluster=view.size if view else 0,
            kkt_residual=residual,
            multipliers_min=float(view.size * view.multipliers[0]) if view else 0.0,
            hessian_min=view.hessian_min() if view else 0.0,
            dual=dual,
            status=status,
        )


def _converge(here: Cluster, size: int | None, rounds: int) -> _Path:
    """Take steps of Newton's method while the norm falls.

    Args:
        here: The point to begin with.
        size: Size of the cluster, or None if it is unknown.
        rounds: Limit on steps.
    """
    view, steps = None, 0
    for _ in range(rounds):
        if here.is_exact:
            return _Path(here, None, steps)
        sizes = _sizes(here) if size is None else [size]
        view, count, there = _improve(here, sizes)
        if there is None:
            return _Path(here, view, steps)
        steps, here = steps + count, there
    size = view.size if view else size or _sizes(here)[0]
    return _Path(here, here.view(size), steps, is_cut=True)


def _improve(here: Cluster, sizes: list[int]):
    """Return the best view, the number of steps, and the next point or None.

    The next point has a smaller norm. On a curved manifold a step may raise the norm
    and the following step lower it below the first.
    """
    views = sorted(map(here.view, sizes), key=lambda view: view.residual)
    first, best = views[0], None
    if first.residual < SETTLED:
        return first, 0, None
    for view in views:
        count, there = _chase(here, view)
        if there is not None and (best is None or there.s[0] < best[2].s[0]):
            best = view, count, there
            if _lands(here, there, view.size):
                break
    return best or (first, 0, None)


def _revealed(here: Cluster, inner: barrier.Inner) -> int:
    """Return the number of multipliers that are not vanishing on the central path.

    There all products `λ (t − σ)` are equal.
    """
    bound = (max(inner.gap, 0.0) / sum(inner.error.shape)) ** 0.5
    near = int(np.sum(here.s > (1 - bound) * inner.t))
    return min(max(near, 1), here.space.most, len(here.s))


def _chase(here: Cluster, view):
    """Take full steps until the norm is smaller; return their number and the point."""
    for count in range(1, CHASED + 1):
        there = view.cluster.moved(view.step())
        if there is None or there.s[0] > 2 * here.s[0]:
            break
        if there.s[0] < here.s[0]:
            return count, there
        view = there.view(view.size)
    return 0, None


def _lands(here: Cluster, there: Cluster, k: int) -> bool:
    """Return whether a step has reduced the spread of the cluster to a tenth."""
    before, after = (point.s[0] - point.s[k - 1] for point in (here, there))
    return after < 0.1 * before


def _sizes(here: Cluster) -> list[int]:
    """Return likely sizes of the cluster, by the fall of singular values after it."""
    s = here.s
    most = here.space.most
    near = [k for k in range(1, min(len(s), most + 1)) if s[k - 1] > 0.5 * s[0]]
    # The fall is relative to the spread within the cluster.
    falls = {k: (s[k - 1] - s[k]) / (s[0] - s[k - 1] + 1e-3 * s[0]) for k in near}
    if len(s) <= most and s[-1] > 0.5 * s[0]:
        falls[len(s)] = s[-1] / (s[0] - s[-1] + 1e-3 * s[0])
    best = sorted(falls, key=lambda k: -falls[k])[:2] or [1]
    around = [best[0], best[0] + 1, best[0] - 1, *best[1:]]
    return [k for k in dict.fromkeys(around) if 1 <= k <= min(len(s), most)]


def _as_given(matrix, terms, left, right, status: str) -> Finish:
    given = jax.tree.map(lambda x: np.asarray(x, np.float64), tuple(terms))
    error = measure(np.asarray(matrix), given, left, right).spectral
    zeros = np.zeros(np.shape(matrix))
    return Finish(given, float(error), 0, 0, 0, np.inf, 0.0, 0.0, zeros, status)
