"""Sums at p = 2 without a closed form: fits of many sizes by one program.

    minimise ‖L^{1/2} (W − K) R^{1/2}‖_F

Sums of several configurations, or under weights, are fitted by quasi-Newton steps over
their factors. Ranks are traced: a program is compiled for the largest ranks of a tier,
and serves all smaller ones, as plans for a budget need them.

>>> target = Target("", np.eye(6, dtype=np.float32))
>>> wanted = (Configuration((6, 1), 2), Configuration((2, 3), 1))
>>> round(Prepared(target).fit(wanted, tolerance=1e-2).relative, 2)
0.58
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kronjax.kronecker import Configuration, KroneckerTerms
from kronjax.runs import pool_programs as programs
from kronjax.solver import least_squares
from kronjax.solver.descent import Status
from kronjax.solver.problem import Problem
from kronjax.solver.whitened import prepare

TIERS = (0.35, 0.65, 1.0)
"""Sizes of the programs, as parts of the dense matrix: each takes time to compile, and
costs in every step as much as the largest sum that it can fit."""


PRODUCTS = 240
"""Products of the size of `EᵀE` that a fit may spend by default: 120 evaluations."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A matrix with its weights.

    Attributes:
        name: Name of the matrix.
        matrix: `W`, `[m, n]`, float32 or float64.
        left: Weight of the rows, `[m, m]`, or None.
        right: Weight of the columns, `[n, n]`, or None.
    """

    name: str
    matrix: np.ndarray = dataclasses.field(repr=False)
    left: np.ndarray | None = dataclasses.field(default=None, repr=False)
    right: np.ndarray | None = dataclasses.field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """`(m, n)`."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def arrays(self) -> tuple[np.ndarray | None, ...]:
        """The matrix and both weights."""
        return self.matrix, self.left, self.right

    @property
    def weighted(self) -> tuple[bool, bool]:
        """Whether there is a left and a right weight."""
        return self.left is not None, self.right is not None

    @property
    def T(self) -> "Target":
        """The transpose, with its weights."""
        turned = np.ascontiguousarray(self.matrix.T)
        return Target(self.name, turned, self.right, self.left)


@dataclasses.dataclass(frozen=True)
class Joint:
    """A sum that was fitted at p = 2.

    Attributes:
        terms: One `KroneckerTerms` for each configuration, NumPy.
        relative: Weighted Frobenius error over the weighted norm of the matrix.
        status: `Status` of the descent.
        products: Products of the size of `EᵀE` that were allowed.
    """

    terms: tuple[KroneckerTerms, ...] = dataclasses.field(repr=False)
    relative: float
    status: Status
    products: int


class Prepared:
    """A target with its weights decomposed, for sums of many sizes.

    Wide matrices are fitted as their transposes, so that both kinds share programs.

    Attributes:
        target: The target as given.
        tall: The target, or its transpose if it has fewer rows than columns.
    """

    def __init__(self, target: Target) -> None:
        """Keep the target; its weights are decomposed when they are needed."""
        self._settings: dict[Any, Any] = {}
        self.target = target
        self.is_wide = target.shape[0] < target.shape[1]
        self.tall = target.T if self.is_wide else target

    def setting_of(self, problem: Problem) -> Any:
        """Return the result of `whitened.prepare`, computed once for all ranks."""
        shapes = tuple(x.a_shape for x in problem.configurations)
        if shapes not in self._settings:
            smallest = tuple(Configuration(a_shape, 1) for a_shape in shapes)
            alike = dataclasses.replace(problem, configurations=smallest)
            arrays = [x if x is None else jnp.asarray(x) for x in self.tall.arrays]
            self._settings[shapes] = programs.jitted(prepare, alike)(*arrays)
        return self._settings[shapes]

    def fit(
        self,
        configurations: Sequence[Configuration],
        *,
        max_products: int | None = None,
        tolerance: float,
    ) -> Joint:
        """Return a sum of these configurations, fitted jointly.

        Args:
            configurations: The configurations of the sum.
            max_products: Products of the size of `EᵀE` to spend; `PRODUCTS` if None.
            tolerance: As for `continuation.solve`: a two-hundredth of it is the
                predicted relative decrease of the squared error that is not worth a
                step.
        """
        (fitted,) = fit_all(
            [self], [configurations], max_products=max_products, tolerance=tolerance
        )
        return fitted

    def wanted(self, configurations: Sequence[Configuration]):
        """Return configurations of the tall orientation, and the program for them."""
        tall = as_tall(configurations, self.target.shape)
        return tall, program(self.tall.shape, tall, self.target.weighted)

    def result(
        self, fit: Any, configurations: Sequence[Configuration], products: int
    ) -> Joint:
        """Return the result of a program, a `least_squares.Fit`, for the target."""
        terms = [
            jax.tree.map(lambda x, rank=configuration.rank: x[:rank], part)
            for part, configuration in zip(fit.terms, configurations, strict=True)
        ]
        if self.is_wide:
            terms = [part.T for part in terms]
        return Joint(
            tuple(map(as_wanted, terms, configurations)),
            float(fit.relative),
            Status(int(fit.status)),
            products,
        )


