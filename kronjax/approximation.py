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
import sys
import threading
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kronjax import continuation
from kronjax.continuation import Trace
from kronjax.kronecker import Configuration, KroneckerTerms
from kronjax.problem import Problem, Stage


@dataclasses.dataclass(frozen=True)
class Errors:
    """Norms of `T − K`, float64; of shape `[...]` for a batch.

    Attributes:
        spectral: `‖T − K‖_2`.
        frobenius: `‖T − K‖_F`.
    """

    spectral: np.ndarray
    frobenius: np.ndarray


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
            several configurations, of one after the other.
        trace: `continuation.Trace`, `[..., stages]`.
        status: `Status` of every matrix, as integers.
        seconds: Spent on solving, compilation apart.
        compile_seconds: Spent on tracing and compiling; 0 when done before.
        notes: What was decided on the user's behalf.
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
        return np.sum([_multiply_out(terms) for terms in self.terms], axis=0)


def approximate(
    matrix,
    configuration: Configuration | Sequence[Configuration],
    *,
    norm: float | str = "spectral",
    dtype: str | None = None,
    starts: int = 4,
    budget: int | None = None,
    tolerance: float = 1e-6,
    seed: int = 0,
    progress: bool | None = None,
) -> Approximation:
    """Approximate one matrix, or many of one shape, by sums of Kronecker products.

    Minimises `‖T − Σ_k A_k ⊗ B_k‖` for every `T` in the batch at the same time.

    Args:
        matrix: `[..., m, n]`, NumPy or jax, real.
        configuration: What to look for; of several, the sum of all.
        norm: "spectral", "frobenius" (closed form) or "schatten:P" with P = 2, 4, 6,
            10, …, 4098.
        dtype: "float32" or "float64" (or NumPy's) to compute in. By default that of
            the matrix; integers and shorter floats are computed in float32.
        starts: Starting points in the race of `continuation.solve`.
        budget: Products of the size of `TᵀT` per stage; chosen from the size if None.
        tolerance: A stage ends when it can gain less, relatively.
        seed: Of the perturbed starts; taken modulo 2^31.
        progress: Show a progress bar on standard error; by default when that is a
            terminal and it takes longer than two seconds.

    Returns:
        `Approximation`.

    Raises:
        ValueError: If the matrix is empty, a vector, complex, holds NaN or infinite
            entries (the first is named), or the configuration does not fit.
    """
    notes: list[str] = []
    target = _checked(matrix, dtype, notes)
    *batch, m, n = target.shape
    problem = Problem.of((m, n), configuration, norm, starts, budget)
    _note_caps(configuration, problem, notes)
    with (
        jax.enable_x64(target.dtype == np.float64),
        _bar(len(problem.schedule()), progress) as tick,
    ):
        stacked = jnp.asarray(target.reshape(-1, m, n))
        programs, compile_seconds = _compile(problem, stacked)
        begun = time.perf_counter()
        solution = _run(problem, programs, stacked, tolerance, seed, tick)
        seconds = time.perf_counter() - begun
    solution = jax.tree.map(lambda x: x.reshape((*batch, *x.shape[1:]))[()], solution)
    given = np.asarray(matrix)
    error, size = _errors(given, solution.terms), _errors(given, ())
    return Approximation(
        terms=solution.terms,
        error=error,
        relative=Errors(
            _ratio(error.spectral, size.spectral),
            _ratio(error.frobenius, size.frobenius),
        ),
        van_loan=_errors(given, solution.frobenius),
        trace=solution.trace,
        status=solution.status,
        seconds=seconds,
        compile_seconds=compile_seconds,
        notes=tuple(notes),
    )


