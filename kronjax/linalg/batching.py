"""Control flow and order of computation for the lanes of a batch.

`vmap` turns `cond` into both of its branches and a selection between them, and makes a
`while_loop` copy its whole carry, once per iteration, for the lanes that are done. A
predicate that is the same for every lane (`any_lane`) avoids both.

XLA runs independent computations at the same time. Two batched LAPACK calls can then
wait for worker threads that the other one holds: with two cores, for ever (seen with
jaxlib 0.10). Decompositions of matrices are therefore made in turn (`after`,
`in_turn`), and only one of Q and R is taken from a QR decomposition: a computation that
needs R alone would run beside the one that forms Q.

>>> import jax, jax.numpy as jnp
>>> jax.vmap(any_lane)(jnp.array([False, True])).tolist()
[True, True]
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


@jax.custom_batching.custom_vmap
def any_lane(flag: jax.Array) -> jax.Array:
    """Return the boolean `flag`; under `vmap`, whether any lane raises it."""
    return flag


@any_lane.def_vmap
def _any_lane_batched(axis_size, in_batched, flag):
    return any_lane(jnp.any(flag, axis=0) if in_batched[0] else flag), False


def select(condition: jax.Array | bool, x, y):
    """Return the pytree `x` where the condition holds, and `y` elsewhere."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), x, y)


@jax.custom_batching.custom_vmap
def pick(condition: jax.Array, x, y):
    """Return the same as `select`, by a branch where there is one lane.

    A branch copies less of large arrays. Under `vmap` it would pay only if all lanes
    agreed, which a single lane does.
    """
    return jax.lax.cond(condition, lambda: x, lambda: y)


@pick.def_vmap
def _pick_batched(axis_size, in_batched, condition, x, y):
    given, all_batched = (condition, x, y), jax.tree.map(lambda _: True, x)
    if axis_size == 1:
        lane = jax.tree.map(lambda x, own: x[0] if own else x, given, tuple(in_batched))
        return jax.tree.map(lambda x: x[None], pick(*lane)), all_batched
    axes = jax.tree.map(lambda own: 0 if own else None, tuple(in_batched))
    return jax.vmap(select, axes, axis_size=axis_size)(*given), all_batched


def after(x: jax.Array, other: jax.Array) -> jax.Array:
    """Return `x`, made to depend on the finite array `other`.

    `x` is then computed after `other`: XLA keeps a product with zero as a dependency.
    """
    return x + 0 * jnp.sum(other)


def in_turn(function: Callable, *tuples: tuple) -> tuple:
    """Map `function` over tuples of pytrees of floats, each call after the last."""
    results = []
    for arguments in zip(*tuples, strict=True):
        if results:
            last = jnp.stack([jnp.sum(x) for x in jax.tree.leaves(results[-1])])
            arguments = jax.tree.map(lambda x, last=last: after(x, last), arguments)
        results.append(function(*arguments))
    return tuple(results)
