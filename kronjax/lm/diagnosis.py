"""Where a number first is no number: in a parameter, behind a layer, or in a gradient.

Looked for after a step has failed, from the outside and layer by layer, so that
training itself pays nothing for it.

>>> first_bad({"a": jnp.ones(2), "b": jnp.array([1.0, jnp.inf])})
'b'
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kronjax import nn
from kronjax.lm import arrays as named
from kronjax.lm import distillation
from kronjax.lm.arrays import Arrays
from kronjax.lm.step import Task


class _Watched:
    """A layer that notes its name if what it returns is not finite."""

    def __init__(self, layer: Any, name: str, found: list[str]) -> None:
        self._layer, self._name, self._found = layer, name, found

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self._layer(x)
        if not bool(jnp.isfinite(y).all()):
            self._found.append(self._name)
        return y

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def locate(
    task: Task, parameters: Arrays, fixed: Arrays, teacher: Arrays, windows: jax.Array
) -> str:
    """Say where a step fails first.

    Args:
        task: Of the step.
        parameters: Before the step.
        fixed: What is not trained.
        teacher: Arrays of the teacher.
        windows: `[b, t + 1]`, those of the step.

    Returns:
        A few words, such as `behind the layer h.3.mlp.c_fc`.
    """
    arrays = {**fixed, **parameters}
    bad = first_bad(arrays)
    if bad is not None:
        return f"in the parameter {bad}"
    bad = first_bad(teacher)
    if bad is not None:
        return f"in the parameter {bad} of the teacher"
    model = named.put(task.form, named.cast(arrays, task.dtype))
    found: list[str] = []
    for name, layer in {**nn.linear_layers(model), **nn.tables(model)}.items():
        nn.put(model, name, _Watched(layer, name, found))
    tokens = windows[:, :-1]
    last = distillation.walk(model, tokens).last
    if not found:
        model.head(last)
    if found:
        return f"behind the layer {found[0]}"
    gradient, _ = jax.grad(task.loss, has_aux=True)(parameters, fixed, teacher, windows)
    # A gradient comes from the last block, and what is not in a block ends it.
    order = sorted(gradient, key=lambda name: ("." not in name, *_blocks(name)))
    bad = first_bad({name: gradient[name] for name in order})
    return f"in the gradient of {bad}" if bad else "in the sum of the loss"


def _blocks(name: str) -> list[int]:
    """Return the numbers in a name, so that the last block comes first."""
    return [-int(part) for part in name.split(".") if part.isdigit()]


def first_bad(arrays: Mapping[str, jax.Array]) -> str | None:
    """Return the name of the first array with a number that is not finite."""
    for name, x in arrays.items():
        if jnp.issubdtype(x.dtype, jnp.floating) and not bool(jnp.isfinite(x).all()):
            return name
    return None
