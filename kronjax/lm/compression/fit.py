"""Sums for the kernels of layers, weighted by what calibration saw.

    damage = ½ ‖C^{1/2} (W − K) L^{1/2}‖_F²        W: [n_in, n_out],  y = x W

with the moments `C` of the input and `L` of the gradient at the output: an estimate of
by how much the loss per token grows. Without gradients the damage is the squared error,
weighted by what there is, over the squared norm of the kernel.

`LowRank` is the closed form, of every rank at once: one decomposition of the whitened
kernel serves plans and fits alike. Mixtures of low rank and of one near-square
configuration are fitted by one program for all layers of a shape.

>>> round(LowRank.of(Target("", np.eye(4, dtype=np.float32))).fit(2).relative ** 2, 6)
0.5
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kronjax.io.cache import Work
from kronjax.kronecker import (
    Configuration,
    KroneckerTerms,
    interpolative_rank,
    rearrange,
)
from kronjax.lm.compression import mixture
from kronjax.solver import least_squares
from kronjax.solver.problem import Problem
from kronjax.solver.whitened import factors, prepare

EVALUATIONS = 120
"""That a mixture may spend, if nobody says otherwise."""

SOLVE_TOLERANCE = 0.2
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
        wide: The target, or its transpose if that has fewer rows.
        is_tall: Whether it is the transpose.
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
        self.is_tall = target.shape[0] > target.shape[1]
        self.wide = target
        if self.is_tall:
            turned = np.ascontiguousarray(target.kernel.T)
            self.wide = Target(target.name, turned, target.right, target.left)

    @functools.cached_property
    def setting(self):
        """What `whitened.prepare` makes of the wide kernel."""
        # The coordinates are the same for all ranks.
        return _preparer(mixture.program(self.wide.shape, (1, 1)))(*self.wide.arrays)

    def mixture(self, ranks: tuple[int, int], **options: Any) -> Fit:
        """Return a sum of low rank and near-square terms, fitted jointly.

        Args:
            ranks: Of both; 0 leaves one of them out.
            options: Those of `mixtures`.
        """
        return mixtures([self], [ranks], **options)[0]

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

    def as_asked(self, terms, relative, status) -> Fit:
        """Return a sum for the wide kernel as one for the target."""
        if self.is_tall:
            terms = tuple(map(_transposed, terms))
        relative = float(relative)
        damage = self.low_rank.total * relative**2
        return Fit(terms, relative, damage, int(status))


def mixtures(
    several: Sequence[Prepared],
    ranks: Sequence[tuple[int, int]],
    *,
    evaluations: int = EVALUATIONS,
    tolerance: float = 1e-5,
) -> list[Fit]:
    """Return sums of low rank and near-square terms, each fitted jointly.

    Args:
        several: Of one wide shape, with weights of the same sides.
        ranks: Of both kinds of terms, for each; 0 leaves one of them out.
        evaluations: Values and gradients to spend on each.
        tolerance: As for `least_squares.fit`.
    """
    if all(pair[1] == 0 for pair in ranks):
        return [x.low_rank.fit(r) for x, (r, _) in zip(several, ranks, strict=True)]
    largest = max(r for r, _ in ranks), max(r for _, r in ranks)
    solve = _fitter(mixture.program(several[0].wide.shape, largest), len(several) > 1)
    if len(several) == 1:
        found = solve(*several[0].setting, np.array(ranks[0]), evaluations, tolerance)
        parts = [jax.device_get(found)]
    else:
        stacked = jax.tree.map(
            lambda *x: jnp.stack(x), *(one.setting for one in several)
        )
        found = jax.device_get(solve(*stacked, np.array(ranks), evaluations, tolerance))
        parts = [jax.tree.map(lambda x, i=i: x[i], found) for i in range(len(several))]
    fits = []
    for prepared, pair, part in zip(several, ranks, parts, strict=True):
        # NumPy cuts without compiling anything.
        terms = tuple(
            jax.tree.map(lambda x, rank=rank: x[:rank], one)
            for one, rank in zip(part.terms, pair, strict=True)
            if rank
        )
        fits.append(prepared.as_asked(terms, part.relative, part.status))
    return fits


def solve(
    several: Sequence[Prepared],
    configurations: Sequence[Configuration],
    norm: str,
) -> list[Fit]:
    """Return sums for any configurations and any norm, by `kronjax.approximate`.

    Args:
        several: Of one shape, with weights of the same sides.
        configurations: What to look for.
        norm: As in recipes; `auto` is Frobenius with weights, spectral without.
    """
    from kronjax.approximation import approximate

    first = several[0]
    has_weights = first.wide.left is not None or first.wide.right is not None
    if norm == "auto":
        norm = "frobenius" if has_weights else "spectral"
    if first.is_tall:
        configurations = [one.T for one in configurations]
    kernels, left, right = (
        None if parts[0] is None else np.stack(parts)
        for parts in zip(*(one.wide.parts for one in several), strict=True)
    )
    found = approximate(
        kernels,
        configurations,
        norm=norm,
        left_weight=left,
        right_weight=right,
        starts=1,
        tolerance=SOLVE_TOLERANCE,
        schedule="fixed",
        progress=False,
    )
    ratio = found.weighted_relative if has_weights else found.relative
    assert ratio is not None
    return [
        prepared.as_asked(
            jax.tree.map(lambda x, i=i: x[i], found.terms),
            ratio.frobenius[i],
            found.status[i],
        )
        for i, prepared in enumerate(several)
    ]


def _transposed(terms: KroneckerTerms) -> KroneckerTerms:
    """Return the transpose of a sum; low rank stays columns times rows."""
    turned = terms.T
    is_rows = turned.a.shape[1] == 1 and turned.b.shape[2] == 1
    return KroneckerTerms(turned.b, turned.a) if is_rows else turned


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
def _fitter(problem, batched):
    solve = functools.partial(least_squares.fit, problem)
    return jax.jit(jax.vmap(solve, in_axes=(0, 0, 0, None, None)) if batched else solve)
