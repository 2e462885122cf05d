"""Sums for the kernels of layers, weighted by what calibration saw.

    damage = ½ ‖C^{1/2} (W − K) L^{1/2}‖_F²        W: [n_in, n_out],  y = x W

with the moments `C` of the input and `L` of the gradient at the output: an estimate of
by how much the loss per token grows. Without gradients the damage is the squared error,
weighted by what there is, over the squared norm of the kernel.

`LowRank` is the closed form, of every rank at once: one decomposition of the whitened
kernel serves plans and fits alike. Mixtures of low rank and of one near-square
configuration are fitted by one program for all layers of a shape.

>>> near_square((12, 12))
(3, 4)
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from kronjax import leastsquares
from kronjax.kronecker import (
    Configuration,
    KroneckerTerms,
    divisors,
    interpolative_rank,
    rearrange,
)
from kronjax.lm.work import Work
from kronjax.problem import Problem
from kronjax.setting import factors, prepare

TIERS = (0.35, 0.65, 1.0)
"""Sizes of the programs for mixtures, as parts of the dense kernel: each takes time to
compile, and costs in every step as much as the largest mixture that it can fit."""

EVALUATIONS = 120
"""That a mixture may spend, if nobody says otherwise."""

SOLVE_TOLERANCE = 1e-3
"""Of solves in other norms: within about a percent of what they end at."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A kernel with its weights.

    Attributes:
        name: Of the layer.
        kernel: `[n_in, n_out]`, float32.
        left: Moment of the input, `[n_in, n_in]`, or None.
        right: Moment of the gradient at the output, `[n_out, n_out]`, or None.
    """

    name: str
    kernel: np.ndarray = dataclasses.field(repr=False)
    left: np.ndarray | None = dataclasses.field(default=None, repr=False)
    right: np.ndarray | None = dataclasses.field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """`(n_in, n_out)`."""
        return self.kernel.shape[0], self.kernel.shape[1]

    @property
    def parts(self) -> tuple[np.ndarray | None, ...]:
        """All that fits depend on."""
        return self.kernel, self.left, self.right

    @property
    def arrays(self) -> tuple[jax.Array | None, ...]:
        """The kernel and both moments, float32."""
        return tuple(
            x if x is None else jnp.asarray(x, jnp.float32) for x in self.parts
        )


@dataclasses.dataclass(frozen=True)
class Fit:
    """A sum that stands for a kernel.

    Attributes:
        terms: The factors, float32, of JAX or NumPy.
        relative: Weighted Frobenius error over the norm of the kernel.
        damage: Half the squared weighted error; without gradients, `relative**2`.
        status: `Status`, as an integer.
    """

    terms: tuple[KroneckerTerms, ...] = dataclasses.field(repr=False)
    relative: float
    damage: float
    status: int


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The best low-rank sums for a kernel, of every rank.

    Attributes:
        a: `[n_in, k]`, with `k = min(n_in, n_out)`.
        b: `[k, n_out]`: the first `r` columns of `a` times the first `r` rows of `b`
            are what rank `r` can do.
        tails: `[k + 1]`, the relative squared error of every rank from 0 on.
        total: Damage of leaving the layer out, `½ ‖C^{1/2} W L^{1/2}‖_F²`; 1 without
            gradients, so that damages are relative.
    """

    a: np.ndarray = dataclasses.field(repr=False)
    b: np.ndarray = dataclasses.field(repr=False)
    tails: np.ndarray = dataclasses.field(repr=False)
    total: float

    @classmethod
    def kept(cls, target: Target, work: Work) -> "LowRank":
        """Return what `of` does, decomposed once for all stages of some work."""

        def make():
            found = cls.of(target)
            arrays = {"a": found.a, "b": found.b, "tails": found.tails}
            return arrays, {"total": found.total}

        arrays, facts = work.once("low-rank", make, *target.parts)
        return cls(**arrays, **facts)

    @classmethod
    def of(cls, target: Target) -> "LowRank":
        """Decompose a kernel with its weights."""
        terms, s, unit = _decompose(*target.arrays)
        squares = np.asarray(s, np.float64) ** 2
        tails = np.append(np.cumsum(squares[::-1])[::-1], 0)
        tails /= max(squares.sum(), np.finfo(np.float64).tiny)
        # Without gradients damages of layers compare only as parts of a whole.
        total = 1.0 if target.right is None else float(unit) ** 2 / 2
        a, b = np.asarray(terms.a)[:, :, 0].T, np.asarray(terms.b)[:, 0]
        return cls(a, b, tails, total)

    def tail(self, fraction: float) -> float:
        """Return the relative squared error of interpolative layers of a size.

        Args:
            fraction: Parameters over those of the dense kernel.
        """
        shape = len(self.a), self.b.shape[1]
        return float(self.tails[interpolative_rank(shape, fraction * math.prod(shape))])

    def fit(self, rank: int) -> Fit:
        """Return the sum of `rank` columns times rows."""
        a, b = self.a.T[:rank, :, None], self.b[:rank, None]
        tail = float(self.tails[min(rank, len(self.tails) - 1)])
        terms = KroneckerTerms(jnp.asarray(a), jnp.asarray(b))
        return Fit((terms,), math.sqrt(tail), self.total * tail, 0)


