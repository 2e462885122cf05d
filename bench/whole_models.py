"""Time and memory of `kronjax factorize` on a whole model, and its safety when killed.

The matrices have the shapes of OPT-125M (48 of 768 x 768, 12 of 3072 x 768, 12 of
768 x 3072; `--counts` takes a part of them) in float32, in one safetensors file: real
ones from `--weights` first, then random ones as in `spectral_norms`.  `kronjax
factorize` in a separate process halves their parameters by near-square configurations
in the spectral norm.  Its wall time, file work and compilation included, is compared
with the time of as many plain products; its memory is the peak that the system reports.
The rival solves the same square matrices one by one with a jitted `kronjax.solve`; its
proofs, the same as those of the batch, are timed separately.  Thousands of small
matrices have the same rival, without compilation and files.  Then a run on small
matrices is killed at random moments and repeated until it ends, and its files are
compared bit by bit with those of an undisturbed run.  Finally eight simulated devices
are compared with one.

The count of products is a lower bound.  An evaluation of a tall matrix has two tall
products, and the others are small; an evaluation at rank r has three products of `r`
with the matrix.  Only accepted steps and beginnings of stages are known to be
evaluations.  A proof has the products of its rounds, and those of one sweep that
removes the tangential part.  Symmetric products count in full, although processors omit
some of their operations: the share "computed" omits these, and the proofs; it is lower
still, as products of unknown evaluations count as symmetric.  The rival's share is
counted in the same way from its own steps.  The batch writes files and measures errors
in float64; the rival does not.
"""

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy

from bench import runs, script, spectral_norms, timing
from bench.accelerator import SMALL
from kronjax import Configuration, cpu_threads
from kronjax.linalg import schatten
from kronjax.runs import pool_programs

GAP = 0.05
MEMORY = 6.0

RULES = """
rules:
- match: "square.*"
  method: kronecker
  terms: [{{a_shape: {square}, rank: {ranks[0]}}}]
  weighting: none
- match: "tall.*"
  method: kronecker
  terms: [{{a_shape: {tall}, rank: {ranks[1]}}}]
  weighting: none
- match: "wide.*"
  method: kronecker
  terms: [{{a_shape: {wide}, rank: {ranks[1]}}}]
  weighting: none
"""

DEVICES = """
import json, sys, time
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from kronjax import Configuration
from kronjax.runs.pool import Matrix, Pool
from kronjax.runs.pool_programs import Kind
from kronjax.solver.problem import Problem
from kronjax.cpu_threads import one_blas_thread
count, lanes = int(sys.argv[1]), 8
matrices = np.random.default_rng(0).standard_normal((count, 36, 36)).astype(np.float32)
problem = Problem.of((36, 36), Configuration((6, 6), 3), num_starts=1)
seconds, found = {}, {}
for devices in (1, 8):
    pool = Pool(
        Kind(problem, np.dtype(np.float32)), lanes=lanes, slots=64 // devices * 8,
        devices=jax.devices()[:devices], tolerance=1e-2,
    )
    def run(some):
        given = (Matrix(i, x) for i, x in enumerate(some))
        with one_blas_thread():
            return {x.key: x.terms[0].a.tobytes() for x in pool.solve(given)}
    run(matrices[:lanes])
    seconds[devices] = []
    for _ in range(3):
        begun = time.perf_counter()
        found[devices] = run(matrices)
        seconds[devices].append(time.perf_counter() - begun)
print(json.dumps({"identical": found[1] == found[8], "seconds": seconds}))
"""


