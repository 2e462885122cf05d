"""Several processes, on one or many hosts, that share the work.

Before the work they compare what they are going to do. Processes that solve matrices
then part: none waits for another one, and none ends because another one did. Processes
that train one model stay together.

>>> alone = Hosts(0, 1)
>>> alone.exchange([3, 4])
[[3, 4]]
>>> alone.in_turn(lambda: "done")
'done'
"""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np

from kronjax.io.storage import Storage

POLL = 1.0
"""Seconds between two checks of the results of the other processes."""

PATIENCE = 20.0
"""Seconds that a failed process waits for the others to fail, too."""

WORDS = 8
"""Number of words, of seven hexadecimal digits, by which processes compare digests."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The number of this process among those that share the work.

    Attributes:
        process: Number of this process, from 0.
        processes: Number of processes.
    """

    process: int
    processes: int

    @classmethod
    def here(cls) -> "Hosts":
        """Return the number of this process in jax's distributed runtime."""
        return cls(jax.process_index(), jax.process_count())

    def exchange(self, words: Sequence[int]) -> list[list[int]]:
        """Return the words of all processes; equally many from each, below 2^31."""
        if self.processes == 1:
            return [list(words)]
        from jax.experimental import multihost_utils

        with _errors_only():
            given = np.asarray(words, np.int32)
            return np.asarray(multihost_utils.process_allgather(given)).tolist()

    def agree(
        self,
        digest: str = "",
        problem: Exception | None = None,
        *,
        what: str = "was given something else",
    ) -> None:
        """Return if all processes are ready and have the same digest.

        Args:
            digest: Digest of the task of this process, hexadecimal.
            problem: The exception that this process ends with, or None.
            what: Description of a process with another digest, for the message.

        Raises:
            Exception: `problem`, once the other processes know of it.
            ValueError: If another process has a problem or another digest.
        """
        digits = digest[: 7 * WORDS].ljust(7 * WORDS, "0")
        words = [int(digits[7 * i : 7 * i + 7], 16) for i in range(WORDS)]
        reports = self.exchange([problem is None, *words])
        if problem is not None:
            raise problem
        for i, (is_well, *others) in enumerate(reports):
            if not is_well:
                raise ValueError(f"process {i} has failed; its output says why")
            if others != words:
                raise ValueError(
                    f"process {i} {what} than process {self.process}: give all of them "
                    "the same"
                )

    def together(self, work: Callable[[], T]) -> T:
        """Return the result of some work, once it is done in all processes.

        Raises:
            Exception: As the work does.
            ValueError: If it failed elsewhere.
        """
        made, problem = [], None
        try:
            made.append(work())
        except Exception as error:  # the others wait to hear of any
            problem = error
        self.agree(problem=problem)
        return made[0]

    def in_turn(self, work: Callable[[], T]) -> T:
        """Return the same as `together`, with process 0 doing the work first.

        The others then find its results, in a file for example.
        """
        if self.process > 0:
            self.together(lambda: None)
        result = self.together(work)
        if self.process == 0:
            self.together(lambda: None)
        return result

    def leave(self, code: int) -> None:
        """End this process soon, even if others wait for it.

        Processes that fail in the same way get the time to print their message.
        """
        if self.processes > 1:
            timer = threading.Timer(PATIENCE, os._exit, (code,))
            timer.daemon = True
            timer.start()

    def part(self) -> None:
        """Shut down the distributed runtime."""
        if self.processes > 1:
            jax.distributed.shutdown()


def meet(
    distributed: bool,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> Hosts:
    """Return the processes that share the work: this one alone, or those of `join`.

    Raises:
        ValueError: If options of other processes are given without `distributed`, or
            the processes do not meet.
    """
    if distributed:
        return join(coordinator, processes, process)
    if (coordinator, processes, process) != (None, None, None):
        raise ValueError(
            "--coordinator, --processes and --process go with --distributed"
        )
    return Hosts(0, 1)


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> Hosts:
    """Connect to the other processes.

    Args:
        coordinator: `host:port` of process 0. On Cloud TPU, under Slurm and Open MPI 4
            all three are detected.
        processes: Number of processes.
        process: Number of this process.

    Raises:
        ValueError: If the processes do not meet.
    """
    try:
        handler = signal.getsignal(signal.SIGTERM)
        with _errors_only():
            jax.distributed.initialize(coordinator, processes, process)
        # jax only notes SIGTERM, for a protocol that is not used here.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)
        met = Hosts.here()
        met.exchange([0])  # a late process waits for 30 seconds only
        return met
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the processes did not meet ({reason}): give --coordinator HOST:PORT, "
            "--processes and --process"
        ) from error


def wait(
    place: Storage,
    hosts: Hosts,
    missing: Callable[[], Sequence[int]],
) -> None:
    """Wait until the other processes have finished their tasks, while they live.

    Args:
        place: The place that each of them holds.
        hosts: The processes.
        missing: Function that returns the indices of the missing tasks.

    Raises:
        OSError: If a process has ended before its tasks were finished.
    """
    while owners := _owners(missing(), hosts):
        # This may take a while for each process: a single live one is enough.
        if any(place.is_held(i) for i in owners if i > 0):
            time.sleep(POLL)
            continue
        rest = missing()  # a process writes everything before it lets go
        if not rest:
            return
        names = ", ".join(map(str, _owners(rest, hosts)))
        raise OSError(
            f"{len(rest)} matrices are missing, of process {names}, which has ended: "
            "run the same command again to resume"
        )


def _owners(indices: Sequence[int], hosts: Hosts) -> list[int]:
    return sorted({index % hosts.processes for index in indices})


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """Send the output of libraries about connections to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
