"""Conversion between text and tokens, by the tokenizer files of a checkpoint.

A `Tokenizer` holds the content of those files: it belongs to its model and is saved
byte for byte. The library `tokenizers` does the work, from `tokenizer.json` or, in
older folders, from `vocab.json` and `merges.txt`.

>>> sorted(FILES)[:2]
['added_tokens.json', 'chat_template.jinja']
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tokenizers

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
"""Names of the files that define the tokens and those that end a text."""

END = "<|endoftext|>"
"""The end-of-text token of GPT-2."""

SMALLEST = 257
"""Size of the smallest byte-level vocabulary: all bytes and the end-of-text token."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer, represented by its files.

    Equality and hash depend on the content of the files, so that programs compiled for
    a model are shared when it is loaded twice.

    Attributes:
        files: Content of each file by name.
    """

    files: Mapping[str, bytes] = dataclasses.field(repr=False)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of all files, in hexadecimal."""
        hashed = hashlib.sha256()
        for name in sorted(self.files):
            content = self.files[name]
            hashed.update(f"{name} {len(content)}\n".encode() + content)
        return hashed.hexdigest()

    def __eq__(self, other: object) -> bool:
        """Compare the content of the files."""
        return isinstance(other, Tokenizer) and other.digest == self.digest

    def __hash__(self) -> int:
        """Hash the content of the files."""
        return hash(self.digest)

    @functools.cached_property
    def size(self) -> int:
        """Number of rows of an embedding table: one more than the largest token.

        It exceeds the number of tokens where numbers are skipped.
        """
        numbers = self._backend.get_vocab(with_added_tokens=True).values()
        return 1 + max(numbers, default=-1)

    @property
    def eos(self) -> int | None:
        """The end-of-text token, or None."""
        return self._special("eos_token")

    @functools.cached_property
    def stops(self) -> tuple[int, ...]:
        """Tokens that end a text: those of `generation_config.json`, or `eos`."""
        given = _json(self.files, "generation_config.json").get("eos_token_id")
        numbers = given if isinstance(given, list) else [given]
        tokens = [x for x in numbers if isinstance(x, int) and x >= 0]
        if tokens:
            return tuple(tokens)
        return () if self.eos is None else (self.eos,)

    @property
    def bos(self) -> int | None:
        """The token at the beginning of a text, or None."""
        return self._special("bos_token")

    def encode(self, text: str, *, special: bool = True) -> np.ndarray:
        """Return the tokens of a text.

        Args:
            text: Any text.
            special: Whether to add the special tokens around a text, such as the first
                token of OPT.

        Returns:
            `[n]`, int32.

        Raises:
            ValueError: If the text contains lone surrogates.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not Unicode: {error}") from error
        encoding = self._backend.encode(text, add_special_tokens=special)
        tokens = np.array(encoding.ids, np.int32)
        if special and self._prepend is not None:
            tokens = np.concatenate([np.array([self._prepend], np.int32), tokens])
        return tokens

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Return the text of tokens, without special tokens."""
        return self._backend.decode([int(token) for token in tokens])

    @functools.cached_property
    def _backend(self) -> "tokenizers.Tokenizer":
        import tokenizers

        if "tokenizer.json" in self.files:
            try:
                text = self.files["tokenizer.json"].decode()
                backend = tokenizers.Tokenizer.from_str(text)
            except Exception as error:  # the library raises nothing narrower
                raise ValueError(f"tokenizer.json cannot be used: {error}") from error
            backend.no_truncation()
            backend.no_padding()
            return backend
        return self._from_vocabulary()

    def _from_vocabulary(self) -> "tokenizers.Tokenizer":
        """Build the byte-level BPE of GPT-2 and OPT."""
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        vocabulary = _json(self.files, "vocab.json")
        lines = self.files["merges.txt"].decode(errors="replace").splitlines()
        merges = [
            (left, right)
            for left, _, right in (line.partition(" ") for line in lines)
            if right and not left.startswith("#version")
        ]
        try:
            backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
        except Exception as error:
            raise ValueError(f"merges.txt cannot be used: {error}") from error
        prefix = bool(self._config.get("add_prefix_space", False))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        backend.decoder = decoders.ByteLevel()
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        special = {self._special_text(name) for name in names} - {None}
        backend.add_special_tokens(sorted(x for x in special if x in vocabulary))
        return backend

    @functools.cached_property
    def _config(self) -> dict[str, Any]:
        """Settings of the two files; `tokenizer_config.json` takes precedence."""
        return {
            **_json(self.files, "special_tokens_map.json"),
            **_json(self.files, "tokenizer_config.json"),
        }

    @functools.cached_property
    def _prepend(self) -> int | None:
        """The token before a text that older folders request by `add_bos_token`."""
        if "tokenizer.json" in self.files or not self._config.get("add_bos_token"):
            return None
        return self.bos

    def _special(self, name: str) -> int | None:
        text = self._special_text(name)
        return None if text is None else self._backend.token_to_id(text)

    def _special_text(self, name: str) -> str | None:
        value = self._config.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if value is None and name in ("bos_token", "eos_token"):
            return END  # not always specified in the folder of GPT-2
        return value if isinstance(value, str) else None


def train(texts: Iterable[str], size: int, *, context: int) -> Tokenizer:
    """Train a byte-level BPE on texts, like that of GPT-2 with 50257 tokens.

    Args:
        texts: Pieces of text.
        size: Largest number of tokens; short texts give fewer.
        context: Number of tokens of the longest input of the model.

    Raises:
        ValueError: If `size` is too small for all bytes.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if size < SMALLEST:
        raise ValueError(
            f"a vocabulary of {size} tokens cannot hold the 256 bytes and the end of a "
            f"text: take {SMALLEST} or more"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "model_max_length": context,
    }
    return Tokenizer(
        {
            "tokenizer.json": backend.to_str().encode(),
            "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
        }
    )


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer in a folder, or None if there is none.

    Raises:
        ValueError: If its format is not supported; the message names one that is.
    """
    files = {
        name: (folder / name).read_bytes()
        for name in FILES
        if (folder / name).is_file()
    }
    if "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= set(files):
        return Tokenizer(files)
    if "tokenizer.model" in files:
        raise ValueError(
            f"{folder} has its tokenizer only as tokenizer.model; save it once more as "
            "tokenizer.json, with save_pretrained of transformers' fast tokenizer"
        )
    return None


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        values = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name} holds {type(values).__name__}, not a mapping")
    return values