def fit_all(
    several: Sequence[Prepared],
    wanted: Sequence[Sequence[Configuration]],
    *,
    max_products: int | None = None,
    tolerance: float,
) -> list[Joint]:
    """Return sums for several targets that share a program, fitted as one batch.

    A batch pays on accelerators. On a CPU six kernels of 192×576 took 1.4 times as long
    as one after the other, since all go on until the slowest has ended.

    Args:
        several: The targets; of one program, see `program`.
        wanted: The configurations for each.
        max_products: As for `Prepared.fit`, and so is `tolerance`.
        tolerance: As for `Prepared.fit`.
    """
    products = max_products or PRODUCTS
    pairs = [
        x.wanted(configurations)
        for x, configurations in zip(several, wanted, strict=True)
    ]
    problem = pairs[0][1]
    ranks = np.array([[x.rank for x in tall] for tall, _ in pairs])
    settings = [prepared.setting_of(problem) for prepared in several]
    limits = max(products // 2, 4), tolerance / 200
    if len(several) == 1:
        solve = programs.jitted(least_squares.fit, problem)
        results = [jax.device_get(solve(*settings[0], ranks[0], *limits))]
    else:
        solve = programs.jitted(_fit_batch, problem)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *settings)
        batch = jax.device_get(solve(*stacked, ranks, *limits))
        results = [
            jax.tree.map(lambda x, i=i: x[i], batch) for i in range(len(several))
        ]
    return [
        prepared.result(result, configurations, products)
        for prepared, result, configurations in zip(
            several, results, wanted, strict=True
        )
    ]


def _fit_batch(problem, setting, inverses, ranks, evaluations, tolerance):
    fit = functools.partial(least_squares.fit, problem)
    axes = 0, 0, 0, None, None
    return jax.vmap(fit, in_axes=axes)(setting, inverses, ranks, evaluations, tolerance)


def as_tall(
    configurations: Sequence[Configuration], shape: tuple[int, int]
) -> tuple[Configuration, ...]:
    """Return configurations of a matrix as those of its tall orientation.

    A row times a column is a column times a row, and counts as such.
    """
    m, n = shape
    if m < n:
        configurations = [x.T for x in configurations]
        m, n = n, m
    return tuple(
        Configuration((m, 1), x.rank) if x.a_shape == (1, n) else x
        for x in configurations
    )


def program(
    shape: tuple[int, int],
    configurations: Sequence[Configuration],
    weighted: tuple[bool, bool],
) -> Problem:
    """Return the smallest problem of a tier in which a sum of these ranks fits.

    Args:
        shape: `(m, n)`, tall.
        configurations: The configurations of the sum.
        weighted: Whether there is a left and a right weight.
    """
    largest: tuple[Configuration, ...] = ()
    for fraction in TIERS:
        largest = tuple(_largest(shape, x, fraction) for x in configurations)
        ranks = zip(configurations, largest, strict=True)
        if all(x.rank <= most.rank for x, most in ranks):
            break
    else:
        largest = tuple(configurations)
    return Problem.of(shape, largest, 2, num_starts=1, weighted=weighted)


def _largest(shape, configuration, fraction):
    """Return a configuration with the largest rank of a size."""
    m, n = shape
    each = Configuration(configuration.a_shape, 1).num_parameters(shape)
    rank = max(int(fraction * m * n / each), 1)
    return Configuration(
        configuration.a_shape, min(rank, configuration.max_rank(shape))
    )


def as_wanted(terms: KroneckerTerms, wanted: Configuration) -> KroneckerTerms:
    """Return low rank as columns times rows, or as rows times columns."""
    if terms.a.shape[1:] == wanted.a_shape:
        return terms
    return KroneckerTerms(terms.b, terms.a)
