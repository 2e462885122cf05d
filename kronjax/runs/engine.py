"""Many matrices solved on the devices of this process, and kept one by one.

    plan → groups of equal shape, configurations, norm and precision, the largest first
         → a pool of slots on all devices, on a processor a crew of pools (or truncated
           SVD, where that is the answer)
         → factors and record into the store, as each matrix is finished

Matrices are read when there is room for them, and only then. Wide ones are solved as
their transposes, in one group with tall ones of those shapes. Process `i` of `k` solves
the tasks whose index is `i` modulo `k`, and knows nothing of the others. What comes out
depends on the numbers of a matrix and on how many of them a device computes at once,
which the store remembers, and where that is a single one, on whether there are several
devices: not on who was finished before an interruption.

>>> from kronjax import recipe
>>> rule = '{match: "*", method: low-rank, rank: 1, weighting: none}'
>>> made = plan.make(recipe.loads(f"rules: [{rule}]"), {"w": np.eye(4)})
>>> [(group.count, group.problem) for group in groups(made.tasks, made.settings)]
[(1, None)]
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np

from kronjax import __version__
from kronjax.io import matrices
from kronjax.kronecker import KroneckerTerms
from kronjax.linalg.residuals import ResidualNorms, measure
from kronjax.runs import plan, pool_programs, store, workers
from kronjax.runs.plan import MatrixTask, SolveSettings
from kronjax.runs.pool import Finished, Pool
from kronjax.runs.store import Store
from kronjax.solver.descent import Status
from kronjax.solver.problem import Problem

ENTRIES = {"cpu": 2**17}
"""Of the matrices that a device computes at once: of one of 768 x 768, or of some
hundred of 36 x 36. A guess, as are `WAVES`: no other numbers were measured."""

OTHERWISE = 2**26
"""The same on accelerators."""

WAVES = 8
"""Slots for each lane, where there is more than one: see `pool`."""

MOST_LANES = 4096

Tell = Callable[[str, int], None]
"""Called with what is being done, and the number of matrices that are just finished."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Tasks that one program solves.

    Attributes:
        key: What they share, in words; of wide matrices, that of their transposes.
        tasks: In the order of the plan.
        problem: What they share, or None where truncated SVD is the answer.
    """

    key: str
    tasks: tuple[MatrixTask, ...]
    problem: Problem | None

    @property
    def count(self) -> int:
        """Number of matrices."""
        return len(self.tasks)

    @property
    def dtype(self) -> np.dtype:
        """What they are computed in."""
        return np.dtype(self.tasks[0].precision)


def groups(some: Sequence[MatrixTask], settings: SolveSettings) -> list[Group]:
    """Return tasks in groups, those of the largest matrices first."""
    alike: dict[str, list[MatrixTask]] = {}
    for one in some:
        alike.setdefault(_key(one), []).append(one)
    found = [
        Group(key, tuple(members), _problem(members[0], settings))
        for key, members in alike.items()
    ]
    return sorted(found, key=lambda x: (-x.tasks[0].size, x.tasks[0].index))


def lanes_of(store: Store, devices: Sequence[Any], processes: int = 1) -> dict:
    """Return how many matrices of each group a device computes at once, by key.

    What the plan of the store knows already stays as it is.
    """
    plan, chosen = store.plan, {}
    for group in groups(plan.tasks, plan.settings):
        if group.problem is not None:
            share = -(-group.count // (len(devices) * processes))
            key = lanes_key(group, devices)
            chosen[key] = plan.lanes.get(key) or _lanes(group, devices, share)
    return chosen


def run(
    matrices: Mapping[str, np.ndarray],
    store: Store,
    *,
    process: int = 0,
    processes: int = 1,
    devices: Sequence[Any] | None = None,
    tell: Tell = lambda text, count: None,
) -> None:
    """Solve what a process owns and has not finished, and keep it.

    Args:
        matrices: By the names of the tasks.
        store: That has agreed on its plan.
        process: Number of this process.
        processes: How many there are.
        devices: To use; by default all of this process.
        tell: Called as work goes on.

    Raises:
        OSError: If something cannot be read or written; what is finished is kept.
        ValueError: If a matrix is not the one that was planned for.
    """
    devices = list(jax.local_devices() if devices is None else devices)
    plan = store.plan
    owned = [one for one in plan.tasks if one.index % processes == process]
    store.sweep(owned)
    done = store.records(owned)
    tell("", len(done))
    todo = [one for one in owned if one.index not in done]
    for group in groups(todo, plan.settings):
        with jax.enable_x64(group.dtype == np.float64):
            if group.problem is None:
                _truncate(group, matrices, store, tell)
            else:
                _solve(group, matrices, store, devices, tell)


def _solve(group, matrices, store, devices, tell):
    """Solve a group by a crew of pools."""
    key = lanes_key(group, devices)
    wanted = store.plan.lanes[key]
    tell(f"compiling {group.key}", 0)
    pools, lanes = pools_of(group, wanted, devices, store.plan.settings)
    if lanes != wanted:
        store.remember(key, lanes)
    held: dict[MatrixTask, tuple[np.ndarray, float]] = {}
    failed: list[MatrixTask] = []
    spent = 0

    def given():
        for task in group.tasks:
            begun, matrix = time.perf_counter(), read(task, matrices)
            if matrix is None:
                failed.append(task)
                continue
            held[task] = matrix, begun
            yield task, upright(matrix), store.plan.settings.seed + task.index

    def tick(products):
        nonlocal spent
        spent += products
        tell(f"{group.key}: {spent:,} products", 0)

    def lose():
        while failed:
            task = failed.pop()
            store.put(task, (), _failed(task, "it holds NaN or infinite entries"))
            tell(group.key, 1)

    for found in workers.solve(pools, given(), tick):
        lose()
        task: Any = found.key
        matrix, begun = held.pop(task)
        _keep(task, found, matrix, time.perf_counter() - begun, store, devices)
        tell(group.key, 1)
    lose()


def _keep(task: MatrixTask, found: Finished, matrix, seconds, store, devices):
    """Keep what came of one matrix of a pool."""
    settings = store.plan.settings
    terms = tuple(one.T if task.is_wide else one for one in found.terms)
    effort = {
        "solver": found.status.name.lower(),
        "p": list(found.p),
        "steps": found.steps,
        "gemms": found.gemms,
        "seconds": seconds,
        "tolerance": settings.tolerance,
        "starts": settings.starts,
        "seed": settings.seed + task.index,
        "device": devices[0].device_kind,
    }
    finite = all(np.isfinite(x).all() for one in terms for x in (one.a, one.b))
    if found.status == Status.NONFINITE or not finite:
        store.put(task, (), {**_failed(task, "the solver diverged"), **effort})
        return
    error, whole = measure(matrix, terms), measure(matrix, ())
    facts = _facts(task, error, whole, found.local_bound)
    facts["errors"]["van_loan_spectral"] = found.van_loan
    store.put(task, terms, {**facts, **effort})


def _truncate(group, matrices, store, tell):
    """Cut off singular values: the best of low rank in every norm that there is."""
    for task in group.tasks:
        begun, matrix = time.perf_counter(), read(task, matrices)
        if matrix is None:
            store.put(task, (), _failed(task, "it holds NaN or infinite entries"))
            tell(group.key, 1)
            continue
        terms, bound = truncated(matrix, task)
        if terms:
            error, whole = measure(matrix, terms), measure(matrix, ())
            facts = _facts(task, error, whole, bound)
        else:
            facts = _failed(task, "its singular values are out of range")
        effort = {"solver": "svd", "seconds": time.perf_counter() - begun}
        store.put(task, terms, {**facts, **effort})
        tell(group.key, 1)


def truncated(matrix, task: MatrixTask) -> tuple[tuple[KroneckerTerms, ...], float]:
    """Return the best sum of low rank, and what no other of that rank is below.

    The bound is the first singular value that is left out (Eckart and Young, 1936),
    less what rounding may have added. There is no sum where numbers overflow.
    """
    (one,) = task.configurations
    m, n = task.shape
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    except np.linalg.LinAlgError:
        return (), 0.0
    if not np.isfinite(s).all():
        return (), 0.0
    r, eps = one.rank, float(np.finfo(matrix.dtype).eps)
    left = (u[:, :r] * np.sqrt(s[:r])).T.reshape(r, m, 1)
    right = (np.sqrt(s[:r, None]) * vt[:r]).reshape(r, 1, n)
    bound = float(s[r]) if r < len(s) else 0.0
    bound = max(bound - 4 * math.sqrt(m + n) * eps * float(s[0]), 0.0)
    a, b = (left, right) if one.a_shape == (m, 1) else (right, left)
    made: Any = KroneckerTerms
    return (made(a, b),), bound


def _facts(task, error: ResidualNorms, whole: ResidualNorms, bound) -> dict[str, Any]:
    """Return what there is to say about the solution of a task."""
    relative, spectral = error.over(whole), float(error.spectral)
    gap = max(1 - bound / spectral, 0.0) if spectral > 0 else 0.0
    return {
        "status": store.SOLVED,
        **_about(task),
        "errors": {
            "spectral": float(error.spectral),
            "frobenius": float(error.frobenius),
            "relative_spectral": float(relative.spectral),
            "relative_frobenius": float(relative.frobenius),
        },
        "bounds": {"local": bound, "gap": gap},
    }


def _failed(task, reason):
    return {"status": store.FAILED, "reason": reason, **_about(task)}


def _about(task) -> dict[str, Any]:
    return {
        "shape": list(task.shape),
        "method": task.method,
        "configurations": [dataclasses.asdict(x) for x in task.configurations],
        "norm": task.norm,
        "parameters": task.parameters,
        "precision": {"dtype": task.precision, "products": "highest"},
        "versions": _versions(),
    }


@functools.cache
def _versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "numpy")
    return {"kronjax": __version__, **{name: metadata.version(name) for name in names}}


def read(task: MatrixTask, matrices: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Return the matrix of a task in what it is computed in, or None if it has NaN."""
    stored = np.array(matrices[task.name], order="C")  # the only copy
    if stored.shape != task.shape or plan.digest(stored) != task.digest:
        raise ValueError(
            f"{task.name} is not what it was when the plan was made: its file changes"
        )
    matrix = stored.astype(task.precision, copy=False)
    return matrix if np.isfinite(matrix).all() else None


