"""Parameters, bytes and operations of a model, layer by layer.

FLOPs are multiplications and additions for one token, without those of attention
scores, which grow with the context. A tied embedding is counted once as parameters, and
as the head among the FLOPs.

>>> from kronjax.lm.models import gpt2
>>> model = nnx.eval_shape(lambda: gpt2.Model(gpt2.Config(), rngs=nnx.Rngs(0)))
>>> count(model).parameters
124439808
"""

import dataclasses
import math

import jax
from flax import nnx

from kronjax import nn
from kronjax.lm.models.base import LanguageModel


@dataclasses.dataclass(frozen=True)
class LayerSize:
    """The size of one linear layer.

    Attributes:
        name: Name from `kronjax.nn.surgery.linear_layers`.
        kind: `dense`, `masked`, the rank of an interpolative layer, or the
            configurations of a Kronecker sum, and how their factors are stored.
        shape: `(n_in, n_out)`.
        parameters: Number of parameters, bias included; of a mask the kept ones.
        bytes: Bytes that store them.
        flops: Operations for one token.
        held: Number of stored parameters, masked ones included.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    parameters: int
    bytes: int
    flops: int
    held: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The size of a whole model.

    Attributes:
        layers: Sizes of the linear layers, in the order of the model.
        tables: Sizes of the embeddings; their FLOPs are those of a tied head.
        embeddings: Number of parameters of embeddings, a tied one counted once.
        other: Number of all other parameters: those of norms.
        parameters: Number of all parameters; of a mask the kept ones.
        bytes: Bytes that store them, masks included.
        flops: Operations for one token, those of the head included.
        held: Number of stored parameters, masked ones included.
    """

    layers: tuple[LayerSize, ...]
    tables: tuple[LayerSize, ...]
    embeddings: int
    other: int
    parameters: int
    bytes: int
    flops: int
    held: int


def count(model: LanguageModel) -> Sizes:
    """Count the parameters, bytes and operations of a model.

    Args:
        model: A model of any port; arrays may be abstract, unless layers are masked.
    """
    layers, tables = map(_sizes, (nn.linear_layers(model), nn.tables(model)))
    embeddings = sum(table.parameters for table in tables)
    other = _num_parameters(model) - sum(x.held for x in layers) - embeddings
    head = 0
    if model.config.tie_word_embeddings:
        size = model.config.vocab_size
        head = max(table.flops for table in tables if table.shape[0] == size)
    return Sizes(
        layers=layers,
        tables=tables,
        embeddings=embeddings,
        other=other,
        parameters=sum(layer.parameters for layer in layers) + embeddings + other,
        bytes=sum(
            math.prod(x.shape) * x.dtype.itemsize
            for x in jax.tree.leaves(nnx.state(model))
        ),
        flops=sum(layer.flops for layer in layers) + head,
        held=_num_parameters(model),
    )


def _sizes(named) -> tuple[LayerSize, ...]:
    return tuple(
        LayerSize(name, kind(x), nn.shape_of(x), *dataclasses.astuple(nn.cost(x)))
        for name, x in named.items()
    )


def kind(layer: nn.Layer | nn.Table) -> str:
    """Return the structure of a layer in a few words.

    >>> import jax.numpy as jnp
    >>> from kronjax.kronecker import KroneckerTerms
    >>> a, b = jnp.ones((2, 4, 8)), jnp.ones((2, 3, 5))
    >>> kind(nn.KroneckerLinear([KroneckerTerms(a, b)]))
    '2 × 4x8 ⊗ 3x5'
    """
    return nn.as_layer(layer).summary()


def _num_parameters(module: nnx.Module) -> int:
    leaves = jax.tree.leaves(nnx.state(module, nnx.Param))
    return sum(math.prod(x.shape) for x in leaves)
