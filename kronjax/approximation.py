"""`approximate`: matrices in; Kronecker sums, errors and a report out.

It runs on the host. It checks the input, picks the dtype, solves all matrices in the
pools of `kronjax.runs`, whose programs compile once for each shape, while it shows
progress, and measures the errors of the sums anew, in float64. Results are NumPy.

>>> import numpy as np
>>> from kronjax import Configuration, approximate
>>> matrix = np.kron(np.arange(6.0).reshape(2, 3), np.arange(6.0).reshape(3, 2))
>>> bool(approximate(matrix, Configuration((2, 3), rank=1)).error.spectral < 1e-9)
True
"""

import dataclasses
import time
from collections.abc import Sequence

import jax
import numpy as np

from kronjax import display, validation
from kronjax.cpu_threads import one_blas_thread
from kronjax.io.progress import bar
from kronjax.kronecker import Configuration, KroneckerTerms
from kronjax.linalg.dense import multiply_out
from kronjax.linalg.residuals import ResidualNorms, measure
from kronjax.norm import Norm
from kronjax.proof import newton
from kronjax.proof.certificate import Certificate, certificate_of
from kronjax.runs.batch import Batch, replaced
from kronjax.runs.pool_programs import Kind
from kronjax.solver.problem import Problem
from kronjax.solver.solution import Trace

ATTEMPTS = 3
"""Solves, each with a quarter of the tolerance, until the gap is proven."""


