"""Text of tokens that arrive one at a time.

A token may hold a part of a character, and a tokenizer made by SentencePiece drops the
space before the first token that it decodes. So tokens are decoded together with those
before them, as few as suffice, and a character is returned once it is complete.

>>> class Bytes:
...     def decode(self, tokens):
...         return bytes(tokens).decode(errors="replace")
>>> stream = TextStream(Bytes())
>>> [stream.add(byte) for byte in "né!".encode()], stream.end()
(['n', '', 'é', '!'], '')
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """The part of a tokenizer that is needed."""

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Return the text of tokens."""
        ...


class TextStream:
    """The text of tokens, in pieces.

    Args:
        tokenizer: The tokenizer of the model.
        before: Tokens whose text is not returned, such as those of a prompt.
    """

    def __init__(
        self, tokenizer: Decoder, before: Sequence[int] | np.ndarray = ()
    ) -> None:
        """Decode the tokens before the first one."""
        self._tokenizer = tokenizer
        self._tokens = [int(token) for token in before]
        self._returned = len(self._tokens)
        self._text = tokenizer.decode(self._tokens)

    def add(self, token: int) -> str:
        """Return the text that a token completes, which may be empty."""
        self._tokens.append(int(token))
        text = self._tokenizer.decode(self._tokens)
        return "" if text.endswith(_INCOMPLETE) else self._piece(text)

    def end(self) -> str:
        """Return what is left after the last token, such as half a character."""
        return self._piece(self._tokenizer.decode(self._tokens))

    def _piece(self, text: str) -> str:
        new = self._tokens[self._returned :]
        if text.startswith(self._text):
            piece = text[len(self._text) :]
        else:
            piece = self._tokenizer.decode(new)
        if piece:
            self._tokens, self._returned = new, len(new)
            self._text = self._tokenizer.decode(new)
        return piece
