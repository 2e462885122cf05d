"""What a layer is, without its numbers, as values that JSON holds."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kronjax.kronecker import KroneckerTerms
from kronjax.nn import factors
from kronjax.nn.layers import (
    InterpolativeLinear,
    KroneckerEmbedding,
    KroneckerLinear,
    MaskedLinear,
    Order,
)
from kronjax.nn.surgery import Layer, Table, shape_of


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


def _terms(description):
    shapes = [(_sizes(x["a"]), _sizes(x["b"])) for x in description["terms"]]
    return [KroneckerTerms(_abstract(a), _abstract(b)) for a, b in shapes]


def _abstract(shape, dtype=jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def _sizes(shape):
    if not all(isinstance(size, int) and size > 0 for size in shape):
        raise TypeError(f"sizes {shape!r}")
    return tuple(shape)
