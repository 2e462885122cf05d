"""Layers whose matrix is a sum of Kronecker products, linear layers and tables.

    y = x (Σ_c Σ_k A_ck ⊗ B_ck) + bias        x: [..., n_in],  y: [..., n_out]

The sum over `c` runs over configurations: one, or several for a heterogeneous sum; it
is never multiplied out in a forward pass.

>>> import jax.numpy as jnp
>>> layer = KroneckerLinear([KroneckerTerms(jnp.ones((1, 2, 3)), jnp.ones((1, 4, 5)))])
>>> layer(jnp.ones((7, 8))).shape, layer.cost().parameters
((7, 15), 26)
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kronjax.kronecker import KroneckerTerms, matmul, part_name
from kronjax.nn import factors, sums
from kronjax.nn.layers import (
    LinearLayer,
    Order,
    TableLayer,
    abstract,
    check_bias,
    permutation,
    register,
    root,
    wide,
)
from kronjax.nn.sums import Sum


@register
class KroneckerLinear(Sum, LinearLayer):
    """A linear layer whose kernel is a sum of Kronecker products.

    With orders the sum stands for the kernel permuted, `kernel[rows][:, columns]`, as
    `kronjax.permute` finds them; a forward pass then gathers inputs and outputs.

    Attributes:
        a: One `nnx.Param` `[r, m1, n1]` for each configuration, or a module of
            `kronjax.nn.factors`.
        b: One `nnx.Param` `[r, m2, n2]` for each configuration, likewise.
        bias: `nnx.Param` `[n_out]`, or None.
        inputs: `Order` `[n_in]`, the input that each row of the sum multiplies, or
            None.
        outputs: `Order` `[n_out]`, the column of the sum that becomes each output, or
            None.
        scales: One `nnx.Param` `[r]` for each configuration, a scalar for every term,
            or None.

    Args:
        terms: One sum for each configuration, all of the same shape `[n_in, n_out]`,
            unbatched; `Approximation.terms` can be passed as it is.
        bias: `[n_out]`, or None for no bias.
        rows: `[n_in]`, integers, a permutation; None for the identity.
        columns: `[n_out]`, likewise.
        scales: `[r]` for each configuration, scalars that are learned beside the
            factors (Krony-PT, 2024); None for none.

    Raises:
        ValueError: If there are no terms, their shapes differ, or another argument does
            not fit them.
    """

    kind: ClassVar[str] = "kronecker"

    def __init__(
        self,
        terms: Sequence[KroneckerTerms],
        bias: jax.Array | None = None,
        *,
        rows: jax.Array | np.ndarray | None = None,
        columns: jax.Array | np.ndarray | None = None,
        scales: Sequence[jax.Array] | None = None,
    ) -> None:
        """Store the factors."""
        terms = tuple(terms)
        self.in_features, self.out_features = sums.shape_of(terms)
        check_bias(bias, self.out_features)
        if scales is not None and [s.shape for s in scales] != [
            x.a.shape[:1] for x in terms
        ]:
            raise ValueError(
                f"scales are one [r] for each of the {len(terms)} configurations; got "
                f"{[s.shape for s in scales]}"
            )
        self.a = nnx.List([nnx.Param(x.a) for x in terms])
        self.b = nnx.List([nnx.Param(x.b) for x in terms])
        self.scales = None if scales is None else nnx.List(map(nnx.Param, scales))
        self.bias = None if bias is None else nnx.Param(bias)
        self.inputs = _order(permutation(rows, self.in_features, "rows"))
        columns = permutation(columns, self.out_features, "columns")
        self.outputs = _order(None if columns is None else np.argsort(columns))

    @classmethod
    def outline(cls, description: Mapping[str, Any]) -> "KroneckerLinear":
        """Return the layer of a `describe`, with abstract float32 arrays."""
        terms = sums.outline_terms(description)
        n_in, n_out = terms[0].shape
        scales = None
        if description.get("scales"):
            scales = [abstract(x.a.shape[:1]) for x in terms]
        bias = abstract((n_out,)) if description["bias"] else None
        layer = cls(terms, bias, scales=scales)
        for number, facts in enumerate(description["terms"]):
            for side, how in facts.get("held", {}).items():
                part = {"a": layer.a, "b": layer.b}[side][number]
                part = factors.from_description(how, part.shape)
                layer.set_part(part_name(side, number), part)
        if description.get("rows"):
            layer.inputs = nnx.data(Order(abstract((n_in,), jnp.int32)))
        if description.get("columns"):
            layer.outputs = nnx.data(Order(abstract((n_out,), jnp.int32)))
        return layer

    @property
    def terms(self) -> tuple[KroneckerTerms, ...]:
        """The sums that the layer stands for: the factors times their scalars."""
        if self.scales is None:
            return self.factors
        return tuple(
            KroneckerTerms(x.a * scale.get_value()[:, None, None], x.b)
            for x, scale in zip(self.factors, self.scales, strict=True)
        )

    @property
    def flops(self) -> int:
        """Multiplications and additions for one row of `x`."""
        return 2 * self.multiply_adds() + (len(self.a) - 1) * self.out_features

    @property
    def is_low_rank(self) -> bool:
        """Whether the kernel is columns times rows, in no other order."""
        (a, b), *rest = self.pairs
        is_plain = self.inputs is None and self.outputs is None and self.scales is None
        return is_plain and not rest and a.shape[2] == 1 and b.shape[1] == 1

    @property
    def rank(self) -> int:
        """The largest rank that the kernel can have by its structure."""
        return self.a[0].shape[0] if self.is_low_rank else min(self.shape)

    @property
    def num_gathers(self) -> int:
        """Number of gathers, of inputs and outputs, that folding could remove."""
        return (self.inputs is not None) + (self.outputs is not None)

    @property
    def column_order(self) -> np.ndarray | None:
        """The order `[n_out]` of the columns of a permuted layer, or None."""
        return None if self.outputs is None else np.argsort(self.outputs[...])

    def describe(self) -> dict[str, Any]:
        """Return the structure without the numbers, as values that JSON knows."""
        facts = {"kind": self.kind, "terms": self.describe_terms()}
        facts |= {"bias": self.bias is not None}
        facts |= {"rows": self.inputs is not None, "columns": self.outputs is not None}
        return facts if self.scales is None else {**facts, "scales": True}

    def materialize(self) -> jax.Array:
        """Multiply the sum out, in the order of inputs and outputs: `[n_in, n_out]`."""
        first, *rest = (x.to_matrix() for x in self.terms)
        kernel = sum(rest, first)
        if self.inputs is not None:
            kernel = kernel[jnp.argsort(self.inputs[...])]
        return kernel if self.outputs is None else kernel[:, self.outputs[...]]

    def scores(self, moment: jax.Array | None) -> dict[str, jax.Array]:
        """Return the scores of all entries of the factors, by the names of `parts`.

        Raises:
            ValueError: If a factor is a product of two matrices of low rank.
        """
        if moment is not None and self.inputs is not None:
            order = self.inputs[...]
            moment = moment[order][:, order]
        if any(isinstance(x, factors.LowRankFactor) for x in self.parts().values()):
            raise ValueError(
                "a factor of low rank inside of a Kronecker layer has no entries of "
                "its own to prune"
            )
        scores: dict[str, jax.Array] = {}
        for number, pair in enumerate(self.pairs):
            a, b = (wide(x[...]) for x in pair)
            if moment is None:
                of_a = jnp.sum(b**2, axis=(1, 2))[:, None]
                of_b = jnp.sum(a**2, axis=(1, 2))[:, None]
            else:
                m1, m2 = a.shape[1], b.shape[1]
                blocks = moment.reshape(m1, m2, m1, m2)
                of_a = jnp.einsum("kpn,ipiq,kqn->ki", b, blocks, b)
                of_b = jnp.einsum("kin,ipjp,kjn->kp", a, blocks, a)
            if self.scales is not None:
                scale = jnp.square(wide(self.scales[number][...]))[:, None]
                of_a, of_b = of_a * scale, of_b * scale
            scores[part_name("a", number)] = jnp.abs(a) * root(of_a)[:, :, None]
            scores[part_name("b", number)] = jnp.abs(b) * root(of_b)[:, :, None]
        return scores

    def reorder_outputs(self, order: np.ndarray) -> "KroneckerLinear":
        """Return a layer whose output `i` is output `order[i]` of this one."""
        outputs = np.arange(self.out_features)
        outputs = outputs if self.outputs is None else np.asarray(self.outputs[...])
        rows = None if self.inputs is None else np.asarray(self.inputs[...])
        bias = None if self.bias is None else self.bias[...][order]
        return self._reordered(bias, rows, np.argsort(outputs[order]))

    def reorder_inputs(self, order: np.ndarray) -> "KroneckerLinear":
        """Return a layer whose input `i` is input `order[i]` of this one."""
        inputs = np.arange(self.in_features)
        inputs = inputs if self.inputs is None else np.asarray(self.inputs[...])
        rows = np.argsort(order)[inputs]
        return self._reordered(self.bias_value, rows, self.column_order)

    def _reordered(self, bias, rows, columns) -> "KroneckerLinear":
        scales = None if self.scales is None else [x[...] for x in self.scales]
        layer = KroneckerLinear(
            self.factors, bias, rows=rows, columns=columns, scales=scales
        )
        layer.a, layer.b = self.a, self.b  # masked ones, and those of low rank, too
        return layer

    def truncate(self, ranks: Sequence[int]) -> "KroneckerLinear":
        """Return a layer with fewer terms of each configuration.

        The scalars of the terms are multiplied into the factors, and start again at 1.

        Args:
            ranks: Number of terms for each configuration, at least 1; where there are
                fewer, all of them stay.

        Returns:
            The layer whose sums are nearest to those of this one, each by itself, with
            orthogonal factors: both factors of a term have the root of its singular
            value as their norm.

        Raises:
            ValueError: If a factor is masked or of low rank.
        """
        if not self.is_whole:
            raise ValueError("truncation would undo masks, and low rank of factors")
        pairs = zip(self.terms, ranks, strict=True)
        terms = [sums.truncate(x, rank) for x, rank in pairs]
        scales = None
        if self.scales is not None:
            scales = [jnp.ones(len(x.a), x.a.dtype) for x in terms]
        rows = None if self.inputs is None else self.inputs[...]
        columns = self.column_order
        return KroneckerLinear(
            terms, self.bias_value, rows=rows, columns=columns, scales=scales
        )

    def with_fewer_terms(self, room: float) -> "KroneckerLinear | None":
        """Return the layer with at most `room` parameters in its terms.

        Returns:
            The layer itself where it is small enough; None for plain low rank.
        """
        if self.is_low_rank:
            return None
        ranks = [a.shape[0] for a, _ in self.pairs]
        total = sum(x.num_parameters for x in self.factors)
        if total <= room:
            return self
        return self.truncate([max(int(r * room / total), 1) for r in ranks])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `x @ kernel + bias`: `[..., n_in]` to `[..., n_out]`."""
        if self.inputs is not None:
            x = jnp.take(x, self.inputs[...], axis=-1)
        first, *rest = (matmul(x, terms) for terms in self.terms)
        y = sum(rest, first)
        if self.outputs is not None:
            y = jnp.take(y, self.outputs[...], axis=-1)
        return self.add_bias(y)


