"""Block refinement: training of factors to reproduce the outputs of dense blocks.

    min over the factors of a block   mean over tokens of ‖y' − y‖² / ‖y‖²

with `y` the output of the dense block on its own input, and `y'` that of the compressed
block on the output of the compressed blocks before it: earlier errors are compensated
where that is possible. No labels are used, and one block is trained at a time, so that
memory holds a few arrays of states and the optimiser of one block. Each block keeps its
new factors only if they reduce the error on windows that it was not trained on.

References: Hubara et al. (2021) and Li et al. (2021), for the reconstruction of blocks.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from kronjax import nn
from kronjax.io.cache import Cache, digest
from kronjax.io.progress import bar
from kronjax.lm.models import attention
from kronjax.lm.models.base import LanguageModel, fingerprint

RATE = 1e-3
"""Peak learning rate of Adam; it rises over a tenth of the steps and falls to zero."""


@dataclasses.dataclass(frozen=True)
class Block:
    """The refinement of one block.

    Attributes:
        before: Relative squared error on held-out windows before the steps.
        after: The same after the steps.
        kept: Whether the new factors were kept.
    """

    before: float
    after: float
    kept: bool


def refine(
    model: LanguageModel,
    dense: LanguageModel,
    tokens: np.ndarray,
    *,
    steps: int = 100,
    context: int = 512,
    batch: int = 2,
    rate: float = RATE,
    work: Cache | None = None,
    progress: bool | None = None,
) -> tuple[Block | None, ...]:
    """Train the factors of every block to reproduce the dense block.

    Args:
        model: The compressed model, changed in place.
        dense: The dense model that it was made from.
        tokens: `[n]`, the calibration text; every eighth window is held out.
        steps: Number of steps for each block.
        context: Number of tokens in a window.
        batch: Number of windows in a step.
        rate: Peak learning rate.
        work: Cache of finished blocks.
        progress: Whether to draw a bar; by default on a terminal, after two seconds.

    Returns:
        A `Block` for every block, or None where it has no factors.

    Raises:
        ValueError: If there are fewer than 9 windows, or no steps.
    """
    check(model, tokens, steps, context)
    context = min(context, model.config.context)
    count = len(tokens) // context
    windows = jnp.asarray(tokens[: count * context].reshape(count, context))
    held_out = np.flatnonzero(np.arange(count) % 8 == 7)
    training = np.flatnonzero(np.arange(count) % 8 != 7)
    work = work or Cache()
    key = digest(
        fingerprint(model), fingerprint(dense), tokens, steps, context, batch, rate
    )
    embed, run, step, error = _programs(model, batch, context, steps, rate)
    theirs = _mapped(functools.partial(embed, *nnx.split(dense)), windows, batch)
    ours = theirs  # embeddings are not compressed
    results: list[Block | None] = []
    with bar(len(model.blocks), "refining", unit="blocks", wanted=progress) as advance:
        for i, (block, whole) in enumerate(
            zip(model.blocks, dense.blocks, strict=True)
        ):
            graph, state = nnx.split(whole)
            theirs = _mapped(functools.partial(run, graph, state), theirs, batch)
            done = None
            if _factored(block):
                draws = np.random.default_rng(i).permutation(
                    np.resize(training, steps * batch)
                )
                order = draws.reshape(steps, batch)
                train = functools.partial(
                    _train, block, ours, theirs, order, held_out, step, error
                )
                arrays, facts = work.get_or_compute("block", train, key, i)
                _put(block, arrays)
                done = Block(**facts)
            results.append(done)
            graph, state = nnx.split(block)
            ours = _mapped(functools.partial(run, graph, state), ours, batch)
            advance(1)
    return tuple(results)


def check(
    model: LanguageModel, tokens: np.ndarray, steps: int, context: int = 512
) -> None:
    """Check the arguments of `refine`.

    Raises:
        ValueError: If there are fewer than 9 windows, or no steps.
    """
    context = min(context, model.config.context)
    if len(tokens) // context < 9:
        raise ValueError(
            f"refinement needs 9 windows of {context} tokens, the text has "
            f"{len(tokens)} tokens"
        )
    if steps < 1:
        raise ValueError(f"refinement needs at least one step; got {steps}")


def _factored(block: nnx.Module) -> list[str]:
    """Return the names of the layers of a block that are not dense."""
    layers = nn.linear_layers(block)
    return [name for name, layer in layers.items() if not nn.is_dense(layer)]


def _factors(block: nnx.Module) -> Callable[[Any, Any], bool]:
    """Return a filter of the parameters of factored layers, biases left out."""
    names = _factored(block)

    def is_factor(path, value):
        dotted = ".".join(map(str, path))
        inside = any(dotted.startswith(f"{name}.") for name in names)
        return inside and isinstance(value, nnx.Param) and path[-1] != "bias"

    return is_factor


def _train(block, ours, theirs, order, held_out, step, error):
    """Return the trained factors of a block, if they are better, and facts."""
    batch = order.shape[1]
    graph, stored, rest = nnx.split(block, _factors(block), ...)
    # Steps are smaller than the spacing of 16-bit floats.
    factors = jax.tree.map(lambda x: x.astype(jnp.float32), stored)
    test = [held_out[k : k + batch] for k in range(0, len(held_out), batch)]

    def measured(factors):
        # The last batch is filled up by repeating its windows.
        filled = [np.resize(pick, batch) for pick in test]
        return float(
            np.mean([error(graph, factors, rest, ours[x], theirs[x]) for x in filled])
        )

    before = measured(factors)
    trained, memory = factors, None
    for pick in order:
        trained, memory = step(graph, trained, memory, rest, ours[pick], theirs[pick])
    after = measured(trained)
    kept = after < before
    leaves = jax.tree.leaves(trained) if kept else []
    arrays = {str(i): np.asarray(x) for i, x in enumerate(leaves)}
    return arrays, dataclasses.asdict(Block(before, after, kept))


def _put(block, arrays) -> None:
    """Give a block the factors from `_train`; without any, leave it as it is."""
    if arrays:
        _, stored, _ = nnx.split(block, _factors(block), ...)
        leaves, structure = jax.tree.flatten(stored)
        cast = [jnp.asarray(arrays[str(i)], x.dtype) for i, x in enumerate(leaves)]
        nnx.update(block, jax.tree.unflatten(structure, cast))


def _programs(model, batch, context, steps, rate):
    """Return compiled functions: embedding, a block, a training step, the error."""
    warmup = max(steps // 10, 1)
    schedule = optax.warmup_cosine_decay_schedule(
        0, rate, warmup, max(steps, warmup + 1)
    )
    optimiser = optax.adam(schedule)
    places = attention.locate((batch, context))

    def apply(block, x):
        return model.apply_block(block, x, places)[0]

    def loss(factors, graph, rest, x, y):
        output = apply(nnx.merge(graph, factors, rest), x)
        output, y = output.astype(jnp.float32), y.astype(jnp.float32)
        difference = jnp.sum((output - y) ** 2, axis=-1)
        return jnp.mean(difference / jnp.maximum(jnp.sum(y**2, axis=-1), 1e-30))

    @functools.partial(jax.jit, static_argnums=0)
    def embed(graph, state, tokens):
        return nnx.merge(graph, state).embed(tokens, places)

    @functools.partial(jax.jit, static_argnums=0)
    def run(graph, state, x):
        return apply(nnx.merge(graph, state), x)

    @functools.partial(jax.jit, static_argnums=0)
    def step(graph, factors, memory, rest, x, y):
        memory = optimiser.init(factors) if memory is None else memory
        gradient = jax.grad(loss)(factors, graph, rest, x, y)
        updates, memory = optimiser.update(gradient, memory)
        return optax.apply_updates(factors, updates), memory

    @functools.partial(jax.jit, static_argnums=0)
    def error(graph, factors, rest, x, y):
        return loss(factors, graph, rest, x, y)

    return embed, run, step, error


def _mapped(function, arrays: jax.Array, batch: int) -> jax.Array:
    """Apply a function to batches of equal size along the first axis."""
    count = len(arrays)
    places = [np.arange(k, k + batch) % count for k in range(0, count, batch)]
    return jnp.concatenate([function(arrays[place]) for place in places])[:count]
