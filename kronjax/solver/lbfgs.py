"""Curvature pairs of L-BFGS: plain linear algebra on coordinates.

A pair is a displacement s and the difference y of the gradients at its ends; the last
`h` pairs are kept. The inverse Hessian

    H = γ I + [S, γ Y] [[R⁻ᵀ (D + γ YᵀY) R⁻¹, −R⁻ᵀ], [−R⁻¹, 0]] [S, γ Y]ᵀ

with `SᵀY = L + R`, R upper triangular with diagonal D, is applied in this compact form.
All inner products of pairs are kept beside them, so that a step reads the pairs twice:
once for their products with the new vectors, and once to add them up. There is one slot
more than pairs: a new pair is written there without reading the pair that it replaces,
and counts once it is accepted. A loop that read the slot first would copy all pairs.

Tangent vectors are represented by their coordinates, whatever point they belong to: on
a manifold, pairs keep the coordinates of the point where they were made. Transporting
them by projection took as many products on random matrices and on those of GPT-2, and
most of the time of a step at high rank.

References: Byrd, Nocedal and Schnabel (1994); Huang, Gallivan and Absil (2015), for
vector transport that leaves coordinates alone.

>>> import jax.numpy as jnp
>>> pairs = add(empty(jnp.zeros(2), 3), jnp.array([1.0, 0]), jnp.array([4.0, 0]), True)
>>> direction(pairs, jnp.array([8.0, 8.0])).tolist()
[-2.0, -2.0]
"""

import dataclasses

import jax
import jax.numpy as jnp

MEMORY = 10
"""Default number of pairs that are kept."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """The curvature pairs of past steps.

    Attributes:
        vectors: Displacements, then their differences of gradients, `[2(h+1), d]`; each
            pair has a slot.
        products: Inner products of all vectors, `[2(h+1), 2(h+1)]`.
        curvature: `<s, y>` of each slot, `[h+1]`; zero marks a slot that is empty or
            useless. The content of the slot of the next pair is ignored.
        count: Number of pairs accepted so far; `count % (h+1)` is the slot of the next
            pair.
    """

    vectors: jax.Array
    products: jax.Array
    curvature: jax.Array
    count: jax.Array


def empty(vector: jax.Array, memory: int = MEMORY) -> Memory:
    """Return a memory without pairs.

    Args:
        vector: Any vector `[d]`, for its shape and dtype.
        memory: Number of pairs `h` that are kept.
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
    """Return the pairs with a new pair if it is accepted, otherwise as they were.

    Args:
        pairs: The pairs so far.
        s: Displacement, `[d]`.
        y: Change of the gradient, `[d]`.
        accepted: Whether the step was made; if not, zeros are written into the slot of
            the next pair.
    """
    return _added(pairs, s, y, accepted)[0]


def direction(pairs: Memory, gradient: jax.Array) -> jax.Array:
    """Return `-H g`, `[d]`, which is `-g` without pairs."""
    return _direction(pairs, gradient, _mm(pairs.vectors, gradient))


def advance(
    pairs: Memory,
    s: jax.Array,
    y: jax.Array,
    gradient: jax.Array,
    accepted: bool | jax.Array,
) -> tuple[Memory, jax.Array]:
    """Return `add(…)` and the `direction` after it, with one reading of pairs less."""
    pairs, against = _added(pairs, s, y, accepted, gradient)
    return pairs, _direction(pairs, gradient, against)


def _added(pairs, s, y, accepted, *others):
    """Return the pairs with a new pair, and the products of all with another vector."""
    slots = len(pairs.curvature)
    slot = pairs.count % slots
    places = slot, slots + slot
    # A rejected pair may be infinite: zeros keep it out of later sums.
    rows = [jnp.where(accepted, row, 0) for row in (s, y)]
    vectors = pairs.vectors
    for at, row in zip(places, rows, strict=True):
        vectors = vectors.at[at].set(row)
    new = _mm(vectors, jnp.stack([*rows, *others]).T)
    # By masks: a scatter is slow where lanes have different slots.
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
    # The oldest first; all but the slot of the next pair.
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
