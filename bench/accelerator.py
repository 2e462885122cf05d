"""Whole batches on a GPU, compared with single solves, SVDs and its own product rate.

48 square matrices of a shape of OPT-125M (real ones from `--weights` first, then random
ones with decaying singular values) are solved in float32 at half of their parameters in
one pool.  The rivals in the same run are a jitted `kronjax.solve` for one matrix after
the other, and the device's own singular value decompositions of the same matrices.
Thousands of small matrices in one pool are then compared with single solves.

Everything is compiled before it is timed.  The parts of a pool are timed separately:
the start (Van Loan's solution), the products, and the end, which makes factors and
proves the gaps.  A loop of `solve` makes factors as well; its proofs are timed
separately.  The script runs anywhere; without a GPU the output and the JSON say so.
"""

import itertools
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bench import script, spectral_norms, timing
from bench.products import is_gpu
from kronjax import Configuration
from kronjax.cpu_threads import one_blas_thread
from kronjax.runs.pool import Matrix, Pool
from kronjax.runs.pool_programs import Kind
from kronjax.solver.problem import Problem


@dataclass(frozen=True)
class Experiment:
    """Sizes and numbers of the matrices.

    Attributes:
        side: Side of the large matrices.
        a_shape: Shape of their left factors.
        rank: Number of terms of their sums.
        count: Number of large matrices.
        loop: Number of large matrices that are solved one by one.
        tolerance: Tolerance of all solves.
        small: Number of matrices of 36 x 36.
        small_loop: Number of small matrices that are solved one by one.
        repeats: Number of timed runs; the best counts.
        lanes: Number of large matrices in one call; all of them if zero.
    """

    side: int = 768
    a_shape: tuple[int, int] = (24, 32)
    rank: int = 192
    count: int = 48
    loop: int = 6
    tolerance: float = 3e-2
    small: int = 4096
    small_loop: int = 64
    repeats: int = 2
    lanes: int = 0

    @property
    def shapes(self):
        """Counts and shapes for `spectral_norms.draw_groups`."""
        return ((self.count, self.side, self.side),)


QUICK = Experiment(
    side=24, a_shape=(4, 6), rank=3, count=2, loop=1, small=4, small_loop=1, repeats=1
)

SMALL = Configuration((6, 6), 3)


class Timed(Pool):
    """A pool that records the seconds of its programs."""

    def __init__(self, *given, **options):
        """Compile the programs, and time the compilation."""
        begun = time.perf_counter()
        super().__init__(*given, **options)
        self.compile_seconds = time.perf_counter() - begun
        self.seconds: dict[str, float] = {}

    def _run(self, name, *arguments):
        begun = time.perf_counter()
        results = super()._run(name, *arguments)
        spent = time.perf_counter() - begun
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        return results


def run_pool(matrices, configuration, tolerance, repeats, lanes=0):
    """Solve matrices in one pool, `lanes` at once, and report the fastest run."""
    count, *shape = matrices.shape
    problem = Problem.of(tuple(shape), configuration, num_starts=1)
    pool = Timed(
        Kind(problem, np.dtype(np.float32)),
        lanes=lanes or count,
        slots=count,
        devices=jax.devices()[:1],
        tolerance=tolerance,
    )
    script.say(f"{count} of {shape[0]}: compiled in {pool.compile_seconds:.0f} s")
    best = None
    # The first run loads the programs.
    for _ in range(repeats + 1):
        pool.seconds = {}
        begun = time.perf_counter()
        with one_blas_thread():
            solutions = list(pool.solve(Matrix(i, x) for i, x in enumerate(matrices)))
        seconds = time.perf_counter() - begun
        parts = ", ".join(f"{k} {x:.3f}" for k, x in pool.seconds.items())
        script.say(f"{count} of {shape[0]}: {seconds:.3f} s; {parts}")
        if best is None or seconds < best["seconds"]:
            best = {"seconds": seconds, "parts": dict(pool.seconds)}
    assert best is not None
    gaps = [solution.local_gap for solution in solutions]
    return {
        **best,
        "compile_seconds": pool.compile_seconds,
        "memory": pool.memory,
        "gap": max(gaps),
        "median_gap": float(np.median(gaps)),
        "products": sum(solution.products for solution in solutions),
        "errors": [solution.spectral_error for solution in solutions],
    }


def run_svds(matrices):
    """Return the seconds of all singular value decompositions, by four ways."""
    ways = {
        "with vectors": lambda x: jnp.linalg.svd(x, full_matrices=False),
        "values alone": lambda x: jnp.linalg.svd(x, compute_uv=False),
    }
    orders = {"at once": jax.vmap, "in turn": lambda way: partial(jax.lax.map, way)}
    times = {}
    for (name, way), (order, over) in itertools.product(ways.items(), orders.items()):
        seconds = timing.measure(over(way), matrices, repeats=1).best
        times[f"{name}, {order}"] = seconds
        script.say(f"SVD {name}, {order}: {seconds:.3f} s")
    return times


