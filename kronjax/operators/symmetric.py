"""Coordinates of symmetric and skew-symmetric matrices, and of sums of their products.

A sum of Kronecker products is symmetric if and only if it is a sum of products of two
symmetric and of two skew-symmetric factors. In orthonormal coordinates of these spaces
it is a matrix of low rank for each of the two kinds, so that a descent on such matrices
never leaves the symmetric sums.

>>> matrix = jnp.array([[1.0, 2.0], [2.0, 5.0]])
>>> bool(jnp.allclose(expand(compress(matrix.ravel(), 2, 1), 2, 1), matrix.ravel()))
True
>>> compress(matrix.ravel(), 2, -1).tolist()
[0.0]
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kronjax.kronecker import KroneckerTerms
from kronjax.solver.manifold import Point

SYMMETRIC, SKEW = 1, -1


@functools.cache
def _places(n: int, parity: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and columns of the entries that determine a matrix."""
    return np.triu_indices(n, 0 if parity == SYMMETRIC else 1)


def dimension(n: int, parity: int) -> int:
    """Return the number of coordinates of an `[n, n]` matrix."""
    return n * (n + parity) // 2


def compress(vectors: jax.Array, n: int, parity: int) -> jax.Array:
    """Return the coordinates of the symmetric or skew-symmetric part of matrices.

    Args:
        vectors: `[..., n²]`, matrices read row by row.
        n: Number of rows.
        parity: `SYMMETRIC` or `SKEW`.

    Returns:
        `[..., dimension]`, with the same inner products.
    """
    i, j = _places(n, parity)
    pairs = vectors[..., i * n + j] + parity * vectors[..., j * n + i]
    return pairs * _lengths(i, j, pairs)


def expand(coordinates: jax.Array, n: int, parity: int) -> jax.Array:
    """Return the matrices with given coordinates, `[..., n²]`: the adjoint of above."""
    i, j = _places(n, parity)
    values = coordinates * _lengths(i, j, coordinates)
    shape = *coordinates.shape[:-1], n * n
    out = jnp.zeros(shape, coordinates.dtype).at[..., i * n + j].add(values)
    return out.at[..., j * n + i].add(parity * values)


def _lengths(i, j, like: jax.Array) -> jax.Array:
    """Return the factors that make coordinates orthonormal, in the shape of others."""
    factors = jnp.asarray(np.where(i == j, 0.5, np.sqrt(0.5)), like.dtype)
    return jnp.broadcast_to(factors, like.shape)


def terms_of(point: Point, sizes: tuple[int, int], parity: int) -> KroneckerTerms:
    """Return the terms of a point whose factors are coordinates of one parity.

    Args:
        point: Factors `[r, dimension]` and their core.
        sizes: Numbers of rows of the left and of the right factors.
        parity: `SYMMETRIC` or `SKEW`.
    """
    n1, n2 = sizes
    a = expand(jnp.matmul(point.core.T, point.a, precision="highest"), n1, parity)
    return KroneckerTerms(
        a.reshape(-1, n1, n1), expand(point.b, n2, parity).reshape(-1, n2, n2)
    )


def ambient_of(rearranged: jax.Array, sizes: tuple[int, int], parity: int) -> jax.Array:
    """Return the part of one parity of a rearranged matrix, in coordinates.

    Args:
        rearranged: `[n1², n2²]`.
        sizes: `(n1, n2)`.
        parity: `SYMMETRIC` or `SKEW`.
    """
    n1, n2 = sizes
    rows = compress(rearranged, n2, parity)
    return compress(rows.T, n1, parity).T