THOUSANDS = """
import json, sys, time
from kronjax import cpu_threads
cpu_threads.reserve()
import jax
import numpy as np
from kronjax import recipe
from kronjax.io.storage import MemoryFolder
from kronjax.runs import engine, factorize, settings, store, workers
from kronjax.runs.pool import Matrix
count, tolerance, rules = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
drawn = np.random.default_rng(0).standard_normal((count, 36, 36)).astype(np.float32)
made, _ = factorize.planned(
    {f"w.{i}": x for i, x in enumerate(drawn)},
    recipe.loads(rules),
    settings.SolveSettings(tolerance, num_starts=1),
)
(group,), devices = engine.groups(made.tasks, made.settings), jax.devices()
kept = store.Store(MemoryFolder(), made)
(lanes,) = engine.lanes_of(kept, devices).values()
pools, lanes = workers.pools_of(group.kind, group.count, lanes, devices, tolerance)
def run(some):
    with cpu_threads.one_blas_thread():
        list(workers.solve(pools, (Matrix(i, x) for i, x in enumerate(some))))
run(drawn[:lanes])
begun = time.perf_counter()
run(drawn)
seconds = (time.perf_counter() - begun) / count
print(json.dumps({"batch": seconds, "pools": len(pools), "lanes": lanes}))
"""


@dataclass(frozen=True)
class Experiment:
    """Sizes and numbers of the matrices.

    Attributes:
        counts: Numbers of square, tall and wide matrices.
        shapes: Their shapes.
        configurations: Shapes of their left factors.
        ranks: Number of terms for square matrices, and for the others.
        loop: Number of square matrices that the rival solves.
        kills: Number of times that the small run is killed.
        small: Number of matrices of 36 x 36 in that run.
        shared: Number of matrices that one device solves, and eight devices.
        thousands: Number of matrices of 36 x 36 that are solved in pools.
        few: Number of these that the rival solves.
    """

    counts: tuple[int, int, int] = (48, 12, 12)
    shapes: tuple = ((768, 768), (3072, 768), (768, 3072))
    configurations: tuple = ((24, 32), (48, 32), (32, 48))
    ranks: tuple[int, int] = (192, 384)
    loop: int = 48
    kills: int = 20
    small: int = 512
    shared: int = 512
    thousands: int = 4096
    few: int = 128


QUICK = Experiment(
    counts=(2, 0, 0),
    shapes=((24, 24), (48, 24), (24, 48)),
    configurations=((4, 6), (6, 6), (6, 6)),
    ranks=(3, 6),
    loop=2,
    kills=1,
    small=8,
    shared=8,
    thousands=4,
    few=1,
)


def draw_model(experiment, real, path):
    """Write the matrices of a model into one file; return how many are real."""
    rng = np.random.default_rng(0)
    given = [x for x in real.values() if x.shape == experiment.shapes[0]]
    tensors, used = {}, 0
    for name, count, shape in zip(
        ("square", "tall", "wide"), experiment.counts, experiment.shapes, strict=True
    ):
        for i in range(count):
            is_real = name == "square" and i < len(given)
            used += is_real
            matrix = given[i] if is_real else spectral_norms.random_matrix(rng, shape)
            tensors[f"{name}.{i}"] = np.ascontiguousarray(matrix)
    safetensors.numpy.save_file(tensors, path)
    return used


def flops_of(record):
    """Return a lower bound of the operations in the products of a solve.

    Returns:
        The operations of products of the size of `EᵀE`; those of products with factors,
        for the sum itself and its two gradients; those of the proof; and the operations
        of the first that are omitted because they are symmetric.
    """
    m, n = max(record["shape"]), min(record["shape"])
    rank = sum(each["rank"] for each in record["configurations"])
    evaluations = record["steps"] + len(record["p"]) - 1
    large = 2 * n**3 * record["products"] + 4 * n**2 * (m - n) * evaluations
    plain = 2 * n**2 * m * evaluations
    part = halved(n) / n**2 if jax.default_backend() == "cpu" else 1
    left_out = (large - plain) * (1 - part)
    rounds = int(pool_programs.proof_rounds(record["tolerance"]))
    proof = proof_flops(m, n, rank, rounds)
    return large, 3 * 2 * rank * m * n * evaluations, proof, left_out


def proof_flops(m, n, rank, rounds):
    """Return the operations of the products in the rounds and the sweep of a proof.

    Each round of `multipliers.balance` multiplies by its multipliers and back, takes
    the tangential part of the result, and multiplies it out.
    """
    multiplied = 2 * n**2 * (m + n)
    tangential = 2 * 2 * rank * m * n
    return (rounds + 1) * 2 * (multiplied + tangential) + multiplied + 4 * tangential