@dataclasses.dataclass(frozen=True)
class Approximation:
    """The result of `approximate`; arrays are NumPy, with the batch axes of the input.

    Attributes:
        terms: One `KroneckerTerms` for each configuration, `a: [..., r, m1, n1]` and
            `b: [..., r, m2, n2]`, in the dtype of the computation.
        error: `ResidualNorms` of the terms against the matrix as given, computed in
            float64.
        relative: The same divided by the norms of the matrix; 0 for a zero matrix.
        van_loan: `ResidualNorms` of the sum that is nearest in the Frobenius norm; for
            several configurations, of one after the other. With weights, those of the
            starting point of the solve, in the weighted norms: it is the solution for
            weights that are replaced by Kronecker products.
        weighted: `ResidualNorms` of `L^{1/2} (T − K) R^{1/2}` with the weights as
            given, or None without weights.
        weighted_relative: The same divided by the weighted norms of the matrix, or
            None.
        trace: `Trace` of the solve, `[..., stages]`.
        status: `Status` of every matrix, as integers.
        seconds: Seconds of solving, compilation excluded; with `certify` also of
            proving, the compilation of proofs included.
        compile_seconds: Seconds of tracing and compiling; 0 when done before.
        notes: Decisions that were made on the user's behalf.
        certificate: The proven bounds, with `certify=True`; else None, and
            `kronjax.certify` computes them.
        finishes: Results of the second-order finish, one for each matrix in order, or
            None without it.
    """

    terms: tuple[KroneckerTerms, ...]
    error: ResidualNorms
    relative: ResidualNorms
    van_loan: ResidualNorms
    trace: Trace
    status: np.ndarray
    seconds: float
    compile_seconds: float
    notes: tuple[str, ...]
    weighted: ResidualNorms | None = None
    weighted_relative: ResidualNorms | None = None
    certificate: Certificate | None = None
    finishes: tuple[newton.Finish, ...] | None = None

    def __repr__(self) -> str:
        """Return the sizes, errors and status in at most ten lines."""
        return "\n".join(display.summary_lines(self))

    def _repr_html_(self) -> str:
        """Return the same as a table for notebooks."""
        return display.summary_html(self)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape `(m, n)` of the matrices."""
        return self.terms[0].shape

    @property
    def num_parameters(self) -> int:
        """Number of entries in all factors of one matrix."""
        return sum(terms.num_parameters for terms in self.terms)

    @property
    def products(self) -> np.ndarray:
        """Products of the size of `EᵀE` spent on every matrix, all starts included.

        Those of attempts that `certify` has replaced are not.
        """
        return np.sum(self.trace.products, axis=-1)

    def matrix(self) -> np.ndarray:
        """Multiply the sum out: `[..., m, n]`, in the dtype of the factors."""
        return np.sum([multiply_out(terms.a, terms.b) for terms in self.terms], axis=0)


def approximate(
    matrix,
    configuration: Configuration | Sequence[Configuration],
    *,
    norm: float | str | Norm = "spectral",
    left_weight=None,
    right_weight=None,
    dtype: str | None = None,
    num_starts: int = 4,
    max_products: int | None = None,
    tolerance: float = 2e-4,
    schedule: str | Sequence[float] = "adaptive",
    seed: int = 0,
    certify: bool = False,
    finish: bool = False,
    progress: bool | None = None,
) -> Approximation:
    """Approximate one matrix, or many of one shape, by sums of Kronecker products.

    Minimises `‖L^{1/2} (T − Σ_k A_k ⊗ B_k) R^{1/2}‖` for every `T` in the batch at the
    same time.

    Args:
        matrix: `[..., m, n]`, NumPy or jax, real.
        configuration: The configuration of the sum, or several that are fitted jointly.
        norm: "spectral", "frobenius" (closed form for one configuration without
            weights) or "schatten:P" with P = 2, 4, 6, 10, …, 4098.
        left_weight: `L`, symmetric positive semidefinite, `[m, m]` for all matrices or
            `[..., m, m]`; the identity by default. For data-aware approximation of
            the kernel `K` of `y = x @ K` the second moment of `x`.
        right_weight: `R`, `[n, n]` or `[..., n, n]`, likewise: the second moment of the
            gradients with respect to `y`. `weighted.RIDGE` of the mean eigenvalue is
            added to each weight.
        dtype: "float32" or "float64" (or NumPy's) to compute in. By default that of
            the matrix; integers and shorter floats are computed in float32.
        num_starts: Number of starting points, which race through the first stages.
        max_products: Largest number of products of the size of `TᵀT` per stage; chosen
            from the size if None.
        tolerance: Gap to the local bound at which a matrix is good enough. Without
            `certify` it is estimated: on random matrices what could be proven was at
            most about twice as much. For other norms a stage ends when it can gain less
            than a two-hundredth of it.
        schedule: "adaptive", where every matrix ends as soon as it is good enough, or
            the same p for all: "fixed", or rising exponents.
        seed: Seed of the perturbed starts; taken modulo 2^31.
        certify: Whether to prove the gaps, and to solve the matrices that miss the
            tolerance again with a smaller one; `notes` say how many still miss it.
            Takes seconds to compile.
        finish: Whether to take the solutions to machine precision by `newton.finish`,
            on the host: seconds for every matrix of a few dozen rows, minutes for one
            of 768 rows and one term. For the spectral norm in float64.
        progress: Whether to show a progress bar on standard error; by default when that
            is a terminal and the solve takes longer than two seconds.

    Returns:
        `Approximation`.

    Raises:
        ValueError: If the matrix is empty, a vector, complex, holds NaN or infinite
            entries (the first is named), the configuration does not fit, or a weight
            is not a symmetric positive semidefinite matrix of the right size; or if a
            finish is asked for in another norm, or in float32.
    """
    notes: list[str] = []
    target = validation.matrix(matrix, dtype, notes)
    norm = Norm.parse(norm)
    if certify and not norm.is_spectral:
        raise ValueError(f'certify is for norm="spectral"; got norm="{norm}".')
    if finish and (not norm.is_spectral or target.dtype != np.float64):
        raise ValueError(
            'finish is for norm="spectral" in float64; got '
            f'norm="{norm}" in {target.dtype}. Pass dtype="float64", or finish=False.'
        )
    *batch, m, n = target.shape
    weights = (
        validation.weight(left_weight, "left_weight", m, tuple(batch), target.dtype),
        validation.weight(right_weight, "right_weight", n, tuple(batch), target.dtype),
    )
    left, right = (weight is not None for weight in weights)
    problem = Problem.of(
        (m, n), configuration, norm, num_starts, max_products, (left, right), schedule
    )
    _note_caps(configuration, problem, notes)
    given = np.asarray(matrix).reshape(-1, m, n)
    kind = Kind(problem, target.dtype, (left, right), proves=False, traces=True)
    stages = len(given) * len(problem.schedule())
    certificate = finishes = None
    with (
        jax.enable_x64(target.dtype == np.float64),
        one_blas_thread(),
        bar(stages, "compiling", unit="stages", wanted=progress) as tick,
    ):
        flat = [None if x is None else _flat(x, batch) for x in weights]
        solves = Batch(kind, target.reshape(-1, m, n), flat, seed, tick)
        begun = time.perf_counter()
        solution = solves.solve(range(len(given)), tolerance)
        if certify:
            solution, certificate = _certified(
                solves, solution, tolerance, given, notes
            )
    if finish:
        with bar(len(given), "finishing", unit="matrices", wanted=progress) as tick:
            solution, finishes = _finished(solves, solution, tick)
        if certify:
            left, right = solves.weights(np.arange(len(given)))
            certificate = certificate_of(given, solution.terms, left, right, finishes)
    seconds = time.perf_counter() - begun - solves.compile_seconds
    found = _report((np.asarray(matrix), *weights), _shaped(solution, batch), notes)
    return dataclasses.replace(
        found,
        seconds=seconds,
        compile_seconds=solves.compile_seconds,
        certificate=certificate and _shaped(certificate, batch),
        finishes=finishes,
    )


def _flat(weight, batch):
    """Return a weight with one batch axis, or as it is if all matrices share it."""
    if weight.ndim == 2:
        return weight
    size = weight.shape[-1]
    return np.broadcast_to(weight, (*batch, size, size)).reshape(-1, size, size)


def _shaped(tree, batch):
    """Return the arrays of a flat batch with its batch axes."""
    return jax.tree.map(lambda x: x.reshape((*batch, *x.shape[1:]))[()], tree)


def _certified(solves, solution, tolerance, given, notes):
    """Return solutions whose gaps are proven, as far as a few attempts go, and proofs.

    Only matrices whose gap misses the tolerance are solved again.

    Args:
        solves: The batch.
        solution: Its first solutions.
        tolerance: The gap that is good enough.
        given: The matrices as given, `[count, m, n]`.
        notes: Extended by what was done.
    """

    def prove(solution, numbers):
        return certificate_of(given[numbers], solution.terms, *solves.weights(numbers))

    proven = prove(solution, np.arange(len(given)))
    for attempt in range(1, ATTEMPTS):
        missing = np.flatnonzero(~(proven.local_gap <= tolerance))
        if not len(missing):
            break
        notes.append(f"{len(missing)} solved again, with tolerance / {4**attempt}")
        again = solves.solve(missing.tolist(), tolerance / 4**attempt)
        # With larger p a limited number of products may prove less.
        new = prove(again, missing)
        better = new.local_gap < proven.local_gap[missing]
        again, new = jax.tree.map(lambda x, keep=better: x[keep], (again, new))
        solution = solution.replaced(missing[better], again)
        proven = replaced(proven, new, missing[better])
    missing = int((~(proven.local_gap <= tolerance)).sum())
    if missing:
        notes.append(
            f"{missing} of {len(given)} proven gaps are above the tolerance "
            f"{tolerance:g}: finish=True may close them"
        )
    return solution, proven


def _finished(solves, solution, tick):
    """Return the solutions with terms taken to machine precision, and the finishes."""
    found = []
    for i, matrix in enumerate(solves.matrices):
        terms = jax.tree.map(lambda x, i=i: x[i], solution.terms)
        weights = solves.weights(i)
        found.append(
            newton.finish(matrix, terms, *weights, tell=lambda text: tick(0, text))
        )
        tick(1)
    terms = jax.tree.map(lambda *x: np.stack(x), *(one.terms for one in found))
    return dataclasses.replace(solution, terms=terms), tuple(found)


def _report(given, solution, notes):
    """Measure solutions against the matrices as given."""
    matrix, *weights = given
    error = measure(matrix, solution.terms)
    ours = None
    if any(weight is not None for weight in weights):
        ours = measure(matrix, solution.terms, *weights)
    return Approximation(
        terms=solution.terms,
        error=error,
        relative=error.over(measure(matrix, ())),
        van_loan=measure(matrix, solution.frobenius, *weights),
        trace=solution.trace,
        status=solution.status,
        seconds=0.0,
        compile_seconds=0.0,
        notes=tuple(notes),
        weighted=ours,
        weighted_relative=ours and ours.over(measure(matrix, (), *weights)),
    )


def _note_caps(configuration, problem, notes):
    wanted = (
        [configuration] if isinstance(configuration, Configuration) else configuration
    )
    for given, used in zip(wanted, problem.configurations, strict=True):
        if used.rank < given.rank:
            notes.append(
                f"rank {given.rank} capped at {used.rank}, the largest Kronecker rank "
                f"with factors {used.a_shape}: the solution is exact"
            )
