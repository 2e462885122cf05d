"""Errors of Kronecker sums for GPT-2's value matrices, and the rate of the solver.

The value matrices of GPT-2 small, 768 x 768, are solved in float32 with left factors
24 x 32 and the defaults: layer 5 with 4 terms alone; layers 0, 5 and 11 and the key
matrix of layer 5, with 32 terms, as one batch of four.  The rate of that batch counts
only the products of the size of E^T E, over the whole time of the solve; it is compared
with the rate of plain products of the same batch, measured right before and after.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import peers, script, timing
from kronjax import Configuration
from kronjax.io import matrices

MAX_PRODUCTS = 1200
MIN_RATE = 0.6


@dataclass(frozen=True)
class Case:
    """A matrix, a rank, and the largest allowed error or None."""

    name: str
    matrix: np.ndarray
    rank: int
    limit: float | None = None


@dataclass(frozen=True)
class Experiment:
    """Cases that are solved one by one, and four of equal rank solved as a batch."""

    a_shape: tuple[int, int]
    alone: list[Case]
    batch: list[Case]


def from_weights(path):
    """Read the matrices of GPT-2: c_attn is (768, 2304), columns query, key, value."""
    attention = {
        layer: matrices.read(path, tensor=f"h.{layer}.attn.c_attn.weight").matrix
        for layer in (0, 5, 11)
    }
    value = {layer: matrix[:, 1536:] for layer, matrix in attention.items()}
    key = attention[5][:, 768:1536]
    return Experiment(
        a_shape=(24, 32),
        alone=[Case("layer 5 value", value[5], 4, 6.85)],
        batch=[
            Case("layer 5 value", value[5], 32, 4.69),
            Case("layer 0 value", value[0], 32, 2.71),
            Case("layer 11 value", value[11], 32, 7.00),
            Case("layer 5 key", key, 32),
        ],
    )


def synthetic():
    """Draw 48 x 48 matrices with decaying singular values in random directions."""
    rng = np.random.default_rng(0)
    decay = np.exp(-np.arange(48) / 12)
    left, right = np.linalg.qr(rng.standard_normal((2, 4, 48, 48)))[0]
    matrices = ((left * decay) @ right).astype(np.float32)
    cases = [Case(f"synthetic {i}", matrix, 4) for i, matrix in enumerate(matrices)]
    return Experiment(a_shape=(6, 8), alone=[], batch=cases)


def solve_cases(experiment, cases):
    """Solve cases of equal rank as one batch; return rows and the solve."""
    configuration = Configuration(experiment.a_shape, cases[0].rank)
    matrices = np.stack([case.matrix for case in cases]).astype(np.float32)
    script.say(f"kronjax, rank {configuration.rank}, batch of {len(cases)}")
    solved = script.solve(matrices, configuration, enough=10.0)
    approximation = solved.approximation
    rows = []
    for i, case in enumerate(cases):
        script.say(f"  truncated SVD and Van Loan of {case.name}")
        svd = peers.truncated_svd(case.matrix, approximation.num_parameters)
        van_loan = peers.van_loan(case.matrix, experiment.a_shape, case.rank)
        rows.append(
            {
                "name": case.name,
                "rank": case.rank,
                "num_parameters": approximation.num_parameters,
                "error": float(approximation.error.spectral[i]),
                "target": case.limit,
                "products": int(approximation.products[i]),
                "svd_error": svd.spectral_error,
                "van_loan_error": van_loan.spectral_error,
                "trace": {
                    "p": approximation.trace.p[i],
                    "products": np.cumsum(approximation.trace.products[i]),
                    "spectral_error": approximation.trace.spectral_error[i],
                },
            }
        )
    return rows, solved


def measure_rate(experiment):
    """Solve the batch between two measurements of plain products; rows and rates."""
    size, count = min(experiment.batch[0].matrix.shape), len(experiment.batch)
    script.say(f"rate of plain products, {count} of {size} x {size}")
    before = timing.product_rate(size, np.float32, count)
    rows, solved = solve_cases(experiment, experiment.batch)
    script.say("rate of plain products again")
    after = timing.product_rate(size, np.float32, count)
    products = sum(row["products"] for row in rows)
    rate = products * 2 * size**3 / solved.seconds
    return rows, {
        "batch": count,
        "products": products,
        "seconds": solved.seconds,
        "runs": solved.runs,
        "compile_seconds": solved.compile_seconds,
        "flops_per_second": rate,
        "product_flops_per_second_before": before,
        "product_flops_per_second_after": after,
        "fraction": 2 * rate / (before + after),
    }


def targets_of(rows, rate, real):
    """Return the targets; synthetic matrices have none."""
    named = [(f"{row['name']}, r = {row['rank']}", row) for row in rows]
    errors = [
        script.Target(f"{name}: error", row["error"], row["target"])
        for name, row in named
        if row["target"] is not None
    ]
    products = [
        script.Target(f"{name}: products", row["products"], MAX_PRODUCTS)
        for name, row in named
        if real
    ]
    fraction = script.Target(
        f"rate of a batch of {rate['batch']} over plain products",
        rate["fraction"],
        MIN_RATE,
        at_least=True,
    )
    return [*errors, *products, *[fraction] * real]


def draw(rows):
    """Draw error against products for each case, with both closed forms as lines."""
    chart, axes = script.figure(11, 6, rows=2, columns=3)
    for each, row in zip(axes.flat, rows, strict=False):
        path = row["trace"]
        # The start costs no products of this size; its error is that of Van Loan.
        each.plot(
            path["products"][1:],
            path["spectral_error"][1:],
            color=script.COLORS["kronjax"],
            marker="o",
            label="kronjax, end of each stage",
        )
        for name, key in (("SVD", "svd_error"), ("Van Loan", "van_loan_error")):
            color = script.COLORS[name]
            each.axhline(row[key], color=color, linestyle="--", label=name)
        if row["target"] is not None:
            each.axhline(row["target"], color="black", linestyle=":", label="target")
        each.set_title(
            f"{row['name']}, r = {row['rank']}: {row['error']:.3f}", fontsize=10
        )
        each.set_xlabel("products, all starts included")
        each.set_ylabel("spectral error")
        each.set_xlim(left=0)
        each.set_ylim(bottom=0)
    for each in axes.flat[len(rows) :]:
        each.set_axis_off()
    lines, labels = axes[0, 0].get_legend_handles_labels()
    axes[-1, -1].legend(lines, labels, loc="center", frameon=False)
    return chart


def main():
    """Run the benchmark, and write `gpt2_values.json` and `gpt2_values.png`."""
    parser = script.parser(__doc__)
    parser.add_argument(
        "--weights",
        type=Path,
        help="GPT-2 small as .safetensors, with h.{0,5,11}.attn.c_attn.weight",
    )
    given = parser.parse_args()
    if not given.quick and given.weights is None:
        parser.error("--weights is needed unless --quick is given")
    experiment = synthetic() if given.quick else from_weights(given.weights)
    rows = [solve_cases(experiment, [case])[0][0] for case in experiment.alone]
    batched, rate = measure_rate(experiment)
    rows += batched
    script.table(
        f"{'Synthetic' if given.quick else 'GPT-2'} matrices, float32, left factors "
        f"{experiment.a_shape}",
        ("matrix", "rank", "SVD", "Van Loan", "kronjax", "products"),
        [
            (
                row["name"],
                row["rank"],
                row["svd_error"],
                row["van_loan_error"],
                row["error"],
                row["products"],
            )
            for row in rows
        ],
    )
    targets = targets_of(rows, rate, real=not given.quick)
    script.print_targets(targets)
    print(
        f"Effective rate: {100 * rate['fraction']:.0f} % of plain products, whose own "
        f"rate changed by {100 * _change(rate):+.0f} % meanwhile."
    )
    results = {
        "quick": given.quick,
        "a_shape": experiment.a_shape,
        "targets": [target.plain() for target in targets],
        "cases": rows,
        "rate": rate,
    }
    script.publish("gpt2_values", results, draw(rows), given.out)


def _change(rate):
    before, after = (
        rate[f"product_flops_per_second_{when}"] for when in ("before", "after")
    )
    return after / before - 1


if __name__ == "__main__":
    main()