class Prepared:
    """A target with its weights decomposed, for sums of other terms.

    Attributes:
        target: What was prepared.
        low_rank: What they compete with.
    """

    def __init__(self, target: Target, low_rank: LowRank | None = None) -> None:
        """Decompose the weights.

        Args:
            target: A kernel.
            low_rank: If it is known already.
        """
        self.target = target
        self.low_rank = low_rank or LowRank.of(target)
        # Tall kernels are solved as wide ones: both kinds share their programs.
        self._is_tall = target.shape[0] > target.shape[1]
        self._wide = target
        if self._is_tall:
            turned = np.ascontiguousarray(target.kernel.T)
            self._wide = Target(target.name, turned, target.right, target.left)

    @functools.cached_property
    def _prepared(self):
        # The coordinates are the same for all ranks.
        return _preparer(_tier(self._wide.shape, (1, 1)))(*self._wide.arrays)

    def mixture(
        self,
        ranks: tuple[int, int],
        *,
        evaluations: int = EVALUATIONS,
        tolerance: float = 1e-5,
    ) -> Fit:
        """Return a sum of low rank and near-square terms, fitted jointly.

        Args:
            ranks: Of both; 0 leaves one of them out.
            evaluations: Values and gradients to spend.
            tolerance: As for `leastsquares.fit`.
        """
        if ranks[1] == 0:
            return self.low_rank.fit(ranks[0])
        problem = _tier(self._wide.shape, ranks)
        solve = _fitter(problem)
        found = solve(*self._prepared, np.array(ranks), evaluations, tolerance)
        # NumPy cuts without compiling anything.
        found = jax.device_get(found)
        terms = tuple(
            jax.tree.map(lambda x, rank=rank: x[:rank], one)
            for one, rank in zip(found.terms, ranks, strict=True)
            if rank
        )
        return self._as_asked(terms, found.relative, found.status)

    def van_loan(self, configuration: Configuration) -> Fit:
        """Return the closed form of one configuration without weights."""
        kernel, rank = jnp.asarray(self.target.kernel, jnp.float32), configuration.rank
        shapes = configuration.a_shape, configuration.b_shape(self.target.shape)
        u, s, vt = jnp.linalg.svd(rearrange(kernel, shapes[0]), full_matrices=False)
        root = jnp.sqrt(s[:rank])
        terms = KroneckerTerms(
            (u[:, :rank] * root[None]).T.reshape(rank, *shapes[0]),
            (root[:, None] * vt[:rank]).reshape(rank, *shapes[1]),
        )
        squares = np.asarray(s, np.float64) ** 2
        tail = squares[rank:].sum() / max(squares.sum(), np.finfo(np.float64).tiny)
        return Fit((terms,), math.sqrt(tail), self.low_rank.total * tail, 0)

    def solve(self, configurations: tuple[Configuration, ...], norm: str) -> Fit:
        """Return a sum for any configurations and any norm, by `kronjax.approximate`.

        Args:
            configurations: What to look for.
            norm: As in recipes; `auto` is Frobenius with weights, spectral without.
        """
        from kronjax.approximation import approximate

        wide = self._wide
        has_weights = wide.left is not None or wide.right is not None
        if norm == "auto":
            norm = "frobenius" if has_weights else "spectral"
        if self._is_tall:
            configurations = tuple(
                Configuration((one.a_shape[1], one.a_shape[0]), one.rank)
                for one in configurations
            )
        found = approximate(
            wide.kernel,
            configurations,
            norm=norm,
            left_weight=wide.left,
            right_weight=wide.right,
            starts=1,
            tolerance=SOLVE_TOLERANCE,
            progress=False,
        )
        ratio = found.weighted_relative if has_weights else found.relative
        assert ratio is not None
        return self._as_asked(found.terms, ratio.frobenius, found.status)

    def _as_asked(self, terms, relative, status) -> Fit:
        """Return a sum for the wide kernel as one for the target."""
        if self._is_tall:
            terms = tuple(map(_transposed, terms))
        relative = float(relative)
        damage = self.low_rank.total * relative**2
        return Fit(terms, relative, damage, int(status))


