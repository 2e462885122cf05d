"""Search for damaged parameters: NaN and infinite entries.

A damaged parameter spoils everything that is computed after it, so messages about
results that are not finite name the parameter, not the layer where it showed.
"""

import jax.numpy as jnp
from flax import nnx

from kronjax.lm.models.base import LanguageModel


def first_damaged(model: LanguageModel) -> str | None:
    """Return the path of the first parameter that is not finite, or None.

    Args:
        model: Any language model, whose parameters are all read.
    """
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if not bool(jnp.isfinite(variable.get_value()).all()):
            return ".".join(map(str, path))
    return None


def cause(model: LanguageModel, otherwise: str) -> str:
    """Return the cause of a result that is not finite, in words.

    Args:
        model: The model that computed it.
        otherwise: The cause if all parameters are finite.
    """
    damaged = first_damaged(model)
    if damaged is None:
        return otherwise
    return f"{damaged} holds NaN or infinite entries; download the checkpoint again"
