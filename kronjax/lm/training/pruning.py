"""Gradual pruning with masks that are data and stay fixed after the schedule.

`begin` gives layers masks that keep all entries; `prune` prunes at once; `Gradual` is
called between the steps of training and prunes along a cubic schedule, after which the
masks stay fixed and the kept entries are trained further. Masks are part of the model,
so they are saved, loaded and exported with it, and changing them compiles nothing. A
masked entry is set to zero and stays masked.

In Kronecker and interpolative layers the factors are pruned. All entries are compared
by `saliency`: by magnitude, and with moments by their effect on the outputs.

References: Han et al. (2015); Zhu and Gupta (2017); Zafrir et al. (2021), for pruning
with distillation before locking; Sun et al. (2024).

>>> Pruning(0.5).kept(100)
50
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kronjax import nn, patterns
from kronjax.lm.compression.moments import Moments
from kronjax.lm.models.base import LanguageModel, inner_layers
from kronjax.lm.training import masks, saliency
from kronjax.lm.training.settings import Pruning

UPDATES = 50
"""The largest number of changes of masks in a gradual schedule."""


def begin(model: LanguageModel, pruning: Pruning) -> list[str]:
    """Give the layers to prune masks that keep all entries.

    Args:
        model: Changed in place. Existing masks stay.
        pruning: The layers and the pattern.

    Returns:
        The names of the layers.

    Raises:
        ValueError: If none matches, or a layer cannot be pruned so; names it.
    """
    layers = inner_layers(model)
    names = patterns.matching(pruning.match, layers)
    for name in names:
        try:
            shapes = jax.eval_shape(lambda layer=layers[name]: saliency.of(layer))
            _check(shapes, pruning)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        masked = nn.as_layer(layers[name]).with_masks()
        if masked is not layers[name]:
            nn.replace(model, name, masked)
    return names


def prune(
    model: LanguageModel,
    pruning: Pruning,
    moments: Moments | None = None,
    *,
    sparsity: float | None = None,
) -> None:
    """Prune a model at once.

    Args:
        model: Changed in place.
        pruning: The layers and the sparsity.
        moments: Moments of the inputs, to weight entries by, or None.
        sparsity: A sparsity in place of the final one.

    Raises:
        ValueError: As for `begin`, and if the moments are those of other layers.
    """
    names = begin(model, pruning)
    layers = nn.linear_layers(model)
    inputs = None
    if moments is not None:
        if not set(names) <= set(moments.sources):
            raise ValueError("the moments are those of another model")
        inputs = {name: moments.input(name) for name in names}
    sparsity = pruning.final if sparsity is None else sparsity
    chosen = {name: layers[name] for name in names}
    for name, new in _masks(chosen, pruning, inputs, sparsity).items():
        for place, part in nn.as_layer(layers[name]).parts().items():
            value, kept = part.value[...], new[place] & part.mask[...]
            _assign(part.value, jnp.where(kept, value, jnp.zeros((), value.dtype)))
            _assign(part.mask, kept)


class Gradual:
    """A hook that prunes between the steps of training, along a schedule.

    Its effect depends on the number of the step and on the model only, so that a
    resumed run continues as it would have without the interruption.

    Args:
        pruning: The layers, the sparsity and the schedule.
        steps: Number of steps of the run.
        moments: Moments of the inputs, to weight entries by, or None.

    Raises:
        ValueError: If the schedule is longer than the run.
    """

    def __init__(
        self, pruning: Pruning, steps: int, moments: Moments | None = None
    ) -> None:
        """Plan the steps at which masks change."""
        rising = round(0.6 * (steps - pruning.begin))
        rising = max(rising, 0) if pruning.steps is None else pruning.steps
        if pruning.begin + rising > steps:
            raise ValueError(
                f"pruning ends at step {pruning.begin + rising}, the run has {steps} "
                "steps: give more steps, or a shorter schedule"
            )
        every = pruning.every or max(-(-rising // UPDATES), 1)
        last = pruning.begin + rising
        when = sorted({*range(pruning.begin, last, every), last})
        self.pruning, self.steps, self.moments = pruning, steps, moments
        self.schedule = {
            step: masks.sparsity_at(step, pruning.begin, rising, pruning.final)
            for step in when
        }

    def __repr__(self) -> str:
        """Return all that decides its effect."""
        text = self.moments and self.moments.tokens_sha256
        return f"Gradual({self.pruning}, steps={self.steps}, moments={text})"

    def due(self, step: int) -> bool:
        """Return whether masks change after a number of steps."""
        return self.schedule.get(step, 0) > 0

    def __call__(self, step: int, model: LanguageModel) -> None:
        """Change the masks of a model, if they are due.

        Args:
            step: The number of finished steps.
            model: Changed in place; `begin` has given it masks.
        """
        if self.due(step):
            sparsity = self.schedule[step]
            prune(model, self.pruning, self.moments, sparsity=sparsity)

    def state(self) -> dict[str, Any]:
        """Return an empty state: masks are stored with the model."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore nothing."""


