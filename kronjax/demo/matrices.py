"""Demonstration on random matrices: errors of short sums of Kronecker products.

Matrices of shape 36×36 with independent N(0, 1) entries are approximated by sums of 1,
3 and 6 products of 6×6 factors. Truncated SVD of the same rank and Van Loan's sum have
the same number of parameters. All errors are spectral norms. The matrices are solved
together as one batch for each rank.
"""

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.table import Table

import kronjax
from kronjax import report

SIZE = 36
FACTOR = 6
RANKS = (1, 3, 6)


@dataclasses.dataclass(frozen=True)
class Errors:
    """Spectral errors of all matrices at one rank, `[matrices]` each."""

    rank: int
    kronjax: np.ndarray
    van_loan: np.ndarray
    svd: np.ndarray
    seconds: float
    compile_seconds: float

    @property
    def wins(self) -> int:
        """Number of matrices on which kronjax has the smallest error."""
        return int(np.sum(self.kronjax < np.minimum(self.van_loan, self.svd)))


def run(say: Callable[[str], None], matrices: int = 20, seed: int = 0) -> list[Errors]:
    """Solve random matrices at every rank.

    Args:
        say: Callback with the name of the next step.
        matrices: Number of matrices.
        seed: Seed of the matrices.
    """
    shape = (matrices, SIZE, SIZE)
    samples = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    results = []
    for rank in RANKS:
        say(f"rank {rank}: {matrices} matrices")
        results.append(solve(samples, rank))
    return results


def solve(samples: np.ndarray, rank: int) -> Errors:
    """Approximate all `samples`, `[matrices, 36, 36]`, by sums of `rank` products."""
    configuration = kronjax.Configuration((FACTOR, FACTOR), rank)
    approximation = kronjax.approximate(samples, configuration, progress=False)
    baseline = report.svd_baseline(samples, approximation.num_parameters)
    return Errors(
        rank=rank,
        kronjax=np.asarray(approximation.error.spectral),
        van_loan=np.asarray(approximation.van_loan.spectral),
        svd=baseline.spectral,
        seconds=approximation.seconds,
        compile_seconds=approximation.compile_seconds,
    )


def plain(errors: Errors) -> dict[str, Any]:
    """Return mean errors as values that JSON holds."""
    return {
        "rank": errors.rank,
        "matrices": errors.kronjax.size,
        "wins": errors.wins,
        **{
            name: float(np.mean(getattr(errors, name)))
            for name in ("kronjax", "van_loan", "svd")
        },
    }


def table(results: list[Errors]) -> Table:
    """Return the mean errors of every rank as a table."""
    count = results[0].kronjax.size
    result = Table(
        title=f"Mean spectral error, {count} matrices {SIZE}×{SIZE}, entries N(0, 1)",
        caption="at equal parameter count; wins: kronjax below both others",
    )
    for name in ("rank", "kronjax", "Van Loan", "SVD", "SVD / kronjax", "wins"):
        result.add_column(name, justify="right")
    for errors in results:
        ours, van_loan, svd = (
            float(np.mean(x)) for x in (errors.kronjax, errors.van_loan, errors.svd)
        )
        result.add_row(
            str(errors.rank),
            *(f"{mean:.3f}" for mean in (ours, van_loan, svd, svd / ours)),
            f"{errors.wins}/{count}",
        )
    return result


def figure(results: list[Errors]) -> bytes:
    """Return a PNG of spectral error against rank: medians and 10 to 90 % bands."""
    # pyplot would choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chart = Figure(figsize=(7, 4.4), dpi=150, layout="constrained")
    axes = chart.add_subplot()
    ranks = [errors.rank for errors in results]
    series = (
        ("Van Loan", "van_loan", "tab:gray", "^"),
        ("truncated SVD", "svd", "tab:orange", "s"),
        ("kronjax", "kronjax", "tab:blue", "o"),
    )
    for label, name, color, marker in series:
        values = np.stack([getattr(errors, name) for errors in results])
        low, median, high = np.quantile(values, (0.1, 0.5, 0.9), axis=1)
        axes.fill_between(ranks, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(ranks, median, color=color, marker=marker, label=label)
    axes.set_xticks(ranks)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"Kronecker rank ({2 * FACTOR**2} parameters per unit)")
    axes.set_ylabel("spectral error ‖T − K‖₂")
    axes.set_title(_title(results), fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    FigureCanvasAgg(chart).print_png(buffer)
    return buffer.getvalue()


def _title(results: list[Errors]) -> str:
    """Return a title that names the count of matrices on which kronjax wins."""
    count = results[0].kronjax.size
    wins = sum(errors.wins for errors in results)
    total = count * len(results)
    share = "every" if wins == total else f"{wins} of {total}"
    return (
        f"{count} random {SIZE}×{SIZE} matrices, median and 10–90 % band:\n"
        f"kronjax is nearest in {share} case{'s' if wins != total else ''} "
        "at equal parameter count"
    )
