"""Layers of a model by name: found, replaced, counted, described.

`linear_layers` finds them, `replace` puts another in the place of one, `cost` says what
one stores and spends. The kinds that kronjax adds to `nnx.Linear` stand in
`kronjax.layers`.

>>> import jax.numpy as jnp
>>> layer = KroneckerLinear([KroneckerTerms(jnp.ones((1, 2, 3)), jnp.ones((1, 4, 5)))])
>>> cost(layer).parameters
26
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from kronjax import factors
from kronjax.factors import LowRankFactor, Mask, MaskedFactor
from kronjax.kronecker import KroneckerTerms, matmul_cost
from kronjax.layers import (
    InterpolativeLinear,
    KroneckerEmbedding,
    KroneckerLinear,
    MaskedLinear,
    Order,
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

Model = TypeVar("Model", bound=nnx.Module)

Layer = nnx.Linear | KroneckerLinear | InterpolativeLinear | MaskedLinear
"""What stands where a model multiplies by a matrix."""

Table = nnx.Embed | KroneckerEmbedding
"""What stands where a model looks up the row of a token or of a position."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a layer stores, and what one row of `x` costs.

    Attributes:
        parameters: Numbers that count, bias included; of a mask the kept ones.
        bytes: Bytes that hold them; a masked kernel is held whole, with its mask.
        flops: Multiplications and additions for one row of `x`, `[n_in]`.
        held: Numbers that are held, masked ones included.
    """

    parameters: int
    bytes: int
    flops: int
    held: int


def cost(layer: Layer | Table) -> Cost:
    """Return what a layer stores and spends.

    Args:
        layer: Its arrays may be abstract, unless it is masked. Of a table the
            operations are those of a head that is tied to it.
    """
    leaves = jax.tree.leaves(nnx.state(layer))
    bytes_held = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    if isinstance(layer, Table):
        held = sum(math.prod(x.shape) for x in leaves)
        flops = 2 * held
        if isinstance(layer, KroneckerEmbedding):
            flops = sum(2 * matmul_cost(_turned(one)) for one in layer.terms)
            flops += (len(layer.a) - 1) * layer.num_embeddings
        return Cost(held, bytes_held, flops, held)
    if isinstance(layer, KroneckerLinear):
        parts = [*layer.a, *layer.b, *(layer.scales or ())]
        pairs: Any = zip(layer.a, layer.b, strict=True)
        # Only the shapes of the two are looked at.
        flops = sum(2 * matmul_cost(KroneckerTerms(*pair)) for pair in pairs)
        flops += (len(layer.a) - 1) * layer.out_features
    elif isinstance(layer, InterpolativeLinear):
        parts = [layer.columns, layer.rest]
        flops = 2 * sum(math.prod(one.shape) for one in parts)
    else:
        parts = [layer.kernel]
        flops = 2 * layer.in_features * layer.out_features
    bias = 0 if layer.bias is None else layer.out_features
    held = sum(map(factors.num_held, parts))
    kept = sum(map(factors.num_kept, parts))
    if isinstance(layer, MaskedLinear):
        kept = int(layer.mask[...].sum())
    return Cost(kept + bias, bytes_held, flops + bias, held + bias)


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


def describe(layer: Layer | Table) -> dict[str, Any]:
    """Return what a layer is, without its numbers, as values that JSON knows."""
    if isinstance(layer, KroneckerEmbedding):
        pairs = zip(layer.a, layer.b, strict=True)
        shapes = [{"a": list(a.shape), "b": list(b.shape)} for a, b in pairs]
        return {"kind": "kronecker-embedding", "terms": shapes}
    if isinstance(layer, nnx.Embed):
        return {"kind": "dense", "shape": list(shape_of(layer))}
    facts: dict[str, Any] = {"bias": layer.bias is not None}
    if isinstance(layer, KroneckerLinear):
        pairs = zip(layer.a, layer.b, strict=True)
        shapes = [
            {"a": list(a.shape), "b": list(b.shape), **_held(a=a, b=b)}
            for a, b in pairs
        ]
        facts["rows"], facts["columns"] = (
            order is not None for order in (layer.inputs, layer.outputs)
        )
        if layer.scales is not None:
            facts["scales"] = True
        return {"kind": "kronecker", "terms": shapes, **facts}
    if isinstance(layer, InterpolativeLinear):
        shape = [layer.in_features, layer.out_features]
        facts |= _held(columns=layer.columns, rest=layer.rest)
        rank = layer.rest.shape[0]
        return {"kind": "interpolative", "shape": shape, "rank": rank, **facts}
    kind = "masked" if isinstance(layer, MaskedLinear) else "dense"
    shape = [layer.in_features, layer.out_features]
    return {"kind": kind, "shape": shape, **facts}


def from_description(description: Mapping[str, Any]) -> Layer | Table:
    """Return the layer of a `describe`, with abstract float32 arrays.

    Raises:
        ValueError: If it describes no layer.
    """
    try:
        kind = description["kind"]
        if kind == "kronecker-embedding":
            return KroneckerEmbedding(_terms(description))
        with_bias = bool(description["bias"])
        if kind == "kronecker":
            terms = _terms(description)
            n_in, n_out = terms[0].shape
            scales = None
            if description.get("scales"):
                scales = [_abstract(one.a.shape[:1]) for one in terms]
            bias = _abstract((n_out,)) if with_bias else None
            made = KroneckerLinear(terms, bias, scales=scales)
            for i, one in enumerate(description["terms"]):
                for side in one.get("held", {}):
                    _hold(getattr(made, _either(side, "a", "b")), i, one["held"][side])
            if description.get("rows"):
                made.inputs = nnx.data(Order(_abstract((n_in,), jnp.int32)))
            if description.get("columns"):
                made.outputs = nnx.data(Order(_abstract((n_out,), jnp.int32)))
            return made
        n_in, n_out = _sizes(description["shape"])
        if kind == "interpolative":
            (rank,) = _sizes([description["rank"]])
            if rank > n_out:
                raise TypeError(f"rank {rank} of {n_out} outputs")
            made = nnx.eval_shape(
                InterpolativeLinear._outline,
                _abstract((n_in, rank)),
                _abstract((rank, n_out - rank)),
                _abstract((n_out,)) if with_bias else None,
            )
            for name, how in description.get("held", {}).items():
                part = getattr(made, _either(name, "columns", "rest"))
                setattr(made, name, factors.from_description(how, part.shape))
            return made
        if kind == "masked":
            mask = jax.ShapeDtypeStruct((n_in, n_out), bool)
            bias = _abstract((n_out,)) if with_bias else None
            return nnx.eval_shape(MaskedLinear, _abstract((n_in, n_out)), mask, bias)
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{description!r} describes no layer: {error}") from error
    raise ValueError(f"a layer of kind {kind!r} is unknown; update kronjax")


def _held(**parts) -> dict[str, Any]:
    """Say of those parts of a layer that are not held whole how they are."""
    said = {name: factors.describe(one) for name, one in parts.items()}
    said = {name: how for name, how in said.items() if how is not None}
    return {"held": said} if said else {}


def _hold(parts, i, how):
    parts[i] = factors.from_description(how, parts[i].shape)


def _either(name, *names):
    if name not in names:
        raise KeyError(name)
    return name


def _turned(terms: KroneckerTerms) -> KroneckerTerms:
    """Return the outline of the transposed sum."""
    (r, m1, n1), (_, m2, n2) = terms.a.shape, terms.b.shape
    return KroneckerTerms(_abstract((r, n1, m1)), _abstract((r, n2, m2)))


def _terms(description):
    shapes = [(_sizes(x["a"]), _sizes(x["b"])) for x in description["terms"]]
    return [KroneckerTerms(_abstract(a), _abstract(b)) for a, b in shapes]


def _abstract(shape, dtype=jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def _sizes(shape):
    if not all(isinstance(size, int) and size > 0 for size in shape):
        raise TypeError(f"sizes {shape!r}")
    return tuple(shape)


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
