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

from kronjax import continuation, inputs, newton, proof
from kronjax.continuation import Trace
from kronjax.dense import multiply_out
from kronjax.errors import Errors, measure
from kronjax.kronecker import Configuration, KroneckerTerms
from kronjax.problem import Problem, Stage, parse_norm
from kronjax.proof import Certificate
from kronjax.setting import Setting


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
        seconds: Spent on solving, compilation apart.
        compile_seconds: Spent on tracing and compiling; 0 when done before.
        notes: What was decided on the user's behalf.
        given: The matrix and both weights as given, or None.
        finishes: What the second-order finish found, one for each matrix in order, or
            None where it was not asked for.
    """

    terms: tuple[KroneckerTerms, ...]
    error: Errors
    relative: Errors
    van_loan: Errors
    trace: Trace
    status: np.ndarray
    seconds: float
    compile_seconds: float
    notes: tuple[str, ...]
    weighted: Errors | None = None
    weighted_relative: Errors | None = None
    given: tuple = dataclasses.field(default=(), repr=False, compare=False)
    finishes: tuple[newton.Finish, ...] | None = dataclasses.field(
        default=None, repr=False, compare=False
    )

    @functools.cached_property
    def certificate(self) -> Certificate:
        """What is proven about the terms; computed when it is first asked for.

        Takes seconds to compile for every shape, and some ten singular value
        decompositions in float64 for every matrix.
        """
        matrix, left, right = self.given
        return proof.of(matrix, self.terms, left, right, self.finishes)

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
        """Products of the size of `EᵀE` spent on every matrix, all starts included."""
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
    schedule: str = "adaptive",
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
        tolerance: Gap to the local bound at which a matrix is good enough. Where the
            continuation ends is an estimate, usually on the safe side, if `certify` is
            not set. For other norms a stage ends when it can gain less than a
            two-hundredth of it.
        schedule: "adaptive", where every matrix ends as soon as it is good enough, or
            "fixed", seven p up to 4098 for all.
        seed: Of the perturbed starts; taken modulo 2^31.
        certify: Prove the gaps, and solve what misses the tolerance again with a
            smaller one; `notes` say how many still miss it. Takes seconds to compile.
        finish: Take the solutions to machine precision by `newton.finish`, on the host:
            seconds for every matrix of a few dozen rows, minutes for one of hundreds.
            For the spectral norm in float64.
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
    target = inputs.matrix(matrix, dtype, notes)
    if finish and (parse_norm(norm) != math.inf or target.dtype != np.float64):
        raise ValueError(
            'finish is for norm="spectral" in float64; got '
            f'norm={norm!r} in {target.dtype}. Pass dtype="float64", or finish=False.'
        )
    *batch, m, n = target.shape
    weights = (
        inputs.weight(left_weight, "left_weight", m, tuple(batch), target.dtype),
        inputs.weight(right_weight, "right_weight", n, tuple(batch), target.dtype),
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
        programs, compile_seconds = _compile(problem, arrays)
        begun = time.perf_counter()
        solution = _run(problem, programs, arrays, tolerance, seed, tick)
        seconds = time.perf_counter() - begun
    solution = jax.tree.map(lambda x: x.reshape((*batch, *x.shape[1:]))[()], solution)
    finishes = None
    if finish:
        begun = time.perf_counter()
        solution, finishes = _finished(target, weights, solution)
        seconds += time.perf_counter() - begun
    given = np.asarray(matrix)
    found = _report(given, weights, solution, seconds, compile_seconds, notes)
    return dataclasses.replace(found, finishes=finishes)


def _finished(target, weights, solution):
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
        found.append(
            newton.finish(matrix, terms, *(x if x is None else x[i] for x in sides))
        )
    terms = jax.tree.map(lambda *x: np.stack(x), *(one.terms for one in found))
    terms = jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), terms)
    return dataclasses.replace(solution, terms=terms), tuple(found)


def _report(given, weights, solution, seconds, compile_seconds, notes):
    """Measure what came out against the matrix as given."""
    error = measure(given, solution.terms)
    ours = None
    if any(weight is not None for weight in weights):
        ours = measure(given, solution.terms, *weights)
    return Approximation(
        terms=solution.terms,
        error=error,
        relative=error.over(measure(given, ())),
        van_loan=measure(given, solution.frobenius, *weights),
        trace=solution.trace,
        status=solution.status,
        seconds=seconds,
        compile_seconds=compile_seconds,
        notes=tuple(notes),
        weighted=ours,
        weighted_relative=ours and ours.over(measure(given, (), *weights)),
        given=(given, *weights),
    )


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


@functools.lru_cache(maxsize=64)
def _programs(problem: Problem, shapes):
    """Compile the parts of a solve for arrays of `shapes`; return them."""
    # A search tries with one start what it then solves with all: compiled once.
    alike = dataclasses.replace(problem, starts=1, budget=1)
    programs, (_, paths, first, line), _ = _stages(alike, shapes)
    count = len(problem.schedule())
    lines = jax.eval_shape(lambda x: _stack([x] * count), line) if count else line

    def gather(*lanes):
        return jax.vmap(lambda *lane: continuation.gather(problem, *lane))(*lanes)

    given = paths, first, lines
    length = jax.eval_shape(gather, *given).p.shape[1]
    last = _last(alike, shapes, length)
    return [*programs, jax.jit(gather).lower(*given).compile(), last]


@functools.lru_cache(maxsize=64)
def _stages(problem, shapes):
    """Return start and advance, compiled, what they return, and the settings' axes."""
    arrays = tuple(shape and jax.ShapeDtypeStruct(*shape) for shape in shapes)
    scalar = jax.ShapeDtypeStruct((), jnp.result_type(float))
    seed = jax.ShapeDtypeStruct((), jnp.result_type(int))
    # Weights that all matrices share are decomposed, and kept, once.
    axes = tuple(None if x is None or len(x.shape) == 2 else 0 for x in arrays)
    axes_of: Any = Setting
    setting_axes = axes_of(
        target=0,
        plain=0,
        roots=axes[1:],
        frames=None if axes[1:] == (None, None) else 0,
        scale=0,
        unit=0,
        finite=0,
    )

    def start(*arrays):
        return jax.vmap(
            lambda *x: continuation.start(problem, *x),
            in_axes=axes,
            out_axes=(setting_axes, 0, 0),
        )(*arrays)

    def advance(settings, paths, stage, tolerance, seed):
        tolerance = tolerance.astype(settings.target.dtype)
        return jax.vmap(
            lambda setting, path: continuation.advance(
                problem, setting, path, stage, tolerance, seed
            ),
            in_axes=(setting_axes, 0),
        )(settings, paths)

    settings, paths, first = jax.eval_shape(start, *arrays)
    line, schedule = first, problem.schedule()
    programs = [jax.jit(start).lower(*arrays).compile()]
    if schedule:
        stage = jax.eval_shape(_as_arrays, schedule[0])
        given = settings, paths, stage, scalar, seed
        _, line = jax.eval_shape(advance, *given)
        programs.append(jax.jit(advance, donate_argnums=1).lower(*given).compile())
    return programs, (settings, paths, first, line), setting_axes


