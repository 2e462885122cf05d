"""Many matrices solved on the devices of this process, and stored one by one.

    plan → groups of equal shape, configurations, norm, weights and precision, the
           largest first
         → a pool of slots on all devices; joint fits at p = 2; or the closed form
         → factors and a record into the store, as each matrix is finished

Every batch goes through here: those of `approximate`, of `factorize`, and the layers of
a language model. Matrices are read when there is room for them. Wide ones are solved as
their transposes, in one group with tall ones of those shapes. Process `i` of `k` solves
the tasks whose index is `i` modulo `k`; processes do not wait for one another. The
results depend on the numbers of a matrix and on how many matrices a device computes at
once, which the store remembers (and where that is a single one, on whether there are
several devices), not on what was finished before an interruption.

>>> from kronjax import recipe
>>> rule = '{match: "*", method: low-rank, rank: 1, weighting: none}'
>>> rules = recipe.loads(f"rules: [{rule}]")
>>> made = plan.make(recipe.resolve(rules, {"w": (4, 4)}), {"w": np.eye(4)})
>>> [(group.key, group.problem) for group in groups(made.tasks, made.settings)]
[('4x4 (4x1, 1) svd float64', None)]
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kronjax import __version__, methods
from kronjax.cpu_threads import one_blas_thread
from kronjax.io.cache import Cache
from kronjax.kronecker import KroneckerTerms, to_arrays
from kronjax.linalg.residuals import ResidualNorms, measure
from kronjax.proof.certificate import certificate_of
from kronjax.runs import joint, plan, store, workers
from kronjax.runs.closed_form import LowRank
from kronjax.runs.joint import Prepared, Target
from kronjax.runs.plan import MatrixTask, Weights
from kronjax.runs.pool import Matrix
from kronjax.runs.pool_programs import Kind
from kronjax.runs.settings import SolveSettings
from kronjax.runs.store import Store
from kronjax.solver.descent import Status
from kronjax.solver.problem import Problem

COPIES = 40
"""Arrays of the size of a matrix that a joint fit may hold: those of quasi-Newton
steps."""

_HALF = ("bfloat16", "float16")
"""Dtypes of matrices that are computed in float32 and stored as they are."""

Tell = Callable[[str, int], None]
"""Called with what is being done, and the number of matrices that are just finished."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The matrices of a run and their weights, by the names of tasks.

    Attributes:
        matrices: `[m, n]` each; read when there is room for them.
        weights: Left and right weights; matrices that are missing have none.
        cache: Cache of decompositions that other stages of the run share, or None.
    """

    matrices: Mapping[str, np.ndarray]
    weights: Mapping[str, Weights] = dataclasses.field(default_factory=dict)
    cache: Cache | None = None

    def read(self, task: MatrixTask) -> Target | None:
        """Return a matrix and its weights in the precision of the computation.

        Returns:
            None if it holds NaN or infinite entries.

        Raises:
            ValueError: If it is not the matrix that was planned for.
        """
        stored = np.array(self.matrices[task.name], order="C")  # the only copy
        weights = self.weights.get(task.name, (None, None))
        changed = stored.shape != task.shape or plan.digest(stored) != task.digest
        if changed or plan.digests(weights) != task.weights:
            raise ValueError(
                f"{task.name} has changed since the plan was made: is its file being "
                "written?"
            )
        arrays = [
            x if x is None else x.astype(task.precision, copy=False)
            for x in (stored, *weights)
        ]
        finite = all(x is None or np.isfinite(x).all() for x in arrays)
        return Target(task.name, *arrays) if finite else None  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Group:
    """Tasks that one program solves.

    Attributes:
        key: The shape and method that they share, in words; of wide matrices, those of
            their transposes.
        tasks: The tasks, in the order of the plan.
        problem: The problem that a pool solves for them, or None without a pool.
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
        """Dtype of the computation."""
        return np.dtype(self.tasks[0].precision)

    @property
    def kind(self) -> Kind:
        """The kind of the pools that solve the group."""
        assert self.problem is not None
        left, right = self.tasks[0].weighted
        weighted = (right, left) if self.tasks[0].is_wide else (left, right)
        # Weighted bounds are proven in float64 and with more care: rounding of float32
        # grows with the cube of the size there, and `multipliers.balance` may fail.
        return Kind(self.problem, self.dtype, weighted, proves=not (left or right))


