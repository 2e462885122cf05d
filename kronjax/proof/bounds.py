"""Lower bounds that prove how good a sum of Kronecker products is.

With `E = L^{1/2} (T − K) R^{1/2}` and `N = min(m, n)`:

- The local bound holds for every tangent vector ξ of the manifold at K, so for every
  change of all `A_k` alone and of all `B_k` alone:
  `‖E − L^{1/2} ξ R^{1/2}‖_2 ≥ <E, Y> / ‖Y‖_*` for any Y that is orthogonal to all
  `L^{1/2} ξ R^{1/2}`. Candidates for Y are `U Σ^{p−1} Vᵀ` for several p, and
  `U_1 Λ V_1ᵀ` with the leading singular vectors and multipliers `Λ ⪰ 0` of trace one,
  less their tangential parts; `multipliers` finds Λ.
- The global bound holds for every K of Kronecker rank r in one configuration. For any
  `G = P ⊗ Q` and `H = P' ⊗ Q'`,
  `‖E‖_2² ≥ Σ_{i>r} s_i(R(G T Hᵀ))² / Σ_i σ_i(G)² σ_i(H)²`; the right-hand side is
  maximised over the four factors by L-BFGS. Under weights `G` is `L1^{1/2} ⊗ L2^{1/2}`
  of their nearest Kronecker products, and the singular values are those of
  `G L^{-1/2}`.

Rounding never makes a bound larger than it should be. Inner products are reduced by
`(m + n) ε` times the sum of the moduli, and the error matrix by `ε` times the norms and
lengths of the sums that it is made of; sums of singular values are increased by their
backward error; the remaining tangential part is multiplied by the length of the longest
change that could lower the norm, which is `2 √N ‖E‖_2` for one configuration without
weights. With several configurations, or with weights, no such length is known: the
bound then holds for changes up to `REACH ‖L^{1/2} T R^{1/2}‖_F` in the coordinates of
`weighted.Frame`.

References: Van Loan and Pitsianis (1993); and the references of `multipliers`.

>>> import jax.numpy as jnp
>>> matrix = jnp.diag(jnp.array([1.0, 0.0, 0.0, 1.0]))
>>> half = jnp.eye(2)[None] / 2**0.5
>>> proof = certify(matrix, (KroneckerTerms(half, half),))
>>> [round(float(x), 3) for x in (proof.error, proof.local_bound, proof.global_bound)]
[0.5, 0.5, 0.5]
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kronjax.kronecker import KroneckerTerms
from kronjax.linalg import spectral
from kronjax.linalg.batching import after
from kronjax.proof import global_bound, multipliers
from kronjax.proof.tangent_map import TangentMap
from kronjax.solver import weighted
from kronjax.solver.weighted import Root

REACH = 100.0
"""Relative length of changes that local bounds cover where no limit is known."""

CHUNK = 16
"""Number of terms that are summed before they are subtracted from the matrix."""

EXPONENTS = (4098.0, 1026.0, 514.0, 258.0, 66.0)
"""Exponents p of the Schatten norms whose gradients are candidates."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bounds:
    """Bounds on what any other sum could reach; scalars.

    Attributes:
        error: `‖L^{1/2} (T − K) R^{1/2}‖_2`, from singular values; an upper bound of it
            from `certify_stage`.
        local_bound: Lower bound on the error after any change of all `A_k`, or of all
            `B_k`.
        global_bound: Lower bound on the error of every sum of the same Kronecker rank;
            0 where no bound is known, as for several configurations.
    """

    error: jax.Array
    local_bound: jax.Array
    global_bound: jax.Array


def certify(
    matrix: jax.Array,
    terms: Sequence[KroneckerTerms],
    left_weight: jax.Array | None = None,
    right_weight: jax.Array | None = None,
    dual: jax.Array | None = None,
) -> Bounds:
    """Prove bounds for a sum; a pure function.

    Args:
        matrix: `T`, `[m, n]`, float32 or float64; rounding widens the bounds in
            float32.
        terms: One `KroneckerTerms` for each configuration, `[r, m1, n1]` and
            `[r, m2, n2]`.
        left_weight: `L`, `[m, m]`, or None; `weighted.RIDGE` makes it regular.
        right_weight: `R`, `[n, n]`, or None.
        dual: `[m, n]`, a candidate for Y, such as `newton.Finish.dual`.

    Returns:
        `Bounds`; NaN where the matrix or the terms are not finite. Costs some ten
        singular value decompositions, and 100 to 200 eigenvalue decompositions of the
        order of the cluster.
    """
    task = _Task.of(matrix, terms, left_weight, right_weight)
    norm, local = _local_bound(task, dual)
    bound = jnp.zeros_like(local)
    if len(terms) == 1:
        bound = global_bound.prove(after(task.plain, local), task.terms[0], task.space)
    return task.bounds(norm, local, bound)


