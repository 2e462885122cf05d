"""Sequential fitting: each block is weighted by the outputs of the compressed ones.

The moments of the inputs of a block are measured again, on the states that come out of
the compressed blocks before it; the moments of gradients stay those of the dense model.
All blocks together take one pass over the text.

References: Frantar and Alistarh (2023), who quantise in this order.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kronjax import nn
from kronjax.lm.compression.moments import Moments, gram, record
from kronjax.lm.models import attention
from kronjax.lm.models.base import LanguageModel


def fit(
    model: LanguageModel,
    moments: Moments,
    tokens: np.ndarray,
    fit_block: Callable[[int, Moments], Any],
    *,
    context: int = 512,
) -> None:
    """Fit the blocks of a model in order, with the moments of their actual inputs.

    Args:
        model: Changed in place by `fit_block`.
        moments: Moments of the dense model.
        tokens: `[n]`, the calibration text; cut into windows, the remainder left out.
        fit_block: Function of the number of a block, and of moments in which the inputs
            of its layers are measured again; it puts factors into the block.
        context: Number of tokens in a window.
    """
    context = min(context, model.config.context, len(tokens))
    count = len(tokens) // context
    windows = np.reshape(tokens[: count * context], (count, 1, context))
    embed, measure, run = _programs(model, context)
    states = [embed(*nnx.split(model), jnp.asarray(window)) for window in windows]
    for i, block in enumerate(model.blocks):
        names = _full_names(model, block)
        graph, state = nnx.split(block)
        sums = None
        for x in states:
            grams = measure(graph, state, x)
            sums = grams if sums is None else jax.tree.map(jnp.add, sums, grams)
        means = {
            names[name]: np.asarray(total) / np.float32(count * context)
            for name, total in (sums or {}).items()
        }
        owners = {moments.sources[name]: mean for name, mean in means.items()}
        fit_block(i, dataclasses.replace(moments, inputs={**moments.inputs, **owners}))
        graph, state = nnx.split(block)
        states = [run(graph, state, x) for x in states]


def _full_names(model, block):
    """Return the names that the layers of a block have in the model, by short name."""
    names = {id(layer): name for name, layer in nn.linear_layers(model).items()}
    return {name: names[id(x)] for name, x in nn.linear_layers(block).items()}


def _programs(model, context):
    """Return compiled functions: embedding, Gram matrices of the inputs, a block."""
    places = attention.locate((1, context))

    @functools.partial(jax.jit, static_argnums=0)
    def embed(graph, state, tokens):
        return nnx.merge(graph, state).embed(tokens, places)

    @functools.partial(jax.jit, static_argnums=0)
    def measure(graph, state, x):
        block, grams = nnx.merge(graph, state), {}

        def note(name, x, y):
            grams[name] = gram(x)
            return y

        record(block, note)
        model.apply_block(block, x, places)
        return grams

    @functools.partial(jax.jit, static_argnums=0)
    def run(graph, state, x):
        return model.apply_block(nnx.merge(graph, state), x, places)[0]

    return embed, measure, run
