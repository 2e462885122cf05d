"""Language models in JAX: in from Hugging Face folders, and out to them.

`load` reads a model, `save` writes it with whatever layers it has, `export` multiplies
them out; `evaluate` holds the perplexity protocols. Names are loaded when they are
first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kronjax.lm import evaluate
    from kronjax.lm.checkpoint import export, load, save
    from kronjax.lm.generation import generate

__all__ = ["evaluate", "export", "generate", "load", "save"]

_HOMES = {
    "export": "kronjax.lm.checkpoint",
    "load": "kronjax.lm.checkpoint",
    "save": "kronjax.lm.checkpoint",
    "generate": "kronjax.lm.generation",
}


def __getattr__(name):
    """Load a public name from its home."""
    if name == "evaluate":
        return importlib.import_module("kronjax.lm.evaluate")
    if name not in _HOMES:
        raise AttributeError(f"module 'kronjax.lm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__():
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
