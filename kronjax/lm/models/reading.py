"""Conversion of texts to the tokens of a model's own tokenizer."""

from pathlib import Path

import numpy as np

from kronjax.lm.models.base import LanguageModel, tokenizer_of
from kronjax.lm.text.documents import Text, read_text


def tokens_of(model: LanguageModel, text: str | Path | Text | np.ndarray) -> np.ndarray:
    """Return the tokens of a text, `[n]`; tokens that are given are returned as is."""
    if isinstance(text, np.ndarray):
        return text
    if isinstance(text, Path):
        text = read_text(text)
    given = text.text if isinstance(text, Text) else text
    return np.asarray(tokenizer_of(model).encode(given), np.int32)


def rest(model: LanguageModel, text: Text, tokens: int, most: int) -> Text | None:
    """Return the part of a text after the tokens that calibration reads.

    Args:
        model: The model, whose tokenizer counts the tokens.
        text: The text whose beginning calibration reads.
        tokens: Number of tokens that calibration reads.
        most: Largest number of characters to return.

    Returns:
        The text, or None if fewer than 4000 characters are left.
    """
    whole = tokens_of(model, text)
    first = len(tokenizer_of(model).decode(whole[: tokens + 1].tolist()))
    left = text.text[first : first + most]
    if len(left) < 4000:
        return None
    return Text((left,), left, text.join, f"{text.source}, from character {first}")
