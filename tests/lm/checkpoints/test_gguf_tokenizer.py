"""Tokenizers of GGUF files, compared with simple implementations of their rules."""

import json

import numpy as np
import pytest

from bench import gguf_files
from kronjax.lm.checkpoints import gguf, gguf_tokenizer

TEXTS = [
    "",
    " ",
    "and the hand of the band",
    "  two  spaces,\n\ta tab\r\n\r\n",
    "In 1234 or 5678901: it's a naïve ½ of 日本 and 😀!",
    "THE 'S 'll they'Re",
]


def byte_level(**settings):
    tokens, merges = gguf_files.vocabulary()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([3] + [1] * (len(tokens) - 1)),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in settings.items()},
    }


def words(settings, text):
    """Return the words into which a text is split."""
    tokenizer = gguf_tokenizer.build(settings)
    parts = tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:stop] for _, (start, stop) in parts]


@pytest.mark.parametrize("pre", sorted(gguf_tokenizer.RULES))
@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives_encoding_and_decoding(pre, text):
    tokenizer = gguf_tokenizer.build(byte_level(pre=pre))
    tokens = tokenizer.encode(text, special=False)
    assert tokenizer.decode(tokens) == text
    merged = {tokenizer.size - 1: "and", tokenizer.size - 3: " the"}
    for token, word in merged.items():
        assert tokenizer.decode([token]) == word


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["It", "'s", " 1234567", " a", "\n\n", " b"]),
        ("smollm", ["It", "'s", " ", *"1234567", " a", "\n\n", " b"]),
        ("llama-bpe", ["It", "'s", " ", "123", "456", "7", " a", "\n\n", " b"]),
    ],
)
def test_a_text_is_split_into_words_by_the_rule(pre, expected):
    assert words(byte_level(pre=pre), "It's 1234567 a\n\n b") == expected


def test_only_llama_3_keeps_a_contraction_in_capitals_as_a_word():
    assert words(byte_level(pre="llama3"), "I'LL") == ["I", "'LL"]
    assert words(byte_level(pre="smollm"), "I'LL") == ["I", "'", "LL"]


def test_llama_3_uses_a_token_for_a_whole_word_without_merges():
    tokens, merges = gguf_files.vocabulary()
    settings = {"tokens": [*tokens, "Ġzebra"]}
    settings["token_type"] = np.ones(len(tokens) + 1, np.int32)
    llama3 = gguf_tokenizer.build(byte_level(pre="llama3", **settings))
    smollm = gguf_tokenizer.build(byte_level(pre="smollm", **settings))
    assert llama3.encode(" zebra", special=False).tolist() == [len(tokens)]
    assert len(smollm.encode(" zebra", special=False)) == 6


def test_control_tokens_are_encoded_and_not_decoded():
    tokenizer = gguf_tokenizer.build(byte_level())
    tokens = tokenizer.encode("a<|endoftext|> the")
    assert tokens.tolist()[1:] == [0, tokenizer.size - 3]
    assert tokenizer.decode(tokens) == "a the"


def test_special_tokens_come_from_the_file():
    settings = byte_level(bos_token_id=3, eos_token_id=0, add_bos_token=True)
    settings["tokenizer.chat_template"] = "{{ messages }}"
    tokenizer = gguf_tokenizer.build(settings)
    assert (tokenizer.bos, tokenizer.eos) == (3, 0)
    assert tokenizer.encode("the").tolist()[0] == 3
    assert tokenizer.encode("the", special=False).tolist()[0] != 3
    config = json.loads(tokenizer.files["tokenizer_config.json"])
    assert config["add_bos_token"] is True
    assert config["chat_template"] == "{{ messages }}"
    both = byte_level(bos_token_id=3, add_bos_token=True, add_eos_token=True)
    tokens = gguf_tokenizer.build(both).encode("the").tolist()
    assert (tokens[0], tokens[-1]) == (3, 0)


def test_all_chat_templates_and_ends_of_a_turn_are_kept():
    settings = byte_level(eot_token_id=5, eom_token_id=6)
    settings["tokenizer.chat_template"] = "{{ messages[0].content }}"
    settings["tokenizer.chat_templates"] = ["rag"]
    settings["tokenizer.chat_template.rag"] = "for documents"
    tokenizer = gguf_tokenizer.build(settings)
    assert tokenizer.stops == (0, 5, 6)
    messages = [{"role": "user", "content": "Hi"}]
    for name, text in ((None, "Hi"), ("rag", "for documents")):
        assert text == tokenizer.apply_chat_template(
            messages, tokenize=False, chat_template=name
        )
    del settings["tokenizer.chat_template.rag"]
    with pytest.raises(ValueError, match="tokenizer.chat_template.rag is None, not a"):
        gguf_tokenizer.build(settings)


