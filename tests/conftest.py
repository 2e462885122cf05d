"""Settings of every test run.

The core is tested with 64 bits, and with an error wherever jax would promote a rank
or a dtype implicitly. Child processes (the command line, the
notebooks) inherit none of this and see what a user sees.
"""

import os
import shutil
import tempfile
from importlib import metadata

from kronjax import cpu_threads

# OpenBLAS threads busy-wait: those of one worker slow the other down tenfold and
# more. OpenBLAS reads the variable when it is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# The tests spend most of their time on compilation. Without LLVM's passes it takes
# half as long, and without the fusion emitters a third of that. Later versions of XLA
# have no other emitters and abort on this flag.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false" * (metadata.version("jaxlib") < "0.11")
)

# Threads for the three pools at once of test_crew.
os.environ[cpu_threads.VARIABLE] = str(3 * cpu_threads.EACH)

import hypothesis
import jax
import pytest
import rounding

from kronjax.io import exported
from kronjax.runs import pool_programs

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

if os.environ.get("KRONJAX_REVERSED_SUMS"):
    rounding.reverse_sums()

# No deadline, because the first example of each shape compiles. CI draws the same
# examples every time, so that a red run is the fault of the change it tests.
hypothesis.settings.register_profile(
    "kronjax",
    deadline=None,
    max_examples=20,
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
)
hypothesis.settings.load_profile("kronjax")


def pytest_configure(config):
    """Share compiled programs between the workers and their child processes.

    The directory lives as long as the run: nothing compiled by an earlier state of the
    code can decide a test. Environment variables carry it, for workers and child
    processes inherit them.
    """
    if not hasattr(config, "workerinput"):
        cache = tempfile.mkdtemp(prefix="kronjax-compiled-")
        config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["MPLBACKEND"] = "Agg"
        # Two workers cannot each reserve most of one accelerator.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # jax may have been imported before the variables were set.
    jax.config.update(
        "jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"]
    )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Drop the compiled programs of a test file once it is done.

    Every compiled program takes memory mappings, of which a process may have some
    65,000 on Linux. A worker that keeps all programs ends in a segmentation fault.
    """
    yield
    jax.clear_caches()
    for cached in (pool_programs.started, pool_programs.jitted, exported.compiled):
        cached.cache_clear()
