"""Chat templates: texts as they must be, and templates that cannot be trusted.

`test_parity_chat.py` compares with transformers.
"""

import json

import chat_templates
import pytest

from kronjax.lm.text import chat
from kronjax.lm.text.tokenizer import Tokenizer, read_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi & <b>"}
ASSISTANT = {"role": "assistant", "content": "Yes."}

EXPECTED = {
    "chatml": (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHi & <b>"
        "<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nHi & <b>"
        "<|im_end|>\n<|im_start|>assistant\n"
    ),
    "llama-2": "<s>[INST] Hi & <b> [/INST] Yes. </s><s>[INST] Hi & <b> [/INST]",
    "gemma": (
        "<s><start_of_turn>user\nHi & <b><end_of_turn>\n<start_of_turn>model\nYes."
        "<end_of_turn>\n<start_of_turn>user\nHi & <b><end_of_turn>\n"
        "<start_of_turn>model\n"
    ),
    "zephyr": (
        "<|user|>\nHi & <b></s>\n<|assistant|>\nYes.</s>\n<|user|>\nHi & <b></s>\n"
        "<|assistant|>\n"
    ),
}


def with_template(tokenizer, template, **files):
    settings = json.dumps(chat_templates.settings(template)).encode()
    return Tokenizer({**tokenizer.files, "tokenizer_config.json": settings, **files})


def rendered(tokenizer, source, messages=(USER,), **variables):
    return with_template(tokenizer, source).apply_chat_template(
        messages, tokenize=False, **variables
    )


@pytest.mark.parametrize("style", EXPECTED)
def test_a_conversation_has_the_format_of_the_model(tokenizer, style):
    built = with_template(tokenizer, chat_templates.STYLES[style])
    messages = [USER, ASSISTANT, USER]
    text = built.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert text == EXPECTED[style]
    # No second token at the beginning of the text.
    tokens = built.apply_chat_template(messages, add_generation_prompt=True)
    assert tokens.tolist() == built.encode(text, special=False).tolist()


@pytest.mark.parametrize(
    ("style", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("llama-2", "</s>"),
        ("gemma", "<end_of_turn>"),
        ("zephyr", "</s>"),
        ("tools", "<|eot_id|>"),
    ],
)
def test_the_end_of_a_turn_is_known_from_the_template(tokenizer, style, end):
    built = with_template(tokenizer, chat_templates.STYLES[style])
    assert built.turn_end == built.encode(end)[0]


@pytest.mark.parametrize("template", [None, "{{ messages[-1].content }}", "{{ 1/0 }}"])
def test_the_end_of_a_turn_may_be_unknown(tokenizer, template):
    assert with_template(tokenizer, template).turn_end is None


def test_values_of_none_are_missing(tokenizer):
    message = {**USER, "tool_calls": None}
    source = "{{ messages[0].tool_calls is defined }}"
    assert rendered(tokenizer, source, [message]) == "False"


def test_special_tokens_and_settings_are_variables(tokenizer):
    source = "{{ bos_token }}{{ thinking }}{{ tools }}{{ add_generation_prompt }}"
    assert rendered(tokenizer, source, thinking=1) == "<s>1NoneFalse"


def test_templates_in_files_come_first(tmp_path, tokenizer):
    for name, content in tokenizer.files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="no chat template, so .* chat_template.jinja"):
        read_tokenizer(tmp_path).apply_chat_template([USER])
    settings = chat_templates.settings("in the settings")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))

    def chosen(**options):
        built = read_tokenizer(tmp_path)
        return built.apply_chat_template([USER], tokenize=False, **options)

    assert chosen() == "in the settings"
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (folder / "rag.jinja").write_text("for documents")
    with pytest.raises(ValueError, match="no chat template is the default.*rag"):
        chosen()
    (tmp_path / "chat_template.jinja").write_text("in a file")
    assert chosen() == "in a file"
    assert chosen(chat_template="rag") == "for documents"
    assert chosen(chat_template="{{ 'given' }}") == "given"
    with pytest.raises(ValueError, match="no chat template 'none'; there are: "):
        chosen(chat_template="none")


def test_a_list_of_named_templates_has_one_for_tools(tokenizer):
    named = [{"name": name, "template": name} for name in ("default", "tool_use")]
    assert rendered(tokenizer, named) == "default"
    assert rendered(tokenizer, named, tools=[]) == "tool_use"


@pytest.mark.parametrize("given", [1, {"a": "b"}, [{"name": "default"}], ["text"]])
def test_settings_that_hold_no_template_are_refused(tokenizer, given):
    with pytest.raises(ValueError, match="tokenizer_config.json: chat_template is nei"):
        rendered(tokenizer, given)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("a\n{% if %}", "chat_template, line 2: Expected an expression"),
        ("{{ raise_exception('Alternate!') }}", "refuses the conversation: Alternate!"),
        ("{{ messages.nothing.more }}", "cannot be rendered: UndefinedError"),
        ("{{ 1 / 0 }}", "cannot be rendered: ZeroDivisionError"),
        ("{{ messages[0] + 1 }}", "cannot be rendered: TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% include 'x' %}", "cannot be rendered: TypeError: no loader"),
    ],
)
def test_errors_of_a_template_name_its_file(tokenizer, source, words):
    with pytest.raises(ValueError, match="tokenizer_config.json: chat_templ") as error:
        rendered(tokenizer, source)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ (messages | attr('__class__')) | string | length + '' }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
        "{{ dict.__subclasses__() }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
    ],
)
def test_a_template_reaches_nothing_of_python(tokenizer, source):
    with pytest.raises(ValueError, match="cannot be rendered"):
        rendered(tokenizer, source)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("a" * (chat.LARGEST_TEMPLATE + 1), "has over 1048576 characters"),
        ("{{ 'a' * 10 ** 12 }}", "gives over 16777216"),
        ("{{ 10 ** 9 * [1] }}", "gives over 16777216"),
        ("{{ 9 ** 99999999 }}", "gives over 16777216"),
        (
            "{% for _ in range(9999) %}{% for _ in range(9999) %}{{ 'a' * 9999 }}"
            "{% endfor %}{% endfor %}",
            "the text has over 16777216 characters",
        ),
        ("{{ range(10 ** 9) }}", "Range too big"),
        (
            "{% for _ in range(99999) %}{% for _ in range(99999) %}{% endfor %}"
            "{% endfor %}",
            "over 1000000 items in loops and calls",
        ),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
            "{% endmacro %}{{ f(60) }}",
            "over 1000000 items in loops and calls",
        ),
    ],
)
def test_sizes_are_bounded(tokenizer, source, words):
    with pytest.raises(ValueError, match=words):
        rendered(tokenizer, source)


def test_loops_know_their_length_and_may_be_recursive(tokenizer):
    text = rendered(tokenizer, chat_templates.LOOPS)
    assert text == "1/2,1/1-2/2-noneTruebFalse"


def test_a_template_that_is_no_text_is_refused(tokenizer):
    built = with_template(tokenizer, None, **{"chat_template.jinja": b"\xff"})
    with pytest.raises(ValueError, match="chat_template.jinja is not text in UTF-8"):
        built.apply_chat_template([USER])


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "a conversation is a list of messages"),
        (["Hi"], "a conversation is a list of messages"),
        ([{"role": "user", "content": b"Hi"}], "not plain data"),
        ([{"role": "user", "content": "x\udcff"}], "the text is not Unicode"),
    ],
)
def test_a_conversation_is_plain_data(tokenizer, messages, words):
    built = with_template(tokenizer, chat_templates.ZEPHYR)
    with pytest.raises(ValueError, match=words):
        built.apply_chat_template(messages)
