"""Results about language models as tables, one model beside another.

>>> millions(124_439_808)
'124.4 M'
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from kronjax.lm.evaluate import Lambada, Perplexity
from kronjax.lm.sizes import LayerSize, Sizes

Row = tuple[str, Sizes, Perplexity | Lambada]
"""The name of a model, what it stores, and how it did."""


def evaluation(rows: Sequence[Row]) -> Table:
    """Return a table with a line for each model, all evaluated alike.

    Of masked models `parameters` are the kept ones, beside those that are held.
    """
    first = rows[0][2]
    table = Table(caption=_how(first), caption_justify="left")
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
    """Say how the first model compares with the second, in one line."""
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


def plan(before: Sizes, after: Sizes, made: Any = None) -> Table:
    """Return a table with a line for each layer of a plan.

    Args:
        before: Of the dense model.
        after: Of the model as planned.
        made: The `Plan`, if there is one, which knows the reasons.
    """
    table = Table()
    for name in ("layer", "becomes"):
        table.add_column(name, no_wrap=name == "layer")
    for name in ("of dense", "damage"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why")
    choices = {one.name: one for one in made.choices} if made else {}
    for old, new in _pairs(before, after):
        choice = choices.get(old.name)
        share = f"{100 * new.parameters / old.parameters:.1f} %"
        damage = "" if choice is None else f"{choice.damage:.2g}"
        reason = "" if choice is None else choice.reason
        table.add_row(old.name, new.kind, share, damage, reason)
    return table


def _pairs(before: Sizes, after: Sizes) -> list[tuple[LayerSize, LayerSize]]:
    """Return what each layer was and is; of the embeddings those that change."""
    tables = zip(before.tables, after.tables, strict=True)
    changed = [pair for pair in tables if pair[0].kind != pair[1].kind]
    return [*changed, *zip(before.layers, after.layers, strict=True)]


def totals(before: Sizes, after: Sizes) -> str:
    """Say what a plan comes to, in one line."""
    linear = [sum(one.parameters for one in x.layers) for x in (before, after)]
    return (
        f"{after.parameters:,} of {before.parameters:,} parameters, "
        f"{100 * linear[1] / linear[0]:.1f} % of those in linear layers; "
        f"{after.bytes / 2**20:,.1f} of {before.bytes / 2**20:,.1f} MiB; "
        f"{after.flops / 1e6:,.1f} of {before.flops / 1e6:,.1f} MFLOP a token."
    )


def planned(before: Sizes, after: Sizes, made: Any = None) -> dict[str, Any]:
    """Return a plan as values that JSON holds."""
    choices = {one.name: one for one in made.choices} if made else {}
    layers = []
    for old, new in _pairs(before, after):
        choice = choices.get(old.name)
        row = {**dataclasses.asdict(new), "dense_parameters": old.parameters}
        if choice is not None:
            row |= {"damage": choice.damage, "low_rank_damage": choice.low_rank}
            row |= {"reason": choice.reason}
        layers.append(row)
    keys = ("parameters", "bytes", "flops")
    return {
        "budget": made and str(made.budget),
        "weighting": made and made.weighting,
        "damage": made and made.damage,
        "before": {key: getattr(before, key) for key in keys},
        "after": {key: getattr(after, key) for key in keys},
        "layers": layers,
    }


def compressed(record: dict[str, Any]) -> Table:
    """Return the record of a compression as a table, a line for each kind of layer."""
    table = Table()
    table.add_column("layers")
    for name in ("changed", "of dense", "weighted error", "low rank", "spectral"):
        table.add_column(name, justify="right", no_wrap=True)
    kinds: dict[str, list[dict[str, Any]]] = {}
    for one in record["layers"]:
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", one["name"]), []).append(one)
    for kind, members in kinds.items():
        done = [x for x in members if "relative" in x]
        share = sum(x["fraction"] for x in members) / len(members)
        cells = [f"{len(done)} of {len(members)}", f"{100 * share:.1f} %"]
        for key in ("relative", "low_rank", "relative_spectral"):
            values = [x[key] for x in done if x.get(key) is not None]
            mean = sum(values) / len(values) if values else None
            cells.append("" if mean is None else f"{mean:.3f}")
        table.add_row(kind, *cells)
    return table


def millions(count: int) -> str:
    """Write a number of parameters: `124.4 M`."""
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"


def _shortened(name: str, most: int = 24) -> str:
    """Return the end of a long path, which tells more than its beginning."""
    return name if len(name) <= most else "\N{HORIZONTAL ELLIPSIS}" + name[1 - most :]


def _how(result: Perplexity | Lambada) -> str:
    """Return what one has to know to get the numbers once more."""
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
