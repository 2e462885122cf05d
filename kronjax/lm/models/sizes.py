"""What a model stores and spends, layer by layer.

FLOPs are multiplications and additions for one token; those of attention scores, which
grow with the context, are left out. A tied embedding is counted once as parameters, and
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
    """One linear layer.

    Attributes:
        name: As `kronjax.nn.surgery.linear_layers` gives it.
        kind: `dense`, `masked`, the rank of an interpolative layer, or the
            configurations of a Kronecker sum, and how their factors are held.
        shape: `(n_in, n_out)`.
        parameters: Numbers that count, bias included; of a mask the kept ones.
        bytes: Bytes that hold them.
        flops: For one token.
        held: Numbers that are held, masked ones included.
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
    """A whole model.

    Attributes:
        layers: The linear layers, in the order of the model.
        tables: The embeddings; their FLOPs are those of a head that is tied to them.
        embeddings: Parameters of embeddings, a tied one once.
        other: Parameters that are neither: those of norms.
        parameters: All of them; of a mask the kept ones.
        bytes: Bytes that hold them, masks included.
        flops: For one token, those of the head included.
        held: Numbers that are held, masked ones included.
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
    """Count what a model stores and spends.

    Args:
        model: Any port; its arrays may be abstract, unless layers are masked.

    Returns:
        `Sizes`.
    """
    found = nn.linear_layers(model)
    layers, tables = map(_sizes, (found, nn.tables(model)))
    embeddings = sum(one.parameters for one in tables)
    other = _num_parameters(model) - sum(x.held for x in layers) - embeddings
    head = 0
    if model.config.tie_word_embeddings:
        size = model.config.vocab_size
        head = max(one.flops for one in tables if one.shape[0] == size)
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
    """Say in a few words what a layer is made of.

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
