"""Keys and values of a conversation, kept between its turns.

Every turn repeats the turns before it, whose keys and values are in the cache already.
The new tokens are appended in chunks of one length, padded on the left, to a cache
whose number of slots is a power of two. So every token is read once, and few programs
are compiled for a long conversation.

>>> common([1, 2, 3], [1, 2, 4, 5])
2
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kronjax.lm.models.attention import Cache
from kronjax.lm.models.base import LanguageModel

CHUNK = 64
"""Number of tokens that are appended at a time."""

SMALLEST = 256
"""Smallest number of slots of a cache."""

SPARE = 4
"""Number of chunks that fit into a new cache in addition to what is known to come."""

Append = Callable[[np.ndarray, np.ndarray, Cache], tuple[jax.Array, Cache]]
"""A function of tokens, `[1, CHUNK]`, of their mask, False for padding, and of a cache,
which it consumes. It returns the next token, `[1, 1]`, and the longer cache."""


class Session:
    """The cache of one conversation with one model."""

    def __init__(self) -> None:
        """Begin without tokens."""
        self._cache: Cache | None = None
        self._tokens: list[int] = []
        self._slots: list[int] = []  # of the tokens

    def begin(
        self,
        model: LanguageModel,
        prompt: Sequence[int] | np.ndarray,
        room: int,
        append: Append,
    ) -> tuple[jax.Array, Cache]:
        """Append the tokens of a prompt that are not in the cache yet.

        Args:
            model: The model.
            prompt: All tokens of the conversation, at least one.
            room: Number of slots that have to stay free.
            append: The compiled model.

        Returns:
            What `append` returns for the last tokens. The session is empty until the
            cache is given back by `keep`.
        """
        tokens = [int(token) for token in prompt]
        cache, self._cache = self._cache, None
        # The last token is read again, for its logits.
        known = 0 if cache is None else common(self._tokens, tokens[:-1])
        end = self._slots[known - 1] + 1 if known else 0
        if cache is None or end + _padded(len(tokens) - known) + room > cache.slots:
            known = end = 0
            # Space for further chunks, lest the next turn reads everything again.
            slots = _padded(len(tokens)) + room + SPARE * CHUNK
            cache = model.empty_cache(1, max(SMALLEST, 2 ** (slots - 1).bit_length()))
        else:
            valid = cache.valid & (jnp.arange(cache.slots) < end)
            cache = dataclasses.replace(
                cache, valid=valid, length=jnp.asarray(end, jnp.int32)
            )
        new = tokens[known:]
        width = _padded(len(new))
        row, mask = np.zeros((1, width), np.int32), np.zeros((1, width), bool)
        row[0, width - len(new) :], mask[0, width - len(new) :] = new, True
        self._tokens = tokens
        self._slots = [
            *self._slots[:known],
            *range(end + width - len(new), end + width),
        ]
        for first in range(0, width, CHUNK):
            part = slice(first, first + CHUNK)
            token, cache = append(row[:, part], mask[:, part], cache)
        return token, cache

    def keep(self, cache: Cache, tokens: Sequence[int]) -> None:
        """Take the cache back, to which tokens were appended one by one."""
        end = self._slots[-1] + 1
        self._cache = cache
        self._tokens += tokens
        self._slots += range(end, end + len(tokens))


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of tokens with which both sequences begin."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


def _padded(count: int) -> int:
    return -(-count // CHUNK) * CHUNK