@dataclasses.dataclass(frozen=True)
class Run:
    """The store and the devices of a run, and how its progress is reported.

    Attributes:
        inputs: Matrices and weights.
        store: Store of the results, which has agreed on its plan.
        devices: Devices to use.
        tell: Called as work goes on.
    """

    inputs: Inputs
    store: Store
    devices: Sequence[Any]
    tell: Tell

    @property
    def settings(self) -> SolveSettings:
        """Settings of the solves."""
        return self.store.plan.settings

    def keep(
        self,
        task: MatrixTask,
        target: Target,
        terms: Sequence[KroneckerTerms],
        effort: Mapping[str, Any],
        bound: float | None = None,
        relative: float | None = None,
    ) -> None:
        """Measure a sum, and store it with its record.

        Args:
            task: The task.
            target: Its matrix and weights.
            terms: The sum; none where the method has failed.
            effort: Facts for the record about how it was found.
            bound: Proven lower bound of the error, or None.
            relative: Relative weighted Frobenius error, where the solver knows it.
        """
        terms = [jax.tree.map(lambda x: _as_stored(x, task), part) for part in terms]
        finite = all(np.isfinite(x).all() for part in terms for x in (part.a, part.b))
        if not terms or not finite:
            self.fail(task, "the solver diverged", effort)
            return
        facts = _facts(task, target, target.matrix, terms, bound, relative)
        self.store.put(task, to_arrays(terms), {**facts, **effort})
        self.tell("", 1)

    def fail(self, task: MatrixTask, reason: str, effort: Mapping[str, Any]) -> None:
        """Record that a matrix stays dense."""
        facts = {"status": store.FAILED, "reason": reason, **_about(task), **effort}
        self.store.put(task, {}, facts)
        self.tell("", 1)

    def targets(
        self, tasks: Sequence[MatrixTask]
    ) -> Iterator[tuple[MatrixTask, Target]]:
        """Read matrices one after the other; those with NaN are recorded as failed."""
        for task in tasks:
            target = self.inputs.read(task)
            if target is None:
                self.fail(task, "it holds NaN or infinite entries", {})
            else:
                yield task, target


def groups(tasks: Sequence[MatrixTask], settings: SolveSettings) -> list[Group]:
    """Return tasks in groups, those of the largest matrices first."""
    alike: dict[str, list[MatrixTask]] = {}
    for task in tasks:
        alike.setdefault(_key(task), []).append(task)
    grouped = [
        Group(key, tuple(members), _problem(members[0], settings))
        for key, members in alike.items()
    ]
    return sorted(grouped, key=lambda x: (-x.tasks[0].size, x.tasks[0].index))


