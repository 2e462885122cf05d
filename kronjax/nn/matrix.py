"""Dense and masked layers, and the adapters of `nnx.Linear` and `nnx.Embed`.

`as_layer` gives the layers of flax the methods of `kronjax.nn.layers`: the adapter
shares their variables, so that writing to one changes the other.

>>> layer = as_layer(linear(jnp.ones((2, 3)), None))
>>> layer.cost().flops, layer.summary()
(12, 'dense')
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kronjax.nn.factors import Mask, MaskedFactor
from kronjax.nn.layers import (
    LinearLayer,
    TableLayer,
    abstract,
    check_bias,
    register,
    sizes,
)


@register
class MaskedLinear(LinearLayer):
    """A linear layer whose kernel keeps only the entries of a mask.

    Attributes:
        kernel: `nnx.Param` `[n_in, n_out]`.
        mask: `Mask` `[n_in, n_out]`, bool.
        bias: `nnx.Param` `[n_out]`, or None.

    Args:
        kernel: `[n_in, n_out]`.
        mask: `[n_in, n_out]`, True where the entry is kept.
        bias: `[n_out]`, or None for no bias.

    Raises:
        ValueError: If the shapes do not match.
    """

    kind: ClassVar[str] = "masked"

    def __init__(
        self, kernel: jax.Array, mask: jax.Array, bias: jax.Array | None = None
    ) -> None:
        """Store the kernel and the mask."""
        if kernel.ndim != 2 or mask.shape != kernel.shape:
            raise ValueError(
                f"kernel {kernel.shape} and mask {mask.shape} must be matrices of one "
                "shape"
            )
        self.in_features, self.out_features = kernel.shape
        check_bias(bias, self.out_features)
        self.kernel = nnx.Param(kernel)
        self.mask = Mask(mask.astype(bool))
        self.bias = None if bias is None else nnx.Param(bias)

    @classmethod
    def outline(cls, description: Mapping[str, Any]) -> "MaskedLinear":
        """Return the layer of a `describe`, with abstract float32 arrays."""
        n_in, n_out = sizes(description["shape"])
        bias = abstract((n_out,)) if description["bias"] else None
        mask = abstract((n_in, n_out), bool)
        return nnx.eval_shape(cls, abstract((n_in, n_out)), mask, bias)

    def parts(self) -> dict[str, Any]:
        """Return the kernel, as a factor that shares its value and mask."""
        return {"kernel": MaskedFactor(self.kernel, self.mask)}

    def with_masks(self) -> "MaskedLinear":
        """Return the layer itself, which has a mask."""
        return self

    def materialize(self) -> jax.Array:
        """Return the kernel `[n_in, n_out]`, with zeros where it is masked."""
        kernel = self.kernel[...]
        return jnp.where(self.mask[...], kernel, jnp.zeros((), kernel.dtype))

    def reorder_outputs(self, order: np.ndarray) -> "MaskedLinear":
        """Return a layer whose output `i` is output `order[i]` of this one."""
        bias = None if self.bias is None else self.bias[...][order]
        return MaskedLinear(self.kernel[...][:, order], self.mask[...][:, order], bias)

    def reorder_inputs(self, order: np.ndarray) -> "MaskedLinear":
        """Return a layer whose input `i` is input `order[i]` of this one."""
        kernel, mask = self.kernel[...][order], self.mask[...][order]
        return MaskedLinear(kernel, mask, self.bias_value)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `x @ kernel + bias`: `[..., n_in]` to `[..., n_out]`."""
        return self.add_bias(x @ self.materialize())


