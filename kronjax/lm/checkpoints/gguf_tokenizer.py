"""Conversion of the tokenizer in a GGUF file to the original `tokenizer.json`.

A GGUF file holds the tokens, and either the merges of a byte-level BPE with the name
of the rule that splits a text into words, or the scores of a SentencePiece BPE. Only
rules whose `tokenizer.json` is known are supported; others raise an error, because a
wrong rule goes unnoticed: the model still answers, only worse.

>>> sorted(RULES)
['gpt-2', 'llama-bpe', 'llama-v3', 'llama3', 'smollm', 'starcoder']
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kronjax.lm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

RULES = {
    "gpt-2": "gpt-2",
    "smollm": "digits",
    "starcoder": "digits",
    "llama-bpe": "llama3",
    "llama-v3": "llama3",
    "llama3": "llama3",
}
"""Rules that split a text into words, by the value of `tokenizer.ggml.pre`."""

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Regular expression of the words of Llama 3."""

LONGEST = 1024
"""Largest number of characters of a token of a SentencePiece vocabulary; all splits of
every token are looked up."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4


class UnknownTokenizer(ValueError):
    """The tokenizer is of a kind that cannot be rebuilt."""

    def __init__(self, what: str) -> None:
        """Create the error, with the remedy in its message."""
        super().__init__(
            f"{what}, which cannot be rebuilt; put the model's tokenizer.json into the "
            "folder of the file, or load a Hugging Face folder that has one"
        )


def build(settings: Mapping[str, Any]) -> Tokenizer | None:
    """Return the tokenizer of a GGUF file.

    Args:
        settings: The settings of the file.

    Returns:
        A `tokenizer.json` with its `tokenizer_config.json`, or None if the file has no
        tokenizer.

    Raises:
        UnknownTokenizer: If the tokenizer is of a kind that cannot be rebuilt.
        ValueError: If its parts contradict each other.
    """
    model = settings.get("tokenizer.ggml.model", "none")
    if model == "none":
        return None
    if model not in ("gpt2", "llama"):
        raise UnknownTokenizer(f"its tokenizer is of the kind {model!r}")
    tokens = _strings(settings, "tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if not tokens or len(vocabulary) < len(tokens):
        raise ValueError("tokenizer.ggml.tokens is empty, or holds a token twice")
    kinds = _numbers(settings, "token_type", len(tokens), _NORMAL)
    special = _specials(settings, tokens)
    make = _byte_level if model == "gpt2" else _sentence_piece
    try:
        backend = make(settings, vocabulary, kinds, special)
        _add_tokens(backend, tokens, kinds, special)
    except ValueError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"its tokenizer cannot be used: {error}") from error
    if backend.get_vocab_size(with_added_tokens=True) != len(tokens):
        raise ValueError("its tokenizer has tokens without characters")
    around = _around(settings, model)
    _frame(backend, vocabulary, around, special)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        **around,
        "clean_up_tokenization_spaces": False,
    }
    template = chat_template(settings)
    if template is not None:
        config["chat_template"] = template
    files = {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
    }
    ends = [_number(settings, name, tokens) for name in ("eos", "eot", "eom")]
    stops = sorted({number for number in ends if number is not None})
    if ends[1:] != [None, None]:
        values = {"eos_token_id": stops}
        files["generation_config.json"] = json.dumps(values, indent=2).encode()
    return Tokenizer(files)


def chat_template(settings: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    """Return the chat templates of a GGUF file, as `tokenizer_config.json` holds them.

    Raises:
        ValueError: If a template is no text.
    """
    key = "tokenizer.chat_template"
    names = settings.get("tokenizer.chat_templates", [])
    keys = {"default": key} if key in settings else {}
    keys |= {name: f"{key}.{name}" for name in names}
    for key in keys.values():
        if not isinstance(settings.get(key), str):
            raise ValueError(f"{key} is {settings.get(key)!r:.40}, not a text")
    if list(keys) == ["default"]:
        return settings[key]
    named = [{"name": name, "template": settings[keys[name]]} for name in keys]
    return named or None


def _byte_level(settings, vocabulary, kinds, special) -> "tokenizers.Tokenizer":
    """Return the BPE of GPT-2, SmolLM or Llama 3."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    name = settings.get("tokenizer.ggml.pre", "default")
    rule = RULES.get(name)
    if rule is None:
        raise UnknownTokenizer(f"its tokenizer splits a text into words by {name!r}")
    # The first character is never the separator, since a token may be a space.
    cuts = [(line, line.find(" ", 1)) for line in _strings(settings, "merges")]
    if min((cut for _, cut in cuts), default=1) < 1:
        raise ValueError("tokenizer.ggml.merges has an entry that is not a pair")
    merges = [(line[:cut], line[cut + 1 :]) for line, cut in cuts]
    # Llama 3 uses a token that is a whole word even if no merges produce it.
    whole = rule == "llama3"
    model = models.BPE(vocabulary, merges, ignore_merges=whole)
    backend = tokenizers.Tokenizer(model)
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not whole)
    first = {
        "digits": lambda: pre_tokenizers.Digits(individual_digits=True),
        "llama3": lambda: pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated"),
    }
    backend.pre_tokenizer = (
        pre_tokenizers.Sequence([first[rule](), last]) if rule in first else last
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(settings, vocabulary, kinds, special) -> "tokenizers.Tokenizer":
    """Return the BPE of Llama 1 and 2, whose merges follow from the scores."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    scores = _numbers(settings, "scores", len(vocabulary))
    merges = _merges(vocabulary, kinds, scores)
    model = models.BPE(
        vocabulary,
        merges,
        unk_token=special.get("unk_token"),
        fuse_unk=True,
        byte_fallback="<0x00>" in vocabulary,
    )
    backend = tokenizers.Tokenizer(model)
    prefix = settings.get("tokenizer.ggml.add_space_prefix", True)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁")] * bool(prefix) + [normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(
        steps + [decoders.Strip(" ", 1, 0)] * bool(prefix)
    )
    return backend


def _merges(vocabulary, kinds, scores) -> list[tuple[str, str]]:
    """Return all merges, in the order of the scores of the resulting tokens.

    SentencePiece joins the neighbours whose union has the highest score. So the merges
    are the pairs of tokens whose union is a token, in the order of its score.
    """
    pieces = {token for token, i in vocabulary.items() if kinds[i] == _NORMAL}
    if max(map(len, pieces), default=0) > LONGEST:
        raise ValueError(f"its tokenizer has tokens of over {LONGEST} characters")
    merges = []
    for piece in pieces:
        score = float(scores[vocabulary[piece]])
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                order = -score, vocabulary[piece], vocabulary[left], vocabulary[right]
                merges.append((*order, left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _add_tokens(backend, tokens, kinds, special) -> None:
    """Add the tokens that are matched before a text is split into words."""
    from tokenizers import AddedToken

    for i, token in enumerate(tokens):
        control = kinds[i] in (_CONTROL, _UNKNOWN) or token in special.values()
        if control or kinds[i] == _USER_DEFINED:
            added = AddedToken(token, special=control, normalized=False)
            add = backend.add_special_tokens if control else backend.add_tokens
            add([added])


def _frame(backend, vocabulary, around, special) -> None:
    """Make the tokenizer add the first and the last token of a text, as requested."""
    from tokenizers import processors

    first = special.get("bos_token") if around["add_bos_token"] else None
    last = special.get("eos_token") if around["add_eos_token"] else None
    if first is None and last is None:
        return
    single = [part for part in (first, "$A", last) if part is not None]
    second = [f"{part}:1" for part in (first, "$B", last) if part is not None]
    backend.post_processor = processors.TemplateProcessing(
        single=single,
        pair=single + second,
        special_tokens=[(token, vocabulary[token]) for token in {first, last} - {None}],
    )


def _around(settings, model) -> dict[str, bool]:
    """Return whether a first and a last token are added, as in llama.cpp."""
    bos = model == "llama" or RULES.get(settings.get("tokenizer.ggml.pre")) == "llama3"
    return {
        "add_bos_token": bool(settings.get("tokenizer.ggml.add_bos_token", bos)),
        "add_eos_token": bool(settings.get("tokenizer.ggml.add_eos_token", False)),
    }


def _specials(settings, tokens) -> dict[str, str]:
    """Return the special tokens, under the names of Hugging Face."""
    special = {}
    for name in ("bos", "eos", "unknown", "padding"):
        number = _number(settings, name, tokens)
        if number is not None:
            short = {"unknown": "unk", "padding": "pad"}.get(name, name)
            special[f"{short}_token"] = tokens[number]
    return special


def _number(settings, name, tokens) -> int | None:
    """Return the number of a special token, or None if the file does not give it."""
    key = f"tokenizer.ggml.{name}_token_id"
    number = settings.get(key)
    if number is None:
        return None
    if not isinstance(number, int) or not 0 <= number < len(tokens):
        raise ValueError(f"{key} is {number!r}, not a token")
    return number


def _strings(settings, name) -> list[str]:
    values = settings.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list):
        raise ValueError(f"tokenizer.ggml.{name} is not an array of strings")
    return values


def _numbers(settings, name, count, default=None) -> np.ndarray:
    values = settings.get(f"tokenizer.ggml.{name}")
    if values is None and default is not None:
        return np.full(count, default)
    if not isinstance(values, np.ndarray) or values.size != count:
        raise ValueError(f"tokenizer.ggml.{name} is not an array of {count} numbers")
    return values
