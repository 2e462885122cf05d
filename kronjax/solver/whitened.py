"""The whitened and normalised problem in which the descent works.

The target is `L^{1/2} T R^{1/2}` of Frobenius norm one; points are represented in the
coordinates of their configurations (`weighted.Frame`), and errors are compared at the
scale of the target. Nothing in this module iterates.

>>> import jax.numpy as jnp
>>> from kronjax.kronecker import Configuration
>>> problem = Problem.of((4, 4), Configuration((2, 2), 1))
>>> setting, _ = prepare(problem, 3 * jnp.eye(4))
>>> round(float(setting.scale), 4)
6.0
"""

import dataclasses

import jax
import jax.numpy as jnp

from kronjax.kronecker import KroneckerTerms
from kronjax.linalg import spectral
from kronjax.linalg.batching import after, in_turn
from kronjax.solver import weighted
from kronjax.solver.problem import Problem
from kronjax.solver.weighted import Frame, Root


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Setting:
    """A whitened and normalised matrix with the data that leads back.

    Attributes:
        target: `L^{1/2} T R^{1/2}`, `[m, n]`, of Frobenius norm one.
        plain: `T` at the same scale, `[m, n]`.
        roots: Roots of `L` and `R`, or None without a weight.
        frames: Coordinates of the terms of each configuration.
        scale: Factor from sums in this scale to sums in the scale of `T`.
        unit: Factor from errors in this scale to weighted errors.
        finite: Whether the matrix and its weights are finite.
    """

    target: jax.Array
    plain: jax.Array
    roots: tuple[Root | None, Root | None]
    frames: tuple[Frame, ...]
    scale: jax.Array
    unit: jax.Array
    finite: jax.Array


def check_weights(matrix, left, right):
    """Check shapes and dtypes of the weights and return them as arrays.

    Args:
        matrix: The matrix, `[m, n]`.
        left: Weight of the rows, `[m, m]`, or None.
        right: Weight of the columns, `[n, n]`, or None.

    Returns:
        A list of both.

    Raises:
        ValueError: If a weight has another shape, or another dtype than the matrix.
    """
    weights = []
    for side, weight, size in zip(
        ("left", "right"), (left, right), matrix.shape, strict=False
    ):
        if weight is not None:
            weight = jnp.asarray(weight)
            if weight.shape != (size, size) or weight.dtype != matrix.dtype:
                raise ValueError(
                    f"{side}_weight must be [{size}, {size}], {matrix.dtype}, for a "
                    f"matrix of shape {matrix.shape}; got {weight.shape}, "
                    f"{weight.dtype}."
                )
        weights.append(weight)
    return weights


def prepare(problem: Problem, matrix, left_weight=None, right_weight=None):
    """Normalise a matrix, and decompose its weights.

    Args:
        problem: The problem.
        matrix: The matrix, `[m, n]`.
        left_weight: Weight of the rows, `[m, m]`, or None.
        right_weight: Weight of the columns, `[n, n]`, or None.

    Returns:
        The setting, and for each configuration the inverses of its frame (see
        `weighted.frames`).
    """
    plain, scale, finite = _normalise(matrix)
    left, right = None, None
    # Roots do not depend on the matrix, because a batch may share its weights.
    if right_weight is not None:
        right = Root.of(_cleared(right_weight))
    if left_weight is not None:
        weight = _cleared(left_weight)
        left = Root.of(weight if right is None else after(weight, right.factor))
    unit = scale
    for weight, root in ((left_weight, left), (right_weight, right)):
        if weight is not None and root is not None:
            finite &= jnp.isfinite(weight).all()
            unit = unit * root.scale
    frames, inverses = weighted.frames(
        problem.shape, problem.configurations, left, right
    )
    whitened = weighted.whiten(jnp.where(finite, plain, 0), left, right)
    norm = jnp.linalg.norm(whitened)
    unweighted = left is None and right is None
    norm = jnp.where((norm > 0) & ~jnp.array(unweighted), norm, 1)
    setting = Setting(
        target=whitened / norm,
        plain=plain / norm,
        roots=(left, right),
        frames=frames,
        scale=scale * norm,
        unit=unit * norm,
        finite=finite,
    )
    return setting, inverses


def _cleared(weight):
    return jnp.where(jnp.isfinite(weight).all(), weight, 0)


def _normalise(matrix):
    """Return `T` scaled to Frobenius norm one, its norm, and whether that is finite."""
    largest = jnp.max(jnp.abs(matrix))
    # The reciprocal of 1e38 has no float32 digits: scale by a power of two first.
    shift = jnp.where(largest > 1, 2.0**-8, 2.0**8).astype(matrix.dtype)
    ratios = matrix * shift / jnp.where(largest > 0, largest * shift, 1)
    norm = jnp.linalg.norm(ratios)
    scale = largest * norm
    finite = jnp.isfinite(scale)
    safe = finite & (scale > 0)
    unit = jnp.where(safe, ratios, 0) / jnp.where(safe, norm, 1)
    return unit, jnp.where(safe, scale, 1), finite


def factors(problem, configuration, a, b):
    """Return rows `[r, d1]` and `[r, d2]` as the factors of `KroneckerTerms`."""
    b_shape = configuration.b_shape(problem.shape)
    return KroneckerTerms(
        a.reshape(-1, *configuration.a_shape), b.reshape(-1, *b_shape)
    )


def to_terms(problem, setting, points, last):
    """Return the factors of the Kronecker product SVD, which share its values equally.

    Args:
        problem: The problem.
        setting: The setting, with the coordinates and the scale.
        points: Points of the manifold, one for each configuration.
        last: Array that must be computed before any decomposition starts: see
            `batching`.
    """
    cores = tuple(after(point.core, last) for point in points)
    decomposed = in_turn(spectral.triplets, cores)
    terms = []
    for configuration, frame, point, (u, s, vt) in zip(
        problem.configurations, setting.frames, points, decomposed, strict=True
    ):
        root = (jnp.sqrt(s) * jnp.sqrt(setting.scale))[:, None]
        a = root * jnp.matmul(u.T, point.a, precision="highest")
        b = root * jnp.matmul(vt, point.b, precision="highest")
        terms.append(frame.to_terms(factors(problem, configuration, a, b)))
    return tuple(terms)
