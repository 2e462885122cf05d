"""Layers that replace `nnx.Linear` and `nnx.Embed`, and how models hold them.

`linear_layers` finds the layers of a model, `replace` swaps a layer, `cost` counts its
parameters and operations. Names are loaded when they are first used.
"""

from typing import TYPE_CHECKING

from kronjax.lazy import attach

if TYPE_CHECKING:
    from kronjax.nn.factors import (
        LowRankFactor,
        Mask,
        MaskedFactor,
    )
    from kronjax.nn.interpolative import (
        InterpolativeLinear,
    )
    from kronjax.nn.kronecker import (
        KroneckerEmbedding,
        KroneckerLinear,
    )
    from kronjax.nn.layers import (
        Cost,
        LinearLayer,
        Order,
        TableLayer,
        register,
    )
    from kronjax.nn.matrix import (
        Layer,
        MaskedLinear,
        Table,
        as_layer,
        dense,
        dense_table,
        is_dense,
        linear,
    )
    from kronjax.nn.surgery import (
        cost,
        describe,
        from_description,
        linear_layers,
        materialize,
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
    "LinearLayer",
    "LowRankFactor",
    "Mask",
    "MaskedFactor",
    "MaskedLinear",
    "Order",
    "Table",
    "TableLayer",
    "as_layer",
    "cost",
    "dense",
    "dense_table",
    "describe",
    "from_description",
    "is_dense",
    "linear",
    "linear_layers",
    "materialize",
    "multiplied_out",
    "put",
    "register",
    "replace",
    "shape_of",
    "tables",
]

__getattr__, __dir__ = attach(
    "kronjax.nn",
    {
        "kronjax.nn.factors": [
            "LowRankFactor",
            "Mask",
            "MaskedFactor",
        ],
        "kronjax.nn.interpolative": [
            "InterpolativeLinear",
        ],
        "kronjax.nn.kronecker": [
            "KroneckerEmbedding",
            "KroneckerLinear",
        ],
        "kronjax.nn.layers": [
            "Cost",
            "LinearLayer",
            "Order",
            "TableLayer",
            "register",
        ],
        "kronjax.nn.matrix": [
            "Layer",
            "MaskedLinear",
            "Table",
            "as_layer",
            "dense",
            "dense_table",
            "is_dense",
            "linear",
        ],
        "kronjax.nn.surgery": [
            "cost",
            "describe",
            "from_description",
            "linear_layers",
            "materialize",
            "multiplied_out",
            "put",
            "replace",
            "shape_of",
            "tables",
        ],
    },
)