def lanes_of(store: Store, devices: Sequence[Any], processes: int = 1) -> dict:
    """Return how many matrices of each group a device computes at once, by key.

    What the plan of the store knows already stays as it is.
    """
    plan, chosen = store.plan, {}
    for group in groups(plan.tasks, plan.settings):
        if group.problem is not None:
            share = -(-group.count // (len(devices) * processes))
            key = lanes_key(group, devices)
            chosen[key] = plan.lanes.get(key) or workers.num_lanes(
                group.kind, devices, share
            )
    return chosen


def run(
    inputs: Inputs,
    store: Store,
    *,
    process: int = 0,
    processes: int = 1,
    devices: Sequence[Any] | None = None,
    tell: Tell = lambda text, count: None,
) -> None:
    """Solve the tasks that a process owns and has not finished, and store them.

    Args:
        inputs: Matrices and weights by the names of the tasks.
        store: Store that has agreed on its plan.
        process: Number of this process.
        processes: Number of processes.
        devices: Devices to use; by default all of this process.
        tell: Called as work goes on.

    Raises:
        OSError: If something cannot be read or written; finished matrices are kept.
        ValueError: If a matrix is not the one that was planned for.
    """
    devices = list(jax.local_devices() if devices is None else devices)
    tasks = store.plan.tasks
    owned = [task for task in tasks if task.index % processes == process]
    store.sweep(owned)
    done = store.records(owned)
    tell("", len(done))
    missing = [task for task in owned if task.index not in done]
    work = Run(inputs, store, devices, tell)
    for group in groups(missing, store.plan.settings):
        tell(group.key, 0)
        with jax.enable_x64(group.dtype == np.float64), one_blas_thread():
            solve(group, work)


def solve(group: Group, work: Run) -> None:
    """Solve a group of tasks and store them."""
    _way(group.tasks[0])(group, work)


def batch_size(group: Group, devices: Sequence[Any]) -> int:
    """Return how many joint fits run as one batch: one on CPUs."""
    if devices[0].platform == "cpu":
        return 1
    m, n = group.tasks[0].shape
    each = group.dtype.itemsize * (COPIES * m * n + 4 * (m * m + n * n))
    return max(workers.memory_limit(devices) // each, 1)


def _solve(group: Group, work: Run) -> None:
    """Solve a group in one pool, or in several at once."""
    key = lanes_key(group, work.devices)
    wanted = work.store.plan.lanes[key]
    work.tell(f"compiling {group.key}", 0)
    pools, lanes = workers.pools_of(
        group.kind, group.count, wanted, work.devices, work.settings.tolerance
    )
    if lanes != wanted:
        work.store.remember(key, lanes)
    held: dict[MatrixTask, tuple[Target, float]] = {}
    spent = 0

    def given():
        for task, target in work.targets(group.tasks):
            held[task] = target, time.perf_counter()
            tall = target.T if task.is_wide else target
            yield Matrix(task, tall.matrix, _seed(task, work), tall.left, tall.right)

    def tick(products, turned):
        nonlocal spent
        spent += products
        work.tell(f"{group.key}: {spent:,} products", 0)

    for solution in workers.solve(pools, given(), tick):
        task: Any = solution.key
        target, begun = held.pop(task)
        terms = tuple(part.T if task.is_wide else part for part in solution.terms)
        effort = {
            "solver": solution.status.name.lower(),
            "p": [int(p) for p in solution.trace.p],
            "start_spectral_error": float(solution.trace.spectral_error[0]),
            "steps": solution.steps,
            "products": solution.products,
            "seconds": time.perf_counter() - begun,
            **_asked(task, work),
        }
        bound = solution.local_bound
        if solution.status == Status.NONFINITE:
            terms = ()
        elif bound is None:
            proof = certificate_of(target.matrix, terms, target.left, target.right)
            bound = float(proof.local_bound)
        work.keep(task, target, terms, effort, bound)


def _fit_jointly(group: Group, work: Run) -> None:
    """Fit a group at p = 2: in batches on accelerators, else one after the other."""
    settings, size = work.settings, batch_size(group, work.devices)
    targets = work.targets(group.tasks)
    while batch := list(itertools.islice(targets, size)):
        begun = time.perf_counter()
        fits = joint.fit_all(
            [Prepared(target) for _, target in batch],
            [task.configurations for task, _ in batch],
            max_products=settings.max_products,
            tolerance=settings.tolerance,
        )
        seconds = (time.perf_counter() - begun) / len(batch)
        for (task, target), fit in zip(batch, fits, strict=True):
            effort = {
                "solver": fit.status.name.lower(),
                "p": [2],
                "products": fit.products,
                "seconds": seconds,
                **_asked(task, work),
            }
            work.keep(task, target, fit.terms, effort, relative=fit.relative)


def _truncate(group: Group, work: Run) -> None:
    """Cut off singular values: the best low-rank sum in every Schatten norm."""
    for task, target in work.targets(group.tasks):
        begun = time.perf_counter()
        (configuration,) = task.configurations
        low_rank = _decomposed(target, work.inputs.cache)
        effort = {"solver": "svd", "seconds": time.perf_counter() - begun}
        if low_rank is None:
            work.fail(task, "its singular values are out of range", effort)
            continue
        sum_, relative = low_rank.fit(configuration.rank)
        terms = (joint.as_wanted(sum_, configuration),)
        bound = None if any(target.weighted) else low_rank.bound(configuration.rank)
        work.keep(task, target, terms, effort, bound, relative)


def _decomposed(target: Target, cache: Cache | None) -> LowRank | None:
    """Return the low-rank sums of a matrix, or None if its values overflow."""
    try:
        low_rank = LowRank.of(target) if cache is None else LowRank.kept(target, cache)
    except np.linalg.LinAlgError:
        return None
    largest = np.finfo(target.matrix.dtype).max
    return low_rank if low_rank.values[0] <= largest else None


def _fit_by_method(group: Group, work: Run) -> None:
    """Let a method that is no sum of Kronecker products fit its matrices."""
    for task, target in work.targets(group.tasks):
        begun, method = time.perf_counter(), methods.find(task.method)
        factors = method.fit(target.matrix, target.left, target.right, task.rule)
        factors = {name: _as_stored(x, task) for name, x in factors.items()}
        dense = method.matrix(factors)
        if dense.shape != task.shape or not np.isfinite(dense).all():
            work.fail(task, f"the method {task.method} gave no finite matrix", {})
            continue
        effort = {"solver": task.method, "seconds": time.perf_counter() - begun}
        facts = _facts(task, target, target.matrix - dense)
        work.store.put(task, factors, {**facts, **effort})
        work.tell("", 1)


def _facts(
    task: MatrixTask,
    target: Target,
    rest: np.ndarray,
    terms: Sequence[KroneckerTerms] = (),
    bound: float | None = None,
    relative: float | None = None,
) -> dict[str, Any]:
    """Return the record of a solution, its errors measured in float64.

    The error is that of `terms` for `rest`. The gap is that of the bound to the
    spectral error; a closed form without a bound of its own has none to close, and sums
    that were fitted at p = 2 have no proof.
    """
    left, right = target.left, target.right
    error = measure(rest, terms)
    whole = measure(target.matrix, ())
    errors = _named(error) | {
        f"relative_{name}": value for name, value in _named(error.over(whole)).items()
    }
    proven, ratio = error, error.over(whole)
    if target.weighted != (False, False):
        if relative is None:
            proven = measure(rest, terms, left, right)
            ratio = proven.over(measure(target.matrix, (), left, right))
            errors |= {f"weighted_{k}": v for k, v in _named(proven).items()}
            relative = float(ratio.frobenius)
        errors["relative_weighted"] = relative
    gap: float | None = None
    if bound is not None:
        is_exact = float(ratio.spectral) <= _rounding(task)
        gap = 0.0 if is_exact else max(1 - bound / float(proven.spectral), 0.0)
    elif task.is_low_rank:
        gap = 0.0  # Eckart and Young, up to rounding
    return {
        "status": store.SOLVED,
        **_about(task),
        "errors": errors,
        "bounds": {"local": bound, "gap": gap},
    }


def _rounding(task: MatrixTask) -> float:
    """Return the relative error of factors that represent a matrix exactly.

    It is the rounding of the computation. Factors that are stored in half precision
    have larger errors. Their bound is that of the factors before they were rounded.
    """
    return 4 * math.sqrt(sum(task.shape)) * float(jnp.finfo(task.precision).eps)


def _as_stored(factor: Any, task: MatrixTask) -> Any:
    """Return a factor in the dtype of its matrix, so that no file grows."""
    if task.dtype in _HALF and factor.dtype.kind == "f":
        return np.asarray(factor).astype(jnp.dtype(task.dtype))
    return factor


def _named(norms: ResidualNorms) -> dict[str, float]:
    return {"spectral": float(norms.spectral), "frobenius": float(norms.frobenius)}


def _asked(task: MatrixTask, work: Run) -> dict[str, Any]:
    return {
        "tolerance": work.settings.tolerance,
        "num_starts": work.settings.num_starts,
        "seed": _seed(task, work),
        "device": work.devices[0].device_kind,
    }


def _seed(task: MatrixTask, work: Run) -> int:
    return work.settings.seed + task.index


def _about(task: MatrixTask) -> dict[str, Any]:
    return {
        "shape": list(task.shape),
        "method": task.method,
        "configurations": [dataclasses.asdict(x) for x in task.configurations],
        "norm": task.norm,
        "weighted": list(task.weighted),
        "parameters": task.parameters,
        "precision": {"dtype": task.precision, "products": "highest"},
        "versions": _versions(),
    }


@functools.cache
def _versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "numpy")
    return {"kronjax": __version__, **{name: metadata.version(name) for name in names}}


def _way(task: MatrixTask) -> Callable[[Group, Run], None]:
    """Return the function that solves groups of such tasks."""
    if not task.configurations:
        return _fit_by_method
    if task.is_low_rank:
        return _truncate
    return _fit_jointly if _whole(task, SolveSettings()).is_least_squares else _solve


def _whole(task: MatrixTask, settings: SolveSettings) -> Problem:
    """Return the problem of a task in its tall orientation."""
    shape, configurations, weighted = task.shape, task.configurations, task.weighted
    if task.is_wide:
        shape, weighted = shape[::-1], weighted[::-1]
        configurations = tuple(x.T for x in configurations)
    return Problem.of(
        shape,
        configurations,
        task.norm,
        num_starts=settings.num_starts,
        max_products=settings.max_products,
        weighted=weighted,
        schedule=settings.schedule,
    )


def _problem(task: MatrixTask, settings: SolveSettings) -> Problem | None:
    return _whole(task, settings) if _way(task) is _solve else None


def _key(task: MatrixTask) -> str:
    """Return what the tasks of a group share, in words."""
    way = _way(task)
    m, n = task.shape
    configurations, (left, right) = task.configurations, task.weighted
    if way is _fit_jointly:
        tall = joint.as_tall(configurations, task.shape)
        turned = (n, m) if task.is_wide else (m, n)
        configurations = joint.program(turned, tall, task.weighted).configurations
    elif way is _solve and task.is_wide:
        configurations = tuple(x.T for x in configurations)
    if task.is_wide and way in (_solve, _fit_jointly):
        (m, n), (left, right) = (n, m), (right, left)
    ways: dict[Any, str] = {_truncate: "svd", _fit_by_method: task.method}
    words = [f"{m}x{n}"]
    words += [f"({plan.describe(configurations)})"] if configurations else []
    words += [ways.get(way, task.norm), task.precision]
    words += ["left"] * left + ["right"] * right
    return " ".join(words)


def lanes_key(group: Group, devices: Sequence[Any]) -> str:
    """Return the name under which the lanes of a group are remembered."""
    return f"{devices[0].device_kind}: {group.key}"
