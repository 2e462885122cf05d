"""Estimates of a run before it begins: memory as compiled, time after a short trial.

>>> from kronjax import recipe
>>> from kronjax.io.storage import MemoryFolder
>>> from kronjax.runs import plan
>>> rule = '{match: "*", method: low-rank, rank: 1, weighting: none}'
>>> rules, matrices = recipe.loads(f"rules: [{rule}]"), {"w": np.eye(4)}
>>> made = plan.make(recipe.resolve(rules, {"w": (4, 4)}), matrices)
>>> held = Store(MemoryFolder(), made)
>>> [(x.memory, x.seconds < 1) for x in of(engine.Inputs(matrices), held)]
[(0, True)]
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from kronjax.cpu_threads import one_blas_thread
from kronjax.io.storage import MemoryFolder
from kronjax.runs import engine, joint, workers
from kronjax.runs.pool import Matrix
from kronjax.runs.store import Store

PRODUCTS = 350
"""Products that matrices of 12x12 to 768x768 took at a tolerance of 1e-2 with one
start."""

DECADE = 250
"""Products that each tenth of that tolerance takes more."""

START = 100
"""Products that each further start takes more."""

PROBE = 2.0
"""Seconds of the trial from which the time is estimated."""

TRIALS = 8, 40
"""Products of the short and of the long trials of joint fits."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Memory and time of a group.

    Attributes:
        group: The group of tasks.
        lanes: Matrices of a device in one call; 0 without a pool.
        memory: Bytes on every device, as compiled; 0 without a pool.
        seconds: Estimated seconds: the products that matrices usually take (joint fits:
            all that they may), at the rate of a short trial, and the compilation.
    """

    group: engine.Group
    lanes: int
    memory: int
    seconds: float


def of(
    inputs: engine.Inputs,
    store: Store,
    devices: Sequence[Any] | None = None,
    tell: engine.Tell = lambda text, count: None,
) -> Iterator[Estimate]:
    """Yield an estimate for each group, by compiling it and trying it for a moment."""
    devices = list(jax.local_devices() if devices is None else devices)
    plan, lanes = store.plan, engine.lanes_of(store, devices)
    for group in engine.groups(plan.tasks, plan.settings):
        tell(group.key, 0)
        with jax.enable_x64(group.dtype == np.float64), one_blas_thread():
            if group.problem is None:
                seconds = _seconds_alone(group, inputs, store, devices)
                estimate = Estimate(group, 0, 0, seconds)
            else:
                begun = time.perf_counter()
                count = lanes[engine.lanes_key(group, devices)]
                pools, count = workers.pools_of(
                    group.kind, group.count, count, devices, plan.settings.tolerance
                )
                compiling = time.perf_counter() - begun
                seconds = compiling + _seconds(group, inputs, pools, plan.settings)
                memory = sum(pool.memory for pool in pools)
                estimate = Estimate(group, count, memory, seconds)
        tell(group.key, group.count)
        yield estimate


def _seconds(group, inputs, pools, settings) -> float:
    """Return the seconds that a group will take, after a short trial."""
    begun, count = time.perf_counter(), 0
    lanes = sum(pool.lanes * pool.mesh.devices.size for pool in pools)
    taken = group.tasks[:lanes]
    ticks: list[tuple[float, int]] = []

    def tick(products, turned):
        if not products:
            return
        ticks.append((time.perf_counter(), products))
        enough = len(ticks) >= 2 * len(pools)
        if enough and time.perf_counter() - begun > PROBE:
            raise TimeoutError

    def given():
        for task in taken:
            target = inputs.read(task)
            if target is not None:
                tall = target.T if task.is_wide else target
                yield Matrix(task, tall.matrix, 0, tall.left, tall.right)

    try:
        for _ in workers.solve(pools, given(), tick):
            count += 1
    except TimeoutError:
        count = 0
    if count:
        return (time.perf_counter() - begun) * group.count / count
    if not ticks:  # nothing to solve
        return 0.0
    # The first slices wait for the beginnings, of which there is one for each matrix.
    (first, _), *rest = ticks[len(pools) - 1 :]
    each = (rest[-1][0] - first) / max(sum(products for _, products in rest), 1)
    allowed = sum(int(stage.max_products) for stage in group.problem.schedule())
    decades = max(math.log10(1e-2 / settings.tolerance), 0)
    usual = PRODUCTS + DECADE * decades + START * (settings.num_starts - 1)
    beginning = (first - begun) / len(taken)
    return group.count * (beginning + each * min(allowed, usual))


def _seconds_alone(group, inputs, store, devices) -> float:
    """Return the seconds of a group without a pool."""
    if group.tasks[0].is_low_rank:
        return _seconds_of_svd(group, inputs)
    if group.tasks[0].configurations:
        return _seconds_of_joint_fits(group, inputs, store, devices)
    compiled = _trial(group, 1, inputs, store, devices)
    if group.count == 1:
        return compiled
    return compiled + (group.count - 1) * _trial(group, 1, inputs, store, devices)


def _seconds_of_joint_fits(group, inputs, store, devices) -> float:
    """Return the seconds of joint fits that spend all of their products.

    The first batch is solved with few products: with compilation, without, and with
    more of them.
    """
    count = min(engine.batch_size(group, devices), group.count)
    allowed = store.plan.settings.max_products or joint.PRODUCTS
    short, long = (min(products, allowed) for products in TRIALS)
    compiled, each, more = (
        _trial(group, count, inputs, store, devices, max_products=products)
        for products in (short, short, long)
    )
    compiling, rate = max(compiled - each, 0), 0.0
    if long > short:
        rate = max(more - each, 0) / (long - short)
    return compiling + (each + rate * (allowed - short)) * group.count / count


def _trial(group, count, inputs, store, devices, **limits) -> float:
    """Return the seconds in which the first matrices of a group are solved."""
    settings = dataclasses.replace(store.plan.settings, **limits)
    plan = dataclasses.replace(store.plan, settings=settings)
    work = engine.Run(inputs, Store(MemoryFolder(), plan), devices, lambda *_: None)
    begun = time.perf_counter()
    engine.solve(dataclasses.replace(group, tasks=group.tasks[:count]), work)
    return time.perf_counter() - begun


def _seconds_of_svd(group, inputs) -> float:
    """Return the seconds of decompositions, by a corner of the first matrix.

    The work of a decomposition is that of `m n min(m, n)` operations.
    """
    m, n = group.tasks[0].shape
    part = inputs.matrices[group.tasks[0].name][:512, :512].astype(group.dtype)
    begun = time.perf_counter()
    np.linalg.svd(np.nan_to_num(part), full_matrices=False)
    passed = time.perf_counter() - begun
    work = m * n * min(m, n) / (part.size * min(part.shape))
    return passed * work * group.count
