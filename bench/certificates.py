"""Certified gaps of solutions before and after the second-order finish.

The random suite of `distributions` is solved with the defaults, finished and certified:
local gaps, KKT residuals, steps, and values over global bounds.  The regression values
and a larger matrix (144 x 144, N(0, 1), rank 6) follow.  With `--weights` GPT-2's value
matrices (768 x 768, rank 1) are finished as well, and the time of the finish is given
in SVDs of that size; six matrices are solved at ranks 4 and 32 in float32 without a
finish, to show which gaps are proven after a limited number of products.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench import script, timing
from bench.continuation import real_matrices
from bench.distributions import (
    LAYOUTS,
    REGRESSION,
    Layout,
    draw_suite,
)
from kronjax import Configuration, approximate, certify
from kronjax.io import matrices
from kronjax.kronecker import KroneckerTerms
from kronjax.proof import certificate, newton

LAYERS = 0, 5, 11

MAX_PRODUCTS = 207
"""Products per stage; there are at most twelve stages."""


@dataclass(frozen=True)
class Experiment:
    """Sizes and numbers of the matrices."""

    layouts: tuple[Layout, ...] = LAYOUTS
    ranks: tuple[int, ...] = (1, 3, 6)
    regression_ranks: tuple[int, ...] = (1, 3, 6)
    samples: int = 5
    large: tuple[int, int] | None = (12, 6)


QUICK = Experiment(
    layouts=(Layout((12, 8), (3, 4)),),
    ranks=(2,),
    regression_ranks=(),
    samples=1,
    large=None,
)


def certified(
    matrix, configuration, approximation=None, place=None, tell=lambda text: None
):
    """Certify a matrix before and after the finish, and time the finish."""
    if approximation is None:
        approximation = approximate(matrix, configuration, num_starts=1, progress=False)
    terms = approximation.terms
    if place is not None:
        terms = tuple(KroneckerTerms(x.a[place], x.b[place]) for x in terms)
    before = certificate.certificate_of(matrix, terms)
    begun = time.perf_counter()
    finish = newton.finish(matrix, terms, tell=tell)
    seconds = time.perf_counter() - begun
    with timing.blas(timing.best_threads(lambda: np.linalg.svd(matrix))):
        begun = time.perf_counter()
        np.linalg.svd(matrix)
        decomposition = time.perf_counter() - begun
    after = certificate.certificate_of(matrix, finish.terms, finishes=[finish])
    return {
        "error": float(before.error),
        "error_finished": float(after.error),
        "gap": float(before.local_gap),
        "gap_finished": float(after.local_gap),
        "kkt_residual": float(finish.kkt_residual),
        "global_bound": float(after.global_bound),
        "status": finish.status,
        "steps": finish.steps,
        "path_steps": finish.path_steps,
        "cluster": finish.cluster,
        "is_strict_minimum": finish.is_strict_minimum,
        "seconds": seconds,
        "svds": seconds / decomposition,
    }


def random_suite(experiment):
    """Return the rows of all distributions, shapes and ranks."""
    cases = []
    for layout in experiment.layouts:
        names, flat = draw_suite(layout, experiment.samples)
        for rank in experiment.ranks:
            configuration = Configuration(layout.a_shape, rank)
            solved = approximate(flat, configuration, progress=False)
            script.say(f"{layout.name}, rank {rank}: solved")
            for i, (name, matrix) in enumerate(zip(names, flat, strict=True)):
                case = certified(matrix, configuration, solved, i)
                about = {"layout": layout.name, "rank": rank, "distribution": name}
                cases.append({**about, **case})
            script.say(f"{layout.name}, rank {rank}: finished and certified")
    return cases


def regression(experiment):
    """Return the rows of the matrices whose local minima are known, by rank."""
    matrix = np.random.default_rng(0).standard_normal((36, 36))
    rows = {}
    for rank in experiment.regression_ranks:
        row = certified(matrix, Configuration((6, 6), rank))
        row["difference"] = abs(row["error_finished"] / REGRESSION[rank] - 1)
        rows[rank] = row
    return rows


def real_values(path):
    """Return the rows of the value matrices in a file at rank 1, by name."""
    rows = {}
    for layer in LAYERS:
        joint = matrices.read(path, tensor=f"h.{layer}.attn.c_attn.weight").matrix
        name = f"layer {layer} value"
        value = np.asarray(joint[:, 1536:], np.float64)
        rows[name] = certified(value, Configuration((24, 32), 1), tell=script.say)
        script.say(f"{name}: finished and certified")
    return rows


def proven_in_float32(path):
    """Return proven gaps of 768 x 768 matrices after a limited number of products."""
    rows = []
    for name, matrix in real_matrices(path, LAYERS):
        for rank in (4, 32):
            solved = approximate(
                matrix,
                Configuration((24, 32), rank),
                tolerance=1.5e-3,
                max_products=MAX_PRODUCTS,
                progress=False,
            )
            proven = certify(solved, matrix)
            row = {
                "matrix": name,
                "rank": rank,
                "error": float(proven.error),
                "gap": float(proven.local_gap),
                "products": int(np.sum(solved.trace.products)),
            }
            rows.append(row)
            script.say(str(row))
    return rows


def targets_of(cases, known, large, real, proven):
    """Return the targets."""
    gaps = np.array([case["gap_finished"] for case in cases])
    rises = max(case["error_finished"] / case["error"] - 1 for case in cases)
    targets = [
        script.Target(
            "share of gaps <= 1e-8", float(np.mean(gaps <= 1e-8)), 0.95, True
        ),
        script.Target("largest gap", float(gaps.max()), 1e-2),
        script.Target("largest rise of the error by the finish", rises, 1e-12),
    ]
    if known:
        limits = {"difference": 1e-10, "kkt_residual": 1e-12}
        limits |= {"steps": 8, "path_steps": 0}
        targets += [
            script.Target(f"regression, {key}", max(x[key] for x in known.values()), y)
            for key, y in limits.items()
        ]
    if large:
        targets.append(script.Target("144 x 144, gap", large["gap_finished"], 1e-8))
    if real:
        gap = max(row["gap_finished"] for row in real.values())
        targets.append(script.Target("768 x 768 weights, largest gap", gap, 1e-6))
    if proven:
        what = "768 x 768 weights, float32"
        for key, limit in (("gap", 1e-2), ("products", 2500)):
            most = max(row[key] for row in proven)
            targets.append(script.Target(f"{what}, largest {key}", most, limit))
    return targets


def draw_figure(cases):
    """Draw the distribution of gaps before and after the finish."""
    chart, ((axes,),) = script.figure(6.5, 4)
    floor = 1e-15
    for name, key in (("before the finish", "gap"), ("after", "gap_finished")):
        gaps = np.sort([max(case[key], floor) for case in cases])
        axes.plot(gaps, np.linspace(0, 1, len(gaps)), label=name)
    axes.set(
        xscale="log", xlabel="certified local gap", ylabel="share of matrices",
        title=f"{len(cases)} random matrices",
    )  # fmt: skip
    axes.legend()
    return chart


def main():
    """Run the benchmark, and write `certificates.json` and `certificates.png`."""
    options = script.parser(__doc__)
    options.add_argument("--samples", type=int, help="number of matrices of each kind")
    options.add_argument("--weights", type=Path, help="GPT-2 small as .safetensors")
    given = options.parse_args()
    experiment = QUICK if given.quick else Experiment()
    if given.samples:
        experiment = replace(experiment, samples=given.samples)
    cases = random_suite(experiment)
    known = regression(experiment)
    large = None
    if experiment.large is not None:
        side, rank = experiment.large
        matrix = np.random.default_rng(0).standard_normal((side**2, side**2))
        large = certified(matrix, Configuration((side, side), rank))
        script.say("the large matrix is finished")
    real = real_values(given.weights) if given.weights else {}
    proven = proven_in_float32(given.weights) if given.weights else []
    targets = targets_of(cases, known, large, real, proven)
    keys = ("gap", "gap_finished", "kkt_residual", "cluster", "path_steps", "svds")
    if real:
        rows = [(name, *(row[key] for key in keys)) for name, row in real.items()]
        script.table("Real weights, rank 1", ("matrix", *keys), rows)
    if proven:
        keys = tuple(proven[0])
        rows = [tuple(row.values()) for row in proven]
        script.table("Real weights, float32, no finish", keys, rows)
    script.table(
        "Cases by rank",
        ("rank", "median gap", "finished", "median steps", "median value / bound"),
        [
            (
                rank,
                np.median([x["gap"] for x in rows]),
                np.median([x["gap_finished"] for x in rows]),
                int(np.median([x["steps"] for x in rows])),
                np.median([x["error"] / x["global_bound"] for x in rows]),
            )
            for rank in experiment.ranks
            for rows in [[x for x in cases if x["rank"] == rank]]
        ],
    )
    script.print_targets(targets)
    results = {
        "quick": given.quick,
        "samples": experiment.samples,
        "targets": [target.plain() for target in targets],
        "cases": cases,
        "regression": known,
        "large": large,
        "real": real,
        "proven": proven,
    }
    script.publish("certificates", results, draw_figure(cases), given.out)


if __name__ == "__main__":
    main()
