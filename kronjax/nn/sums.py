"""Factors of Kronecker sums inside of layers: named, described and truncated.

References: Van Loan and Pitsianis (1993), for the truncation of a sum.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from kronjax.kronecker import KroneckerTerms, matmul_cost, part_name
from kronjax.nn import factors
from kronjax.nn.layers import abstract, describe_parts, sizes


class Sum:
    """Methods of layers that hold the factors of a sum in lists `a` and `b`."""

    a: Any
    b: Any

    @property
    def factors(self) -> tuple[KroneckerTerms, ...]:
        """The factors as they are stored, one sum for each configuration."""
        return tuple(
            KroneckerTerms(a.get_value(), b.get_value()) for a, b in self.pairs
        )

    @property
    def pairs(self) -> list[tuple[Any, Any]]:
        """Left and right factors of each configuration, as modules or parameters."""
        return list(zip(self.a, self.b, strict=True))

    def parts(self) -> dict[str, Any]:
        """Return the stacks of factors: `a`, `b`, then `a1`, `b1`, ..."""
        return {
            part_name(side, number): part
            for number, pair in enumerate(self.pairs)
            for side, part in zip("ab", pair, strict=True)
        }

    def set_part(self, name: str, part: Any) -> None:
        """Replace the stack of factors that `parts` calls `name`."""
        getattr(self, name[0])[int(name[1:] or 0)] = part

    def summary(self) -> str:
        """Return ranks and shapes, such as `2 × 4x8 ⊗ 3x5`."""
        words = " + ".join(
            f"{a.shape[0]} × {_side(a)} ⊗ {_side(b)}" for a, b in self.pairs
        )
        masked = any(isinstance(x, factors.MaskedFactor) for x in self.parts().values())
        return words + ", masked" * masked

    def describe_terms(self) -> list[dict[str, Any]]:
        """Return the shapes of the factors, and how they are stored."""
        return [
            {"a": list(a.shape), "b": list(b.shape), **describe_parts(a=a, b=b)}
            for a, b in self.pairs
        ]

    def multiply_adds(self, turned: bool = False) -> int:
        """Return the multiply-adds for one row, of the transposed sum if `turned`."""

        def stand_in(part):
            r, m, n = part.shape
            return abstract((r, n, m) if turned else (r, m, n))

        # Only the shapes are used.
        return sum(
            matmul_cost(KroneckerTerms(stand_in(a), stand_in(b))) for a, b in self.pairs
        )


def shape_of(terms: Sequence[KroneckerTerms]) -> tuple[int, int]:
    """Return the shape that all sums share.

    Raises:
        ValueError: If there are none, their shapes differ or the factors do not match.
    """
    shapes = sorted({x.shape for x in terms})
    if len(shapes) != 1:
        raise ValueError(
            "a layer of Kronecker products needs sums for matrices of one and the same "
            f"shape; got {shapes or 'none'}"
        )
    for x in terms:
        ranks = x.a.shape[:-2], x.b.shape[:-2]
        if len(ranks[0]) != 1 or ranks[0] != ranks[1]:
            raise ValueError(
                "a layer of Kronecker products holds one matrix, factors [r, m1, n1] "
                f"and [r, m2, n2]; got {x.a.shape} and {x.b.shape}"
            )
    return shapes[0]


def outline_terms(description: Any) -> list[KroneckerTerms]:
    """Return the abstract factors of a description."""
    shapes = [(sizes(x["a"]), sizes(x["b"])) for x in description["terms"]]
    return [KroneckerTerms(abstract(a), abstract(b)) for a, b in shapes]


def _side(part) -> str:
    return "{}x{}".format(*part.shape[1:]) + factors.note(part)


def truncate(terms: KroneckerTerms, rank: int) -> KroneckerTerms:
    """Return the nearest sum of fewer terms, in the Frobenius norm; in float64.

    Sums that were trained are not orthogonal any more: QR decompositions of both sides
    and a small SVD make them so again before the smallest singular values are dropped.
    """
    (r, m1, n1), (_, m2, n2) = terms.a.shape, terms.b.shape
    a, b = (np.asarray(x, np.float64).reshape(r, -1).T for x in (terms.a, terms.b))
    (qa, ra), (qb, rb) = np.linalg.qr(a), np.linalg.qr(b)
    u, s, vt = np.linalg.svd(ra @ rb.T)
    rank = min(rank, len(s))
    scale = np.sqrt(s[:rank])
    left, right = (qa @ u[:, :rank] * scale).T, (qb @ vt[:rank].T * scale).T
    return KroneckerTerms(
        jnp.asarray(left.reshape(rank, m1, n1), terms.a.dtype),
        jnp.asarray(right.reshape(rank, m2, n2), terms.a.dtype),
    )
