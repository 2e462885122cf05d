"""Low rank in closed form, weighted or not: truncated singular values.

    minimise ‖L^{1/2} (W − K) R^{1/2}‖        over K of rank r, in any Schatten norm

by the SVD of the whitened matrix (Eckart and Young, 1936). `LowRank` holds all ranks at
once: one decomposition serves plans and fits alike.

>>> round(LowRank.of(Target("", np.eye(4, dtype=np.float32))).fit(2)[1] ** 2, 6)
0.5
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from kronjax.io.cache import Cache
from kronjax.kronecker import Configuration, KroneckerTerms, interpolative_rank
from kronjax.runs.joint import Target
from kronjax.solver.problem import Problem
from kronjax.solver.whitened import factors, prepare


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The best low-rank sums for a matrix, of every rank.

    Attributes:
        a: `[m, k]`, with `k = min(m, n)`.
        b: `[k, n]`: the first `r` columns of `a` times the first `r` rows of `b` are
            the best sum of rank `r`.
        tails: `[k + 1]`, the relative squared error of every rank from 0 on.
        total: Half the squared weighted norm, `½ ‖L^{1/2} W R^{1/2}‖_F²`.
    """

    a: np.ndarray = dataclasses.field(repr=False)
    b: np.ndarray = dataclasses.field(repr=False)
    tails: np.ndarray = dataclasses.field(repr=False)
    total: float

    @classmethod
    def kept(cls, target: Target, cache: Cache) -> "LowRank":
        """Return the decomposition, computed once for all stages of a run."""

        def make():
            found = cls.of(target)
            arrays = {"a": found.a, "b": found.b, "tails": found.tails}
            return arrays, {"total": found.total}

        arrays, facts = cache.get_or_compute("low-rank", make, *target.arrays)
        return cls(**arrays, **facts)

    @classmethod
    def of(cls, target: Target) -> "LowRank":
        """Decompose a matrix with its weights."""
        arrays = (x if x is None else jnp.asarray(x) for x in target.arrays)
        terms, s, unit = _decompose(*arrays)
        squares = np.asarray(s, np.float64) ** 2
        tails = np.append(np.cumsum(squares[::-1])[::-1], 0)
        tails /= max(squares.sum(), np.finfo(np.float64).tiny)
        a, b = np.asarray(terms.a)[:, :, 0].T, np.asarray(terms.b)[:, 0]
        return cls(a, b, tails, float(unit) ** 2 / 2)

    def tail(self, fraction: float) -> float:
        """Return the relative squared error of interpolative layers of a size.

        Args:
            fraction: Parameters over those of the dense matrix.
        """
        shape = len(self.a), self.b.shape[1]
        return float(self.tails[interpolative_rank(shape, fraction * math.prod(shape))])

    def fit(self, rank: int) -> tuple[KroneckerTerms, float]:
        """Return the sum of `rank` columns times rows, and its relative error."""
        a, b = self.a.T[:rank, :, None], self.b[:rank, None]
        tail = float(self.tails[min(rank, len(self.tails) - 1)])
        return KroneckerTerms(a, b), math.sqrt(tail)  # type: ignore[arg-type]


def truncated(
    matrix: np.ndarray, configuration: Configuration
) -> tuple[tuple[KroneckerTerms, ...], float]:
    """Return the best low-rank sum without weights, and a bound for all others.

    The bound is the first singular value that is left out, less the largest possible
    effect of rounding. The sum is empty where numbers overflow.

    Args:
        matrix: `[m, n]`, finite.
        configuration: `(m, 1)` or `(1, n)`, with the rank.
    """
    m, n = matrix.shape
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    except np.linalg.LinAlgError:
        return (), 0.0
    if not np.isfinite(s).all():
        return (), 0.0
    r, eps = configuration.rank, float(np.finfo(matrix.dtype).eps)
    left = (u[:, :r] * np.sqrt(s[:r])).T.reshape(r, m, 1)
    right = (np.sqrt(s[:r, None]) * vt[:r]).reshape(r, 1, n)
    bound = float(s[r]) if r < len(s) else 0.0
    bound = max(bound - 4 * math.sqrt(m + n) * eps * float(s[0]), 0.0)
    a, b = (left, right) if configuration.a_shape == (m, 1) else (right, left)
    return (KroneckerTerms(a, b),), bound  # type: ignore[arg-type]


@jax.jit
def _decompose(matrix, left, right):
    """Return all low-rank terms, the singular values, and the unit of errors."""
    whole = Configuration((len(matrix), 1), min(matrix.shape))
    problem = Problem.of(matrix.shape, whole, 2, num_starts=1)
    setting, _ = prepare(problem, matrix, left, right)
    u, s, vt = jnp.linalg.svd(setting.target, full_matrices=False)
    root = jnp.sqrt(s) * jnp.sqrt(setting.scale)
    terms = factors(problem, whole, (u * root[None]).T, root[:, None] * vt)
    return setting.frames[0].to_terms(terms), s, setting.unit
