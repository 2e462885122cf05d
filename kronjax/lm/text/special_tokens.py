"""Special and added tokens in the files of a tokenizer.

Several files give them: `tokenizer_config.json` and `special_tokens_map.json` name the
tokens at the ends of a text; `added_tokens_decoder` of the former, `added_tokens.json`
and `tokenizer.json` give numbers to tokens that are not in the vocabulary. All of them
are used. Where two of them give different numbers there is no right answer, and the
message names the files and the keys; where they name different tokens, that of
transformers is used, and a note says so.

>>> files = {"special_tokens_map.json": b'{"eos_token": {"content": "</s>"}}'}
>>> named(files)
{'eos_token': '</s>'}
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kronjax.io import notes
from kronjax.io.json_values import parse_json

CONFIG = "tokenizer_config.json"
"""Name of the file with the settings of a tokenizer."""

MAP = "special_tokens_map.json"
"""Name of the file that older programs write beside it."""

ADDED = "added_tokens.json"
"""Name of the file with numbers of tokens by text, from the time before
`added_tokens_decoder`."""

DECODER = "added_tokens_decoder"
"""Key of `tokenizer_config.json`: added tokens by number."""

GENERATION = "generation_config.json"
"""Name of the file with the settings of generation."""

_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


@dataclasses.dataclass(frozen=True)
class Added:
    """A token that is matched before a text is split into words.

    Attributes:
        text: The token.
        number: Its number; None where a file only names it.
        place: File and key that give it.
        flags: Arguments of `tokenizers.AddedToken`.
    """

    text: str
    number: int | None
    place: str
    flags: Mapping[str, bool] = dataclasses.field(default_factory=dict)


def read(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """Return the mapping in a JSON file, empty if there is no such file.

    Raises:
        ValueError: If the content is not JSON, or not a mapping.
    """
    if name not in files:
        return {}
    try:
        values = parse_json(files[name])
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name} holds {type(values).__name__}, not a mapping")
    return values


def named(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return the special tokens by name, such as `eos_token`.

    Raises:
        ValueError: If a name does not stand for a text.
    """
    names: dict[str, str] = {}
    places: dict[str, str] = {}
    for file in _in_order(files):
        for name, value in read(files, file).items():
            text = _text(value)
            if name in (f"{short}_token" for short in _NAMED):
                if value is not None and text is None:
                    raise ValueError(f"{file}: {name} is {value!r}, not a token")
            elif not name.endswith("_token"):
                continue
            if not text:
                continue
            if name in ("bos_token", "eos_token") and names.get(name, text) != text:
                notes.tell(
                    f"{file}: {name} is {text!r}, but {places[name]} says "
                    f"{names[name]!r}: {file} is used, in the order of transformers"
                )
            names[name], places[name] = text, file
    return names


def special(files: Mapping[str, bytes]) -> list[Added]:
    """Return all special tokens that the files name, without numbers.

    Raises:
        ValueError: If they are malformed.
    """
    named(files)  # which checks them
    tokens: dict[str, Added] = {}
    for file in _in_order(files):
        for key, value in read(files, file).items():
            if key in _LISTS:
                many = value.values() if isinstance(value, Mapping) else value or []
                if not isinstance(many, Iterable) or isinstance(many, str):
                    raise ValueError(f"{file}: {key} is not a list of tokens")
            elif key.endswith("_token") and _text(value):
                many = [value]
            else:
                continue
            for token in many:
                text = _text(token)
                if not text:
                    raise ValueError(f"{file}: {key} holds {token!r}, not a token")
                flags = _flags(token, f"{file}: {key}")
                flags = {"normalized": False, **flags, "special": True}
                tokens[text] = Added(text, None, f"{file}: {key}", flags)
    return list(tokens.values())


def added(files: Mapping[str, bytes], own: Iterable[Any] = ()) -> list[Added]:
    """Return the tokens to which the files give numbers, in the order of the numbers.

    Args:
        files: Content of the files by name.
        own: The entries of `added_tokens` of `tokenizer.json`.

    Raises:
        ValueError: If an entry is malformed, or two files give one token different
            numbers, or different tokens one number.
    """
    specials = {token.text for token in special(files)}
    tokens: dict[str, Added] = {}
    texts: dict[int, Added] = {}
    for token in [*_decoder(files), *_own(own), *_added(files)]:
        first = tokens.setdefault(token.text, token)
        if first.number != token.number:
            raise ValueError(
                f"{token.place} gives {token.text!r} the number {token.number}, but "
                f"{first.place} gives it {first.number}; correct one of them"
            )
        assert token.number is not None
        other = texts.setdefault(token.number, token)
        if other.text != token.text:
            raise ValueError(
                f"{token.place} gives {token.text!r} the number {token.number}, which "
                f"{other.place} gives to {other.text!r}; correct one of them"
            )
    for token in tokens.values():
        if token.text in specials:
            flags = {"normalized": False, **token.flags, "special": True}
            tokens[token.text] = dataclasses.replace(token, flags=flags)
    return [tokens[texts[number].text] for number in sorted(texts)]


def end_numbers(values: Mapping[str, Any], file: str) -> tuple[int, ...]:
    """Return the tokens of `eos_token_id`, a number or a list of them.

    Args:
        values: The values of the file.
        file: Its name, for messages.

    Raises:
        ValueError: If they are not numbers of tokens.
    """
    given = values.get("eos_token_id")
    if given is None:
        return ()
    numbers = given if isinstance(given, list) else [given]
    numbers = [x for x in numbers if x != -1]  # which stands for none
    if not all(map(is_number, numbers)):
        raise ValueError(
            f"{file}: eos_token_id is {given!r}; it must be the number of a token, or "
            "a list of them"
        )
    return tuple(numbers)


def _in_order(files: Mapping[str, bytes]) -> tuple[str, str]:
    """Return the two files with names; the later one takes precedence.

    That of transformers: settings with `added_tokens_decoder` are the newer format, in
    which the other file has no effect.
    """
    return (MAP, CONFIG) if DECODER in read(files, CONFIG) else (CONFIG, MAP)


def _decoder(files: Mapping[str, bytes]) -> Iterator[Added]:
    entries, place = read(files, CONFIG).get(DECODER) or {}, f"{CONFIG}: {DECODER}"
    if not isinstance(entries, Mapping):
        raise ValueError(f"{place} is not a mapping")
    for key, value in entries.items():
        text = _text(value)
        if not key.isdecimal() or not text:
            raise ValueError(f"{place} maps {key!r} to {value!r}, which is no token")
        yield Added(text, int(key), place, _flags(value, place))


def _own(entries: Iterable[Any]) -> Iterator[Added]:
    place = "tokenizer.json: added_tokens"
    for entry in entries:
        yield Added(entry["content"], entry["id"], place, _flags(entry, place))


def _added(files: Mapping[str, bytes]) -> Iterator[Added]:
    for text, number in read(files, ADDED).items():
        if not text or not is_number(number):
            raise ValueError(f"{ADDED}: {text!r} has the number {number!r}")
        yield Added(text, number, ADDED)


def _text(value: Any) -> str | None:
    """Return the text of a token, which is a string or a mapping with its content."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _flags(value: Any, place: str) -> dict[str, bool]:
    given = value if isinstance(value, Mapping) else {}
    flags = {name: given[name] for name in _FLAGS if name in given}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{place}: {name} is {flag!r}, neither true nor false")
    return flags


def is_number(value: Any) -> bool:
    """Return whether a value can be the number of a token."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
