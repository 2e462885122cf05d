"""The pools that solve many matrices: how large they are, and several at work at once.

On processors one pool of small matrices leaves cores idle: only large products use all
of them, and decompositions a single one. Other pools, each in a thread of its own, fill
the gaps. The result for a matrix does not depend on the pool that solves it.

>>> import numpy as np
>>> from kronjax.kronecker import Configuration
>>> from kronjax.runs.pool_programs import Kind
>>> from kronjax.solver.problem import Problem
>>> problem = Problem.of((4, 6), Configuration((2, 3), 1), "frobenius", num_starts=1)
>>> pools = [Pool(Kind(problem, np.dtype(np.float32)), lanes=1, slots=1)]
>>> matrices = [(f"no. {i}", np.eye(4, 6, i, np.float32), 0) for i in range(3)]
>>> sorted(found.key for found in solve(pools, iter(matrices)))
['no. 0', 'no. 1', 'no. 2']
"""

import contextlib
import math
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kronjax import cpu_threads
from kronjax.io import matrices as files
from kronjax.runs.pool import Finished, Matrix, Pool, Tick
from kronjax.runs.pool_programs import Kind

ENTRIES = {"cpu": 2**17}
"""Entries of the matrices that a device computes at once: those of one of 768 x 768, or
of some hundred of 36 x 36. A guess, as is `WAVES`: no other numbers were measured."""


OTHERWISE = 2**26
"""Entries on accelerators."""


WAVES = 8
"""Slots for each lane where there is more than one lane: see `pool`."""


MOST_LANES = 4096

PATIENCE = 0.1
"""Seconds after which a thread that waits to send looks whether the run has ended."""


def size(devices: Sequence[Any]) -> int:
    """Return how many pools should work at once on the devices of this process."""
    alone = len(devices) > 1 or devices[0].platform != "cpu"
    return 1 if alone else cpu_threads.programs()


def solve(
    pools: Sequence[Pool],
    matrices: Iterator[Matrix],
    tick: Tick = lambda products, turned: None,
) -> Iterator[Finished]:
    """Solve matrices in the pools that have room, and yield the finished ones.

    Args:
        pools: One or more pools of one kind; no more than `size`.
        matrices: As for `Pool.solve`; read in the threads, by one thread at a time.
        tick: As for `Pool.solve`; called in this thread.

    Raises:
        BaseException: The exception of a pool, of the matrices or of `tick`, once all
            threads have stopped.
    """
    if len(pools) == 1:
        yield from pools[0].solve(matrices, tick)
        return
    # A short queue: pools wait if results are not stored as fast.
    events: queue.Queue = queue.Queue(len(pools))
    reading, stopped = threading.Lock(), threading.Event()
    wide = jnp.result_type(float) == jnp.float64  # every thread has its own

    def send(event):
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                return events.put(event, timeout=PATIENCE)
        raise _Stopped

    def taken():
        while True:
            with reading:
                if stopped.is_set():
                    raise _Stopped
                matrix = next(matrices, None)
            if matrix is None:
                return
            yield matrix

    def work(pool):
        try:
            with jax.enable_x64(wide):
                for found in pool.solve(taken(), lambda *spent: send(spent)):
                    send(found)
            send(None)
        except BaseException as error:
            with contextlib.suppress(_Stopped):
                send(error)

    threads = [threading.Thread(target=work, args=(pool,)) for pool in pools]
    try:
        for thread in threads:
            thread.start()
        working = len(threads)
        while working:
            event = events.get()
            if isinstance(event, Finished):
                yield event
            elif event is None:
                working -= 1
            elif isinstance(event, BaseException):
                raise event
            else:
                tick(*event)
    finally:
        stopped.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def pools_of(
    kind: Kind,
    count: int,
    lanes: int,
    devices: Sequence[Any],
    tolerance: float,
) -> tuple[list[Pool], int]:
    """Return pools that fit into memory, and the lanes of each: fewer if need be.

    On processors several pools work at once: decompositions of small matrices use a
    single core, and the errors of large ones are measured meanwhile. Two pools on two
    cores took 0.63 to 0.75 of the time of one for 36×36, 0.95 to 0.97 for 768×768, and
    0.9 for a whole run of these.

    Args:
        kind: Kind of the matrices.
        count: Number of matrices.
        lanes: Lanes for each device.
        devices: Devices to use.
        tolerance: Tolerance of the solves.
    """
    limit, most = memory_limit(devices), size(devices)
    share = -(-count // (len(devices) * most))

    def made(lanes):
        return Pool(
            kind,
            lanes=lanes,
            slots=min(lanes * WAVES, share) if lanes > 1 else 1,
            devices=list(devices),
            tolerance=tolerance,
        )

    pool = made(lanes)
    while pool.memory > limit and lanes > 1:
        lanes = max(min(lanes - 1, lanes * limit // pool.memory), 1)
        pool = made(lanes)
    useful = -(-count // (len(devices) * lanes))
    several = max(min(most, useful, limit // max(pool.memory, 1)), 1)
    return [pool, *(made(lanes) for _ in range(several - 1))], lanes


def num_lanes(kind: Kind, devices: Sequence[Any], share: int) -> int:
    """Return how many matrices a device should compute at once.

    Args:
        kind: Kind of the matrices.
        devices: Devices to use.
        share: Number of matrices for each device.
    """
    if share == 1:
        return 1  # without tracing the shapes
    size = math.prod(kind.problem.shape)
    most = ENTRIES.get(devices[0].platform, OTHERWISE) // size
    each = sum(
        math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(kind.shapes)
    )
    most = min(most, memory_limit(devices) // (each * (WAVES + 4)), MOST_LANES)
    waves = -(-share // max(most, 1))
    return -(-share // waves)


def memory_limit(devices) -> int:
    """Return the bytes that a device may be filled with."""
    facts = devices[0].memory_stats() or {}
    if "bytes_limit" in facts:
        return int(0.8 * facts["bytes_limit"])
    return files.physical_memory() // 4 // len(devices)


class _Stopped(Exception):
    """Ends a pool between two slices."""
