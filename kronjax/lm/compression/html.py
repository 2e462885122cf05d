"""Reports of compressed models as one self-contained HTML page.

>>> _percent(0.8125)
'81.2 %'
"""

import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kronjax import pages
from kronjax.io import atomic
from kronjax.lm.compression.record import EXPONENTS
from kronjax.lm.evaluation import spectra

NAME = "report.html"
"""The file beside the weights."""


def write(record: dict[str, Any], folder: Path) -> Path:
    """Write the page of a record into a folder; return its path."""
    path = folder / NAME
    atomic.write(path, page(record).encode())
    return path


def page(record: dict[str, Any]) -> str:
    """Return the page of a record."""
    parts = [
        pages.paragraph(summary(record)),
        pages.table(("", "dense", "compressed", ""), _comparison(record)),
        "<h2>Where the budget went</h2>",
        pages.budget(_shares(record)),
        "<h2>Layers</h2>",
        pages.paragraph(
            "Errors are relative. Weighted: by the moments of calibration, beside the "
            "error of low rank with as many parameters. ‖(W − K)x‖ ≤ ε‖x‖ holds for "
            "every x. A click on the name of a column sorts.",
            is_quiet=True,
        ),
        pages.table(_HEADS, _layers(record), left=(0, 1, 10), sorts=True),
        *_figures(record),
    ]
    if record.get("analysis"):
        parts += [
            "<h2>Norms and ranks</h2>",
            pages.paragraph(spectra.verdict(record["analysis"])),
            pages.paragraph(
                "Means over the layers of a kind. The bound (Arora et al., 2018) holds "
                "for plain networks, and compares models of one architecture at best.",
                is_quiet=True,
            ),
            pages.table(_SPECTRA, spectra.rows(record["analysis"]), sorts=True),
        ]
    if record.get("recipe"):
        parts.append(
            "<h2>Recipe</h2><details><summary>All rules</summary>"
            f"<pre>{html.escape(record['recipe'])}</pre></details>"
        )
    last = f"{_versions(record)} {_spent(record)}"
    parts.append(pages.paragraph(last, is_quiet=True))
    return pages.page(f"{record['source']}, compressed", parts)


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


def _shares(record) -> list[pages.Share]:
    """Return the parameters of every layer, grouped by the kind of layer."""
    return [
        pages.Share(
            layer["name"],
            _group(layer),
            round(layer["parameters"] / max(layer["fraction"], 1e-12)),
            layer["parameters"],
        )
        for layer in record["layers"]
    ]


def _figures(record) -> list[str]:
    """Return plan against fit, and error against p, as far as they are known."""
    layers, parts = record["layers"], []
    planned = [x for x in layers if x.get("predicted") and x.get("damage")]
    if planned:
        series = []
        for group in dict.fromkeys(map(_group, planned)):
            ours = [x for x in planned if _group(x) == group]
            xs, ys = [x["predicted"] for x in ours], [x["damage"] for x in ours]
            series.append(pages.Points(group, xs, ys, [x["name"] for x in ours]))
        chart = pages.chart(
            series,
            "damage as planned",
            "damage as fitted",
            logs=(True, True),
            has_diagonal=True,
        )
        parts += ["<h2>Plan and fit</h2>", chart]
    curves = [x["schatten"] for x in layers if x.get("schatten")]
    if curves:
        series = [
            pages.Points("", EXPONENTS, curve, is_line=True, is_thin=True)
            for curve in curves
        ]
        middle = np.median(np.array(curves, float), axis=0).tolist()
        series.append(
            pages.Points("median of the layers", EXPONENTS, middle, is_line=True)
        )
        chart = pages.chart(
            series,
            "p of the Schatten norm",
            "relative error, unweighted",
            logs=(True, False),
        )
        parts += ["<h2>Error against p</h2>", chart]
    return parts


def _group(layer) -> str:
    return re.sub(r"\.\d+\.", ".*.", layer["name"])


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
