"""Row and column permutations that bring a matrix nearer to a Kronecker product.

`T = W[rows][:, columns]` is approximated by `K`, so that `W ≈ K[rows⁻¹][:, columns⁻¹]`
stores `m + n` integers beside the factors. The permutations are found by alternation:
for a given order the terms are the nearest in the Frobenius norm, and for given terms
the rows of `W` are assigned to the rows of `K` at the least cost,

    min ‖W[rows][:, columns] − K‖_F²  =  const − 2 max Σ_i <W[rows_i, columns], K_i>,

a linear assignment problem; the columns are assigned in the same way. Every step lowers
the error, and every start ends in a local minimum. The first start is the given order.
Others come from singular vectors: those of `A ⊗ B` are `u ⊗ v`, so the ratio of two
that share `v` takes one value for each row of `A`, in whatever order the rows are;
elementwise powers of the matrix have the same order. The rest are random. Of 40 planted
36×36 sums all are recovered if they have one term, half if they have two in the ratio
1 : 0.3, and one in twenty if both are equally strong.

Set `num_starts` for large matrices: every start takes as long as the first.

Weights enter through their diagonals. The solver, in any norm, is then applied to the
permuted matrix with the permuted weights.

References: Kuhn (1955), for the assignment.

>>> from kronjax.kronecker import Configuration
>>> rng = np.random.default_rng(0)
>>> matrix = np.kron(rng.normal(size=(2, 3)), rng.normal(size=(3, 2)))
>>> found = permute(matrix[rng.permutation(6)], Configuration((2, 3), 1))
>>> bool(found.error < 1e-6)
True
"""

import dataclasses
import itertools

import numpy as np

from kronjax import display, validation
from kronjax.greedy import leading, rearrange, unrearrange
from kronjax.kronecker import Configuration

ROUNDS = 60
"""Limit on alternations from one start."""

VECTORS = 8
"""Number of singular vectors whose ratios are examined."""


@dataclasses.dataclass(frozen=True)
class Permutation:
    """An order of rows and columns.

    Attributes:
        rows: Indices of the rows of the matrix in their new order, `[m]`.
        columns: Indices of the columns in their new order, `[n]`.
        error: Relative Frobenius error of the terms nearest to the permuted matrix.
        given_error: The same error for the matrix in the order as given.
    """

    rows: np.ndarray
    columns: np.ndarray
    error: float
    given_error: float

    def __repr__(self) -> str:
        """Return how many rows and columns move, and both errors."""
        rows = [
            (name, f"{np.sum(order != np.arange(len(order)))} of {len(order)} moved")
            for name, order in (("rows", self.rows), ("columns", self.columns))
        ]
        change = f"{self.error:.5g} (as given: {self.given_error:.5g})"
        rows.append(("relative Frobenius error", change))
        return "\n".join(display.lines("Permutation", rows))

    def apply(self, matrix):
        """Return the permuted matrix, `[..., m, n]`, NumPy or jax."""
        return matrix[..., self.rows, :][..., self.columns]

    def undo(self, matrix):
        """Return a permuted matrix in its original order."""
        rows, columns = np.argsort(self.rows), np.argsort(self.columns)
        return matrix[..., rows, :][..., columns]

    def apply_to_weights(self, left=None, right=None):
        """Return the weights of the permuted matrix, or None for None."""
        if left is not None:
            left = left[..., self.rows, :][..., self.rows]
        if right is not None:
            right = right[..., self.columns, :][..., self.columns]
        return left, right


