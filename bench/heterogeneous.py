"""What do mixed configurations, budgets, weights and permutations buy?

Planted sums of two configurations and planted permutations: how many are found again.
Random 36 x 36 matrices and a structured suite: mixtures against the best homogeneous
sum of equal size, in the spectral norm. With `--weights FILE.safetensors`, real
matrices of a language model: Frobenius error against parameters for the SVD, one
Kronecker configuration and a mixture, plain and under input moments. Those are read
from `--moments FILE.safetensors`, [n, n] under the names of the matrices.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

import kronjax
from bench import script
from kronjax import Configuration, files, greedy
from kronjax.approximation import approximate
from kronjax.dense import multiply_out
from kronjax.kronecker import divisors
from kronjax.permute import permute


@dataclass(frozen=True)
class Experiment:
    """What is run."""

    size: int = 36
    cases: int = 40
    samples: int = 4
    structured: int = 3
    shares: tuple[float, ...] = (0.25, 0.5)
    large: int = 768
    budget: int = 30_000


# One shape and one budget: compiling is what takes the time.
QUICK = Experiment(12, 3, 1, 1, (0.5,), 12, 72)


def planted(rng, shape, configurations, noise, decay=1.0):
    """Sums of equal norm, `decay` to the number of the term, and relative noise."""
    total = np.zeros(shape)
    for c in configurations:
        a = rng.standard_normal((c.rank, *c.a_shape))
        a *= decay ** np.arange(c.rank)[:, None, None]
        part = multiply_out(a, rng.standard_normal((c.rank, *c.b_shape(shape))))
        total += part / np.linalg.norm(part)
    error = rng.standard_normal(shape)
    return total + noise * np.linalg.norm(total) * error / np.linalg.norm(error)


def recover_sums(experiment):
    """Cases of two configurations, and whether budget and criterion find them."""
    shape = (experiment.size, experiment.size)
    among = greedy.candidates(shape)
    fair = greedy.candidates(shape, spread=2.75)
    rows = []
    for seed in range(experiment.cases):
        rng = np.random.default_rng(seed)
        pair = rng.choice(len(fair), 2, replace=False)
        ranks = rng.integers(1, 4, 2)
        wanted = tuple(
            Configuration(fair[i].a_shape, min(int(r), fair[i].max_rank(shape)))
            for i, r in zip(pair, ranks, strict=True)
        )
        matrix = planted(rng, shape, wanted, 1e-3)
        budget = sum(c.num_parameters(shape) for c in wanted)
        told = greedy.choose(matrix, budget, among)
        informed = greedy.choose(matrix, None, among)
        rows.append(
            {
                "wanted": plain(wanted),
                "by_budget": plain(told),
                "by_criterion": plain(informed),
                "found_by_budget": set(told) == set(wanted),
                "found_by_criterion": set(informed) == set(wanted),
            }
        )
    return rows


def recover_orders(experiment, rank, decay):
    """Cases of permuted sums: error found over that of the planted order."""
    n = experiment.size
    side = int(np.sqrt(n)) if int(np.sqrt(n)) ** 2 == n else n // 3
    rows = []
    for seed in range(experiment.cases):
        rng = np.random.default_rng(seed)
        configuration = Configuration((side, side), rank)
        noise = float(rng.choice([1e-3, 1e-2]))
        matrix = planted(rng, (n, n), [configuration], noise, decay)
        mixed = matrix[rng.permutation(n)][:, rng.permutation(n)]
        found = permute(mixed, configuration, seed=seed)
        [tail] = greedy.tails(matrix, [configuration])
        rows.append({"noise": noise, "ratio": float(found.error / np.sqrt(tail))})
    return rows


def spectral_gains(matrices, parameters, square):
    """Search each matrix; error over that of the square sum and the best alone."""
    rows = []
    for matrix in matrices:
        found = kronjax.search(matrix, parameters, dtype="float32", progress=False)
        alone = [t.error for t in found.trials if t.kind != "heterogeneous"]
        reference = min(
            t.error
            for t in found.trials
            if len(t.configurations) == 1 and t.configurations[0].a_shape == square
        )
        best = found.trials[0].error
        rows.append(
            {
                "error": best,
                "configurations": plain(found.configurations),
                "below_square": 1 - best / reference,
                "below_best_alone": 1 - best / min(alone),
            }
        )
        script.say(f"spectral: {best:.4f}, {100 * rows[-1]['below_square']:.2f} %")
    return rows


def search_time(matrix, parameters):
    """Seconds of a search over those of its balanced homogeneous solve."""
    found = kronjax.search(matrix, parameters, dtype="float32", progress=False)
    m, n = matrix.shape
    balanced = _near_square(m), n // _near_square(n)
    [one] = [
        t.seconds
        for t in found.trials
        if len(t.configurations) == 1 and t.configurations[0].a_shape == balanced
    ]
    trials = [[t.kind, plain(t.configurations), t.seconds] for t in found.trials]
    return {"ratio": found.seconds / one, "trials": trials}


def _near_square(size):
    return min(divisors(size), key=lambda d: abs(np.log(d * d / size)))


def real_weights(path, moments, experiment):
    """Relative errors of three kinds of sums at several shares of the parameters."""
    names = sorted(safetensor_names(path))
    stored = set(safetensor_names(moments)) if moments else set()
    rows = []
    for name in names:
        matrix = files.read(path, tensor=name).matrix.astype(np.float32)
        weight = None
        if moments:
            if name not in stored:
                continue
            weight = files.read(moments, tensor=name).matrix
        for share in experiment.shares:
            rows.append({"name": name, "share": share, **_fits(matrix, share, weight)})
            script.say(f"{name}, {share}: {rows[-1]['errors']}")
    return rows


def safetensor_names(path):
    with safetensors.safe_open(path, framework="np") as file:
        names = file.keys()
        return [n for n in names if len(file.get_slice(n).get_shape()) == 2]


def _fits(matrix, share, weight):
    """SVD, one near-square configuration, and half of each, at equal parameters."""
    m, n = shape = matrix.shape
    total = int(share * m * n)
    square = Configuration((_near_square(m), n // _near_square(n)), 1)
    columns = Configuration((m, 1), 1)
    price, price_columns = (c.num_parameters(shape) for c in (square, columns))
    wanted = {
        "SVD": [Configuration((m, 1), total // price_columns)],
        "Kronecker": [Configuration(square.a_shape, total // price)],
        "mixture": [
            Configuration((m, 1), total // 2 // price_columns),
            Configuration(square.a_shape, total // 2 // price),
        ],
    }
    errors = {}
    for name, configurations in wanted.items():
        found = approximate(
            matrix,
            configurations,
            norm="frobenius",
            right_weight=weight,
            starts=1,
            progress=False,
        )
        relative = found.weighted_relative or found.relative
        errors[name] = float(relative.frobenius)
    best = min(errors["SVD"], errors["Kronecker"])
    return {"errors": errors, "gain": 1 - errors["mixture"] / best}


def plain(configurations):
    return [[*c.a_shape, c.rank] for c in configurations]


def structured(rng, n):
    """Two different structures and noise, and the parameters of the structures."""
    shapes = ((6, 6), (4, 9)) if n == 36 else ((3, 4), (12, 1))
    pair = [Configuration(shapes[0], 2), Configuration(shapes[1], 1 + (n == 36))]
    matrix = planted(rng, (n, n), pair, 0.05)
    return matrix, sum(c.num_parameters((n, n)) for c in pair)


def run(experiment, weights, moments):
    """Everything, as a dictionary."""
    n = experiment.size
    script.say("planted sums")
    results: dict[str, Any] = {"planted_sums": recover_sums(experiment)}
    script.say("planted orders")
    results["planted_orders"] = {
        "one term": recover_orders(experiment, 1, 1.0),
        "two terms, 1 : 0.3": recover_orders(experiment, 2, 0.3),
        "two equal terms": recover_orders(experiment, 2, 1.0),
    }
    square = (6, 6) if n == 36 else (3, 4)
    draws = [
        np.random.default_rng(seed).standard_normal((n, n))
        for seed in range(experiment.samples)
    ]
    results["spectral_random"] = spectral_gains(draws, 6 * n, square)
    rows = []
    for seed in range(experiment.structured):
        matrix, budget = structured(np.random.default_rng(seed), n)
        rows += spectral_gains([matrix], budget, square)
    results["spectral_structured"] = rows
    large = experiment.large
    matrix = np.random.default_rng(0).standard_normal((large, large))
    script.say("search time")
    results["search_time"] = search_time(matrix, experiment.budget)
    results["real"] = real_weights(weights, moments, experiment) if weights else []
    return results


def targets_of(results):
    """What was asked for."""
    sums, orders = results["planted_sums"], results["planted_orders"]["one term"]
    result = [
        script.Target(f"planted sums found, by {how}", _share(sums, how), 0.95, True)
        for how in ("budget", "criterion")
    ]
    found = float(np.mean([row["ratio"] <= 1.01 for row in orders]))
    result.append(script.Target("planted orders found, one term", found, 0.9, True))
    for name, limit in (("random", 0.015), ("structured", 0.2)):
        gains = [row["below_square"] for row in results[f"spectral_{name}"]]
        median = float(np.median(gains))
        name = f"spectral norm, {name}: below the square sum"
        result.append(script.Target(name, median, limit, True))
    ratio = results["search_time"]["ratio"]
    result.append(script.Target("search time over one solve", ratio, 10))
    if half := [row["gain"] for row in results["real"] if row["share"] == 0.5]:
        name = "real weights, half the parameters: median gain of mixtures"
        result.append(script.Target(name, float(np.median(half)), 0.05, True))
    return result


def _share(rows, how):
    return float(np.mean([row[f"found_by_{how}"] for row in rows]))


def draw(results):
    """Gains in the spectral norm; errors of real matrices against parameters."""
    chart, axes = script.figure(10, 4, columns=2)
    left, right = axes[0]
    for i, name in enumerate(("random", "structured")):
        gains = [100 * row["below_square"] for row in results[f"spectral_{name}"]]
        left.plot(np.full(len(gains), i), gains, "o", alpha=0.6)
    left.set_xticks([0, 1], ["random", "structured"])
    left.set_ylabel("% below the square sum, spectral norm")
    colors = {"SVD": "tab:orange", "Kronecker": "tab:gray", "mixture": "tab:blue"}
    shares = sorted({row["share"] for row in results["real"]})
    for name, color in colors.items():
        medians = [
            np.median([r["errors"][name] for r in results["real"] if r["share"] == s])
            for s in shares
        ]
        right.plot(shares, medians, "o-", color=color, label=name)
    right.set_xlabel("share of the parameters")
    right.set_ylabel("relative error, median over matrices")
    right.legend()
    return chart


def main():
    parser = script.parser(__doc__)
    parser.add_argument("--weights", type=Path, help="matrices [m, n], y = W x")
    parser.add_argument("--moments", type=Path, help="second moments [n, n] of x")
    arguments = parser.parse_args()
    experiment = QUICK if arguments.quick else Experiment()
    results = run(experiment, arguments.weights, arguments.moments)
    targets = targets_of(results)
    script.print_targets(targets)
    results = {
        "quick": arguments.quick,
        "targets": [target.plain() for target in targets],
        **results,
    }
    script.publish("heterogeneous", results, draw(results), arguments.out)


if __name__ == "__main__":
    main()