class DenseLinear(LinearLayer):
    """An adapter of `nnx.Linear`, which shares its variables.

    Attributes:
        kernel: `nnx.Param` `[n_in, n_out]`.
        bias: `nnx.Param` `[n_out]`, or None.

    Args:
        layer: The layer to adapt.
    """

    kind: ClassVar[str] = "dense"

    def __init__(self, layer: nnx.Linear) -> None:
        """Share the variables."""
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.kernel, self.bias = layer.kernel, layer.bias

    def parts(self) -> dict[str, Any]:
        """Return the kernel."""
        return {"kernel": self.kernel}

    def materialize(self) -> jax.Array:
        """Return the kernel `[n_in, n_out]`."""
        return self.kernel[...]

    def with_masks(self) -> MaskedLinear:
        """Return a masked layer that keeps all entries."""
        kernel = self.kernel[...]
        return MaskedLinear(kernel, jnp.ones(kernel.shape, bool), self.bias_value)

    def reorder_outputs(self, order: np.ndarray) -> nnx.Linear:
        """Return a layer whose output `i` is output `order[i]` of this one."""
        bias = None if self.bias is None else self.bias[...][order]
        return linear(self.kernel[...][:, order], bias)

    def reorder_inputs(self, order: np.ndarray) -> nnx.Linear:
        """Return a layer whose input `i` is input `order[i]` of this one."""
        return linear(self.kernel[...][order], self.bias_value)


class DenseTable(TableLayer):
    """An adapter of `nnx.Embed`, which shares its variable.

    Attributes:
        embedding: `nnx.Param` `[num_embeddings, features]`.

    Args:
        table: The table to adapt.
    """

    kind: ClassVar[str] = "dense"

    def __init__(self, table: nnx.Embed) -> None:
        """Share the variable."""
        self.num_embeddings, self.features = table.num_embeddings, table.features
        self.embedding = table.embedding

    def parts(self) -> dict[str, Any]:
        """Return the table."""
        return {"embedding": self.embedding}

    def materialize(self) -> jax.Array:
        """Return the table `[num_embeddings, features]`."""
        return self.embedding[...]

    def describe(self) -> dict[str, Any]:
        """Return the structure without the numbers, as values that JSON knows."""
        return {"kind": self.kind, "shape": list(self.shape)}


Layer = nnx.Linear | LinearLayer
"""Layers where a model multiplies by a matrix."""

Table = nnx.Embed | TableLayer
"""Layers where a model looks up the row of a token or of a position."""


def is_dense(layer: Layer | Table) -> bool:
    """Return whether a layer is one of flax's own, with one dense matrix."""
    return isinstance(layer, nnx.Linear | nnx.Embed)


def as_layer(layer: Any) -> Any:
    """Return a layer with the methods of `LinearLayer` or `TableLayer`.

    Args:
        layer: Any layer or table of a model.

    Returns:
        The layer itself, or an adapter that shares the variables of a layer of flax.
    """
    if isinstance(layer, nnx.Linear):
        return DenseLinear(layer)
    return DenseTable(layer) if isinstance(layer, nnx.Embed) else layer


def linear(kernel: jax.Array, bias: jax.Array | None) -> nnx.Linear:
    """Return an `nnx.Linear` with `kernel` `[n_in, n_out]` and `bias`."""
    with_bias = bias is not None
    layer = nnx.eval_shape(
        lambda: nnx.Linear(*kernel.shape, use_bias=with_bias, rngs=nnx.Rngs(0))
    )
    layer.kernel = nnx.Param(kernel)
    if with_bias:
        layer.bias = nnx.Param(bias)
    return layer


def dense(layer: Layer) -> nnx.Linear:
    """Return a layer with its kernel multiplied out, of the same bias and dtype."""
    if isinstance(layer, nnx.Linear):
        return layer
    return linear(layer.materialize(), layer.bias_value)


def dense_table(table: Table) -> nnx.Embed:
    """Return a table with its rows multiplied out, of the same dtype."""
    if isinstance(table, nnx.Embed):
        return table
    made = nnx.eval_shape(lambda: nnx.Embed(*table.shape, rngs=nnx.Rngs(0)))
    made.embedding = nnx.Param(table.materialize())
    made.dtype = None  # type: ignore[assignment]  # that of its numbers
    return made
