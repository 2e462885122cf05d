"""Which entries are kept: the largest so many, or n of every m; and when.

    s_t = s_0 + (s − s_0) (1 − (1 − t / T)³)        sparsity after t of T steps

The largest entries of any number of arrays are found without sorting: scores are not
negative, so their bits as integers have the same order, and 31 counts find the last
one that is kept, bit by bit. That works on arrays that are spread over devices, the
number to keep is traced, and so one program serves a whole schedule. Ties go to the
first, so that exactly as many are kept as were asked for.

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
        scores: Of any shapes, not negative; compared in float32.
        count: How many to keep.

    Returns:
        For each array a bool array of its shape; `count` entries are True.

    Raises:
        ValueError: If there are more than 2³¹ − 1 scores, which are not counted.
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
            over, as hardware wants them.
        kept: Of each group.
        group: Divides `n_in`.

    Returns:
        `[..., n_in, n_out]`, bool.
    """
    *batch, m, n = scores.shape
    groups = scores.reshape(*batch, m // group, group, n)
    # Stable, so that of equal ones the first come first.
    order = jnp.argsort(-groups, axis=-2, stable=True)
    rank = jnp.argsort(order, axis=-2)
    return (rank < kept).reshape(scores.shape)


def sparsity_at(step: int, begin: int, steps: int, final: float) -> float:
    """Return the sparsity that a cubic schedule asks for.

    >>> [round(sparsity_at(t, 0, 4, 0.5), 3) for t in range(6)]
    [0.0, 0.289, 0.438, 0.492, 0.5, 0.5]

    Args:
        step: Now.
        begin: From where on it rises from zero.
        steps: In which it rises; 0 for at once.
        final: Where it ends.
    """
    if step < begin:
        return 0.0
    if step >= begin + steps:
        return final
    return final * (1 - (1 - (step - begin) / steps) ** 3)
