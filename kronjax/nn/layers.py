"""The interface and the registry of layers that replace `nnx.Linear` and `nnx.Embed`.

One orientation holds everywhere in kronjax. A layer computes

    y = x @ K + bias        x: [..., n_in],  K: [n_in, n_out],  y: [..., n_out]

so a kernel is `[n_in, n_out]`, as that of `nnx.Linear`. Its left side (rows) is the
input side: a left moment or weight is `[n_in, n_in]`, from the inputs `x`. Its right
side (columns) is the output side: a right moment or weight is `[n_out, n_out]`, from
the gradients at `y`. A table (embedding) is `[num_embeddings, features]`: one row for
each token.

A kind of layer is one class, derived from `LinearLayer` or `TableLayer` and decorated
with `register`. Everything else (costs, descriptions, pruning, truncation, the order of
channels) asks its methods. `kronjax.nn.matrix` adapts the two classes of flax.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kronjax.nn import factors
from kronjax.nn.factors import MaskedFactor


class Order(nnx.Variable):
    """An order of inputs or outputs, int32; not a parameter."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Storage of a layer, and operations for one row of `x`.

    Attributes:
        parameters: Number of parameters, bias included; of a mask the kept ones.
        bytes: Bytes that store them; a masked kernel is stored whole, with its mask.
        flops: Multiplications and additions for one row of `x`, `[n_in]`.
        held: Number of stored parameters, masked ones included.
    """

    parameters: int
    bytes: int
    flops: int
    held: int


class _Structured(nnx.Module):
    """Methods that linear layers and tables have in common."""

    kind: ClassVar[str]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix that the layer stands for."""
        raise NotImplementedError

    @property
    def flops(self) -> int:
        """Multiplications and additions for one row of `x`."""
        return 2 * sum(map(factors.num_held, self.parts().values()))

    @property
    def is_whole(self) -> bool:
        """Whether all factors are plain parameters: no masks, no low rank inside."""
        return all(isinstance(part, nnx.Param) for part in self.parts().values())

    def parts(self) -> dict[str, Any]:
        """Return the factors by name: parameters, or modules of `kronjax.nn.factors`.

        Biases and scalars are none of them.
        """
        raise NotImplementedError

    def set_part(self, name: str, part: Any) -> None:
        """Replace the factor that `parts` calls `name`."""
        setattr(self, name, part)

    def materialize(self) -> jax.Array:
        """Return the matrix that the layer stands for, multiplied out."""
        raise NotImplementedError

    def cost(self) -> Cost:
        """Return the storage and the operations; arrays may be abstract, unless masked.

        The operations of a table are those of a head that is tied to it.
        """
        stored = jax.tree.leaves(nnx.state(self))
        parameters = jax.tree.leaves(nnx.state(self, nnx.Param))
        held = sum(math.prod(x.shape) for x in parameters)
        parts = self.parts().values()
        masked = sum(factors.num_held(x) - factors.num_kept(x) for x in parts)
        size = sum(math.prod(x.shape) * x.dtype.itemsize for x in stored)
        return Cost(held - masked, size, self.flops, held)

    def describe(self) -> dict[str, Any]:
        """Return the structure without the numbers, as values that JSON knows."""
        raise NotImplementedError

    @classmethod
    def outline(cls, description: Mapping[str, Any]) -> Any:
        """Return the layer of a `describe`, with abstract float32 arrays.

        Raises:
            AttributeError, KeyError, TypeError, IndexError: If it is damaged.
        """
        raise NotImplementedError

    def summary(self) -> str:
        """Return a few words about the structure, for tables."""
        return self.kind


