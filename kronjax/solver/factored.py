"""Sums of Kronecker products as plain pairs of factors: a flat space for `descent`.

The sums are those of `manifold`, `R(K) = aᵀ b`, without orthonormal bases. A retraction
is an addition, and nothing has to be made orthonormal or tangent: on the manifold that
costs seven times `r² (d1 + d2)` multiplications in every step, which is little beside a
gradient for large p, but not at p = 2 or high rank: see `Problem.is_factored`. The pair
`(X a, X⁻ᵀ b)` stands for the same sum, which hardly affects a quasi-Newton method:
gradients have no component along those directions.

>>> import jax.numpy as jnp
>>> from kronjax.solver import manifold
>>> pair = split(manifold.nearest(jnp.diag(jnp.array([4.0, 1.0])), 2))
>>> jnp.round(jnp.abs(pair.a)).tolist()
[[2.0, 0.0], [0.0, 1.0]]
"""

import dataclasses

import jax
import jax.numpy as jnp

from kronjax.linalg.batching import after
from kronjax.solver.manifold import Point


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair:
    """A point, or a tangent vector, which is a difference of points.

    Attributes:
        a: Vectorised left factors, `[r, d1]`.
        b: Vectorised right factors, `[r, d2]`.
    """

    a: jax.Array
    b: jax.Array


def split(point: Point) -> Pair:
    """Return the factors of a point whose core is nearly diagonal and positive.

    The core is shared between both factors. Where it vanishes the left factor is zero
    and the right factor is not, so that the term can grow again.
    """
    s = jnp.diagonal(point.core)
    right = jnp.sqrt(jnp.where(s[0] > 0, jnp.maximum(s, 1e-4 * s[0]), 1))
    return Pair(_mm((point.core / right[None]).T, point.a), right[:, None] * point.b)


def join(pair: Pair, last: jax.Array | None = None) -> Point:
    """Return the point of the manifold that stands for the same sum.

    Args:
        pair: The factors.
        last: Array that must be computed before any decomposition starts: see
            `batching`.
    """
    left = pair.a if last is None else after(pair.a, last)
    a = jnp.linalg.qr(left.T)[0].T
    b = jnp.linalg.qr(after(pair.b, a).T)[0].T
    # Not by the R of those QR, which is computed before Q: see `batching`.
    return Point(a, _mm(_mm(a, pair.a.T), _mm(pair.b, b.T)), b)


def to_ambient(point: Pair) -> jax.Array:
    """Return `R(K)`, `[d1, d2]`."""
    return _mm(point.a.T, point.b)


def project(point: Pair, ambient: jax.Array) -> Pair:
    """Return the gradient of `<Z, aᵀ b>` for an ambient matrix Z, `[d1, d2]`."""
    return Pair(_mm(point.b, ambient.T), _mm(point.a, ambient))


def displacement(begin: Pair, end: Pair) -> Pair:
    """Return the vector from `begin` to `end`."""
    return jax.tree.map(jnp.subtract, end, begin)


def zero(point: Pair) -> Pair:
    """Return the zero vector."""
    return jax.tree.map(jnp.zeros_like, point)


def retract(point: Pair, tangent: Pair) -> Pair:
    """Return the sum of a point and a vector."""
    return jax.tree.map(jnp.add, point, tangent)


def transport(point: Pair, tangent: Pair) -> Pair:
    """Return the vector unchanged, since the space is flat."""
    del point
    return tangent


def inner(x: Pair, y: Pair) -> jax.Array:
    """Return the inner product of two vectors."""
    return _dot(x.a, y.a) + _dot(x.b, y.b)


def _dot(x, y):
    return jnp.vdot(x, y, precision="highest")


def _mm(x, y):
    return jnp.matmul(x, y, precision="highest")
