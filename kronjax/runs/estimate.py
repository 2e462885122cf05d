"""What a run will take, before it begins: memory as compiled, time after a short trial.

>>> from kronjax import recipe
>>> from kronjax.io import storage
>>> from kronjax.runs import plan, store
>>> rule = '{match: "*", method: low-rank, rank: 1, weighting: none}'
>>> matrices = {"w": np.eye(4)}
>>> made = plan.make(recipe.loads(f"rules: [{rule}]"), matrices)
>>> held = store.Store(storage.find("memory://forecast"), made)
>>> [(one.memory, one.seconds < 1) for one in of(matrices, held)]
[(0, True)]
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kronjax.runs import engine, workers
from kronjax.runs.store import Store

PRODUCTS = 350
"""That matrices took at a tolerance of 1e-2 from one start, of 12x12 to 768x768."""

DECADE = 250
"""That each tenth of that tolerance takes more, and `START` each further start."""

START = 100

PROBE = 2.0
"""Seconds for which the solver is tried, to estimate how long it will take."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a group will take.

    Attributes:
        group: Which.
        lanes: Matrices of a device in one call.
        memory: Bytes on every device, as compiled; 0 where none is used.
        seconds: About: the products that matrices usually take, at the rate of a short
            trial, and the compilation.
    """

    group: engine.Group
    lanes: int
    memory: int
    seconds: float


def of(
    matrices: Mapping[str, np.ndarray],
    store: Store,
    devices: Sequence[Any] | None = None,
    tell: engine.Tell = lambda text, count: None,
) -> Iterator[Estimate]:
    """Yield what each group will take, by compiling it and trying it for a moment."""
    devices = list(jax.local_devices() if devices is None else devices)
    plan, lanes = store.plan, engine.lanes_of(store, devices)
    for group in engine.groups(plan.tasks, plan.settings):
        tell(group.key, 0)
        with jax.enable_x64(group.dtype == np.float64):
            if group.problem is None:
                found = Estimate(group, 0, 0, _svd_seconds(group, matrices))
            else:
                begun = time.perf_counter()
                count = lanes[engine.lanes_key(group, devices)]
                pools, count = engine.pools_of(group, count, devices, plan.settings)
                compiling = time.perf_counter() - begun
                seconds = compiling + _seconds(group, matrices, pools, plan.settings)
                memory = sum(pool.memory for pool in pools)
                found = Estimate(group, count, memory, seconds)
        tell(group.key, group.count)
        yield found


def _seconds(group, matrices, pools, settings) -> float:
    """Return the seconds that a group will take, after a short trial."""
    begun, count = time.perf_counter(), 0
    lanes = sum(pool.lanes * pool.mesh.devices.size for pool in pools)
    taken = group.tasks[:lanes]
    ticks: list[tuple[float, int]] = []

    def tick(products):
        ticks.append((time.perf_counter(), products))
        enough = len(ticks) >= 2 * len(pools)
        if enough and time.perf_counter() - begun > PROBE:
            raise TimeoutError

    read = ((x, engine.read(x, matrices)) for x in taken)
    finite = (
        (x, engine.upright(matrix), 0) for x, matrix in read if matrix is not None
    )
    try:
        for _ in workers.solve(pools, finite, tick):
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
    allowed = sum(int(stage.budget) for stage in group.problem.schedule())
    decades = max(math.log10(1e-2 / settings.tolerance), 0)
    usual = PRODUCTS + DECADE * decades + START * (settings.starts - 1)
    beginning = (first - begun) / len(taken)
    return group.count * (beginning + each * min(allowed, usual))


def _svd_seconds(group, matrices) -> float:
    """Return the seconds of the decompositions of a group, after a small one."""
    m, n = group.tasks[0].shape
    part = matrices[group.tasks[0].name][:512, :512].astype(group.dtype)
    begun = time.perf_counter()
    np.linalg.svd(np.nan_to_num(part), full_matrices=False)
    passed = time.perf_counter() - begun
    work = m * n * min(m, n) / (part.size * min(part.shape))
    return passed * work * group.count
