"""The programs of a pool, run by every device on its own slots.

A device holds the settings and paths of its slots as one pytree with a leading axis. A
call gets the numbers of the slots it concerns, takes their lanes out, and puts them
back; the last slot serves lanes without a matrix. Where a device has a single slot, as
for large matrices, it is not moved.

- `start`: put new matrices into slots and into their first stage; return the first line
  of their traces;
- `work`: run a slice of trial points; return whether the stage has ended, and products;
- `turn`: go from an ended stage to the next one; return whether all stages are done,
  and the line of the trace;
- `finish`: return factors, proven bounds and the status;
- `empty`: return the arrays of slots that hold nothing yet.

>>> from kronjax.kronecker import Configuration
>>> kind = Kind(Problem.of((4, 6), Configuration((2, 3), 1)), np.dtype(np.float32))
>>> kind.shapes[0].target.shape
(4, 6)
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kronjax.io import exported
from kronjax.kronecker import KroneckerTerms
from kronjax.linalg import compiling, schatten
from kronjax.linalg.batching import select
from kronjax.proof import multipliers
from kronjax.proof.bounds import Bounds, certify_stage
from kronjax.solver import continuation
from kronjax.solver.descent import Status
from kronjax.solver.problem import Problem, Stage
from kronjax.solver.solution import Trace

exported.register(Bounds, KroneckerTerms, Stage, Trace)

AXIS = "matrices"
"""Axis of the mesh over which matrices are distributed."""

COARSE = 0.01
"""Tolerance above which proofs have half the rounds: gaps of random 36×36, solved to
0.03, are then 3.5 instead of 3.0 % on average."""


def _start(kind, held, tolerance, order, matrices, stage):
    problem = kind.problem
    stage = jax.tree.map(lambda x: x[0], stage)

    def lane(matrix):
        setting, path, line = continuation.start(problem, *matrix)
        if stage is not None:
            path = continuation.enter(problem, path, path.state, stage)
        return (setting, path), line

    new, lines = _each(lane)(matrices)
    return _put(held, order, new), lines


def _work(kind, held, tolerance, order, stage, trials):
    problem = kind.problem
    stage, trials = jax.tree.map(lambda x: x[0], (stage, trials))
    settings, paths = held
    each = schatten.num_products(stage.squarings)

    # Only the state of a path changes, and only the state is moved.
    def lane(setting, state):
        new = continuation.descend(problem, setting, state, stage, tolerance, trials)
        spent = each * (new.evaluations - state.evaluations)
        return new, (new.status != Status.RUNNING, spent)

    own = _get((settings, paths.state), order)
    states, told = _each(lane)(*own)
    paths = dataclasses.replace(paths, state=_put(paths.state, order, states))
    return (settings, paths), told


def _turn(kind, held, tolerance, order, seeds, stage, following, ends):
    problem = kind.problem
    stage, following, ends = jax.tree.map(lambda x: x[0], (stage, following, ends))
    settings, paths = held

    def lane(setting, path, seed):
        path = continuation.leave(problem, setting, path, stage, tolerance)
        line = continuation.trace_line(problem, setting, path, stage)
        done = path.done | ends
        # A finished path keeps its state, which holds its final status.
        begins = continuation.origin(problem, path, following, jax.random.key(seed))
        new = continuation.enter(problem, path, begins, following)
        return select(done, path, new), (done, line)

    own_settings, own_paths = _get(held, order)
    new_paths, told = _each(lane)(own_settings, own_paths, seeds)
    turned = _put(paths, order, new_paths)
    if paths.champion is None:
        # Curvature pairs do not change between stages, and need not be moved.
        state = dataclasses.replace(turned.state, pairs=paths.state.pairs)
        turned = dataclasses.replace(turned, state=state)
    return (settings, turned), told


def _finish(kind, held, tolerance, order, matrices, last):
    problem, rounds = kind.problem, proof_rounds(tolerance)

    def lane(setting, path, matrix, squarings):
        zero = jnp.zeros((), matrix[0].dtype)
        empty = Trace(zero, zero, zero, zero, zero)
        solution = continuation.finish(problem, setting, path, empty)
        bounds = frobenius = None
        if kind.proves:
            exponent = schatten.exponent(squarings).astype(zero.dtype)
            p = proof_exponent(problem, exponent)
            plain, *weights = matrix
            bounds = certify_stage(plain, solution.terms, p, rounds, *weights)
        if kind.traces:
            frobenius = solution.frobenius
        return solution.terms, bounds, solution.status, path.winner, frobenius

    own_settings, own_paths = _get(held, order)
    return held, _each(lane)(own_settings, own_paths, matrices, last)


def _each(function):
    """Map over lanes; a single lane is computed without `vmap`."""

    def mapped(*lanes):
        if len(jax.tree.leaves(lanes)[0]) > 1:
            return jax.vmap(function)(*lanes)
        found = function(*jax.tree.map(lambda x: x[0], lanes))
        return jax.tree.map(lambda x: jnp.asarray(x)[None], found)

    return mapped


def _is_one(slots):
    return len(jax.tree.leaves(slots)[0]) == 1


def _get(slots, order):
    if _is_one(slots):
        return slots
    return jax.tree.map(lambda x: x[order], slots)


def _put(slots, order, new):
    if _is_one(slots):
        return new
    return jax.tree.map(lambda x, y: x.at[order].set(y), slots, new)


def proof_rounds(tolerance: float | jax.Array) -> jax.Array:
    """Return the rounds of `multipliers.balance` in proofs."""
    fine = multipliers.BALANCED
    return jnp.where(tolerance > COARSE, fine // 2, fine)


def proof_exponent(problem: Problem, last: jax.Array) -> jax.Array:
    """Return the p whose gradient proves, given the last one minimised.

    At high rank it is half of that: gaps are then 2.3 instead of 2.6 % at half the
    parameters of 768×768, but would be 9.8 instead of 7.1 % with 8 terms.
    """
    return last / 2 if problem.norm.is_spectral and problem.is_factored else last


def stages(problem: Problem) -> list[Stage]:
    """Return the schedule in the dtypes for which programs are compiled, NumPy."""

    def narrow(x):
        return np.asarray(x, bool if isinstance(x, bool) else jnp.result_type(int))

    return [jax.tree.map(narrow, stage) for stage in problem.schedule()]


def mesh_of(devices: Sequence[Any]) -> Mesh:
    """Return the mesh of a pool on some devices."""
    return Mesh(np.array(devices), (AXIS,))


def rows(slots: int, devices: int) -> int:
    """Return the slots of a device, with one for idle lanes if needed."""
    return 1 if slots == devices == 1 else slots + 1


@dataclasses.dataclass(frozen=True)
class Kind:
    """The static facts about a pool: matrices of one kind share compiled programs.

    Attributes:
        problem: The problem that all matrices share.
        dtype: float32 or float64.
        weighted: Whether the matrices have a left and a right weight.
        proves: Whether `finish` proves a local bound of every solution.
        traces: Whether `finish` returns the terms at p = 2, too.
    """

    problem: Problem
    dtype: np.dtype
    weighted: tuple[bool, bool] = (False, False)
    proves: bool = True
    traces: bool = False

    @property
    def arrays(self) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        """Shapes of a matrix `[m, n]` and of its weights, `[m, m]` and `[n, n]`."""
        m, n = self.problem.shape
        sides = zip(((m, m), (n, n)), self.weighted, strict=True)
        shapes = [
            (m, n),
            *(shape if has_weight else None for shape, has_weight in sides),
        ]
        return tuple(x and jax.ShapeDtypeStruct(x, self.dtype) for x in shapes)

    @property
    def shapes(self) -> Any:
        """Shapes of the setting and the path of one matrix."""
        start = functools.partial(continuation.start, self.problem)
        return jax.eval_shape(start, *self.arrays)[:2]

    @property
    def compiled(self) -> "Kind":
        """The kind whose programs serve this one.

        Programs depend neither on the budget nor on the number of starts, so that a
        search tries with one start by the programs that solve with all of them.
        """
        num_starts = self.problem.num_starts if self.proves else 2
        alike = dataclasses.replace(
            self.problem, num_starts=min(num_starts, 2), max_products=1
        )
        return dataclasses.replace(self, problem=alike)


@functools.lru_cache(maxsize=64)
def jitted(function: Callable, problem: Problem) -> Callable:
    """Return a function of a problem and arrays, jitted for the problem."""
    chosen = compiling.options(math.prod(problem.shape))
    return jax.jit(functools.partial(function, problem), compiler_options=chosen)


def compiled(kind: Kind, mesh: Mesh, lanes: int, slots: int) -> dict[str, Any]:
    """Compile the programs for the devices of a mesh; return them by name.

    All but `empty` are called with the arrays that the devices hold, a list, the
    tolerance, the slots `[devices · lanes]`, and their further arguments; all but the
    tolerance are divided over the devices. They return such a list, too.
    """
    coming = started(kind, mesh, lanes, slots)
    try:
        return {name: program.result() for name, program in coming.items()}
    except BaseException:
        started.cache_clear()
        raise


@functools.lru_cache(maxsize=64)
def started(kind: Kind, mesh: Mesh, lanes: int, slots: int) -> dict[str, Future]:
    """Start to compile the programs; return them, to come, by name.

    Nothing is traced if an earlier process has left the programs in its cache.
    """
    platform = mesh.devices.flat[0].platform
    build = functools.partial(_programs, kind, mesh, lanes, slots)
    stored = exported.programs(build, platform, kind, mesh.devices.size, lanes, slots)
    if stored is None:
        lowered = {name: call.lower(*given) for name, (call, given) in build().items()}
    else:
        lowered = _lowered(stored, mesh)
    entries = lanes * math.prod(kind.problem.shape)
    # Pools that prove serve runs, whose results are the same on any number of devices.
    return compiling.start(lowered, entries, platform, keeps_emitters=kind.proves)


def _programs(kind, mesh, lanes, slots) -> exported.Programs:
    """Return jitted functions and the shapes of their arguments by name."""
    problem, dtype = kind.problem, kind.dtype
    own, whole = PartitionSpec(AXIS), PartitionSpec()
    sharding = NamedSharding(mesh, own)

    def stacked(count, x):
        shape = mesh.devices.size * count, *x.shape
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

    count = rows(slots, mesh.devices.size)
    held, tree = jax.tree.flatten(
        jax.tree.map(functools.partial(stacked, count), kind.shapes)
    )
    scalar = jax.ShapeDtypeStruct((), dtype, sharding=NamedSharding(mesh, whole))
    integer = jax.ShapeDtypeStruct((), np.int32)
    matrix = jax.tree.map(functools.partial(stacked, lanes), kind.arrays)
    order, once = stacked(lanes, integer), stacked(1, integer)
    stage: Any = [*stages(problem), None][0]
    stage = jax.tree.map(functools.partial(stacked, 1), stage)
    flag = stacked(1, np.asarray(True))
    given: dict[str, tuple[Any, ...]] = {
        "start": (_start, matrix, stage),
        "finish": (_finish, matrix, order),
    }
    if stage is not None:
        given |= {
            "work": (_work, stage, once),
            "turn": (_turn, order, stage, stage, flag),
        }

    def jitted(function: Callable, *arguments):
        def flat(held, *others):
            held, told = function(kind, jax.tree.unflatten(tree, held), *others)
            return jax.tree.leaves(held), told

        mapped = jax.shard_map(
            flat,
            mesh=mesh,
            in_specs=(own, whole, own, *(own for _ in arguments)),
            out_specs=own,
            check_vma=False,
        )
        # Unread arguments can be overwritten, too.
        call = jax.jit(mapped, donate_argnums=0, keep_unused=True)
        return call, (held, scalar, order, *arguments)

    def empty():
        return [jnp.zeros(x.shape, x.dtype) for x in held]

    programs = {name: jitted(*arguments) for name, arguments in given.items()}
    return programs | {"empty": (jax.jit(empty, out_shardings=sharding), ())}


def _lowered(stored: dict[str, Any], mesh) -> dict[str, Any]:
    """Lower exported programs for the devices of a mesh."""
    own = NamedSharding(mesh, PartitionSpec(AXIS))
    whole = NamedSharding(mesh, PartitionSpec())

    def shape(aval):
        # The tolerance is the only scalar, and the only argument that is not divided.
        sharding = own if aval.shape else whole
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)

    lowered = {}
    for name, program in stored.items():
        shapes = jax.tree.unflatten(program.in_tree, map(shape, program.in_avals))
        options: dict[str, Any] = {"donate_argnums": 0}
        if not shapes[0]:
            options = {"out_shardings": own}
        call = jax.jit(program.call, keep_unused=True, **options)
        lowered[name] = call.lower(*shapes[0])
    return lowered


def peak(program: Any) -> int:
    """Return the peak memory of a program on a device, in bytes."""
    facts = program.memory_analysis()
    if facts is None:
        return 0
    return (
        facts.argument_size_in_bytes
        + facts.output_size_in_bytes
        + facts.temp_size_in_bytes
        - facts.alias_size_in_bytes
    )
