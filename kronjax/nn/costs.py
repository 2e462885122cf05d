"""What a layer stores, and what it computes for a token.

>>> import jax.numpy as jnp
>>> layer = KroneckerLinear([KroneckerTerms(jnp.ones((1, 2, 3)), jnp.ones((1, 4, 5)))])
>>> cost(layer).parameters
26
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kronjax.kronecker import KroneckerTerms, matmul_cost
from kronjax.nn import factors
from kronjax.nn.layers import (
    InterpolativeLinear,
    KroneckerEmbedding,
    KroneckerLinear,
    MaskedLinear,
)
from kronjax.nn.surgery import Layer, Table


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


def _turned(terms: KroneckerTerms) -> Any:
    """Return the outline of the transposed sum."""
    (r, m1, n1), (_, m2, n2) = terms.a.shape, terms.b.shape
    outline: Any = jax.ShapeDtypeStruct
    return KroneckerTerms(
        outline((r, n1, m1), jnp.float32), outline((r, n2, m2), jnp.float32)
    )
