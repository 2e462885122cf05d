"""Scores of the entries of a layer: the error of setting an entry to zero.

    score(w)² = ‖C^{1/2} (K(w) − K(0))‖_F²        C: [n_in, n_in], or the identity

with `K` the kernel as a function of that entry alone. For a plain kernel the score is
`|w_ij|`, and with moments `|w_ij| √C_ii`, the score of Wanda. For a sum `Σ_k A_k ⊗ B_k`

    |a_ij|  √tr(B_kᵀ C_ii B_k)        |b_pq|  √tr(A_kᵀ C^pp A_k)

with the blocks `C_ii` `[m2, m2]` and `C^pp` `[m1, m1]` of `C`. So the scores of all
parts of a layer, and of all layers, have the same unit, and do not change when `A` is
multiplied by a number and `B` divided by it. The layers compute them: `scores` in
`kronjax.nn.layers`.

References: Sun et al. (2024), for Wanda.

>>> kernel = jnp.array([[1.0, -2.0], [0.5, 0.0]], jnp.float32)
>>> of(nn.linear(kernel, None), np.diag([1.0, 16.0]))["kernel"].tolist()
[[1.0, 2.0], [2.0, 0.0]]
"""

import jax
import jax.numpy as jnp
import numpy as np

from kronjax import nn
from kronjax.lm.models.base import parameter_dtype


def of(
    layer: nn.Layer, moment: jax.Array | np.ndarray | None = None
) -> dict[str, jax.Array]:
    """Return the scores of all parts of a layer that can be pruned.

    Args:
        layer: A layer of any kind; entries that are masked already have score 0.
        moment: `[n_in, n_in]` of its input, or None.

    Returns:
        Arrays of the shapes of the parts, float32 or wider, by the names of `parts`:
        `kernel`; `a`, `b`, `a1`, ... of a sum; `columns` and `rest`.

    Raises:
        ValueError: If the layer cannot be pruned: a factor that is a product of two
            matrices has no entries of its own.
    """
    dtype = jnp.promote_types(parameter_dtype(layer), jnp.float32)
    given = None if moment is None else jnp.asarray(moment, dtype)
    with jax.default_matmul_precision("highest"):
        return nn.as_layer(layer).scores(given)
