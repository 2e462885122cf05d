"""The front door: matrices in, Kronecker sums, errors and a report out.

`approximate` runs on the host. It checks the input, picks the dtype, compiles once for
each shape, walks through the stages of `continuation` while showing progress, and
measures the errors of what came out anew, in float64. What it returns is NumPy.

>>> import numpy as np
>>> from kronjax import Configuration, approximate
>>> matrix = np.kron(np.arange(6.0).reshape(2, 3), np.arange(6.0).reshape(3, 2))
>>> bool(approximate(matrix, Configuration((2, 3), rank=1)).error.spectral < 1e-9)
True
"""

import contextlib
import dataclasses
import functools
import math
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kronjax import validation
from kronjax.kronecker import Configuration, KroneckerTerms
from kronjax.linalg.dense import multiply_out
from kronjax.linalg.residuals import ResidualNorms, measure
from kronjax.proof import newton
from kronjax.proof.certificate import Certificate, certificate_of
from kronjax.solver import host
from kronjax.solver.problem import Problem, parse_norm
from kronjax.solver.solution import Trace

ATTEMPTS = 3
"""Solves, each with a quarter of the tolerance, until the gap is proven."""


@dataclasses.dataclass(frozen=True)
class Approximation:
    """What `approximate` returns; arrays are NumPy, with the batch axes of the input.

    Attributes:
        terms: One `KroneckerTerms` for each configuration, `a: [..., r, m1, n1]` and
            `b: [..., r, m2, n2]`, in the dtype of the computation.
        error: `Errors` of the terms as returned against the matrix as given, computed
            in float64.
        relative: The same over the norms of the matrix; 0 for a zero matrix.
        van_loan: `Errors` of the sum that is nearest in the Frobenius norm; for
            several configurations, of one after the other. With weights, of where the
            solve began, in the weighted norms: they are replaced by Kronecker products.
        weighted: `Errors` of `L^{1/2} (T − K) R^{1/2}` with the weights as given, or
            None without weights.
        weighted_relative: The same over the weighted norms of the matrix, or None.
        trace: `continuation.Trace`, `[..., stages]`.
        status: `Status` of every matrix, as integers.
        seconds: Spent on solving, compilation apart; with `certify` on proving, too,
            the compilation of proofs included.
        compile_seconds: Spent on tracing and compiling; 0 when done before.
        notes: What was decided on the user's behalf.
        given: The matrix and both weights as given, or None.
        finishes: What the second-order finish found, one for each matrix in order, or
            None where it was not asked for.
        proven: The certificate, where `certify` has made it already.
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
    given: tuple = dataclasses.field(default=(), repr=False, compare=False)
    finishes: tuple[newton.Finish, ...] | None = dataclasses.field(
        default=None, repr=False, compare=False
    )
    proven: Certificate | None = dataclasses.field(
        default=None, repr=False, compare=False
    )

    @functools.cached_property
    def certificate(self) -> Certificate:
        """What is proven about the terms; computed when it is first asked for.

        Takes seconds to compile for every shape; then for every matrix, in float64,
        some ten singular value decompositions and 200 eigenvalue decompositions of its
        leading part, of order 256 at most.
        """
        if self.proven is not None:
            return self.proven
        matrix, left, right = self.given
        return certificate_of(matrix, self.terms, left, right, self.finishes)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape `(m, n)` of the matrices."""
        return self.terms[0].shape

    @property
    def num_parameters(self) -> int:
        """Number of entries in all factors of one matrix."""
        return sum(terms.num_parameters for terms in self.terms)

    @property
    def gemms(self) -> np.ndarray:
        """Products of the size of `EᵀE` spent on every matrix, all starts included.

        Those of attempts that `certify` has replaced are not.
        """
        return np.sum(self.trace.gemms, axis=-1)

    def matrix(self) -> np.ndarray:
        """Multiply the sum out: `[..., m, n]`, in the dtype of the factors."""
        return np.sum([multiply_out(terms.a, terms.b) for terms in self.terms], axis=0)


