"""Comparison of approximations with truncated SVD and Van Loan, as tables and JSON.

Truncated SVD stores `m + n` numbers per unit of rank, so the rank of equal parameter
count is `⌊parameters / (m + n)⌋`, and its spectral error is the next singular value.
Everything here is computed in float64.

References: Eckart and Young (1936); Van Loan and Pitsianis (1993).

>>> import numpy as np
>>> baseline = svd_baseline(np.diag([3.0, 2.0, 1.0]), num_parameters=11)
>>> baseline.rank, float(baseline.spectral)
(1, 2.0)
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from kronjax import display, selection
from kronjax.io.json_values import jsonable

if TYPE_CHECKING:
    from kronjax.approximation import Approximation
    from kronjax.proof.certificate import Certificate
    from kronjax.selection import Search

LARGE = 2048
"""Size above which singular values come from the Gram matrix, in half the time."""

TIE = 1e-4
"""Relative difference below which two errors count as equal."""


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Truncated SVD with as many parameters as a Kronecker sum.

    Attributes:
        rank: Rank of the truncated SVD, possibly 0.
        num_parameters: `rank (m + n)`.
        spectral: `[...]`, spectral errors.
        frobenius: `[...]`, Frobenius errors.
        spectral_norm: `[...]`, spectral norms of the matrices.
    """

    rank: int
    num_parameters: int
    spectral: np.ndarray
    frobenius: np.ndarray
    spectral_norm: np.ndarray

    def __repr__(self) -> str:
        """Return the rank and both errors; median and worst of a batch."""
        rows = [
            ("rank", str(self.rank)),
            ("parameters", f"{self.num_parameters:,}"),
            ("spectral error", display.spread(self.spectral)),
            ("Frobenius error", display.spread(self.frobenius)),
        ]
        return "\n".join(display.lines("Truncated SVD", rows))


