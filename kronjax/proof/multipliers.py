"""Multipliers of the leading singular values, which give candidates for local bounds.

Where the norm of `E = U Σ Vᵀ` is minimal, `U Λ Vᵀ` is orthogonal to all tangent vectors
for some `Λ ⪰ 0` of trace one on the leading singular vectors. Elsewhere some Λ makes
the tangential part of `U Λ Vᵀ` smallest; `bounds` subtracts that part, and the rest
proves a bound. Both methods start from the gradient of a Schatten norm, whose Λ is
diagonal:

- `climb` maximises `tr(Λ Σ) / σ_1 − c/2 ‖tangential part‖²` over all Λ by accelerated
  projected gradients, with an eigenvalue decomposition in every round;
- `balance` makes the tangential part small near the starting point, by products only.

References: Overton (1988), for the multipliers; Beck and Teboulle (2009), for the
gradients.

>>> weights(jnp.array([3.0, 1.0]), 2.0).tolist()
[0.75, 0.25]
"""

import jax
import jax.numpy as jnp

from kronjax.proof.tangent_map import TangentMap

CLUSTER = 384
"""Largest number of leading singular vectors whose multipliers are optimised. With all
768 of four 768×768 of GPT-2 gaps were 0.34, 0.15, 0.18 and 0.42 instead of 0.63, 0.17,
0.27 and 0.51 %, and the climb took four times as long."""

FINE = 256
"""Largest number of vectors for which the climb uses the precision of the matrix and
all penalties; above it uses float32 and skips the first two penalties."""

PENALTIES = 30.0, 300.0, 3000.0, 30000.0
"""Penalties on the tangential part, applied one after the other."""

ROUNDS = 50
"""Number of projected gradient steps with each penalty."""

BALANCED = 12
"""Default number of conjugate gradient steps of `balance`."""


def weights(s: jax.Array, p: float | jax.Array) -> jax.Array:
    """Return the singular values of the gradient of a Schatten norm, scaled to sum one.

    Args:
        s: `[k]`, singular values of the matrix, descending.
        p: Exponent of the norm.
    """
    powers = (s / jnp.where(s[0] > 0, s[0], 1)) ** (p - 1)
    return powers / jnp.maximum(jnp.sum(powers), 1)


def climb(
    space: TangentMap, u: jax.Array, s: jax.Array, vt: jax.Array, start: jax.Array
) -> jax.Array:
    """Return `U Λ Vᵀ` for the best Λ with each penalty, `[penalties, m, n]`.

    Args:
        space: Tangent space.
        u: `[m, k]`, orthonormal.
        s: `[k]`, descending.
        vt: `[k, n]`, orthonormal.
        start: `[k]`, the diagonal of the first Λ, for example from `weights`.
    """
    k = min(CLUSTER, len(s))
    fine = k <= FINE
    given = space, u[:, :k], s[:k] / jnp.where(s[0] > 0, s[0], 1), vt[:k], start[:k]
    given = jax.tree.map(lambda x: x.astype(s.dtype if fine else jnp.float32), given)
    climbed = _climb(given, PENALTIES if fine else PENALTIES[2:])
    return jax.lax.map(lambda x: _mm(u[:, :k], _mm(x, vt[:k])), climbed.astype(s.dtype))


def balance(
    space: TangentMap,
    u: jax.Array,
    vt: jax.Array,
    diagonal: jax.Array,
    rounds: int | jax.Array = BALANCED,
) -> jax.Array:
    """Return `U Λ Vᵀ`, `[m, n]`, with a small tangential part.

    `Λ = W^{1/2} (I + Z) W^{1/2}` with the diagonal W; Z is symmetric and found by
    conjugate gradients. They start at zero and stop early, so that Z stays small and Λ
    is positive, or nearly so.

    Args:
        space: Tangent space.
        u: `[m, k]`.
        vt: `[k, n]`.
        diagonal: `[k]`, the diagonal of W, for example from `weights`.
        rounds: Number of steps; may be traced.
    """
    root = jnp.sqrt(diagonal)
    left, right = u * root[None], root[:, None] * vt

    # The longer side of the matrix is multiplied only once.
    is_tall = len(left) > right.shape[1]

    def ambient(z):
        return _mm(left, _mm(z, right)) if is_tall else _mm(_mm(left, z), right)

    def pull(z):
        return space.pull(ambient(z))

    def slope(tangents):
        image = space.push(tangents)
        pulled = (
            _mm(_mm(left.T, image), right.T)
            if is_tall
            else _mm(left.T, _mm(image, right.T))
        )
        return (pulled + pulled.T) / 2

    def step(_, carry):
        z, rest, direction, size = carry
        image = pull(direction)
        stretch = space.length(image) ** 2
        length = size / jnp.where(stretch > 0, stretch, 1)
        rest = rest - length * slope(image)
        new = jnp.sum(rest**2)
        share = new / jnp.where(size > 0, size, 1)
        return z + length * direction, rest, rest + share * direction, new

    eye = jnp.eye(len(diagonal), dtype=u.dtype)
    rest = -slope(pull(eye))
    start = eye, rest, rest, jnp.sum(rest**2)
    z = jax.lax.fori_loop(0, rounds, step, start)[0]
    return ambient(z)


def _climb(given, penalties):
    """Return Λ after each penalty, `[penalties, k, k]`: FISTA on the spectraplex."""
    space, u, s, vt, diagonal = given
    stretch = _largest(space, _mm(u, vt))

    def slope(multipliers, penalty):
        tangential = space.push(space.pull(_mm(u, _mm(multipliers, vt))))
        gradient = penalty * _mm(u.T, _mm(tangential, vt.T))
        return (gradient + gradient.T) / 2 - jnp.diag(s)

    def leg(start, penalty):
        length = 1 / (penalty * stretch)

        def step(_, carry):
            here, ahead, momentum = carry
            there = _spectraplex(ahead - length * slope(ahead, penalty))
            new = (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2
            return there, there + (momentum - 1) / new * (there - here), new

        momentum = jnp.ones((), s.dtype)
        end = jax.lax.fori_loop(0, ROUNDS, step, (start, start, momentum))[0]
        return end, end

    return jax.lax.scan(leg, jnp.diag(diagonal), jnp.array(penalties, s.dtype))[1]


def _largest(space, start):
    """Return an upper estimate of the largest eigenvalue of push ∘ pull."""

    def power(_, carry):
        ambient, _ = carry
        image = space.push(space.pull(ambient))
        norm = jnp.linalg.norm(image)
        return image / jnp.where(norm > 0, norm, 1), norm

    start = start / jnp.maximum(jnp.linalg.norm(start), 1e-30)
    norm = jnp.ones((), start.dtype)
    return jnp.maximum(1.2 * jax.lax.fori_loop(0, 10, power, (start, norm))[1], 1)


def _spectraplex(symmetric):
    """Project onto the positive semidefinite matrices of trace one."""
    values, vectors = jnp.linalg.eigh(symmetric)
    falling = values[::-1]
    count = jnp.arange(1, len(values) + 1, dtype=values.dtype)
    shifts = (jnp.cumsum(falling) - 1) / count
    shift = shifts[jnp.sum(falling > shifts) - 1]
    return _mm(vectors * jnp.maximum(values - shift, 0)[None], vectors.T)


def _mm(x, y):
    return jnp.matmul(x, y, precision="highest")