def sparsity(model: LanguageModel) -> float:
    """Return the fraction of masked parameters of linear layers, without the head.

    Biases are counted; they are never masked.
    """
    costs = [nn.cost(layer) for layer in inner_layers(model).values()]
    return 1 - sum(x.parameters for x in costs) / max(sum(x.held for x in costs), 1)


def _check(shapes: Mapping[Any, Any], pruning: Pruning) -> None:
    """Check that the parts of a layer fit the pattern and the scope."""
    if pruning.scope == "output" and "kernel" not in shapes:
        raise ValueError("its factors belong to all outputs: take another scope")
    if pruning.pattern is not None:
        n, m = pruning.pattern
        for shape in (x.shape for x in shapes.values()):
            if shape[-2] % m:
                raise ValueError(f"{shape[-2]} inputs cannot be grouped for {n}:{m}")


def _assign(variable: Any, value: jax.Array) -> None:
    """Give a variable another value, with the sharding of the old one."""
    variable[...] = jax.device_put(value, variable[...].sharding)


def _masks(layers, pruning, moments, sparsity):
    """Return the masks of all parts of layers, by the names of both."""
    graph, state = nnx.split(dict(layers))
    program = _program(graph, pruning.scope, pruning.pattern)
    if pruning.pattern is not None:
        n, m = pruning.pattern
        # During the schedule groups keep more, as many as its sparsity allows.
        return program(state, moments, max(n, -int(-m * (1 - sparsity) // 1)))
    entries = {
        name: sum(x.size for x in jax.tree.leaves(jax.eval_shape(saliency.of, layer)))
        for name, layer in layers.items()
    }
    if pruning.scope == "global":
        kept = pruning.kept(sum(entries.values()), sparsity)
        # `keep_largest` refuses numbers that are too large for an int32.
        return program(state, moments, min(kept, np.iinfo(np.int32).max))
    if pruning.scope == "output":
        entries = {name: layers[name].in_features for name in layers}
    counts = {name: pruning.kept(x, sparsity) for name, x in entries.items()}
    return program(state, moments, counts)


@functools.lru_cache(maxsize=16)
def _program(graph, scope, pattern):
    """Return the compiled function of state, moments and counts that makes masks."""

    def run(state, moments, kept):
        layers = nnx.merge(graph, state)
        scores = {
            name: saliency.of(layer, None if moments is None else moments[name])
            for name, layer in layers.items()
        }
        if pattern is not None:
            return jax.tree.map(
                lambda x: masks.keep_pattern(x, kept, pattern[1]), scores
            )
        if scope == "global":
            return _largest(scores, kept)
        if scope == "output":

            def each(column, count):
                return masks.keep_largest([column], count)[0]

            columns = jax.vmap(each, in_axes=(1, None), out_axes=1)
            return {
                name: {place: columns(x, kept[name]) for place, x in parts.items()}
                for name, parts in scores.items()
            }
        return {name: _largest(parts, kept[name]) for name, parts in scores.items()}

    return jax.jit(run)


def _largest(tree, count):
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(masks.keep_largest(leaves, count))
