"""Second-order information on the leading singular values of an error, in float64.

Let `E = L^{1/2} (T − K) R^{1/2}` have singular triplets `(σ_j, u_j, v_j)`, the first k
of which form the cluster, and let K move along a tangent vector ξ, `dE(ξ) = −L^{1/2} ξ
R^{1/2}`. Then

    𝒜ξ       = svec ½ (U_1ᵀ dE V_1 + V_1ᵀ dEᵀ U_1)
    H[ξ, ξ] = 2 tr(Λ Wᵀ J(dE) W_o (tI − D_o)⁻¹ W_oᵀ J(dE) W)
              − 2 <U_1 Λ V_1ᵀ, L^{1/2} R⁻¹(U_p ξ_p C⁻¹ ξ_q V_pᵀ) R^{1/2}>

with `J(X) = [[0, X], [Xᵀ, 0]]`, `W = [U_1; V_1] / √2` and `W_o`, `D_o` its other
eigenpairs: `±σ_j` beyond the cluster and `−σ_j` within. The second line of H is the
curvature of the manifold. `W_o` is not stored: in the eigenvectors of the multipliers
Λ, H is a sum over the cluster.

Tangent vectors are given by orthonormal coordinates: `R(ξ) = U M Vᵀ + U_p X Vᵀ + U Y
V_pᵀ` by the entries of M, X and Y, where `U_p`, `V_p` complete U and V.

References: Overton (1988); Overton and Womersley (1995).

>>> import numpy as np
>>> from kronjax.kronecker import KroneckerTerms
>>> one = KroneckerTerms(np.ones((1, 2, 2)), np.ones((1, 2, 2)))
>>> space = Space.of(np.eye(4), (one,))
>>> space.dimension
7
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kronjax.kronecker import KroneckerTerms, rearrange, unrearrange
from kronjax.weighted import RIDGE


@dataclasses.dataclass(frozen=True)
class Sheet:
    """The tangent space of one configuration at a point.

    Attributes:
        left: `[d1, d1]`, orthogonal; its first r rows are the vectorised `A_k`.
        right: `[d2, d2]`, likewise.
        core: `[r, r]`, with `R(K) = U core Vᵀ`.
        shapes: `(m1, n1)` and `(m2, n2)`.
    """

    left: np.ndarray
    right: np.ndarray
    core: np.ndarray
    shapes: tuple[tuple[int, int], tuple[int, int]]

    @classmethod
    def of(cls, a: np.ndarray, core: np.ndarray, b: np.ndarray, shapes):
        """Complete rows that are independent, of `[r, d1]` and `[r, d2]`."""
        left, upper = np.linalg.qr(a.T, mode="complete")
        right, lower = np.linalg.qr(b.T, mode="complete")
        r = len(core)
        return cls(left.T, right.T, upper[:r] @ core @ lower[:r].T, shapes)

    @property
    def rank(self) -> int:
        """The Kronecker rank."""
        return len(self.core)

    @property
    def dimension(self) -> int:
        """Of the tangent space."""
        return self.rank * (len(self.left) + len(self.right) - self.rank)

    def matrix(self) -> np.ndarray:
        """Return K, `[m, n]`."""
        r = self.rank
        ambient: Any = self.left[:r].T @ self.core @ self.right[:r]
        return np.asarray(unrearrange(ambient, *self.shapes))

    def terms(self) -> KroneckerTerms:
        """Return the Kronecker product SVD."""
        r, (a_shape, b_shape) = self.rank, self.shapes
        u, s, vt = np.linalg.svd(self.core)
        root = np.sqrt(s)[:, None]
        a, b = root * (u.T @ self.left[:r]), root * (vt @ self.right[:r])
        held: Any = a.reshape(r, *a_shape), b.reshape(r, *b_shape)
        return KroneckerTerms(*held)

    def pull(self, us: np.ndarray, vs: np.ndarray) -> np.ndarray:
        """Return the coordinates of the projections of all `u vᵀ`.

        Args:
            us: `[p, m]`.
            vs: `[q, n]`.

        Returns:
            `[p, q, dimension]`. No matrix `u vᵀ` is formed.
        """
        r, ((m1, n1), (m2, n2)) = self.rank, self.shapes
        p, q = len(us), len(vs)
        u, v = us.reshape(p, m1, m2), vs.reshape(q, n1, n2)
        a, b = self.left[:r].reshape(r, m1, n1), self.right[:r].reshape(r, m2, n2)
        # Against the left factors, [p, q, r, d2], and against the right ones.
        half = np.einsum("pxi,rxy->priy", u, a, optimize=True)
        from_a = np.einsum("priy,qyj->pqrij", half, v, optimize=True)
        from_a = from_a.reshape(-1, m2 * n2) @ self.right.T
        half = np.einsum("pxi,rij->prxj", u, b, optimize=True)
        from_b = np.einsum("prxj,qyj->pqrxy", half, v, optimize=True)
        from_b = from_b.reshape(-1, m1 * n1) @ self.left[r:].T
        parts = (x.reshape(p, q, -1) for x in (from_a, from_b))
        return np.concatenate(list(parts), axis=2)

    def split(self, xi: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return `M [r, r]`, `X [d1 − r, r]` and `Y [r, d2 − r]` of coordinates."""
        r, d2 = self.rank, len(self.right)
        row = xi[: r * d2].reshape(r, d2)
        return row[:, :r], xi[r * d2 :].reshape(r, -1).T, row[:, r:]

    def moved(self, xi: np.ndarray) -> "Sheet | None":
        """Retract orthographically; None where that is not defined."""
        r = self.rank
        m, x, y = self.split(xi)
        core = self.core + m
        try:
            inverse = np.linalg.inv(core)
        except np.linalg.LinAlgError:
            return None
        a = self.left[:r] + (x @ inverse).T @ self.left[r:]
        b = self.right[:r] + inverse @ y @ self.right[r:]
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return None
        return Sheet.of(a, core, b, self.shapes)

    def bend(self, normal: np.ndarray) -> np.ndarray:
        """Return `−2 <N, X C⁻¹ Y>` as a symmetric matrix in the coordinates.

        Args:
            normal: `R(L^{1/2} U_1 Λ V_1ᵀ R^{1/2})`, `[d1, d2]`.
        """
        r, d1, d2 = self.rank, len(self.left), len(self.right)
        inside = self.left[r:] @ normal @ self.right[r:].T
        inverse = np.linalg.inv(self.core)
        # X is stored [r, d1 − r], and Y inside of [r, d2].
        block = np.zeros((r, d1 - r, r, d2))
        block[:, :, :, r:] = -np.einsum("pq,ij->ipjq", inside, inverse)
        block = block.reshape(r * (d1 - r), r * d2)
        size = self.dimension
        result = np.zeros((size, size))
        result[r * d2 :, : r * d2] = block
        result[: r * d2, r * d2 :] = block.T
        return result


