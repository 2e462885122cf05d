"""Curvature pairs of L-BFGS: plain linear algebra on coordinates.

A pair is a displacement s and the difference y of the gradients at its ends; the last
`h` of them are kept. The inverse Hessian

    H = γ I + [S, γ Y] [[R⁻ᵀ (D + γ YᵀY) R⁻¹, −R⁻ᵀ], [−R⁻¹, 0]] [S, γ Y]ᵀ

with `SᵀY = L + R`, R upper triangular with diagonal D, is applied in this compact form.
All inner products of pairs are kept beside them, so that a step reads the pairs twice:
once for their products with what is new, and once to add them up. And there is one
slot more than pairs: what is new is written there without a look at what it replaces,
and counts once it is accepted. A loop that read there first would copy all pairs.

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
class Memory:
    """What is remembered of past steps.

    Attributes:
        vectors: `[2(h+1), d]`: displacements, then their differences of gradients; each
            pair has a slot.
        products: `[2(h+1), 2(h+1)]`, their inner products.
        curvature: `[h+1]`, `<s, y>`; zero marks a slot that is empty or useless. What
            the slot of the next one holds does not count.
        count: Pairs accepted so far; `count % (h+1)` is the slot of the next one.
    """

    vectors: jax.Array
    products: jax.Array
    curvature: jax.Array
    count: jax.Array


def empty(vector: jax.Array, memory: int = MEMORY) -> Memory:
    """Return what is known at the beginning: no pairs.

    Args:
        vector: `[d]`, any one, for its shape and dtype.
        memory: `h`.
    """
    slots = memory + 1
    return Memory(
        vectors=jnp.zeros((2 * slots, len(vector)), vector.dtype),
        products=jnp.zeros((2 * slots, 2 * slots), vector.dtype),
        curvature=jnp.zeros(slots, vector.dtype),
        count=jnp.array(0),
    )


def add(
    pairs: Memory, s: jax.Array, y: jax.Array, accepted: bool | jax.Array
) -> Memory:
    """Return the pairs with one more, or those that count as they were.

    Args:
        pairs: What is known.
        s: `[d]`, a displacement.
        y: `[d]`, how the gradient changed.
        accepted: Whether the step was made; if not, zeros take the slot of the next.
    """
    return _added(pairs, s, y, accepted)[0]


def direction(pairs: Memory, gradient: jax.Array) -> jax.Array:
    """Return `-H g`, `[d]`; where nothing is known, `-g`."""
    return _direction(pairs, gradient, _mm(pairs.vectors, gradient))


def advance(
    pairs: Memory,
    s: jax.Array,
    y: jax.Array,
    gradient: jax.Array,
    accepted: bool | jax.Array,
) -> tuple[Memory, jax.Array]:
    """Return both `add` and the `direction` after it, reading the pairs once less."""
    pairs, against = _added(pairs, s, y, accepted, gradient)
    return pairs, _direction(pairs, gradient, against)


def _added(pairs, s, y, accepted, *others):
    """Return the pairs with one more, and the products of all with a vector."""
    slots = len(pairs.curvature)
    slot = pairs.count % slots
    places = slot, slots + slot
    # What is not accepted may be infinite, and is to be added up zero times.
    rows = [jnp.where(accepted, row, 0) for row in (s, y)]
    vectors = pairs.vectors
    for at, row in zip(places, rows, strict=True):
        vectors = vectors.at[at].set(row)
    new = _mm(vectors, jnp.stack([*rows, *others]).T)
    # By masks: a scatter is slow where lanes have slots of their own.
    products, numbers = pairs.products, jnp.arange(2 * slots)
    for column, at in zip(new.T, places, strict=False):
        products = jnp.where(numbers[:, None] == at, column[None], products)
        products = jnp.where(numbers[None] == at, column[:, None], products)
    sy, size = new[places[1], 0], jnp.sqrt(new[slot, 0] * new[places[1], 1])
    curvature = jnp.where(sy > 1e-8 * size, sy, 0)
    return Memory(
        vectors=vectors,
        products=products,
        curvature=pairs.curvature.at[slot].set(curvature),
        count=pairs.count + jnp.asarray(accepted, pairs.count.dtype),
    ), (new[:, 2] if others else None)


def _direction(pairs, gradient, against):
    slots = len(pairs.curvature)
    h = slots - 1
    # The oldest first; all but the slot of the next one.
    order = (pairs.count + 1 + jnp.arange(h)) % slots
    both = jnp.concatenate([order, slots + order])
    curvature = pairs.curvature[order]
    filled = curvature > 0
    known = jnp.tile(filled, 2)
    of_y = pairs.products[slots + order][:, both]
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
    weights = jnp.zeros(2 * slots, scale.dtype)
    weights = weights.at[both].set(jnp.concatenate([by_s, -scale * q]))
    return -scale * gradient - _mm(weights, pairs.vectors)


def _mm(x, y):
    return jnp.matmul(x, y, precision="highest")
