"""The threads of jax and of BLAS on processors; imports no jax.

jax takes as many threads as there are cores, or as `VARIABLE` says when jax first
computes. A decomposition of several matrices holds a thread while it waits for others:
every program that runs at the same time needs `EACH`, or all may wait for ever.
"""

import contextlib
import os
import sys
from typing import Any

VARIABLE = "PJRT_NPROC"
"""Environment variable with the number of threads."""

EACH = 2
"""Threads for each program, or simulated device, that runs at the same time."""

MOST = 16
"""Largest number of programs at the same time. A guess."""


def one_blas_thread() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which BLAS and LAPACK use one thread.

    Threads of OpenBLAS, which NumPy and XLA's decompositions use, wait actively, and
    take the cores from XLA's products: 768×768 matrices at half their parameters took
    0.8 of the time with one thread, on two cores.
    """
    # XLA's decompositions are those of SciPy's OpenBLAS, which is limited only if it is
    # loaded; XLA would load it later.
    import scipy.linalg  # noqa: F401
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, "blas")


def count() -> int:
    """Return the number of threads, as XLA finds it."""
    named = os.environ.get(VARIABLE) or os.environ.get("NPROC")
    return int(named) if named else cores()


def programs() -> int:
    """Return how many programs keep the cores busy: as many as there are cores.

    While one decomposes, on a single core, others multiply. There are at most as many
    as the threads allow, and at least one.
    """
    return max(min(cores(), MOST, count() // EACH), 1)


def reserve() -> None:
    """Request enough threads for as many `programs` as there are cores.

    It has to come before jax is imported; later nothing is done.
    """
    if "jax" not in sys.modules:
        wanted = max(cores(), EACH * min(cores(), MOST))
        os.environ.setdefault(VARIABLE, str(wanted))


def cores():
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
