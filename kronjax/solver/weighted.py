"""Coordinates in which weighted errors `‖L^{1/2} (W − K) R^{1/2}‖_p` are nearly plain.

With `L = G Gᵀ` and `R = F Fᵀ` the error is that of `Gᵀ W F`, approximated by `Gᵀ K F`.
That sum is a rearranged low-rank matrix only if `L` and `R` are Kronecker products. For
each configuration they are therefore replaced by likely Kronecker products (those of
matrix-normal data, which leave `P` and `Q` below without a scale in any factor),
`L ≈ L1 ⊗ L2` and `R ≈ R1 ⊗ R2`, and its terms are sought as

    K = (L1 ⊗ L2)^{-1/2} K' (R1 ⊗ R2)^{-1/2},    R(K') on the manifold of fixed rank,

which is again a sum of Kronecker products. In the weighted problem `K'` stands for
`P K' Q` (see `Frame`), where `P = Gᵀ (L1 ⊗ L2)^{-1/2}` and `Q = (R1 ⊗ R2)^{-1/2} F` are
close to orthogonal matrices if the replacement is good. It is exact, `P = Q = 1`, for a
configuration that is low rank: then the closed form of the whitened matrix solves
p = 2. Otherwise the replaced problem is the start of every weighted solve, and its
metric remains in use: the condition of the weights is reduced to that of `P` and `Q`.

References: Van Loan and Pitsianis (1993); Dutilleul (1999), for the alternating fit of
a Kronecker product; Srebro and Jaakkola (2003), for weights without a closed form.

>>> import jax.numpy as jnp
>>> root = Root.of(jnp.diag(jnp.array([1.0, 3.0])))
>>> jnp.round(2 * root.factor @ root.factor.T).tolist()
[[1.0, 0.0], [0.0, 3.0]]
"""

import dataclasses

import jax
import jax.numpy as jnp

from kronjax.kronecker import Configuration, KroneckerTerms
from kronjax.linalg.batching import after

RIDGE = 1e-6
"""Fraction of the mean eigenvalue of a weight that is added to all its eigenvalues."""

