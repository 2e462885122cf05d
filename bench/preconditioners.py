"""Condition numbers of preconditioned operators: kronjax, weighted Frobenius, Van Loan.

All sums have as many products of the same shapes, and the best scale. The weighted
Frobenius fit (what alternating least squares minimises) is computed to convergence in
the parametrisation and from the starts of kronjax, and of its results the one with the
least condition number counts. Van Loan's sum is the nearest to the matrix, or to its
inverse, in the Frobenius norm. Then conjugate gradients: iterations and seconds with
many right-hand sides, beside Jacobi, incomplete LU, algebraic multigrid and fast
diagonalisation.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg

import kronjax
from bench import grids, script
from kronjax import Configuration
from kronjax.kronecker import rearrange
from kronjax.linalg.dense import multiply_out
from kronjax.operators import preconditioning

FORMS = ((1, False), (2, False), (1, True), (2, True), (3, True))
"""Ranks, and whether the sum is near the inverse."""


@dataclass(frozen=True)
class Experiment:
    """Sizes and numbers."""

    sizes: tuple[int, ...] = (12, 16)
    starts: int = 4
    grid: int = 24
    columns: tuple[int, ...] = (1, 10, 100, 1000)
    cases: int = 100


def condition(near, matrix, inverse):
    """Return the condition number of `near⁻¹ A` or `near A`; inf if not definite."""
    near = (near + near.T) / 2
    lower = np.linalg.cholesky(matrix)
    if inverse:
        values = np.linalg.eigvalsh(lower.T @ near @ lower)
    else:
        image = scipy.linalg.solve_triangular(lower, near, lower=True)
        image = scipy.linalg.solve_triangular(lower, image.T, lower=True)
        values = np.linalg.eigvalsh((image + image.T) / 2)
    return values[-1] / values[0] if values[0] > 0 else np.inf


def van_loan(matrix, n, rank, inverse):
    target = np.linalg.inv(matrix) if inverse else matrix
    u, s, vt = np.linalg.svd(np.asarray(rearrange(target, (n, n))))
    a = (u[:, :rank] * s[:rank]).T.reshape(rank, n, n)
    return condition(multiply_out(a, vt[:rank].reshape(rank, n, n)), matrix, inverse)


def compare(name, n, matrix, experiment):
    """Return the rows of one matrix."""
    plain = np.linalg.cond(matrix)
    rows = []
    for rank, inverse in FORMS:
        form = Configuration((n, n), rank)
        options = {"inverse": inverse, "num_starts": experiment.starts}
        ours = kronjax.preconditioner(matrix, form, progress=False, **options)
        near = np.asarray(multiply_out(ours.terms.a, ours.terms.b))
        measured = condition(near, matrix, inverse)
        frobenius = preconditioning.frobenius(matrix, form, **options)
        rows.append(
            {
                "case": name,
                "size": n,
                "rank": rank,
                "inverse": inverse,
                "condition": plain,
                "kronjax": measured,
                "bound": ours.condition_bound,
                "frobenius": condition(frobenius.to_matrix(), matrix, inverse),
                "van_loan": van_loan(matrix, n, rank, inverse),
                "seconds": ours.seconds,
            }
        )
    return rows


def iterate(matrix, columns, operator):
    """Return the mean iterations to 1e-8 and the seconds of all right-hand sides."""
    sparse = scipy.sparse.csr_array(matrix)
    right = np.random.default_rng(0).standard_normal((len(matrix), columns))
    counts, begun = [], time.perf_counter()
    for b in right.T:
        count = []
        scipy.sparse.linalg.cg(
            sparse, b, rtol=1e-8, M=operator, maxiter=5000, callback=count.append
        )
        counts.append(len(count))
    return float(np.mean(counts)), time.perf_counter() - begun


def peers(matrix, n):
    """Yield names, builders of preconditioners; each returns a linear operator."""
    import pyamg

    sparse = scipy.sparse.csc_array(matrix)
    size = matrix.shape

    def operator(apply):
        linear: Any = scipy.sparse.linalg.LinearOperator
        return linear(size, matvec=apply)

    yield "none", lambda: None
    yield "Jacobi", lambda: operator(lambda x: x / np.diagonal(matrix))
    yield (
        "incomplete LU",
        lambda: operator(
            scipy.sparse.linalg.spilu(sparse, drop_tol=1e-3, fill_factor=10).solve
        ),
    )
    yield (
        "multigrid",
        lambda: pyamg.ruge_stuben_solver(
            scipy.sparse.csr_matrix(matrix)
        ).aspreconditioner(),
    )

    def separable():
        """Fast diagonalisation of `A_1 ⊗ D_2 + D_1 ⊗ A_2`, the mean over lines."""
        tensor = matrix.reshape(n, n, n, n)
        first = np.einsum("ipjp->ij", tensor) / n
        second = np.einsum("ipiq->pq", tensor) / n
        values1, vectors1 = np.linalg.eigh(first - np.diag(np.diagonal(first)) / 2)
        values2, vectors2 = np.linalg.eigh(second - np.diag(np.diagonal(second)) / 2)
        sums = values1[:, None] + values2[None]

        def apply(x):
            y = vectors1.T @ x.reshape(n, n) @ vectors2 / sums
            return (vectors1 @ y @ vectors2.T).ravel()

        return operator(apply)

    yield "fast diagonalisation", separable
    for rank, inverse in FORMS[1:2] + FORMS[-1:]:
        name = f"kronjax, {rank} near {'A^-1' if inverse else 'A'}"
        yield (
            name,
            lambda rank=rank, inverse=inverse: kronjax.preconditioner(
                matrix, Configuration((n, n), rank), inverse=inverse, num_starts=1
            ).as_linear_operator(),
        )


def solve_many(experiment):
    """Return rows of conjugate gradients on one grid."""
    n = experiment.grid
    matrix = grids.diffusion(n, n, grids.waves(1e2))
    rows = []
    for name, build in peers(matrix, n):
        script.say(f"{n}x{n}, conjugate gradients: {name}")
        begun = time.perf_counter()
        operator = build()
        built = time.perf_counter() - begun
        row = {"name": name, "build_seconds": built}
        for columns in experiment.columns:
            row["iterations"], row[f"seconds_{columns}"] = iterate(
                matrix, columns, operator
            )
        rows.append(row)
    return rows


def main(arguments=None):
    options = script.parser(__doc__).parse_args(arguments)
    experiment = Experiment()
    if options.quick:
        experiment = Experiment((4,), 1, 4, (1, 2), 2)
    rows = []
    for n in experiment.sizes:
        for name, matrix in list(grids.cases(n))[: experiment.cases]:
            script.say(f"{n}x{n}: {name}")
            rows += compare(name, n, matrix, experiment)
    script.table(
        "Condition numbers at the best scale",
        ("case", "grid", "terms", "near", "A", "kronjax", "Frobenius", "Van Loan"),
        [
            (
                row["case"],
                f"{row['size']}x{row['size']}",
                row["rank"],
                "inverse" if row["inverse"] else "matrix",
                row["condition"],
                row["kronjax"],
                row["frobenius"],
                row["van_loan"],
            )
            for row in rows
        ],
    )
    solved = solve_many(experiment)
    script.table(
        f"Conjugate gradients to 1e-8, {experiment.grid}x{experiment.grid}",
        ("preconditioner", "iterations", "build s")
        + tuple(f"{x} sides, s" for x in experiment.columns),
        [
            (
                row["name"],
                row["iterations"],
                row["build_seconds"],
                *(row[f"seconds_{x}"] for x in experiment.columns),
            )
            for row in solved
        ],
    )
    gains = np.array([row["frobenius"] / row["kronjax"] for row in rows])
    targets = [
        script.Target(
            "median gain over weighted Frobenius", float(np.median(gains)), 1.5, True
        ),
        script.Target("least gain", float(np.min(gains)), 1, True),
        script.Target(
            "share that is definite",
            float(np.mean([np.isfinite(row["bound"]) for row in rows])),
            1,
            True,
        ),
        script.Target(
            "largest bound over measured",
            float(max(row["bound"] / row["kronjax"] for row in rows)),
            1.01,
        ),
    ]
    script.print_targets(targets)
    chart, axes = script.figure(7, 4)
    (axis,) = axes.flat
    finite = np.isfinite(gains)
    for inverse, marker in ((False, "o"), (True, "s")):
        chosen = [
            i for i, row in enumerate(rows) if row["inverse"] == inverse and finite[i]
        ]
        axis.loglog(
            [rows[i]["frobenius"] for i in chosen],
            [rows[i]["kronjax"] for i in chosen],
            marker,
            label="near the inverse" if inverse else "near the matrix",
        )
    ends = [1, max(float(row["condition"]) for row in rows)]
    axis.plot(ends, ends, color="tab:gray", linewidth=1)
    axis.set(xlabel="condition number, weighted Frobenius", ylabel="spectral (kronjax)")
    axis.legend()
    # An infinite condition number is no number in JSON.
    rows = [
        {k: x if not isinstance(x, float) or np.isfinite(x) else None for k, x in y}
        for y in (row.items() for row in rows)
    ]
    results = {
        "quick": options.quick,
        "experiment": asdict(experiment),
        "rows": rows,
        "conjugate_gradients": solved,
        "targets": [target.plain() for target in targets],
    }
    script.publish("preconditioners", results, chart, options.out)


if __name__ == "__main__":
    main()
