"""The manifold of matrices of fixed Kronecker rank, embedded in all matrices.

A point is `K = Σ_kl s_kl A_k ⊗ B_l`: in rearranged form `R(K) = U S Vᵀ` with
orthonormal columns `vec A_k` of `U` and `vec B_l` of `V`, and an invertible core `S`
that need not be diagonal, so that no operation here needs a singular value
decomposition. A tangent vector at that point is

    R(ξ) = U M Vᵀ + U_p Vᵀ + U V_pᵀ,    UᵀU_p = 0,  VᵀV_p = 0

and is stored as `(U_p, M, V_p)`. Ambient matrices are stored rearranged, `[d1, d2]`
with `d1 = m1 n1` and `d2 = m2 n2`. Points and tangents keep the factors as the rows of
`a: [r, d1]` and `b: [r, d2]`. The metric is the Frobenius inner product of the ambient
space; a vector that is transported keeps its coordinates.

References: Vandereycken (2013); Absil and Malick (2012), for the retractions.

>>> import jax.numpy as jnp
>>> point = nearest(jnp.diag(jnp.array([3.0, 2.0, 1.0])), 2)
>>> jnp.round(jnp.abs(point.core), 3).tolist()
[[3.0, 0.0], [0.0, 2.0]]
"""

import dataclasses

import jax
import jax.numpy as jnp

from kronjax.linalg import spectral
from kronjax.linalg.batching import any_lane, select


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Point:
    """`R(K) = aᵀ core b`.

    Attributes:
        a: `[r, d1]`, orthonormal rows, the vectorised left factors.
        core: `[r, r]`.
        b: `[r, d2]`, orthonormal rows, the vectorised right factors.
    """

    a: jax.Array
    core: jax.Array
    b: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tangent:
    """`R(ξ) = aᵀ core b` of the point's `a`, `b` plus `Tangent.aᵀ b + aᵀ Tangent.b`.

    Attributes:
        a: `[r, d1]`, rows orthogonal to those of the point's `a`.
        core: `[r, r]`.
        b: `[r, d2]`, rows orthogonal to those of the point's `b`.
    """

    a: jax.Array
    core: jax.Array
    b: jax.Array


def to_ambient(point: Point) -> jax.Array:
    """Return `R(K)`, `[d1, d2]`."""
    return _mm(point.a.T, _mm(point.core, point.b))


def tangent_to_ambient(point: Point, tangent: Tangent) -> jax.Array:
    """Return `R(ξ)`, `[d1, d2]`."""
    left = _mm(tangent.core.T, point.a) + tangent.a
    return _mm(left.T, point.b) + _mm(point.a.T, tangent.b)


def zero(point: Point) -> Tangent:
    """Return the zero vector at `point`."""
    return Tangent(*map(jnp.zeros_like, (point.a, point.core, point.b)))


def project(point: Point, ambient: jax.Array) -> Tangent:
    """Project an ambient matrix orthogonally onto the tangent space at `point`.

    Args:
        point: Where.
        ambient: `[d1, d2]`.

    Returns:
        The closest tangent vector. Costs two products `[d1, d2] × [d2, r]`.
    """
    az = _mm(point.a, ambient)
    bz = _mm(point.b, ambient.T)
    core = _mm(az, point.b.T)
    return Tangent(bz - _mm(core.T, point.a), core, az - _mm(core, point.b))


def way(begin: Point, end: Point) -> Tangent:
    """Return the way from one point to another, as far as it is tangent at its end."""
    return project(end, to_ambient(end) - to_ambient(begin))


def transport(point: Point, tangent: Tangent) -> Tangent:
    """Return the tangent vector at a point with the coordinates of one nearby.

    The core stays as it is; of the rest what is no longer orthogonal to the factors is
    taken out. Retractions turn the factors smoothly, so that to first order nothing
    else happens to a vector that is carried along.

    Args:
        point: Where the vector is wanted.
        tangent: At a point nearby.
    """
    return Tangent(
        tangent.a - _mm(_mm(tangent.a, point.a.T), point.a),
        tangent.core,
        tangent.b - _mm(_mm(tangent.b, point.b.T), point.b),
    )


