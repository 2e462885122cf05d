"""Special and added tokens: every file that gives them is used, or refused."""

import gzip
import json

import pytest

from kronjax.io.notes import Note
from kronjax.lm.text.tokenizer import Tokenizer, read_tokenizer

USER = "<|user|>"
TEXT = f" the{USER} the"
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


@pytest.fixture(params=["tokenizer.json", "vocab.json"])
def files(request, tokenizer):
    """Files of a tokenizer of 300 tokens in both formats, without any settings."""
    if request.param == "tokenizer.json":
        return {"tokenizer.json": tokenizer.files["tokenizer.json"]}
    return two_files(tokenizer)


def two_files(tokenizer):
    model = json.loads(tokenizer.files["tokenizer.json"])["model"]
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    return {
        "vocab.json": json.dumps(model["vocab"]).encode(),
        "merges.txt": merges.encode(),
    }


def with_files(files, **others):
    """Return files and others in JSON, whose names are written without `.json`."""
    added = {f"{name}.json": json.dumps(x).encode() for name, x in others.items()}
    return Tokenizer({**files, **added})


def decoder(number=300, text=USER, **flags):
    entry = {"content": text, "special": True, **FLAGS, **flags}
    return {"added_tokens_decoder": {str(number): entry}}


@pytest.mark.parametrize("number", [300, 305])
def test_added_tokens_have_their_given_numbers(files, number):
    named = {"eos_token": USER}
    given = [
        {"added_tokens": {USER: number}, "special_tokens_map": named},
        {"tokenizer_config": {**decoder(number), **named}},
        {"tokenizer_config": decoder(number), "special_tokens_map": named},
    ]
    for others in given:
        built = with_files(files, **others)
        tokens = built.encode(TEXT).tolist()
        assert tokens.count(number) == 1 and len(tokens) == 3
        assert built.eos == number and built.stops == (number,)
        assert built.size == number + 1
        assert built.decode(tokens) == " the the"


def test_a_tokenizer_json_may_skip_numbers(tokenizer):
    """The library numbers added tokens consecutively, whatever the file says."""
    values = json.loads(tokenizer.files["tokenizer.json"])
    values["added_tokens"].append(
        {"id": 310, "content": USER, "special": True, **FLAGS}
    )
    built = Tokenizer({"tokenizer.json": json.dumps(values).encode()})
    assert built.encode(TEXT).tolist()[1] == 310


def test_an_added_token_that_is_not_special_is_decoded(files):
    built = with_files(files, added_tokens={USER: 300})
    assert built.decode(built.encode(TEXT)) == TEXT


def test_the_flags_of_added_tokens_are_used(files):
    built = with_files(files, tokenizer_config=decoder(lstrip=True))
    assert built.encode(f" the  {USER}").tolist()[1:] == [300]


def test_named_tokens_of_the_vocabulary_are_special(files):
    token = with_files(files).encode("he").tolist()
    assert len(token) == 1
    for key in ("additional_special_tokens", "extra_special_tokens"):
        built = with_files(files, special_tokens_map={key: [{"content": "he"}]})
        assert token[0] in built.encode("xhex").tolist()
        assert built.decode(built.encode("xhex")) == "xx"


def test_first_and_last_token_are_added_around_a_text(tokenizer):
    files, settings = two_files(tokenizer), decoder(number=301)
    settings |= {"add_bos_token": True, "add_eos_token": True, "eos_token": USER}
    built = with_files(files, tokenizer_config=settings)
    plain = tokenizer.encode("the fox").tolist()
    assert built.encode("the fox").tolist() == [tokenizer.bos, *plain, 301]
    assert built.encode("the fox", special=False).tolist() == plain


@pytest.mark.parametrize(
    ("others", "words"),
    [
        (
            {"tokenizer_config": decoder(), "added_tokens": {USER: 301}},
            "added_tokens.json gives '<.user.>' the number 301, but tokenizer_config"
            ".json: added_tokens_decoder gives it 300",
        ),
        (
            {"tokenizer_config": decoder(), "added_tokens": {"<x>": 300}},
            "added_tokens.json gives '<x>' the number 300, which tokenizer_config.json"
            ": added_tokens_decoder gives to '<.user.>'",
        ),
        ({"added_tokens": {USER: 5}}, "5, but .* gives that to"),
        ({"added_tokens": {"he": 300}}, "gives 'he' the number 300, but .* gives it"),
        (
            {"special_tokens_map": {"eos_token": USER}},
            "special_tokens_map.json: eos_token names '<.user.>', which has no number",
        ),
        (
            {"tokenizer_config": {"additional_special_tokens": "abc"}},
            "additional_special_tokens is not a list",
        ),
        ({"tokenizer_config": {"eos_token": 7}}, "eos_token is 7, not a token"),
        ({"added_tokens": {USER: -1}}, "added_tokens.json: '<.user.>' has the number"),
        ({"added_tokens": {USER: "300"}}, "added_tokens.json: '<.user.>' has the"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"x": {"content": USER}}}},
            "added_tokens_decoder maps 'x'",
        ),
        ({"tokenizer_config": decoder(lstrip=1)}, "lstrip is 1, neither true nor"),
    ],
)
def test_contradictions_name_the_file_and_the_key(files, others, words):
    with pytest.raises(ValueError, match=words):
        with_files(files, **others).encode("a")


