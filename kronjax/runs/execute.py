"""One run from its plan to its end: on this process, or shared with others.

`execute` takes hold of the place of the results, agrees with the other processes on the
plan, solves the tasks that are missing, and waits until the others have finished
theirs. `factorize` and the compression of language models run their fits by it.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from kronjax.io import storage
from kronjax.io.progress import bar
from kronjax.io.storage import Storage
from kronjax.runs import engine, processes, store
from kronjax.runs.engine import Inputs
from kronjax.runs.plan import RunPlan
from kronjax.runs.processes import Hosts
from kronjax.runs.store import Store


def execute(
    plan: RunPlan,
    inputs: Inputs,
    place: Storage,
    *,
    hosts: Hosts | None = None,
    force: bool = False,
    check: Callable[[Store], None] = lambda store: None,
    progress: bool | None = None,
    unit: str = "matrices",
) -> Store:
    """Solve all tasks of a plan and store the results; those that are there stay.

    Args:
        plan: The tasks.
        inputs: Matrices and weights by the names of the tasks.
        place: Where results are stored, and found after an interruption.
        hosts: The processes that share the tasks; by default this one alone.
        force: Whether to remove the results of another plan instead of refusing.
        check: Called in process 0 before anything is written; raises what must not be.
        progress: Whether to draw a bar; by default on a terminal, after two seconds.
        unit: The word for the matrices beside the bar.

    Returns:
        The store. In process 0 all tasks have a record, in others their own.

    Raises:
        OSError: If something cannot be read or written, or another process has ended
            early; finished matrices are kept.
        ValueError: If the place holds results of another plan, or the processes
            disagree.
    """
    hosts = hosts or Hosts(0, 1)
    kept = Store(place, plan)
    with contextlib.ExitStack() as stack:
        _begin(kept, hosts, force, check, stack)
        with bar(len(plan.tasks), "solving", unit=unit, wanted=progress) as advance:
            engine.run(
                inputs,
                kept,
                process=hosts.process,
                processes=hosts.processes,
                tell=lambda text, count: advance(count, text),
            )
        if hosts.process == 0:
            processes.wait(place, hosts, _missing(kept))
    return kept


def _begin(kept: Store, hosts: Hosts, force: bool, check, stack) -> None:
    """Take hold of the place, and agree with its plan and with the other processes."""
    place, problem = kept.place, None
    devices = jax.local_devices()
    try:
        stack.enter_context(place.hold(hosts.process))
        if hosts.process == 0:
            storage.refuse_others(place, hosts.processes)
            if force:
                _clear_others(kept)
            check(kept)
            kept.agree(engine.lanes_of(kept, devices, hosts.processes))
    except Exception as error:
        problem = error
    hosts.agree(kept.plan.hash, problem, what="has other matrices or other rules")
    keys = sorted(engine.lanes_of(kept, devices, hosts.processes))
    known = hosts.exchange([0, *(kept.plan.lanes.get(key, 0) for key in keys)])[0][1:]
    lanes: dict[str, Any] = {**kept.plan.lanes, **dict(zip(keys, known, strict=True))}
    kept.plan = dataclasses.replace(kept.plan, lanes=lanes)
    hosts.part()


def _clear_others(kept: Store) -> None:
    """Remove the results of any other plan."""
    with contextlib.suppress(ValueError):
        plan = store.read_plan(kept.place)
        if plan is not None and plan.hash == kept.plan.hash:
            return
    kept.clear()


def _missing(kept: Store) -> Callable[[], list[int]]:
    """Return a function that lists the missing tasks; no record is read twice."""
    rest = list(kept.plan.tasks)

    def look() -> list[int]:
        done = kept.records(rest)
        rest[:] = [task for task in rest if task.index not in done]
        return [task.index for task in rest]

    return look
