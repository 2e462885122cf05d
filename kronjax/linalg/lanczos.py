"""Probabilistic upper bounds of the norms of linear maps that are known by products.

The Lanczos polynomial of a random vector is small on the part of the spectrum that the
vector has revealed, and large beyond it. If the norm were larger than the bound, the
vector would be almost orthogonal to the leading singular vector, which has a
probability that can be chosen.

Reference: Hochstenbach (2013), Probabilistic upper bounds for the matrix two-norm.

>>> import jax
>>> matrix = jnp.diag(jnp.arange(1.0, 51.0))
>>> start = jax.random.normal(jax.random.key(0), (50,))
>>> bounds = map_norm_bounds(lambda x: matrix @ x, lambda y: matrix.T @ y, start)
>>> bool(bounds.lower <= 50 <= bounds.upper), round(float(bounds.upper), 1)
(True, 50.0)
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kronjax.linalg.norms import Bounds

CHUNK = 8
"""Number of steps between two evaluations of the bounds."""


def map_norm_bounds(
    forward: Callable[[jax.Array], jax.Array],
    adjoint: Callable[[jax.Array], jax.Array],
    start: jax.Array,
    *,
    width: float = 1e-3,
    steps: int = 64,
    failure: float = 1e-9,
) -> Bounds:
    """Return bounds of the norm of a linear map, the upper one probabilistic.

    Lanczos iteration on `MᵀM` with every vector orthogonalised against all before. Its
    k-th polynomial `p_k`, the characteristic polynomial of `T_k`, has
    `‖p_k(MᵀM) v_1‖ = Π β_j`, so that `p_k(‖M‖²) ≤ Π β_j / δ` unless the part of `v_1`
    along the leading vector is below δ, which has probability `δ √(2n / π)` at most for
    a uniformly random direction. There is an allowance for rounding, but no proof of
    it. The lower bound is `‖M v‖ / ‖v‖`.

    Args:
        forward: The map `x [n] ↦ M x [m]`.
        adjoint: The map `y [m] ↦ Mᵀ y [n]`.
        start: `[n]`, drawn from the standard normal distribution; with any other choice
            the upper bound is meaningless.
        width: The value of `(upper − lower) / lower` at which to stop.
        steps: Largest number of products with M and Mᵀ; rounded up to a multiple of
            `CHUNK`.
        failure: Probability that the upper bound is too small.

    Returns:
        `Bounds`, with the right vector that attains the lower bound.

    References: Hochstenbach (2013). Memory: `n · steps` numbers.
    """
    n = start.size
    eps = float(jnp.finfo(start.dtype).eps)
    log_limit = -math.log(failure * math.sqrt(math.pi / (2 * n)))
    v = start / jnp.max(jnp.abs(start))
    v = v / jnp.linalg.norm(v)
    scale = jnp.max(jnp.abs(forward(v)))
    safe = jnp.where(scale > 0, scale, 1)

    def gram(x):
        return adjoint(forward(x) / safe) / safe

    basis, alphas, betas, count = _expand(gram, v, width, steps, log_limit)
    inner = jnp.where(jnp.arange(1, betas.size) < count, betas[:-1], 0)
    tridiagonal = jnp.diag(alphas) + jnp.diag(inner, 1) + jnp.diag(inner, -1)
    v = _mm(jnp.linalg.eigh(tridiagonal)[1][:, -1], basis[:-1])
    v = v / _positive(jnp.linalg.norm(v))
    image = forward(v) / safe
    slack = 4 * (n + image.size) ** 0.5 * eps
    lower = jnp.linalg.norm(image)
    upper = jnp.sqrt(_beyond(alphas, betas, count, log_limit))
    upper = jnp.maximum(upper, lower) * (1 + slack) * scale
    # If the image is not finite, the upper bound becomes NaN.
    return Bounds(lower * (1 - slack) * scale, upper + 0 * jnp.sum(image), v[:, None])


def _expand(gram, v, width, steps, log_limit):
    """Return `basis [steps + 1, n]`, the entries of T and the number of those used."""

    def chunk(carry):
        basis, alphas, betas, count, _ = carry
        basis, alphas, betas = jax.lax.fori_loop(
            count,
            count + CHUNK,
            lambda i, carry: _step(gram, i, *carry),
            (basis, alphas, betas),
        )
        count = count + CHUNK
        below, above = (
            _beyond(alphas, betas, count, limit) for limit in (-math.inf, log_limit)
        )
        return basis, alphas, betas, count, above / _positive(below)

    def unfinished(carry):
        *_, count, ratio = carry
        return (count < steps) & (ratio > (1 + width / 2) ** 2)

    steps = -(-steps // CHUNK) * CHUNK
    zeros = jnp.zeros(steps, v.dtype)
    basis = jnp.zeros((steps + 1, v.size), v.dtype).at[0].set(v)
    ratio = jnp.asarray(jnp.inf, v.dtype)
    carry = jax.lax.while_loop(unfinished, chunk, (basis, zeros, zeros, 0, ratio))
    return carry[:-1]


def _step(gram, i, basis, alphas, betas):
    """Put the next vector into `basis [steps + 1, n]`, and its entries into T."""
    n, eps = basis.shape[1], float(jnp.finfo(basis.dtype).eps)
    w = gram(basis[i])
    alphas = alphas.at[i].set(jnp.sum(basis[i] * w))
    for _ in range(2):
        w = w - _mm(_mm(basis, w), basis)
    beta = jnp.linalg.norm(w)
    largest = jnp.max(alphas)
    # Once the space is exhausted, `w` is rounding noise without a useful direction.
    spent = beta <= 8 * eps * n**0.5 * largest
    betas = betas.at[i].set(jnp.where(spent, eps**2 * largest, beta))
    w = jnp.where(spent, 0, w / jnp.where(spent, 1, beta))
    return basis.at[i + 1].set(w), alphas, betas


def _beyond(alphas, betas, count, log_limit):
    """Return a t right of all zeros of p where `log p(t) / Π β` reaches a limit.

    `p(t)` is the product of the pivots of `t − T`, which are positive to the right of
    the eigenvalues of T and only there. The search is in logarithms of the distance
    from the largest diagonal entry, 64 points at once.
    """
    points, eps = 64, float(jnp.finfo(alphas.dtype).eps)
    used = jnp.arange(alphas.size) < count
    before = jnp.concatenate([jnp.zeros_like(betas[:1]), betas[:-1]])
    origin = jnp.max(alphas)

    def is_beyond(t):
        def pivot(carry, entry):
            last, total, positive = carry
            alpha, before, beta, used = entry
            here = t - alpha - before**2 / last
            positive = positive & (~used | (here > 0))
            here = _positive(here)
            gain = jnp.where(used, jnp.log(here / _positive(beta)), 0)
            return (here, total + gain, positive), None

        start = (jnp.ones_like(t), jnp.zeros_like(t), jnp.ones_like(t, bool))
        entries = (alphas, before, betas, used)
        (_, total, positive), _ = jax.lax.scan(pivot, start, entries)
        return positive & (total >= log_limit)

    # Gershgorin circles end below `origin + 4 max β`; `high` meets every limit.
    high = jnp.log(_positive(jnp.max(betas))) + max(log_limit, 0) + math.log(4)
    low = jnp.log(_positive(eps * origin))
    for _ in range(4):
        logs = low + (high - low) * jnp.arange(points + 1, dtype=low.dtype) / points
        first = jnp.argmax(is_beyond(origin + jnp.exp(logs)).at[-1].set(True))
        low, high = logs[jnp.maximum(first - 1, 0)], logs[first]
    return origin + jnp.exp(high)


def _positive(x):
    return jnp.maximum(x, float(jnp.finfo(x.dtype).tiny))


def _mm(x, y):
    return jnp.matmul(x, y, precision="highest")
