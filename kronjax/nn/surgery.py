"""Layers of a model by name: finding, replacing, describing and counting them.

`linear_layers` and `tables` find layers, `replace` puts another layer in the place of
one. `cost`, `describe` and `from_description` call the methods of `kronjax.nn.layers`.

>>> import jax.numpy as jnp
>>> from kronjax.nn import linear
>>> layer = linear(jnp.ones((2, 3)), None)
>>> describe(layer), cost(layer).parameters
({'kind': 'dense', 'shape': [2, 3], 'bias': False}, 6)
"""

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from flax import nnx

# Imported for the layers that they register.
from kronjax.nn import interpolative as _interpolative  # noqa: F401
from kronjax.nn import kronecker as _kronecker  # noqa: F401
from kronjax.nn.layers import KINDS, Cost
from kronjax.nn.matrix import (
    Layer,
    Table,
    as_layer,
    dense,
    dense_table,
    is_dense,
)

Model = TypeVar("Model", bound=nnx.Module)


def linear_layers(model: nnx.Module) -> dict[str, Layer]:
    """Return the layers of a model by name, in the order of the model.

    Args:
        model: Any module.

    Returns:
        `{"h.0.mlp.c_fc": layer, ...}`; modules inside of a layer are not listed.
    """
    layers = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Layer):
            layers[path] = module
    return {
        ".".join(map(str, path)): layers[path] for path in sorted(layers, key=_order)
    }


def tables(model: nnx.Module) -> dict[str, Table]:
    """Return the embeddings of a model by name: `{"wte": table, ...}`."""
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Table)
    }


def shape_of(layer: Layer | Table) -> tuple[int, int]:
    """Return `(n_in, n_out)` of a layer, or rows and columns of a table."""
    return as_layer(layer).shape


def materialize(layer: Layer | Table) -> Any:
    """Return the kernel `[n_in, n_out]` of a layer, or the rows of a table."""
    return as_layer(layer).materialize()


def cost(layer: Layer | Table) -> Cost:
    """Return the storage and the operations of a layer.

    Args:
        layer: Its arrays may be abstract, unless it is masked. The operations of a
            table are those of a head that is tied to it.
    """
    return as_layer(layer).cost()


def describe(layer: Layer | Table) -> dict[str, Any]:
    """Return the structure of a layer without its numbers, as values for JSON."""
    return as_layer(layer).describe()


def from_description(description: Mapping[str, Any]) -> Layer | Table:
    """Return the layer of a `describe`, with abstract float32 arrays.

    Raises:
        ValueError: If it describes no layer.
    """
    try:
        kind = description["kind"]
        if kind in KINDS:
            return KINDS[kind].outline(description)
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{description!r} describes no layer: {error}") from error
    raise ValueError(
        f"a layer of kind {kind!r} is unknown: update kronjax, or import the module "
        "that registers it"
    )


def replace(model: nnx.Module, name: str, layer: Layer | Table) -> None:
    """Put `layer` in the place of the layer called `name`.

    Args:
        model: Changed in place.
        name: As `linear_layers` or `tables` gives it, e.g. `h.0.mlp.c_fc`.
        layer: A layer of the same shape, a table for a table.

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
    """Put any callable in the place of the layer called `name`, without any check.

    Args:
        model: Changed in place.
        name: As `linear_layers` gives it.
        call: The function that the model will call with the input of the layer.
    """
    *path, last = name.split(".")
    setattr(_at(model, path), last, call)


def multiplied_out(model: Model) -> Model:
    """Return a model with dense layers alone, which shares the arrays of the others.

    Args:
        model: Left as it is.
    """
    other = nnx.merge(*nnx.split(model))
    for name, layer in linear_layers(other).items():
        if not is_dense(layer):
            replace(other, name, dense(layer))
    for name, table in tables(other).items():
        if not is_dense(table):
            replace(other, name, dense_table(table))
    return other


def _at(model, path) -> Any:
    """Return the object at a path of names and numbers, or None."""
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
        raise ValueError(f"{part} is not a plain number")
    return number


def _order(path):
    """Sort blocks by number, not by the digits of their number."""
    return [(0, part, "") if isinstance(part, int) else (1, 0, part) for part in path]
