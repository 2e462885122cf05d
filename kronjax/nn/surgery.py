"""Layers of a model by name: found, replaced, multiplied out.

`linear_layers` finds them, `replace` puts another in the place of one. The kinds that
kronjax adds to `nnx.Linear` stand in `kronjax.nn.layers`.
"""

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from kronjax.nn.layers import (
    InterpolativeLinear,
    KroneckerEmbedding,
    KroneckerLinear,
    MaskedLinear,
)

Model = TypeVar("Model", bound=nnx.Module)

Layer = nnx.Linear | KroneckerLinear | InterpolativeLinear | MaskedLinear
"""What stands where a model multiplies by a matrix."""

Table = nnx.Embed | KroneckerEmbedding
"""What stands where a model looks up the row of a token or of a position."""


def linear_layers(model: nnx.Module) -> dict[str, Layer]:
    """Return the layers of a model by name, in the order of the model.

    Args:
        model: Any module.

    Returns:
        `{"h.0.mlp.c_fc": layer, ...}`; what is inside of a layer is not listed.
    """
    found = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Layer):
            found[path] = module
    return {".".join(map(str, path)): found[path] for path in sorted(found, key=_order)}


def tables(model: nnx.Module) -> dict[str, Table]:
    """Return the embeddings of a model by name: `{"wte": table, ...}`."""
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Table)
    }


def shape_of(layer: Layer | Table) -> tuple[int, int]:
    """Return `(n_in, n_out)` of a layer, or rows and columns of a table."""
    if isinstance(layer, Table):
        return layer.num_embeddings, layer.features
    return layer.in_features, layer.out_features


def replace(model: nnx.Module, name: str, layer: Layer | Table) -> None:
    """Put `layer` where the layer called `name` is.

    Args:
        model: Changed in place.
        name: As `linear_layers` or `tables` gives it, e.g. `h.0.mlp.c_fc`.
        layer: Of the same shape, a table for a table.

    Raises:
        ValueError: If there is no such layer, or the sizes differ.
    """
    kind = Table if isinstance(layer, Table) else Layer
    there = _at(model, name.split("."))
    if not isinstance(there, kind):
        layers: Mapping[str, Any] = (tables if kind is Table else linear_layers)(model)
        close = difflib.get_close_matches(name, layers, n=3) or list(layers)[:3]
        raise ValueError(f"no layer {name}; did you mean {' or '.join(close)}?")
    old, new = shape_of(there), shape_of(layer)
    if old != new:
        raise ValueError(
            f"{name} maps {old[0]} to {old[1]}, the new layer {new[0]} to {new[1]}"
        )
    put(model, name, layer)


def put(model: nnx.Module, name: str, call: Any) -> None:
    """Put anything that can be called where the layer called `name` is, unchecked.

    Args:
        model: Changed in place.
        name: As `linear_layers` gives it.
        call: What the model will call with the input of the layer.
    """
    *path, last = name.split(".")
    setattr(_at(model, path), last, call)


def _at(model, path) -> Any:
    """Return what is at a path of names and numbers, or None."""
    there: Any = model
    for part in path:
        inside = getattr(there, "__dict__", {})
        try:
            there = inside[part] if part in inside else there[_index(part)]
        except (IndexError, KeyError, TypeError, ValueError):
            return None
    return there


def _index(part: str) -> int:
    number = int(part)
    if part != str(abs(number)):
        raise ValueError(f"{part} is no plain number")
    return number


def dense(layer: Layer) -> nnx.Linear:
    """Return a layer with its kernel multiplied out, of the same bias and dtype."""
    if isinstance(layer, nnx.Linear):
        return layer
    bias = None if layer.bias is None else layer.bias[...]
    return linear(layer.materialize(), bias)


def dense_table(table: Table) -> nnx.Embed:
    """Return a table with its rows multiplied out, of the same dtype."""
    if isinstance(table, nnx.Embed):
        return table
    made = nnx.eval_shape(lambda: nnx.Embed(*shape_of(table), rngs=nnx.Rngs(0)))
    made.embedding = nnx.Param(table.materialize())
    made.dtype = None  # type: ignore[assignment]  # that of its numbers
    return made


def multiplied_out(model: Model) -> Model:
    """Return a model with dense layers alone, which shares the arrays of the others.

    Args:
        model: Left as it is.
    """
    other = nnx.merge(*nnx.split(model))
    for name, layer in linear_layers(other).items():
        if not isinstance(layer, nnx.Linear):
            replace(other, name, dense(layer))
    for name, table in tables(other).items():
        if not isinstance(table, nnx.Embed):
            replace(other, name, dense_table(table))
    return other


def linear(kernel: jax.Array, bias: jax.Array | None) -> nnx.Linear:
    """Return an `nnx.Linear` that holds `kernel` `[n_in, n_out]` and `bias`."""
    with_bias = bias is not None
    made = nnx.eval_shape(
        lambda: nnx.Linear(*kernel.shape, use_bias=with_bias, rngs=nnx.Rngs(0))
    )
    made.kernel = nnx.Param(kernel)
    if with_bias:
        made.bias = nnx.Param(bias)
    return made


def _order(path):
    """Sort blocks by number, not by the digits of their number."""
    return [(0, part, "") if isinstance(part, int) else (1, 0, part) for part in path]
