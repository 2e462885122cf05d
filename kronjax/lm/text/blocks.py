"""Text as tokens in a memory-mapped file, and blocks of them in a shuffled order.

    block j of an epoch  =  tokens[o + j L : o + (j + 1) L + 1]

Sample `i` of a training is a pure function of the seed and `i`: epoch `i // n` has its
own permutation of the `n` blocks and its own offset `o`. The position in the data is
therefore one number, which suffices to resume a run.

A document is a row of a file with rows, or a whole text file; each is followed by the
end-of-text token. The last blocks are held out.

>>> blocks = Blocks(np.arange(10, dtype=np.uint16), length=3, seed=0)
>>> blocks.count, blocks.take(0, 2).shape
(3, (2, 4))
"""

import functools
import hashlib
import os
from pathlib import Path

import numpy as np

from kronjax.lm.text import documents as texts
from kronjax.lm.text.tokenizer import Tokenizer

_LIMIT = 2**20
"""Number of characters to tokenise at a time, extended to the end of a paragraph."""


def prepare(
    source: str | Path,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    column: str = "text",
) -> np.ndarray:
    """Return the tokens of a text, from a file in `folder` that is created if missing.

    Args:
        source: Any source that `kronjax.lm.read_text` accepts; read in pieces.
        tokenizer: The tokenizer of the model.
        folder: Folder of the file of tokens, whose name is a digest of its sources.
        column: The field with the text, where rows have several.

    Returns:
        `[n]`, uint16 or uint32, mapped into memory.

    Raises:
        ValueError: If the text is empty or malformed.
        OSError: If the text cannot be read, or the file cannot be written.
    """
    facts = str(source), column, tokenizer.digest
    mark = hashlib.sha256(f"1 {facts}".encode())
    if Path(source).is_file():
        with open(source, "rb") as file:
            mark.update(hashlib.file_digest(file, "sha256").digest())
    path = folder / f"tokens-{mark.hexdigest()[:16]}.npy"
    if not path.is_file():
        documents = texts.stream(source, column=column, size=_LIMIT)
        _write(path, documents, tokenizer)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def check_tokenizers(student: Tokenizer, teacher: Tokenizer | None) -> None:
    """Refuse a teacher with a different tokenizer.

    Args:
        student: The tokenizer of the trained model.
        teacher: The tokenizer of the teacher; None is accepted.

    Raises:
        ValueError: If they split a text into different tokens.
    """
    if teacher is None or teacher == student:
        return
    text = "The quick brown fox, 1984: naïve café.\n\ndef f(x):\n    return x**2\n"
    if not np.array_equal(
        student.encode(text, special=False), teacher.encode(text, special=False)
    ):
        raise ValueError(
            f"the teacher has another tokenizer ({teacher.size} tokens) than the "
            f"student ({student.size}): give a teacher that splits text the same way"
        )


def split(
    tokens: np.ndarray, length: int, *, fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    """Split tokens into those for training and held-out blocks at the end.

    Args:
        tokens: `[n]`.
        length: Number of tokens of a block.
        fraction: Fraction of the tokens to hold out, at least one block; 0 holds
            nothing out.

    Raises:
        ValueError: If there are too few tokens; the message says how many are needed.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the part held out is {fraction}; it must be in [0, 1)")
    held = 0 if fraction == 0 else max(round(fraction * len(tokens) / length), 1)
    needed = length * (held + 1) + 1 + (held > 0)
    if len(tokens) < needed:
        raise ValueError(
            f"the text has {len(tokens)} tokens, and a block of {length} with what is "
            f"held out needs {needed}: give more text, or a smaller --length"
        )
    # A block needs one more token, to predict it.
    cut = len(tokens) - (held * length + 1 if held else 0)
    return tokens[:cut], tokens[cut:]


class Blocks:
    """Blocks of tokens in an order determined by the seed.

    Attributes:
        count: Number of blocks in an epoch.
    """

    def __init__(self, tokens: np.ndarray, length: int, seed: int) -> None:
        """Store the tokens.

        Args:
            tokens: `[n]`, integers.
            length: Number of tokens of a block that a model reads.
            seed: Seed of the order.

        Raises:
            ValueError: If there is no complete block.
        """
        self.count = (len(tokens) - 1) // length
        if self.count < 1:
            raise ValueError(
                f"{len(tokens)} tokens hold no block of {length} and the token after "
                "it: give more text, or a smaller --length"
            )
        self._tokens, self._length, self._seed = tokens, length, seed
        self._order = functools.lru_cache(maxsize=2)(self._draw)

    def take(self, first: int, count: int) -> np.ndarray:
        """Return samples `first` to `first + count`: int32 `[count, length + 1]`."""
        windows = np.empty((count, self._length + 1), np.int32)
        for row in range(count):
            epoch, index = divmod(first + row, self.count)
            offset, order = self._order(epoch)
            begin = offset + int(order[index]) * self._length
            windows[row] = self._tokens[begin : begin + self._length + 1]
        return windows

    def _draw(self, epoch: int) -> tuple[int, np.ndarray]:
        generator = np.random.default_rng((self._seed, epoch))
        slack = len(self._tokens) - 1 - self.count * self._length
        return int(generator.integers(slack + 1)), generator.permutation(self.count)


def in_order(tokens: np.ndarray, length: int, most: int) -> np.ndarray:
    """Return up to `most` evenly spread blocks in their order: `[k, length + 1]`."""
    count = (len(tokens) - 1) // length
    picked = np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))
    return np.stack(
        [tokens[i * length : (i + 1) * length + 1].astype(np.int32) for i in picked]
    )


def _write(path, documents, tokenizer: Tokenizer) -> None:
    """Write the tokens of documents as a `.npy` file, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if tokenizer.size <= 2**16 else np.uint32)
    end = tokenizer.eos
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "xb") as file:
            # The number of tokens is filled in at the end, in a field of fixed width.
            header = functools.partial(_header, dtype)
            file.write(header(0))
            count = 0
            for document in documents:
                for part in document:
                    tokens = tokenizer.encode(part, special=False)
                    file.write(tokens.astype(dtype).tobytes())
                    count += len(tokens)
                if end is not None:
                    file.write(np.array([end], dtype).tobytes())
                    count += 1
            file.seek(0)
            file.write(header(count))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise type(error)(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _header(dtype: np.dtype, count: int) -> bytes:
    """Return the 128 bytes of the header of a one-dimensional `.npy` file."""
    description = (
        f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({count},)"
    )
    body = (description + ", }").ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + body.encode()