def approximate(
    matrix,
    configuration: Configuration | Sequence[Configuration],
    *,
    norm: float | str = "spectral",
    left_weight=None,
    right_weight=None,
    dtype: str | None = None,
    starts: int = 4,
    budget: int | None = None,
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
            `y = K x` the second moment of the gradients with respect to `y`.
        right_weight: `R`, `[n, n]` or `[..., n, n]`, likewise: the second moment of
            `x`. `weighted.RIDGE` of the mean eigenvalue is added to each weight.
        dtype: "float32" or "float64" (or NumPy's) to compute in. By default that of
            the matrix; integers and shorter floats are computed in float32.
        starts: Starting points in the race of `continuation.solve`.
        budget: Products of the size of `TᵀT` per stage; chosen from the size if None.
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
    if certify and parse_norm(norm) != math.inf:
        raise ValueError(f'certify is for norm="spectral"; got norm={norm!r}.')
    if finish and (parse_norm(norm) != math.inf or target.dtype != np.float64):
        raise ValueError(
            'finish is for norm="spectral" in float64; got '
            f'norm={norm!r} in {target.dtype}. Pass dtype="float64", or finish=False.'
        )
    *batch, m, n = target.shape
    weights = (
        validation.weight(left_weight, "left_weight", m, tuple(batch), target.dtype),
        validation.weight(right_weight, "right_weight", n, tuple(batch), target.dtype),
    )
    weighted = tuple(weight is not None for weight in weights)
    problem = Problem.of(
        (m, n), configuration, norm, starts, budget, weighted, schedule
    )
    _note_caps(configuration, problem, notes)
    with (
        jax.enable_x64(target.dtype == np.float64),
        _bar(len(problem.schedule()), progress) as tick,
    ):
        arrays = _stacked(target, weights)
        parts, compile_seconds = host.prepare(problem, arrays)
        begun = time.perf_counter()

        def solve(tolerance):
            found = host.run(problem, parts, arrays, tolerance, seed, tick)
            return jax.tree.map(lambda x: x.reshape((*batch, *x.shape[1:]))[()], found)

        given, proven = (np.asarray(matrix), *weights), None
        if certify:
            solution, proven = _certified(solve, tolerance, given, notes)
        else:
            solution = solve(tolerance)
        seconds = time.perf_counter() - begun
    finishes = None
    if finish:
        begun, proven = time.perf_counter(), None
        with _bar(math.prod(batch), progress) as tick:
            solution, finishes = _finished(target, weights, solution, tick)
        seconds += time.perf_counter() - begun
    found = _report(given, solution, seconds, compile_seconds, notes)
    return dataclasses.replace(found, finishes=finishes, proven=proven)


def _certified(solve, tolerance, given, notes):
    """Return solutions whose gaps are proven, as far as a few attempts go, and proofs.

    `given` are the matrix and its weights.
    """
    matrix, *weights = given

    def prove(solution):
        return certificate_of(matrix, solution.terms, *weights)

    solution = solve(tolerance)
    proven = prove(solution)
    missing = ~(proven.local_gap <= tolerance)
    for attempt in range(1, ATTEMPTS):
        if not missing.any():
            break
        notes.append(f"{missing.sum()} solved again, with tolerance / {4**attempt}")
        again = solve(tolerance / 4**attempt)
        # Of p near its end a limited number of products makes little to be proven.
        new = prove(again)
        better = missing & (new.local_gap < proven.local_gap)
        solution = _chosen(better, again, solution)
        proven = _chosen(better, new, proven)
        missing = ~(proven.local_gap <= tolerance)
    if missing.any():
        notes.append(
            f"{missing.sum()} of {missing.size} proven gaps are above the tolerance "
            f"{tolerance:g}: finish=True may close them"
        )
    return solution, proven


def _chosen(which, new, old):
    """Return one solution or the other, for every matrix."""

    def choose(x, y):
        axes = tuple(range(np.ndim(which), np.ndim(x)))
        return np.where(np.expand_dims(which, axes), x, y)

    return jax.tree.map(choose, new, old)


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
            newton.finish(matrix, terms, *own, tell=lambda text: tick(text, advance=0))
        )
        tick("finish")
    terms = jax.tree.map(lambda *x: np.stack(x), *(one.terms for one in found))
    terms = jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), terms)
    return dataclasses.replace(solution, terms=terms), tuple(found)


def _report(given, solution, seconds, compile_seconds, notes):
    """Measure what came out against the matrix as given."""
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
        trace=_used(solution.trace),
        status=solution.status,
        seconds=seconds,
        compile_seconds=compile_seconds,
        notes=tuple(notes),
        weighted=ours,
        weighted_relative=ours and ours.over(measure(matrix, (), *weights)),
        given=given,
    )


def _used(trace):
    """Return the trace without stages in which nothing was spent on any matrix."""
    gemms = trace.gemms.reshape(-1, trace.gemms.shape[-1])
    used = np.any(gemms > 0, axis=0)
    used[0] = True
    return jax.tree.map(lambda x: x[..., used], trace)


def _stacked(target, weights):
    """Return matrices and weights as jax arrays with one batch axis, or none."""
    m, n = target.shape[-2:]
    stacked: list[Any] = [jnp.asarray(target.reshape(-1, m, n))]
    for weight in weights:
        if weight is not None:
            if weight.ndim > 2:
                weight = weight.reshape(-1, *weight.shape[-2:])
            weight = jnp.asarray(weight)
        stacked.append(weight)
    return tuple(stacked)


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


@contextlib.contextmanager
def _bar(total, wanted):
    """Yield a function to call after every stage; a bar is drawn after two seconds.

    With `advance=0` it tells what is done within one.
    """
    if wanted is False or (wanted is None and not sys.stderr.isatty()):
        yield lambda text, advance=1: None
        return
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task("compiling", total=total)
    timer = threading.Timer(0 if wanted else 2, bar.start)
    timer.start()
    try:
        yield lambda text, advance=1: bar.update(
            task, advance=advance, description=text
        )
    finally:
        timer.cancel()
        timer.join()
        bar.stop()