def svd_baseline(matrix: np.ndarray, num_parameters: int) -> Baseline:
    """Return the errors of truncated SVD of equal parameter count.

    The matrix as given is converted to float64; the rounding of a solver in float32
    has no effect. Costs the singular values of every matrix.

    Args:
        matrix: `[..., m, n]`, any real dtype; not modified.
        num_parameters: Number of parameters allowed for one matrix.

    Returns:
        `Baseline`, float64 `[...]`, of rank `⌊num_parameters / (m + n)⌋`, or
        `min(m, n)` if that is smaller.
    """
    m, n = matrix.shape[-2:]
    rank = min(num_parameters // (m + n), m, n)
    matrix = matrix.astype(np.float64)
    # The Gram matrix must neither overflow nor underflow.
    scale = np.max(np.abs(matrix), axis=(-2, -1), keepdims=True)
    matrix /= np.where(scale > 0, scale, 1)
    if min(m, n) > LARGE:
        x = matrix if m >= n else matrix.swapaxes(-1, -2)
        squares = np.linalg.eigvalsh(x.swapaxes(-1, -2) @ x)[..., ::-1]
        s = np.sqrt(np.maximum(squares, 0))
    else:
        s = np.linalg.svd(matrix, compute_uv=False)
    s = np.append(s * scale[..., 0], np.zeros((*s.shape[:-1], 1)), axis=-1)
    unit = scale[..., 0, 0]
    tail = s[..., rank:] / np.where(unit > 0, unit, 1)[..., None]
    frobenius = unit * np.sqrt(np.sum(tail**2, axis=-1))
    return Baseline(rank, rank * (m + n), s[..., rank], frobenius, s[..., 0])


def summary(approximation: "Approximation", baseline: Baseline) -> dict[str, Any]:
    """Return all results of an approximation as plain Python values.

    Args:
        approximation: The approximation of one matrix or of a batch.
        baseline: Truncated SVD of the same matrices; with weights, of the whitened
            matrices.

    Returns:
        A dictionary that JSON can hold. Numbers that belong to one matrix are lists for
        a batch; numbers that are not finite are None. `a_shape`, `b_shape` and `rank`
        are those of the first configuration; the weighted errors are None without
        weights.
    """
    terms = approximation.terms[0]
    weighted, ratio = approximation.weighted, approximation.weighted_relative
    error, van_loan = approximation.error, approximation.van_loan
    return jsonable(
        {
            "shape": approximation.shape,
            "batch": np.shape(approximation.status),
            "a_shape": terms.a.shape[-2:],
            "b_shape": terms.b.shape[-2:],
            "rank": terms.a.shape[-3],
            "configurations": [
                {
                    "a_shape": each.a.shape[-2:],
                    "b_shape": each.b.shape[-2:],
                    "rank": each.rank,
                }
                for each in approximation.terms
            ],
            "num_parameters": approximation.num_parameters,
            "spectral_error": error.spectral,
            "frobenius_error": error.frobenius,
            "relative_spectral_error": approximation.relative.spectral,
            "relative_frobenius_error": approximation.relative.frobenius,
            "weighted_spectral_error": weighted and weighted.spectral,
            "weighted_frobenius_error": weighted and weighted.frobenius,
            "relative_weighted_spectral_error": ratio and ratio.spectral,
            "relative_weighted_frobenius_error": ratio and ratio.frobenius,
            "van_loan_spectral_error": van_loan.spectral,
            "van_loan_frobenius_error": van_loan.frobenius,
            "svd_rank": baseline.rank,
            "svd_num_parameters": baseline.num_parameters,
            "svd_spectral_error": baseline.spectral,
            "svd_frobenius_error": baseline.frobenius,
            "status": display.statuses(approximation),
            "products": approximation.products,
            "seconds": approximation.seconds,
            "compile_seconds": approximation.compile_seconds,
            "notes": approximation.notes,
            "trace": {
                field.name: getattr(approximation.trace, field.name)
                for field in dataclasses.fields(approximation.trace)
            },
        }
    )


def comparison(approximation: "Approximation", baseline: Baseline) -> Table:
    """Return the table kronjax / truncated SVD / Van Loan; means over a batch.

    With weights all errors are weighted, and the baseline must be weighted, too.
    """
    count = np.size(approximation.status)
    error, van_loan = approximation.weighted, approximation.van_loan
    kind = "weighted " if error is not None else ""
    error = error if error is not None else approximation.error
    ours = approximation.num_parameters
    table = Table(caption=f"means over {count} matrices" if count > 1 else None)
    table.add_column("method", no_wrap=True)
    names = f"{kind}spectral error", "relative", f"{kind}Frobenius error"
    for name in ("parameters", *names):
        table.add_column(name, justify="right")
    norm = np.where(baseline.spectral_norm > 0, baseline.spectral_norm, 1)
    for method, parameters, spectral, frobenius in (
        ("kronjax", ours, error.spectral, error.frobenius),
        (
            f"SVD, rank {baseline.rank}",
            baseline.num_parameters,
            baseline.spectral,
            baseline.frobenius,
        ),
        ("Van Loan", ours, van_loan.spectral, van_loan.frobenius),
    ):
        means = (np.mean(x) for x in (spectral, spectral / norm, frobenius))
        table.add_row(method, f"{parameters:,}", *(f"{x:.5g}" for x in means))
    return table


def verdict(approximation: "Approximation", baseline: Baseline) -> str:
    """Return a sentence that names the method with the smaller mean spectral error.

    For a batch a second sentence counts the matrices on which another method has a
    smaller error. Errors that differ by rounding only count as equal.
    """
    kind = "spectral error"
    errors = approximation.weighted or approximation.error
    if approximation.weighted is not None:
        kind = "weighted spectral error"
    ours = np.ravel(errors.spectral)
    peers = {
        "truncated SVD": np.ravel(baseline.spectral),
        "Van Loan": np.ravel(approximation.van_loan.spectral),
    }
    slack = TIE * ours + 1e-6 * np.ravel(baseline.spectral_norm)
    mean, mean_slack = float(np.mean(ours)), float(np.mean(slack))
    means = {name: float(np.mean(errors)) for name, errors in peers.items()}
    winner = min(means, key=lambda name: means[name])
    if means[winner] < mean - mean_slack:
        name, share = winner[0].upper() + winner[1:], _percent(means[winner], mean)
        return f"{name} wins: its {kind} is {share} below that of kronjax."
    parts = [
        f"{_percent(mean, theirs)} below {name}"
        if theirs > mean + mean_slack
        else f"equal to {name}"
        for name, theirs in means.items()
    ]
    lines = [f"The {kind} of kronjax is {' and '.join(parts)}."]
    for name, errors in peers.items():
        count = np.count_nonzero(errors < ours - slack)
        if count:  # only possible in a batch
            lines.append(f"On {count} of {ours.size} matrices {name} wins.")
    return " ".join(lines)


def trials(search: "Search") -> Table:
    """Return the table of the trials of a search, by rising error.

    A star marks the trials on the Pareto front of error, parameters and multiply-adds;
    a tilde marks the errors of trials with a reduced budget.
    """
    table = Table()
    # Seconds to compile are in the JSON: the table has to fit 80 columns.
    kind, terms, *numbers = selection.COLUMNS
    table.add_column(kind, no_wrap=True)
    table.add_column(terms)
    for name in numbers:
        table.add_column(name, justify="right", min_width=len(name))
    for trial in search.trials:
        table.add_row(*trial.cells())
    return table


def certified(certificate: "Certificate") -> dict[str, Any]:
    """Return a certificate as values that JSON holds, with None for what is unknown."""
    bound, second = certificate.global_bound, certificate.second_order
    return jsonable(
        {
            "local_bound": certificate.local_bound,
            "local_gap": certificate.local_gap,
            "global_bound": np.where(bound > 0, bound, np.nan),
            "kkt_residual": certificate.kkt_residual,
            "second_order": second if np.all(second != "") else None,
        }
    )


def effort(approximation: "Approximation") -> str:
    """Return one line with the status, the products and the seconds of a solve."""
    return f"Status: {display.effort(approximation)}."


def _percent(smaller: float, larger: float) -> str:
    return f"{100 * (1 - smaller / larger):.3g} %"
