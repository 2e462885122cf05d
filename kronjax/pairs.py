"""Curvature pairs of L-BFGS: plain linear algebra on coordinates.

A pair is a displacement s and the difference y of the gradients at its ends; `h` of
them are kept, the oldest gives its place to the next one. The inverse Hessian

    H = γ I + [S, γ Y] [[R⁻ᵀ (D + γ YᵀY) R⁻¹, −R⁻ᵀ], [−R⁻¹, 0]] [S, γ Y]ᵀ

with `SᵀY = L + R`, R upper triangular with diagonal D, is applied in this compact form.
All inner products of pairs are kept beside them, so that a step reads the pairs twice:
once for their products with what is new, and once to add them up.

Tangent vectors are their coordinates here, whatever point they belong to: on a manifold
pairs keep the coordinates of the point where they were made. Carried along by
projection, as they used to be, they took as many products on random matrices and on
those of GPT-2, and most of the time of a step at high rank.

References: Byrd, Nocedal and Schnabel (1994); Huang, Gallivan and Absil (2015), for
vector transport that leaves coordinates alone.

>>> import jax.numpy as jnp
>>> one = add(empty(jnp.zeros(2), 3), jnp.array([1.0, 0]), jnp.array([4.0, 0]), True)
>>> direction(one, jnp.array([8.0, 8.0])).tolist()
[-2.0, -2.0]
"""

import dataclasses

import jax
import jax.numpy as jnp

MEMORY = 10
"""Pairs kept, if nobody says otherwise."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
    """What is remembered of past steps.

    Attributes:
        vectors: `[2h, d]`: `h` displacements, then their `h` differences of gradients;
            each pair has a slot.
        products: `[2h, 2h]`, their inner products.
        curvature: `[h]`, `<s, y>`; zero marks a slot that is empty or useless.
        count: Pairs seen so far; `count % h` is the slot of the next one.
    """

    vectors: jax.Array
    products: jax.Array
    curvature: jax.Array
    count: jax.Array


def empty(vector: jax.Array, memory: int = MEMORY) -> Pairs:
    """Return what is known at the beginning: no pairs.

    Args:
        vector: `[d]`, any one, for its shape and dtype.
        memory: `h`.
    """
    return Pairs(
        vectors=jnp.zeros((2 * memory, len(vector)), vector.dtype),
        products=jnp.zeros((2 * memory, 2 * memory), vector.dtype),
        curvature=jnp.zeros(memory, vector.dtype),
        count=jnp.array(0),
    )


def add(pairs: Pairs, s: jax.Array, y: jax.Array, accepted: bool | jax.Array) -> Pairs:
    """Return the pairs with one more, or as they were where not `accepted`.

    Args:
        pairs: What is known.
        s: `[d]`, a displacement.
        y: `[d]`, how the gradient changed.
        accepted: Whether the step was made.
    """
    return _added(pairs, s, y, accepted)[0]


def direction(pairs: Pairs, gradient: jax.Array) -> jax.Array:
    """Return `-H g`, `[d]`; where nothing is known, `-g`."""
    return _direction(pairs, gradient, _mm(pairs.vectors, gradient))


def advance(
    pairs: Pairs,
    s: jax.Array,
    y: jax.Array,
    gradient: jax.Array,
    accepted: bool | jax.Array,
) -> tuple[Pairs, jax.Array]:
    """Return both `add` and the `direction` after it, reading the pairs once less."""
    pairs, against = _added(pairs, s, y, accepted, gradient)
    return pairs, _direction(pairs, gradient, against)


def _added(pairs, s, y, accepted, *others):
    """Return the pairs with one more, and the products of all with a vector."""
    h = len(pairs.curvature)
    slot = pairs.count % h
    vectors = pairs.vectors
    # In place, and of one row each, where they are the carry of a loop.
    for at, row in ((slot, s), (h + slot, y)):
        vectors = vectors.at[at].set(jnp.where(accepted, row, vectors[at]))
    new = _mm(vectors, jnp.stack([vectors[slot], vectors[h + slot], *others]).T)
    # By masks: a scatter is slow where lanes have slots of their own.
    products, rows = pairs.products, jnp.arange(2 * h)
    for column, at in zip(new.T, (slot, h + slot), strict=False):
        products = jnp.where(rows[:, None] == at, column[None], products)
        products = jnp.where(rows[None] == at, column[:, None], products)
    sy, size = new[h + slot, 0], jnp.sqrt(new[slot, 0] * new[h + slot, 1])
    curvature = jnp.where(sy > 1e-8 * size, sy, 0)
    curvature = jnp.where(accepted, curvature, pairs.curvature[slot])
    return Pairs(
        vectors=vectors,
        products=products,
        curvature=pairs.curvature.at[slot].set(curvature),
        count=pairs.count + jnp.asarray(accepted, pairs.count.dtype),
    ), (new[:, 2] if others else None)


def _direction(pairs, gradient, against):
    h = len(pairs.curvature)
    # Slots, the oldest first.
    order = (pairs.count + jnp.arange(h)) % h
    both = jnp.concatenate([order, h + order])
    curvature = pairs.curvature[order]
    filled = curvature > 0
    known = jnp.tile(filled, 2)
    of_y = pairs.products[h + order][:, both]
    of_y = jnp.where(filled[:, None] & known[None], of_y, 0)
    against = jnp.where(known, against[both], 0)
    sy, yy = of_y[:, :h].T, of_y[:, h:]
    upper = jnp.triu(sy, 1) + jnp.diag(jnp.where(filled, curvature, 1))
    newest = jnp.max(jnp.where(filled, jnp.arange(h), -1))
    scale = jnp.where(
        newest < 0, 1, curvature[newest] / jnp.maximum(yy[newest, newest], 1e-30)
    ).astype(curvature.dtype)
    solve = jax.scipy.linalg.solve_triangular
    q = solve(upper, against[:h])
    by_s = solve(upper, curvature * q + scale * (_mm(yy, q) - against[h:]), trans=1)
    weights = jnp.zeros(2 * h, scale.dtype)
    weights = weights.at[both].set(jnp.concatenate([by_s, -scale * q]))
    return -scale * gradient - _mm(weights, pairs.vectors)


def _mm(x, y):
    return jnp.matmul(x, y, precision="highest")