def halved(n):
    """Return the number of entries of a symmetric `[n, n]` that processors compute."""
    if n < schatten.HALVED:
        return n**2
    half = n // 2
    return halved(half) + half * (n - half) + halved(n - half)


def run_python(code, *arguments, **environment):
    """Run code in a separate process, and return the JSON that it prints."""
    program = ["-c", code, *map(str, arguments)]
    return json.loads(timing.run_process(program, {**os.environ, **environment})[0])


def run_small(experiment, tolerance):
    """Return the seconds of a small matrix in pools, alone, and of its proof."""
    pooled = run_python(THOUSANDS, experiment.thousands, tolerance, runs.RULES)
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((experiment.few, 36, 36)).astype(np.float32)
    loop = script.solve_alone(drawn, SMALL, tolerance)
    alone = {"loop": np.mean(loop.runs), "proof": np.mean(loop.proofs)}
    return {**pooled, **{key: float(x) for key, x in alone.items()}}


def targets_of(model, small, kills, devices):
    """Return the targets."""
    single, eight = (min(devices["seconds"][key]) for key in ("1", "8"))
    proven = small["loop"] + small["proof"]
    return [
        script.Target("largest certified gap", model["gap"], GAP),
        script.Target("memory, GiB", model["memory"], MEMORY),
        script.Target("products, proofs included", model["share"], 0.5, True),
        script.Target("products without proofs", model["descent"], 0.5, True),
        script.Target("the same, as computed", model["computed"], 0.5, True),
        script.Target("products of the size of EᵀE alone", model["large"], 0.5, True),
        script.Target("loop of solve / batch", model["loop_ratio"], 1.3, True),
        script.Target(
            "loop of solve and proof / batch",
            model["loop_ratio_both_proven"],
            1.3,
            True,
        ),
        script.Target("36 x 36: loop / batch", small["loop"] / small["batch"], 4, True),
        script.Target(
            "36 x 36: loop with proofs / batch", proven / small["batch"], 4, True
        ),
        script.Target("killed: complete", kills["complete"], 1, True),
        script.Target("killed: identical", kills["identical"], 1, True),
        script.Target("killed: lost", kills["lost"], 0),
        script.Target("killed: solved twice", kills["solved_twice"], 0),
        script.Target("eight devices: identical", devices["identical"], 1, True),
        script.Target("eight devices / one", eight / single, 1.1),
    ]


def measure(experiment, real, tolerance, folder):
    """Factorize the model, and solve its square matrices one by one."""
    used = draw_model(experiment, real, folder / "model.safetensors")
    square, tall, wide = map(list, experiment.configurations)
    rules = RULES.format(square=square, tall=tall, wide=wide, ranks=experiment.ranks)
    kept = [
        part
        for part, count in zip(
            rules.split("- match")[1:], experiment.counts, strict=True
        )
        if count
    ]
    (folder / "model.yaml").write_text(
        "rules:\n" + "".join(f"- match{part}" for part in kept)
    )
    size = min(experiment.shapes[0])
    rates = [timing.product_rate(size)]
    script.say(f"factorizing {sum(experiment.counts)} matrices, {used} of them real")
    result, seconds, memory = runs.factorize(folder, "model", "out", tolerance)
    script.say(f"factorized in {seconds:.0f} s")
    rates.append(timing.product_rate(size))
    records, batch = result["matrices"], runs.span(folder / "out", "square")
    matrices = safetensors.numpy.load_file(folder / "model.safetensors")
    names = [f"square.{i}" for i in range(min(experiment.loop, experiment.counts[0]))]
    configuration = Configuration(experiment.configurations[0], experiment.ranks[0])
    loop = script.solve_alone([matrices[x] for x in names], configuration, tolerance)
    rates.append(timing.product_rate(size))
    counted = np.sum([flops_of(record) for record in records], axis=0)
    large, thin, proof, left_out = counted
    rate = np.median(rates)  # a measurement may meet a busy machine
    plain = seconds * rate
    like = next(record for record in records if record["name"] == names[0])
    own = np.sum([flops_of({**like, **effort})[:2] for effort in loop.efforts])
    # The time of all squares one by one is extrapolated by their products.
    squares = {
        x["name"]: x["products"] for x in records if x["name"].startswith("square")
    }
    longer = sum(squares.values()) / sum(squares[name] for name in names)
    alone = sum(loop.runs) * longer
    proofs = float(np.mean(loop.proofs)) * len(squares)
    return {
        "matrices": records,
        "real": used,
        "seconds": seconds,
        "memory": memory,
        "rates": rates,
        "gap": max(record["bounds"]["gap"] for record in records),
        "parameters": result["after"]["parameters"] / result["before"]["parameters"],
        "share": (large + thin + proof) / plain,
        "descent": (large + thin) / plain,
        "large": large / plain,
        "computed": (large + thin - left_out) / plain,
        "loop": asdict(loop),
        "loop_share": own / sum(loop.runs) / rate,
        "batch_seconds": batch,
        "loop_ratio": alone / batch,
        "loop_ratio_both_proven": (alone + proofs) / batch,
    }


