"""Search for the first number that is not finite, after a training step has failed.

The search checks parameters, then the outputs of layers in order, then gradients. It
runs only after a failure, so that training itself pays nothing for it.

>>> first_bad({"a": jnp.ones(2), "b": jnp.array([1.0, jnp.inf])})
'b'
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kronjax import nn
from kronjax.lm.training import objectives
from kronjax.lm.training import parameters as named
from kronjax.lm.training.parameters import Arrays
from kronjax.lm.training.step import Task, run


class _Watched:
    """A layer that records its name and whether its output is finite."""

    def __init__(
        self, layer: Any, name: str, outputs: list[tuple[str, jax.Array]]
    ) -> None:
        self._layer, self._name, self._outputs = layer, name, outputs

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self._layer(x)
        self._outputs.append((self._name, jnp.isfinite(y).all()))
        return y

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def locate(
    task: Task, parameters: Arrays, fixed: Arrays, teacher: Arrays, windows: jax.Array
) -> str:
    """Return the place of the first number that is not finite.

    Args:
        task: The task of the step.
        parameters: Parameters before the step.
        fixed: Arrays that are not trained.
        teacher: Arrays of the teacher.
        windows: `[b, t + 1]`, the windows of the step.

    Returns:
        The place in words, such as `in the output of the layer h.3.mlp.c_fc`.
    """
    arrays = {**fixed, **parameters}
    bad = first_bad(arrays)
    if bad is not None:
        return f"in the parameter {bad}"
    bad = first_bad(teacher)
    if bad is not None:
        return f"in the parameter {bad} of the teacher"
    order: list[str] = []

    def watch(arrays: Arrays, tokens: jax.Array) -> list[jax.Array]:
        model = named.put(task.form, named.cast(arrays, task.dtype))
        outputs: list[tuple[str, jax.Array]] = []
        for name, layer in {**nn.linear_layers(model), **nn.tables(model)}.items():
            nn.put(model, name, _Watched(layer, name, outputs))
        model.head(objectives.walk(model, tokens).last)
        order[:] = [name for name, _ in outputs]
        return [is_finite for _, is_finite in outputs]

    flags = run(watch, arrays, windows[:, :-1])
    for name, is_finite in zip(order, flags, strict=True):
        if not is_finite:
            return f"in the output of the layer {name}"
    graded = jax.grad(task.loss, has_aux=True)
    gradient, _ = run(graded, parameters, fixed, teacher, windows)
    # Backpropagation begins with the last block; parameters outside of blocks are last.
    names = sorted(gradient, key=lambda name: ("." not in name, *_blocks(name)))
    bad = first_bad({name: gradient[name] for name in names})
    return f"in the gradient of {bad}" if bad else "in the sum of the loss"


def _blocks(name: str) -> list[int]:
    """Return the negative numbers in a name, a key that sorts the last block first."""
    return [-int(part) for part in name.split(".") if part.isdigit()]


def first_bad(arrays: Mapping[str, jax.Array]) -> str | None:
    """Return the name of the first array with a number that is not finite."""
    for name, x in arrays.items():
        if jnp.issubdtype(x.dtype, jnp.floating) and not bool(jnp.isfinite(x).all()):
            return name
    return None
