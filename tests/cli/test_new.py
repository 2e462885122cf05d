"""The command `kronjax new`: sizes, tokenizers, and mistakes."""

import json

import numpy as np
import pytest
from helpers import SENTENCES

from kronjax import lm
from kronjax.cli.main import main
from kronjax.lm.models import likelihood
from kronjax.lm.text import tokenizer

TEXT = " ".join(SENTENCES)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    rows = [json.dumps({"body": row}) for row in SENTENCES]
    path.write_text("\n".join(rows))
    return str(path)


def new(folder, *more):
    sizes = ["--layers", "1", "--width", "16", "--heads", "2", "--context", "16"]
    return ["new", str(folder), *sizes, *map(str, more)]


def test_a_new_model_has_a_tokenizer_of_its_text(tmp_path, text, capsys):
    more = ("--data", text, "--column", "body", "--vocabulary", "290")
    assert main(new(tmp_path / "a", *more)) == 0
    assert "a tokenizer of 290 tokens" in capsys.readouterr().out
    model = lm.load(tmp_path / "a")
    tokens = model.tokenizer.encode(TEXT)
    assert tokens.max() < model.config.vocab_size == 290
    assert len(tokens) < len(TEXT.encode())  # pairs of letters became tokens
    assert model.tokenizer.decode(tokens) == TEXT
    other = "naïve \U0001f600 \x00"
    assert model.tokenizer.decode(model.tokenizer.encode(other)) == other
    # All tokens are about equally likely, and the config names the end-of-text token.
    loss = likelihood.token_losses(model, tokens[None, :17]).mean()
    assert float(loss) == pytest.approx(np.log(290), rel=0.05)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["eos_token_id"] == model.tokenizer.eos == 0
    # The same command writes the same files; a tokenizer may come from another model.
    assert main(new(tmp_path / "b", *more)) == 0
    names = [x.name for x in (tmp_path / "a").iterdir()]
    assert "tokenizer.json" in names
    for name in names:
        read = [(tmp_path / x / name).read_bytes() for x in "ab"]
        assert read[0] == read[1]
    assert main(new(tmp_path / "c", "--tokenizer", tmp_path / "a", "--json")) == 0
    output = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert output["vocabulary"] == 290
    assert lm.load(tmp_path / "c").tokenizer == model.tokenizer


def test_a_short_text_gives_a_small_vocabulary():
    assert tokenizer.train(["aa"], 1000, context=8).size == 258


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "FILE to train a tokenizer on, or --tokenizer MODEL"),
        (("--data", "none.txt"), "no such file: none.txt"),
        (("--data", "TEXT", "--vocabulary", "256"), "take 257 or more"),
        (
            ("--data", "TEXT", "--heads", "3"),
            "--width 16 is not a multiple of --heads 3",
        ),
        (("--data", "TEXT", "--layers", "0"), "--layers is 0"),
        (("--data", "TEXT", "--vocabulary", "0"), "take 257 or more"),
        (("--tokenizer", "HERE"), "has no tokenizer"),
        (("--tokenizer", "HERE", "--vocabulary", "290"), "has its own vocabulary"),
        (("--data", "EMPTY"), "is empty"),
    ],
)
def test_mistakes_print_one_line(tmp_path, text, capsys, more, message):
    (tmp_path / "empty.txt").write_text(" \n")
    names = {"TEXT": text, "HERE": tmp_path, "EMPTY": tmp_path / "empty.txt"}
    line = new(tmp_path / "a", "--column", "body", *(names.get(x, x) for x in more))
    assert main(line) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_an_existing_model_is_replaced_only_by_force(tmp_path, text, capsys):
    more = ("--data", text, "--column", "body", "--vocabulary", "290")
    assert main(new(tmp_path / "a", *more)) == 0
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert main(new(tmp_path / "a", *more, "--seed", "1")) == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before
    assert main(new(tmp_path / "a", *more, "--seed", "1", "--force")) == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() != before
