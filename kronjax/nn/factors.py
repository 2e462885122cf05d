"""How a layer may hold one of its matrices: whole, masked, or as a product of two.

    masked      value where the mask is true, else 0
    low rank    left @ right           left: [..., m, q],  right: [..., q, n]

A Kronecker layer holds stacks of factors `[r, m1, n1]`, an interpolative one two
matrices. Each is an `nnx.Param`, and either kind of module here may take its place: it
answers `shape`, `dtype`, `get_value()` and `[...]` as a parameter does, so the layer
need not know. A mask is data, no part of the structure: changing it compiles nothing.

>>> import jax.numpy as jnp
>>> one = MaskedFactor(jnp.ones((1, 2, 2)), jnp.array([[[True, False], [True, True]]]))
>>> one[...].tolist(), num_kept(one)
([[[1.0, 0.0], [1.0, 1.0]]], 3)
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Mask(nnx.Variable):
    """Which entries of a matrix are kept; no parameter, so no gradient reaches it."""


class _Held(nnx.Module):
    """What answers as an `nnx.Param` does."""

    def get_value(self) -> jax.Array:
        raise NotImplementedError

    def __getitem__(self, key: Any) -> jax.Array:
        """Return a part of the matrix."""
        return self.get_value()[key]


class MaskedFactor(_Held):
    """A matrix, or a stack of them, of which only some entries are kept.

    Attributes:
        value: `nnx.Param` `[..., m, n]`.
        mask: `Mask` `[..., m, n]`, bool.

    Args:
        value: `[..., m, n]`.
        mask: `[..., m, n]`, True where the entry is kept.

    Raises:
        ValueError: If the shapes differ.
    """

    def __init__(self, value: jax.Array, mask: jax.Array) -> None:
        """Hold both."""
        if value.shape != mask.shape:
            raise ValueError(
                f"a factor {value.shape} and its mask {mask.shape} must have one shape"
            )
        self.value = nnx.Param(value)
        self.mask = Mask(mask.astype(bool))

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the matrix."""
        return self.value.shape

    @property
    def dtype(self) -> Any:
        """That of the entries."""
        return self.value.dtype

    def get_value(self) -> jax.Array:
        """Return the matrix with zeros where it is masked."""
        value = self.value[...]
        return jnp.where(self.mask[...], value, jnp.zeros((), value.dtype))


class LowRankFactor(_Held):
    """A stack of matrices of low rank; multiplied out in every forward pass.

    That costs `r m q n` multiply-adds for a whole batch, little beside what the batch
    spends on the factor; what falls is what is stored and trained.

    Attributes:
        left: `nnx.Param` `[..., m, q]`.
        right: `nnx.Param` `[..., q, n]`.

    Args:
        left: `[..., m, q]`.
        right: `[..., q, n]`.

    Raises:
        ValueError: If the shapes do not belong together.
    """

    def __init__(self, left: jax.Array, right: jax.Array) -> None:
        """Hold both."""
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
        """That of the stack."""
        return (*self.left.shape[:-1], self.right.shape[-1])

    @property
    def dtype(self) -> Any:
        """That of the entries."""
        return self.left.dtype

    def get_value(self) -> jax.Array:
        """Multiply out."""
        return self.left[...] @ self.right[...]


Held = nnx.Param | MaskedFactor | LowRankFactor
"""What a layer may hold a matrix as."""


def num_held(held: Any) -> int:
    """Return the numbers that are held, masked ones included."""
    if isinstance(held, LowRankFactor):
        return math.prod(held.left.shape) + math.prod(held.right.shape)
    return math.prod(held.shape)


def num_kept(held: Any) -> int:
    """Return the numbers that count: of a mask the kept ones."""
    if isinstance(held, MaskedFactor):
        return int(held.mask[...].sum())
    return num_held(held)


def describe(held: Any) -> Any:
    """Return how a matrix is held, as values that JSON knows; None for whole."""
    if isinstance(held, MaskedFactor):
        return "masked"
    return {"rank": held.rank} if isinstance(held, LowRankFactor) else None


def from_description(description: Any, shape: tuple[int, ...]) -> Any:
    """Return what a `describe` describes, with abstract float32 arrays.

    Raises:
        TypeError: If it describes nothing.
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
