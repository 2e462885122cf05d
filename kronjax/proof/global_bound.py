"""Lower bounds on the error of every sum of one Kronecker rank, whatever its factors.

With `G = P ⊗ Q` and `H = P' ⊗ Q'`, of any factors, and `s_i` the singular values of the
rearrangement, every sum of rank r has

    ‖T − K‖_2² ≥ Σ_{i>r} s_i(R(G T Hᵀ))² / Σ_i σ_i(G)² σ_i(H)²

because `R(G K Hᵀ)` has rank r as well. With identities for all four factors this is the
bound that Van Loan's sum proves; the bound is then maximised over the factors. Rounding
never makes a bound larger than it should be.
"""

import jax
import jax.numpy as jnp

from kronjax.kronecker import KroneckerTerms, rearrange
from kronjax.linalg import spectral
from kronjax.linalg.batching import after
from kronjax.proof import multipliers
from kronjax.proof.tangent_map import TangentMap
from kronjax.solver import descent, factored, weighted
from kronjax.solver.factored import Pair

SHAKEN = 0.3
"""Standard deviation of the noise added to the four identities at the start."""

CLIMB = 300
"""Limit on evaluations of the value and the gradient of the global bound. Matrices
larger than `multipliers.FINE` have a fifth of them, in float32: for a 768×768 of GPT-2
the bound is then 0.464 instead of 0.472 of the error."""


def prove(plain: jax.Array, terms: KroneckerTerms, space: TangentMap) -> jax.Array:
    """Return a lower bound for all sums of the Kronecker rank of `terms`, or 0.

    Args:
        plain: `T`, `[m, n]`, of Frobenius norm one.
        terms: Terms of the sum; only their rank and shapes are used.
        space: Tangent space at the sum, which holds the weights.
    """
    (_, m1, n1), (_, m2, n2) = terms.a.shape, terms.b.shape
    rank, ambient = terms.rank, rearrange(plain, (m1, n1))
    if rank >= min(ambient.shape):
        return jnp.zeros_like(plain[0, 0])
    if any(side is not None for side in space.inverses[0]):
        return _of_weights(plain, rank, space)
    outer, inner = (
        Pair(*(jnp.eye(size, dtype=plain.dtype) for size in sizes))
        for sizes in ((m1, n1), (m2, n2))
    )
    first = _of_scalings(ambient, rank, outer, inner)
    # The identity is nearly stationary: for 36x36, N(0, 1), rank 1 the climb from it
    # ends at 5.76, and from a point beside it at 7.2.
    starts = jax.tree.map(_shaken, (outer, inner))
    image, evaluations = after(ambient, first), CLIMB
    if min(plain.shape) > multipliers.FINE:
        image, starts = jax.tree.map(lambda x: x.astype(jnp.float32), (image, starts))
        evaluations = CLIMB // 5
    climbed = _climb(image, rank, *starts, evaluations=evaluations)
    # The bound that they prove is computed in the precision of the matrix.
    climbed = jax.tree.map(lambda x: x.astype(plain.dtype), climbed)
    return jnp.maximum(first, _of_scalings(ambient, rank, *climbed))


def _climb(ambient, rank, outer: Pair, inner: Pair, evaluations: int):
    """Maximise the bound over `P`, `P'` (outer) and `Q`, `Q'` (inner)."""

    def ratio(pairs):
        outer, inner = pairs
        image = _scale(ambient, outer, inner)
        u = spectral.leading(jax.lax.stop_gradient(image), rank)[0]
        # The span of the leading vectors is stationary: their derivative is not needed.
        tail = jnp.sum(image**2) - jnp.sum(_mm(u.T, image) ** 2)
        return _spread(outer, inner, u) / tail

    def objective(pairs):
        value, gradient = jax.value_and_grad(ratio)(pairs)
        return value / first, jax.tree.map(lambda x: x / first, gradient)

    first = jax.lax.stop_gradient(ratio((outer, inner)))
    first = jnp.where(first > 0, first, 1)
    state = descent.init((outer, inner), factored)
    state = descent.restart(state, step=1.0, geometry=factored)
    limits = descent.Limits(1e-7, evaluations)
    return descent.minimize(objective, state, limits, factored).points


def _shaken(x):
    key = jax.random.fold_in(jax.random.key(0), len(x))
    return x + SHAKEN * jax.random.normal(key, x.shape, x.dtype)


