"""Several pools at work at once, each in a thread of its own.

On processors one pool leaves cores idle: only large products use all of them, and
decompositions, which wait for products and are waited for, a single one. Other pools
fill the gaps. What comes of a matrix does not depend on who solves it.

>>> import numpy as np
>>> from kronjax.kronecker import Configuration
>>> from kronjax.runs.pool_programs import Kind
>>> from kronjax.solver.problem import Problem
>>> problem = Problem.of((4, 6), Configuration((2, 3), 1), "frobenius", starts=1)
>>> pools = [Pool(Kind(problem, np.dtype(np.float32)), lanes=1, slots=1)]
>>> matrices = [(f"no. {i}", np.eye(4, 6, i, np.float32), 0) for i in range(3)]
>>> sorted(found.key for found in solve(pools, iter(matrices)))
['no. 0', 'no. 1', 'no. 2']
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kronjax.runs import cpu_threads
from kronjax.runs.pool import Finished, Matrix, Pool, Tick

PATIENCE = 0.1
"""Seconds after which who waits to tell something looks whether all is over."""


def size(devices: Sequence[Any]) -> int:
    """Return how many pools should work at once on the devices of this process."""
    alone = len(devices) > 1 or devices[0].platform != "cpu"
    return 1 if alone else cpu_threads.programs()


def solve(
    pools: Sequence[Pool],
    matrices: Iterator[Matrix],
    tick: Tick = lambda products, turned: None,
) -> Iterator[Finished]:
    """Solve matrices as they come, by whoever has room, and yield what is done.

    Args:
        pools: At least one, of one problem; no more than `size`.
        matrices: As for `Pool.solve`; read in the threads, by one at a time.
        tick: As there; called in this thread.

    Raises:
        BaseException: What a pool, the matrices or `tick` raised, once all have
            stopped.
    """
    if len(pools) == 1:
        yield from pools[0].solve(matrices, tick)
        return
    # Few: who finds more than can be kept has to wait.
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
                one = next(matrices, None)
            if one is None:
                return
            yield one

    def work(pool):
        try:
            with jax.enable_x64(wide):
                for found in pool.solve(taken(), lambda *spent: send(spent)):
                    send(found)
            send(None)
        except BaseException as error:
            with contextlib.suppress(_Stopped):
                send(error)

    crew = [threading.Thread(target=work, args=(pool,)) for pool in pools]
    try:
        for one in crew:
            one.start()
        working = len(crew)
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
        for one in crew:
            if one.ident is not None:
                one.join()


class _Stopped(Exception):
    """Ends a pool between two slices."""
