"""Blocks fitted in turn, each weighted by what the fitted ones before hand on.

The moments of the inputs of a block are measured again, on the states that come out of
the compressed blocks before it; those of gradients stay the ones of the dense model.
One pass over the text in all, one block at a time.

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
    """Hand every block its moments, in order, and let it be fitted.

    Args:
        model: Changed in place by `fit_block`.
        moments: Of the dense model.
        tokens: `[n]`, those of calibration; cut into windows, the rest left out.
        fit_block: Called with the number of a block, and moments in which the inputs
            of its layers are measured anew; puts factors into it.
        context: Tokens in a window.
    """
    context = min(context, model.config.context, len(tokens))
    count = len(tokens) // context
    windows = np.reshape(tokens[: count * context], (count, 1, context))
    embed, see, run = _programs(model, context)
    states = [embed(*nnx.split(model), jnp.asarray(one)) for one in windows]
    for i, block in enumerate(model.blocks):
        names = _full_names(model, block)
        graph, state = nnx.split(block)
        sums = None
        for x in states:
            found = see(graph, state, x)
            sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
        means = {
            names[name]: np.asarray(one) / np.float32(count * context)
            for name, one in (sums or {}).items()
        }
        owners = {moments.sources[name]: one for name, one in means.items()}
        fit_block(i, dataclasses.replace(moments, inputs={**moments.inputs, **owners}))
        graph, state = nnx.split(block)
        states = [run(graph, state, x) for x in states]


def _full_names(model, block):
    """Return the names in the model of the layers of a block, by those in the block."""
    names = {id(layer): name for name, layer in nn.linear_layers(model).items()}
    return {name: names[id(x)] for name, x in nn.linear_layers(block).items()}


def _programs(model, context):
    """Return what embeds, what sees the inputs of a block, and what runs it."""
    places = attention.locate((1, context))

    @functools.partial(jax.jit, static_argnums=0)
    def embed(graph, state, tokens):
        return nnx.merge(graph, state).embed(tokens, places)

    @functools.partial(jax.jit, static_argnums=0)
    def see(graph, state, x):
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

    return embed, see, run
