"""The arrays of a model by dotted names: what is trained, stored and sharded.

Parameters are picked by patterns of their names, `h.*.attn.*`, and a jitted step takes
a flat dictionary much faster than a tree of variables.

>>> from kronjax.nn import MaskedLinear
>>> layer = MaskedLinear(jnp.ones((2, 3)), jnp.ones((2, 3)))
>>> form, arrays = take(layer)
>>> sorted(arrays), form.parameters
(['kernel', 'mask'], frozenset({'kernel'}))
"""

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Arrays = dict[str, jax.Array]
"""Arrays by dotted name, such as `h.0.mlp.c_fc.kernel`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
    """A model without its arrays.

    Attributes:
        graph: What flax needs to put it together.
        variables: For each name the path in the model and the empty variable.
        parameters: Names of what may be trained; the others are masks and orders.
    """

    graph: Any
    variables: Mapping[str, tuple[tuple[Any, ...], Any]]
    parameters: frozenset[str]


def take(model: nnx.Module) -> tuple[Form, Arrays]:
    """Return a model as its form and its arrays, which are shared and not copied."""
    graph, state = nnx.split(model)
    variables, arrays, parameters = {}, {}, set()
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        arrays[name] = variable.get_value()
        variables[name] = path, variable
        if isinstance(variable, nnx.Param):
            parameters.add(name)
    return Form(graph, variables, frozenset(parameters)), arrays


def put(form: Form, arrays: Mapping[str, jax.Array]) -> Any:
    """Return the model of a form that holds these arrays, traced ones perhaps."""
    flat = [
        (path, variable.replace(arrays[name]))
        for name, (path, variable) in form.variables.items()
    ]
    return nnx.merge(form.graph, nnx.from_flat_state(flat))


def cast(arrays: Mapping[str, jax.Array], dtype: Any) -> Arrays:
    """Return arrays with all that are no integers or masks in one dtype."""
    return {
        name: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
        for name, x in arrays.items()
    }


def matching(names: Iterable[str], patterns: Iterable[str]) -> frozenset[str]:
    """Return the names of parameters that are in a layer of one of the patterns.

    Args:
        names: Such as `h.0.attn.c_attn.kernel`.
        patterns: Such as `h.*.attn.*`, `wte` or `*.bias`: of whole names or of what
            they are in.

    Raises:
        ValueError: If a pattern matches nothing; says what it might have.
    """
    names = sorted(names)
    found: set[str] = set()
    for pattern in patterns:
        hits = {
            name
            for name in names
            if fnmatch.fnmatchcase(name, pattern)
            or fnmatch.fnmatchcase(name, f"{pattern}.*")
        }
        if not hits:
            raise ValueError(
                f"nothing is called {pattern!r}; there are {', '.join(names[:4])}, ..."
            )
        found |= hits
    return frozenset(found)
