"""Demonstration on the bundled language model: five compressions of its MLP layers.

All five have equally many parameters: the MLP layers are reduced to 15 % of theirs, and
the other layers stay unchanged; the planned compression may distribute the same total
over all layers. Perplexities are those of text that was used neither for training nor
for calibration.
"""

import dataclasses
import functools
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from kronjax import demo, nn
from kronjax.demo import corpus
from kronjax.lm.compression import html, mixture, pipeline, record
from kronjax.lm.compression.budget import Budget
from kronjax.lm.compression.moments import measure_moments
from kronjax.lm.evaluation import perplexity
from kronjax.lm.models.base import LanguageModel
from kronjax.lm.models.reading import tokens_of
from kronjax.lm.text import documents as texts
from kronjax.recipe import Recipe, Rule, Term, Weighting

FRACTION = 0.15
"""Fraction of the parameters of the MLP layers that remains."""

TOKENS = 8192
"""Number of tokens of the training text for calibration."""

PRODUCTS = 120
"""Matrix products of every fit of a mixture: half of the default, to save time."""

CHARACTERS = 40_000
"""Number of characters of the held-out text for perplexities: half of it."""

PROTOCOL = "krony-pt"

DENSE = "dense"
PLANNED = "planned budget"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table: a model and its perplexity.

    Attributes:
        name: Name of the compression.
        parameters: Number of parameters of the whole model.
        perplexity: Perplexity of held-out text.
    """

    name: str
    parameters: int
    perplexity: float


def run(folder: Path, say: Callable[[str], None]) -> list[Row]:
    """Compress the model in every way, and write the report of the planned one.

    Args:
        folder: Existing folder for the report.
        say: Callback with the name of the next step.
    """
    model = demo.model()
    held_out = texts.from_rows(
        [demo.held_out()[:CHARACTERS]], source="held-out documentation"
    )

    def measured(name: str, parameters: int, candidate: LanguageModel) -> Row:
        # Dense models of one architecture share a compiled program.
        dense = nn.multiplied_out(candidate)
        dense.recipe = None
        result = perplexity.perplexity(dense, held_out, PROTOCOL, progress=False)
        return Row(name, parameters, result.perplexity)

    say("calibrating")
    tokens = tokens_of(model, _training(6 * TOKENS))[:TOKENS]
    moments = measure_moments(model, tokens, gradients=True, progress=False)
    compressed = functools.partial(
        pipeline.run,
        model,
        calibration=moments,
        max_products=PRODUCTS,
        progress=False,
    )
    rows = []
    for name, rules in ways().items():
        say(name)
        done = compressed(rules)
        rows.append(measured(name, done.after.parameters, done.model))
    say(PLANNED)
    budget = Budget("parameters", max(row.parameters for row in rows))
    done = compressed(budget)
    planned = record.of(
        done,
        model,
        source="the bundled model",
        text=held_out,
        protocol=PROTOCOL,
        timed=False,
        progress=False,
    )
    record.write(planned, folder)
    html.write(planned, folder)
    before, after = (
        planned["perplexity"][name]["perplexity"] for name in ("dense", "compressed")
    )
    return [
        Row(DENSE, done.before.parameters, before),
        *rows,
        Row(PLANNED, done.after.parameters, after),
    ]


def ways() -> dict[str, Recipe]:
    """Return the recipes by the names in the table."""
    return {
        "SVD": recipe("low-rank", "frobenius", "none"),
        "Kronecker, Van Loan": recipe("kronecker", "frobenius", "none"),
        "Kronecker, spectral norm": recipe("kronecker", "spectral", "none"),
        "Kronecker, data-aware": recipe("kronecker", "frobenius", "input+gradient"),
    }


def recipe(method: str, norm: str, weighting: Weighting) -> Recipe:
    """Return rules for the MLP layers of the bundled model."""
    rules = []
    for name, shape in (("c_fc", (192, 768)), ("c_proj", (768, 192))):
        what: dict[str, Any] = {"method": "low-rank", "fraction": FRACTION}
        if method == "kronecker":
            (chosen,) = mixture.configurations(shape, mixture.mix(shape, FRACTION, 0.0))
            term = Term(a_shape=chosen.a_shape, rank=chosen.rank)
            what = {"method": "kronecker", "terms": (term,)}
        match = f"h.*.mlp.{name}"
        rules.append(Rule(match=match, norm=norm, weighting=weighting, **what))
    return Recipe(rules=(*rules, Rule(match="*", method="keep")), name=method)


def added(row: Row, dense: Row) -> float:
    """Return the increase of the loss over the dense model, in nats per token."""
    return math.log(row.perplexity / dense.perplexity)


def table(rows: list[Row]) -> Table:
    """Return the table of perplexities and sizes."""
    result = Table(
        title="Bundled language model, perplexity of held-out text",
        caption=f"MLP layers at {FRACTION:.0%} of their parameters;\n"
        "the planned budget distributes the same total over all layers",
    )
    result.add_column("", justify="left")
    for name in ("parameters", "perplexity", "nats above dense"):
        result.add_column(name, justify="right")
    for row in rows:
        worse = f"{added(row, rows[0]):+.3f}" if row is not rows[0] else ""
        result.add_row(row.name, f"{row.parameters:,}", f"{row.perplexity:,.1f}", worse)
    return result


def figure(rows: list[Row]) -> bytes:
    """Return a PNG of nats per token above the dense model for every compression."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dense, *others = rows
    worse = [max(added(row, dense), 1e-4) for row in others]
    chart = Figure(figsize=(7, 3), dpi=150, layout="constrained")
    axes = chart.add_subplot()
    closed = ("SVD", "Kronecker, Van Loan")
    colors = ["tab:gray" if row.name in closed else "tab:blue" for row in others]
    bars = axes.barh([row.name for row in others], worse, color=colors)
    labels = [f"{row.perplexity:,.1f}" for row in others]
    axes.bar_label(bars, labels, padding=4)
    axes.set_xscale("log")
    axes.set_xlim(min(worse) / 2, max(worse) * 4)
    axes.invert_yaxis()
    axes.set_xlabel("nats per token above the dense model (at the bars: perplexity)")
    axes.set_title(
        f"{others[0].parameters / dense.parameters:.0%} of the parameters, dense "
        f"perplexity {dense.perplexity:.1f}",
        fontsize=11,
    )
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    FigureCanvasAgg(chart).print_png(buffer)
    return buffer.getvalue()


def _training(characters: int) -> str:
    """Return the beginning of the text that the model was trained on."""
    text = ""
    for document in corpus.documents():
        text += document + "\n\n\n"
        if len(text) >= characters:
            break
    return text[:characters]
