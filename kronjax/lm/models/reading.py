"""Texts as a model reads them: as the tokens of its own tokenizer."""

from pathlib import Path

import numpy as np

from kronjax.lm.models.base import LanguageModel, tokenizer_of
from kronjax.lm.text.documents import Text, read_text


def tokens_of(model: LanguageModel, text: str | Path | Text | np.ndarray) -> np.ndarray:
    """Return the tokens `[n]` of a text, as the tokenizer of the model cuts it."""
    if isinstance(text, np.ndarray):
        return text
    if isinstance(text, Path):
        text = read_text(text)
    given = text.text if isinstance(text, Text) else text
    return np.asarray(tokenizer_of(model).encode(given), np.int32)


def rest(model: LanguageModel, text: Text, tokens: int, most: int) -> Text | None:
    """Return what follows the tokens that calibration reads, or None if it is little.

    Args:
        model: Whose tokenizer counts.
        text: That calibration reads the beginning of.
        tokens: That it reads.
        most: Characters to return.
    """
    whole = tokens_of(model, text)
    first = len(tokenizer_of(model).decode(whole[: tokens + 1].tolist()))
    left = text.text[first : first + most]
    if len(left) < 4000:
        return None
    return Text((left,), left, text.join, f"{text.source}, from character {first}")
