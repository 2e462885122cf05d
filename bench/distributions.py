"""Errors of the defaults on six distributions, at three ranks and in three shapes.

The defaults are compared with Van Loan's solution, the truncated SVD with as many
parameters, and the best of twenty starts: Van Loan's and nineteen perturbations, each
taken through the whole continuation alone.  The regression values follow, in float64,
and a matrix for which Van Loan's solution is a critical point of every norm.
"""

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from bench import peers, script
from kronjax import Configuration
from kronjax.solver import continuation

MAX_GAP = 0.003
STARTS = 20

DISTRIBUTIONS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "Laplace": lambda rng, shape: rng.laplace(size=shape),
    "Rademacher": lambda rng, shape: rng.choice([-1.0, 1.0], shape),
    "Student-t(3)": lambda rng, shape: rng.standard_t(3, shape),
    "sparse normal": lambda rng, shape: (
        rng.standard_normal(shape) * (rng.random(shape) < 0.1)
    ),
}

REGRESSION = {1: 9.267008995043, 3: 7.419063837001, 6: 5.953099929932}
"""Local minimum by rank, for the 36 x 36 N(0, 1) matrix of seed 0, 6 x 6 factors."""

TRAP_LIMIT = 0.1736


@dataclass(frozen=True)
class Layout:
    """The shapes of matrices and left factors; `is_square`: all factors near-square."""

    shape: tuple[int, int]
    a_shape: tuple[int, int]
    is_square: bool = False

    @property
    def name(self):
        (m, n), (m1, n1) = self.shape, self.a_shape
        return f"{m}x{n}, ({m1}, {n1})"


LAYOUTS = (
    Layout((36, 36), (6, 6), is_square=True),
    Layout((24, 54), (4, 6)),
    Layout((36, 24), (9, 3)),
)


@dataclass(frozen=True)
class Experiment:
    """Sizes and numbers of the matrices."""

    layouts: tuple[Layout, ...] = LAYOUTS
    ranks: tuple[int, ...] = (1, 3, 6)
    regression_ranks: tuple[int, ...] = (1, 3, 6)
    samples: int = 2
    num_starts: int = STARTS


QUICK = Experiment(
    layouts=(Layout((12, 8), (3, 4)),),
    ranks=(2,),
    regression_ranks=(1,),
    samples=1,
    num_starts=3,
)


def draw_matrices(shape, samples):
    """Draw `samples` matrices of each distribution, [distributions, samples, m, n]."""
    return np.stack(
        [
            draw(np.random.default_rng(seed), (samples, *shape))
            for seed, draw in enumerate(DISTRIBUTIONS.values())
        ]
    )


def draw_suite(layout, samples):
    """Return the distribution of each matrix, and the matrices [count, m, n]."""
    matrices = draw_matrices(layout.shape, samples).reshape(-1, *layout.shape)
    return [name for name in DISTRIBUTIONS for _ in range(samples)], matrices


@functools.partial(jax.jit, static_argnums=(0, 3))
def from_starts(problem, matrices, tolerance, num_starts):
    """Take each start through the whole continuation alone.

    Args:
        problem: `continuation.Problem` with one start.
        matrices: [count, m, n], in the dtype of the computation.
        tolerance: Tolerance, as for `kronjax.solve`.
        num_starts: Number of starts; the first is Van Loan's solution.

    Returns:
        Spectral errors, [count, num_starts].
    """
    schedule = jax.tree.map(lambda *x: jnp.array(x), *problem.schedule())

    def from_start(matrix, number):
        begins = schedule.begins.at[0].set(number)
        stages = dataclasses.replace(schedule, begins=begins)
        setting, path, first = continuation.start(problem, matrix)
        path, lines = jax.lax.scan(
            lambda path, stage: continuation.advance(
                problem, setting, path, stage, tolerance, jax.random.key(0)
            ),
            path,
            stages,
        )
        trace = continuation.gather(problem, path.winner, first, lines)
        return continuation.finish(problem, setting, path, trace).spectral_error

    every = jax.vmap(jax.vmap(from_start, in_axes=(None, 0)), in_axes=(0, None))
    return every(matrices, jnp.arange(num_starts))


