"""Tests of the command line run as users run kronjax; see `language_models`.

A file with another `folder` than that of `compressions` defines its own.
"""

from compressions import folder, untimed  # noqa: F401
from language_models import (  # noqa: F401
    dense,
    quickly_compiled,
    settings,
    tiny,
    tokenizer,
    tokens,
)