def permute(
    matrix,
    configuration: Configuration,
    *,
    rows: bool = True,
    columns: bool = True,
    left_weight=None,
    right_weight=None,
    num_starts: int = 60,
    seed: int = 0,
) -> Permutation:
    """Find an order of rows and columns that a Kronecker sum approximates better.

    Args:
        matrix: `[m, n]`, NumPy or jax, real.
        configuration: Configuration of the sum that approximates the permuted matrix.
        rows: True if rows may be permuted.
        columns: True if columns may be permuted.
        left_weight: Weight of the rows, `[m, m]`, as for `approximate`; only its
            diagonal is used.
        right_weight: Weight of the columns, `[n, n]`; only its diagonal is used.
        num_starts: Limit on orders to start from; the given order is the first.
        seed: Seed of the random orders.

    Returns:
        `Permutation`, never worse than the order as given. Costs, for each start, up
        to `4 ROUNDS` times the leading singular triplets of `R(W)` in float64, and as
        many assignments of cost `m³`.

    Raises:
        ValueError: If `matrix` is not a single matrix, the configuration does not fit,
            or a weight is not symmetric positive semidefinite.
    """
    target = validation.matrix(matrix, "float64", [])
    if target.ndim != 2 or num_starts < 1:
        raise ValueError(
            f"permute takes one matrix [m, n] and at least one start; got shape "
            f"{target.shape} and num_starts={num_starts}."
        )
    if not isinstance(configuration, Configuration):
        raise ValueError(
            "permute takes one kronjax.Configuration, not a mixture; got "
            f"{configuration!r}."
        )
    m, n = target.shape
    configuration.b_shape((m, n))
    left = validation.weight(left_weight, "left_weight", m, (), target.dtype)
    right = validation.weight(right_weight, "right_weight", n, (), target.dtype)
    if left is not None:
        target = target * np.sqrt(np.maximum(np.diag(left), 0))[:, None]
    if right is not None:
        target = target * np.sqrt(np.maximum(np.diag(right), 0))
    size = np.linalg.norm(target)
    target = target / (size if size > 0 else 1)
    a_shape, rank = configuration.a_shape, configuration.rank
    given = _fit(target, a_shape, rank)[1]
    best = given, np.arange(m), np.arange(n)
    orders = _starts(target, a_shape, (rows, columns), np.random.default_rng(seed))
    for order in itertools.islice(orders, num_starts):
        # The order of the strongest term is that of all terms, so fit it first.
        for terms in dict.fromkeys((1, rank)):
            order = _alternate(target, a_shape, terms, order, rows, columns)[1:]
        error = _fit(target[order[0]][:, order[1]], a_shape, rank)[1]
        if error < best[0] * (1 - 1e-9):
            best = error, *order
        if best[0] <= 1e-7:  # exact
            break
    error, p, q = best
    return Permutation(p, q, error, given)


def _alternate(matrix, a_shape, rank, order, rows, columns):
    """Return the error, the rows and the columns at the end of the alternation."""
    p, q = order
    fitted, error = _fit(matrix[p][:, q], a_shape, rank)
    for _ in range(ROUNDS):
        trial_p, trial_q = p, q
        if rows:
            trial_p = _assign(fitted @ matrix[:, q].T)
            fitted, _ = _fit(matrix[trial_p][:, q], a_shape, rank)
        if columns:
            trial_q = _assign(fitted.T @ matrix[trial_p])
        fitted, trial = _fit(matrix[trial_p][:, trial_q], a_shape, rank)
        if not trial < error * (1 - 1e-9):
            break
        p, q, error = trial_p, trial_q, trial
    return error, p, q


def _assign(scores):
    """Return the assigned column for each row of scores `[k, k]`."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(scores, maximize=True)[1]


def _fit(matrix, a_shape, rank):
    """Return the nearest sum, `[m, n]`, and its distance."""
    x = rearrange(matrix, a_shape)
    u, s, vt = leading(x, rank)
    nearest = (u * s) @ vt
    error = float(np.linalg.norm(x - nearest))
    return unrearrange(nearest, a_shape, matrix.shape), error


def _starts(matrix, a_shape, may, rng):
    """Yield orders of rows and columns to start from; `may` says which may change."""
    (m, n), (m1, n1) = matrix.shape, a_shape
    same = np.arange(m), np.arange(n)
    yield same
    for entries in (matrix, np.abs(matrix), matrix**3):
        u, _, vt = leading(entries, VECTORS)
        ps = _orders(u, m1)[:4] if may[0] else same[:1]
        qs = _orders(vt.T, n1)[:4] if may[1] else same[1:]
        yield from itertools.product(ps, qs)
    while any(may):
        yield (
            rng.permutation(m) if may[0] else same[0],
            (rng.permutation(n) if may[1] else same[1]),
        )


def _orders(vectors, k1):
    """Return orders of rows from the ratios of singular vectors, likeliest first."""
    k = len(vectors)
    k2 = k // k1
    orders = []
    leading = vectors[:, 0]
    safe = np.where(np.abs(leading) > 1e-12, leading, 1e-12)
    ratios = [vectors[:, j] / safe for j in range(1, vectors.shape[1])]
    firsts, seconds = (
        sorted((_grouped(x, groups) for x in ratios), key=lambda pair: pair[0])[:4]
        for groups in (k1, k2)
    )
    places = np.divmod(np.arange(k), k2)
    for (x, first), (y, second) in itertools.product(firsts, seconds):
        agree = sum(
            (place[:, None] == group[None]).astype(float)
            for place, group in zip(places, (first, second), strict=True)
        )
        orders.append((x + y, _assign(agree)))
    return [order for _, order in sorted(orders, key=lambda pair: pair[0])]


def _grouped(ratio, groups):
    """Return the relative variance within `groups` groups of equal size, and labels."""
    order = np.argsort(ratio, kind="stable")
    size = len(ratio) // groups
    labels = np.empty(len(ratio), int)
    labels[order] = np.arange(len(ratio)) // size
    sorted_ = ratio[order].reshape(groups, size)
    within = np.sum((sorted_ - sorted_.mean(1, keepdims=True)) ** 2)
    return within / max(np.sum((ratio - ratio.mean()) ** 2), 1e-300), labels
