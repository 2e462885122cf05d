"""Low rank in closed form, weighted or not: truncated singular values.

    minimise ‖L^{1/2} (W − K) R^{1/2}‖        over K of rank r, in any Schatten norm

by the SVD of the whitened matrix (Eckart and Young, 1936). `LowRank` holds all ranks at
once: one decomposition serves plans and fits alike.

>>> round(LowRank.of(Target("", np.eye(4, dtype=np.float32))).fit(2)[1] ** 2, 6)
0.5
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from kronjax.io.cache import Cache
from kronjax.kronecker import Configuration, KroneckerTerms, interpolative_rank
from kronjax.runs.joint import Target
from kronjax.solver.problem import Problem
from kronjax.solver.whitened import factors, prepare

_TINY = np.finfo(np.float64).tiny


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The best low-rank sums for a matrix, of every rank.

    Attributes:
        a: `[m, k]`, with `k = min(m, n)`.
        b: `[k, n]`: the first `r` columns of `a` times the first `r` rows of `b` are
            the best sum of rank `r`.
        values: `[k]`, the singular values of `L^{1/2} W R^{1/2}`, float64.
    """

    a: np.ndarray = dataclasses.field(repr=False)
    b: np.ndarray = dataclasses.field(repr=False)
    values: np.ndarray = dataclasses.field(repr=False)

    @classmethod
    def kept(cls, target: Target, cache: Cache) -> "LowRank":
        """Return the decomposition, computed once for all stages of a run."""

        def compute():
            return dataclasses.asdict(cls.of(target)), {}

        arrays, _ = cache.get_or_compute("low-rank", compute, *target.arrays)
        return cls(**arrays)

    @classmethod
    def of(cls, target: Target) -> "LowRank":
        """Decompose a matrix with its weights; one with NaN is taken for zeros.

        Raises:
            LinAlgError: If the iteration does not converge.
        """
        if target.weighted == (False, False):
            return cls(*_decompose_plain(target.matrix))
        arrays = (x if x is None else jnp.asarray(x) for x in target.arrays)
        terms, s, unit = _decompose(*arrays)
        a, b = np.asarray(terms.a)[:, :, 0].T, np.asarray(terms.b)[:, 0]
        return cls(a, b, np.asarray(s, np.float64) * float(unit))

    @functools.cached_property
    def tails(self) -> np.ndarray:
        """The relative squared error of every rank from 0 on, `[k + 1]`."""
        squares = (self.values / max(self.values[0], _TINY)) ** 2
        tails = np.append(np.cumsum(squares[::-1])[::-1], 0)
        return tails / max(squares.sum(), _TINY)

    @property
    def total(self) -> float:
        """Half the squared weighted norm, `½ ‖L^{1/2} W R^{1/2}‖_F²`."""
        return float(np.sum(self.values**2)) / 2

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

    def bound(self, rank: int) -> float:
        """Return a lower bound for the spectral error of all sums of a rank.

        The bound is the first singular value that is left out, less the largest
        possible effect of rounding. It holds for matrices without weights.
        """
        if rank >= len(self.values):
            return 0.0
        m, n = len(self.a), self.b.shape[1]
        rounding = 4 * math.sqrt(m + n) * float(np.finfo(self.a.dtype).eps)
        return max(float(self.values[rank] - rounding * self.values[0]), 0.0)


def _decompose_plain(matrix: np.ndarray):
    """Return the factors and the singular values of a matrix without weights."""
    largest = np.abs(matrix).max()
    if not np.isfinite(largest):
        matrix, largest = np.zeros_like(matrix), 0
    # An even power of two changes no digit, and no singular value overflows.
    half = int(np.frexp(largest)[1]) // 2
    u, s, vt = np.linalg.svd(np.ldexp(matrix, -2 * half), full_matrices=False)
    root = np.ldexp(np.sqrt(s), half)
    return u * root, root[:, None] * vt, np.ldexp(s.astype(np.float64), 2 * half)


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
