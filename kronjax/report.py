"""What an approximation amounts to: against truncated SVD and Van Loan, and as JSON.

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
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from kronjax.solver.descent import Status

if TYPE_CHECKING:
    from kronjax.approximation import Approximation
    from kronjax.selection import Search

LARGE = 2048
"""Beyond this size singular values come from the Gram matrix, in half the time."""

TIE = 1e-4
"""Relative difference of errors below which nobody wins."""


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Truncated SVD of the parameter count of a Kronecker sum.

    Attributes:
        rank: The rank kept, possibly 0.
        num_parameters: `rank (m + n)`.
        spectral: `[...]`, spectral errors.
        frobenius: `[...]`, Frobenius errors.
        spectral_norm: `[...]`, spectral norms of the matrices themselves.
    """

    rank: int
    num_parameters: int
    spectral: np.ndarray
    frobenius: np.ndarray
    spectral_norm: np.ndarray


def svd_baseline(matrix: np.ndarray, num_parameters: int) -> Baseline:
    """Return the errors of truncated SVD of equal parameter count.

    They are those of the matrix as given, of which float64 is taken: not of what a
    solver in float32 rounds it to. Costs the singular values of every matrix.

    Args:
        matrix: `[..., m, n]`, any real dtype; left as it is.
        num_parameters: Numbers that may be stored for one matrix.

    Returns:
        `Baseline`, float64 `[...]`, of rank `⌊num_parameters / (m + n)⌋`, or
        `min(m, n)` if that is less.
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


def statuses(approximation: "Approximation") -> Any:
    """Return the names of the statuses: a string, or lists of strings for a batch."""
    codes = np.asarray(approximation.status)
    names = np.vectorize(lambda code: Status(int(code)).name.lower(), otypes=[object])
    return names(codes).tolist() if codes.ndim else str(names(codes))


def summary(approximation: "Approximation", baseline: Baseline) -> dict[str, Any]:
    """Return everything known about an approximation as plain Python values.

    Args:
        approximation: Of one matrix or a batch.
        baseline: Of the same matrices; with weights, of the whitened ones.

    Returns:
        A dictionary that JSON can hold. Numbers that belong to a matrix are lists for
        a batch; what is not finite is None. `a_shape`, `b_shape` and `rank` are those
        of the first configuration; the weighted errors are None without weights.
    """
    terms = approximation.terms[0]
    weighted, ratio = approximation.weighted, approximation.weighted_relative
    error, van_loan = approximation.error, approximation.van_loan
    return plain(
        {
            "shape": approximation.shape,
            "batch": np.shape(approximation.status),
            "a_shape": terms.a.shape[-2:],
            "b_shape": terms.b.shape[-2:],
            "rank": terms.a.shape[-3],
            "configurations": [
                {
                    "a_shape": one.a.shape[-2:],
                    "b_shape": one.b.shape[-2:],
                    "rank": one.rank,
                }
                for one in approximation.terms
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
            "status": statuses(approximation),
            "gemms": approximation.gemms,
            "seconds": approximation.seconds,
            "compile_seconds": approximation.compile_seconds,
            "notes": approximation.notes,
            "trace": {
                field.name: getattr(approximation.trace, field.name)
                for field in dataclasses.fields(approximation.trace)
            },
        }
    )


def plain(value: Any) -> Any:
    """Return `value` made of what JSON knows, with None for what is not finite."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return plain(np.asarray(value).tolist())


def comparison(approximation: "Approximation", baseline: Baseline) -> Table:
    """Return the table kronjax / truncated SVD / Van Loan; means over a batch.

    With weights all errors are weighted, and the baseline must be.
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
    """Say who has the smaller spectral error: in the mean, and where that is not all.

    Errors at the level of rounding are equally good.
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
        if count:  # then there are several
            lines.append(f"On {count} of {ours.size} matrices {name} wins.")
    return " ".join(lines)


def trials(found: "Search") -> Table:
    """Return the table of what a search tried, by rising error.

    A star marks what nothing else beats in error, parameters and multiply-adds at once,
    a tilde the error of what was tried in haste.
    """
    table = Table()
    table.add_column("kind", no_wrap=True)
    table.add_column("left factors, terms")
    # Seconds to compile are in the JSON: the table has to fit 80 columns.
    for name in ("parameters", "multiply-adds", "error", "s"):
        table.add_column(name, justify="right", min_width=len(name))
    for trial in found.trials:
        terms = (
            f"{m}x{n}, {c.rank}" for c in trial.configurations for m, n in [c.a_shape]
        )
        table.add_row(
            trial.kind + " *" * trial.is_efficient,
            "; ".join(terms),
            f"{trial.num_parameters:,}",
            f"{trial.multiply_adds:,}",
            f"{trial.error:.5g}" + "~" * (not trial.is_full),
            f"{trial.seconds:.2f}",
        )
    return table


def certified(approximation: "Approximation") -> dict[str, Any]:
    """Return what is proven as values that JSON holds; null what is not known."""
    found = dataclasses.asdict(approximation.certificate)
    bound = found["global_bound"]
    return plain(
        {
            "local_bound": found["local_bound"],
            "local_gap": found["local_gap"],
            "global_bound": np.where(bound > 0, bound, np.nan),
            "kkt_residual": found["kkt_residual"],
            "second_order": None
            if approximation.finishes is None
            else found["second_order"],
        }
    )


def proven(approximation: "Approximation") -> str:
    """Return lines that say how good the answer is, provably; means over a batch."""
    found = approximation.certificate
    error, gap, bound = (
        float(np.mean(x)) for x in (found.error, found.local_gap, found.global_bound)
    )
    lines = [
        f"spectral error  {error:<9.5g} local gap ≤ {100 * gap:.2g} %   (no change of "
        "all A_k or of all B_k can improve it by more)"
    ]
    if bound > 0:
        rank = approximation.terms[0].rank
        lines.append(
            f"global bound    {bound:<9.5g} value / bound {error / bound:.3g}   (no "
            f"sum of {rank} such terms can be below the bound)"
        )
    if approximation.finishes is not None:
        count = np.ravel(found.second_order).tolist().count("strict local minimum")
        many = np.size(approximation.status)
        lines.append(
            f"second order    {'strict local minimum' if count else 'not proven'}"
            + (f" for {count} of {many}" if many > 1 else "")
            + f", KKT residual {np.max(found.kkt_residual):.1g}"
        )
    return "\n".join(lines)


def effort(approximation: "Approximation") -> str:
    """Return one line on how the solve ended and what it cost."""
    names, counts = np.unique(np.ravel(statuses(approximation)), return_counts=True)
    many = np.size(approximation.status) > 1
    status = ", ".join(
        f"{name} ({count})" if many else str(name)
        for name, count in zip(names, counts, strict=True)
    )
    gemms = f"{np.mean(approximation.gemms):,.0f} GEMMs" + " per matrix" * many
    return (
        f"Status: {status}; {gemms}; {approximation.seconds:.2f} s, and "
        f"{approximation.compile_seconds:.2f} s to compile."
    )


def _percent(smaller: float, larger: float) -> str:
    return f"{100 * (1 - smaller / larger):.3g} %"
