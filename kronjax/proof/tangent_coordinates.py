"""The tangent space of one configuration, in orthonormal coordinates and in float64.

A tangent vector `R(ξ) = U M Vᵀ + U_p X Vᵀ + U Y V_pᵀ` is given by the entries of M, X
and Y, where `U_p`, `V_p` complete U and V. A quadratic form in ξ that is made of
products with large matrices becomes a matrix in the coordinates without one such
product for every coordinate: a tangent vector is a change of the left factors plus a
change of the right factors, and a Kronecker product with one factor given is contracted
one factor after the other.

References: Absil and Malick (2012), for the retraction.

>>> import numpy as np
>>> sheet = Sheet.of(np.ones((1, 4)), np.eye(1), np.ones((1, 6)), ((2, 2), (2, 3)))
>>> sheet.dimension, sheet.matrix().shape
(9, (4, 6))
"""

import dataclasses
from typing import Any

import numpy as np

from kronjax.kronecker import KroneckerTerms, rearrange, unrearrange


@dataclasses.dataclass(frozen=True)
class Sheet:
    """The tangent space of one configuration at a point.

    Attributes:
        left: `[d1, d1]`, orthogonal; the first r rows span the vectorised `A_k`.
        right: `[d2, d2]`, orthogonal; the first r rows span the vectorised `B_k`.
        core: `[r, r]`, with `R(K) = U core Vᵀ`.
        shapes: `(m1, n1)` and `(m2, n2)`.
    """

    left: np.ndarray
    right: np.ndarray
    core: np.ndarray
    shapes: tuple[tuple[int, int], tuple[int, int]]

    @classmethod
    def of(cls, a: np.ndarray, core: np.ndarray, b: np.ndarray, shapes):
        """Complete independent rows `[r, d1]` and `[r, d2]` to orthogonal matrices."""
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
        """Dimension of the tangent space."""
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
        factors: Any = a.reshape(r, *a_shape), b.reshape(r, *b_shape)
        return KroneckerTerms(*factors)

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
        # Contract with the left factors, [p, q, r, d2], then with the right factors.
        half = np.einsum("pxi,rxy->priy", u, a, optimize=True)
        from_a = np.einsum("priy,qyj->pqrij", half, v, optimize=True)
        from_a = from_a.reshape(-1, m2 * n2) @ self.right.T
        half = np.einsum("pxi,rij->prxj", u, b, optimize=True)
        from_b = np.einsum("prxj,qyj->pqrxy", half, v, optimize=True)
        from_b = from_b.reshape(-1, m1 * n1) @ self.left[r:].T
        parts = (x.reshape(p, q, -1) for x in (from_a, from_b))
        return np.concatenate(list(parts), axis=2)

    def split(self, xi: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Split coordinates into `M [r, r]`, `X [d1 − r, r]` and `Y [r, d2 − r]`."""
        r, d2 = self.rank, len(self.right)
        row = xi[: r * d2].reshape(r, d2)
        return row[:, :r], xi[r * d2 :].reshape(r, -1).T, row[:, r:]

    def moved(self, xi: np.ndarray) -> "Sheet | None":
        """Return the orthographic retraction, or None where it is not defined."""
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
            normal: N, `[m, n]`.
        """
        r, d1, d2 = self.rank, len(self.left), len(self.right)
        inside, inverse = self._outside(normal), np.linalg.inv(self.core)
        # X is stored as [r, d1 − r], and Y as part of [r, d2].
        block = np.zeros((r, d1 - r, r, d2))
        block[:, :, :, r:] = -np.einsum("pq,ij->ipjq", inside, inverse)
        block = block.reshape(r * (d1 - r), r * d2)
        size = self.dimension
        result = np.zeros((size, size))
        result[r * d2 :, : r * d2] = block
        result[: r * d2, r * d2 :] = block.T
        return result

    def bent(self, normal: np.ndarray, xi: np.ndarray) -> np.ndarray:
        """Return the product of the matrix of `bend` with coordinates."""
        r, d2 = self.rank, len(self.right)
        inside, inverse = self._outside(normal), np.linalg.inv(self.core)
        column, row = xi[r * d2 :].reshape(r, -1), xi[: r * d2].reshape(r, d2)
        image = np.zeros((r, d2))
        image[:, r:] = -inverse.T @ column @ inside
        other = -inverse @ row[:, r:] @ inside.T
        return np.concatenate([image.ravel(), other.ravel()])

    def _outside(self, normal):
        """Return `U_pᵀ R(N) V_p`, `[d1 − r, d2 − r]`."""
        matrix: Any = normal
        matrix = np.asarray(rearrange(matrix, self.shapes[0]))
        return self.left[self.rank :] @ matrix @ self.right[self.rank :].T

    def push(self, xi: np.ndarray) -> np.ndarray:
        """Return the tangent vector with these coordinates, `[m, n]`."""
        r, d2 = self.rank, len(self.right)
        row = xi[: r * d2].reshape(r, d2) @ self.right
        column = xi[r * d2 :].reshape(r, -1) @ self.left[r:]
        ambient: Any = self.left[:r].T @ row + column.T @ self.right[:r]
        return np.asarray(unrearrange(ambient, *self.shapes))

    def project(self, ambient: np.ndarray) -> np.ndarray:
        """Return the coordinates of the projection of a matrix, `[m, n]`."""
        r = self.rank
        matrix: Any = ambient
        matrix = np.asarray(rearrange(matrix, self.shapes[0]))
        row = self.left[:r] @ matrix @ self.right.T
        column = self.right[:r] @ matrix.T @ self.left[r:].T
        return np.concatenate([row.ravel(), column.ravel()])

    def form(self, straight, crossed) -> np.ndarray:
        """Return a quadratic form as a symmetric matrix in the coordinates.

        The form is the sum of `tr(Ξᵀ Q Ξ P)` over `straight` and of `2 tr(Ξ P Ξ Q)`
        over `crossed`.

        Args:
            straight: Pairs `Q [m, m]` and `P [n, n]`, symmetric.
            crossed: Pairs `P [n, m]` and `Q [n, m]`.
        """
        r, ((m1, n1), (m2, n2)) = self.rank, self.shapes
        a = self.left[:r].reshape(r, m1, n1)
        b = self.right[:r].reshape(r, m2, n2)
        pieces = np.zeros((3,), object)
        sides = [(b, b, "kij,lIJ,", "->kxylXY"), (a, a, "kxy,lXY,", "->kijlIJ")]
        sides.append((b, a, "kij,lXY,", "->kxylIJ"))
        operators = [
            (q.reshape(m1, m2, m1, m2), p.reshape(n1, n2, n1, n2), "xiXI,yjYJ")
            for q, p in straight
        ]
        for pair in crossed:
            p, q = (x.reshape(n1, n2, m1, m2) for x in pair)
            operators += [(p, q, "yjXI,YJxi"), (q, p, "yjXI,YJxi")]
        for first, second, index in operators:
            for i, (x, y, factors, out) in enumerate(sides):
                equation = factors + index + out
                piece = np.einsum(equation, x, y, first, second, optimize=True)
                pieces[i] = pieces[i] + piece
        lower, right = self.left[r:], self.right
        d1, d2 = len(self.left), len(right)
        ends = (lower, lower), (right, right), (lower, right)
        sizes = (d1, d1), (d2, d2), (d1, d2)
        aa, bb, ab = (
            np.einsum(
                "ai,kilj,bj->kalb", x, piece.reshape(r, d, r, e), y, optimize=True
            ).reshape(r * len(x), r * len(y))
            for (x, y), (d, e), piece in zip(ends, sizes, pieces, strict=True)
        )
        return np.block([[bb, ab.T], [ab, aa]])
