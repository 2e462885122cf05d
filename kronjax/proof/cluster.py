"""Second-order information on the leading singular values of an error, in float64.

Let `E = L^{1/2} (T − K) R^{1/2}` have singular triplets `(σ_j, u_j, v_j)`, the first k
of which form the cluster, and let K move along a tangent vector ξ, `dE(ξ) = −L^{1/2} ξ
R^{1/2}`. Then

    𝒜ξ       = svec ½ (U_1ᵀ dE V_1 + V_1ᵀ dEᵀ U_1)
    H[ξ, ξ] = 2 tr(Λ Wᵀ J(dE) W_o (tI − D_o)⁻¹ W_oᵀ J(dE) W)
              − 2 <U_1 Λ V_1ᵀ, L^{1/2} R⁻¹(U_p ξ_p C⁻¹ ξ_q V_pᵀ) R^{1/2}>

with `J(X) = [[0, X], [Xᵀ, 0]]`, `W = [U_1; V_1] / √2` and `W_o`, `D_o` the other
eigenpairs of `J(E)`: `±σ_j` beyond the cluster and `−σ_j` within. The second line of H
is the curvature of the manifold. `W_o` is not stored: `ClusterProblem.form` takes the
blocks of `W Λ Wᵀ` and of `W_o (tI − D_o)⁻¹ W_oᵀ`. Tangent vectors are given by the
coordinates of `Sheet`.

References: Overton (1988); Overton and Womersley (1995).

>>> import numpy as np
>>> from kronjax.kronecker import KroneckerTerms
>>> ones = KroneckerTerms(np.ones((1, 2, 2)), np.ones((1, 2, 2)))
>>> space = ClusterProblem.of(np.eye(4), (ones,))
>>> space.dimension
7
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from kronjax.kronecker import KroneckerTerms
from kronjax.proof.tangent_coordinates import Sheet
from kronjax.solver.weighted import RIDGE


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A symmetric matrix `[[A, B], [Bᵀ, C]]` of order m + n.

    Attributes:
        uu: `[m, m]`, A.
        uv: `[m, n]`, B.
        vv: `[n, n]`, C.
    """

    uu: np.ndarray
    uv: np.ndarray
    vv: np.ndarray


