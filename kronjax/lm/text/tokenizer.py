"""Conversion between text and tokens, by the tokenizer files of a checkpoint.

A `Tokenizer` holds the content of those files: it belongs to its model and is saved
byte for byte. The library `tokenizers` does the work, from `tokenizer.json` or, if
there is none, from `vocab.json` and `merges.txt`.

>>> sorted(FILES)[:2]
['added_tokens.json', 'chat_template.jinja']
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from kronjax.io import stand_ins
from kronjax.lm.text import backend, chat, special_tokens
from kronjax.lm.text.backend import END
from kronjax.lm.text.special_tokens import ADDED, CONFIG, GENERATION, MAP

if TYPE_CHECKING:
    import tokenizers

FILES = (
    "tokenizer.json",
    CONFIG,
    MAP,
    ADDED,
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    chat.FILE,
    GENERATION,
)
"""Names of the files that define the tokens and those that end a text."""

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

    @functools.cached_property
    def eos(self) -> int | None:
        """The end-of-text token, or None."""
        return self._special("eos_token")

    @functools.cached_property
    def stops(self) -> tuple[int, ...]:
        """Tokens that end a text: those of `generation_config.json`, or `eos`.

        `kronjax.lm.models.generation.stop_tokens` adds those of the model.
        """
        values = special_tokens.read(self.files, GENERATION)
        numbers = special_tokens.end_numbers(values, GENERATION)
        return numbers or (() if self.eos is None else (self.eos,))

    @functools.cached_property
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
        return np.array(encoding.ids, np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Return the text of tokens, without special tokens."""
        return self._backend.decode([int(token) for token in tokens])

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, str]] | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        **variables: Any,
    ) -> np.ndarray | str:
        """Return a conversation in the format of the model, as transformers does.

        Args:
            messages: The messages, each with a `role` (`"system"`, `"user"` or
                `"assistant"`) and its `content`.
            chat_template: The name of a template of the checkpoint, or a template; by
                default that of the checkpoint.
            tools: JSON schemas of functions, for templates that know of them.
            documents: Documents with `title` and `text`, likewise.
            add_generation_prompt: Whether to begin a reply of the assistant.
            tokenize: Whether to return tokens.
            **variables: Further variables of the template.

        Returns:
            Tokens, `[n]`, int32, or the text.

        Raises:
            ValueError: If there is no template, or it cannot be rendered; the message
                names the file.
        """
        template = chat.choose(self.files, chat_template, with_tools=tools is not None)
        given = {
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        context = {**self._named, **variables, **given}
        text = chat.render(template, messages, context)
        return self.encode(text, special=False) if tokenize else text

    @functools.cached_property
    def turn_end(self) -> int | None:
        """The token that the chat template puts after a reply, or None.

        Not every checkpoint names it among the tokens that end a text.
        """
        reply = "kronjax"
        messages = [
            {"role": "user", "content": "name"},
            {"role": "assistant", "content": reply},
        ]
        try:
            text = self.apply_chat_template(messages, tokenize=False)
        except ValueError:
            return None
        _, found, after = str(text).rpartition(reply)
        tokens = self._backend.get_added_tokens_decoder()
        number = max(
            (i for i, x in tokens.items() if after.lstrip().startswith(x.content)),
            key=lambda i: len(tokens[i].content),
            default=None,
        )
        return number if found else None

    @functools.cached_property
    def _named(self) -> dict[str, str]:
        """The special tokens by name, as a chat template knows them."""
        names = dict(special_tokens.named(self.files))
        for name in ("bos_token", "eos_token", "unk_token"):
            text = backend.special_text(self.files, name)
            if text is not None and self._backend.token_to_id(text) is not None:
                names.setdefault(name, text)
        return names

    @functools.cached_property
    def _backend(self) -> "tokenizers.Tokenizer":
        return backend.build(self.files)

    def _special(self, name: str) -> int | None:
        text = backend.special_text(self.files, name)
        return None if text is None else self._backend.token_to_id(text)


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
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "model_max_length": context,
    }
    return Tokenizer(
        {
            "tokenizer.json": trained.to_str().encode(),
            CONFIG: (json.dumps(settings, indent=2) + "\n").encode(),
        }
    )


def belongs(name: str) -> bool:
    """Return whether a file, by its path in a model's folder, is one of `FILES`.

    Chat templates in a folder of their own belong to them, too.
    """
    return name in FILES or PurePosixPath(name).match(chat.PATTERN)


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer in a folder, or None if there is none.

    Raises:
        ValueError: If its format is not supported, in which case the message names one
            that is; or a file is missing, or a Git LFS pointer, a compressed file or
            an HTML page in place of it.
    """
    names = [*FILES, *(f"{chat.FOLDER}/{x.name}" for x in folder.glob(chat.PATTERN))]
    files = {
        name: (folder / name).read_bytes()
        for name in names
        if (folder / name).is_file()
    }
    for name, content in files.items():
        other = stand_ins.describe(content)
        if other:
            raise ValueError(f"{folder / name}: {other}")
    if "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= set(files):
        return Tokenizer(files)
    for name, other in itertools.permutations(("vocab.json", "merges.txt")):
        if name in files:
            raise ValueError(f"{folder} has {name} without {other}: download {other}")
    if "tokenizer.model" in files:
        raise ValueError(
            f"{folder} has its tokenizer only as tokenizer.model; save it once more as "
            "tokenizer.json, with save_pretrained of transformers' fast tokenizer"
        )
    return None