def certify_stage(
    matrix: jax.Array,
    terms: Sequence[KroneckerTerms],
    p: float | jax.Array,
    rounds: int | jax.Array = multipliers.BALANCED,
    left_weight: jax.Array | None = None,
    right_weight: jax.Array | None = None,
) -> Bounds:
    """Prove a local bound by matrix products mostly; a pure function.

    Y is the gradient of a Schatten norm, corrected by `multipliers.balance` with
    products only: where that norm was minimised, the gradient is nearly orthogonal to
    the tangent space already. Gaps of random 36×36 of rank 3, solved to 2e-4, are 0.5 %
    on average, while the uncorrected gradient proves 15 %. There is no global bound.
    The function is meant for float32, as accelerators are slow in float64: rounding
    makes the error larger and the bound smaller.

    Args:
        matrix: `T`, `[m, n]`.
        terms: One `KroneckerTerms` for each configuration.
        p: Exponent of the Schatten norm.
        rounds: Number of rounds of `multipliers.balance`.
        left_weight: Weight of the rows, as for `certify`, or None.
        right_weight: Weight of the columns, or None.
    """
    task = _Task.of(matrix, terms, left_weight, right_weight)
    space, error = task.space, task.error
    # Any candidate is valid, so eigenvectors need not be orthogonal. The part of the
    # norm that they miss is smaller than the addition for rounding.
    u, s, vt = spectral.triplets(after(error, space.slack), orthogonal=False)
    eps = float(jnp.finfo(error.dtype).eps)
    norm = s[0] * (1 + 4 * sum(error.shape) ** 0.5 * eps) + eps * task.size
    diagonal = multipliers.weights(s, jnp.asarray(p, s.dtype))
    balanced = multipliers.balance(space, u, vt, diagonal, rounds)
    proven = _proven(task, balanced, task.reach_from(norm), spectral.lengths)
    local = jnp.maximum(proven, 0)
    return task.bounds(norm, local, jnp.zeros_like(local))


