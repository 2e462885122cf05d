"""Tables of plans and of compressed models, with a line for each layer or kind."""

import dataclasses
import re
from typing import Any

from rich.table import Table

from kronjax.lm.models.sizes import LayerSize, Sizes


def plan(before: Sizes, after: Sizes, made: Any = None) -> Table:
    """Return a table with a line for each layer of a plan.

    Args:
        before: Sizes of the dense model.
        after: Sizes of the model as planned.
        made: The `Plan` with the reasons, or None.
    """
    table = Table()
    for name in ("layer", "becomes"):
        table.add_column(name, no_wrap=name == "layer")
    for name in ("of dense", "damage"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why")
    choices = {x.name: x for x in made.choices} if made else {}
    for old, new in _pairs(before, after):
        choice = choices.get(old.name)
        share = f"{100 * new.parameters / old.parameters:.1f} %"
        damage = "" if choice is None else f"{choice.damage:.2g}"
        reason = "" if choice is None else choice.reason
        table.add_row(old.name, new.kind, share, damage, reason)
    return table


def _pairs(before: Sizes, after: Sizes) -> list[tuple[LayerSize, LayerSize]]:
    """Return sizes before and after, of all layers and of embeddings that change."""
    tables = zip(before.tables, after.tables, strict=True)
    changed = [pair for pair in tables if pair[0].kind != pair[1].kind]
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


def planned(before: Sizes, after: Sizes, made: Any = None) -> dict[str, Any]:
    """Return a plan as values for JSON."""
    choices = {x.name: x for x in made.choices} if made else {}
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
    """Return the record of a compression as a table with a line for each kind."""
    table = Table()
    table.add_column("layers")
    for name in ("changed", "of dense", "weighted error", "low rank", "spectral"):
        table.add_column(name, justify="right", no_wrap=True)
    kinds: dict[str, list[dict[str, Any]]] = {}
    for layer in record["layers"]:
        kind = re.sub(r"\.\d+\.", ".*.", layer["name"])
        kinds.setdefault(kind, []).append(layer)
    for kind, members in kinds.items():
        done = [x for x in members if x.get("relative") is not None]
        share = sum(x["fraction"] for x in members) / len(members)
        cells = [f"{len(done)} of {len(members)}", f"{100 * share:.1f} %"]
        for key in ("relative", "low_rank", "relative_spectral"):
            values = [x[key] for x in done if x.get(key) is not None]
            mean = sum(values) / len(values) if values else None
            cells.append("" if mean is None else f"{mean:.3f}")
        table.add_row(kind, *cells)
    return table
