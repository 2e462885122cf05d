"""The tangent space at a sum, as a linear map into the matrices of its problem.

    push(ξ) = Σ_c L^{1/2} ξ_c R^{1/2},    pull(Y) = its adjoint

in the coordinates of `weighted.Frame`, in which push is close to an isometry. Only the
spans of the factors matter. Matrices orthogonal to all `push(ξ)` prove local bounds:
see `bounds`.

>>> import jax.numpy as jnp
>>> ones = KroneckerTerms(jnp.ones((1, 2, 2)), jnp.ones((1, 2, 2)))
>>> rest = TangentMap.of((4, 4), (ones,)).normal_part(jnp.eye(4))
>>> jnp.round(rest, 3).tolist()[0]
[0.25, -0.25, -0.25, 0.25]
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kronjax.kronecker import Configuration, KroneckerTerms, rearrange, unrearrange
from kronjax.linalg.batching import after
from kronjax.solver import manifold, weighted
from kronjax.solver.manifold import Point
from kronjax.solver.weighted import Frame, Root

SWEEPS = 200
"""Largest number of products with push and pull to remove the tangential part."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TangentMap:
    """The tangent space at a sum of one or of several configurations.

    Attributes:
        points: Orthonormal factors for each configuration; the cores are not used.
        frames: Coordinates for each configuration.
        inverses: Maps into these coordinates, for each configuration.
        slack: Largest angle by which rounding may have turned the spans of the factors.
        shapes: `((m1, n1), (m2, n2))` for each configuration.
    """

    points: tuple[Point, ...]
    frames: tuple[Frame, ...]
    inverses: tuple
    slack: jax.Array
    shapes: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        terms: Sequence[KroneckerTerms],
        left: Root | None = None,
        right: Root | None = None,
    ) -> "TangentMap":
        """Return the tangent space at a sum.

        Args:
            shape: `(m, n)`.
            terms: One `KroneckerTerms` for each configuration.
            left: Root of the weight of the rows, or None.
            right: Root of the weight of the columns, or None.
        """
        configurations = tuple(
            Configuration((x.a.shape[1], x.a.shape[2]), x.rank) for x in terms
        )
        m, n = shape
        frames, inverses = weighted.frames((m, n), configurations, left, right)
        # The terms come from decompositions, too; the last term ends them all.
        last = [*jax.tree.leaves((inverses, left, right)), terms[-1].a]
        points, slack = [], jnp.zeros((), terms[0].a.dtype)
        for each, backs in zip(terms, inverses, strict=True):
            a, b = _coordinates(each, *backs)
            for earlier in last:
                a = after(a, earlier)
            a, angle_a = _orthonormal(a)
            b, angle_b = _orthonormal(after(b, angle_a))
            last, slack = [angle_b], jnp.maximum(slack, jnp.maximum(angle_a, angle_b))
            points.append(Point(a, jnp.eye(len(a), len(b), dtype=a.dtype), b))
        shapes = tuple((x.a.shape[1:], x.b.shape[1:]) for x in terms)
        return cls(tuple(points), frames, inverses, slack, shapes)

    def pull(self, ambient: jax.Array) -> tuple:
        """Return the gradient of `<Y, push(·)>` for Y, `[m, n]`, as tangents."""
        return tuple(
            manifold.project(point, rearrange(frame.adjoint(ambient), shapes[0]))
            for point, frame, shapes in zip(
                self.points, self.frames, self.shapes, strict=True
            )
        )

    def push(self, tangents: tuple) -> jax.Array:
        """Return the change of the weighted matrix along tangents, `[m, n]`."""
        first, *rest = (
            frame.forward(unrearrange(manifold.tangent_to_ambient(point, xi), *shapes))
            for point, frame, shapes, xi in zip(
                self.points, self.frames, self.shapes, tangents, strict=True
            )
        )
        return sum(rest, first)

    def length(self, tangents: tuple) -> jax.Array:
        """Return the norm of tangents in these coordinates."""
        squares = sum(manifold.inner(xi, xi) for xi in tangents)
        return jnp.sqrt(squares)

    def normal_part(self, ambient: jax.Array) -> jax.Array:
        """Remove the tangential part of a matrix `[m, n]` by conjugate gradients.

        For one configuration without weights the first step is exact, and the second
        removes its rounding error.
        """
        # Below the level of rounding the gradients would grow again.
        tiny = 8 * jnp.finfo(ambient.dtype).eps * jnp.linalg.norm(ambient)

        def sweep(carry):
            rest, direction, size, count = carry
            image = self.push(direction)
            stretch = jnp.sum(image**2)
            rest = rest - size**2 / jnp.where(stretch > 0, stretch, 1) * image
            slope = self.pull(rest)
            new = self.length(slope)
            share = (new / jnp.where(size > 0, size, 1)) ** 2
            direction = jax.tree.map(lambda g, d: g + share * d, slope, direction)
            return rest, direction, new, count + 1

        slope = self.pull(ambient)
        return jax.lax.while_loop(
            lambda carry: (carry[2] > tiny) & (carry[3] < SWEEPS),
            sweep,
            (ambient, slope, self.length(slope), 0),
        )[0]


def _coordinates(terms, left, right):
    """Return the factors in the coordinates of the frame, as rows."""
    a, b = terms.a, terms.b
    if left is not None:
        a = _contract("ji,rjk->rik", left.first, a)
        b = _contract("ji,rjk->rik", left.second, b)
    if right is not None:
        a, b = _mm(a, right.first), _mm(b, right.second)
    return a.reshape(len(a), -1), b.reshape(len(b), -1)


def _orthonormal(rows):
    """Return an orthonormal basis of rows `[r, d]`, and the angle of its rounding."""
    largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True)
    rows = rows / jnp.where(largest > 0, largest, 1)
    size = jnp.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / jnp.where(size > 0, size, 1)
    basis = jnp.linalg.qr(rows.T)[0].T
    # A row of zeros spans nothing, so any basis vector may stand for it.
    gram = _mm(rows, rows.T) + jnp.diag((size[:, 0] == 0).astype(rows.dtype))
    least = jnp.linalg.eigvalsh(after(gram, basis))[0]
    eps = float(jnp.finfo(rows.dtype).eps)
    floor = (4 * len(rows) * eps) ** 2
    return basis, 4 * rows.shape[1] ** 0.5 * eps / jnp.sqrt(jnp.maximum(least, floor))


def _contract(subscripts, x, y):
    return jnp.einsum(subscripts, x, y, precision="highest")


def _mm(x, y):
    return jnp.matmul(x, y, precision="highest")