def test_llama_3_adds_the_first_token_unless_the_file_says_otherwise():
    begun = gguf_tokenizer.build(byte_level(pre="llama-bpe", bos_token_id=0))
    plain = byte_level(pre="llama-bpe", bos_token_id=0, add_bos_token=False)
    assert begun.encode("a").tolist()[0] == 0
    assert len(gguf_tokenizer.build(plain).encode("a")) == 1


def sentence_piece(**settings):
    """A vocabulary with bytes, characters and words, and a score for each word."""
    scored = ["▁t", "he", "▁the", "an", "and", "▁a", "▁▁", "th", "er", "▁the▁", "nd"]
    letters = [*"▁abcdefghijklmnopqrstuvwxyz.,"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(scored) + len(letters))
    scores = [0.0] * 259 + [-float(i) for i in range(len(scored))] + [-1e9] * 29
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*tokens, *scored, *letters],
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.scores": np.array(scores[: len(kinds)], np.float32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in settings.items()},
    }


def encode_simply(settings, text, prefix=True):
    """Encode as SentencePiece does: merge the neighbours of the highest score first."""
    tokens = settings["tokenizer.ggml.tokens"]
    scores = dict(zip(tokens, settings["tokenizer.ggml.scores"], strict=True))
    parts = list((" " * prefix + text if text else "").replace(" ", "▁"))
    while True:
        joined = [
            (-scores[a + b], i)
            for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
            if a + b in scores
        ]
        if not joined:
            break
        i = min(joined)[1]
        parts[i : i + 2] = ["".join(parts[i : i + 2])]
    encoded = []
    for part in parts:
        raw = [] if part in scores else part.encode()
        encoded += [tokens.index(f"<0x{byte:02X}>") for byte in raw]
        encoded += [tokens.index(part)] if part in scores else []
    return encoded


@pytest.mark.parametrize("text", [*TEXTS, "there and  then, the the", "▁theand"])
def test_sentence_piece_merges_by_scores(text):
    settings = sentence_piece()
    tokenizer = gguf_tokenizer.build(settings)
    encoded = tokenizer.encode(text).tolist()
    assert encoded == [1, *encode_simply(settings, text)]
    assert tokenizer.decode(encoded) == text.replace("▁", " ")
    bare = sentence_piece(add_space_prefix=False, add_bos_token=False)
    tokenizer = gguf_tokenizer.build(bare)
    encoded = tokenizer.encode(text).tolist()
    assert encoded == encode_simply(bare, text, prefix=False)
    assert tokenizer.decode(encoded) == text.replace("▁", " ")


def test_no_merge_produces_a_control_token():
    settings = sentence_piece()
    settings["tokenizer.ggml.tokens"][-1] = "<"
    tokenizer = gguf_tokenizer.build(settings)
    assert 1 not in tokenizer.encode("< s >", special=False)


def test_a_very_long_token_raises_an_error():
    settings = sentence_piece()
    settings["tokenizer.ggml.tokens"][-1] = "a" * 10**6
    with pytest.raises(ValueError, match="tokens of over 1024 characters"):
        gguf_tokenizer.build(settings)


def test_a_file_without_a_tokenizer_gives_none():
    assert gguf_tokenizer.build({}) is None
    assert gguf_tokenizer.build({"tokenizer.ggml.model": "none"}) is None


def test_a_tokenizer_json_in_the_same_folder_is_used_instead(tmp_path):
    model = gguf_files.random_model(num_hidden_layers=1)
    path = tmp_path / "a.gguf"
    given = {"tokenizer.ggml.pre": "unheard-of", "tokenizer.chat_template": "Hi"}
    gguf_files.write(path, model, settings=given)
    with pytest.raises(ValueError, match=r"'unheard-of', which cannot be rebuilt; put"):
        gguf.read(path)
    known = gguf_tokenizer.build(byte_level())
    (tmp_path / "tokenizer.json").write_bytes(known.files["tokenizer.json"])
    tokenizer = gguf.read(path)[2]
    assert tokenizer.encode("the and").size == known.encode("the and").size
    messages = [{"role": "user", "content": "?"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "Hi"
    (tmp_path / "chat_template.jinja").write_text("Good morning")
    tokenizer = gguf.read(path)[2]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "Good morning"


def test_a_chat_template_in_the_same_folder_is_used_where_the_file_has_none(tmp_path):
    model = gguf_files.random_model(num_hidden_layers=1)
    messages = [{"role": "user", "content": "?"}]
    (tmp_path / "chat_template.jinja").write_text("beside")
    for template, expected in (({}, "beside"), ("inside", "inside")):
        given = {"tokenizer.chat_template": template} if template else {}
        gguf_files.write(tmp_path / "a.gguf", model, settings=given)
        tokenizer = gguf.read(tmp_path / "a.gguf")[2]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
