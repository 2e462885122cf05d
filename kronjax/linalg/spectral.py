"""Spectral norms and leading singular vectors by block Krylov iteration.

A linear map `M: R^n → R^m` is known through its products. Each restart spans the block
Krylov space `[X, MᵀM X, (MᵀM)² X, …]` and keeps the best right vectors in it
(Rayleigh–Ritz). Every estimate is `‖M v‖ / ‖v‖` for some `v`, hence a lower bound; it
is also lowered by the rounding of that very product, so it is never above the true
value. All functions are unbatched and go through `jit` and `vmap`.

References: Golub, Luk and Overton (1981); Musco and Musco (2015).

>>> import jax.numpy as jnp
>>> bool(abs(estimate_norm(jnp.diag(jnp.array([1.0, 5.0, 2.0]))) - 5) < 1e-4)
True
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kronjax.linalg.batching import after, any_lane, select

LARGE = 256
"""Shorter sides from which processors, too, are quicker by eigenvectors of the Gram
matrix: 1.7 times with 768×768, 2.7 times with 3072×768, on one core. The loops of
smaller problems gained nothing by them."""

BLOCKS = 4
"""Blocks in one Krylov space, the start included."""


def estimate_norm(
    matrix: jax.Array,
    start: jax.Array | None = None,
    *,
    tolerance: float = 1e-6,
    restarts: int = 12,
) -> jax.Array:
    """Return a lower bound of `‖M‖_2`, settled to `tolerance` if `restarts` allow.

    Args:
        matrix: `[m, n]`, float32 or float64.
        start: `[n, k]`, right vectors to begin with; random when not given.
        tolerance: Stop when a restart raises the estimate by less, relatively.
        restarts: Stop after so many restarts at the latest.

    Returns:
        A scalar, never above the true spectral norm.
    """
    m, n = matrix.shape
    largest = jnp.max(jnp.abs(matrix))
    matrix = matrix / jnp.where(largest > 0, largest, 1)
    if min(m, n) <= 16 * BLOCKS:  # cheaper directly
        # Of what is nearly square, singular values are the quicker ones on processors.
        is_long = max(m, n) > 2 * min(m, n)
        top = jax.lax.platform_dependent(
            matrix,
            cpu=_top_by_gram if is_long else lambda x: _singular_values(x)[0],
            default=_top_by_gram,
        )
        return largest * _lowered(top, m + n)
    return largest * estimate_map_norm(
        lambda x: _mm(matrix, x),
        lambda y: _mm(matrix.T, y),
        _random_block(matrix, 4) if start is None else start,
        tolerance=tolerance,
        restarts=restarts,
    )


def estimate_map_norm(
    forward: Callable[[jax.Array], jax.Array],
    adjoint: Callable[[jax.Array], jax.Array],
    start: jax.Array,
    *,
    tolerance: float = 1e-6,
    restarts: int = 12,
) -> jax.Array:
    """Return a lower bound of the spectral norm of a linear map, as `estimate_norm`.

    Args:
        forward: `x [n, k] ↦ M x [m, k]`.
        adjoint: `y [m, k] ↦ Mᵀ y [n, k]`.
        start: `[n, k]`, right vectors to begin with.
        tolerance: Stop when a restart raises the estimate by less, relatively.
        restarts: Stop after so many restarts at the latest.

    Returns:
        A scalar, never above the true spectral norm.
    """
    v = _refine(forward, adjoint, start, 1, tolerance, restarts)[:, :1]
    v = v / jnp.linalg.norm(v)
    image = forward(v)
    return _lowered(jnp.linalg.norm(image), image.shape[0] + v.shape[0])


def triplets(
    matrix: jax.Array, *, orthogonal: bool = True
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return `u s vt`, equal to a matrix up to rounding.

    On processors that is a singular value decomposition. A GPU takes thirty times as
    long for those as for eigenvectors, and for batches of small matrices hundreds of
    times: there `triplets_by_gram` does it, and on TPUs, where nobody measured either.
    Vectors that belong to values near rounding are then not orthogonal, which weakens
    proofs about sums that are of lower rank than they could be.

    Args:
        matrix: `[m, n]`, finite.
        orthogonal: Whether such vectors matter on processors. Where not, large matrices
            go by `triplets_by_gram` there, too.

    Returns:
        `u: [m, k]`, `s: [k]` descending and `vt: [k, n]`, with `k = min(m, n)`.
    """
    if orthogonal:
        return jax.lax.platform_dependent(matrix, cpu=_svd, default=triplets_by_gram)
    return _by_gram_if_large(matrix, _svd, triplets_by_gram)


