"""Construction of a tokenizer of the library `tokenizers` from files of a checkpoint.

`tokenizer.json` is used if there is one, otherwise `vocab.json` and `merges.txt`, as in
transformers. Either is completed by the tokens that the other files add, each with the
number that they give. The library itself numbers added tokens consecutively, whatever
the files say; so tokens with other numbers are put into the vocabulary.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kronjax.io import notes
from kronjax.lm.text import special_tokens
from kronjax.lm.text.special_tokens import ADDED, CONFIG, Added, is_number, read

if TYPE_CHECKING:
    import tokenizers

END = "<|endoftext|>"
"""The end-of-text token of GPT-2."""

CLASSES = (
    *("GPT2Tokenizer", "GPT2TokenizerFast"),
    *("PreTrainedTokenizerFast", "TokenizersBackend"),
)
"""Values of `tokenizer_class` for which `vocab.json` and `merges.txt` are enough."""


def build(files: Mapping[str, bytes]) -> "tokenizers.Tokenizer":
    """Return a tokenizer of the library.

    Args:
        files: Content of the files by name: `tokenizer.json`, or `vocab.json` and
            `merges.txt`.

    Raises:
        ValueError: If a file is damaged, or files contradict each other; the message
            names the file and the key.
    """
    if "tokenizer.json" in files:
        backend, tokens = _from_json(files)
        backend.no_truncation()
        backend.no_padding()
    else:
        backend, tokens = _from_vocabulary(files)
    _add(backend, tokens)
    _add_named(backend, files)
    if "tokenizer.json" in files:
        _tell_ends(backend, files)
    split = read(files, CONFIG).get("split_special_tokens", False)
    backend.encode_special_tokens = bool(split)
    return backend


def special_text(files: Mapping[str, bytes], name: str) -> str | None:
    """Return a special token by its name, or None.

    The folder of GPT-2 does not always name its tokens; they are `END`.
    """
    default = END if name in ("bos_token", "eos_token", "unk_token") else None
    return special_tokens.named(files).get(name, default)


def _from_json(files) -> tuple["tokenizers.Tokenizer", list[Added]]:
    backend = _parse(files["tokenizer.json"])
    values = read(files, "tokenizer.json")
    tokens = special_tokens.added(files, values.get("added_tokens", ()))
    vocabulary = values.get("model", {}).get("vocab")
    _tell_difference(backend, files)
    for token in tokens:
        if backend.token_to_id(token.text) == token.number:
            continue
        if not isinstance(vocabulary, dict):
            raise ValueError(
                f"{token.place} gives {token.text!r} the number {token.number}, which "
                "the vocabulary of tokenizer.json cannot hold"
            )
        _complete(vocabulary, tokens, "tokenizer.json")
        return _parse(json.dumps(values).encode()), tokens
    return backend, tokens


def _tell_difference(backend, files) -> None:
    """Tell that `vocab.json` is not used, where that makes a difference."""
    for text, number in read(files, "vocab.json").items():
        if backend.token_to_id(text) != number:
            notes.tell(
                f"tokenizer.json and vocab.json differ, for example in {text!r}: "
                "tokenizer.json is used, in the order of transformers"
            )
            return


def _tell_ends(backend, files) -> None:
    """Tell that `add_bos_token` or `add_eos_token` is not used, if it differs."""
    settings, names = read(files, CONFIG), special_tokens.named(files)
    tokens = backend.encode("a").tokens
    for name, token in (("bos_token", tokens[:1]), ("eos_token", tokens[-1:])):
        key, text = f"add_{name}", names.get(name)
        adds = token == [text]
        if key in settings and text is not None and bool(settings[key]) != adds:
            notes.tell(
                f"{CONFIG}: {key} is {json.dumps(settings[key])}, but tokenizer.json "
                f"{'adds' if adds else 'does not add'} {text!r}: tokenizer.json is "
                "used, in the order of transformers"
            )


def _parse(content: bytes) -> "tokenizers.Tokenizer":
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"tokenizer.json cannot be used: {error}") from error


def _from_vocabulary(files) -> tuple["tokenizers.Tokenizer", list[Added]]:
    """Return the byte-level BPE of GPT-2 and OPT."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    settings = read(files, CONFIG)
    kind = settings.get("tokenizer_class")
    if kind is not None and kind not in CLASSES:
        raise ValueError(
            f"{CONFIG}: tokenizer_class is {kind!r}, whose rule to split a text into "
            "words is not in vocab.json and merges.txt; save the tokenizer once more "
            "as tokenizer.json, with save_pretrained of transformers' fast tokenizer"
        )
    vocabulary = read(files, "vocab.json")
    for text, number in vocabulary.items():
        if not is_number(number):
            raise ValueError(f"vocab.json: {text!r} has the number {number!r}")
    tokens = special_tokens.added(files)
    _complete(vocabulary, tokens, "vocab.json")
    # Not splitlines, which also splits at characters that end no line of a file.
    lines = files["merges.txt"].decode(errors="replace").split("\n")
    merges = [
        (left, right)
        for left, _, right in (line.rstrip("\r").partition(" ") for line in lines)
        if right and not left.startswith("#version")
    ]
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    except Exception as error:
        raise ValueError(f"merges.txt cannot be used: {error}") from error
    prefix = bool(settings.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    _frame(backend, files, settings)
    return backend, tokens


def _complete(vocabulary: dict[str, Any], tokens: list[Added], file: str) -> None:
    """Put tokens into a vocabulary, with their numbers."""
    texts = {number: text for text, number in vocabulary.items()}
    for token in tokens:
        number, text = vocabulary.get(token.text), texts.get(token.number)
        if number not in (None, token.number) or text not in (None, token.text):
            other = f"gives it {number}" if text is None else f"gives that to {text!r}"
            raise ValueError(
                f"{token.place} gives {token.text!r} the number {token.number}, but "
                f"{file} {other}; correct one of them"
            )
        vocabulary[token.text] = token.number


def _add(backend, tokens: list[Added]) -> None:
    """Make a tokenizer match tokens before it splits a text into words."""
    from tokenizers import AddedToken

    backend.add_tokens([AddedToken(token.text, **token.flags) for token in tokens])


def _add_named(backend, files) -> None:
    """Make a tokenizer match the special tokens that the files only name."""
    matched = {token.content for token in backend.get_added_tokens_decoder().values()}
    names, tokens = special_tokens.named(files), []
    ends = [names.get(name) for name in ("bos_token", "eos_token")]
    for token in special_tokens.special(files):
        if token.text in matched:
            continue
        if backend.token_to_id(token.text) is not None:
            tokens.append(token)
        elif token.place.endswith("special_tokens"):
            notes.tell(
                f"{token.place} names {token.text!r}, which has no number and is not "
                f"matched; give it one in {ADDED}"
            )
        elif token.text in ends:
            raise ValueError(
                f"{token.place} names {token.text!r}, which has no number; give it "
                f"one in {ADDED}"
            )
    if "tokenizer.json" not in files and backend.token_to_id(END) is not None:
        names = ("bos_token", "eos_token", "unk_token")
        if END not in matched and END in (special_text(files, name) for name in names):
            flags = {"special": True, "normalized": False}
            tokens.append(Added(END, None, "", flags))
    _add(backend, tokens)


def _frame(backend, files, settings: Mapping[str, Any]) -> None:
    """Make a tokenizer add the first and the last token of a text, as requested."""
    from tokenizers import processors

    around = {}
    for name in ("bos_token", "eos_token"):
        if settings.get(f"add_{name}"):
            text = special_text(files, name)
            number = None if text is None else backend.token_to_id(text)
            if number is None:
                raise ValueError(
                    f"{CONFIG}: add_{name} is true, but there is no {name}"
                )
            around[name] = text, number
    if around:
        ends = {name: [text] for name, (text, _) in around.items()}
        single = [*ends.get("bos_token", []), "$A", *ends.get("eos_token", [])]
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=list(set(around.values()))
        )
