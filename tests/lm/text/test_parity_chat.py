"""Comparison of chat templates and added tokens with transformers."""

import json

import chat_templates
import pytest

from kronjax.lm.text.tokenizer import Tokenizer, read_tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity


def written(folder, tokenizer, **files):
    """Write a folder, and return its tokenizer here and in transformers."""
    contents = {"tokenizer.json": tokenizer.files["tokenizer.json"], **files}
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return read_tokenizer(folder), theirs


def both(pair, messages, **options):
    """Return what either makes of a conversation: tokens and text, or a message."""
    results = []
    for library in pair:
        extra = {} if isinstance(library, Tokenizer) else {"return_dict": False}
        try:
            text = library.apply_chat_template(messages, tokenize=False, **options)
            tokens = library.apply_chat_template(messages, **options, **extra)
            results.append((text, [int(token) for token in tokens]))
        except Exception as error:
            results.append(str(error).rpartition(": ")[2])
    return results


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("name", chat_templates.CONVERSATIONS)
@pytest.mark.parametrize("style", chat_templates.STYLES)
def test_conversations_are_rendered_as_by_transformers(
    tmp_path, tokenizer, style, name, generate
):
    config = chat_templates.settings(chat_templates.STYLES[style])
    pair = written(tmp_path, tokenizer, **{"tokenizer_config.json": json.dumps(config)})
    messages = chat_templates.CONVERSATIONS[name]
    options = {"add_generation_prompt": generate}
    ours, theirs = both(pair, messages, **options)
    assert ours == theirs
    assert isinstance(ours, tuple) or (style, name) == ("gemma", "system")
    if style == "tools":
        tools = [{"name": "f", "parameters": {"type": "<a>"}}, {"name": "g"}]
        ours, theirs = both(pair, messages, tools=tools, documents=[], **options)
        assert ours == theirs and isinstance(ours, tuple)


def test_templates_are_found_where_transformers_finds_them(tmp_path, tokenizer):
    named = [
        {"name": name, "template": f"{name} {{{{ messages|length }}}}"}
        for name in ("default", "tool_use", "rag")
    ]
    files = {
        "text": chat_templates.settings("text"),
        "list": chat_templates.settings(named),
        "no default": chat_templates.settings(named[2:]),
        "none": chat_templates.settings(None),
    }
    beside = {
        "": {},
        "file": {"chat_template.jinja": "file\r\n\n"},
        "folder": {"additional_chat_templates__rag.jinja": "folder"},
    }
    beside["all"] = beside["file"] | beside["folder"]
    for number, (config, others) in enumerate(
        (config, others) for config in files.values() for others in beside.values()
    ):
        pair = written(
            (tmp_path / str(number)),
            tokenizer,
            **{"tokenizer_config.json": json.dumps(config)},
            **others,
        )
        for options in ({}, {"tools": []}, {"chat_template": "rag"}):
            ours, theirs = both(pair, [chat_templates.USER], **options)
            # transformers takes a name that is missing for a template.
            if isinstance(theirs, str) or theirs[0] == "rag":
                assert isinstance(ours, str)
            else:
                assert ours == theirs


@pytest.mark.parametrize("text", ["a<|user|> the", " <|user|>x<s>", "<|im_end|>\n"])
def test_added_tokens_are_those_of_transformers(tmp_path, tokenizer, text):
    named = {"eos_token": "<|user|>", "extra_special_tokens": ["he", "<s>"]}
    numbers = {"<|user|>": 300, "<|im_end|>": 301, "<s>": 302}
    config = chat_templates.settings(None)
    del config["bos_token"], config["eos_token"]
    older = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for number, files in enumerate(
        [
            {"added_tokens": numbers, "special_tokens_map": named},
            {"tokenizer_config": config},
            {"tokenizer_config": config | {"eos_token": "</s>"}},
            {"tokenizer_config": older | named, "added_tokens": numbers},
        ]
    ):
        ours, theirs = written(
            tmp_path / str(number),
            tokenizer,
            **{f"{name}.json": json.dumps(values) for name, values in files.items()},
        )
        tokens = theirs(text)["input_ids"]
        assert ours.encode(text).tolist() == tokens
        decoded = theirs.decode(tokens, skip_special_tokens=True)
        assert ours.decode(tokens) == decoded
        if theirs.eos_token is not None:
            assert ours.eos == theirs.eos_token_id
