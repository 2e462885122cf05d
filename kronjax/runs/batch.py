"""A batch of matrices of one kind, solved in pools and returned as arrays.

>>> import jax
>>> from kronjax.kronecker import Configuration
>>> from kronjax.solver.problem import Problem
>>> problem = Problem.of((4, 6), Configuration((2, 3), 1), "frobenius", num_starts=1)
>>> kind = Kind(problem, np.dtype(np.float32), proves=False, traces=True)
>>> matrices = np.ones((5, 4, 6), np.float32)
>>> Batch(kind, matrices, (None, None), seed=0).solve([1, 3], 1e-3).status.shape
(2,)
"""

import concurrent.futures
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from kronjax.kronecker import KroneckerTerms
from kronjax.runs import pool_programs, workers
from kronjax.runs.pool import Finished, Matrix
from kronjax.runs.pool_programs import Kind
from kronjax.solver.solution import Trace

Weight = np.ndarray | None
"""A weight `[m, m]` that all matrices share, one for each matrix, or None."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solutions:
    """The solutions of several matrices; arrays are NumPy, `[count, ...]`.

    Attributes:
        terms: One `KroneckerTerms` for each configuration.
        frobenius: The terms at p = 2.
        trace: `Trace`, `[count, stages]`; shorter ones repeat their last entry.
        status: `Status` of each, as integers.
    """

    terms: tuple[KroneckerTerms, ...]
    frobenius: tuple[KroneckerTerms, ...]
    trace: Trace
    status: np.ndarray

    @classmethod
    def of(cls, solved: Sequence[Finished]) -> "Solutions":
        """Return the solutions of pools that return traces, in order."""
        longest = max(len(x.trace.p) for x in solved)
        parts = [
            cls(x.terms, x.frobenius or (), x.trace, np.asarray(x.status))
            for x in solved
        ]
        alone = [jax.tree.map(lambda x: np.asarray(x)[None], part) for part in parts]
        same = [part.lengthened(longest) for part in alone]
        return jax.tree.map(lambda *x: np.concatenate(x), *same)

    def lengthened(self, length: int) -> "Solutions":
        """Return the solutions with traces of so many stages, at no cost."""
        missing = length - self.trace.p.shape[-1]
        fields = {}
        for field in dataclasses.fields(Trace):
            x = getattr(self.trace, field.name)
            tail = np.repeat(x[:, -1:], missing, axis=1)
            if field.name in ("steps", "products"):
                tail = np.zeros_like(tail)
            fields[field.name] = np.concatenate([x, tail], axis=1)
        return dataclasses.replace(self, trace=Trace(**fields))

    def replaced(self, numbers: np.ndarray, new: "Solutions") -> "Solutions":
        """Return the solutions with new ones for some matrices."""
        longest = max(x.trace.p.shape[-1] for x in (self, new))
        pair = self.lengthened(longest), new.lengthened(longest)
        return replaced(*pair, numbers)


class Batch:
    """The matrices of one call and their weights, flat.

    Attributes:
        kind: Kind of the pools; they return traces.
        matrices: `[count, m, n]`.
        compile_seconds: Seconds of tracing and compiling so far.
    """

    def __init__(
        self,
        kind: Kind,
        matrices: np.ndarray,
        weights: Sequence[Weight],
        seed: int,
        tick: Callable[[int, str], None] = lambda turned, text: None,
    ) -> None:
        """Keep the arguments; nothing is compiled yet.

        Args:
            kind: Kind of the pools.
            matrices: `[count, m, n]`.
            weights: Of the rows and of the columns.
            seed: Seed of the perturbed starts, the same for all matrices.
            tick: Called with the number of stages that have ended, and a text.
        """
        self.kind, self.matrices = kind, matrices
        self.compile_seconds = 0.0
        self._weights, self._seed, self._tick = weights, seed, tick

    def weights(self, numbers: int | np.ndarray) -> Iterator[Weight]:
        """Yield both weights of one matrix, or of some."""
        for weight in self._weights:
            yield weight if weight is None or weight.ndim == 2 else weight[numbers]

    def solve(self, numbers: Sequence[int], tolerance: float) -> Solutions:
        """Solve the matrices with these numbers."""
        begun, devices = time.perf_counter(), jax.local_devices()
        compiled = pool_programs.started.cache_info().misses
        lanes = workers.num_lanes(self.kind, devices, -(-len(numbers) // len(devices)))
        pools, _ = workers.pools_of(self.kind, len(numbers), lanes, devices, tolerance)
        if pool_programs.started.cache_info().misses > compiled:
            self.compile_seconds += time.perf_counter() - begun
        given = (
            Matrix(i, self.matrices[i], self._seed, *self.weights(i)) for i in numbers
        )
        ended = spent = 0

        def tick(products, turned):
            nonlocal ended, spent
            ended, spent = ended + turned, spent + products
            self._tick(turned, f"{spent:,} products")

        solved = {x.key: x for x in workers.solve(pools, given, tick)}
        stages = len(self.kind.problem.schedule())
        self._tick(max(len(numbers) * stages - ended, 0), f"{spent:,} products")
        return Solutions.of([solved[i] for i in numbers])


def compile_ahead(
    kinds: Sequence[Kind], tick: Callable[[int], None] = lambda count: None
) -> float:
    """Compile what solves one matrix of each kind; return the seconds.

    Programs of all kinds are compiled at the same time, and while others are traced.

    Args:
        kinds: Kinds of the pools.
        tick: Called with the number of kinds that are compiled.
    """
    begun, devices = time.perf_counter(), jax.local_devices()
    mesh, coming = pool_programs.mesh_of(devices), []
    try:
        for kind in kinds:
            with jax.enable_x64(kind.dtype == np.float64):
                coming.append(pool_programs.started(kind.compiled, mesh, 1, 1))
        for programs in coming:
            concurrent.futures.wait(programs.values())
            tick(1)
    except BaseException:
        for program in itertools.chain(*(x.values() for x in coming)):
            program.cancel()
        pool_programs.started.cache_clear()
        raise
    return time.perf_counter() - begun


def replaced(old, new, numbers: np.ndarray):
    """Return a pytree of arrays `[count, ...]` with new entries for some numbers."""

    def put(x, y):
        x = np.array(x)
        x[numbers] = y
        return x

    return jax.tree.map(put, old, new)
