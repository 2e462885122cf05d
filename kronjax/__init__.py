"""Sums of Kronecker products, fitted to matrices in the spectral norm.

`approximate` is the front door, `solve` the pure function inside it, `Configuration`
what both look for. Names are loaded when they are first used, so that the command line
answers before jax has been imported.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kronjax.approximation import Approximation, approximate
    from kronjax.budget import search
    from kronjax.continuation import solve
    from kronjax.descent import Status
    from kronjax.kronecker import Configuration, KroneckerTerms

__version__ = "0.1.0"

__all__ = [
    "Approximation",
    "Configuration",
    "KroneckerTerms",
    "Status",
    "approximate",
    "search",
    "solve",
]

_HOMES = {
    "Approximation": "kronjax.approximation",
    "Configuration": "kronjax.kronecker",
    "KroneckerTerms": "kronjax.kronecker",
    "Status": "kronjax.descent",
    "approximate": "kronjax.approximation",
    "search": "kronjax.budget",
    "solve": "kronjax.continuation",
}


def __getattr__(name):
    """Load a public name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kronjax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__():
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
