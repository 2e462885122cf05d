"""Timing that keeps compilation apart from running, and what ran where.

Absolute times belong to one machine at one moment.  What may be quoted is a ratio of
two times of one run, or a rate as a fraction of `product_rate` in the same run.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits


@dataclass(frozen=True)
class Timing:
    """Seconds of one function on one set of arguments.

    Attributes:
        compile: Tracing, lowering and compiling, together.
        best: Fastest run.
        median: Median run.
        repeats: Number of timed runs; they follow a run that is not timed.
    """

    compile: float
    best: float
    median: float
    repeats: int


def run_process(arguments, environment, cwd=None, timeout=900):
    """Run Python in a new process; return its output and the seconds it took.

    Args:
        arguments: Arguments of the interpreter, such as `["-c", code]`.
        environment: All environment variables of the process.
        cwd: Its working directory; by default that of this process.
        timeout: Seconds after which it is ended.

    Raises:
        RuntimeError: If it fails, with the end of its standard error.
    """
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout, time.perf_counter() - begun


def measure(function, *args, repeats=5):
    """Time compiling and running `function(*args)`.

    JAX caches traces, so `compile` is meaningful only the first time that a function
    object is given these shapes, and never with a persistent compilation cache.

    Args:
        function: A function, jitted or not; it must close over static arguments.
        *args: Pytrees of arrays, moved to the device before the clock starts.
        repeats: Number of timed runs.
    """
    if not hasattr(function, "lower"):
        function = jax.jit(function)
    args = jax.block_until_ready(jax.device_put(args))
    start = time.perf_counter()
    compiled = function.lower(*args).compile()
    compile_seconds = time.perf_counter() - start
    # The first run also loads the program and allocates its buffers.
    jax.block_until_ready(compiled(*args))
    runs = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        runs.append(time.perf_counter() - start)
    return Timing(compile_seconds, min(runs), statistics.median(runs), repeats)


def blas(threads):
    """Return a context in which BLAS and LAPACK use so many threads; None: the default.

    Args:
        threads: A number, or None.
    """
    return threadpool_limits(threads, "blas")


def best_threads(run):
    """Return the number of BLAS threads with which a function is faster: 1 or None.

    The threads of OpenBLAS wait actively. Beside a program with threads of its own, and
    for small matrices, one is often faster than the default. `kronjax.approximate` and
    the runs of `kronjax factorize` use one; rivals get the faster of the two.

    Args:
        run: Called without arguments, four times, so that libraries are loaded first.

    Returns:
        An argument for `blas`.
    """
    seconds = {}
    for threads in (1, None):
        with blas(threads):
            run()
            begun = time.perf_counter()
            run()
            seconds[threads] = time.perf_counter() - begun
    return min(seconds, key=lambda threads: seconds[threads])


def product_rate(shape, dtype=jnp.float32, batch=1, repeats=5):
    """Return the FLOP/s of `jnp.matmul(..., precision="highest")` on [batch, n, n].

    The products are chained inside one program, so that small matrices are not
    charged for dispatch: the chain is about 2e9 FLOP long, at most 256 products.

    Args:
        shape: n, or (n, n).
        dtype: Floating type; float64 needs `jax_enable_x64`.
        batch: Number of products at once.
        repeats: Number of timed runs; the best counts.
    """
    n = int(shape) if np.ndim(shape) == 0 else int(shape[0])
    if np.ndim(shape) and tuple(shape) != (n, n):
        raise ValueError(f"shape must be n or (n, n), not {tuple(shape)}")
    if jnp.dtype(dtype).itemsize > 4 and not jax.config.read("jax_enable_x64"):
        raise ValueError(f"{jnp.dtype(dtype)} needs jax.config jax_enable_x64=True")
    flops = 2 * batch * n**3
    steps = min(max(int(2e9 / flops), 1), 256)
    # Entries of variance 1/n keep the chain's size about constant.
    draw = np.random.default_rng(0).standard_normal((2, batch, n, n)) / np.sqrt(n)
    x, y = jnp.asarray(draw, dtype)

    def chain(x, y):
        def step(_, z):
            return jnp.matmul(z, y, precision="highest")

        return jax.lax.fori_loop(0, steps, step, x)

    return steps * flops / measure(chain, x, y, repeats=repeats).best


def machine():
    """Return what a reader needs to judge a ratio: processor, versions, devices."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "xla_flags": os.environ.get("XLA_FLAGS"),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
    }


def write_results(name, results, out_dir):
    """Write `results` to `out_dir/name.json`, whole or not at all; return its path.

    NumPy and JAX scalars and arrays become numbers and lists.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / f"{name}.json"
    text = json.dumps(results, indent=2, default=_plain) + "\n"
    # A rename within one folder is atomic; a killed run leaves the old results.
    handle, temporary = tempfile.mkstemp(dir=out_dir, prefix=f".{name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp makes files private; results are for everybody.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _cpu_model():
    """Return the processor's name, or its architecture where the name is unknown."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _plain(value):
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"results hold {type(value).__name__}, which JSON cannot keep")
