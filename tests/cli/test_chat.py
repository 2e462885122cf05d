"""`kronjax generate --chat`, as a user types it."""

import io
import json

import pytest

from kronjax import lm
from kronjax.cli import chat
from kronjax.cli.main import main

TEMPLATE = """\
{% for m in messages %}
{{ m.role[0] }}:{{ m.content }}{{ eos_token }}
{%- endfor %}
{% if add_generation_prompt %}a:{% endif %}
"""

HI = {"role": "user", "content": "Hi"}
THE = {"role": "user", "content": "the"}


@pytest.fixture
def folder(tiny, tmp_path):
    lm.save(tiny, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path / "model"


@pytest.fixture
def run(folder, capsys, monkeypatch):
    def call(*args, stdin=""):
        given = io.StringIO(stdin) if isinstance(stdin, str) else stdin
        monkeypatch.setattr("sys.stdin", given)
        code = main(["generate", str(folder), "--chat", *args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def reply(folder, *messages, count=4):
    return lm.generate(lm.load(folder), messages, max_new_tokens=count)


def test_a_prompt_is_the_only_turn(folder, run):
    code, out, err = run("--prompt", "Hi", "--max-new-tokens", "4", stdin="unread")
    assert code == 0, err
    assert out == reply(folder, HI) + "\n"
    assert "the reply was cut after 4 tokens (--max-new-tokens)" in err


def test_each_line_of_standard_input_is_a_turn_after_the_earlier_ones(folder, run):
    args = ("--max-new-tokens", "4")
    code, out, err = run(*args, stdin="Hi\n \nthe\n")
    assert code == 0, err
    first = reply(folder, HI)
    answer = {"role": "assistant", "content": first}
    second = reply(folder, HI, answer, THE)
    assert out == f"{first}\n{second}\n"
    code, out, _ = run(*args, "--json", stdin="Hi\nthe")
    values = json.loads(out)
    assert values["messages"] == [HI, answer, THE, {**answer, "content": second}]
    assert values["seed"] == 0 and values["dtype"] == "float32"


def test_the_system_text_comes_first(folder, run):
    system = {"role": "system", "content": "Be brief."}
    code, out, err = run("--system", "Be brief.", "--max-new-tokens", "4", stdin="Hi")
    assert code == 0, err
    assert out == reply(folder, system, HI) + "\n"


def test_a_reply_ends_with_the_token_that_the_template_puts_after_it(folder, run):
    first = lm.load(folder).tokenizer.encode(reply(folder, HI))[:1]
    word = lm.load(folder).tokenizer.decode(first)
    source = TEMPLATE.replace("eos_token", f"'{word}'")
    (folder / "chat_template.jinja").write_text(source)
    settings = {"additional_special_tokens": [word], "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    code, out, err = run("--prompt", "Hi")
    assert code == 0 and word not in out
    assert lm.load(folder).tokenizer.turn_end == first[0]


def test_a_terminal_is_asked_for_turns(folder, run, monkeypatch):
    lines = iter(["Hi", " "])
    asked = []

    def ask(prompt):
        asked.append(prompt)
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("builtins.input", ask)
    code, out, err = run("--max-new-tokens", "4", stdin=Terminal())
    assert code == 0 and asked == ["> "] * 3
    assert out == reply(folder, HI) + "\n\n"
    assert "Ctrl-D ends the conversation" in err


def test_a_conversation_that_fills_the_context_is_not_shortened(folder, run):
    long = "quick brown fox jumps " * 6
    model = lm.load(folder)
    room = 64 - lm.apply_chat_template(model, [HI], add_generation_prompt=True).size
    code, out, err = run("--prompt", "Hi")
    assert code == 0
    assert f"cut after {room} tokens (all positions are used)" in err
    assert out == reply(folder, HI, count=room) + "\n"
    code, _, err = run(stdin=f"Hi\n{long}")
    assert code == 2 and "begin a new conversation" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "standard input is empty"),
        (["--system", "x"], "standard input is empty"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", "a", "--top-p", "2"], "top_p is 2"),
    ],
)
def test_an_error_is_one_line(run, args, words):
    code, out, err = run(*args)
    assert code == 2 and words in err and err.count("\n") == 1


def test_a_model_without_a_template_is_refused_with_a_remedy(folder, run):
    (folder / "chat_template.jinja").unlink()
    code, _, err = run(stdin="Hi")
    assert code == 2 and "no chat template" in err and "chat_template.jinja" in err


def test_a_template_that_refuses_the_conversation_is_named(folder, run):
    source = "{{ raise_exception('Only in French') }}"
    (folder / "chat_template.jinja").write_text(source)
    code, _, err = run(stdin="Hi")
    assert code == 2
    assert "chat_template.jinja refuses the conversation: Only in French" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [([], "give --prompt TEXT, or --chat"), (["--system", "x"], "--prompt")],
)
def test_options_that_need_others_are_refused(folder, capsys, args, words):
    assert main(["generate", str(folder), *args]) == 2
    assert words in capsys.readouterr().err


def test_text_is_printed_as_it_is_generated(capsys):
    class Upper:
        def add(self, token):
            return {1: "a", 2: "", 3: "é"}[token]

        def end(self):
            return "?"

    printer = chat.Printer(Upper(), stop=(9,), head="> ")
    seen = []
    for token in (1, 2, 3, 9):
        printer([token])
        seen.append(capsys.readouterr().out)
    printer.end()
    assert seen == ["> a", "", "é", ""] and capsys.readouterr().out == "?\n"
