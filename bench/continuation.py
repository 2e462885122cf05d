"""Products that the adaptive continuation saves, and the accuracy that it loses.

The random suite of `distributions`, and 768 x 768 matrices of GPT-2 if a file with its
weights is given, are solved from one start with p doubled at every stage up to 4098,
and with the adaptive continuation at three tolerances; targets apply to the largest.
Work is counted in products of the size of `EᵀE`; gaps to the local bound are proven in
float64.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench import script
from bench.distributions import LAYOUTS, Layout, draw_suite
from kronjax import Configuration, approximate, certify
from kronjax.io import matrices

DOUBLING = [4, *(2**j + 2 for j in range(2, 13))]
"""Exponents of the schedule that every matrix completes."""

TOLERANCE = 3e-3
"""Tolerance of the adaptive continuation to which the targets apply."""

TOLERANCES = (TOLERANCE, 2.5e-3, 2e-3)
"""Tolerances of the adaptive continuation, which show the cost of a smaller error."""

MATRICES = {
    "h.{}.attn.c_attn.weight": "1536:2304",
    "h.{}.attn.c_proj.weight": None,
}
"""Tensors and columns of values and output projections."""


@dataclass(frozen=True)
class Experiment:
    """Sizes and numbers of the matrices."""

    layouts: tuple[Layout, ...] = LAYOUTS
    ranks: tuple[int, ...] = (1, 3, 6)
    samples: int = 5
    weights: Path | None = None
    layers: tuple[int, ...] = (0, 5, 11)
    large: tuple[Configuration, ...] = (
        Configuration((24, 32), 4),
        Configuration((24, 32), 32),
    )


QUICK = Experiment(layouts=(Layout((12, 8), (3, 4)),), ranks=(2,), samples=1)


def compared(labels, matrices, configuration):
    """Run both continuations on a batch; return a row for each label and tolerance."""
    full = approximate(
        matrices, configuration, num_starts=1, schedule=DOUBLING, progress=False
    )
    rows = []
    for tolerance in TOLERANCES:
        short = approximate(
            matrices, configuration, num_starts=1, tolerance=tolerance, progress=False
        )
        gaps = np.ravel(certify(short, matrices).local_gap)
        for i, (label, gap) in enumerate(zip(labels, gaps, strict=True)):
            spent = [int(np.ravel(x.products)[i]) for x in (full, short)]
            error, ours = (float(np.ravel(x.error.spectral)[i]) for x in (full, short))
            rows.append(
                {
                    **label,
                    "rank": configuration.rank,
                    "tolerance": tolerance,
                    "products_doubling": spent[0],
                    "products": spent[1],
                    "ratio": spent[1] / spent[0],
                    "excess": ours / error - 1,
                    "gap": float(gap),
                    "last_p": int(np.max(short.trace.p.reshape(len(gaps), -1)[i])),
                }
            )
    return rows


def random_suite(experiment):
    """Return the rows of all distributions, shapes and ranks."""
    rows = []
    for layout in experiment.layouts:
        names, flat = draw_suite(layout, experiment.samples)
        labels = [{"layout": layout.name, "distribution": name} for name in names]
        for rank in experiment.ranks:
            rows += compared(labels, flat, Configuration(layout.a_shape, rank))
            script.say(f"{layout.name}, rank {rank}")
    return rows


def real_matrices(path, layers):
    """Yield names and matrices, float32, of some layers of GPT-2."""
    for layer in layers:
        for tensor, columns in MATRICES.items():
            name = tensor.format(layer)
            source = matrices.read(path, tensor=name, columns=columns)
            yield name, np.float32(source.matrix)


def weight_matrices(experiment):
    """Return the rows of GPT-2's matrices in float32, if there is a file."""
    rows = []
    if experiment.weights is None:
        return rows
    for name, matrix in real_matrices(experiment.weights, experiment.layers):
        for configuration in experiment.large:
            new = compared([{"matrix": name}], matrix, configuration)
            rows += new
            words = ", ".join(
                f"{x['ratio']:.2f}, {100 * x['excess']:.2f} %" for x in new
            )
            script.say(f"{name}, rank {configuration.rank}: {words}")
    return rows


