"""Tables and sentences that compare evaluated models.

>>> millions(124_439_808)
'124.4 M'
"""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from kronjax.lm.evaluation.perplexity import Lambada, Perplexity
from kronjax.lm.models.sizes import Sizes

Row = tuple[str, Sizes, Perplexity | Lambada]
"""Name of a model, its sizes, and the result of its evaluation."""


def evaluation(rows: Sequence[Row]) -> Table:
    """Return a table with a row for each model; all must be evaluated alike.

    For masked models, `parameters` counts the unmasked ones, and `held` all.
    """
    first = rows[0][2]
    table = Table(caption=_circumstances(first), caption_justify="left")
    table.add_column("model")
    masked = any(sizes.held > sizes.parameters for _, sizes, _ in rows)
    names = ["parameters", *["held"] * masked, "MiB"]
    if isinstance(first, Lambada):
        names += ["accuracy", "last word", "full text"]
    else:
        names += ["GFLOP", "perplexity", "nats"]
    for name in [*names, "tokens/s"]:
        table.add_column(name, justify="right", no_wrap=True)
    for model, sizes, result in rows:
        cells = [millions(sizes.parameters), *[millions(sizes.held)] * masked]
        cells += [f"{sizes.bytes / 2**20:,.1f}"]
        if isinstance(result, Lambada):
            full = result.full_text
            cells += [f"{100 * result.accuracy:.2f} %", f"{result.perplexity:.2f}"]
            cells += ["" if full is None else f"{full.perplexity:.2f}"]
        else:
            cells += [f"{sizes.flops / 1e9:.3g}"]
            cells += [f"{result.perplexity:.2f}", f"{result.nll:.4f}"]
        speed = result.tokens_scored / max(result.seconds, 1e-9)
        table.add_row(_shortened(model), *cells, f"{speed:,.0f}")
    return table


def difference(rows: Sequence[Row]) -> str:
    """Compare the first model with the second in one line."""
    (_, small, ours), (_, large, theirs) = rows
    if isinstance(ours, Perplexity) and isinstance(theirs, Perplexity):
        if ours.protocol != theirs.protocol:
            return (
                "Not comparable: the contexts of the models differ, "
                f"{ours.protocol.context} and {theirs.protocol.context}."
            )
        if ours.tokens_sha256 != theirs.tokens_sha256:
            return "Not comparable: the models cut the text into different tokens."
    share = 100 * small.parameters / large.parameters
    words = f"{share:.1f} % of the parameters"
    if isinstance(ours, Lambada) or isinstance(theirs, Lambada):
        points = 100 * (ours.accuracy - theirs.accuracy)  # type: ignore[union-attr]
        return f"{words}, {points:+.2f} points of accuracy."
    return (
        f"{words}, perplexity times {ours.perplexity / theirs.perplexity:.3f} "
        f"({ours.nll - theirs.nll:+.4f} nats per token)."
    )


def millions(count: int) -> str:
    """Format a number of parameters: `124.4 M`."""
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"


def _shortened(name: str, most: int = 24) -> str:
    """Return the end of a long path, which is more specific than its beginning."""
    return name if len(name) <= most else "\N{HORIZONTAL ELLIPSIS}" + name[1 - most :]


def _circumstances(result: Perplexity | Lambada) -> str:
    """Return the settings that are needed to reproduce the numbers."""
    parts: list[Any] = []
    if isinstance(result, Lambada):
        parts += [f"lambada v{result.version}", f"{result.rows:,} rows"]
        parts += ["last word, full text: perplexities"]
    else:
        protocol = result.protocol
        parts += [
            f"{protocol.name} v{protocol.version}",
            f"context {protocol.context}, stride {protocol.stride}",
            f"mean over {protocol.average}, nats and GFLOP per token",
            f"{result.tokens_scored:,} of {result.tokens:,} tokens scored",
        ]
        parts += [] if result.join is None else [f"joined: {result.join}"]
    digest = result.text_sha256
    parts += [result.dtype] + ([] if digest is None else [f"text {digest[:12]}"])
    return "; ".join(parts)
