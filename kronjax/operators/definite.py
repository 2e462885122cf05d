"""Proofs that a symmetric matrix is positive definite, rounding included.

If Cholesky's method succeeds for `M − c I` in floating-point arithmetic, with `c` as
large as the rounding of the method can be, then `M` is positive definite. Bounds of the
spectrum of a pencil follow: `λ(A⁻¹ K) ≥ l` if and only if `K − l A` is semidefinite.

Reference: Rump (2006), Verification of positive definiteness.

>>> is_definite(np.array([[2.0, 1.0], [1.0, 2.0]]))
True
>>> is_definite(np.array([[1.0, 1.0], [1.0, 1.0]]))
False
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kronjax.linalg.dense import multiply_out

EPS = float(np.finfo(np.float64).eps) / 2
"""Unit roundoff."""

MARGINS = 1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3
"""Relative margins between an estimate and the bound that is tried."""


def is_definite(matrix: np.ndarray, rounding: float = 0.0) -> bool:
    """Return whether every matrix near a symmetric one is proven positive definite.

    Args:
        matrix: `[n, n]`, float64, symmetric; only its lower triangle is read.
        rounding: Bound of the spectral norm of the difference to the matrix meant.

    Returns:
        True if it is proven; False may mean that rounding hides the answer.
    """
    n = len(matrix)
    diagonal = np.diagonal(matrix)
    if not np.all(np.isfinite(diagonal)) or np.any(diagonal <= 0):
        return False
    # The theorem's constant is γ_{n+1} tr(M); twice that also covers the subtraction.
    shift = 2 * (n + 2) * EPS * float(np.sum(diagonal)) + 2 * rounding
    shifted = np.array(matrix)
    shifted[np.diag_indices(n)] -= shift
    try:
        np.linalg.cholesky(shifted)
    except np.linalg.LinAlgError:
        return False
    return True


def equilibrated(matrix: np.ndarray) -> np.ndarray:
    """Return powers of two `d [n]` that give `d_i M_ij d_j` a diagonal from 1/4 to 1.

    Such a scaling commits no rounding.
    """
    exponents = np.frexp(np.diagonal(matrix))[1]
    return np.ldexp(1.0, -((exponents + 1) // 2))


def scaled(matrix: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Return `d_i M_ij d_j`."""
    return d[:, None] * matrix * d[None]


def _first(estimate: float, sign: int, holds: Callable[[float], bool], otherwise):
    """Return the bound nearest to an estimate that is proven, on one side of it."""
    tried = (estimate * (1 + sign * margin) for margin in MARGINS)
    return next(filter(holds, tried), otherwise)


@dataclass(frozen=True)
class Pencil:
    """Two symmetric matrices; bounds of the eigenvalues of `matrix⁻¹ sum`.

    Attributes:
        sum: `[n, n]`, float64.
        matrix: `[n, n]`, positive definite.
        own: Bound of the norm of the rounding of `sum`, and of a difference with it.
        others: The same for `matrix`.
        slack: Relative error of the eigenvalues.
    """

    sum: np.ndarray
    matrix: np.ndarray
    own: float
    others: float
    slack: float = 0.0

    def is_below(self, bound: float) -> bool:
        """Return whether a bound is proven to be below all eigenvalues."""
        bound *= 1 + self.slack
        difference = self.sum - bound * self.matrix
        return is_definite(difference, self.own + abs(bound) * self.others)

    def is_above(self, bound: float) -> bool:
        """Return whether a bound is proven to be above all eigenvalues."""
        bound *= max(1 - self.slack, 0.0)
        difference = bound * self.matrix - self.sum
        return is_definite(difference, self.own + abs(bound) * self.others)

    def bounds(self, low: float, high: float) -> tuple[float, float]:
        """Return proven bounds near estimates of the least and largest eigenvalue.

        They are 0 and infinity where nothing can be proven.
        """
        lower = _first(low, -1, self.is_below, 0.0)
        return lower, _first(high, 1, self.is_above, np.inf)


def forward(matrix: np.ndarray, a: np.ndarray, b: np.ndarray) -> Pencil:
    """Return the pencil of a sum `K` and a matrix `A`: the eigenvalues of `A⁻¹ K`.

    Args:
        matrix: `A`, `[n, n]`, symmetric positive definite, float64.
        a: Left factors, `[r, n1, n1]`.
        b: Right factors, `[r, n2, n2]`.
    """
    d = equilibrated(matrix)
    whole, matrix = scaled(multiply_out(a, b), d), scaled(matrix, d)
    # Rounding of the entries: products, their sum, and the difference with `matrix`.
    own = _norm(scaled(multiply_out(np.abs(a), np.abs(b)), d)) * (len(a) + 3) * EPS
    return Pencil(whole, matrix, own, _norm(np.abs(matrix)) * 3 * EPS)


def inverse(matrix: np.ndarray, a: np.ndarray, b: np.ndarray) -> Pencil:
    """Return a pencil for a sum `P` near the inverse: the eigenvalues of `P A`.

    With Cholesky's `A ≈ L Lᵀ` they are those of `Lᵀ P L`, but for the backward error of
    the factor relative to the least eigenvalue of `A`. Arguments as for `forward`.
    """
    d, n = equilibrated(matrix), len(matrix)
    matrix, eye, ones = scaled(matrix, d), np.eye(n), np.ones(n)
    lower = np.linalg.cholesky(matrix)
    whole = lower.T @ (scaled(multiply_out(a, b), 1 / d) @ lower)
    # Row sums of |Lᵀ| |P| |L| and |L| |Lᵀ| bound the norms of what rounding adds.
    sizes = scaled(multiply_out(np.abs(a), np.abs(b)), 1 / d)
    moduli = np.abs(lower)
    rows = moduli.T @ (sizes @ (moduli @ ones))
    own = float(np.max(rows)) * 1.01 * (2 * n + len(a) + 6) * EPS
    backward = float(np.max(moduli @ (moduli.T @ ones))) * 1.01 * (n + 2) * EPS
    estimate = float(np.linalg.eigvalsh(matrix)[0])
    least = _first(estimate, -1, lambda x: is_definite(matrix - x * eye), 0.0)
    slack = backward / least if least > 0 else 1.0
    return Pencil((whole + whole.T) / 2, eye, own, 4 * EPS, slack)


def _norm(moduli: np.ndarray) -> float:
    """Return the largest row sum of a symmetric matrix: a bound of its norm."""
    return float(np.max(np.sum(moduli, axis=1))) * 1.01