def best_of_starts(matrices, configuration, num_starts):
    """Return the smallest spectral error [count] over all starts, in float32."""
    problem = continuation.Problem.of(matrices.shape[1:], configuration, num_starts=1)
    tolerance = np.float32(2e-4)
    errors = from_starts(problem, jnp.float32(matrices), tolerance, num_starts)
    return np.asarray(errors, np.float64).min(1)


def run_cell(layout, rank, experiment):
    """Return a row for each distribution, for one shape and rank."""
    configuration = Configuration(layout.a_shape, rank)
    matrices = draw_matrices(layout.shape, experiment.samples)
    flat = matrices.reshape(-1, *layout.shape)
    script.say(f"{layout.name}, rank {rank}: defaults")
    solved = script.solve(flat, configuration, repeats=1, dtype="float32").approximation
    script.say(f"{layout.name}, rank {rank}: {experiment.num_starts} starts")
    best = best_of_starts(flat, configuration, experiment.num_starts)
    ours = np.asarray(solved.error.spectral)
    van_loan = [peers.van_loan(x, layout.a_shape, rank).spectral_error for x in flat]
    svd = [peers.truncated_svd(x, solved.num_parameters).spectral_error for x in flat]
    columns = np.stack([ours, best, van_loan, svd]).reshape(
        4, len(DISTRIBUTIONS), experiment.samples
    )
    return [
        {
            "layout": layout.name,
            "is_square": layout.is_square,
            "rank": rank,
            "distribution": name,
            "errors": columns[0, i],
            "best_of_starts": columns[1, i],
            "van_loan": columns[2, i],
            "svd": columns[3, i],
            "gaps": columns[0, i] / columns[1, i] - 1,
        }
        for i, name in enumerate(DISTRIBUTIONS)
    ]


def losses(rows, peer):
    """Count the matrices on which a peer is nearer by more than rounding."""
    return int(sum(np.sum(row["errors"] > row[peer] * (1 + 1e-6)) for row in rows))


def gaps(rows):
    return np.concatenate([row["gaps"] for row in rows])


def trap():
    """Return `E11 (x) E11 + c (I - E11) (x) (I - E11) / 5`, 36 x 36, c = 1.05."""
    corner = np.zeros((6, 6))
    corner[0, 0] = 1
    rest = np.eye(6) - corner
    return np.kron(corner, corner) + 1.05 * np.kron(rest, rest) / 5


def regressions(ranks):
    """Return errors of the defaults in float64 for the regression matrix and `trap`."""
    matrix = np.random.default_rng(0).standard_normal((36, 36))
    rows = []
    for rank in ranks:
        script.say(f"regression value, rank {rank}, float64")
        configuration = Configuration((6, 6), rank)
        # A batch of another size would have to be compiled.
        batch = np.stack([matrix, trap()])
        solved = script.solve(batch, configuration, repeats=1).approximation
        ours, trapped = (float(x) for x in solved.error.spectral)
        rows.append(
            {
                "rank": rank,
                "error": ours,
                "value": REGRESSION[rank],
                "relative": ours / REGRESSION[rank] - 1,
                "trap_error": trapped,
            }
        )
    return rows


def table_rows(rows):
    """Yield a row for each value of distribution, layout and rank, then the total."""
    for key in ("distribution", "layout", "rank"):
        for value in dict.fromkeys(row[key] for row in rows):
            yield _summary(
                f"rank {value}" if key == "rank" else value,
                [row for row in rows if row[key] == value],
            )
    yield _summary("all", rows)


def _summary(name, rows):
    gap = 100 * gaps(rows)
    return (
        name,
        gap.size,
        f"{np.median(gap):.3f}",
        f"{np.quantile(gap, 0.9):.3f}",
        f"{gap.max():.3f}",
        losses(rows, "van_loan"),
        losses(rows, "svd"),
    )


