"""Time per matrix by batch size, and times of compiling and starting.

Time per matrix is measured for 36 x 36, 6 x 6 factors, 6 terms and the defaults,
without compilation.  Compiling a `kronjax.solve`, importing kronjax, and `kronjax
--help` are timed in separate processes without a compilation cache.
"""

import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench import script, timing
from kronjax import Configuration

ROOT = Path(__file__).resolve().parents[1]

MAX_COMPILE, MAX_IMPORT, MAX_HELP = 5.0, 1.5, 0.5

COMPILE = """
import time, jax, jax.numpy as jnp, kronjax
solve, configuration = kronjax.solve, kronjax.Configuration({a_shape}, {rank})
jax.config.update("jax_enable_x64", {x64})
jnp.zeros(1).block_until_ready()
matrix = jax.ShapeDtypeStruct({shape}, "{dtype}")
begun = time.perf_counter()
jax.jit(lambda x: solve(x, configuration)).lower(matrix).compile()
print(time.perf_counter() - begun)
"""

# `import kronjax` alone loads nothing; a user waits for the first use of a name.
STARTUPS = {
    "import kronjax": ("import kronjax", MAX_IMPORT),
    "import kronjax and use a name": (
        "import kronjax; kronjax.approximate",
        MAX_IMPORT,
    ),
    "kronjax --help": (
        "import sys; from kronjax.cli.main import main; "
        "sys.argv = ['kronjax', '--help']; main()",
        MAX_HELP,
    ),
}


@dataclass(frozen=True)
class Experiment:
    """Sizes of the matrices, batch sizes for each dtype, and programs to compile."""

    size: int = 36
    factor: int = 6
    rank: int = 6
    batches: dict[str, tuple[int, ...]] = field(
        default_factory=lambda: {
            "float32": (1, 2, 4, 8, 16, 32, 64, 128),
            "float64": (1, 8, 32, 128),
        }
    )
    # Shape, left factors, rank, dtype.
    compiled: tuple = (
        ((36, 36), (6, 6), 6, "float32"),
        ((36, 36), (6, 6), 6, "float64"),
        ((768, 768), (24, 32), 32, "float32"),
    )
    repeats: int = 5


QUICK = Experiment(
    size=8,
    factor=2,
    rank=2,
    batches={"float32": (1, 2)},
    compiled=(((8, 8), (2, 2), 2, "float32"),),
    repeats=1,
)


def run_python(code):
    """Run code in a new process without a cache; return its output and wall time."""
    environment = {
        **os.environ,
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    return timing.run_process(["-c", code], environment, ROOT, timeout=300)


def measure_startups(repeats):
    """Return the wall times of processes, the start of the interpreter included."""
    result = {}
    for name, (code, limit) in STARTUPS.items():
        script.say(name)
        run_python(code)  # reads the files into memory
        runs = [run_python(code)[1] for _ in range(repeats)]
        result[name] = {
            "seconds": statistics.median(runs),
            "runs": runs,
            "limit": limit,
        }
    return result


def measure_compilations(cases):
    """Return the seconds to trace and compile a `solve`, each in a new process."""
    result = []
    for shape, a_shape, rank, dtype in cases:
        script.say(f"compiling a solve, {shape}, rank {rank}, {dtype}")
        code = COMPILE.format(
            shape=shape, a_shape=a_shape, rank=rank, dtype=dtype, x64=dtype == "float64"
        )
        seconds = float(run_python(code)[0])
        case = {"shape": shape, "a_shape": a_shape, "rank": rank, "dtype": dtype}
        result.append({**case, "seconds": seconds, "limit": MAX_COMPILE})
    return result


def measure_batches(experiment):
    """Return rows with the seconds per matrix."""
    largest = max(max(sizes) for sizes in experiment.batches.values())
    rng = np.random.default_rng(0)
    matrices = rng.standard_normal((largest, experiment.size, experiment.size))
    configuration = Configuration(
        (experiment.factor, experiment.factor), experiment.rank
    )
    rows = []
    for dtype, sizes in experiment.batches.items():
        for size in sizes:
            script.say(f"batch of {size}, {dtype}")
            solved = script.solve(matrices[:size], configuration, dtype=dtype)
            rows.append(
                {
                    "dtype": dtype,
                    "batch": size,
                    "seconds": solved.seconds,
                    "seconds_per_matrix": solved.seconds / size,
                    "runs": solved.runs,
                    "compile_seconds": solved.compile_seconds,
                    "mean_products": float(np.mean(solved.approximation.products)),
                }
            )
    unit = rows[0]["seconds_per_matrix"]
    for row in rows:
        row["relative"] = row["seconds_per_matrix"] / unit
    return rows


def draw(rows, targets, experiment):
    """Draw the time per matrix against batch size, and other times over targets."""
    chart, axes = script.figure(11, 4.4, columns=2)
    left, right = axes[0]
    for dtype, color in (("float32", "tab:blue"), ("float64", "tab:cyan")):
        here = [row for row in rows if row["dtype"] == dtype]
        x, y = ([row[key] for row in here] for key in ("batch", "relative"))
        if here:
            left.plot(x, y, color=color, marker="o", label=dtype)
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xlabel("matrices in the batch")
    left.set_ylabel("time per matrix over that of a single one, float32")
    size = f"{experiment.size}×{experiment.size}"
    left.set_title(f"{size}, {experiment.rank} terms, compiled before", fontsize=10)
    left.legend(frameon=False)
    fractions = [target.value / target.limit for target in targets]
    colors = ["tab:blue" if target.met else "tab:red" for target in targets]
    right.barh(range(len(targets)), fractions, color=colors)
    right.set_yticks(range(len(targets)), [target.what for target in targets])
    right.tick_params(axis="y", labelsize=8)
    right.invert_yaxis()
    right.axvline(1, color="black", linestyle=":")
    right.set_xlabel("time over target")
    return chart


def main():
    """Run the benchmark, and write `scaling.json` and `scaling.png`."""
    given = script.parser(__doc__).parse_args()
    experiment = QUICK if given.quick else Experiment()
    # First, while this process holds no accelerator.
    startups = measure_startups(experiment.repeats)
    compilations = measure_compilations(experiment.compiled)
    rows = measure_batches(experiment)
    script.table(
        "Time per matrix over that of a single matrix in float32",
        ("dtype", "batch", "time", "products"),
        [
            (
                row["dtype"],
                row["batch"],
                f"{row['relative']:.3f}",
                f"{row['mean_products']:.0f}",
            )
            for row in rows
        ],
    )
    targets = [
        script.Target(
            f"compile {'x'.join(map(str, x['shape']))}, r = {x['rank']}, {x['dtype']}",
            x["seconds"],
            x["limit"],
        )
        for x in compilations
    ] + [script.Target(name, x["seconds"], x["limit"]) for name, x in startups.items()]
    script.print_targets(targets)
    results = {
        "quick": given.quick,
        "targets": [target.plain() for target in targets],
        "batches": rows,
        "compilations": compilations,
        "startups": startups,
    }
    chart = draw(rows, targets, experiment)
    script.publish("scaling", results, chart, given.out)


if __name__ == "__main__":
    main()