@functools.lru_cache(maxsize=64)
def _last(problem, shapes, length):
    """Compile `finish` for a trace of so many lines."""
    _, (settings, paths, _, line), axes = _stages(problem, shapes)

    def finish(settings, paths, trace):
        return jax.vmap(
            lambda *lane: continuation.finish(problem, *lane), in_axes=(axes, 0, 0)
        )(settings, paths, trace)

    trace = jax.eval_shape(lambda x: _stack([x] * length), line)
    return jax.jit(finish).lower(settings, paths, trace).compile()


def _compile(problem, arrays):
    begun = time.perf_counter()
    programs = _programs(
        problem, tuple(x if x is None else (x.shape, x.dtype) for x in arrays)
    )
    seconds = time.perf_counter() - begun
    return programs, seconds if seconds > 0.01 else 0.0


def _run(problem, programs, arrays, tolerance, seed, tick):
    """Walk through the schedule; return the solution as NumPy arrays."""
    schedule = problem.schedule()
    first_program, *advance, gather, finish = programs
    tolerance, seed = jnp.asarray(float(tolerance)), jnp.asarray(int(seed) % 2**31)
    settings, paths, first = jax.block_until_ready(first_program(*arrays))
    lines = []
    for stage in schedule:
        stage = _as_arrays(stage)
        paths, line = advance[0](settings, paths, stage, tolerance, seed)
        lines.append(jax.block_until_ready(line))
        tick(f"p = {line.p.max():.0f}")
        if paths.done.all():
            break
    # What is left out has lines, too: nothing was spent there.
    idle = [jax.tree.map(jnp.zeros_like, line) for line in lines[-1:]]
    lines += idle * (len(schedule) - len(lines))
    trace = gather(paths, first, _stack(lines) if lines else first)
    solution = jax.device_get(finish(settings, paths, trace))
    used = np.append(True, np.any(solution.trace.gemms[:, 1:] > 0, axis=0))
    trace = jax.tree.map(lambda x: x[:, used], solution.trace)
    return dataclasses.replace(solution, trace=trace)


def _as_arrays(stage: Stage) -> Stage:
    return jax.tree.map(jnp.asarray, stage)


def _stack(lines):
    return jax.tree.map(lambda *x: jnp.stack(x, axis=1), *lines)


@contextlib.contextmanager
def _bar(total, wanted):
    """Yield a function to call after every stage; a bar is drawn after two seconds."""
    if wanted is False or (wanted is None and not sys.stderr.isatty()):
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task("compiling", total=total)
    timer = threading.Timer(0 if wanted else 2, bar.start)
    timer.start()
    try:
        yield lambda text: bar.update(task, advance=1, description=text)
    finally:
        timer.cancel()
        timer.join()
        bar.stop()