@pytest.mark.parametrize("settings", [{}, decoder()])
def test_of_two_names_that_of_transformers_is_used(files, settings):
    """With `added_tokens_decoder` the older file has no effect."""
    others = {
        "tokenizer_config": {**settings, "eos_token": USER if settings else "he"},
        "special_tokens_map": {"eos_token": "<old>" if settings else "qu"},
    }
    built = with_files(files, **others)
    with pytest.warns(Note, match="is used, in the order of transformers"):
        number = built.eos
    text = USER if settings else "qu"
    assert number == built.encode(text, special=False).tolist()[0]


def test_a_listed_token_without_a_number_is_not_matched(files):
    others = {"tokenizer_config": {"additional_special_tokens": [USER]}}
    with pytest.warns(Note, match="which has no number and is not matched"):
        tokens = with_files(files, **others).encode(USER)
    assert tokens.tolist() == with_files(files).encode(USER).tolist()


def test_a_tokenizer_json_that_cannot_hold_a_number_is_refused():
    model = {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}
    file = {"tokenizer.json": json.dumps({"model": model}).encode()}
    with pytest.raises(ValueError, match="number 9, which the vocabulary of tok"):
        with_files(file, added_tokens={USER: 9}).encode("a")


def test_the_rule_of_another_class_is_not_guessed(tokenizer):
    with pytest.raises(ValueError, match="tokenizer_class is 'Qwen2Tokenizer', whose"):
        with_files(
            two_files(tokenizer), tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"}
        ).encode("a")


@pytest.mark.parametrize("ids", [-2, [2, "3"], True, {"a": 1}, 1.0])
def test_end_tokens_that_are_no_numbers_are_refused(files, ids):
    built = with_files(files, generation_config={"eos_token_id": ids})
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id is"):
        built.stops  # noqa: B018


def test_tokenizer_json_comes_first_and_a_difference_is_told(tokenizer):
    both = {**tokenizer.files, **two_files(tokenizer)}
    assert Tokenizer(both).encode(" the the").size == 2  # and no note
    vocabulary = json.loads(both["vocab.json"])
    vocabulary["he"], vocabulary["a"] = vocabulary["a"], vocabulary["he"]
    both["vocab.json"] = json.dumps(vocabulary).encode()
    with pytest.warns(Note, match="tokenizer.json is used, in the order of transf"):
        tokens = Tokenizer(both).encode("the the")
    assert tokens.tolist() == tokenizer.encode("the the").tolist()


@pytest.mark.parametrize("adds", [False, True])
def test_tokenizer_json_decides_what_is_added_and_a_difference_is_told(tokenizer, adds):
    values = json.loads(tokenizer.files["tokenizer.json"])
    end = tokenizer.eos
    if adds:
        values["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
            "special_tokens": {
                "<|endoftext|>": {
                    "id": "<|endoftext|>",
                    "ids": [end],
                    "tokens": ["<|endoftext|>"],
                }
            },
        }
    files = {"tokenizer.json": json.dumps(values).encode()}
    named = {"bos_token": "<|endoftext|>"}
    agreeing = with_files(files, tokenizer_config={**named, "add_bos_token": adds})
    assert (agreeing.encode("a")[0] == end) == adds  # and no note
    words = f"add_bos_token is {str(not adds).lower()}, but tokenizer.json {'a' * adds}"
    with pytest.warns(Note, match=words):
        settings = {**named, "add_bos_token": not adds}
        other = with_files(files, tokenizer_config=settings)
        assert other.encode("a").tolist() == agreeing.encode("a").tolist()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "this is a Git LFS pointer: run git lfs pull",
        ),
        (
            gzip.compress(b"{}", mtime=0),
            "this is compressed by gzip: unpack it with gunzip",
        ),
        (b"<!DOCTYPE html>\n<html>", "this is an HTML page.*: download the file again"),
    ],
)
@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt", "added_tokens.json"])
def test_what_stands_in_for_a_file_is_named(tmp_path, tokenizer, name, content, words):
    files = {**tokenizer.files, **two_files(tokenizer), name: content}
    for file, given in files.items():
        (tmp_path / file).write_bytes(given)
    with pytest.raises(ValueError, match=f"{name}: {words}"):
        read_tokenizer(tmp_path)


def test_a_vocabulary_without_merges_is_refused(tmp_path, tokenizer):
    files = two_files(tokenizer)
    for name, other in zip(files, reversed(files), strict=True):
        path = tmp_path / name
        path.write_bytes(files[name])
        with pytest.raises(ValueError, match=f"has {name} without {other}: download"):
            read_tokenizer(tmp_path)
        path.unlink()
