"""Tables of plans and of compressed models, with a line for each layer or kind."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from kronjax.lm.models.sizes import LayerSize, Sizes


def plan(
    before: Sizes,
    after: Sizes,
    made: Any = None,
    dense: Mapping[str, str] | None = None,
) -> Table:
    """Return a table with a line for each layer of a plan.

    Args:
        before: Sizes of the dense model.
        after: Sizes of the model as planned.
        made: The `Plan` with the reasons, or None.
        dense: Reasons of the layers that rules leave dense, by name.
    """
    table = Table()
    table.add_column("layer", no_wrap=True)
    table.add_column("becomes", min_width=9)
    for name in ("parameters", "bytes", "of dense", "damage"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why", min_width=12)
    choices = {x.name: x for x in made.choices} if made else {}
    reasons = {name: x.reason for name, x in choices.items()} | dict(dense or {})
    for old, new in _pairs(before, after, reasons):
        choice = choices.get(old.name)
        table.add_row(
            old.name,
            new.kind,
            f"{new.parameters:,}",
            f"{new.bytes:,}",
            f"{100 * new.bytes / old.bytes:.1f} %",
            "" if choice is None else f"{choice.damage:.2g}",
            reasons.get(old.name, ""),
        )
    return table


def _pairs(
    before: Sizes, after: Sizes, reasons: Mapping[str, str]
) -> list[tuple[LayerSize, LayerSize]]:
    """Return sizes before and after, of all layers and of embeddings with a rule."""
    tables = zip(before.tables, after.tables, strict=True)
    changed = [x for x in tables if x[0].kind != x[1].kind or x[0].name in reasons]
    return [*changed, *zip(before.layers, after.layers, strict=True)]


def totals(before: Sizes, after: Sizes) -> str:
    """Return the totals of a plan as a sentence."""
    linear = [sum(x.parameters for x in model.layers) for model in (before, after)]
    return (
        f"{after.parameters:,} of {before.parameters:,} parameters, "
        f"{100 * linear[1] / linear[0]:.1f} % of those in linear layers; "
        f"{after.bytes / 2**20:,.1f} of {before.bytes / 2**20:,.1f} MiB; "
        f"{after.flops / 1e6:,.1f} of {before.flops / 1e6:,.1f} MFLOP a token."
    )


def planned(
    before: Sizes,
    after: Sizes,
    made: Any = None,
    dense: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return a plan as values for JSON; the arguments are those of `plan`."""
    choices = {x.name: x for x in made.choices} if made else {}
    reasons = {name: x.reason for name, x in choices.items()} | dict(dense or {})
    layers = []
    for old, new in _pairs(before, after, reasons):
        choice = choices.get(old.name)
        row = {**dataclasses.asdict(new), "dense_parameters": old.parameters}
        row["dense_bytes"] = old.bytes
        if choice is not None:
            row |= {"damage": choice.damage, "low_rank_damage": choice.low_rank}
        if old.name in reasons:
            row["reason"] = reasons[old.name]
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
    """Return the record of a compression as a table with a line for each kind."""
    table = Table()
    table.add_column("layers", min_width=20, overflow="fold")
    for name in (
        "changed",
        "bytes",
        "of dense",
        "weighted error",
        "low rank",
        "spectral",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    kinds: dict[str, list[dict[str, Any]]] = {}
    for layer in record["layers"]:
        kind = re.sub(r"\.\d+\.", ".*.", layer["name"])
        kinds.setdefault(kind, []).append(layer)
    for kind, members in kinds.items():
        done = [x for x in members if x.get("relative") is not None]
        held = sum(x["bytes"] for x in members)
        share = held / sum(x["dense_bytes"] for x in members)
        cells = [f"{len(done)} of {len(members)}", f"{held:,}", f"{100 * share:.1f} %"]
        for key in ("relative", "low_rank", "relative_spectral"):
            values = [x[key] for x in done if x.get(key) is not None]
            mean = sum(values) / len(values) if values else None
            cells.append("" if mean is None else f"{mean:.3f}")
        table.add_row(kind, *cells)
    return table
