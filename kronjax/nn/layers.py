"""Layers that take the place of `nnx.Linear`: Kronecker sums, low rank, masks.

    y = x (Σ_c Σ_k A_ck ⊗ B_ck) + bias        x: [..., n_in],  y: [..., n_out]

The sum over `c` runs over configurations: one, or several for a heterogeneous sum; it
is never multiplied out in a forward pass. Kernels are `[n_in, n_out]`, as those of
`nnx.Linear`; one of them stands for an `nnx.Embed`. `kronjax.nn.surgery` finds and
replaces layers.

>>> import jax.numpy as jnp
>>> layer = KroneckerLinear([KroneckerTerms(jnp.ones((1, 2, 3)), jnp.ones((1, 4, 5)))])
>>> layer(jnp.ones((7, 8))).shape
(7, 15)
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kronjax.kronecker import KroneckerTerms, matmul
from kronjax.nn.factors import Mask


class Order(nnx.Variable):
    """An order of inputs or outputs, int32; no parameter."""


class KroneckerLinear(nnx.Module):
    """A linear layer whose kernel is a sum of Kronecker products.

    With orders the sum stands for the kernel permuted, `kernel[rows][:, columns]`, as
    `kronjax.permute` finds them; a forward pass then gathers inputs and outputs.

    Attributes:
        a: One `nnx.Param` `[r, m1, n1]` for each configuration, or what
            `kronjax.nn.factors` has for its place.
        b: One `nnx.Param` `[r, m2, n2]` for each configuration, likewise.
        bias: `nnx.Param` `[n_out]`, or None.
        inputs: `Order` `[n_in]`, the input that comes at each row of the sum, or None.
        outputs: `Order` `[n_out]`, the column of the sum that is each output, or None.
        scales: One `nnx.Param` `[r]` for each configuration, a factor of every term,
            or None.

    Args:
        terms: One sum for each configuration, all of the same shape `[n_in, n_out]`,
            unbatched; `Approximation.terms` is one.
        bias: `[n_out]`, or None for none.
        rows: `[n_in]`, integers, a permutation; None for the order as it is.
        columns: `[n_out]`, likewise.
        scales: `[r]` for each configuration, scalars that are learned beside the
            factors (Krony-PT, 2024); None for none.

    Raises:
        ValueError: If there are no terms, their shapes differ or something else does
            not fit them.
    """

    def __init__(
        self,
        terms: Sequence[KroneckerTerms],
        bias: jax.Array | None = None,
        *,
        rows: jax.Array | np.ndarray | None = None,
        columns: jax.Array | np.ndarray | None = None,
        scales: Sequence[jax.Array] | None = None,
    ) -> None:
        """Hold the factors."""
        terms = tuple(terms)
        self.in_features, self.out_features = _shape_of(terms)
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(
                f"bias has shape {bias.shape}, the layer {self.out_features} outputs"
            )
        if scales is not None and [s.shape for s in scales] != [
            one.a.shape[:1] for one in terms
        ]:
            raise ValueError(
                f"scales are one [r] for each of the {len(terms)} configurations; got "
                f"{[s.shape for s in scales]}"
            )
        self.a = nnx.List([nnx.Param(one.a) for one in terms])
        self.b = nnx.List([nnx.Param(one.b) for one in terms])
        self.scales = None if scales is None else nnx.List(map(nnx.Param, scales))
        self.bias = None if bias is None else nnx.Param(bias)
        self.inputs = _held(_permutation(rows, self.in_features, "rows"))
        columns = _permutation(columns, self.out_features, "columns")
        self.outputs = _held(None if columns is None else np.argsort(columns))

    @property
    def factors(self) -> tuple[KroneckerTerms, ...]:
        """The factors as they are held, one sum for each configuration."""
        return tuple(
            KroneckerTerms(a.get_value(), b.get_value())
            for a, b in zip(self.a, self.b, strict=True)
        )

    @property
    def terms(self) -> tuple[KroneckerTerms, ...]:
        """The sums that the layer stands for: the factors with their scales."""
        if self.scales is None:
            return self.factors
        return tuple(
            KroneckerTerms(one.a * scale.get_value()[:, None, None], one.b)
            for one, scale in zip(self.factors, self.scales, strict=True)
        )

    def materialize(self) -> jax.Array:
        """Multiply the sum out, in the order of inputs and outputs: `[n_in, n_out]`."""
        first, *rest = (one.to_matrix() for one in self.terms)
        kernel = sum(rest, first)
        if self.inputs is not None:
            kernel = kernel[jnp.argsort(self.inputs[...])]
        return kernel if self.outputs is None else kernel[:, self.outputs[...]]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `x @ kernel + bias`: `[..., n_in]` to `[..., n_out]`."""
        if self.inputs is not None:
            x = jnp.take(x, self.inputs[...], axis=-1)
        first, *rest = (matmul(x, one) for one in self.terms)
        y = sum(rest, first)
        if self.outputs is not None:
            y = jnp.take(y, self.outputs[...], axis=-1)
        return y if self.bias is None else y + _as_row(self.bias[...], y)


