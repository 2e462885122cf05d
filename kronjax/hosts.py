"""Several processes on one or many hosts that share the work on one plan.

They speak to each other once, before the work: do all want the same, and may they? Then
they part, so that none waits for another one, and none ends because another one did.

>>> alone = Hosts(0, 1)
>>> alone.exchange([3, 4])
[[3, 4]]
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from kronjax.places import Bucket, Folder

POLL = 1.0
"""Seconds between two looks at what the others have finished."""


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Who this process is.

    Attributes:
        process: Its number.
        processes: How many there are.
    """

    process: int
    processes: int

    def exchange(self, words: Sequence[int]) -> list[list[int]]:
        """Return the words of all processes, which give equally many, below 2^31."""
        if self.processes == 1:
            return [list(words)]
        from jax.experimental import multihost_utils

        with _errors_only():
            given = np.asarray(words, np.int32)
            return np.asarray(multihost_utils.process_allgather(given)).tolist()

    def part(self) -> None:
        """Be on one's own from here on: nobody is told any longer who has ended."""
        if self.processes > 1:
            jax.distributed.shutdown()


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> Hosts:
    """Meet the other processes.

    Args:
        coordinator: `host:port` of process 0. On Cloud TPU, under Slurm and MPI all
            three are found out.
        processes: How many there are.
        process: Number of this one.

    Raises:
        ValueError: If the others cannot be found.
    """
    try:
        with _errors_only():
            jax.distributed.initialize(coordinator, processes, process)
            return Hosts(jax.process_index(), jax.process_count())
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the processes did not meet ({reason}): give --coordinator HOST:PORT, "
            "--processes and --process"
        ) from error


def wait(
    place: Folder | Bucket, hosts: Hosts, missing: Callable[[], Sequence[int]]
) -> None:
    """Wait until the others have finished what they own, as long as they live.

    Args:
        place: That each of them holds.
        hosts: All of them.
        missing: Returns the indices of what is not finished.

    Raises:
        OSError: If one has ended before.
    """
    while True:
        # In this order: who has let go has written all before.
        alive = {i for i in range(1, hosts.processes) if place.is_held(i)}
        rest = missing()
        owners = {index % hosts.processes for index in rest}
        if not rest:
            return
        if not owners & alive:
            names = ", ".join(map(str, sorted(owners)))
            raise OSError(
                f"{len(rest)} matrices are missing, of process {names}, which has "
                "ended: the same line again goes on"
            )
        time.sleep(POLL)


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """Send what libraries print about connections to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
