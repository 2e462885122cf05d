"""What one call to a pool computes, on every device for itself.

A device holds the settings and paths of its slots as one pytree with a leading axis. A
call gets the numbers of the slots it concerns, takes their lanes out, and puts them
back; the last slot is that of lanes without a matrix. The only slot of the only device,
as large matrices have it, stays where it is.

- `start`: new matrices into slots, and into their first stage; tells spectral errors;
- `work`: a slice of trial points; tells whether the stage has ended, and the products;
- `turn`: from a stage that has ended to the next one; tells whether all is done, and
  the line of the trace;
- `finish`: tells factors, what is proven about them, and the status.

>>> from kronjax.kronecker import Configuration
>>> problem = Problem.of((4, 6), Configuration((2, 3), 1))
>>> shapes(problem, np.dtype(np.float32))[0].target.shape
(4, 6)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kronjax.linalg import schatten
from kronjax.linalg.batching import select
from kronjax.proof import multipliers
from kronjax.proof.bounds import certify_stage
from kronjax.solver import continuation
from kronjax.solver.descent import Status
from kronjax.solver.problem import Problem
from kronjax.solver.solution import Trace

AXIS = "matrices"
"""Of the mesh: what the matrices are divided over."""

COARSE = 0.01
"""Tolerance above which proofs have half the rounds: gaps of random 36×36, solved to
0.03, are then 3.5 instead of 3.0 % on average."""


def _start(problem, held, tolerance, order, matrices, seeds):
    first, *_ = [*problem.schedule(), None]

    def lane(matrix, seed):
        setting, path, told = continuation.start(problem, matrix)
        if first is not None:
            first_stage = jax.tree.map(jnp.asarray, first)
            path = continuation.enter(problem, setting, path, first_stage, seed)
        return (setting, path), told.spectral_error

    new, told = _each(lane)(matrices, seeds)
    return _put(held, order, new), told


def _work(problem, held, tolerance, order, stage, trials):
    stage, trials = jax.tree.map(lambda x: x[0], (stage, trials))
    settings, paths = held
    each = schatten.num_products(stage.squarings)

    # Of a path only the state changes, and only that is moved.
    def lane(setting, state):
        new = continuation.descend(problem, setting, state, stage, tolerance, trials)
        spent = each * (new.evaluations - state.evaluations)
        return new, (new.status != Status.RUNNING, spent)

    own = _get((settings, paths.state), order)
    states, told = _each(lane)(*own)
    paths = dataclasses.replace(paths, state=_put(paths.state, order, states))
    return (settings, paths), told


def _turn(problem, held, tolerance, order, seeds, stage, following, ends):
    stage, following, ends = jax.tree.map(lambda x: x[0], (stage, following, ends))
    settings, paths = held

    def lane(setting, path, seed):
        path = continuation.leave(problem, setting, path, stage, tolerance)
        told = continuation.trace_line(setting, path, stage)
        done = path.done | ends
        # What is done keeps its state, which tells how it ended.
        new = continuation.enter(problem, setting, path, following, seed)
        return select(done, path, new), (done, told)

    own_settings, own_paths = _get(held, order)
    new_paths, told = _each(lane)(own_settings, own_paths, seeds)
    turned = _put(paths, order, new_paths)
    if paths.champion is None:
        # Between stages nothing is learnt of the curvature, which is not to be moved.
        state = dataclasses.replace(turned.state, pairs=paths.state.pairs)
        turned = dataclasses.replace(turned, state=state)
    return (settings, turned), told


def _finish(problem, held, tolerance, order, matrices, last):
    rounds = proof_rounds(tolerance)

    def lane(setting, path, matrix, squarings):
        zero = jnp.zeros((), matrix.dtype)
        untold = Trace(p=zero, value=zero, spectral_error=zero, steps=zero, gemms=zero)
        found = continuation.finish(problem, setting, path, untold)
        last = schatten.exponent(squarings).astype(matrix.dtype)
        p = proof_exponent(problem, last)
        bounds = certify_stage(matrix, found.terms, p, rounds)
        return found.terms, bounds, found.status

    own_settings, own_paths = _get(held, order)
    return held, _each(lane)(own_settings, own_paths, matrices, last)


def _each(function):
    """Map over lanes: what `vmap` adds is left out where there is one."""

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
    """Return the p whose gradient proves, given the last one that was minimised.

    At high rank half of it: gaps are then 2.3 instead of 2.6 % at half the parameters
    of 768×768, but would be 9.8 instead of 7.1 % with 8 terms.
    """
    return last / 2 if problem.is_spectral and problem.is_factored else last


def rows(slots: int, devices: int) -> int:
    """Return the slots of a device, with that of lanes without a matrix if need be."""
    return 1 if slots == devices == 1 else slots + 1


def shapes(problem: Problem, dtype: np.dtype) -> Any:
    """Return the shapes of the setting and the path of one matrix."""
    matrix = jax.ShapeDtypeStruct(problem.shape, dtype)
    return jax.eval_shape(functools.partial(continuation.start, problem), matrix)[:2]


@functools.lru_cache(maxsize=16)
def compiled(problem: Problem, dtype: np.dtype, mesh: Any, lanes: int, slots: int):
    """Compile the programs for the devices of a mesh; return them by name.

    Each is called with what the devices hold, the tolerance, the slots `[devices ·
    lanes]` and what else it needs; all but the tolerance divided over the devices.
    """
    own, whole = PartitionSpec(AXIS), PartitionSpec()
    sharding = NamedSharding(mesh, own)

    def stacked(count, x):
        shape = mesh.devices.size * count, *x.shape
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

    count = rows(slots, mesh.devices.size)
    held = jax.tree.map(functools.partial(stacked, count), shapes(problem, dtype))
    scalar = jax.ShapeDtypeStruct((), dtype, sharding=NamedSharding(mesh, whole))
    integer = jax.ShapeDtypeStruct((), np.int32)
    matrix = stacked(lanes, jax.ShapeDtypeStruct(problem.shape, dtype))
    order, once = stacked(lanes, integer), stacked(1, integer)
    given: dict[str, tuple[Any, ...]] = {
        "start": (_start, matrix, order),
        "finish": (_finish, matrix, order),
    }
    for stage in problem.schedule()[:1]:
        stage = jax.tree.map(lambda x: stacked(1, jnp.asarray(x)), stage)
        flag = stacked(1, np.asarray(True))
        given |= {
            "work": (_work, stage, once),
            "turn": (_turn, order, stage, stage, flag),
        }

    def program(function: Callable, *arguments):
        mapped = jax.shard_map(
            functools.partial(function, problem),
            mesh=mesh,
            in_specs=(own, whole, own, *(own for _ in arguments)),
            out_specs=own,
            check_vma=False,
        )
        # What is not read is to be written over, too.
        jitted = jax.jit(mapped, donate_argnums=0, keep_unused=True)
        return jitted.lower(held, scalar, order, *arguments).compile()

    return {name: program(*one) for name, one in given.items()}


def peak(program: Any) -> int:
    """Return the bytes that a program holds on a device at its peak."""
    facts = program.memory_analysis()
    if facts is None:
        return 0
    return (
        facts.argument_size_in_bytes
        + facts.output_size_in_bytes
        + facts.temp_size_in_bytes
        - facts.alias_size_in_bytes
    )
