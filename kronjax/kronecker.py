"""Sums of Kronecker products and the rearrangement that makes them low rank.

With `T` of shape `[m1 m2, n1 n2]`, the rearrangement `R` permutes its entries into a
`[m1 n1, m2 n2]` matrix such that

    R(A ⊗ B) = vec(A) vec(B)ᵀ

so a sum of `r` Kronecker products is a rearranged matrix of rank `r`. `vec` reads a
factor row by row. A sum is stored as two stacks of factors, `a: [r, m1, n1]` and
`b: [r, m2, n2]`; the shapes of the arrays determine the configuration, and leading axes
are batch axes.

References: Van Loan and Pitsianis (1993); Van Loan (2000).

>>> import jax.numpy as jnp
>>> a, b = jnp.ones((1, 2, 3)), jnp.ones((1, 4, 5))
>>> KroneckerTerms(a, b).to_matrix().shape
(8, 15)
>>> rearrange(jnp.ones((8, 15)), (2, 3)).shape
(6, 20)
"""

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kronjax.linalg.dense import multiply_out


@dataclasses.dataclass(frozen=True)
class Configuration:
    """The form of a sum: `rank` Kronecker products with left factors of `a_shape`.

    The right factors have shape `(m // m1, n // n1)`. The shape `(m, 1)` is plain low
    rank.

    Args:
        a_shape: Shape `(m1, n1)` of every left factor `A_k`.
        rank: Number of terms `r`, the Kronecker rank.

    Raises:
        ValueError: If an entry is not a positive integer.
    """

    a_shape: tuple[int, int]
    rank: int

    def __post_init__(self):
        """Check that all entries are positive integers, and convert them to int."""
        try:
            m1, n1 = map(_positive, self.a_shape)
            rank = _positive(self.rank)
        except (TypeError, ValueError):
            raise ValueError(
                "Configuration needs a_shape=(m1, n1) and rank, positive integers; "
                f"got a_shape={self.a_shape!r}, rank={self.rank!r}."
            ) from None
        object.__setattr__(self, "a_shape", (m1, n1))
        object.__setattr__(self, "rank", rank)

    def b_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return `(m2, n2)`, the shape of the right factors for a matrix of `shape`.

        Raises:
            ValueError: If `a_shape` does not divide `shape`; lists the divisors.
        """
        for size, part, axis in zip(
            shape, self.a_shape, ("rows", "columns"), strict=True
        ):
            if size % part:
                raise ValueError(
                    f"a_shape {self.a_shape} does not divide a matrix of shape "
                    f"{tuple(shape)}: {part} is not a divisor of its {size} {axis}. "
                    f"Divisors of {size}: {', '.join(map(str, divisors(size)))}."
                )
        return shape[0] // self.a_shape[0], shape[1] // self.a_shape[1]

    @property
    def T(self) -> "Configuration":
        """The configuration for the transposed matrix."""
        m1, n1 = self.a_shape
        return Configuration((n1, m1), self.rank)

    def max_rank(self, shape: tuple[int, int]) -> int:
        """Return the largest Kronecker rank of a matrix of `shape` for this a_shape."""
        return min(math.prod(self.a_shape), math.prod(self.b_shape(shape)))

    def num_parameters(self, shape: tuple[int, int]) -> int:
        """Return the number of entries in all factors for a matrix of `shape`."""
        return self.rank * (math.prod(self.a_shape) + math.prod(self.b_shape(shape)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KroneckerTerms:
    """A sum `Σ_k A_k ⊗ B_k` as two stacks of factors.

    Attributes:
        a: `[..., r, m1, n1]`, the left factors.
        b: `[..., r, m2, n2]`, the right factors.
    """

    a: jax.Array
    b: jax.Array

    def __repr__(self) -> str:
        """Return shapes and dtypes in place of the entries."""
        a, b = map(_described, (self.a, self.b))
        return f"KroneckerTerms(a={a}, b={b})"

    @property
    def rank(self) -> int:
        """Number of terms."""
        return self.a.shape[-3]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape `(m1 m2, n1 n2)` of the dense matrix."""
        (m1, n1), (m2, n2) = self.a.shape[-2:], self.b.shape[-2:]
        return m1 * m2, n1 * n2

    @property
    def T(self) -> "KroneckerTerms":
        """The transposed sum, with transposed factors."""
        return KroneckerTerms(self.a.swapaxes(-2, -1), self.b.swapaxes(-2, -1))

    @property
    def num_parameters(self) -> int:
        """Number of entries in all factors of one matrix."""
        return math.prod(self.a.shape[-3:]) + math.prod(self.b.shape[-3:])

    def to_matrix(self) -> jax.Array:
        """Multiply the sum out: `[..., m1 m2, n1 n2]`."""
        with jax.default_matmul_precision("highest"):
            return multiply_out(self.a, self.b)


def part_name(side: str, number: int) -> str:
    """Return the name of the factors of a configuration: `a`, `b`, then `a1`, `b1`."""
    return f"{side}{number or ''}"


