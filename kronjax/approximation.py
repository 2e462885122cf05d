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
import math
import time
from collections.abc import Sequence

import jax
import numpy as np

from kronjax import display, validation
from kronjax.io.progress import bar
from kronjax.kronecker import Configuration, KroneckerTerms
from kronjax.linalg.dense import multiply_out
from kronjax.linalg.residuals import ResidualNorms, measure
from kronjax.norm import Norm
from kronjax.proof import newton
from kronjax.proof.certificate import Certificate, certificate_of
from kronjax.runs import pool_programs, workers
from kronjax.runs.cpu_threads import one_blas_thread
from kronjax.runs.pool import Finished, Matrix
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
        configuration: What to look for; of several, the sum of all.
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
        num_starts: Starting points in the race of `continuation.solve`.
        max_products: Products of the size of `TᵀT` per stage; chosen from the size if
            None.
        tolerance: Gap to the local bound at which a matrix is good enough. Without
            `certify` it is estimated: on random matrices what could be proven was at
            most about twice as much. For other norms a stage ends when it can gain less
            than a two-hundredth of it.
        schedule: "adaptive", where every matrix ends as soon as it is good enough, or
            the same p for all: "fixed", or rising exponents.
        seed: Of the perturbed starts; taken modulo 2^31.
        certify: Prove the gaps, and solve what misses the tolerance again with a
            smaller one; `notes` say how many still miss it. Takes seconds to compile.
        finish: Take the solutions to machine precision by `newton.finish`, on the host:
            seconds for every matrix of a few dozen rows, minutes for one of 768 rows
            and one term. For the spectral norm in float64.
        progress: Show a progress bar on standard error; by default when that is a
            terminal and it takes longer than two seconds.

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
    count = math.prod(batch)
    kind = Kind(problem, target.dtype, (left, right), proves=False, traces=True)
    certificate = finishes = None
    with (
        jax.enable_x64(target.dtype == np.float64),
        one_blas_thread(),
        bar(
            count * len(problem.schedule()), "compiling", unit="stages", wanted=progress
        ) as tick,
    ):
        solves = _Solves(kind, target, weights, seed, tick)
        solution = solves.run(range(count), tolerance)
        if certify:
            begun = time.perf_counter()
            given = np.asarray(matrix).reshape(-1, m, n)
            solution, certificate = _certified(
                solves, solution, tolerance, given, notes
            )
            certificate = _reshaped(certificate, batch)
            solves.seconds += time.perf_counter() - begun
    solution = _reshaped(solution, batch)
    seconds = solves.seconds
    if finish:
        begun, certificate = time.perf_counter(), None
        with bar(count, "finishing", unit="matrices", wanted=progress) as tick:
            solution, finishes = _finished(target, weights, solution, tick)
        seconds += time.perf_counter() - begun
        if certify:
            certificate = certificate_of(
                np.asarray(matrix), solution.terms, *weights, finishes
            )
    found = _report((np.asarray(matrix), *weights), solution, notes)
    return dataclasses.replace(
        found,
        seconds=seconds,
        compile_seconds=solves.compile_seconds,
        certificate=certificate,
        finishes=finishes,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Solution:
    """Solutions of a batch, NumPy: terms, terms at p = 2, trace and status."""

    terms: tuple[KroneckerTerms, ...]
    frobenius: tuple[KroneckerTerms, ...]
    trace: Trace
    status: np.ndarray


class _Solves:
    """Solves of matrices of one batch, and the seconds that they have taken."""

    def __init__(self, kind, target, weights, seed, tick):
        """Flatten the batch axes."""
        self.kind, self.seed, self.tick = kind, seed, tick
        self.seconds = self.compile_seconds = 0.0
        m, n = target.shape[-2:]
        self.matrices = target.reshape(-1, m, n)
        self.weights = [
            x if x is None or x.ndim == 2 else x.reshape(-1, *x.shape[-2:])
            for x in weights
        ]

    def side(self, weight, number):
        """Return the weight of a matrix."""
        return weight if weight is None or weight.ndim == 2 else weight[number]

    def run(self, numbers, tolerance) -> _Solution:
        """Solve the matrices of these numbers."""
        begun, kind = time.perf_counter(), self.kind
        devices = jax.local_devices()
        share = -(-len(numbers) // len(devices))
        lanes = workers.num_lanes(kind, devices, share)
        made = pool_programs.compiled.cache_info().misses
        pools, _ = workers.pools_of(kind, len(numbers), lanes, devices, tolerance)
        if pool_programs.compiled.cache_info().misses > made:
            self.compile_seconds += time.perf_counter() - begun
            begun = time.perf_counter()
        given = (
            Matrix(
                number,
                self.matrices[number],
                self.seed,
                *(self.side(weight, number) for weight in self.weights),
            )
            for number in numbers
        )
        stages = len(kind.problem.schedule())
        told = spent = 0

        def tick(products, turned):
            nonlocal told, spent
            told += turned
            spent += products
            self.tick(turned, f"{spent:,} products")

        solved = {x.key: x for x in workers.solve(pools, given, tick)}
        self.tick(max(len(numbers) * stages - told, 0))
        self.seconds += time.perf_counter() - begun
        return _stacked([solved[number] for number in numbers])


def _stacked(solved: list[Finished]) -> _Solution:
    """Return solutions as one batch."""
    parts = [
        _Solution(x.terms, x.frobenius or (), x.trace, np.asarray(x.status))
        for x in solved
    ]
    longest = max(len(x.trace.p) for x in solved)
    batches = [jax.tree.map(lambda x: np.asarray(x)[None], part) for part in parts]
    batches = [_lengthened(batch, longest) for batch in batches]
    return jax.tree.map(lambda *x: np.concatenate(x), *batches)


def _reshaped(tree, batch):
    """Return the arrays of a flat batch with its batch axes."""
    return jax.tree.map(lambda x: x.reshape((*batch, *x.shape[1:]))[()], tree)


def _certified(solves, solution, tolerance, given, notes):
    """Return solutions whose gaps are proven, as far as a few attempts go, and proofs.

    Only matrices whose gap misses the tolerance are solved again.

    Args:
        solves: The solves of the batch.
        solution: The first solutions, of a flat batch.
        tolerance: The gap that is good enough.
        given: The matrices as given, `[count, m, n]`.
        notes: Extended by what was done.
    """

    def prove(solution, numbers):
        weights = (
            x if x is None or x.ndim == 2 else x[numbers] for x in solves.weights
        )
        return certificate_of(given[numbers], solution.terms, *weights)

    proven = prove(solution, np.arange(len(given)))
    for attempt in range(1, ATTEMPTS):
        missing = np.flatnonzero(~(proven.local_gap <= tolerance))
        if not len(missing):
            break
        notes.append(f"{len(missing)} solved again, with tolerance / {4**attempt}")
        again = solves.run(missing.tolist(), tolerance / 4**attempt)
        # With larger p a limited number of products may prove less.
        new = prove(again, missing)
        better = new.local_gap < proven.local_gap[missing]
        solution = _replaced(solution, again, missing, better)
        proven = _replaced(proven, new, missing, better)
    missing = int((~(proven.local_gap <= tolerance)).sum())
    if missing:
        notes.append(
            f"{missing} of {len(given)} proven gaps are above the tolerance "
            f"{tolerance:g}: finish=True may close them"
        )
    return solution, proven


def _replaced(old, new, numbers, better):
    """Return a batch with the better of some new entries in place of the old ones."""
    if isinstance(old, _Solution):
        longest = max(x.trace.p.shape[-1] for x in (old, new))
        old, new = (_lengthened(x, longest) for x in (old, new))

    def put(x, y):
        x = np.array(x)
        x[numbers[better]] = y[better]
        return x

    return jax.tree.map(put, old, new)


def _lengthened(solution, length):
    """Return solutions with a trace of so many stages."""
    missing = length - solution.trace.p.shape[-1]
    fields = {}
    for field in dataclasses.fields(Trace):
        x = getattr(solution.trace, field.name)
        tail = np.repeat(x[:, -1:], missing, axis=1)
        if field.name in ("steps", "products"):
            tail = np.zeros_like(tail)
        fields[field.name] = np.concatenate([x, tail], axis=1)
    return dataclasses.replace(solution, trace=Trace(**fields))


def _finished(target, weights, solution, tick):
    """Return the solution with its terms taken to machine precision, and how."""
    *batch, m, n = target.shape
    matrices = target.reshape(-1, m, n)
    sides = [
        None if x is None else np.broadcast_to(x, (*batch, *x.shape[-2:]))
        for x in weights
    ]
    sides = [None if x is None else x.reshape(-1, *x.shape[-2:]) for x in sides]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(batch) :]), solution.terms)
    found = []
    for i, matrix in enumerate(matrices):
        terms = jax.tree.map(lambda x, i=i: x[i], flat)
        own = (x if x is None else x[i] for x in sides)
        found.append(
            newton.finish(matrix, terms, *own, tell=lambda text: tick(0, text))
        )
        tick(1)
    terms = jax.tree.map(lambda *x: np.stack(x), *(one.terms for one in found))
    terms = jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), terms)
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
