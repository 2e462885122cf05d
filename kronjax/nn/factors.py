"""Factors of a layer: matrices that are stored whole, masked, or as products of two.

    masked      value where the mask is true, else 0
    low rank    left @ right           left: [..., m, q],  right: [..., q, n]

A Kronecker layer holds stacks of factors `[r, m1, n1]`, an interpolative layer two
matrices. Each factor is an `nnx.Param` or one of the modules defined here, which answer
`shape`, `dtype`, `get_value()` and `[...]` as a parameter does, so that the layer need
not distinguish them. A mask is data and no part of the structure: changing it compiles
nothing.

>>> import jax.numpy as jnp
>>> mask = jnp.array([[[True, False], [True, True]]])
>>> factor = MaskedFactor(jnp.ones((1, 2, 2)), mask)
>>> factor[...].tolist(), num_kept(factor)
([[[1.0, 0.0], [1.0, 1.0]]], 3)
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Mask(nnx.Variable):
    """The entries of a matrix that are kept; not a parameter, so without gradient."""


class _Held(nnx.Module):
    """Base class of factors that are read like an `nnx.Param`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the factor."""
        raise NotImplementedError

    @property
    def num_held(self) -> int:
        """Number of stored entries, masked ones included."""
        return math.prod(self.shape)

    @property
    def num_kept(self) -> int:
        """Number of stored entries that are not masked."""
        return self.num_held

    @property
    def description(self) -> Any:
        """The way the factor is stored, as a value that JSON knows."""
        raise NotImplementedError

    @property
    def note(self) -> str:
        """The addition to the shape of the factor in tables."""
        return ""

    def get_value(self) -> jax.Array:
        """Return the matrix."""
        raise NotImplementedError

    def __getitem__(self, key: Any) -> jax.Array:
        """Return a part of the matrix."""
        return self.get_value()[key]


class MaskedFactor(_Held):
    """A matrix, or a stack of matrices, that keeps only the entries of a mask.

    Attributes:
        value: `nnx.Param` `[..., m, n]`.
        mask: `Mask` `[..., m, n]`, bool.

    Args:
        value: `[..., m, n]`, an array, or a parameter to share.
        mask: `[..., m, n]`, True where the entry is kept; an array, or a `Mask` to
            share.

    Raises:
        ValueError: If the shapes differ.
    """

    def __init__(self, value: jax.Array | nnx.Param, mask: jax.Array | Mask) -> None:
        """Store the value and the mask."""
        if value.shape != mask.shape:
            raise ValueError(
                f"a factor {value.shape} and its mask {mask.shape} must have one shape"
            )
        self.value = value if isinstance(value, nnx.Param) else nnx.Param(value)
        self.mask = mask if isinstance(mask, Mask) else Mask(mask.astype(bool))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the factor."""
        return self.value.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the entries."""
        return self.value.dtype

    @property
    def num_kept(self) -> int:
        """Number of entries that are not masked."""
        return int(self.mask[...].sum())

    @property
    def description(self) -> Any:
        """The way the factor is stored, as a value that JSON knows."""
        return "masked"

    def get_value(self) -> jax.Array:
        """Return the matrix, with zeros where it is masked."""
        value = self.value[...]
        return jnp.where(self.mask[...], value, jnp.zeros((), value.dtype))


class LowRankFactor(_Held):
    """A stack of matrices of low rank; multiplied out in every forward pass.

    Multiplying out costs `r m q n` multiply-adds for a whole batch, little beside what
    the batch spends on the factor; storage and the number of trained parameters fall.

    Attributes:
        left: `nnx.Param` `[..., m, q]`.
        right: `nnx.Param` `[..., q, n]`.

    Args:
        left: `[..., m, q]`.
        right: `[..., q, n]`.

    Raises:
        ValueError: If the shapes do not match.
    """

    def __init__(self, left: jax.Array, right: jax.Array) -> None:
        """Store both factors of the product."""
        if (
            left.shape[:-2] != right.shape[:-2]
            or left.shape[-1:] != right.shape[-2:][:1]
        ):
            raise ValueError(
                f"a factor of low rank is [..., m, q] times [..., q, n]; got "
                f"{left.shape} and {right.shape}"
            )
        self.left = nnx.Param(left)
        self.right = nnx.Param(right)

    @property
    def rank(self) -> int:
        """The rank `q` of every matrix."""
        return self.left.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stack."""
        return (*self.left.shape[:-1], self.right.shape[-1])

    @property
    def dtype(self) -> Any:
        """Dtype of the entries."""
        return self.left.dtype

    @property
    def num_held(self) -> int:
        """Number of stored entries."""
        return math.prod(self.left.shape) + math.prod(self.right.shape)

    @property
    def description(self) -> Any:
        """The way the factor is stored, as a value that JSON knows."""
        return {"rank": self.rank}

    @property
    def note(self) -> str:
        """The addition to the shape of the factor in tables."""
        return f" of rank {self.rank}"

    def get_value(self) -> jax.Array:
        """Multiply the two factors."""
        return self.left[...] @ self.right[...]


Factor = nnx.Param | MaskedFactor | LowRankFactor
"""The types of a factor of a layer."""


def num_held(factor: Any) -> int:
    """Return the number of stored entries of a factor, masked ones included."""
    return factor.num_held if isinstance(factor, _Held) else math.prod(factor.shape)


def num_kept(factor: Any) -> int:
    """Return the number of stored entries of a factor that are not masked."""
    return factor.num_kept if isinstance(factor, _Held) else math.prod(factor.shape)


def note(factor: Any) -> str:
    """Return the addition to the shape of a factor in tables, such as ` of rank 3`."""
    return factor.note if isinstance(factor, _Held) else ""


def describe(factor: Any) -> Any:
    """Return how a factor is stored, as a value that JSON knows; None for whole."""
    return factor.description if isinstance(factor, _Held) else None


def from_description(description: Any, shape: tuple[int, ...]) -> Any:
    """Return the factor of a `describe`, with abstract float32 arrays.

    Raises:
        TypeError: If the description is not one of a factor.
    """

    def abstract(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    if description is None:
        return nnx.Param(abstract(*shape))
    if description == "masked":
        return nnx.eval_shape(
            MaskedFactor, abstract(*shape), abstract(*shape, dtype=bool)
        )
    rank = description["rank"]
    *batch, m, n = shape
    if type(rank) is not int or not 0 < rank <= min(m, n):
        raise TypeError(f"rank {rank!r} of a factor {shape}")
    left, right = abstract(*batch, m, rank), abstract(*batch, rank, n)
    return nnx.eval_shape(LowRankFactor, left, right)