@dataclasses.dataclass(frozen=True)
class ClusterProblem:
    """A matrix, the roots of its weights, and the sum to begin with.

    Attributes:
        target: `T` over `scale`, `[m, n]`.
        roots: `G` and `F` of `L = G Gᵀ` and `R = F Fᵀ`, or None.
        scale: Factor that takes errors back to the scale of the matrix.
        sheets: Tangent spaces at the sum to begin with, one for each configuration.
    """

    target: np.ndarray
    roots: tuple[np.ndarray | None, ...]
    scale: float
    sheets: tuple[Sheet, ...]

    @classmethod
    def of(cls, matrix, terms: Sequence[KroneckerTerms], left=None, right=None):
        """Return the problem of a sum, or None where its rank is deficient.

        Args:
            matrix: `[m, n]`.
            terms: One `KroneckerTerms` for each configuration.
            left: `L`, `[m, m]`, or None.
            right: `R`, `[n, n]`, or None.
        """
        target = np.asarray(matrix, np.float64)
        largest = np.abs(target).max()
        scale = largest * np.linalg.norm(target / (largest or 1.0)) or 1.0
        sheets = []
        for each in terms:
            a, b = (np.asarray(x, np.float64) for x in (each.a, each.b))
            shapes = a.shape[1:], b.shape[1:]
            a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
            # The factors share the scale equally.
            a, b = a / math.sqrt(scale), b / math.sqrt(scale)
            if len(a) > min(a.shape[1], b.shape[1]):
                return None
            sheet = Sheet.of(a, np.eye(len(a)), b, shapes)
            s = np.linalg.svd(sheet.core, compute_uv=False)
            if not s[-1] > 1e-12 * s[0]:
                return None
            sheets.append(sheet)
        roots = tuple(None if x is None else _root(x) for x in (left, right))
        return cls(target / scale, roots, scale, tuple(sheets))

    @property
    def dimension(self) -> int:
        """Dimension of the tangent space."""
        return sum(sheet.dimension for sheet in self.sheets)

    @property
    def most(self) -> int:
        """Size of the largest cluster with no more conditions than unknowns."""
        return max(1, int((math.isqrt(8 * self.dimension + 1) - 1) // 2))

    def cluster(self, sheets: tuple[Sheet, ...] | None = None) -> "Cluster":
        """Decompose the error at `sheets`, or at the sum to begin with."""
        sheets = self.sheets if sheets is None else sheets
        u, s, vt = np.linalg.svd(self.error(sheets))
        return Cluster(self, sheets, u.T, s, vt)

    def error(self, sheets: tuple[Sheet, ...]) -> np.ndarray:
        """Return `L^{1/2} (T − K) R^{1/2}` at these sheets, `[m, n]`."""
        return self._whitened(self.target - sum(sheet.matrix() for sheet in sheets))

    def _whitened(self, matrix):
        left, right = self.roots
        matrix = matrix if left is None else left.T @ matrix
        return matrix if right is None else matrix @ right

    def _gradient(self, matrix):
        left, right = self.roots
        matrix = matrix if left is None else left @ matrix
        return matrix if right is None else matrix @ right.T

    def pull(self, sheets, us, vs) -> np.ndarray:
        """Return the coordinates of the gradients of all `uᵀ L^{1/2} K R^{1/2} v`."""
        left, right = self.roots
        us = us if left is None else us @ left.T
        vs = vs if right is None else vs @ right.T
        return np.concatenate([sheet.pull(us, vs) for sheet in sheets], axis=2)

    def moved(self, sheets, xi) -> tuple[Sheet, ...] | None:
        """Return the retraction along coordinates, or None where it is not defined."""
        parts = zip(sheets, self._parts(xi), strict=True)
        there = [sheet.moved(part) for sheet, part in parts]
        return None if None in there else tuple(there)

    def push(self, sheets, xi) -> np.ndarray:
        """Return `L^{1/2} ξ R^{1/2}` for coordinates of ξ, `[m, n]`."""
        parts = zip(sheets, self._parts(xi), strict=True)
        pushed = [sheet.push(part) for sheet, part in parts]
        return self._whitened(np.sum(pushed, axis=0))

    def project(self, sheets, ambient) -> np.ndarray:
        """Return the coordinates of the gradient of `<Y, L^{1/2} K R^{1/2}>`."""
        ambient = self._gradient(ambient)
        return np.concatenate([sheet.project(ambient) for sheet in sheets])

    def bend(self, sheets, dual) -> np.ndarray:
        """Return the Riemannian Hessian of `<Y, L^{1/2} (T − K) R^{1/2}>`."""
        dual = self._gradient(dual)
        result, at = np.zeros((self.dimension,) * 2), 0
        for sheet in sheets:
            span = slice(at, at + sheet.dimension)
            result[span, span] = sheet.bend(dual)
            at += sheet.dimension
        return result

    def bent(self, sheets, dual, xi) -> np.ndarray:
        """Return the product of the matrix of `bend` with coordinates."""
        dual, parts = self._gradient(dual), zip(sheets, self._parts(xi), strict=True)
        return np.concatenate([sheet.bent(dual, part) for sheet, part in parts])

    def form(self, sheets, x: Blocks, z: Blocks) -> np.ndarray:
        """Return `tr(X J(D) Z J(D))`, `D = L^{1/2} ξ R^{1/2}`, as a matrix.

        For several configurations it is computed column by column.
        """
        if len(sheets) > 1:
            basis = np.eye(self.dimension)
            columns = [self.curve(sheets, x, z, xi) for xi in basis]
            return np.array(columns)
        (sheet,), (left, right) = sheets, self.roots

        def carried(matrix, before, behind):
            matrix = matrix if before is None else before @ matrix
            return matrix if behind is None else matrix @ behind.T

        straight = [
            (carried(p.uu, left, left), carried(q.vv, right, right))
            for p, q in ((z, x), (x, z))
        ]
        crossed = [tuple(carried(p.uv.T, right, left) for p in (x, z))]
        return sheet.form(straight, crossed)

    def curve(self, sheets, x: Blocks, z: Blocks, xi) -> np.ndarray:
        """Return the product of the matrix of `form` with coordinates, by products."""
        d = self.push(sheets, xi)
        image = z.uu @ d @ x.vv + x.uu @ d @ z.vv
        image += x.uv @ d.T @ z.uv + z.uv @ d.T @ x.uv
        return self.project(sheets, image)

    def _parts(self, xi):
        ends = np.cumsum([sheet.dimension for sheet in self.sheets])
        return np.split(xi, ends[:-1])


@dataclasses.dataclass(frozen=True)
class Cluster:
    """An error and its singular triplets.

    Attributes:
        space: The problem.
        sheets: Tangent spaces at the sum.
        u: `[m, m]`, left singular vectors as rows.
        s: `[min(m, n)]`, singular values, descending.
        v: `[n, n]`, right singular vectors as rows.
    """

    space: ClusterProblem
    sheets: tuple[Sheet, ...]
    u: np.ndarray
    s: np.ndarray
    v: np.ndarray

    @property
    def is_exact(self) -> bool:
        """True if the error is zero up to rounding."""
        return bool(self.s[0] <= 64 * np.finfo(float).eps * len(self.u) ** 0.5)

    def terms(self) -> tuple[KroneckerTerms, ...]:
        """Return the sum, at the scale of the matrix."""
        root = math.sqrt(self.space.scale)
        scaled = (sheet.terms() for sheet in self.sheets)
        return tuple(KroneckerTerms(x.a * root, x.b * root) for x in scaled)

    def moved(self, xi: np.ndarray) -> "Cluster | None":
        """Return the retraction along coordinates, or None where it is not defined."""
        there = self.space.moved(self.sheets, xi)
        return None if there is None else self.space.cluster(there)

    def view(self, size: int) -> "View":
        """Return the view in which the first `size` values form the cluster."""
        return View(self, size)


class View:
    """A cluster of given size: its multipliers, and the step of Newton's method.

    Attributes:
        cluster: The error and its singular triplets.
        size: Number k of singular values in the cluster.
        multipliers: Eigenvalues of Λ, ascending; their sum is one.
        residual: Norm of `𝒜ᵀy`, or the relative spread of the cluster if larger.
    """

    def __init__(self, cluster: Cluster, size: int) -> None:
        """Compute the multipliers.

        Args:
            cluster: The error and its singular triplets.
            size: Number of singular values in the cluster, at most `min(m, n)`.
        """
        self.cluster, self.size = cluster, size
        own = slice(size)
        pulled = cluster.space.pull(cluster.sheets, cluster.u[own], cluster.v[own])
        i, j = self._pairs = np.triu_indices(size)
        root = np.where(i == j, 1.0, math.sqrt(2))[:, None]
        self._rows = -root * (pulled[i, j] + pulled[j, i]) / 2
        self._trace = (i == j).astype(float)
        self._traceless = _complement(self._trace)
        y = self._least_squares()
        self._lambda = np.zeros((size, size))
        self._lambda[i, j] = self._lambda[j, i] = y / np.where(i == j, 1, math.sqrt(2))
        self.multipliers, self._axes = np.linalg.eigh(self._lambda)
        s = cluster.s
        spread = (s[0] - s[size - 1]) / s[0]
        self.residual = max(np.linalg.norm(y @ self._rows), spread)

    def _least_squares(self) -> np.ndarray:
        """Return the y of trace one that minimises the norm of `𝒜ᵀy`."""
        first = self._trace / self._trace.sum()
        # A basis of the traceless matrices: off-diagonal entries, and differences.
        basis = self._traceless
        left, right = basis @ self._rows, first @ self._rows
        free = np.linalg.lstsq(left.T, -right, rcond=1e-13)[0]
        return first + free @ basis

    def dual(self) -> np.ndarray:
        """Return `U_1 Λ V_1ᵀ`, `[m, n]`."""
        own = slice(self.size)
        return self.cluster.u[own].T @ self._lambda @ self.cluster.v[own]

    @functools.cached_property
    def hessian(self) -> np.ndarray:
        """The symmetric matrix `H` in the coordinates."""
        space, sheets = self.cluster.space, self.cluster.sheets
        own, k = slice(self.size), self.size
        u, s, v = self.cluster.u, self.cluster.s, self.cluster.v
        least, t = len(s), s[0]
        plus = np.zeros(least)
        plus[k:] = 1 / np.maximum(t - s[k:], 1e-15 * t)
        minus = 1 / (t + s)

        def inverse(vectors):
            weights = np.full(len(vectors), 1 / t)
            weights[:least] = (plus + minus) / 2
            return (vectors.T * weights) @ vectors

        # H = 2 form(X, Z), and X is half of these blocks.
        inner = self._lambda
        x = Blocks(*(a[own].T @ inner @ b[own] for a, b in ((u, u), (u, v), (v, v))))
        across = (u[:least].T * (plus - minus) / 2) @ v[:least]
        z = Blocks(inverse(u), across, inverse(v))
        return space.form(sheets, x, z) + space.bend(sheets, self.dual())

    def step(self) -> np.ndarray:
        """Return the coordinates of the step, `[d]`.

        Negative curvature is replaced by its modulus, so that near a saddle point the
        step leads away from it.
        """
        # The shortest step that makes the cluster coincide, to first order.
        spread = self._traceless @ (self._trace * self.cluster.s[self._pairs[0]])
        fixed = -self._bases[0] @ spread
        values, vectors = self.curvature
        slope = self._trace @ self._rows / self._trace.sum() + self.hessian @ fixed
        scale = np.abs(values).max(initial=0.0)
        moduli = np.maximum(np.abs(values), 1e-12 * scale)
        free = vectors.T @ (vectors @ slope / np.where(moduli > 0, moduli, 1))
        return fixed - free

    @functools.cached_property
    def _bases(self):
        """Pseudoinverse and null space of the conditions that hold the cluster."""
        kept = self._traceless @ self._rows
        if not len(kept):
            return np.zeros((kept.shape[1], 0)), np.eye(kept.shape[1])
        u, s, vt = np.linalg.svd(kept)
        rank = int((s > 1e-10 * s[0]).sum())
        return vt[:rank].T @ (u[:, :rank] / s[:rank]).T, vt[rank:]

    @functools.cached_property
    def curvature(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues of H on the null space, and their eigenvectors as rows."""
        null = self._bases[1]
        values, vectors = np.linalg.eigh(null @ self.hessian @ null.T)
        return values, vectors.T @ null

    def hessian_min(self) -> float:
        """Return the least eigenvalue of `curvature`, relative; inf without any."""
        values = self.curvature[0]
        if not len(values):
            return math.inf
        return float(values[0] / max(np.abs(values).max(), 1e-300))


def _complement(vector: np.ndarray) -> np.ndarray:
    """Return an orthonormal basis of the complement of a vector, `[n − 1, n]`."""
    return np.linalg.qr(vector[:, None], mode="complete")[0][:, 1:].T


def _root(weight) -> np.ndarray:
    """Return `F` with `F Fᵀ = W + RIDGE mean(λ(W)) I`, as in `weighted.Root`."""
    weight = np.asarray(weight, np.float64)
    values, vectors = np.linalg.eigh((weight + weight.T) / 2)
    mean = max(np.trace(weight) / len(weight), 0.0)
    return vectors * np.sqrt(np.maximum(values, 0) + RIDGE * mean)