@dataclasses.dataclass(frozen=True)
class _Task:
    """The problem scaled to Frobenius norm one.

    Attributes:
        plain: `T`, `[m, n]`.
        terms: Terms of the sum, one `KroneckerTerms` for each configuration.
        space: Tangent space at the sum.
        error: `E`, `[m, n]`.
        size: Magnitude that, times the machine epsilon, bounds the rounding of E.
        reach: Length of the changes that the local bound covers, or None where the
            length of the changes that lower the norm is known.
        unit: Factor by which bounds are multiplied to undo the scaling.
    """

    plain: jax.Array
    terms: tuple[KroneckerTerms, ...]
    space: TangentMap
    error: jax.Array
    size: jax.Array
    reach: jax.Array | None
    unit: jax.Array

    @classmethod
    def of(cls, matrix, terms, left_weight=None, right_weight=None):
        plain, unit = _unit(matrix)
        terms = tuple(_scaled(each, unit) for each in terms)
        left, right, last = None, None, plain
        if right_weight is not None:
            right = Root.of(after(right_weight, jnp.zeros_like(last)))
            last = right.factor
        if left_weight is not None:
            left = Root.of(after(left_weight, last))
        for root in (left, right):
            unit = unit if root is None else unit * root.scale
        space = TangentMap.of(plain.shape, terms, left, right)
        error = plain
        for each in terms:
            error = _less(error, each)
        error = weighted.whiten(error, left, right)
        error = jnp.where(jnp.isfinite(error).all(), error, 0)
        reach = REACH * jnp.linalg.norm(weighted.whiten(plain, left, right))
        if left is None and right is None and len(terms) == 1:
            reach = None
        # The rounding of E is relative to the norms of its terms, times the lengths of
        # the sums in the products that make it.
        sizes = [jnp.linalg.norm(plain), *map(_length, terms)]
        depth = sum(min(x.rank, CHUNK) + -(-x.rank // CHUNK) for x in terms)
        size = (8 + depth) * sum(sizes[1:], sizes[0])
        for root in (left, right):
            if root is not None:
                size = size * len(root.factor) * jnp.linalg.norm(root.factor)
        return cls(plain, terms, space, error, size, reach, unit)

    def reach_from(self, norm):
        """Return the length of the changes to cover, given the spectral norm of E."""
        if self.reach is not None:
            return self.reach
        return 2 * min(self.error.shape) ** 0.5 * norm

    def bounds(self, norm, local, bound) -> Bounds:
        """Return the bounds of the problem as given: NaN where it is not finite."""
        finite = jnp.isfinite(self.size)
        scaled = norm, jnp.minimum(local, norm), jnp.minimum(bound, norm)
        return Bounds(*(jnp.where(finite, x, jnp.nan) * self.unit for x in scaled))


def _local_bound(task, dual):
    """Return `‖E‖_2` and the best bound of all candidates."""
    space, error = task.space, task.error
    last = sum((jnp.sum(point.b) for point in space.points), jnp.zeros((), error.dtype))
    u, s, vt = jnp.linalg.svd(after(error, last), full_matrices=False)
    weights = jnp.stack([multipliers.weights(s, p) for p in EXPONENTS])
    candidates = [_mm(u * diagonal[None], vt) for diagonal in weights]
    reach = task.reach_from(s[0])

    def value(ambient):
        return _proven(task, ambient, reach)

    values = jax.lax.map(value, jnp.stack(candidates))
    start = after(weights[jnp.argmax(values)], values)
    climbed = jax.lax.map(value, multipliers.climb(space, u, s, vt, start))
    best = jnp.maximum(jnp.max(values), jnp.max(climbed))
    if dual is not None:
        best = jnp.maximum(best, value(after(dual, best)))
    return s[0], jnp.maximum(best, 0)


def _singular_values(matrix):
    return jnp.linalg.svd(matrix, compute_uv=False)


def _proven(task, ambient, reach, values=_singular_values):
    """Return `<E, Y> / ‖Y‖_*`, less the largest possible effect of rounding.

    Y is the normal part of the ambient matrix; `reach` is the length of changes;
    `values` returns numbers, the largest first, whose sum is at least the nuclear norm.
    """
    space, error = task.space, task.error
    normal = space.normal_part(ambient)
    m, n = error.shape
    eps = float(jnp.finfo(error.dtype).eps)
    products = error * normal
    inner = jnp.sum(jnp.sum(products, axis=1))
    inner -= (m + n) * eps * jnp.sum(jnp.abs(products))
    norm = jnp.linalg.norm(normal)
    inner -= eps * task.size * norm
    tangential = space.length(space.pull(normal)) + space.slack * norm
    inner -= tangential * reach
    s = values(after(normal, inner))
    nuclear = jnp.sum(s) + 4 * (m + n) ** 0.5 * eps * len(s) * s[0]
    proven = inner / jnp.where(nuclear > 0, nuclear, 1)
    return jnp.where((nuclear > 0) & jnp.isfinite(proven), proven, 0)


def _unit(matrix):
    """Return the matrix at Frobenius norm one, and that norm."""
    largest = jnp.max(jnp.abs(matrix))
    largest = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    # The reciprocal of 1e38 has no float32 digits: first scale it exactly towards one.
    shift = jnp.where(largest > 1, 2.0**-8, 2.0**8).astype(matrix.dtype)
    plain = matrix * shift / (largest * shift)
    norm = jnp.linalg.norm(plain)
    norm = jnp.where((norm > 0) & jnp.isfinite(norm), norm, 1)
    return plain / norm, largest * norm


def _scaled(terms: KroneckerTerms, unit):
    """Return the terms of the sum over `unit`, with factors of equal norm."""
    # The norms are taken apart: their product may overflow.
    sizes = [
        jnp.sqrt(jnp.sum((x / _peak(x)) ** 2, axis=(1, 2), keepdims=True)) * _peak(x)
        for x in (terms.a, terms.b)
    ]
    root = [jnp.sqrt(jnp.where(size > 0, size, 1)) for size in sizes]
    scale = root[0] * root[1] / jnp.sqrt(unit)
    norms = [jnp.where(size > 0, size, 1) for size in sizes]
    return KroneckerTerms(terms.a / norms[0] * scale, terms.b / norms[1] * scale)


def _peak(x):
    peak = jnp.max(jnp.abs(x), axis=(1, 2), keepdims=True)
    return jnp.where(peak > 0, peak, 1)


def _less(matrix, terms: KroneckerTerms):
    """Return the matrix less the sum, `CHUNK` terms at a time.

    The rounding of a sum is relative to its length, so two short sums round less.
    """

    def chunks(x):
        x = jnp.pad(x, ((0, -len(x) % CHUNK), (0, 0), (0, 0)))
        return x.reshape(-1, CHUNK, *x.shape[1:])

    def step(rest, chunk):
        return rest - chunk.to_matrix(), None

    return jax.lax.scan(step, matrix, jax.tree.map(chunks, terms))[0]


def _length(terms: KroneckerTerms):
    """Return the sum of the norms of all terms."""
    sizes = [jnp.sqrt(jnp.sum(x**2, axis=(1, 2))) for x in (terms.a, terms.b)]
    return jnp.sum(sizes[0] * sizes[1])


def _mm(x, y):
    return jnp.matmul(x, y, precision="highest")