def to_arrays(terms: Sequence[KroneckerTerms]) -> dict[str, np.ndarray]:
    """Return the factors of a sum by name, as files of factors store them.

    Args:
        terms: One sum for each configuration.

    Returns:
        `a` `[..., r, m1, n1]` and `b` `[..., r, m2, n2]` of the first configuration,
        then `a1` and `b1`, ...
    """
    return {
        part_name(side, number): np.asarray(getattr(x, side))
        for number, x in enumerate(terms)
        for side in "ab"
    }


def from_arrays(arrays: Mapping[str, Any]) -> tuple[KroneckerTerms, ...]:
    """Return the sum whose factors are named as by `to_arrays`.

    Raises:
        KeyError: If `a` or `b` of a configuration is missing.
    """
    return tuple(
        KroneckerTerms(arrays[part_name("a", i)], arrays[part_name("b", i)])
        for i in range((len(arrays) + 1) // 2)
    )


def divisors(number: int) -> list[int]:
    """Return the positive divisors of `number`, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def interpolative_rank(shape: tuple[int, int], parameters: float) -> int:
    """Return the largest rank `r` with `r (m + n − r)` at most `parameters`.

    That is the number of parameters of an interpolative decomposition of rank r.
    """
    m, n = shape
    half = (m + n) / 2
    rank = half - math.sqrt(max(half * half - parameters, 0))
    return min(int(rank + 1e-9), m, n)


def rearrange(matrix: jax.Array, a_shape: tuple[int, int]) -> jax.Array:
    """Permute the entries of `T` into `R(T)`, whose rank is the Kronecker rank of `T`.

    Args:
        matrix: `[..., m1 m2, n1 n2]`, any dtype.
        a_shape: Shape `(m1, n1)` of the left factors.

    Returns:
        `[..., m1 n1, m2 n2]`: row `i1 n1 + j1` is block `(i1, j1)` read row by row.
    """
    *batch, m, n = matrix.shape
    m1, n1 = a_shape
    m2, n2 = m // m1, n // n1
    blocks = matrix.reshape(*batch, m1, m2, n1, n2).swapaxes(-3, -2)
    return blocks.reshape(*batch, m1 * n1, m2 * n2)


def unrearrange(
    rearranged: jax.Array, a_shape: tuple[int, int], b_shape: tuple[int, int]
) -> jax.Array:
    """Invert `rearrange`: `[..., m1 n1, m2 n2]` to `[..., m1 m2, n1 n2]`."""
    batch = rearranged.shape[:-2]
    (m1, n1), (m2, n2) = a_shape, b_shape
    blocks = rearranged.reshape(*batch, m1, n1, m2, n2).swapaxes(-3, -2)
    return blocks.reshape(*batch, m1 * m2, n1 * n2)


def matmul(x: jax.Array, terms: KroneckerTerms) -> jax.Array:
    """Return `x @ Σ_k A_k ⊗ B_k` without forming the sum.

    Both contractions are matrix products over all terms at once, in the order that is
    cheaper for these shapes. `matmul_cost` is the cost per row of `x` in multiply-adds.

    Args:
        x: `[..., m1 m2]`.
        terms: One sum, unbatched.

    Returns:
        `[..., n1 n2]`.

    Raises:
        ValueError: If the last axis of `x` does not match the rows of the sum.
    """
    (_, m1, n1), (_, m2, n2) = terms.a.shape, terms.b.shape
    if x.shape[-1] != m1 * m2:
        raise ValueError(
            f"x has {x.shape[-1]} columns but the Kronecker sum has {m1 * m2} rows "
            f"(factors {m1}x{n1} and {m2}x{n2}); transpose one of them."
        )
    x = x.reshape(*x.shape[:-1], m1, m2)
    if _left_first_cost(m1, n1, m2, n2) <= _right_first_cost(m1, n1, m2, n2):
        partial = jnp.einsum("...ip,kij->...kjp", x, terms.a)
        y = jnp.einsum("...kjp,kpq->...jq", partial, terms.b)
    else:
        partial = jnp.einsum("...ip,kpq->...kiq", x, terms.b)
        y = jnp.einsum("...kiq,kij->...jq", partial, terms.a)
    return y.reshape(*y.shape[:-2], n1 * n2)


def matmul_cost(terms: KroneckerTerms) -> int:
    """Return the number of multiply-adds that `matmul` takes for one row of `x`."""
    (m1, n1), (m2, n2) = terms.a.shape[-2:], terms.b.shape[-2:]
    costs = _left_first_cost(m1, n1, m2, n2), _right_first_cost(m1, n1, m2, n2)
    return terms.rank * min(costs)


def _described(factors) -> str:
    """Return the dtype and the shape of an array; other leaves of a pytree as such."""
    if not (hasattr(factors, "shape") and hasattr(factors, "dtype")):
        return repr(factors)
    return f"{factors.dtype}[{', '.join(map(str, factors.shape))}]"


def _positive(number):
    if isinstance(number, bool) or operator.index(number) < 1:
        raise ValueError(number)
    return operator.index(number)


def _left_first_cost(m1, n1, m2, n2):
    return m2 * n1 * (m1 + n2)


def _right_first_cost(m1, n1, m2, n2):
    return m1 * n2 * (m2 + n1)
