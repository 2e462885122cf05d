"""The threads of BLAS, in a process that has loaded none of it yet."""

import os
import subprocess
import sys

PROGRAM = """
from kronjax.cpu_threads import one_blas_thread
with one_blas_thread():
    import jax.numpy as jnp, threadpoolctl
    jnp.linalg.eigh(jnp.eye(3))
    found = [x for x in threadpoolctl.threadpool_info() if x["user_api"] == "blas"]
    print(len(found), {x["num_threads"] for x in found})
"""


def test_decompositions_of_xla_have_one_thread_from_the_first():
    unset = "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={k: v for k, v in os.environ.items() if k not in unset},
        check=True,
        capture_output=True,
        text=True,
    )
    count, threads = done.stdout.split(maxsplit=1)
    assert int(count) >= 1 and threads.strip() == "{1}"
