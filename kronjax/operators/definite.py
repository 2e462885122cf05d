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

import numpy as np

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


def pencil_bounds(
    low: float, high: float, holds_above: Callable[[float], bool], holds_below
) -> tuple[float, float]:
    """Return proven bounds near estimates of the ends of a spectrum.

    Args:
        low: Estimate of the least eigenvalue.
        high: Estimate of the largest.
        holds_above: Whether a number is proven to be below all eigenvalues.
        holds_below: Whether a number is proven to be above all of them.

    Returns:
        The bounds; 0 and infinity where nothing can be proven.
    """
    lower = next((x for m in MARGINS if holds_above(x := low * (1 - m))), 0.0)
    upper = next((x for m in MARGINS if holds_below(x := high * (1 + m))), np.inf)
    return lower, upper


class Forward:
    """The pencil of a sum of Kronecker products `K` and a matrix `A`.

    Bounds of the eigenvalues of `A⁻¹ K`.
    """

    def __init__(self, matrix: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
        """Multiply the sum out.

        Args:
            matrix: `A`, `[n, n]`, symmetric positive definite, float64.
            a: Left factors, `[r, n1, n1]`.
            b: Right factors, `[r, n2, n2]`.
        """
        d = equilibrated(matrix)
        self.matrix = scaled(matrix, d)
        self.sum = scaled(multiplied_out(a, b), d)
        # Rounding of the entries: products, their sum, and the difference below.
        sizes = scaled(multiplied_out(np.abs(a), np.abs(b)), d)
        self._own = _norm(sizes) * (len(a) + 3) * EPS
        self._others = _norm(np.abs(self.matrix)) * 3 * EPS

    def is_below(self, bound: float) -> bool:
        """Return whether a bound is proven to be below all eigenvalues."""
        difference = self.sum - bound * self.matrix
        return is_definite(difference, self._own + abs(bound) * self._others)

    def is_above(self, bound: float) -> bool:
        """Return whether a bound is proven to be above all eigenvalues."""
        difference = bound * self.matrix - self.sum
        return is_definite(difference, self._own + abs(bound) * self._others)


class Inverse(Forward):
    """The pencil of a sum `P` near the inverse and `A⁻¹`: the eigenvalues of `P A`.

    With Cholesky's `A ≈ L Lᵀ` they are those of `Lᵀ P L`, but for the backward error of
    the factor relative to the least eigenvalue of `A`.
    """

    def __init__(self, matrix: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
        """Multiply `Lᵀ P L` out; arguments as for `Forward`, of `P`."""
        d, n = equilibrated(matrix), len(matrix)
        matrix = scaled(matrix, d)
        lower = np.linalg.cholesky(matrix)
        inverse = scaled(multiplied_out(a, b), 1 / d)
        sizes = scaled(multiplied_out(np.abs(a), np.abs(b)), 1 / d)
        whole = lower.T @ (inverse @ lower)
        self.sum = (whole + whole.T) / 2
        # Row sums of |Lᵀ| |P| |L| and |L| |Lᵀ| bound the norms of what rounding adds.
        moduli, ones = np.abs(lower), np.ones(n)
        rows = moduli.T @ (sizes @ (moduli @ ones))
        self._own = float(np.max(rows)) * 1.01 * (2 * n + len(a) + 6) * EPS
        backward = float(np.max(moduli @ (moduli.T @ ones))) * 1.01 * (n + 2) * EPS
        estimate = float(np.linalg.eigvalsh(matrix)[0])
        eye = np.eye(n)
        least = next(
            (
                x
                for m in MARGINS
                if is_definite(matrix - (x := estimate * (1 - m)) * eye)
            ),
            0.0,
        )
        share = backward / least if least > 0 else 1.0
        self.matrix = eye
        self._more, self._less = 1 + share, max(1 - share, 0.0)
        self._others = 4 * EPS

    def is_below(self, bound: float) -> bool:
        """Return whether a bound is proven to be below all eigenvalues."""
        return super().is_below(bound * self._more)

    def is_above(self, bound: float) -> bool:
        """Return whether a bound is proven to be above all eigenvalues."""
        return super().is_above(bound * self._less)


def multiplied_out(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return `Σ_k A_k ⊗ B_k`, `[n, n]`, one term after the other."""
    total = np.kron(a[0], b[0])
    for left, right in zip(a[1:], b[1:], strict=True):
        total += np.kron(left, right)
    return total


def _norm(moduli: np.ndarray) -> float:
    """Return the largest row sum of a symmetric matrix: a bound of its norm."""
    return float(np.max(np.sum(moduli, axis=1))) * 1.01