def _scale(ambient, outer: Pair, inner: Pair):
    """Return `R(G T Hᵀ)`: the rows by `P ⊗ P'`, the columns by `Q ⊗ Q'`."""
    m1, n1 = len(outer.a), len(outer.b)
    m2, n2 = len(inner.a), len(inner.b)
    tensor = ambient.reshape(m1, n1, m2, n2)
    tensor = jnp.einsum("xi,iapb->xapb", outer.a, tensor, precision="highest")
    tensor = jnp.einsum("ya,xapb->xypb", outer.b, tensor, precision="highest")
    tensor = jnp.einsum("zp,xypb->xyzb", inner.a, tensor, precision="highest")
    tensor = jnp.einsum("wb,xyzb->xyzw", inner.b, tensor, precision="highest")
    return tensor.reshape(m1 * n1, m2 * n2)


def _spread(outer: Pair, inner: Pair, last):
    """Return `Σ_i σ_i(G)² σ_i(H)²`, differentiable by first-order perturbation."""
    squares = []
    for factor in (outer.a, inner.a, outer.b, inner.b):
        gram = _mm(factor.T, factor)
        fixed = after(jax.lax.stop_gradient(gram), jax.lax.stop_gradient(last))
        last = vectors = jnp.linalg.eigh(fixed)[1]
        squares.append(jnp.sum(vectors * _mm(gram, vectors), axis=0))
    left, right = (
        jnp.sort(jnp.outer(x, y).ravel(), descending=True)
        for x, y in (squares[:2], squares[2:])
    )
    count = min(len(left), len(right))
    return jnp.sum(left[:count] * right[:count])


def _of_scalings(ambient, rank, outer: Pair, inner: Pair):
    """Return the bound that the four factors prove."""
    image = _scale(ambient, outer, inner)
    size = jnp.linalg.norm(ambient)
    for factor in (outer.a, outer.b, inner.a, inner.b):
        size = size * jnp.linalg.norm(factor)
    tail, s = _tail(image, rank, size)
    return _quotient(tail, _spread(outer, inner, s), image.size)


def _of_weights(plain, rank, space):
    """Return the bound that the nearest Kronecker products of the weights prove."""
    (frame,), (inverses,), (shapes,) = space.frames, space.inverses, space.shapes
    image = rearrange(weighted.to_start(plain, *inverses), shapes[0])
    size = jnp.linalg.norm(plain)
    for back in inverses:
        if back is not None:
            size *= jnp.linalg.norm(back.first) * jnp.linalg.norm(back.second)
    tail, last = _tail(image, rank, size)
    spectra = []
    for side, length in zip((frame.left, frame.right), plain.shape, strict=True):
        squares = jnp.ones(length, plain.dtype)
        if side is not None and side.whole is not None:
            last = jnp.linalg.svd(after(side.whole, last), compute_uv=False)
            eps = float(jnp.finfo(last.dtype).eps)
            least = last - 8 * length**0.5 * eps * last[0]
            squares = 1 / jnp.maximum(least, 0)[::-1] ** 2
        spectra.append(squares)
    count = min(plain.shape)
    spread = jnp.sum(spectra[0][:count] * spectra[1][:count])
    return _quotient(tail, spread, image.size)


def _tail(image, rank, size):
    """Return a lower bound of `(Σ_{i>r} s_i²)^{1/2}`, and the singular values.

    The rounding of the image is relative to `size`, the product of the norms of all
    its factors.
    """
    s = jnp.linalg.svd(image, compute_uv=False)
    eps = float(jnp.finfo(image.dtype).eps)
    tail = jnp.linalg.norm(s[rank:])
    # The distance to low rank changes at most as much as the matrix.
    return tail - 8 * sum(image.shape) ** 0.5 * eps * size, s


def _quotient(tail, spread, size):
    eps = float(jnp.finfo(tail.dtype).eps)
    spread = spread * (1 + 32 * size**0.5 * eps)
    bound = tail / jnp.sqrt(jnp.where(spread > 0, spread, 1))
    return jnp.where((spread > 0) & jnp.isfinite(bound), jnp.maximum(bound, 0), 0)


def _mm(x, y):
    return jnp.matmul(x, y, precision="highest")