@dataclasses.dataclass(frozen=True)
class Space:
    """A problem: a matrix, the roots of its weights, and shapes.

    Attributes:
        target: `T` over `scale`, `[m, n]`.
        roots: `G` and `F` of `L = G Gᵀ` and `R = F Fᵀ`, or None.
        scale: Of errors.
        sheets: Where it begins.
    """

    target: np.ndarray
    roots: tuple[np.ndarray | None, ...]
    scale: float
    sheets: tuple[Sheet, ...]

    @classmethod
    def of(cls, matrix, terms: Sequence[KroneckerTerms], left=None, right=None):
        """Return the space of a sum, or None where its rank is deficient.

        Args:
            matrix: `[m, n]`.
            terms: One for each configuration.
            left: `L`, `[m, m]`, or None.
            right: `R`, `[n, n]`, or None.
        """
        target = np.asarray(matrix, np.float64)
        largest = np.abs(target).max()
        scale = largest * np.linalg.norm(target / (largest or 1.0)) or 1.0
        sheets = []
        for one in terms:
            a, b = (np.asarray(x, np.float64) for x in (one.a, one.b))
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
        """Of the tangent space."""
        return sum(sheet.dimension for sheet in self.sheets)

    @property
    def most(self) -> int:
        """The largest cluster that is no further condition than there are unknowns."""
        return max(1, int((math.isqrt(8 * self.dimension + 1) - 1) // 2))

    def cluster(self, sheets: tuple[Sheet, ...] | None = None) -> "Cluster":
        """Decompose the error where it begins, or at other sheets."""
        sheets = self.sheets if sheets is None else sheets
        error = self.target - sum(sheet.matrix() for sheet in sheets)
        for root, side in zip(self.roots, (0, 1), strict=True):
            if root is not None:
                error = root.T @ error if side == 0 else error @ root
        u, s, vt = np.linalg.svd(error)
        return Cluster(self, sheets, u.T, s, vt)

    def pull(self, sheets, us, vs) -> np.ndarray:
        """Return the coordinates of the gradients of all `uᵀ L^{1/2} K R^{1/2} v`."""
        left, right = self.roots
        us = us if left is None else us @ left.T
        vs = vs if right is None else vs @ right.T
        return np.concatenate([sheet.pull(us, vs) for sheet in sheets], axis=2)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """An error and its singular triplets.

    Attributes:
        space: The problem.
        sheets: Where it is.
        u: `[m, m]`, left singular vectors as rows.
        s: `[min(m, n)]`.
        v: `[n, n]`, right ones as rows.
    """

    space: Space
    sheets: tuple[Sheet, ...]
    u: np.ndarray
    s: np.ndarray
    v: np.ndarray

    @property
    def is_exact(self) -> bool:
        """Whether nothing but rounding is left."""
        return bool(self.s[0] <= 64 * np.finfo(float).eps * len(self.u) ** 0.5)

    def terms(self) -> tuple[KroneckerTerms, ...]:
        """Return the sum, at the scale of the matrix."""
        root = math.sqrt(self.space.scale)
        found = (sheet.terms() for sheet in self.sheets)
        return tuple(KroneckerTerms(one.a * root, one.b * root) for one in found)

    def moved(self, xi: np.ndarray) -> "Cluster | None":
        """Retract along coordinates; None where that is not defined."""
        sheets, at = [], 0
        for sheet in self.sheets:
            there = sheet.moved(xi[at : at + sheet.dimension])
            if there is None:
                return None
            sheets.append(there)
            at += sheet.dimension
        return self.space.cluster(tuple(sheets))

    def view(self, size: int) -> "View":
        """Take so many singular values for the cluster."""
        return View(self, size)


class View:
    """A cluster of a size: its multipliers, and the step of Newton's method.

    Attributes:
        cluster: The error.
        size: k.
        multipliers: Eigenvalues of Λ, ascending; their sum is one.
        residual: Norm of `𝒜ᵀy`, or the relative spread of the cluster if larger.
    """

    def __init__(self, cluster: Cluster, size: int) -> None:
        """Find the multipliers.

        Args:
            cluster: The error.
            size: At most `min(m, n)`.
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
        """Return y of trace one that makes `𝒜ᵀy` least."""
        first = self._trace / self._trace.sum()
        # A basis of what has no trace: the off-diagonal ones, and differences.
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
        """`H`, symmetric, in the coordinates."""
        space, sheets = self.cluster.space, self.cluster.sheets
        own, k = slice(self.size), self.size
        u, s, v = self.cluster.u, self.cluster.s, self.cluster.v
        m, n, least, t = len(u), len(v), len(s), s[0]
        result = np.zeros((space.dimension,) * 2)
        plus = np.zeros(least)
        plus[k:] = 1 / np.maximum(t - s[k:], 1e-15 * t)
        minus = 1 / (t + s)
        us, vs = self._axes.T @ u[own], self._axes.T @ v[own]
        for weight, one_u, one_v in zip(self.multipliers, us, vs, strict=True):
            left = space.pull(sheets, one_u[None], v)[0]  # uᵀ dE v_j, [n, d]
            right = space.pull(sheets, u, one_v[None])[:, 0]  # u_jᵀ dE v, [m, d]
            both, other = left[:least] + right[:least], left[:least] - right[:least]
            stack = [both * np.sqrt(plus / 2)[:, None]]
            stack.append(other * np.sqrt(minus / 2)[:, None])
            stack += [left[least:] / math.sqrt(t)] * (n > least)
            stack += [right[least:] / math.sqrt(t)] * (m > least)
            rows = np.concatenate(stack)
            result += weight * (rows.T @ rows)
        at, dual = 0, self.dual()
        left, right = space.roots
        dual = dual if left is None else left @ dual
        dual = dual if right is None else dual @ right.T
        for sheet in sheets:
            span = slice(at, at + sheet.dimension)
            ambient: Any = dual
            ambient = np.asarray(rearrange(ambient, sheet.shapes[0]))
            result[span, span] += sheet.bend(ambient)
            at += sheet.dimension
        return result

    def step(self, damping: float = 0.0, release: float = 0.0) -> np.ndarray:
        """Return the coordinates of the step, `[d]`.

        Negative curvature counts as positive: from beside a saddle point the step leads
        away from it.

        Args:
            damping: Added to all curvatures, as a part of the largest.
            release: By how much the direction of the least multiplier is to fall below
                the cluster; to first order the norm falls by that times the multiplier
                if it is negative.
        """
        i, j = self._pairs
        axis = self._axes[:, 0]
        away = axis[i] * axis[j] * np.where(i == j, 1, math.sqrt(2))
        fixed = self.gather(release * away)
        values, vectors = self.curvature
        slope = self._trace @ self._rows / self._trace.sum() + self.hessian @ fixed
        scale = np.abs(values).max(initial=0.0)
        moduli = np.maximum(np.abs(values), 1e-12 * scale) + damping * scale
        free = vectors.T @ (vectors @ slope / np.where(moduli > 0, moduli, 1))
        return fixed - free

    def gather(self, away: np.ndarray | float = 0.0) -> np.ndarray:
        """Return the least step that brings the cluster together, to first order.

        Args:
            away: `svec` of what is to be left between its values and `t`.
        """
        wanted = self._trace * self.cluster.s[self._pairs[0]] + away
        return self._bases[0] @ (-self._traceless @ wanted)

    @functools.cached_property
    def _bases(self):
        """The pseudoinverse of what holds the cluster together, and its null space."""
        kept = self._traceless @ self._rows
        if not len(kept):
            return np.zeros((kept.shape[1], 0)), np.eye(kept.shape[1])
        u, s, vt = np.linalg.svd(kept)
        rank = int((s > 1e-10 * s[0]).sum())
        return vt[:rank].T @ (u[:, :rank] / s[:rank]).T, vt[rank:]

    @functools.cached_property
    def curvature(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues of H where the cluster stays together, and vectors as rows."""
        null = self._bases[1]
        values, vectors = np.linalg.eigh(null @ self.hessian @ null.T)
        return values, vectors.T @ null

    def hessian_min(self) -> float:
        """Return the least of these eigenvalues over the largest; inf without any."""
        values = self.curvature[0]
        if not len(values):
            return math.inf
        return float(values[0] / max(np.abs(values).max(), 1e-300))


def _complement(vector: np.ndarray) -> np.ndarray:
    """Return `[n - 1, n]`, an orthonormal basis of what is orthogonal to a vector."""
    return np.linalg.qr(vector[:, None], mode="complete")[0][:, 1:].T


def _root(weight) -> np.ndarray:
    """Return `F` of `F Fᵀ = W + RIDGE`, as `weighted.Root` has it."""
    weight = np.asarray(weight, np.float64)
    values, vectors = np.linalg.eigh((weight + weight.T) / 2)
    mean = max(np.trace(weight) / len(weight), 0.0)
    return vectors * np.sqrt(np.maximum(values, 0) + RIDGE * mean)
