"""The manifold of matrices of fixed Kronecker rank, embedded in all matrices.

A point is `K = Σ_kl s_kl A_k ⊗ B_l`: in rearranged form `R(K) = U S Vᵀ` with
orthonormal columns `vec A_k` of `U` and `vec B_l` of `V`, and an invertible core `S`
that need not be diagonal, so that no operation here needs a singular value
decomposition. A tangent vector at that point is

    R(ξ) = U M Vᵀ + U_p Vᵀ + U V_pᵀ,    UᵀU_p = 0,  VᵀV_p = 0

and is stored as `(U_p, M, V_p)`. Ambient matrices are stored rearranged, `[d1, d2]`
with `d1 = m1 n1` and `d2 = m2 n2`. Points and tangents store the factors as the rows of
`a: [r, d1]` and `b: [r, d2]`. The metric is the Frobenius inner product of the ambient
space; vector transport keeps coordinates.

References: Vandereycken (2013); Absil and Malick (2012), for the retractions.

>>> import jax.numpy as jnp
>>> point = nearest(jnp.diag(jnp.array([3.0, 2.0, 1.0])), 2)
>>> jnp.round(jnp.abs(point.core)).tolist()
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
    """A point of the manifold, `R(K) = aᵀ core b`.

    Attributes:
        a: Vectorised left factors, `[r, d1]`, with orthonormal rows.
        core: Core `S`, `[r, r]`.
        b: Vectorised right factors, `[r, d2]`, with orthonormal rows.
    """

    a: jax.Array
    core: jax.Array
    b: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tangent:
    """A tangent vector `ξ` at a point with factors `U = aᵀ`, `V = bᵀ`.

    Attributes:
        a: `U_pᵀ`, `[r, d1]`, with rows orthogonal to those of the point's `a`.
        core: `M`, `[r, r]`.
        b: `V_pᵀ`, `[r, d2]`, with rows orthogonal to those of the point's `b`.
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
        point: The point of the tangent space.
        ambient: A rearranged matrix, `[d1, d2]`.

    Returns:
        The closest tangent vector. The cost is two products `[d1, d2] × [d2, r]`.
    """
    az = _mm(point.a, ambient)
    bz = _mm(point.b, ambient.T)
    core = _mm(az, point.b.T)
    return Tangent(bz - _mm(core.T, point.a), core, az - _mm(core, point.b))


def displacement(begin: Point, end: Point) -> Tangent:
    """Return `end − begin`, projected onto the tangent space at `end`."""
    return project(end, to_ambient(end) - to_ambient(begin))


def transport(point: Point, tangent: Tangent) -> Tangent:
    """Transport a tangent vector from a nearby point to `point`, keeping coordinates.

    The core does not change; parts of the other blocks that are no longer orthogonal to
    the factors are removed. Retractions turn the factors smoothly, so that to first
    order a transported vector does not change otherwise.

    Args:
        point: The point of the new tangent space.
        tangent: A tangent vector at a nearby point.
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

    The orthographic retraction is `(U C + U_p) C⁻¹ (C Vᵀ + V_pᵀ)` with `C = S + M`. It
    is of second order, its difference to `R(K + ξ)` is normal to the tangent space, and
    it costs only small solves and products. If `C` is nearly singular, as at a point of
    lower rank, `retract_metric` is used instead.
    """
    core = point.core + tangent.core
    inverse = jnp.linalg.inv(core)
    x, y = _mm(inverse.T, tangent.a), _mm(inverse, tangent.b)
    # The Gram matrices of the moved rows have condition number at most 1 + moved.
    moved = jnp.maximum(jnp.sum(x * x), jnp.sum(y * y))
    # A lane that does not move must not send the whole batch the slow way.
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
    # Not by the R of that QR, which is computed before Q: see `batching`.
    core = _mm(_mm(q.T, left.T), right)
    turned, core, vt = spectral.leading(core, r)
    return Point(_mm(q, turned).T, core, vt)


def nearest(ambient: jax.Array, rank: int) -> Point:
    """Return the point of rank `rank` nearest to `ambient` in the Frobenius norm.

    This is Van Loan's solution, by `spectral.leading`: a small rank needs no full
    decomposition of a large matrix.

    Args:
        ambient: A rearranged matrix, `[d1, d2]`.
        rank: At most `min(d1, d2)`.

    Returns:
        The point, with a core that is diagonal up to rounding, and descending.
    """
    q, core, vt = spectral.leading(ambient, rank)
    return Point(q.T, core, vt)


def _orthonormalise(core, a, b):
    """Return the point `aᵀ core b` for rows that are independent, not orthonormal.

    Both sides share one decomposition: two small batched decompositions that run at the
    same time can block each other for ever in the two threads of a two-core machine.
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