def loop_over(pool, loop, count):
    """Return the time of a loop over all matrices over that of the pool."""
    each, proof = (float(np.mean(x)) * count for x in (loop.runs, loop.proofs))
    return {
        "the pool proves": each / pool["seconds"],
        "both prove": (each + proof) / pool["seconds"],
    }


def large(experiment, weights):
    """Measure the large matrices: pool, loop, decompositions, rate of products."""
    real = spectral_norms.real_matrices(weights) if weights else {}
    ((names, matrices),) = spectral_norms.draw_groups(experiment, real)
    configuration = Configuration(experiment.a_shape, experiment.rank)
    tolerance = experiment.tolerance
    rate = timing.product_rate(experiment.side, jnp.float32, experiment.count)
    script.say(f"products: {rate / 1e12:.2f} TFLOP/s")
    pool = run_pool(
        matrices, configuration, tolerance, experiment.repeats, experiment.lanes
    )
    svds = run_svds(matrices)
    loop = script.solve_alone(matrices[: experiment.loop], configuration, tolerance)
    flops = 2 * experiment.side**3 * pool["products"]
    return {
        "real": sum(name in real for name in names),
        "product_rate": rate,
        "pool": pool,
        "loop": asdict(loop),
        "svds": svds,
        "share": flops / pool["seconds"] / rate,
        "share_of_work": flops / pool["parts"]["work"] / rate,
        "loop_over_pool": loop_over(pool, loop, experiment.count),
        "over_svds": pool["seconds"]
        / min(x for name, x in svds.items() if "vectors" in name),
    }


def small(experiment):
    """Measure the small matrices: pool and loop."""
    rng = np.random.default_rng(0)
    matrices = rng.standard_normal((experiment.small, 36, 36)).astype(np.float32)
    pool = run_pool(matrices, SMALL, experiment.tolerance, experiment.repeats)
    few = matrices[: experiment.small_loop]
    loop = script.solve_alone(few, SMALL, experiment.tolerance)
    return {
        "pool": pool,
        "loop": asdict(loop),
        "loop_over_pool": loop_over(pool, loop, experiment.small),
    }


def targets_of(many, few):
    """Return the targets, which were set for a GPU."""
    ratios = [
        script.Target(f"{size}: loop of solve / pool, {proofs}", ratio, wanted, True)
        for size, result, wanted in (("large", many, 10), ("small", few, 100))
        for proofs, ratio in result["loop_over_pool"].items()
    ]
    return [
        *ratios,
        script.Target("large: pool / SVDs", many["over_svds"], 1),
        script.Target("large: largest certified gap", many["pool"]["gap"], 0.05),
    ]


def draw_figure(many, few):
    """Draw the seconds of the parts of a pool and of the rivals."""
    chart, axes = script.figure(11, 3.6, columns=2)
    for ax, result, title in zip(
        axes[0], (many, few), ("large matrices", "small matrices"), strict=True
    ):
        left = 0.0
        for name in ("start", "work", "turn", "finish"):
            spent = result["pool"]["parts"].get(name, 0.0)
            ax.barh("pool", spent, left=left, label=name)
            left += spent
        for name, spent in result.get("svds", {}).items():
            ax.barh(f"SVD, {name}", spent, color="tab:gray")
        ax.set(xlabel="seconds", title=title)
        ax.legend(frameon=False)
    return chart


def main():
    """Run the benchmark, and write `accelerator.json` and `accelerator.png`."""
    parser = script.parser(__doc__)
    parser.add_argument("--weights", type=Path, help="GPT-2 small as .safetensors")
    parser.add_argument(
        "--lanes", type=int, default=0, help="large matrices in one call; 0: all"
    )
    given = parser.parse_args()
    experiment = QUICK if given.quick else Experiment()
    experiment = replace(experiment, lanes=min(given.lanes, experiment.count))
    kind = jax.devices()[0].device_kind
    note = f"run on a GPU: {kind}" if is_gpu() else f"NOT RUN ON A GPU but on {kind}"
    script.say(note)
    few, many = small(experiment), large(experiment, given.weights)
    for name, result in (("small", few), ("large", many)):
        keys = [key for key, x in result.items() if isinstance(x, float)]
        script.table(name, keys, [[result[key] for key in keys]])
    targets = targets_of(many, few)
    script.print_targets(targets)
    report = {
        "quick": given.quick,
        "on_gpu": is_gpu(),
        "note": note,
        "tolerance": experiment.tolerance,
        "lanes": experiment.lanes or experiment.count,
        "targets": [target.plain() for target in targets],
        "large": many,
        "small": few,
    }
    script.publish("accelerator", report, draw_figure(many, few), given.out)


if __name__ == "__main__":
    main()