def inner(x: Tangent, y: Tangent) -> jax.Array:
    """Return the Frobenius inner product `<ξ, η>` of two vectors at one point."""
    return _dot(x.a, y.a) + _dot(x.core, y.core) + _dot(x.b, y.b)


def retract(point: Point, tangent: Tangent) -> Point:
    """Retract orthographically, or by metric projection where that is unsafe.

    `(U C + U_p) C⁻¹ (C Vᵀ + V_pᵀ)` with `C = S + M`: of second order, its difference to
    `R(K + ξ)` is normal to the tangent space, and it costs small solves and products
    only. A `C` that is nearly singular, as at a point of lower rank, would be inverted:
    such steps go through `retract_metric`.
    """
    core = point.core + tangent.core
    inverse = jnp.linalg.inv(core)
    x, y = _mm(inverse.T, tangent.a), _mm(inverse, tangent.b)
    # The Gram matrices of the moved rows have condition number at most 1 + moved.
    moved = jnp.maximum(jnp.sum(x * x), jnp.sum(y * y))
    # A lane that does not move must not send its whole batch the slow way.
    moves = inner(tangent, tangent) > 0
    # Inverting a core like diag(1, 0) would throw the point far away.
    unsafe = ~(moved < 100) & moves
    safe = _orthonormalise(core, point.a + x, point.b + y)
    safe = select(moves, safe, point)

    def choose():
        return select(unsafe, retract_metric(point, tangent), safe)

    return jax.lax.cond(any_lane(unsafe), choose, lambda: safe)


def retract_metric(point: Point, tangent: Tangent) -> Point:
    """Return the point nearest to `R(K + ξ)` in the Frobenius norm.

    The left basis is that of the concatenation `[U, U_p]`: orthonormalising `U_p` alone
    loses orthogonality to `U` where `U_p` is small.
    """
    r = point.core.shape[0]
    left = jnp.concatenate([point.a, tangent.a])
    right = jnp.concatenate(
        [_mm(point.core + tangent.core, point.b) + tangent.b, point.b]
    )
    q = jnp.linalg.qr(left.T)[0]
    # Not by the R of that QR, which is there before Q is: see `lanes`.
    core = _mm(_mm(q.T, left.T), right)
    turned, core, vt = spectral.leading(core, r)
    return Point(_mm(q, turned).T, core, vt)


def nearest(ambient: jax.Array, rank: int) -> Point:
    """Return the point of rank `rank` nearest to `ambient` in the Frobenius norm.

    Van Loan's solution, by `spectral.leading`: no full decomposition of a large matrix
    for a small rank.

    Args:
        ambient: `[d1, d2]`.
        rank: At most `min(d1, d2)`.

    Returns:
        The point, its core diagonal up to rounding, and descending.
    """
    q, core, vt = spectral.leading(ambient, rank)
    return Point(q.T, core, vt)


def _orthonormalise(core, a, b):
    """Return the point `aᵀ core b` for rows that are independent, not orthonormal.

    Both sides share one decomposition: two small ones that do not wait for each other,
    batched, can block each other for ever in the two threads of a two-core machine.
    """
    gram = jnp.stack([_mm(a, a.T), _mm(b, b.T)])
    lower = jnp.linalg.cholesky(gram)
    eye = jnp.broadcast_to(jnp.eye(core.shape[0], dtype=core.dtype), gram.shape)
    inverse = jax.scipy.linalg.solve_triangular(lower, eye, lower=True)
    core = _mm(lower[0].T, _mm(core, lower[1]))
    return Point(_mm(inverse[0], a), core, _mm(inverse[1], b))


def _dot(x, y):
    return jnp.vdot(x, y, precision="highest")


def _mm(x, y):
    return jnp.matmul(x, y, precision="highest")
