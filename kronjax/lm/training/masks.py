"""Masks of the largest entries, or of n in every m, and the schedule of sparsity.

    s_t = s_0 + (s − s_0) (1 − (1 − t / T)³)        sparsity after t of T steps

The largest entries of any number of arrays are found without sorting: scores are not
negative, so their bits as integers have the same order, and 31 counts find the smallest
kept score, bit by bit. This works on arrays that are sharded over devices; the number
of kept entries is traced, so that one program serves a whole schedule. Of equal scores
the first are kept, so that exactly as many entries are kept as requested.

References: Zhu and Gupta (2017), for the schedule; Mishra et al. (2021), for n of m.

>>> keep_largest([jnp.array([3.0, 1.0, 2.0, 2.0])], 2)[0].tolist()
[True, False, True, False]
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def keep_largest(
    scores: Sequence[jax.Array], count: jax.Array | int
) -> list[jax.Array]:
    """Return masks of the `count` largest scores of all arrays together.

    Args:
        scores: Arrays of any shapes, not negative; compared in float32.
        count: Number of entries to keep.

    Returns:
        For each array a bool array of its shape; `count` entries in all are True.

    Raises:
        ValueError: If there are more than 2³¹ − 1 scores, too many for an int32.
    """
    total = sum(x.size for x in scores)
    if total > np.iinfo(np.int32).max:
        raise ValueError(
            f"{total:,} entries are too many to compare at once: prune by layers"
        )
    ordered = [
        jax.lax.bitcast_convert_type(jnp.abs(x).astype(jnp.float32), jnp.int32)
        for x in scores
    ]
    count = jnp.asarray(count, jnp.int32)

    def number(condition):
        counts = [jnp.sum(condition(x), dtype=jnp.int32) for x in ordered]
        return sum(counts, jnp.zeros((), jnp.int32))

    def bit(i, threshold):
        higher = threshold | (jnp.int32(1) << (30 - i))
        return jnp.where(number(lambda x: x >= higher) >= count, higher, threshold)

    threshold = jax.lax.fori_loop(0, 31, bit, jnp.zeros((), jnp.int32))
    ties = count - number(lambda x: x > threshold)
    masks = []
    for x in ordered:
        equal = (x == threshold).ravel()
        place = jnp.cumsum(equal, dtype=jnp.int32)
        first = (equal & (place <= ties)).reshape(x.shape)
        masks.append((x > threshold) | first)
        ties = ties - place[-1] if x.size else ties
    return masks


def keep_pattern(scores: jax.Array, kept: jax.Array | int, group: int) -> jax.Array:
    """Return a mask of the `kept` largest of every `group` consecutive inputs.

    Args:
        scores: `[..., n_in, n_out]`; groups are along the inputs, which a product sums
            over, as hardware requires.
        kept: Number of kept entries of each group.
        group: Size of a group; divides `n_in`.

    Returns:
        `[..., n_in, n_out]`, bool.
    """
    *batch, m, n = scores.shape
    groups = scores.reshape(*batch, m // group, group, n)
    # A stable sort keeps the order of equal scores.
    order = jnp.argsort(-groups, axis=-2, stable=True)
    rank = jnp.argsort(order, axis=-2)
    return (rank < kept).reshape(scores.shape)


def sparsity_at(step: int, begin: int, steps: int, final: float) -> float:
    """Return the sparsity at a step of a cubic schedule.

    >>> [round(sparsity_at(t, 0, 4, 0.5), 3) for t in range(6)]
    [0.0, 0.289, 0.438, 0.492, 0.5, 0.5]

    Args:
        step: The number of the step.
        begin: The step from which on sparsity rises from zero.
        steps: Number of steps in which it rises; 0 for at once.
        final: The sparsity at the end.
    """
    if step < begin:
        return 0.0
    if step >= begin + steps:
        return final
    return final * (1 - (1 - (step - begin) / steps) ** 3)