def _checked(matrix, dtype, notes) -> np.ndarray:
    """Return the matrix in the dtype of the computation, or say what is wrong."""
    array = np.asarray(matrix)
    if array.ndim < 2 or array.size == 0:
        raise ValueError(
            f"approximate takes matrices [..., m, n] with entries; got shape "
            f"{array.shape}. Reshape a vector to [1, n] or [n, 1]."
        )
    if array.dtype.kind not in "fiub" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"approximate takes real numbers; got dtype {array.dtype}.")
    if dtype is None:
        dtype = "float64" if array.dtype == np.float64 else "float32"
        if array.dtype not in (np.float32, np.float64):
            notes.append(f"{array.dtype} input computed in float32")
    if dtype not in ("float32", "float64", np.float32, np.float64):
        raise ValueError(f'dtype must be "float32" or "float64"; got {dtype!r}.')
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    finite = np.isfinite(converted)
    if not finite.all():
        position = tuple(int(i) for i in np.argwhere(~finite)[0])
        if np.isfinite(np.float64(array[position])):
            raise ValueError(
                f"entries overflow float32, the first at {position}: "
                f'{array[position]}; pass dtype="float64".'
            )
        raise ValueError(
            f"the matrix has {np.count_nonzero(~finite)} NaN or infinite entries, the "
            f"first at {position}: {array[position]}. Replace them before solving."
        )
    largest = np.max(np.abs(converted), axis=(-2, -1), keepdims=True).astype(np.float64)
    ratios = converted / np.where(largest > 0, largest, 1)
    norms = np.linalg.norm(ratios, axis=(-2, -1))
    if np.any(
        norms > np.finfo(converted.dtype).max / np.maximum(largest[..., 0, 0], 1)
    ):
        raise ValueError(f"a Frobenius norm overflows {dtype}; scale the matrix down.")
    return converted


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
def _programs(problem: Problem, shape, dtype):
    """Compile the three parts of a solve for a batch `shape`; return them."""
    matrices = jax.ShapeDtypeStruct(shape, dtype)
    scalar = jax.ShapeDtypeStruct((), jnp.result_type(float))
    seed = jax.ShapeDtypeStruct((), jnp.result_type(int))

    def start(matrices):
        return jax.vmap(lambda x: continuation.start(problem, x))(matrices)

    def advance(matrices, paths, stage, tolerance, seed):
        tolerance = tolerance.astype(matrices.dtype)
        return jax.vmap(
            lambda x, path: continuation.advance(
                problem, x, path, stage, tolerance, seed
            )
        )(matrices, paths)

    def finish(matrices, paths, first, lines):
        def one(matrix, path, first, lines):
            trace = continuation.gather(problem, path, first, lines)
            return continuation.finish(problem, matrix, path, trace)

        return jax.vmap(one)(matrices, paths, first, lines)

    paths, first = jax.eval_shape(start, matrices)
    schedule = problem.schedule()
    programs = [jax.jit(start).lower(matrices).compile()]
    lines = first
    if schedule:
        stage = jax.eval_shape(_as_arrays, schedule[0])
        inputs = matrices, paths, stage, scalar, seed
        _, line = jax.eval_shape(advance, *inputs)
        programs.append(jax.jit(advance, donate_argnums=1).lower(*inputs).compile())
        lines = jax.eval_shape(lambda x: _stack([x] * len(schedule)), line)
    programs.append(jax.jit(finish).lower(matrices, paths, first, lines).compile())
    return programs


def _compile(problem, stacked):
    begun = time.perf_counter()
    programs = _programs(problem, stacked.shape, stacked.dtype)
    seconds = time.perf_counter() - begun
    return programs, seconds if seconds > 0.01 else 0.0


def _run(problem, programs, stacked, tolerance, seed, tick):
    """Walk through the schedule; return the solution as NumPy arrays."""
    schedule = problem.schedule()
    first_program, *advance, last_program = programs
    tolerance, seed = jnp.asarray(float(tolerance)), jnp.asarray(int(seed) % 2**31)
    paths, first = jax.block_until_ready(first_program(stacked))
    lines = []
    for stage in schedule:
        arrays = _as_arrays(stage)
        paths, line = advance[0](stacked, paths, arrays, tolerance, seed)
        lines.append(jax.block_until_ready(line))
        tick(f"p = {line.p[0]:.0f}")
    lines = _stack(lines) if lines else first
    return jax.device_get(last_program(stacked, paths, first, lines))


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


def _errors(given, terms):
    """Return the norms of the matrices less the sum of `terms`, one after the other."""
    *batch, m, n = given.shape
    matrices = given.reshape(-1, m, n)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[-3:]), terms)
    norms = []
    for i, matrix in enumerate(matrices):
        rest = matrix.astype(np.float64)
        for one in flat:
            rest = rest - _multiply_out(KroneckerTerms(one.a[i], one.b[i]), np.float64)
        norms.append(_norms(rest))
    spectral, frobenius = (np.reshape(x, batch)[()] for x in zip(*norms, strict=True))
    return Errors(spectral, frobenius)


def _norms(matrix):
    """Return the spectral and Frobenius norm of `[m, n]`, float64, at any scale."""
    largest = np.max(np.abs(matrix))
    scaled = matrix / (largest if largest > 0 else 1)
    gram = scaled @ scaled.T if len(scaled) < len(scaled.T) else scaled.T @ scaled
    top = max(np.linalg.eigvalsh(gram)[-1], 0)
    return largest * np.sqrt(top), largest * np.linalg.norm(scaled)


def _ratio(part, whole):
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1), 0.0)[()]


def _multiply_out(terms, dtype=None):
    a, b = (np.asarray(x, dtype) for x in (terms.a, terms.b))
    (r, m1, n1), (m2, n2) = a.shape[-3:], b.shape[-2:]
    batch = a.shape[:-3]
    left = a.reshape(*batch, r, m1 * n1).swapaxes(-2, -1)
    blocks = (left @ b.reshape(*batch, r, m2 * n2)).reshape(*batch, m1, n1, m2, n2)
    return blocks.swapaxes(-3, -2).reshape(*batch, m1 * m2, n1 * n2)
