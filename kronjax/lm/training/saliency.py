"""What every entry of a layer is worth: the error that its loss would make.

    score(w)² = ‖C^{1/2} (K(w) − K(0))‖_F²        C: [n_in, n_in], or the identity

with `K` the kernel as a function of that one entry. Of a plain kernel that is `|w_ij|`,
and with moments `|w_ij| √C_ii`, the score of Wanda. Of a sum `Σ_k A_k ⊗ B_k`

    |a_ij|  √tr(B_kᵀ C_ii B_k)        |b_pq|  √tr(A_kᵀ C^pp A_k)

with the blocks `C_ii` `[m2, m2]` and `C^pp` `[m1, m1]` of `C`. So scores of all parts
of a layer, and of all layers, are in one unit, and do not change when `A` is multiplied
by what `B` is divided by.

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

Place = str | tuple[str, int]
"""Where in a layer a part is: an attribute, and its place if that is a list."""


def of(
    layer: nn.Layer, moment: jax.Array | np.ndarray | None = None
) -> dict[Place, jax.Array]:
    """Return the scores of all parts of a layer that can be pruned.

    Args:
        layer: Of any kind; what is masked already has score 0.
        moment: `[n_in, n_in]` of its input, or None.

    Returns:
        By place: `"kernel"`; `("a", c)` and `("b", c)` of a sum; `"columns"` and
        `"rest"`. Of the shapes of the parts, float32 or wider.

    Raises:
        ValueError: If a factor is a product of two, whose entries are not its own.
    """
    dtype = jnp.promote_types(parameter_dtype(layer), jnp.float32)
    given = None if moment is None else jnp.asarray(moment, dtype)
    with jax.default_matmul_precision("highest"):
        if isinstance(layer, nn.KroneckerLinear):
            return _of_sums(layer, given)
        if isinstance(layer, nn.InterpolativeLinear):
            return _of_interpolative(layer, given)
        kernel = jnp.abs(_wide(nn.dense(layer).kernel[...]))
        if given is not None:
            kernel = kernel * _root(jnp.diagonal(given))[:, None]
        return {"kernel": kernel}


def _of_sums(layer, moment) -> dict[Place, jax.Array]:
    if moment is not None and layer.inputs is not None:
        order = layer.inputs[...]
        moment = moment[order][:, order]
    scores: dict[Place, jax.Array] = {}
    for c, (a, b) in enumerate(zip(layer.a, layer.b, strict=True)):
        if any(isinstance(x, nn.LowRankFactor) for x in (a, b)):
            raise ValueError(
                "a factor of low rank inside of a Kronecker layer has no entries of "
                "its own to prune"
            )
        a, b = _wide(a[...]), _wide(b[...])
        if moment is None:
            of_a = jnp.sum(b**2, axis=(1, 2))[:, None]
            of_b = jnp.sum(a**2, axis=(1, 2))[:, None]
        else:
            m1, m2 = a.shape[1], b.shape[1]
            blocks = moment.reshape(m1, m2, m1, m2)
            of_a = jnp.einsum("kpn,ipiq,kqn->ki", b, blocks, b)
            of_b = jnp.einsum("kin,ipjp,kjn->kp", a, blocks, a)
        if layer.scales is not None:
            scale = jnp.square(_wide(layer.scales[c][...]))[:, None]
            of_a, of_b = of_a * scale, of_b * scale
        scores["a", c] = jnp.abs(a) * _root(of_a)[:, :, None]
        scores["b", c] = jnp.abs(b) * _root(of_b)[:, :, None]
    return scores


def _of_interpolative(layer, moment) -> dict[Place, jax.Array]:
    columns, rest = _wide(layer.columns[...]), _wide(layer.rest[...])
    sums = 1 + jnp.sum(rest**2, axis=1)
    seen = columns if moment is None else moment @ columns
    energies = jnp.sum(columns * seen, axis=0)
    ins = 1 if moment is None else _root(jnp.diagonal(moment))[:, None]
    return {
        "columns": jnp.abs(columns) * _root(sums) * ins,
        "rest": jnp.abs(rest) * _root(energies)[:, None],
    }


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _root(x):
    return jnp.sqrt(jnp.maximum(x, 0))