class KroneckerEmbedding(nnx.Module):
    """A table, one row for each token, that is a sum of Kronecker products.

        row i m2 + p  =  Σ_c Σ_k A_ck[i] ⊗ B_ck[p]

    A head that is tied to the table multiplies by it without multiplying it out.

    Attributes:
        a: One `nnx.Param` `[r, m1, n1]` for each configuration.
        b: One `nnx.Param` `[r, m2, n2]` for each configuration.

    Args:
        terms: One sum for each configuration, all of the same shape
            `[num_embeddings, features]`, unbatched.

    Raises:
        ValueError: If there are no terms, or their shapes differ.
    """

    def __init__(self, terms: Sequence[KroneckerTerms]) -> None:
        """Hold the factors."""
        terms = tuple(terms)
        self.num_embeddings, self.features = _shape_of(terms)
        self.a = nnx.List([nnx.Param(one.a) for one in terms])
        self.b = nnx.List([nnx.Param(one.b) for one in terms])

    @property
    def terms(self) -> tuple[KroneckerTerms, ...]:
        """The sums that the table stands for, one for each configuration."""
        return tuple(
            KroneckerTerms(a.get_value(), b.get_value())
            for a, b in zip(self.a, self.b, strict=True)
        )

    def materialize(self) -> jax.Array:
        """Multiply the sum out: `[num_embeddings, features]`."""
        first, *rest = (one.to_matrix() for one in self.terms)
        return sum(rest, first)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return the rows of tokens: `[...]`, integers, to `[..., features]`."""

        def rows(one):
            i, p = jnp.divmod(tokens, one.b.shape[1])
            y = jnp.einsum("k...j,k...q->...jq", one.a[:, i], one.b[:, p])
            return y.reshape(*tokens.shape, self.features)

        first, *rest = map(rows, self.terms)
        return sum(rest, first)

    def attend(self, x: jax.Array) -> jax.Array:
        """Return `x @ table.T`: `[..., features]` to `[..., num_embeddings]`."""
        first, *rest = (matmul(x, one.T) for one in self.terms)
        return sum(rest, first)


class InterpolativeLinear(nnx.Module):
    """A linear layer of low rank, some of whose outputs are made of the others.

        kernel = (C [1, Z])[:, outputs]        C: [n_in, r],  Z: [r, n_out − r]

    A matrix of rank r has r² numbers less than `r (n_in + n_out)` to choose: all of its
    columns are combinations of r of them. The interpolative decomposition stores those
    and the combinations, which is exact, and costs as many operations less.

    Attributes:
        columns: `nnx.Param` `[n_in, r]`, the columns `C`.
        rest: `nnx.Param` `[r, n_out − r]`, the combinations `Z`.
        outputs: `Order` `[n_out]`, which of `C [1, Z]` each output is.
        bias: `nnx.Param` `[n_out]`, or None.

    Args:
        columns: `[n_in, r]`.
        rest: `[r, n_out − r]`.
        outputs: `[n_out]`, integers, a permutation.
        bias: `[n_out]`, or None for none.

    Raises:
        ValueError: If the shapes do not belong together.

    References: Cheng, Gimbutas, Martinsson and Rokhlin (2005); Zhao et al. (2025), for
    language models.
    """

    def __init__(
        self,
        columns: jax.Array,
        rest: jax.Array,
        outputs: jax.Array | np.ndarray,
        bias: jax.Array | None = None,
    ) -> None:
        """Hold the columns and the combinations."""
        if columns.ndim != 2 or rest.ndim != 2 or columns.shape[1] != rest.shape[0]:
            raise ValueError(
                f"columns {columns.shape} and rest {rest.shape} must be matrices "
                "[n_in, r] and [r, n_out - r]"
            )
        self.in_features = columns.shape[0]
        self.out_features = sum(rest.shape)
        order = _permutation(outputs, self.out_features, "outputs")
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(
                f"bias has shape {bias.shape}, the layer {self.out_features} outputs"
            )
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
            bias: `[n_out]`, or None for none.
            dtype: Of the parameters; that of `left` by default.
        """
        import scipy.linalg

        a, b = (np.asarray(x, np.float64) for x in (left, right))
        r = a.shape[1]
        # Orthonormal rows first: the pivots then look at the product, not at a factor.
        q, triangle = np.linalg.qr(a)
        b = triangle @ b
        decomposed: Any = scipy.linalg.qr(b, mode="economic", pivoting=True)
        _, upper, pivots = decomposed
        rest = np.linalg.lstsq(upper[:, :r], upper[:, r:], rcond=1e-12)[0]
        dtype = left.dtype if dtype is None else dtype
        columns = jnp.asarray(q @ b[:, pivots[:r]], dtype)
        return cls(columns, jnp.asarray(rest, dtype), np.argsort(pivots), bias)

    @classmethod
    def _outline(cls, columns, rest, bias):
        return cls(columns, rest, np.arange(sum(rest.shape)), bias)

    def materialize(self) -> jax.Array:
        """Multiply out, in the order of the outputs: `[n_in, n_out]`."""
        columns = self.columns[...]
        more = jnp.matmul(columns, self.rest[...], precision="highest")
        both = jnp.concatenate([columns, more], axis=1)
        return both[:, self.outputs[...]]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `x @ kernel + bias`: `[..., n_in]` to `[..., n_out]`."""
        y = x @ self.columns[...]
        y = jnp.concatenate([y, y @ self.rest[...]], axis=-1)
        y = jnp.take(y, self.outputs[...], axis=-1)
        return y if self.bias is None else y + _as_row(self.bias[...], y)


class MaskedLinear(nnx.Module):
    """A linear layer of whose kernel only some entries are kept.

    Attributes:
        kernel: `nnx.Param` `[n_in, n_out]`.
        mask: `Mask` `[n_in, n_out]`, bool.
        bias: `nnx.Param` `[n_out]`, or None.

    Args:
        kernel: `[n_in, n_out]`.
        mask: `[n_in, n_out]`, True where the entry is kept.
        bias: `[n_out]`, or None for none.

    Raises:
        ValueError: If the shapes do not belong together.
    """

    def __init__(
        self, kernel: jax.Array, mask: jax.Array, bias: jax.Array | None = None
    ) -> None:
        """Hold the kernel and the mask."""
        if kernel.ndim != 2 or mask.shape != kernel.shape:
            raise ValueError(
                f"kernel {kernel.shape} and mask {mask.shape} must be matrices of one "
                "shape"
            )
        self.in_features, self.out_features = kernel.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(
                f"bias has shape {bias.shape}, the layer {self.out_features} outputs"
            )
        self.kernel = nnx.Param(kernel)
        self.mask = Mask(mask.astype(bool))
        self.bias = None if bias is None else nnx.Param(bias)

    def materialize(self) -> jax.Array:
        """Return the kernel with zeros where it is masked: `[n_in, n_out]`."""
        kernel = self.kernel[...]
        return jnp.where(self.mask[...], kernel, jnp.zeros((), kernel.dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `x @ kernel + bias`: `[..., n_in]` to `[..., n_out]`."""
        y = x @ self.materialize()
        return y if self.bias is None else y + _as_row(self.bias[...], y)


