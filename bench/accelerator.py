"""What does a GPU make of whole batches: against single solves, SVDs and its own rate?

Square matrices of the shape of OPT-125M's 48 (real ones from `--weights` as far as they
go, then random ones with decaying singular values), float32, at half of their
parameters, solved in one pool.  Rivals, in the same run: a jitted `kronjax.solve` for
one after the other, and the device's own singular value decompositions of the same
matrices.  Then small matrices, thousands at once, against one at a time.

All is compiled before it is timed.  The parts of a pool are told apart: the start (Van
Loan's solution), the products, and the end, which makes factors and proves the gaps; a
loop of `solve` makes factors, too, and its proofs are timed apart.  Runs anywhere;
without a GPU the output and the JSON say so.
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
from kronjax.runs.pool import Matrix, Pool
from kronjax.runs.pool_programs import Kind
from kronjax.solver.problem import Problem


@dataclass(frozen=True)
class Experiment:
    """What is run.

    Attributes:
        side: Of the large matrices.
        a_shape: Of their left factors.
        rank: Of their sums.
        count: How many there are.
        loop: How many of them are solved one by one.
        tolerance: Of all solves.
        small: How many matrices of 36 x 36.
        small_loop: How many of them are solved one by one.
        repeats: Of what is timed; the best counts.
        lanes: Large matrices in one call; all of them if zero.
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
        """What `spectral_norms.draw_groups` asks for."""
        return ((self.count, self.side, self.side),)


QUICK = Experiment(
    side=24, a_shape=(4, 6), rank=3, count=2, loop=1, small=4, small_loop=1, repeats=1
)

SMALL = Configuration((6, 6), 3)


class Timed(Pool):
    """A pool that knows the seconds of its programs."""

    def __init__(self, *given, **options):
        """Compile, and time that."""
        begun = time.perf_counter()
        super().__init__(*given, **options)
        self.compile_seconds = time.perf_counter() - begun
        self.seconds: dict[str, float] = {}

    def _run(self, name, *arguments):
        begun = time.perf_counter()
        told = super()._run(name, *arguments)
        spent = time.perf_counter() - begun
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        return told


def run_pool(matrices, configuration, tolerance, repeats, lanes=0):
    """Solve matrices in one pool, some or all at once; the fastest run of some."""
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
        found = list(pool.solve(Matrix(i, x) for i, x in enumerate(matrices)))
        seconds = time.perf_counter() - begun
        parts = ", ".join(f"{k} {x:.3f}" for k, x in pool.seconds.items())
        script.say(f"{count} of {shape[0]}: {seconds:.3f} s; {parts}")
        if best is None or seconds < best["seconds"]:
            best = {"seconds": seconds, "parts": dict(pool.seconds)}
    assert best is not None
    gaps = [one.local_gap for one in found]
    return {
        **best,
        "compile_seconds": pool.compile_seconds,
        "memory": pool.memory,
        "gap": max(gaps),
        "median_gap": float(np.median(gaps)),
        "products": sum(one.products for one in found),
        "errors": [one.spectral_error for one in found],
    }


def run_svds(matrices):
    """Seconds of all singular value decompositions, the quickest way there is."""
    ways = {
        "with vectors": lambda x: jnp.linalg.svd(x, full_matrices=False),
        "values alone": lambda x: jnp.linalg.svd(x, compute_uv=False),
    }
    orders = {"at once": jax.vmap, "in turn": lambda way: partial(jax.lax.map, way)}
    found = {}
    for (name, way), (order, over) in itertools.product(ways.items(), orders.items()):
        seconds = timing.measure(over(way), matrices, repeats=1).best
        found[f"{name}, {order}"] = seconds
        script.say(f"SVD {name}, {order}: {seconds:.3f} s")
    return found


def loop_over(pool, loop, count):
    """How many times as long as the pool a loop over all matrices takes."""
    each, proof = (float(np.mean(x)) * count for x in (loop.runs, loop.proofs))
    return {
        "the pool proves": each / pool["seconds"],
        "both prove": (each + proof) / pool["seconds"],
    }


def large(experiment, weights):
    """The large matrices: pool, loop, decompositions, and the rate of products."""
    real = spectral_norms.real_matrices(weights) if weights else {}
    ((names, matrices),) = spectral_norms.draw_groups(experiment, real)
    configuration = Configuration(experiment.a_shape, experiment.rank)
    tolerance = experiment.tolerance
    rate = timing.gemm_rate(experiment.side, jnp.float32, experiment.count)
    script.say(f"products: {rate / 1e12:.2f} TFLOP/s")
    pool = run_pool(
        matrices, configuration, tolerance, experiment.repeats, experiment.lanes
    )
    svds = run_svds(matrices)
    loop = script.solve_alone(matrices[: experiment.loop], configuration, tolerance)
    flops = 2 * experiment.side**3 * pool["products"]
    return {
        "real": sum(name in real for name in names),
        "gemm_rate": rate,
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
    """The small ones: pool, and loop."""
    rng = np.random.default_rng(0)
    matrices = rng.standard_normal((experiment.small, 36, 36)).astype(np.float32)
    pool = run_pool(matrices, SMALL, experiment.tolerance, experiment.repeats)
    some = matrices[: experiment.small_loop]
    loop = script.solve_alone(some, SMALL, experiment.tolerance)
    return {
        "pool": pool,
        "loop": asdict(loop),
        "loop_over_pool": loop_over(pool, loop, experiment.small),
    }


def targets_of(many, few):
    """What was asked for on a GPU."""
    ratios = [
        script.Target(f"{size}: loop of solve / pool, {who}", ratio, wanted, True)
        for size, one, wanted in (("large", many, 10), ("small", few, 100))
        for who, ratio in one["loop_over_pool"].items()
    ]
    return [
        *ratios,
        script.Target("large: pool / SVDs", many["over_svds"], 1),
        script.Target("large: largest certified gap", many["pool"]["gap"], 0.05),
    ]


def draw_figure(many, few):
    """Where the time of a pool goes, and what the rivals take."""
    chart, axes = script.figure(11, 3.6, columns=2)
    for ax, one, title in zip(
        axes[0], (many, few), ("large matrices", "small matrices"), strict=True
    ):
        left = 0.0
        for name in ("start", "work", "turn", "finish"):
            spent = one["pool"]["parts"].get(name, 0.0)
            ax.barh("pool", spent, left=left, label=name)
            left += spent
        for name, spent in one.get("svds", {}).items():
            ax.barh(f"SVD, {name}", spent, color="tab:gray")
        ax.set(xlabel="seconds", title=title)
        ax.legend(frameon=False)
    return chart


def main():
    """Run it and write `accelerator.json` and `accelerator.png`."""
    parser = script.parser(__doc__)
    parser.add_argument("--weights", type=Path, help="GPT-2 small as .safetensors")
    parser.add_argument("--lanes", type=int, default=0, help="in one call; 0 is all")
    given = parser.parse_args()
    experiment = QUICK if given.quick else Experiment()
    experiment = replace(experiment, lanes=min(given.lanes, experiment.count))
    kind = jax.devices()[0].device_kind
    note = f"run on a GPU: {kind}" if is_gpu() else f"NOT RUN ON A GPU but on {kind}"
    script.say(note)
    few, many = small(experiment), large(experiment, given.weights)
    for name, one in (("small", few), ("large", many)):
        keys = [key for key, x in one.items() if isinstance(x, float)]
        script.table(name, keys, [[one[key] for key in keys]])
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
