"""Reports as one self-contained HTML page with tables and plots.

>>> _percent(0.8125)
'81.2 %'
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kronjax.io import atomic
from kronjax.lm.compression.record import EXPONENTS
from kronjax.lm.evaluation import spectra

NAME = "report.html"
"""The file beside the weights."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1e21; background: #fff;
  max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e3e5e8; text-align: right; }
th:first-child, td:first-child, .left { text-align: left; }
th { font-weight: 600; background: #f6f7f8; position: sticky; top: 0; }
.scroll { overflow-x: auto; } .quiet { color: #667; } img { max-width: 100%; }
code { font-size: .92em; } details pre { background: #f6f7f8; padding: 1rem; }
"""


def write(record: dict[str, Any], folder: Path) -> Path:
    """Write the page of a record into a folder; return its path."""
    path = folder / NAME
    atomic.write(path, page(record).encode())
    return path


def page(record: dict[str, Any]) -> str:
    """Return the page of a record."""
    title = f"{record['source']}, compressed"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(summary(record))}</p>",
        _table(("", "dense", "compressed", ""), _comparison(record)),
        *_figures(record),
        "<h2>Layers</h2>",
        "<p class=quiet>Errors are relative. Weighted: by the moments of calibration, "
        "beside the error of low rank with as many parameters. "
        "‖(W − K)x‖ ≤ ε‖x‖ holds for every x, with ε in the last column but one.</p>",
        _table(_HEADS, _layers(record), left=(0, 1, 10)),
    ]
    if record.get("analysis"):
        parts += [
            "<h2>Norms and ranks</h2>",
            f"<p>{html.escape(spectra.verdict(record['analysis']))}</p>",
            "<p class=quiet>Means over the layers of a kind. The bound (Arora et al., "
            "2018) holds for plain networks, and compares models of one architecture "
            "at best.</p>",
            _table(_SPECTRA, spectra.rows(record["analysis"])),
        ]
    if record.get("recipe"):
        parts.append(
            "<h2>Recipe</h2><details><summary>All rules</summary>"
            f"<pre>{html.escape(record['recipe'])}</pre></details>"
        )
    parts.append(
        f"<p class=quiet>{html.escape(_versions(record))} "
        f"{html.escape(_spent(record))}</p>"
    )
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>\n{body}\n</html>\n"
    )


def summary(record: dict[str, Any]) -> str:
    """Return the results in a few sentences."""
    before, after = record["before"], record["after"]
    changed = sum("relative" in layer for layer in record["layers"])
    share = _percent(after["linear_parameters"], before["linear_parameters"])
    words = (
        f"{after['parameters'] / 1e6:,.1f} of {before['parameters'] / 1e6:,.1f} M "
        f"parameters, {share} of those in linear layers; {changed} of "
        f"{len(record['layers'])} layers changed."
    )
    if record["budget"]:
        words += f" Planned for {record['budget']}, weighted by {record['weighting']}."
    scores = record["perplexity"]
    if scores:
        dense, ours = (scores[k]["perplexity"] for k in ("dense", "compressed"))
        words += f" Perplexity {_number(dense)} became {_number(ours)}, "
        words += f"{_number(record['measured_nats'], '+.3f')} nats per token"
        if record["predicted_nats"] is not None:
            words += (
                f"; the layers' estimates add up to {record['predicted_nats']:+.3f}"
            )
        words += "."
    calibration = record["calibration"] or {}
    if calibration.get("is_foreign"):
        words += (
            f" WARNING: the model reads the calibration text with a perplexity of "
            f"{_number(calibration['perplexity'])}, hardly better than chance: it may "
            "be in a language or an encoding that the model does not know."
        )
    blocks = [block for block in record.get("blocks") or () if block]
    if blocks:
        kept = sum(block["kept"] for block in blocks)
        words += f" Refinement kept {kept} of {len(blocks)} blocks."
    return words


def _comparison(record) -> Iterable[Sequence[str]]:
    before, after = record["before"], record["after"]
    for name, key, scale, unit in (
        ("parameters", "parameters", 1e6, "M"),
        ("in linear layers", "linear_parameters", 1e6, "M"),
        ("bytes", "bytes", 2**20, "MiB"),
        ("operations for a token", "flops", 1e6, "MFLOP"),
    ):
        cells = (f"{x[key] / scale:,.2f} {unit}" for x in (before, after))
        yield name, *cells, _percent(after[key], before[key])
    scores = record["perplexity"]
    if scores:
        dense, ours = scores["dense"], scores["compressed"]
        yield (
            f"perplexity ({dense['protocol']})",
            _number(dense["perplexity"]),
            _number(ours["perplexity"]),
            f"{_number(record['measured_nats'], '+.4f')} nats",
        )
    times = record["latency"]
    if times:
        for word in ("prefill", "decode"):
            ours, dense = (
                times[f"{prefix}{word}_tokens_per_second"] for prefix in ("", "dense_")
            )
            name = {"prefill": "reading", "decode": "writing"}[word]
            yield (
                f"{name}, tokens/s",
                f"{dense:,.0f}",
                f"{ours:,.0f}",
                f"{ours / dense:.2f} times",
            )


_HEADS = (
    "layer",
    "kind",
    "shape",
    "bytes",
    "of dense",
    "weighted",
    "low rank",
    "Frobenius",
    "spectral",
    "ε",
    "reason",
)


_SPECTRA = (
    "layers",
    "‖W‖ before",
    "after",
    "stable rank before",
    "after",
    "rank before",
    "after",
)


def _layers(record) -> Iterable[Sequence[str]]:
    for layer in record["layers"]:
        numbers = ("relative", "low_rank", "relative_frobenius", "relative_spectral")
        yield (
            layer["name"],
            layer["kind"],
            "×".join(map(str, layer["shape"])),
            f"{layer['bytes']:,}",
            _percent(layer["fraction"]),
            *(_short(layer.get(key)) for key in numbers),
            _short(layer.get("spectral")),
            layer.get("reason", ""),
        )


def _figures(record) -> list[str]:
    """Return the plots as images inside the page."""
    from matplotlib.figure import Figure

    figures = []
    layers = record["layers"]
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(layers)), [x["fraction"] for x in layers], width=0.9)
    axes.set(ylim=(0, 1.05), ylabel="parameters kept", xlabel="layer, in model order")
    figures.append(("Parameters kept in every layer", figure))
    pairs = [
        (x["predicted"], x["damage"])
        for x in layers
        if x.get("predicted") and x.get("damage")
    ]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    if pairs:
        planned, fitted = np.array(pairs).T
        panels[0].loglog(planned, fitted, "o", markersize=4)
        ends = [min(planned.min(), fitted.min()), max(planned.max(), fitted.max())]
        panels[0].plot(ends, ends, color="0.6", linewidth=1)
    panels[0].set(xlabel="damage as planned", ylabel="damage as fitted")
    curves = [x["schatten"] for x in layers if x.get("schatten")]
    for curve in curves:
        panels[1].plot(EXPONENTS, curve, color="C0", alpha=0.25, linewidth=0.8)
    if curves:
        middle = np.median(np.array(curves, float), axis=0)
        panels[1].plot(EXPONENTS, middle, color="C3", linewidth=2, label="median")
        panels[1].legend()
    panels[1].set(xscale="log", xlabel="p of the Schatten norm")
    panels[1].set(ylabel="relative error, unweighted")
    figures.append(("Plan and fit; error against p", figure))
    return [
        f'<h2>{title}</h2><img alt="{title}" '
        f'src="data:image/png;base64,{_png(figure)}">'
        for title, figure in figures
    ]


def _png(figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return base64.b64encode(file.getvalue()).decode()


def _table(heads, rows, left=(0,)) -> str:
    def cells(tag, row):
        for i, cell in enumerate(row):
            mark = " class=left" if i in left else ""
            yield f"<{tag}{mark}>{html.escape(str(cell))}</{tag}>"

    lines = ["".join(cells("th", heads))]
    lines += ["".join(cells("td", row)) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class=scroll><table>{body}</table></div>"


def _spent(record) -> str:
    spent = record["seconds"]
    parts = [f"{name} {seconds:,.0f} s" for name, seconds in spent.items()]
    return "Spent: " + ", ".join(parts) + "." if parts else ""


def _versions(record) -> str:
    return f"kronjax {record['kronjax']}, jax {record['jax']}."


def _number(value: float | None, form: str = ",.2f") -> str:
    """Return a number as text; None and infinities come from models that diverged."""
    return (
        "not finite" if value is None or not np.isfinite(value) else f"{value:{form}}"
    )


def _percent(part: float, whole: float = 1.0) -> str:
    return f"{100 * part / whole:.1f} %"


def _short(value) -> str:
    return "" if value is None else f"{value:.3g}"
