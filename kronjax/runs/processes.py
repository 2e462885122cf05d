"""Several processes on one or many hosts that share the work.

They speak to each other before the work: do all want the same, and may they? Those that
solve matrices then part, so that none waits for another one, and none ends because
another one did; those that train one model stay together.

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
"""Seconds between two looks at what the others have finished."""

PATIENCE = 20.0
"""Seconds that a process which failed waits for the others to have failed, too."""

WORDS = 8
"""Of seven hexadecimal digits, by which processes compare what they want."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Who this process is.

    Attributes:
        process: Its number.
        processes: How many there are.
    """

    process: int
    processes: int

    @classmethod
    def here(cls) -> "Hosts":
        """Return who this process is to jax."""
        return cls(jax.process_index(), jax.process_count())

    def exchange(self, words: Sequence[int]) -> list[list[int]]:
        """Return the words of all processes, which give equally many, below 2^31."""
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
        """Go on if all processes are well and want the same.

        Args:
            digest: Of what this one wants, hexadecimal.
            problem: That keeps it from going on, or None.
            what: Can be said of one that wants something else.

        Raises:
            Exception: `problem`, once the others know that there is one.
            ValueError: If another one has a problem, or wants something else.
        """
        digits = digest[: 7 * WORDS].ljust(7 * WORDS, "0")
        words = [int(digits[7 * i : 7 * i + 7], 16) for i in range(WORDS)]
        told = self.exchange([problem is None, *words])
        if problem is not None:
            raise problem
        for i, (is_well, *others) in enumerate(told):
            if not is_well:
                raise ValueError(f"process {i} could not go on, and says why")
            if others != words:
                raise ValueError(
                    f"process {i} {what} than process {self.process}: give all of them "
                    "the same"
                )

    def together(self, work: Callable[[], T]) -> T:
        """Return what some work returns, once it has been done everywhere.

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
        """Return the same as `together`; process 0 does the work first.

        What it leaves, in a file for example, the others find when they do the same.
        """
        if self.process > 0:
            self.together(lambda: None)
        found = self.together(work)
        if self.process == 0:
            self.together(lambda: None)
        return found

    def leave(self, code: int) -> None:
        """End this process soon, also if the others wait for it somewhere else.

        Those that fail in the same way are given time to say so.
        """
        if self.processes > 1:
            timer = threading.Timer(PATIENCE, os._exit, (code,))
            timer.daemon = True
            timer.start()

    def part(self) -> None:
        """Be on one's own from here on: nobody is told any longer who has ended."""
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
        ValueError: If something is said of others that are not asked for, or if they
            cannot be found.
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
    """Meet the other processes.

    Args:
        coordinator: `host:port` of process 0. On Cloud TPU, under Slurm and Open MPI 4
            all three are found out.
        processes: How many there are.
        process: Number of this one.

    Raises:
        ValueError: If the others cannot be found.
    """
    try:
        handler = signal.getsignal(signal.SIGTERM)
        with _errors_only():
            jax.distributed.initialize(coordinator, processes, process)
        # jax has SIGTERM noted and nothing else, for a protocol that is not used here.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)
        met = Hosts.here()
        met.exchange([0])  # who connects later than others waits for 30 seconds only
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
    """Wait until the others have finished what they own, as long as they live.

    Args:
        place: That each of them holds.
        hosts: All of them.
        missing: Returns the indices of what is not finished.

    Raises:
        OSError: If one has ended before.
    """
    while owners := _owners(missing(), hosts):
        # On some places this takes a while for each: one that lives is enough.
        if any(place.is_held(i) for i in owners if i > 0):
            time.sleep(POLL)
            continue
        rest = missing()  # who has let go has written all before
        if not rest:
            return
        names = ", ".join(map(str, _owners(rest, hosts)))
        raise OSError(
            f"{len(rest)} matrices are missing, of process {names}, which has ended: "
            "the same line again goes on"
        )


def _owners(indices: Sequence[int], hosts: Hosts) -> list[int]:
    return sorted({index % hosts.processes for index in indices})


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
