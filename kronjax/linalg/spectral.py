"""Spectral norms and leading singular vectors by block Krylov iteration.

A linear map `M: R^n → R^m` is known through its products. Each restart spans the block
Krylov space `[X, MᵀM X, (MᵀM)² X, …]` and keeps the best right vectors in it
(Rayleigh–Ritz). Every estimate is `‖M v‖ / ‖v‖` for some `v`, hence a lower bound; the
rounding error of that product is subtracted, so it is never above the true value. All
functions are unbatched and compose with `jit` and `vmap`.

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
"""Length of the shorter side from which CPUs, too, are quicker by eigenvectors of the
Gram matrix: 1.7 times with 768×768, 2.7 times with 3072×768, on one core. The loops of
smaller problems gained nothing by them."""

BLOCKS = 4
"""Number of blocks in one Krylov space, including the start."""


def estimate_norm(
    matrix: jax.Array,
    start: jax.Array | None = None,
    *,
    tolerance: float = 1e-6,
    restarts: int = 12,
) -> jax.Array:
    """Return a lower bound of `‖M‖_2`, accurate to `tolerance` if `restarts` suffice.

    Args:
        matrix: `[m, n]`, float32 or float64.
        start: `[n, k]`, right vectors to begin with; random by default.
        tolerance: The relative increase of the estimate below which to stop.
        restarts: Largest number of restarts.

    Returns:
        A scalar, never above the true spectral norm.
    """
    m, n = matrix.shape
    largest = jnp.max(jnp.abs(matrix))
    matrix = matrix / jnp.where(largest > 0, largest, 1)
    if min(m, n) <= 16 * BLOCKS:  # cheaper directly
        # For nearly square matrices singular values are quicker on CPUs.
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
        forward: The map `x [n, k] ↦ M x [m, k]`.
        adjoint: The map `y [m, k] ↦ Mᵀ y [n, k]`.
        start: `[n, k]`, right vectors to begin with.
        tolerance: The relative increase of the estimate below which to stop.
        restarts: Largest number of restarts.

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
    """Return factors `u`, `s`, `vt` whose product is a matrix up to rounding.

    On CPUs they are a singular value decomposition. On a GPU that takes thirty times as
    long as eigenvectors, and hundreds of times for batches of small matrices:
    `triplets_by_gram` is used there, and also on TPUs, where neither was measured.
    Vectors that belong to values near rounding are then not orthogonal, which weakens
    proofs about sums of lower rank than they could have.

    Args:
        matrix: `[m, n]`, finite.
        orthogonal: Whether vectors must be orthogonal on CPUs. If not,
            `triplets_by_gram` is used for large matrices there, too.

    Returns:
        `u: [m, k]`, `s: [k]` descending and `vt: [k, n]`, with `k = min(m, n)`.
    """
    if orthogonal:
        return jax.lax.platform_dependent(matrix, cpu=_svd, default=triplets_by_gram)
    return _by_gram_if_large(matrix, _svd, triplets_by_gram)


def lengths(matrix: jax.Array) -> jax.Array:
    """Return `|M v|` for the v of a basis, descending; their sum is at least `‖M‖_*`.

    They are the singular values where those are quick to compute. Elsewhere the basis
    is that of `triplets_by_gram`, with an allowance for its lack of orthogonality.

    Args:
        matrix: `[m, n]`, finite.
    """
    return jax.lax.platform_dependent(
        matrix, cpu=_singular_values, default=lengths_by_gram
    )


def leading(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return `q`, `core`, `vt`, whose product is the nearest matrix of a given rank.

    They come from block Krylov iteration, or from a full decomposition where the Krylov
    space would fill a good part of the matrix: a singular value decomposition for small
    matrices on CPUs, else the eigenvectors of the Gram matrix. Where those are not
    reliable for small values (below a fiftieth of the largest in float32), a singular
    value decomposition follows, for the whole batch.

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

    The vectors of the longer side, those of `u` if `m >= n`, are orthogonal only up to
    `eps s_1² / (s_i s_j)`. The others are orthonormal, every `s` is the length of `M v`
    for one of them, and the product is accurate up to rounding of the largest.
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

    The angle by which rounding turns the vectors costs at most `eps s_1²` in squared
    error, for every pair of values that are as near to each other.
    """
    if matrix.shape[0] < matrix.shape[1]:
        q, core, vt = leading_by_gram(matrix.T, rank)
        return vt.T, core.T, q.T
    u, s, vt = triplets_by_gram(matrix)
    s, vt = s[:rank], vt[:rank]
    # A lane with a zero matrix must not send the whole batch the slow way.
    is_zero = s[0] == 0
    u = jnp.where(is_zero, jnp.eye(len(u), rank, dtype=u.dtype), u[:, :rank])
    # Nearly orthogonal vectors are made orthonormal by the Cholesky factor of their
    # Gram matrix, which is close to the identity.
    certain = is_zero | (s[-1] > float(jnp.finfo(s.dtype).eps) ** 0.25 * s[0])
    gram = jnp.where(certain, _mm(u.T, u), jnp.eye(rank, dtype=u.dtype))
    lower = jnp.linalg.cholesky(gram)
    q = jax.scipy.linalg.solve_triangular(lower, u.T, lower=True).T
    quick = q, lower.T * s[None], vt

    def exact():
        return select(certain, quick, _leading_by_svd(after(matrix, vt), rank))

    return jax.lax.cond(any_lane(~certain), exact, lambda: quick)


def _by_gram_if_large(matrix, direct, by_gram):
    """Return `direct(matrix)` for small matrices on CPUs, `by_gram(matrix)` else."""
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
    """Return the leading singular triplets.

    Restarts end when the squared Frobenius norm that the triplets capture rises by less
    than `tolerance`, relative to that of the matrix.
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
    # Not by the R of that QR, which is computed before Q: see `batching`.
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
        # The squared Frobenius norm of the map is at least the sum of all Ritz values.
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
    """Subtract four times the typical rounding error of products of length `size`."""
    return norm * (1 - 4 * size**0.5 * float(jnp.finfo(norm.dtype).eps))


def _orthonormal(x):
    return jnp.linalg.qr(x)[0]


def _random_block(matrix, width):
    width = min(width, min(matrix.shape))
    return jax.random.normal(jax.random.key(0), (matrix.shape[1], width), matrix.dtype)


def _mm(x, y):
    return jnp.matmul(x, y, precision="highest")
