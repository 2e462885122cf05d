"""Gains of mixed configurations, budgets, weights and permutations.

The script counts how many planted sums of two configurations and planted permutations
are recovered. On random 36 x 36 matrices and a structured suite it compares mixtures
with the best homogeneous sum of equal size, in the spectral norm. It compares Frobenius
errors at equal parameters for the SVD, one Kronecker configuration and a mixture, the
last two also with permuted rows and columns: on random matrices and, with `--weights
FILE.safetensors ...`, on those of language models, unweighted and weighted by input
moments, which are read from `--moments FILE.safetensors`, [n, n] under the names of the
matrices. `--partial FILE` stores finished parts; run the same command again to resume.
"""

import fnmatch
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from matplotlib.ticker import ScalarFormatter

import kronjax
from bench import script
from kronjax import Configuration, greedy
from kronjax.approximation import approximate
from kronjax.io import matrices
from kronjax.kronecker import divisors
from kronjax.linalg.dense import multiply_out
from kronjax.permute import permute


@dataclass(frozen=True)
class Experiment:
    """Sizes and numbers of the matrices."""

    size: int = 36
    cases: int = 40
    samples: int = 4
    structured: int = 3
    random_shares: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5)
    shares: tuple[float, ...] = (0.25, 0.5)
    orders: int = 10
    large: int = 768
    budget: int = 30_000


ORDER_TERMS = 8
"""Largest number of terms for which an order is sought: more take long."""

PRODUCTS = 300
"""Products of a fit without a closed form: not converged, to the cost of mixtures."""

STYLES = {
    "SVD": ("tab:orange", "o-"),
    "Kronecker": ("tab:gray", "o-"),
    "Kronecker, permuted": ("tab:gray", "s--"),
    "mixture": ("tab:blue", "o-"),
    "mixture, permuted": ("tab:blue", "s--"),
}

# A single shape and budget, because compilation takes most of the time.
QUICK = Experiment(12, 3, 1, 1, (0.5,), (0.5,), 2, 12, 72)


def planted(rng, shape, configurations, noise, decay=1.0):
    """Return a sum of sums of equal norm, with terms that decay, and relative noise."""
    total = np.zeros(shape)
    for c in configurations:
        a = rng.standard_normal((c.rank, *c.a_shape))
        a *= decay ** np.arange(c.rank)[:, None, None]
        part = multiply_out(a, rng.standard_normal((c.rank, *c.b_shape(shape))))
        total += part / np.linalg.norm(part)
    error = rng.standard_normal(shape)
    return total + noise * np.linalg.norm(total) * error / np.linalg.norm(error)


def recover_sums(experiment):
    """Plant two configurations, and report whether budget and criterion find them."""
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
        by_budget = greedy.choose(matrix, budget, among)
        by_criterion = greedy.choose(matrix, None, among)
        rows.append(
            {
                "wanted": plain(wanted),
                "by_budget": plain(by_budget),
                "by_criterion": plain(by_criterion),
                "found_by_budget": set(by_budget) == set(wanted),
                "found_by_criterion": set(by_criterion) == set(wanted),
            }
        )
    return rows


def recover_orders(experiment, rank, decay):
    """Permute planted sums, and report the error over that of the planted order."""
    n = experiment.size
    side = int(np.sqrt(n)) if int(np.sqrt(n)) ** 2 == n else n // 3
    rows = []
    for seed in range(experiment.cases):
        rng = np.random.default_rng(seed)
        configuration = Configuration((side, side), rank)
        noise = float(rng.choice([1e-3, 1e-2]))
        matrix = planted(rng, (n, n), [configuration], noise, decay)
        mixed = matrix[rng.permutation(n)][:, rng.permutation(n)]
        order = permute(mixed, configuration, seed=seed)
        [tail] = greedy.tails(matrix, [configuration])
        rows.append({"noise": noise, "ratio": float(order.error / np.sqrt(tail))})
    return rows


def spectral_gains(matrices, parameters, square):
    """Search each matrix, and compare with square sums and homogeneous sums."""
    rows = []
    for matrix in matrices:
        search = kronjax.search(matrix, parameters, dtype="float32", progress=False)
        alone = [t.error for t in search.trials if t.kind != "heterogeneous"]
        reference = min(
            t.error
            for t in search.trials
            if len(t.configurations) == 1 and t.configurations[0].a_shape == square
        )
        best = search.trials[0].error
        rows.append(
            {
                "error": best,
                "configurations": plain(search.configurations),
                "below_square": 1 - best / reference,
                "below_best_alone": 1 - best / min(alone),
            }
        )
        script.say(f"spectral: {best:.4f}, {100 * rows[-1]['below_square']:.2f} %")
    return rows


