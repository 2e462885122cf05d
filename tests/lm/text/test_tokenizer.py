"""Tokenizers from files in two formats."""

import json

import numpy as np
import pytest

from kronjax.lm.text import tokenizer as module
from kronjax.lm.text.tokenizer import Tokenizer, read_tokenizer

TEXT = "The quick brown fox — jumps\n\nover 12 lazy dogs."


def in_two_files(tokenizer):
    """The same vocabulary in the format in which GPT-2 and OPT were first published."""
    model = json.loads(tokenizer.files["tokenizer.json"])["model"]
    merges = [x if isinstance(x, str) else " ".join(x) for x in model["merges"]]
    return {
        "vocab.json": json.dumps(model["vocab"]).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
        "tokenizer_config.json": tokenizer.files["tokenizer_config.json"],
    }


def test_both_formats_give_the_same_tokens(tokenizer):
    older = Tokenizer(in_two_files(tokenizer))
    tokens = tokenizer.encode(TEXT)
    assert tokens.dtype == np.int32 and tokens.ndim == 1
    np.testing.assert_array_equal(older.encode(TEXT), tokens)
    assert older.decode(tokens) == tokenizer.decode(tokens) == TEXT
    assert older.size == tokenizer.size
    assert older.eos == tokenizer.eos == older.encode("<|endoftext|>")[0]


def test_the_bos_token_of_opt_is_added_on_request(tokenizer):
    files = in_two_files(tokenizer)
    config = {"bos_token": {"content": "<|endoftext|>"}, "add_bos_token": True}
    files["tokenizer_config.json"] = json.dumps(config).encode()
    built = Tokenizer(files)
    tokens = tokenizer.encode(TEXT)
    np.testing.assert_array_equal(built.encode(TEXT), [built.bos, *tokens])
    np.testing.assert_array_equal(built.encode(TEXT, special=False), tokens)


def test_token_numbers_may_have_gaps():
    words = {"type": "WordLevel", "vocab": {"a": 0, "b": 70000}, "unk_token": "a"}
    built = Tokenizer({"tokenizer.json": json.dumps({"model": words}).encode()})
    assert built.encode("b").tolist() == [70000]
    assert built.size == 70001


def test_equal_files_are_equal_tokenizers(tokenizer):
    same = Tokenizer(dict(reversed(list(tokenizer.files.items()))))
    assert same == tokenizer and hash(same) == hash(tokenizer)
    other = Tokenizer({**tokenizer.files, "added_tokens.json": b"{}"})
    assert other != tokenizer


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert read_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(ValueError, match="save it once more as tokenizer.json"):
        read_tokenizer(tmp_path)


def test_a_folder_is_read_byte_by_byte(tmp_path, tokenizer):
    for name, content in tokenizer.files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "unrelated.json").write_text("{}")
    assert read_tokenizer(tmp_path) == tokenizer


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer.json": b"{}"}, "tokenizer.json cannot be used"),
        ({"tokenizer.json": b"\xff"}, "tokenizer.json cannot be used"),
        ({"vocab.json": b"[" * 200_000, "merges.txt": b""}, "vocab.json is not JSON"),
        ({"vocab.json": b"{", "merges.txt": b""}, "vocab.json is not JSON"),
        ({"vocab.json": b"[]", "merges.txt": b""}, "not a mapping"),
        ({"vocab.json": b'{"a": 0}', "merges.txt": b"a b\n"}, "merges.txt"),
    ],
)
def test_damaged_files_are_refused(files, words):
    with pytest.raises(ValueError, match=words):
        Tokenizer(files).encode("a")


def test_a_generation_config_defines_the_stop_tokens(tokenizer):
    assert tokenizer.stops == (tokenizer.eos,)
    files = {**tokenizer.files, "generation_config.json": b'{"eos_token_id": [7, 9]}'}
    assert Tokenizer(files).stops == (7, 9)


def test_text_that_is_not_unicode_is_refused(tokenizer):
    with pytest.raises(ValueError, match="not Unicode"):
        tokenizer.encode("x\udcff")


def test_saving_a_tokenizer_never_replaces_the_config():
    assert "config.json" not in module.FILES