def targets_of(rows, regression):
    """Return the targets."""
    square = [row for row in rows if row["is_square"]]
    lost, gap = losses(rows, "van_loan"), float(np.median(gaps(rows)))
    result = [
        script.Target("matrices on which Van Loan is nearer", lost, 0),
        script.Target("median gap to the best start", gap, MAX_GAP),
    ]
    if square:
        name = "matrices on which SVD is nearer, square cases"
        result.append(script.Target(name, losses(square, "svd"), 0))
    for row in regression:
        name = f"regression value, rank {row['rank']}: relative excess"
        result.append(script.Target(name, row["relative"], 2e-4))
        if row["rank"] == 1:
            name = "critical start: error"
            result.append(script.Target(name, row["trap_error"], TRAP_LIMIT))
    return result


def draw(rows, num_starts):
    """Draw gaps to the best start, and errors of closed forms over those of kronjax."""
    chart, axes = script.figure(11, 4.6, columns=2)
    left, right = axes[0]
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    for i, name in enumerate(DISTRIBUTIONS):
        for k, layout in enumerate(layouts):
            here = [
                row
                for row in rows
                if row["distribution"] == name and row["layout"] == layout
            ]
            x = i + 0.2 * (k - (len(layouts) - 1) / 2)
            gap = 100 * gaps(here)
            style = {"linestyle": "", "marker": "o", "markersize": 3, "alpha": 0.6}
            left.plot(
                np.full(gap.size, x),
                gap,
                color=f"C{k}",
                label=layout if i == 0 else None,
                **style,
            )
        here = [row for row in rows if row["distribution"] == name]
        ours = np.concatenate([row["errors"] for row in here])
        for k, (label, key) in enumerate((("SVD", "svd"), ("Van Loan", "van_loan"))):
            theirs = np.concatenate([row[key] for row in here])
            right.plot(
                np.full(ours.size, i + 0.2 * (k - 0.5)),
                theirs / ours,
                color=script.COLORS[label],
                label=label if i == 0 else None,
                linestyle="",
                marker="o",
                markersize=3,
                alpha=0.6,
            )
    left.axhline(100 * MAX_GAP, color="black", ls=":", label="target for the median")
    left.axhline(0, color="black", lw=0.5)
    right.axhline(1, color=script.COLORS["kronjax"], label="kronjax")
    left.set_yscale("symlog", linthresh=0.1)
    left.set_ylabel(f"error above the best of {num_starts} starts, %")
    right.set_ylabel("spectral error over that of kronjax")
    for each in axes[0]:
        each.set_xticks(range(len(DISTRIBUTIONS)), DISTRIBUTIONS, rotation=20)
        each.set_xlabel("distribution of the entries")
        each.legend(fontsize=8, frameon=False)
    left.set_title("one point per matrix; below zero: better than any", fontsize=10)
    right.set_title("closed forms of equal parameter count", fontsize=10)
    return chart


def main():
    """Run the benchmark, and write `distributions.json` and `distributions.png`."""
    given = script.parser(__doc__).parse_args()
    experiment = QUICK if given.quick else Experiment()
    regression = regressions(experiment.regression_ranks)
    rows = [
        row
        for layout in experiment.layouts
        for rank in experiment.ranks
        for row in run_cell(layout, rank, experiment)
    ]
    script.table(
        f"Defaults, float32: gap in % to the best of {experiment.num_starts} starts, "
        "and matrices on which a peer is nearer",
        ("", "matrices", "median", "90 %", "largest", "Van Loan", "SVD"),
        table_rows(rows),
    )
    script.table(
        "Regression values, float64",
        ("rank", "error", "value", "relative excess"),
        [
            (x["rank"], x["error"], x["value"], f"{x['relative']:+.1e}")
            for x in regression
        ],
    )
    targets = targets_of(rows, regression)
    script.print_targets(targets)
    results = {
        "quick": given.quick,
        "num_starts": experiment.num_starts,
        "targets": [target.plain() for target in targets],
        "regression": regression,
        "cases": rows,
    }
    script.publish(
        "distributions", results, draw(rows, experiment.num_starts), given.out
    )


if __name__ == "__main__":
    main()