def lengths(matrix: jax.Array) -> jax.Array:
    """Return `|M v|` for the v of a basis, descending: in sum, no less than `‖M‖_*`.

    They are the singular values where those are quick. Where they are not, the basis is
    that of `triplets_by_gram`, and what it lacks in orthogonality is added.

    Args:
        matrix: `[m, n]`, finite.
    """
    return jax.lax.platform_dependent(
        matrix, cpu=_singular_values, default=lengths_by_gram
    )


def leading(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return `q core vt`, the matrix of a rank that is nearest to `matrix`.

    By block Krylov iteration; or by a decomposition, where the Krylov space would fill
    a good part of the matrix: of singular values for small matrices on processors, else
    of the Gram matrix. Where that leaves doubt about small values, those below a
    fiftieth of the largest in float32, the former follows, for the whole batch.

    Args:
        matrix: `[m, n]`.
        rank: At most `min(m, n)`.

    Returns:
        `q: [m, rank]` and `vt: [rank, n]` orthonormal, `core: [rank, rank]` diagonal up
        to rounding, and descending.
    """
    width = rank + max(4, rank // 2)
    if 2 * BLOCKS * width <= min(matrix.shape):
        u, s, vt = _leading_by_krylov(matrix, rank, width)
        return u, jnp.diag(s), vt
    return _by_gram_if_large(
        matrix,
        lambda x: _leading_by_svd(x, rank),
        lambda x: leading_by_gram(x, rank),
    )


def triplets_by_gram(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the same as `triplets`, by the eigenvectors of the Gram matrix.

    The vectors of the longer side, those of `u` if `m >= n`, are orthogonal up to
    `eps s_1² / (s_i s_j)` only. The others are orthonormal, every `s` is the length of
    `M v` for one of them, and the product is right up to rounding of the largest.
    """
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vt = triplets_by_gram(matrix.T)
        return vt.T, s, u.T
    largest = jnp.max(jnp.abs(matrix))
    matrix = matrix / jnp.where(largest > 0, largest, 1)
    v = jnp.linalg.eigh(_mm(matrix.T, matrix))[1]
    image = _mm(matrix, v)
    s = jnp.linalg.norm(image, axis=0)
    order = jnp.argsort(-s)
    s, image, v = s[order], image[:, order], v[:, order]
    return image / jnp.where(s > 0, s, 1)[None], s * largest, v.T


def lengths_by_gram(matrix: jax.Array) -> jax.Array:
    """Return the same as `lengths`, by the eigenvectors of the Gram matrix."""
    s = triplets_by_gram(matrix)[1]
    return s * (1 + 8 * len(s) ** 0.5 * float(jnp.finfo(s.dtype).eps))


def leading_by_gram(
    matrix: jax.Array, rank: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the same as `leading`, by the eigenvectors of the Gram matrix.

    The angle that rounding turns them by costs, in squared error, at most `eps s_1²`
    for every pair of values that are as near to each other.
    """
    if matrix.shape[0] < matrix.shape[1]:
        q, core, vt = leading_by_gram(matrix.T, rank)
        return vt.T, core.T, q.T
    u, s, vt = triplets_by_gram(matrix)
    s, vt = s[:rank], vt[:rank]
    # Lanes without a matrix must not send their whole batch the slow way.
    is_zero = s[0] == 0
    u = jnp.where(is_zero, jnp.eye(len(u), rank, dtype=u.dtype), u[:, :rank])
    # Of nearly orthogonal vectors the root of a nearly trivial Gram matrix does the
    # rest.
    certain = is_zero | (s[-1] > float(jnp.finfo(s.dtype).eps) ** 0.25 * s[0])
    gram = jnp.where(certain, _mm(u.T, u), jnp.eye(rank, dtype=u.dtype))
    lower = jnp.linalg.cholesky(gram)
    q = jax.scipy.linalg.solve_triangular(lower, u.T, lower=True).T
    quick = q, lower.T * s[None], vt

    def exact():
        return select(certain, quick, _leading_by_svd(after(matrix, vt), rank))

    return jax.lax.cond(any_lane(~certain), exact, lambda: quick)


def _by_gram_if_large(matrix, direct, by_gram):
    """Return `direct` of small matrices on processors, `by_gram` of all others."""
    if min(matrix.shape) >= LARGE:
        return by_gram(matrix)
    return jax.lax.platform_dependent(matrix, cpu=direct, default=by_gram)


def _svd(matrix):
    return tuple(jnp.linalg.svd(matrix, full_matrices=False))


def _singular_values(matrix):
    return jnp.linalg.svd(matrix, compute_uv=False)


def _leading_by_svd(matrix, rank):
    u, s, vt = _svd(matrix)
    return u[:, :rank], jnp.diag(s[:rank]), vt[:rank]


def _leading_by_krylov(matrix, rank, width, tolerance=1e-7, restarts=12):
    """Return the leading singular triplets; what they capture settles to `tolerance`.

    That refers to the squared Frobenius norm, relative to that of the matrix.
    """
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vt = _leading_by_krylov(matrix.T, rank, width, tolerance, restarts)
        return vt.T, s, u.T

    def forward(x):
        return _mm(matrix, x)

    def adjoint(y):
        return _mm(matrix.T, y)

    start = _random_block(matrix, width)
    v = _refine(forward, adjoint, start, rank, tolerance, restarts)
    image = forward(v)
    q = _orthonormal(image)
    # Not by the R of that QR, which is there before Q is: see `lanes`.
    u, s, wt = jnp.linalg.svd(_mm(q.T, image))
    return _mm(q, u[:, :rank]), s[:rank], _mm(wt[:rank], v.T)


def _refine(forward, adjoint, start, rank, tolerance, restarts):
    """Return `[n, k]` orthonormal right vectors, best first, for a start `[n, k]`."""
    width = start.shape[1]

    def restart(carry):
        v, mass, _, count = carry
        blocks = [v]
        for _ in range(BLOCKS - 1):
            v = _orthonormal(adjoint(forward(v)))
            blocks.append(v)
        basis = _orthonormal(jnp.concatenate(blocks, axis=1))
        gram = forward(basis)
        gram = _mm(gram.T, gram)
        values, vectors = jnp.linalg.eigh(gram)
        captured = jnp.sum(values[-rank:])
        # Frobenius mass of the map is at least that of all Ritz values found so far.
        settled = captured - mass <= tolerance * jnp.sum(jnp.abs(values))
        best = _mm(basis, vectors[:, ::-1][:, :width])
        return best, captured, settled, count + 1

    v, _, _, _ = jax.lax.while_loop(
        lambda carry: ~carry[2] & (carry[3] < restarts),
        restart,
        (_orthonormal(start), -jnp.ones((), start.dtype), jnp.array(False), 0),
    )
    return v


def _top_by_gram(matrix):
    m, n = matrix.shape
    gram = _mm(matrix.T, matrix) if m >= n else _mm(matrix, matrix.T)
    return jnp.sqrt(jnp.linalg.eigvalsh(gram)[-1])


def _lowered(norm, size):
    """Subtract the rounding of products of length `size`, typical times four."""
    return norm * (1 - 4 * size**0.5 * float(jnp.finfo(norm.dtype).eps))


def _orthonormal(x):
    return jnp.linalg.qr(x)[0]


def _random_block(matrix, width):
    width = min(width, min(matrix.shape))
    return jax.random.normal(jax.random.key(0), (matrix.shape[1], width), matrix.dtype)


def _mm(x, y):
    return jnp.matmul(x, y, precision="highest")
