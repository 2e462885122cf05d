"""Folding: removal of gathers by one order of the channels between two layers.

The hidden units of an MLP can be in any order, and so can the channels of a value head,
if the layer before and the layer after agree. `fold` gives the layers before the order
of the outputs of the Kronecker sum of one of them, and permutes the inputs of the layer
after in the same way. A dense layer is permuted once; in a factored layer the gather is
replaced by another, or vanishes if it had exactly this order.

`HIDDEN` of the ports names the layers between which all operations are elementwise.

>>> layer = nn.linear(np.eye(2), None)
>>> reorder_outputs(layer, np.array([1, 0])).kernel[...].tolist()
[[0.0, 1.0], [1.0, 0.0]]
"""

from typing import Any

import numpy as np

from kronjax import nn
from kronjax.lm.models.base import LanguageModel


def fold(model: LanguageModel) -> int:
    """Remove gathers by reordering channels between layers, wherever fewer are left.

    Args:
        model: Changed in place; it still computes the same function.

    Returns:
        The number of removed gathers.
    """
    layers = nn.linear_layers(model)
    removed = 0
    for block in dict.fromkeys(name.split(".")[1] for name in layers if "." in name):
        prefix = next(n for n in layers if n.split(".")[1:2] == [block]).split(".")[0]
        for sources, target in model.HIDDEN:
            names = [f"{prefix}.{block}.{source}" for source in sources]
            removed += _fold(model, names, f"{prefix}.{block}.{target}")
        if model.VALUES is not None:
            source, target = (f"{prefix}.{block}.{name}" for name in model.VALUES)
            removed += _fold_values(model, source, target)
    return removed


def reorder_outputs(layer: nn.Layer, order: np.ndarray) -> Any:
    """Return a layer whose output `i` is output `order[i]` of the given one.

    Args:
        layer: Left as it is.
        order: `[n_out]`, a permutation.

    Returns:
        The layer, or None where its kind cannot be reordered.
    """
    return nn.as_layer(layer).reorder_outputs(order)


def reorder_inputs(layer: nn.Layer, order: np.ndarray) -> Any:
    """Return a layer whose input `i` is input `order[i]` of the given one.

    Args:
        layer: Left as it is.
        order: `[n_in]`, a permutation.

    Returns:
        The layer, or None where its kind cannot be reordered.
    """
    return nn.as_layer(layer).reorder_inputs(order)


def _fold(model, sources, target):
    """Fold the hidden units of an MLP, in the order of the first permuted source."""
    layers = nn.linear_layers(model)
    orders = (_column_order(layers[name]) for name in sources)
    order = next((x for x in orders if x is not None), None)
    if order is None:
        return 0
    return _reorder(model, sources, target, order, order)


def _fold_values(model, source, target):
    """Fold an order of values within heads, each of which may serve several queries."""
    layers = nn.linear_layers(model)
    order = _column_order(layers[source])
    groups, d = model.config.cache_shape
    if order is None or not np.array_equal(order // d, np.arange(groups * d) // d):
        return 0
    within = (order % d).reshape(groups, d)
    heads = layers[target].in_features // d
    shared = np.repeat(within, heads // groups, axis=0)
    wide = (np.arange(heads)[:, None] * d + shared).reshape(-1)
    return _reorder(model, [source], target, order, wide)


def _reorder(model, sources, target, order, wide):
    """Reorder channels between layers if that removes gathers; return how many."""
    layers = nn.linear_layers(model)
    new = {name: reorder_outputs(layers[name], order) for name in sources}
    new[target] = reorder_inputs(layers[target], wide)
    if any(layer is None for layer in new.values()):
        return 0
    removed = sum(_num_gathers(layers[name]) - _num_gathers(new[name]) for name in new)
    if removed <= 0:
        return 0
    for name, layer in new.items():
        nn.replace(model, name, layer)
    return removed


def _num_gathers(layer):
    return nn.as_layer(layer).num_gathers


def _column_order(layer):
    return nn.as_layer(layer).column_order
