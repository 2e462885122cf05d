"""The report of a run as one self-contained HTML page, finished or not."""

from collections.abc import Iterable, Sequence

from kronjax import pages
from kronjax.io.atomic import printable
from kronjax.runs import plan, summary
from kronjax.runs.plan import MatrixTask
from kronjax.runs.store import FAILED
from kronjax.runs.summary import Factorization

NAME = "report.html"
"""The file beside the factors."""

_HEADS = (
    "matrix",
    "shape",
    "becomes",
    "of dense",
    "error",
    "Frobenius",
    "gap",
    "products",
    "note",
)


def write(results: Factorization) -> str | None:
    """Write the page into the store; return the reason if that is impossible.

    A missing page is no reason to fail.
    """
    try:
        results.store.place.write(NAME, page(results).encode())
    except (OSError, ValueError) as error:
        return printable(str(error))
    return None


def page(results: Factorization) -> str:
    """Return the page of a run."""
    parts = [pages.paragraph(line) for line in summary.verdict(results).split("\n")]
    parts += [
        "<h2>Where the parameters are</h2>",
        pages.budget([_share(task, results) for task in results.plan.tasks]),
        "<h2>Errors</h2>",
        _errors(results),
        "<h2>Matrices</h2>",
        pages.paragraph(
            "Errors are over the norm of the matrix, the spectral one unless it says "
            "otherwise. A click on the name of a column sorts.",
            is_quiet=True,
        ),
        pages.table(_HEADS, _rows(results), left=(0, 2, 8), sorts=True),
    ]
    settings = results.plan.settings
    parts.append(
        pages.paragraph(
            f"Tolerance {settings.tolerance:g}, starts {settings.num_starts}, seed "
            f"{settings.seed}; plan {results.plan.hash[:12]}.",
            is_quiet=True,
        )
    )
    return pages.page(f"{results.plan.source}, factorized", parts)


def _group(task: MatrixTask) -> str:
    return f"{task.shape[0]}×{task.shape[1]}, {plan.describe(task.configurations)}"


def _share(task: MatrixTask, results: Factorization) -> pages.Share:
    done = results.records.get(task.index, {}).get("status")
    is_dense = done == FAILED
    kept = task.size if is_dense else task.parameters
    return pages.Share(task.name, _group(task), task.size, kept)


def _errors(results: Factorization) -> str:
    groups: dict[str, list[tuple[float, float, str]]] = {}
    for task, record in results.solved:
        point = float(record["index"]), record["errors"]["relative_spectral"], task.name
        groups.setdefault(_group(task), []).append(point)
    series = []
    for name, points in groups.items():
        x, y, labels = zip(*points, strict=True)
        series.append(pages.Points(name, x, y, labels))
    return pages.chart(series, "number of the matrix", "spectral error over the norm")


def _rows(results: Factorization) -> Iterable[Sequence[str]]:
    for name, reason in results.dense.items():
        yield name, "", "", "100.0 %", "", "", "", "", f"stays dense: {reason}"
    solved = {task.index: record for task, record in results.solved}
    failed = {task.index: reason for task, reason in results.failed}
    for task in results.plan.tasks:
        shape = f"{task.shape[0]}×{task.shape[1]}"
        cells = [task.name, shape, plan.describe(task.configurations)]
        cells.append(f"{100 * task.parameters / max(task.size, 1):.1f} %")
        record = solved.get(task.index)
        if record is None:
            words = failed.get(task.index)
            reason = f"stays dense: {words}" if words else "not finished"
            yield *cells, "", "", "", "", reason
            continue
        errors, gap = record["errors"], record["bounds"]["gap"]
        yield (
            *cells,
            f"{errors['relative_spectral']:.4g}",
            f"{errors['relative_frobenius']:.4g}",
            "" if gap is None else f"{100 * gap:.2g} %",
            f"{record.get('products', 0):,}",
            "",
        )
