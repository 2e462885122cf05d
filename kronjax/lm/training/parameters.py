"""The arrays of a model by dotted names, for training, storage and sharding.

Parameters are selected by patterns of their names, `h.*.attn.*`. A jitted step accepts
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
        graph: The graph definition of flax.
        variables: Path in the model and empty variable, by name.
        parameters: Names of trainable arrays; the others are masks and orders.
    """

    graph: Any
    variables: Mapping[str, tuple[tuple[Any, ...], Any]]
    parameters: frozenset[str]


def take(model: nnx.Module) -> tuple[Form, Arrays]:
    """Return the form and the arrays of a model, which are shared and not copied."""
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
    """Return the model of a form with these arrays, which may be traced."""
    flat = [
        (path, variable.replace(arrays[name]))
        for name, (path, variable) in form.variables.items()
    ]
    return nnx.merge(form.graph, nnx.from_flat_state(flat))


def cast(arrays: Mapping[str, jax.Array], dtype: Any) -> Arrays:
    """Return arrays with all floating-point arrays cast to one dtype."""
    return {
        name: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
        for name, x in arrays.items()
    }


def matching(names: Iterable[str], patterns: Iterable[str]) -> frozenset[str]:
    """Return the names that match any of the patterns.

    Args:
        names: Names of parameters such as `h.0.attn.c_attn.kernel`.
        patterns: Patterns such as `h.*.attn.*`, `wte` or `*.bias`, of complete names or
            of their leading parts.

    Raises:
        ValueError: If a pattern matches nothing; the message gives some names.
    """
    names = sorted(names)
    matches: set[str] = set()
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
        matches |= hits
    return frozenset(matches)
