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
class History:
    """What is remembered of past steps.

    Attributes:
        pairs: `[2h, d]`: `h` displacements and their `h` differences of gradients, each
            pair in its own slot.
        products: `[2h, 2h]`, their inner products.
        curvature: `[h]`, `<s, y>`; zero marks a slot that is empty or useless.
        count: Pairs seen so far; `count % h` is the slot of the next one.
    """

    pairs: jax.Array
    products: jax.Array
    curvature: jax.Array
    count: jax.Array


def empty(vector: jax.Array, memory: int = MEMORY) -> History:
    """Return a history without pairs.

    Args:
        vector: `[d]`, any one, for its shape and dtype.
        memory: `h`.
    """
    return History(
        pairs=jnp.zeros((2 * memory, len(vector)), vector.dtype),
        products=jnp.zeros((2 * memory, 2 * memory), vector.dtype),
        curvature=jnp.zeros(memory, vector.dtype),
        count=jnp.array(0),
    )


def add(
    history: History, s: jax.Array, y: jax.Array, accepted: bool | jax.Array
) -> History:
    """Return the history with one more pair, or as it was where not `accepted`.

    Args:
        history: What is known.
        s: `[d]`, a displacement.
        y: `[d]`, how the gradient changed.
        accepted: Whether the step was made.
    """
    return _added(history, s, y, accepted)[0]


def direction(history: History, gradient: jax.Array) -> jax.Array:
    """Return `-H g`, `[d]`; where nothing is known, `-g`."""
    return _direction(history, gradient, _mm(history.pairs, gradient))


def advance(
    history: History,
    s: jax.Array,
    y: jax.Array,
    gradient: jax.Array,
    accepted: bool | jax.Array,
) -> tuple[History, jax.Array]:
    """Return both `add` and the `direction` after it, reading the pairs once less."""
    history, against = _added(history, s, y, accepted, gradient)
    return history, _direction(history, gradient, against)


def _added(history, s, y, accepted, *others):
    """Return the history with a pair, and the products of its pairs with a vector."""
    h = len(history.curvature)
    slot = history.count % h
    pairs = history.pairs
    # In place, and of one row each, where the history is the carry of a loop.
    for at, row in ((slot, s), (h + slot, y)):
        pairs = pairs.at[at].set(jnp.where(accepted, row, pairs[at]))
    new = _mm(pairs, jnp.stack([pairs[slot], pairs[h + slot], *others]).T)
    products = history.products
    for column, at in enumerate((slot, h + slot)):
        products = products.at[at].set(new[:, column]).at[:, at].set(new[:, column])
    sy, size = new[h + slot, 0], jnp.sqrt(new[slot, 0] * new[h + slot, 1])
    curvature = jnp.where(sy > 1e-8 * size, sy, 0)
    curvature = jnp.where(accepted, curvature, history.curvature[slot])
    return History(
        pairs=pairs,
        products=products,
        curvature=history.curvature.at[slot].set(curvature),
        count=history.count + jnp.asarray(accepted, history.count.dtype),
    ), (new[:, 2] if others else None)


def _direction(history, gradient, against):
    h = len(history.curvature)
    # Slots, the oldest first.
    order = (history.count + jnp.arange(h)) % h
    both = jnp.concatenate([order, h + order])
    curvature = history.curvature[order]
    filled = curvature > 0
    known = jnp.tile(filled, 2)
    products = history.products[both][:, both]
    products = jnp.where(known[:, None] & known[None], products, 0)
    against = jnp.where(known, against[both], 0)
    sy, yy = products[:h, h:], products[h:, h:]
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
    return -scale * gradient - _mm(weights, history.pairs)


def _mm(x, y):
    return jnp.matmul(x, y, precision="highest")