class LinearLayer(_Structured):
    """Base class of layers that compute `x @ kernel + bias`.

    Attributes:
        kind: Name of the class in descriptions.
        in_features: `n_in`.
        out_features: `n_out`.
        bias: `nnx.Param` `[n_out]`, or None.
    """

    in_features: int
    out_features: int
    bias: Any

    @property
    def shape(self) -> tuple[int, int]:
        """`(n_in, n_out)`."""
        return self.in_features, self.out_features

    @property
    def bias_value(self) -> Any:
        """The bias `[n_out]` as an array, or None."""
        return None if self.bias is None else self.bias.get_value()

    @property
    def rank(self) -> int:
        """The largest rank that the kernel can have by its structure."""
        return min(self.shape)

    @property
    def num_gathers(self) -> int:
        """Number of gathers, of inputs and outputs, that folding could remove."""
        return 0

    @property
    def column_order(self) -> np.ndarray | None:
        """The order `[n_out]` of the columns of a permuted layer, or None."""
        return None

    def cost(self) -> Cost:
        """Return the storage and the operations, those of the bias included."""
        cost = super().cost()
        bias = 0 if self.bias is None else self.out_features
        return dataclasses.replace(cost, flops=cost.flops + bias)

    def describe(self) -> dict[str, Any]:
        """Return the structure without the numbers, as values that JSON knows."""
        facts = {"kind": self.kind, "shape": list(self.shape)}
        return {**facts, "bias": self.bias is not None}

    def scores(self, moment: jax.Array | None) -> dict[str, jax.Array]:
        """Return the scores of all entries, by the names of `parts`.

        `kronjax.lm.training.saliency` defines them. The default is that of a layer
        with one part, its kernel.

        Args:
            moment: `[n_in, n_in]` of the inputs, or None.
        """
        if set(self.parts()) != {"kernel"}:
            raise ValueError(f"layers of kind {self.kind} cannot be pruned")
        kernel = jnp.abs(wide(self.materialize()))
        if moment is not None:
            kernel = kernel * root(jnp.diagonal(moment))[:, None]
        return {"kernel": kernel}

    def with_masks(self) -> Any:
        """Return the layer with masks that keep all: itself, changed in place."""
        for name, part in self.parts().items():
            if not isinstance(part, MaskedFactor):
                kept = jnp.ones(part.shape, bool)
                self.set_part(name, MaskedFactor(part[...], kept))
        return self

    def reorder_outputs(self, order: np.ndarray) -> Any:
        """Return a layer whose output `i` is output `order[i]` of this one.

        The default is None: layers of this kind cannot be reordered.
        """
        return None

    def reorder_inputs(self, order: np.ndarray) -> Any:
        """Return a layer whose input `i` is input `order[i]` of this one.

        The default is None: layers of this kind cannot be reordered.
        """
        return None

    def with_fewer_terms(self, room: float) -> Any:
        """Return the layer with at most `room` parameters in the terms of its kernel.

        Returns:
            The layer itself where it is small enough, or None where it has no terms to
            leave out, so that its rank must be lowered instead.
        """
        return None

    def add_bias(self, y: jax.Array) -> jax.Array:
        """Return `y + bias`."""
        if self.bias is None:
            return y
        bias = self.bias[...]
        return y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)


class TableLayer(_Structured):
    """Base class of embeddings, which return the rows of tokens.

    Attributes:
        kind: Name of the class in descriptions.
        num_embeddings: Number of rows.
        features: Number of columns.
    """

    num_embeddings: int
    features: int

    @property
    def shape(self) -> tuple[int, int]:
        """`(num_embeddings, features)`."""
        return self.num_embeddings, self.features


KINDS: dict[str, type] = {}
"""Registered classes of layers, by their kind."""

Class = TypeVar("Class", bound=type)


def register(cls: Class) -> Class:
    """Register a class of layers by its `kind`, so that checkpoints can name it.

    Raises:
        ValueError: If the kind belongs to another class.
    """
    known: Any = KINDS.setdefault(cls.kind, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"the kind {cls.kind} belongs to {known.__qualname__}")
    KINDS[cls.kind] = cls
    return cls


def abstract(shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
    """Return an abstract array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def sizes(shape: Any) -> tuple[int, ...]:
    """Return a shape from a description.

    Raises:
        TypeError: If an entry is not a positive integer.
    """
    if not all(isinstance(size, int) and size > 0 for size in shape):
        raise TypeError(f"sizes {shape!r}")
    return tuple(shape)


def describe_parts(**parts: Any) -> dict[str, Any]:
    """Return how those factors are stored that are not plain parameters."""
    said = {name: factors.describe(part) for name, part in parts.items()}
    said = {name: how for name, how in said.items() if how is not None}
    return {"held": said} if said else {}


def check_bias(bias: Any, size: int) -> None:
    """Refuse a bias of another length than the outputs.

    Raises:
        ValueError: If the lengths differ.
    """
    if bias is not None and bias.shape != (size,):
        raise ValueError(f"bias has shape {bias.shape}, the layer {size} outputs")


def permutation(order: Any, size: int, name: str) -> np.ndarray | None:
    """Return an order as a NumPy array, or None.

    Raises:
        ValueError: If it is no permutation.
    """
    if order is None:
        return None
    order = np.asarray(order)
    if order.shape != (size,) or not np.array_equal(np.sort(order), np.arange(size)):
        raise ValueError(f"{name} must be a permutation of 0 to {size - 1}")
    return order


def wide(x: jax.Array) -> jax.Array:
    """Return an array in float32 or wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def root(x: jax.Array) -> jax.Array:
    """Return the square root, of negative rounding errors 0."""
    return jnp.sqrt(jnp.maximum(x, 0))
