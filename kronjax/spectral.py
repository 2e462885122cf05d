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
        gram = _mm(matrix.T, matrix) if m >= n else _mm(matrix, matrix.T)
        top = jnp.sqrt(jnp.linalg.eigvalsh(gram)[-1])
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


def leading_singular(
    matrix: jax.Array, rank: int, *, tolerance: float = 1e-7, restarts: int = 12
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the `rank` leading singular triplets of `matrix`.

    Matrices so small that the Krylov space would fill a good part of them are
    decomposed directly. `tolerance` refers to the Frobenius mass captured, relative to
    that of the matrix.

    Args:
        matrix: `[m, n]`.
        rank: At most `min(m, n)`.
        tolerance: Stop when a restart captures less than this in addition.
        restarts: Stop after so many restarts at the latest.

    Returns:
        `u: [m, rank]`, `s: [rank]` descending and `vt: [rank, n]`.
    """
    width = rank + max(4, rank // 2)
    if 2 * BLOCKS * width > min(matrix.shape):
        u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vt = leading_singular(
            matrix.T, rank, tolerance=tolerance, restarts=restarts
        )
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
