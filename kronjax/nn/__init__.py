"""Layers that take the place of `nnx.Linear`, and how models hold them.

`linear_layers` finds the layers of a model, `replace` swaps one, `cost` counts what it
stores and computes. Names are loaded when they are first used.
"""

from typing import TYPE_CHECKING

from kronjax.lazy import attach

if TYPE_CHECKING:
    from kronjax.nn.costs import Cost, cost
    from kronjax.nn.description import describe, from_description
    from kronjax.nn.factors import (
        LowRankFactor,
        Mask,
        MaskedFactor,
    )
    from kronjax.nn.layers import (
        InterpolativeLinear,
        KroneckerEmbedding,
        KroneckerLinear,
        MaskedLinear,
        Order,
    )
    from kronjax.nn.surgery import (
        Layer,
        Table,
        dense,
        dense_table,
        linear,
        linear_layers,
        multiplied_out,
        put,
        replace,
        shape_of,
        tables,
    )

__all__ = [
    "Cost",
    "InterpolativeLinear",
    "KroneckerEmbedding",
    "KroneckerLinear",
    "Layer",
    "LowRankFactor",
    "Mask",
    "MaskedFactor",
    "MaskedLinear",
    "Order",
    "Table",
    "cost",
    "dense",
    "dense_table",
    "describe",
    "from_description",
    "linear",
    "linear_layers",
    "multiplied_out",
    "put",
    "replace",
    "shape_of",
    "tables",
]

__getattr__, __dir__ = attach(
    "kronjax.nn",
    {
        "kronjax.nn.costs": ["Cost", "cost"],
        "kronjax.nn.description": ["describe", "from_description"],
        "kronjax.nn.factors": [
            "LowRankFactor",
            "Mask",
            "MaskedFactor",
        ],
        "kronjax.nn.layers": [
            "InterpolativeLinear",
            "KroneckerEmbedding",
            "KroneckerLinear",
            "MaskedLinear",
            "Order",
        ],
        "kronjax.nn.surgery": [
            "Layer",
            "Table",
            "dense",
            "dense_table",
            "linear",
            "linear_layers",
            "multiplied_out",
            "put",
            "replace",
            "shape_of",
            "tables",
        ],
    },
)