def draw(model, kills):
    """Draw gaps by the shape of the matrices, and the progress of killed runs."""
    chart, ((left, right),) = script.figure(11, 4.2, columns=2)
    for name in ("square", "tall", "wide"):
        records = [x for x in model["matrices"] if x["name"].startswith(name)]
        label = "x".join(map(str, records[0]["shape"])) if records else name
        gaps = [100 * record["bounds"]["gap"] for record in records]
        errors = [record["errors"]["relative_spectral"] for record in records]
        left.plot(errors, gaps, ".", label=label)
    left.axhline(100 * GAP, color="black", linestyle=":")
    left.set(xlabel="spectral error / norm", ylabel="certified gap, per cent")
    left.set(ylim=(0, None), title=f"{len(model['matrices'])} matrices")
    left.legend(frameon=False)
    right.step(range(1, len(kills["finished"]) + 1), kills["finished"], where="mid")
    right.set(xlabel="kill -9", ylabel="matrices finished", ylim=(0, None))
    return chart


def main():
    """Run the benchmark, and write `whole_models.json` and `whole_models.png`."""
    parser = script.parser(__doc__)
    parser.add_argument(
        "--weights", type=Path, help="GPT-2 small as .safetensors, some layers or all"
    )
    parser.add_argument(
        "--counts",
        type=int,
        nargs=3,
        metavar="N",
        help="number of square, tall and wide matrices",
    )
    parser.add_argument(
        "--loop", type=int, help="number of square matrices that the rival solves"
    )
    parser.add_argument("--tolerance", type=float, default=1e-2)
    given = parser.parse_args()
    experiment = QUICK if given.quick else Experiment()
    changed = {"counts": given.counts and tuple(given.counts), "loop": given.loop}
    changed = {key: x for key, x in changed.items() if x is not None}
    experiment = Experiment(**{**experiment.__dict__, **changed})
    real = spectral_norms.real_matrices(given.weights) if given.weights else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = measure(experiment, real, given.tolerance, folder)
        shares = ("share", "descent", "large", "computed", "loop_share")
        loops = ("loop_ratio", "loop_ratio_both_proven")
        figures = ("gap", "memory", "parameters", *shares, *loops)
        script.say(", ".join(f"{key} {model[key]:.4g}" for key in figures))
        small = run_small(experiment, given.tolerance)
        script.say(", ".join(f"36 x 36: {key} {x:.3g}" for key, x in small.items()))
        kills = runs.kill(folder, experiment.small, experiment.kills)
        script.say(", ".join(f"{key} {value}" for key, value in kills.items()))
        # Without fusion emitters, as flags may ask for, digits depend on the devices.
        settings = {cpu_threads.VARIABLE: "16", "XLA_FLAGS": ""}
        devices = run_python(DEVICES, experiment.shared, **settings)
    targets = targets_of(model, small, kills, devices)
    script.print_targets(targets)
    report = {
        "quick": given.quick,
        "targets": [target.plain() for target in targets],
        "counts": experiment.counts,
        "tolerance": given.tolerance,
        "model": model,
        "small": small,
        "kills": kills,
        "devices": devices,
    }
    script.publish("whole_models", report, draw(model, kills), given.out)


if __name__ == "__main__":
    main()