@register
class KroneckerEmbedding(Sum, TableLayer):
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

    kind: ClassVar[str] = "kronecker-embedding"

    def __init__(self, terms: Sequence[KroneckerTerms]) -> None:
        """Store the factors."""
        terms = tuple(terms)
        self.num_embeddings, self.features = sums.shape_of(terms)
        self.a = nnx.List([nnx.Param(x.a) for x in terms])
        self.b = nnx.List([nnx.Param(x.b) for x in terms])

    @classmethod
    def outline(cls, description: Mapping[str, Any]) -> "KroneckerEmbedding":
        """Return the table of a `describe`, with abstract float32 arrays."""
        return cls(sums.outline_terms(description))

    @property
    def terms(self) -> tuple[KroneckerTerms, ...]:
        """The sums that the table stands for, one for each configuration."""
        return self.factors

    @property
    def flops(self) -> int:
        """Multiplications and additions for one row of a head tied to the table."""
        additions = (len(self.a) - 1) * self.num_embeddings
        return 2 * self.multiply_adds(turned=True) + additions

    def describe(self) -> dict[str, Any]:
        """Return the structure without the numbers, as values that JSON knows."""
        return {"kind": self.kind, "terms": self.describe_terms()}

    def materialize(self) -> jax.Array:
        """Multiply the sum out: `[num_embeddings, features]`."""
        first, *rest = (x.to_matrix() for x in self.terms)
        return sum(rest, first)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return the rows of tokens: `[...]`, integers, to `[..., features]`."""

        def rows(terms):
            i, p = jnp.divmod(tokens, terms.b.shape[1])
            y = jnp.einsum("k...j,k...q->...jq", terms.a[:, i], terms.b[:, p])
            return y.reshape(*tokens.shape, self.features)

        first, *rest = map(rows, self.terms)
        return sum(rest, first)

    def attend(self, x: jax.Array) -> jax.Array:
        """Return `x @ table.T`: `[..., features]` to `[..., num_embeddings]`."""
        first, *rest = (matmul(x, terms.T) for terms in self.terms)
        return sum(rest, first)


def _order(order):
    """Return an order as a variable, or None if it changes nothing."""
    if order is None or np.array_equal(order, np.arange(len(order))):
        return None
    return Order(jnp.asarray(order, jnp.int32))