SWEEPS = 5
"""Rounds of the fit of a Kronecker product to a weight, enough for it to settle."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Root:
    """A weight `C / mean + RIDGE = F Fᵀ`, the mean being that of its eigenvalues.

    Attributes:
        factor: `F`, `[n, n]`.
        inverse: `F⁻¹`, `[n, n]`.
        gram: `F Fᵀ`, `[n, n]`.
        scale: Square root of the mean.
    """

    factor: jax.Array
    inverse: jax.Array
    gram: jax.Array
    scale: jax.Array

    @classmethod
    def of(cls, weight: jax.Array) -> "Root":
        """Decompose a weight `[n, n]`; its negative eigenvalues count as zero."""
        n = weight.shape[0]
        mean = jnp.trace(weight) / n
        weight = weight / jnp.where(mean > 0, mean, 1)
        gram = (weight + weight.T) / 2
        values, vectors = jnp.linalg.eigh(gram)
        roots = jnp.sqrt(jnp.maximum(values, 0) + RIDGE)
        return cls(
            factor=vectors * roots[None],
            inverse=(vectors / roots[None]).T,
            gram=gram + RIDGE * jnp.eye(n, dtype=weight.dtype),
            scale=jnp.sqrt(jnp.maximum(mean, 0)),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Side:
    """The coordinates of the columns of a configuration (transposed for the rows).

    Attributes:
        first: Matrix `[n1, n1]` that gives `A` when it multiplies `A'` from the right.
        second: Matrix `[n2, n2]` that likewise gives `B` from `B'`.
        whole: Matrix `[n1 n2, n1 n2]` from `K'` to the weighted problem, or None for
            the identity.
    """

    first: jax.Array
    second: jax.Array
    whole: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inverses:
    """The inverses of `first` and `second` of a `Side`, needed only for the start."""

    first: jax.Array
    second: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frame:
    """The coordinates of a configuration; a side without a weight is None.

    Attributes:
        left: Coordinates of the rows.
        right: Coordinates of the columns.
    """

    left: Side | None = None
    right: Side | None = None

    def forward(self, matrix: jax.Array) -> jax.Array:
        """Return `P K' Q` for `K'`, `[m, n]`."""
        if self.left is not None and self.left.whole is not None:
            matrix = _mm(self.left.whole.T, matrix)
        if self.right is not None and self.right.whole is not None:
            matrix = _mm(matrix, self.right.whole)
        return matrix

    def adjoint(self, gradient: jax.Array) -> jax.Array:
        """Return `Pᵀ G Qᵀ` for `G`, `[m, n]`."""
        if self.right is not None and self.right.whole is not None:
            gradient = _mm(gradient, self.right.whole.T)
        if self.left is not None and self.left.whole is not None:
            gradient = _mm(self.left.whole, gradient)
        return gradient

    def to_terms(self, terms: KroneckerTerms) -> KroneckerTerms:
        """Return the factors `A`, `B` for `A'`, `B'`."""
        a, b = terms.a, terms.b
        if self.left is not None:
            a = _contract("ji,rjk->rik", self.left.first, a)
            b = _contract("ji,rjk->rik", self.left.second, b)
        if self.right is not None:
            a, b = _mm(a, self.right.first), _mm(b, self.right.second)
        return KroneckerTerms(a, b)


def frames(
    shape: tuple[int, int],
    configurations: tuple[Configuration, ...],
    left: Root | None,
    right: Root | None,
) -> tuple[tuple[Frame, ...], tuple]:
    """Return the coordinates of every configuration, and their inverses.

    Args:
        shape: Shape `(m, n)` of the matrix.
        configurations: The configurations of the sum.
        left: Root of the weight of the rows `[m, m]`, or None.
        right: Root of the weight of the columns `[n, n]`, or None.

    Returns:
        A `Frame` for each configuration, and a pair of `Inverses` for each, of the rows
        and of the columns, with None for a side without a weight.
    """
    results, inverses = [], []
    last = None
    for configuration in configurations:
        sides, backs = [], []
        b_shape = configuration.b_shape(shape)
        for root, k1, k2 in zip(
            (left, right), configuration.a_shape, b_shape, strict=True
        ):
            side, back = None, None
            if root is not None:
                side, back = _side(root, k1, k2, last)
                last = jnp.sum(back.first) + jnp.sum(back.second)
            sides.append(side)
            backs.append(back)
        results.append(Frame(*sides))
        inverses.append(tuple(backs))
    return tuple(results), tuple(inverses)


def whiten(
    matrix: jax.Array, left: Root | None = None, right: Root | None = None
) -> jax.Array:
    """Return `Gᵀ W F`, `[m, n]`, whose singular values are those of the problem."""
    if left is not None:
        matrix = _mm(left.factor.T, matrix)
    return matrix if right is None else _mm(matrix, right.factor)


def to_start(
    matrix: jax.Array, left: Inverses | None, right: Inverses | None
) -> jax.Array:
    """Return `(L1 ⊗ L2)^{1/2} W (R1 ⊗ R2)^{1/2}`, `[m, n]`, the target of the start."""
    if left is not None:
        matrix = _multiply(matrix.T, left.first, left.second).T
    if right is not None:
        matrix = _multiply(matrix, right.first, right.second)
    return matrix


def _side(root: Root, n1: int, n2: int, last):
    unit = jnp.ones((1, 1), root.factor.dtype)
    if n1 == 1:
        return Side(unit, root.inverse, None), Inverses(unit, root.factor)
    if n2 == 1:
        return Side(root.inverse, unit, None), Inverses(root.factor, unit)
    blocks = root.gram.reshape(n1, n2, n1, n2)

    def sweep(_, pair):
        # Each factor in turn is the likeliest for matrix-normal rows given the other.
        second = _mm(pair[1].inverse.T, pair[1].inverse)
        first = Root.of(_contract("iajb,ab->ij", blocks, second))
        second = _mm(first.inverse.T, first.inverse)
        return first, Root.of(_contract("iajb,ij->ab", blocks, second))

    # Decompositions are made in turn, all after that of the weight.
    identity = jnp.eye(n2, dtype=blocks.dtype)
    identity = after(identity, root.factor if last is None else last)
    second = Root(identity, identity, identity, identity[0, 0])
    eye = jnp.eye(n1, dtype=blocks.dtype)
    first = Root(eye, eye, eye, identity[0, 0])
    first, second = jax.lax.fori_loop(0, SWEEPS, sweep, (first, second))
    whole = _multiply(root.factor.T, first.inverse.T, second.inverse.T).T
    return (
        Side(first.inverse, second.inverse, whole),
        Inverses(first.factor, second.factor),
    )


def _multiply(matrix, first, second):
    """Return `X (P ⊗ Q)` for `X`, `[m, n1 n2]`, by two products."""
    shape = matrix.shape[0], len(first), len(second)
    half = _mm(matrix.reshape(-1, len(second)), second).reshape(shape)
    product = _contract("mia,ij->mja", half, first)
    return product.reshape(matrix.shape)


def _contract(subscripts, x, y):
    return jnp.einsum(subscripts, x, y, precision="highest")


def _mm(x, y):
    return jnp.matmul(x, y, precision="highest")