def upright(matrix: np.ndarray) -> np.ndarray:
    """Return the matrix as its group solves it: transposed if it is wide."""
    m, n = matrix.shape
    return matrix.T if m < n else matrix


def pools_of(
    group: Group, lanes: int, devices: Sequence[Any], settings: SolveSettings
) -> tuple[list[Pool], int]:
    """Return a crew that fits into memory, and the lanes of each: fewer if need be.

    Args:
        group: With a problem.
        lanes: For each device.
        devices: To use.
        settings: Of the solves.
    """
    problem, limit, most = group.problem, _limit(devices), workers.size(devices)
    share = -(-group.count // (len(devices) * most))
    assert problem is not None

    def made(lanes):
        return Pool(
            problem,
            group.dtype,
            lanes=lanes,
            slots=min(lanes * WAVES, share) if lanes > 1 else 1,
            devices=list(devices),
            tolerance=settings.tolerance,
        )

    pool = made(lanes)
    while pool.memory > limit and lanes > 1:
        lanes = max(min(lanes - 1, lanes * limit // pool.memory), 1)
        pool = made(lanes)
    useful = -(-group.count // (len(devices) * lanes))
    count = max(min(most, useful, limit // max(pool.memory, 1)), 1)
    return [pool, *(made(lanes) for _ in range(count - 1))], lanes


def _lanes(group, devices, share) -> int:
    """Return how many matrices a device should compute at once."""
    most = ENTRIES.get(devices[0].platform, OTHERWISE) // group.tasks[0].size
    held = pool_programs.shapes(group.problem, group.dtype)
    each = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(held))
    most = min(most, _limit(devices) // (each * (WAVES + 4)), MOST_LANES)
    waves = -(-share // max(most, 1))
    return -(-share // waves)


def _limit(devices) -> int:
    """Return the bytes that a device may be filled with."""
    facts = devices[0].memory_stats() or {}
    if "bytes_limit" in facts:
        return int(0.8 * facts["bytes_limit"])
    return matrices.physical_memory() // 4 // len(devices)


def _problem(task: MatrixTask, settings: SolveSettings) -> Problem | None:
    if task.is_closed:
        return None
    shape, configurations = _as_solved(task)
    return Problem.of(shape, configurations, task.norm, starts=settings.starts)


def _as_solved(task):
    """Return the shape of what is solved for a task, and the configurations."""
    if task.is_closed or not task.is_wide:
        return task.shape, task.configurations
    return task.shape[::-1], tuple(one.T for one in task.configurations)


def _key(task: MatrixTask) -> str:
    (m, n), configurations = _as_solved(task)
    what = plan.describe(configurations)
    way = "svd" if task.is_closed else task.norm
    return f"{m}x{n} ({what}) {way} {task.precision}"


def lanes_key(group: Group, devices: Sequence[Any]) -> str:
    """Return the name under which the lanes of a group are remembered."""
    return f"{devices[0].device_kind}: {group.key}"