def _shape_of(terms):
    """Return the shape that sums share, or say why they do not belong together."""
    shapes = sorted({one.shape for one in terms})
    if len(shapes) != 1:
        raise ValueError(
            "a layer of Kronecker products needs sums for matrices of one and the same "
            f"shape; got {shapes or 'none'}"
        )
    for one in terms:
        ranks = one.a.shape[:-2], one.b.shape[:-2]
        if len(ranks[0]) != 1 or ranks[0] != ranks[1]:
            raise ValueError(
                "a layer of Kronecker products holds one matrix, factors [r, m1, n1] "
                f"and [r, m2, n2]; got {one.a.shape} and {one.b.shape}"
            )
    return shapes[0]


def _permutation(order, size, what):
    """Return an order as NumPy has it, or None."""
    if order is None:
        return None
    order = np.asarray(order)
    if order.shape != (size,) or not np.array_equal(np.sort(order), np.arange(size)):
        raise ValueError(f"{what} must be a permutation of 0 to {size - 1}")
    return order


def _held(order):
    """Return an order as a variable, or None if it changes nothing."""
    if order is None or np.array_equal(order, np.arange(len(order))):
        return None
    return Order(jnp.asarray(order, jnp.int32))


def _as_row(bias, y):
    return bias.reshape((1,) * (y.ndim - 1) + bias.shape)