def targets_of(rows, name):
    """Return the targets of a set of matrices."""
    rows = [row for row in rows if row["tolerance"] == TOLERANCE]
    return [
        script.Target(
            f"{name}: products, adaptive / doubling, median",
            float(np.median([row["ratio"] for row in rows])),
            0.5,
        ),
        script.Target(
            f"{name}: error above that of doubling, median",
            float(np.median([row["excess"] for row in rows])),
            1e-3,
        ),
    ]


def draw_figure(rows, large):
    """Draw excess error against saved products for every matrix, and medians."""
    chart, ((axes,),) = script.figure(6.5, 4)
    for name, group in (("random", rows), ("GPT-2", large)):
        if not group:
            continue
        points = [
            np.transpose(
                [
                    [x["ratio"], 100 * x["excess"]]
                    for x in group
                    if x["tolerance"] == tolerance
                ]
            )
            for tolerance in TOLERANCES
        ]
        (line,) = axes.plot(*np.median(points, axis=2).T, "o-", label=name)
        axes.plot(*np.hstack(points), ".", color=line.get_color(), alpha=0.2)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.axhline(0.1, color="gray", linewidth=0.8)
    axes.axvline(0.5, color="gray", linewidth=0.8)
    axes.set(
        xlabel="products, adaptive / doubling",
        ylabel="error above that of doubling, %",
        title="medians at tolerances "
        + ", ".join(f"{100 * tolerance:g} %" for tolerance in TOLERANCES),
    )
    axes.legend()
    return chart


def summary(name, rows):
    """Return a row of the table."""
    excess = [100 * row["excess"] for row in rows]
    gaps = [100 * row["gap"] for row in rows]
    return (
        name,
        len(rows),
        np.median([row["ratio"] for row in rows]),
        np.median(excess),
        np.max(excess),
        np.mean(np.less_equal(excess, 0.1)),
        np.median(gaps),
        np.max(gaps),
    )


def main():
    """Run the benchmark, and write `continuation.json` and `continuation.png`."""
    options = script.parser(__doc__)
    options.add_argument("--samples", type=int, help="number of matrices of each kind")
    options.add_argument("--weights", type=Path, help="safetensors file of GPT-2")
    given = options.parse_args()
    experiment = QUICK if given.quick else Experiment()
    experiment = replace(experiment, weights=given.weights)
    if given.samples:
        experiment = replace(experiment, samples=given.samples)
    rows, large = random_suite(experiment), weight_matrices(experiment)
    groups = {
        f"{name}, rank {rank}, {100 * tolerance:g} %": [
            row for row in group if (row["rank"], row["tolerance"]) == (rank, tolerance)
        ]
        for name, group in (("random", rows), ("GPT-2", large))
        for rank in sorted({row["rank"] for row in group})
        for tolerance in TOLERANCES
    }
    script.table(
        "Adaptive, by tolerance, against doubling",
        (
            "matrices",
            "number",
            "products",
            "excess %",
            "largest",
            "within 0.1 %",
            "gap %",
            "largest gap",
        ),
        [summary(name, group) for name, group in groups.items()],
    )
    targets = targets_of(rows, "random")
    if large:
        targets += targets_of(large, "GPT-2")
        for key, limit in (("products", 2500), ("gap", 1e-2)):
            largest = max(r[key] for r in large if r["tolerance"] == TOLERANCE)
            targets.append(script.Target(f"GPT-2: largest {key}", largest, limit))
    else:
        print("GPT-2: not run, as no --weights were given.")
    script.print_targets(targets)
    results = {
        "quick": given.quick,
        "samples": experiment.samples,
        "tolerance": TOLERANCE,
        "tolerances": TOLERANCES,
        "targets": [target.plain() for target in targets],
        "random": rows,
        "gpt2": large,
    }
    script.publish("continuation", results, draw_figure(rows, large), given.out)


if __name__ == "__main__":
    main()
