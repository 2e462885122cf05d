"""Tests of language models run as users run kronjax; see `language_models`."""

from language_models import (  # noqa: F401
    dense,
    quickly_compiled,
    settings,
    tiny,
    tokenizer,
    tokens,
)