def search_time(matrix, parameters):
    """Return the seconds of a search over those of a balanced homogeneous solve."""
    search = kronjax.search(matrix, parameters, dtype="float32", progress=False)
    m, n = matrix.shape
    balanced = _near_square(m), n // _near_square(n)
    price = Configuration(balanced, 1).num_parameters(matrix.shape)
    alone = Configuration(balanced, parameters // price)
    single = approximate(matrix, alone, dtype="float32", progress=False).seconds
    trials = [
        [t.kind, plain(t.configurations), t.seconds, t.is_full] for t in search.trials
    ]
    return {
        "ratio": search.seconds / single,
        "seconds": search.seconds,
        "one_solve": single,
        "compile_seconds": search.compile_seconds,
        "trials": trials,
    }


def _near_square(size):
    return min(divisors(size), key=lambda d: abs(np.log(d * d / size)))


def curves(suites, experiment, kept):
    """Add the relative Frobenius errors that `kept` lacks, and yield after each."""
    for suite, name, matrix, weight, shares in suites:
        for share in shares:
            key = f"{suite}, {name}, {share}"
            if key not in kept:
                row = _fits(matrix, share, weight, experiment.orders)
                kept[key] = {"suite": suite, "name": name, "share": share, **row}
                script.say(f"{key}: {row['errors']}")
                yield
    return


def suites_of(experiment, weights, moments, match):
    """Yield suites, names, matrices, weights and shares."""
    n = experiment.size
    for seed in range(experiment.samples):
        matrix = np.random.default_rng(seed).standard_normal((n, n))
        suite = f"random {n} x {n}"
        yield suite, str(seed), matrix, None, experiment.random_shares
    for path in weights:
        for name in sorted(_names(path)):
            if not any(fnmatch.fnmatch(name, pattern) for pattern in match):
                continue
            matrix = matrices.read(path, tensor=name).matrix.astype(np.float32)
            kind = "MLP" if "mlp" in name else "attention"
            yield f"{kind}, plain", name, matrix, None, experiment.shares
            if moments and name in _names(moments):
                weight = matrices.read(moments, tensor=name).matrix.astype(np.float32)
                suite = f"{kind}, data-aware"
                yield suite, name, matrix, weight, experiment.shares


def _names(path):
    with safetensors.safe_open(path, framework="np") as file:
        names = file.keys()
        return [n for n in names if len(file.get_slice(n).get_shape()) == 2]


def _fits(matrix, share, weight, num_starts):
    """Fit by SVD, a near-square configuration, and half of each, at equal sizes."""
    m, n = shape = matrix.shape
    total = int(share * m * n)
    square = Configuration((_near_square(m), n // _near_square(n)), 1)
    columns = Configuration((m, 1), 1)
    price, price_columns = (c.num_parameters(shape) for c in (square, columns))
    alone = Configuration(square.a_shape, total // price)
    mixture = [Configuration((m, 1), total // 2 // price_columns)]
    rest = total - mixture[0].rank * price_columns
    mixture.append(Configuration(square.a_shape, rest // price))
    few = Configuration(square.a_shape, min(alone.rank, ORDER_TERMS))
    order = permute(matrix, few, right_weight=weight, num_starts=num_starts)
    permuted, turned = order.apply(matrix), order.apply_to_weights(None, weight)[1]
    wanted = {
        "SVD": (Configuration((m, 1), total // price_columns), matrix, weight),
        "Kronecker": (alone, matrix, weight),
        "mixture": (mixture, matrix, weight),
        "Kronecker, permuted": (alone, permuted, turned),
        "mixture, permuted": (mixture, permuted, turned),
    }
    errors, seconds = {}, {}
    for name, (configuration, target, right) in wanted.items():
        approximation = approximate(
            target,
            configuration,
            norm="frobenius",
            right_weight=right,
            num_starts=1,
            max_products=PRODUCTS,
            progress=False,
        )
        relative = approximation.weighted_relative or approximation.relative
        errors[name] = float(relative.frobenius)
        seconds[name] = approximation.seconds
    best = min(errors["SVD"], errors["Kronecker"])
    return {"errors": errors, "seconds": seconds, "gain": 1 - errors["mixture"] / best}


def plain(configurations):
    return [[*c.a_shape, c.rank] for c in configurations]


def structured(rng, n):
    """Return a sum of two structures and noise, and the structures' parameters."""
    shapes = ((6, 6), (4, 9)) if n == 36 else ((3, 4), (12, 1))
    pair = [Configuration(shapes[0], 2), Configuration(shapes[1], 1 + (n == 36))]
    matrix = planted(rng, (n, n), pair, 0.05)
    return matrix, sum(c.num_parameters((n, n)) for c in pair)


def run(experiment, suites, partial=None):
    """Measure all parts; each finished part is stored in the file `partial`."""
    n = experiment.size
    square = (6, 6) if n == 36 else (3, 4)
    draws = [
        np.random.default_rng(seed).standard_normal((n, n))
        for seed in range(experiment.samples)
    ]
    large = experiment.large
    matrix = np.random.default_rng(0).standard_normal((large, large))

    def spectral_structured():
        rows = []
        for seed in range(experiment.structured):
            target, budget = structured(np.random.default_rng(seed), n)
            rows += spectral_gains([target], budget, square)
        return rows

    parts = {
        "planted_sums": lambda: recover_sums(experiment),
        "planted_orders": lambda: {
            "one term": recover_orders(experiment, 1, 1.0),
            "two terms, 1 : 0.3": recover_orders(experiment, 2, 0.3),
            "two equal terms": recover_orders(experiment, 2, 1.0),
        },
        "search_time": lambda: search_time(matrix, experiment.budget),
        "spectral_random": lambda: spectral_gains(draws, 6 * n, square),
        "spectral_structured": spectral_structured,
    }
    results: dict[str, Any] = {}
    if partial and partial.exists():
        results = json.loads(partial.read_text())
    for name, part in parts.items():
        if name not in results:
            script.say(name.replace("_", " "))
            results[name] = part()
            _keep(results, partial)
    kept = results.setdefault("curves", {})
    for _ in curves(suites, experiment, kept):
        _keep(results, partial)
    return {**results, "curves": list(kept.values())}


def _keep(results, partial):
    if partial:
        partial.write_text(json.dumps(results))


def targets_of(results):
    """Return the targets."""
    sums, orders = results["planted_sums"], results["planted_orders"]["one term"]
    result = [
        script.Target(f"planted sums found, by {how}", _share(sums, how), 0.95, True)
        for how in ("budget", "criterion")
    ]
    share = float(np.mean([row["ratio"] <= 1.01 for row in orders]))
    result.append(script.Target("planted orders found, one term", share, 0.9, True))
    for name, limit in (("random", 0.015), ("structured", 0.2)):
        gains = [row["below_square"] for row in results[f"spectral_{name}"]]
        median = float(np.median(gains))
        name = f"spectral norm, {name}: below the square sum"
        result.append(script.Target(name, median, limit, True))
    ratio = results["search_time"]["ratio"]
    result.append(script.Target("search time over one solve", ratio, 10))
    half = [
        row["gain"]
        for row in results["curves"]
        if row["share"] == 0.5 and row["suite"].endswith("data-aware")
    ]
    if half:
        name = "data-aware, half the parameters: median gain of mixtures"
        result.append(script.Target(name, float(np.median(half)), 0.05, True))
    return result


def _share(rows, how):
    return float(np.mean([row[f"found_by_{how}"] for row in rows]))


def draw(results):
    """Draw gains in the spectral norm and, for each suite, errors by parameters."""
    suites = list(dict.fromkeys(row["suite"] for row in results["curves"]))
    columns = min(3, 1 + len(suites))
    rows = -(-(1 + len(suites)) // columns)
    chart, axes = script.figure(4.6 * columns, 3.9 * rows, rows, columns)
    first, *others = axes.flat
    for i, name in enumerate(("random", "structured")):
        gains = [100 * row["below_square"] for row in results[f"spectral_{name}"]]
        first.plot(np.full(len(gains), i), gains, "o", alpha=0.6)
    first.axhline(0, color="black", linewidth=0.8)
    first.set_xlim(-0.5, 1.5)
    first.set_xticks([0, 1], ["random", "structured"])
    first.set_ylabel("gain over the square sum, %")
    first.set_title("spectral norm, equal parameters")
    for axis, suite in zip(others, suites, strict=False):
        _draw_suite(axis, suite, [r for r in results["curves"] if r["suite"] == suite])
    for axis in others[len(suites) :]:
        axis.remove()
    handles = others[0].get_legend_handles_labels()
    chart.legend(*handles, loc="outside lower center", ncols=len(handles[0]))
    return chart


def _draw_suite(axis, suite, rows):
    shares = sorted({row["share"] for row in rows})
    for name, (color, style) in STYLES.items():
        medians = [
            np.median([row["errors"][name] for row in rows if row["share"] == share])
            for share in shares
        ]
        axis.plot(shares, medians, style, color=color, label=name)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(ScalarFormatter())
    axis.tick_params(axis="y", which="minor", labelsize=7)
    axis.set_xticks(shares, [f"{share:g}" for share in shares])
    axis.set_xlabel("parameters over those of the matrix")
    axis.set_ylabel("relative Frobenius error")
    count = len({row["name"] for row in rows})
    axis.set_title(f"{suite} ({count} matri{'x' if count == 1 else 'ces, median'})")


def main():
    """Run the benchmark, and write `heterogeneous.json` and `heterogeneous.png`."""
    parser = script.parser(__doc__)
    parser.add_argument(
        "--weights", type=Path, nargs="+", default=[], help="matrices [m, n], y = W x"
    )
    parser.add_argument("--moments", type=Path, help="second moments [n, n] of x")
    parser.add_argument(
        "--match", nargs="+", default=["*"], help="patterns of names, as *.mlp.*"
    )
    parser.add_argument("--partial", type=Path, help="file of finished parts; resumes")
    arguments = parser.parse_args()
    experiment = QUICK if arguments.quick else Experiment()
    suites = suites_of(
        experiment, arguments.weights, arguments.moments, arguments.match
    )
    results = run(experiment, suites, arguments.partial)
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
