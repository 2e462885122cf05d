"""Short texts and HTML tables of results: at most ten lines, and never an array.

A number that belongs to one matrix is printed as it is. The numbers of a batch are
printed as their median and their worst, which is the largest. The texts are ASCII, so
that any console and any log file can hold them.

>>> spread(1 / 3), spread([1.0, 2.0, 6.0])
('0.33333', 'median 2, worst 6')
"""

import html
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kronjax.solver.descent import Status

WIDTH = 88
"""Number of columns after which a line is cut."""

MOST_TERMS = 3
"""Number of configurations that are printed one by one."""

Rows = Sequence[tuple[str, str]]


def spread(values: Any, form: str = ".5g", unit: str = "") -> str:
    """Return a scalar as text, or the median and the largest number of a batch.

    Numbers that are not finite are counted, and left out of the median.

    Args:
        values: Scalar or array of any shape.
        form: Format of each number.
        unit: Text that follows each number.
    """
    numbers = np.asarray(values, np.float64)
    if numbers.size == 1:
        return format(float(numbers.ravel()[0]), form) + unit
    finite = numbers[np.isfinite(numbers)]
    rest = numbers.size - finite.size
    if not finite.size:
        return "not finite"
    median, worst = (f"{x:{form}}{unit}" for x in (np.median(finite), np.max(finite)))
    text = f"median {median}, worst {worst}"
    return text + f", {rest} not finite" * (rest > 0)


def counts(values: Any) -> str:
    """Return a name, or for a batch each name with its count: `a (3), b (1)`."""
    names = np.ravel(values).tolist()
    if len(names) == 1:
        return str(names[0])
    return ", ".join(f"{name} ({names.count(name)})" for name in sorted(set(names)))


def formula(parts: Iterable[tuple[int, tuple[int, ...], tuple[int, ...]]]) -> str:
    """Return the text of a sum of Kronecker products.

    Args:
        parts: Number of terms, shape of the left factors and shape of the right factors
            for each configuration.

    >>> formula([(3, (6, 6), (6, 6)), (1, (36, 1), (1, 36))])
    '3 kron(6x6, 6x6) + 1 kron(36x1, 1x36)'
    """
    texts = [f"{rank} kron({a[0]}x{a[1]}, {b[0]}x{b[1]})" for rank, a, b in list(parts)]
    if len(texts) > MOST_TERMS:
        texts[MOST_TERMS:] = [f"{len(texts) - MOST_TERMS} more"]
    return " + ".join(texts)


def parameters(number: int, shape: tuple[int, int]) -> str:
    """Return a number of parameters and its share of the dense matrix."""
    dense = shape[0] * shape[1]
    return f"{number:,}, {number / dense:.1%} of the {dense:,} of the dense matrix"


def lines(title: str, rows: Rows) -> list[str]:
    """Return the title, and one line with aligned values for each row."""
    width = max((len(label) for label, _ in rows), default=0)
    return [
        textwrap.shorten(title, WIDTH, placeholder=" ..."),
        *(f"  {label:<{width}}  {_shortened(text, width)}" for label, text in rows),
    ]


def _shortened(text: str, width: int) -> str:
    return textwrap.shorten(text, WIDTH - width - 4, placeholder=" ...")


def table(title: str, rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Return an HTML table: a caption, an optional header, and text in every cell."""

    def row(cells: Sequence[str], kind: str) -> str:
        inner = "".join(
            f'<{kind} style="text-align: left">{html.escape(cell)}</{kind}>'
            for cell in cells
        )
        return f"<tr>{inner}</tr>"

    head = [f"<thead>{row(header, 'th')}</thead>"] if header else []
    caption = f"<caption>{html.escape(title)}</caption>"
    body = "".join(row(cells, "td") for cells in rows)
    return "".join(["<table>", caption, *head, "<tbody>", body, "</tbody></table>"])


def statuses(approximation: Any) -> Any:
    """Return the names of the statuses: a string, or nested lists for a batch."""
    codes = np.asarray(approximation.status)
    names = np.vectorize(lambda code: Status(int(code)).name.lower(), otypes=[object])
    return names(codes).tolist() if codes.ndim else str(names(codes))


def effort(approximation: Any) -> str:
    """Return one line with the status, the products and the seconds of a solve."""
    many = np.size(approximation.status) > 1
    products = f"{np.mean(approximation.products):,.0f} products" + " per matrix" * many
    return (
        f"{counts(statuses(approximation))}; {products}; {approximation.seconds:.2f} "
        f"s, and {approximation.compile_seconds:.2f} s to compile"
    )


def summary_lines(approximation: Any) -> list[str]:
    """Return the text of an approximation, at most ten lines.

    Args:
        approximation: Object with the attributes of `Approximation`.
    """
    return lines(*_summary(approximation))


def summary_html(approximation: Any) -> str:
    """Return the table of an approximation for notebooks.

    Args:
        approximation: Object with the attributes of `Approximation`.
    """
    title, rows = _summary(approximation)
    return table(title, rows)


def _summary(approximation: Any) -> tuple[str, list[tuple[str, str]]]:
    """Return the title, and at most nine rows."""
    shape, terms = approximation.shape, approximation.terms
    m, n = shape
    count = np.size(approximation.status)
    which = f"a {m}x{n} matrix" if count == 1 else f"{count} matrices of {m}x{n}"
    weighted = approximation.weighted is not None
    kind = "weighted " if weighted else ""
    norms = approximation.weighted if weighted else approximation.error
    ratios = approximation.weighted_relative if weighted else approximation.relative
    parts = ((x.rank, x.a.shape[-2:], x.b.shape[-2:]) for x in terms)
    rows = [
        ("terms", formula(parts)),
        ("parameters", parameters(approximation.num_parameters, shape)),
        ("spectral error", _error(norms.spectral, ratios.spectral)),
        ("Frobenius error", _error(norms.frobenius, ratios.frobenius)),
        ("Van Loan's sum", _both(approximation.van_loan)),
    ]
    if weighted:
        rows.append(("without weights", _both(approximation.error)))
    rows.append(("status", effort(approximation)))
    if approximation.certificate is not None:
        rows.append(("local gap", gap(approximation.certificate.local_gap)))
    if approximation.notes:
        rows.append(("notes", "; ".join(approximation.notes)))
    title = f"Approximation of {which} in {terms[0].a.dtype}"
    return title + f", {kind}errors" * weighted, rows


def gap(values: Any) -> str:
    """Return a gap, or those of a batch, as a percentage."""
    return f"{spread(100 * np.asarray(values), '.2g', ' %')} of the error, at most"


def _error(absolute: Any, relative: Any) -> str:
    return f"{spread(absolute)} (relative: {spread(relative, '.4g')})"


def _both(norms: Any) -> str:
    """Return both norms, or the medians of both."""
    spectral, frobenius = (np.median(x) for x in (norms.spectral, norms.frobenius))
    of_batch = "medians: " * (np.size(norms.spectral) > 1)
    return f"{of_batch}spectral {spectral:.5g}, Frobenius {frobenius:.5g}"
