"""Language models in JAX: in from Hugging Face folders, and out to them.

`load` reads a model, `save` writes it with whatever layers it has, `export` multiplies
them out; `compress` makes a smaller one; `evaluate` holds the perplexity protocols.
Names are loaded when they are first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kronjax.lm import evaluate
    from kronjax.lm.checkpoint import export, load, save
    from kronjax.lm.compression import compress
    from kronjax.lm.generation import generate

__all__ = ["compress", "evaluate", "export", "generate", "load", "save"]

_HOMES = {
    "compress": "kronjax.lm.compression",
    "export": "kronjax.lm.checkpoint",
    "load": "kronjax.lm.checkpoint",
    "save": "kronjax.lm.checkpoint",
    "generate": "kronjax.lm.generation",
}

_MODULES = {"calibrate", "evaluate", "latency", "sizes", "text", "tokenizer", "train"}


def __getattr__(name):
    """Load a public name from its home."""
    if name in _MODULES:
        return importlib.import_module(f"kronjax.lm.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'kronjax.lm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__():
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