def near_square(shape: tuple[int, int]) -> tuple[int, int] | None:
    """Return the shape of left factors of which a term has the fewest parameters.

    Of several the one whose factors are most alike in rows and in columns. None where
    all there is is low rank: sizes that are prime.
    """
    m, n = shape
    if m > n:
        turned = near_square((n, m))
        return None if turned is None else (turned[1], turned[0])
    trivial = {(m, 1), (1, n), (m, n), (1, 1)}

    def size(pair):
        m1, n1 = pair
        d1, d2 = m1 * n1, m * n // (m1 * n1)
        uneven = abs(math.log(m1 * m1 / m)) + abs(math.log(n1 * n1 / n))
        return d1 + d2, uneven, pair

    pairs = {(m1, n1) for m1 in divisors(m) for n1 in divisors(n)}
    return min(pairs - trivial, key=size, default=None)


def mix(shape: tuple[int, int], fraction: float, share: float) -> tuple[int, int]:
    """Return the ranks of a mixture of a size.

    Args:
        shape: `(n_in, n_out)`.
        fraction: Parameters over those of the dense kernel.
        share: Of the parameters, what goes to low rank.

    Returns:
        Low rank, and number of near-square terms.
    """
    m, n = shape
    low, *square = _largest(shape, 1.0)
    budget = fraction * m * n
    first = min(round(share * budget / (m + n)), low.rank)
    left = budget - first * (m + n)
    if not square:
        return first, 0
    one = Configuration(square[0].a_shape, 1).num_parameters(shape)
    return first, max(0, min(int(left / one), square[0].rank))


def configurations(
    shape: tuple[int, int], ranks: tuple[int, int]
) -> tuple[Configuration, ...]:
    """Return the configurations of a mixture, without those of rank 0."""
    pairs = zip(((shape[0], 1), near_square(shape)), ranks, strict=True)
    return tuple(Configuration(a, rank) for a, rank in pairs if a and rank)


def ranks_of(
    shape: tuple[int, int], wanted: tuple[Configuration, ...]
) -> tuple[int, int] | None:
    """Return the ranks if `wanted` is such a mixture, or None."""
    held = {one.a_shape: one.rank for one in wanted}
    if len(held) < len(wanted):
        return None
    low = held.pop((shape[0], 1), 0)
    square = near_square(shape)
    ranks = low, held.pop(square, 0) if square else 0
    return None if held else ranks


def _largest(shape, fraction):
    """Return low rank and near-square terms, if there are such, each at a size."""
    m, n = shape
    budget = fraction * m * n
    found = []
    for a_shape in ((m, 1), near_square(shape)):
        if a_shape is not None:
            one = Configuration(a_shape, 1)
            most = max(int(budget / one.num_parameters(shape)), 1)
            found.append(Configuration(a_shape, min(most, one.max_rank(shape))))
    return tuple(found)


def _tier(shape, ranks):
    """Return the smallest problem in which a mixture of these ranks fits."""
    for fraction in TIERS:
        largest = _largest(shape, fraction)
        if all(rank <= one.rank for rank, one in zip(ranks, largest, strict=False)):
            break
    return Problem.of(shape, largest, 2, starts=1)


def _transposed(terms: KroneckerTerms) -> KroneckerTerms:
    """Return the transpose of a sum; low rank stays columns times rows."""
    a, b = (x.swapaxes(1, 2) for x in (terms.a, terms.b))
    is_rows = a.shape[1] == 1 and b.shape[2] == 1
    return KroneckerTerms(b, a) if is_rows else KroneckerTerms(a, b)


@jax.jit
def _decompose(kernel, left, right):
    """Return all low-rank terms, the singular values, and the unit of errors."""
    one = Configuration((len(kernel), 1), min(kernel.shape))
    problem = Problem.of(kernel.shape, one, 2, starts=1)
    setting, _ = prepare(problem, kernel, left, right)
    u, s, vt = jnp.linalg.svd(setting.target, full_matrices=False)
    root = jnp.sqrt(s) * jnp.sqrt(setting.scale)
    terms = factors(problem, one, (u * root[None]).T, root[:, None] * vt)
    return setting.frames[0].to_terms(terms), s, setting.unit


@functools.lru_cache(maxsize=64)
def _preparer(problem):
    return jax.jit(functools.partial(prepare, problem))


@functools.lru_cache(maxsize=64)
def _fitter(problem):
    return jax.jit(functools.partial(leastsquares.fit, problem))
