"""Layers of low rank that store an interpolative decomposition.

    kernel = (C [1, Z])[:, outputs]        C: [n_in, r],  Z: [r, n_out − r]

A matrix of rank r has r² fewer degrees of freedom than the `r (n_in + n_out)` numbers
of two factors: all of its columns are combinations of r of them. The interpolative
decomposition stores those columns and the combinations, which is exact, and saves as
many operations.

References: Cheng, Gimbutas, Martinsson and Rokhlin (2005); Zhao et al. (2025), for
language models.

>>> layer = InterpolativeLinear.of(jnp.ones((4, 2)), jnp.ones((2, 5)))
>>> layer.rank, layer.cost().parameters
(2, 14)
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kronjax.nn import factors
from kronjax.nn.layers import (
    LinearLayer,
    Order,
    abstract,
    check_bias,
    describe_parts,
    permutation,
    register,
    root,
    sizes,
    wide,
)


@register
class InterpolativeLinear(LinearLayer):
    """A linear layer of low rank, some of whose outputs are combinations of the others.

    Attributes:
        columns: `nnx.Param` `[n_in, r]`, the columns `C`.
        rest: `nnx.Param` `[r, n_out − r]`, the combinations `Z`.
        outputs: `Order` `[n_out]`, the column of `C [1, Z]` that becomes each output.
        bias: `nnx.Param` `[n_out]`, or None.

    Args:
        columns: `[n_in, r]`.
        rest: `[r, n_out − r]`.
        outputs: `[n_out]`, integers, a permutation.
        bias: `[n_out]`, or None for no bias.

    Raises:
        ValueError: If the shapes do not match.
    """

    kind: ClassVar[str] = "interpolative"

    def __init__(
        self,
        columns: jax.Array,
        rest: jax.Array,
        outputs: jax.Array | np.ndarray,
        bias: jax.Array | None = None,
    ) -> None:
        """Store the columns and the combinations."""
        if columns.ndim != 2 or rest.ndim != 2 or columns.shape[1] != rest.shape[0]:
            raise ValueError(
                f"columns {columns.shape} and rest {rest.shape} must be matrices "
                "[n_in, r] and [r, n_out - r]"
            )
        self.in_features = columns.shape[0]
        self.out_features = sum(rest.shape)
        order = permutation(outputs, self.out_features, "outputs")
        check_bias(bias, self.out_features)
        self.columns = nnx.Param(columns)
        self.rest = nnx.Param(rest)
        self.outputs = Order(jnp.asarray(order, jnp.int32))
        self.bias = None if bias is None else nnx.Param(bias)

    @classmethod
    def of(
        cls,
        left: jax.Array | np.ndarray,
        right: jax.Array | np.ndarray,
        bias: jax.Array | None = None,
        dtype: Any = None,
    ) -> "InterpolativeLinear":
        """Return the layer of the kernel `left @ right`.

        Args:
            left: `[n_in, r]`.
            right: `[r, n_out]`; columns are picked by a pivoted QR decomposition of
                it, in float64.
            bias: `[n_out]`, or None for no bias.
            dtype: Dtype of the parameters; that of `left` by default.
        """
        import scipy.linalg

        a, b = (np.asarray(x, np.float64) for x in (left, right))
        r = a.shape[1]
        # Orthonormal rows first: the pivots then depend on the product, not on a
        # factor.
        q, triangle = np.linalg.qr(a)
        b = triangle @ b
        decomposed: Any = scipy.linalg.qr(b, mode="economic", pivoting=True)
        _, upper, pivots = decomposed
        rest = np.linalg.lstsq(upper[:, :r], upper[:, r:], rcond=1e-12)[0]
        dtype = left.dtype if dtype is None else dtype
        columns = jnp.asarray(q @ b[:, pivots[:r]], dtype)
        return cls(columns, jnp.asarray(rest, dtype), np.argsort(pivots), bias)

    @classmethod
    def outline(cls, description: Mapping[str, Any]) -> "InterpolativeLinear":
        """Return the layer of a `describe`, with abstract float32 arrays."""
        (n_in, n_out), (rank,) = (
            sizes(description["shape"]),
            sizes([description["rank"]]),
        )
        if rank > n_out:
            raise TypeError(f"rank {rank} of {n_out} outputs")

        def make(columns, rest, bias):
            return cls(columns, rest, np.arange(n_out), bias)

        layer = nnx.eval_shape(
            make,
            abstract((n_in, rank)),
            abstract((rank, n_out - rank)),
            abstract((n_out,)) if description["bias"] else None,
        )
        for name, how in description.get("held", {}).items():
            part = layer.parts()[name]
            layer.set_part(name, factors.from_description(how, part.shape))
        return layer

    @property
    def rank(self) -> int:
        """The rank `r`."""
        return self.rest.shape[0]

    def parts(self) -> dict[str, Any]:
        """Return the columns and the combinations."""
        return {"columns": self.columns, "rest": self.rest}

    def describe(self) -> dict[str, Any]:
        """Return the structure without the numbers, as values that JSON knows."""
        return {
            **super().describe(),
            "rank": self.rank,
            **describe_parts(**self.parts()),
        }

    def summary(self) -> str:
        """Return the rank in words."""
        masked = any(isinstance(x, factors.MaskedFactor) for x in self.parts().values())
        return f"rank {self.rank}, interpolative" + ", masked" * masked

    def materialize(self) -> jax.Array:
        """Multiply out, in the order of the outputs: `[n_in, n_out]`."""
        columns = self.columns[...]
        more = jnp.matmul(columns, self.rest[...], precision="highest")
        both = jnp.concatenate([columns, more], axis=1)
        return both[:, self.outputs[...]]

    def scores(self, moment: jax.Array | None) -> dict[str, jax.Array]:
        """Return the scores of the columns and of the combinations."""
        columns, rest = wide(self.columns[...]), wide(self.rest[...])
        sums = 1 + jnp.sum(rest**2, axis=1)
        seen = columns if moment is None else moment @ columns
        energies = jnp.sum(columns * seen, axis=0)
        inputs = 1 if moment is None else root(jnp.diagonal(moment))[:, None]
        return {
            "columns": jnp.abs(columns) * root(sums) * inputs,
            "rest": jnp.abs(rest) * root(energies)[:, None],
        }

    def reorder_outputs(self, order: np.ndarray) -> "InterpolativeLinear":
        """Return a layer whose output `i` is output `order[i]` of this one."""
        outputs = np.asarray(self.outputs[...])[order]
        bias = None if self.bias is None else self.bias[...][order]
        layer = InterpolativeLinear(self.columns[...], self.rest[...], outputs, bias)
        layer.columns, layer.rest = self.columns, self.rest  # masked ones, too
        return layer

    def reorder_inputs(self, order: np.ndarray) -> "InterpolativeLinear":
        """Return a layer whose input `i` is input `order[i]` of this one."""
        layer = InterpolativeLinear(
            self.columns[...][order], self.rest[...], self.outputs[...], self.bias_value
        )
        part: Any = self.columns
        if isinstance(part, factors.MaskedFactor):
            value, mask = part.value[...], part.mask[...]
            masked: Any = factors.MaskedFactor(value[order], mask[order])
            layer.columns = masked
        layer.rest = self.rest
        return layer

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `x @ kernel + bias`: `[..., n_in]` to `[..., n_out]`."""
        y = x @ self.columns[...]
        y = jnp.concatenate([y, y @ self.rest[...]], axis=-1)
        return self.add_bias(jnp.take(y, self.outputs[...], axis=-1))
