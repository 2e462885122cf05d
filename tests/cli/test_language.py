"""The commands for language models, as a user types them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from kronjax import lm, nn
from kronjax.cli.main import main
from kronjax.kronecker import KroneckerTerms

TEXT = "The quick brown fox jumps over the lazy dog, and she sells sea shells.\n" * 12


@pytest.fixture
def folder(tiny, tmp_path):
    """A dense model, the same model with a Kronecker product, and a text."""
    lm.save(tiny, tmp_path / "dense")
    layer = nn.linear_layers(tiny)["h.0.mlp.c_fc"]
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(x, jnp.float32) for x in rng.normal(size=(2, 1, 8, 8)))
    b = jnp.concatenate([b, b], axis=-1)[:, :4]
    nn.replace(
        tiny,
        "h.0.mlp.c_fc",
        nn.KroneckerLinear([KroneckerTerms(a, b)], layer.bias[...]),
    )
    lm.save(tiny, tmp_path / "small")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def run(capsys, *args):
    code = main([str(x) for x in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_evaluate_compares_two_models(folder, capsys):
    code, out, err = run(
        capsys,
        *("evaluate", folder / "small", "--text", folder / "text.txt"),
        *("--protocol", "krony-pt", "--against", folder / "dense"),
    )
    assert code == 0, err
    assert "krony-pt v1" in out and "context 64" in out
    assert "% of the parameters, perplexity times" in out


def test_evaluate_prints_json_that_reproduces_the_number(folder, capsys):
    command = ("evaluate", folder / "dense", "--text", folder / "text.txt", "--json")
    code, out, err = run(capsys, *command, "--protocol", "hf-strided")
    assert code == 0, err
    values = json.loads(out)
    model = lm.load(folder / "dense")
    again = lm.perplexity(model, TEXT, protocol="hf-strided")
    assert values["perplexity"] == pytest.approx(again.perplexity, rel=1e-6)
    assert values["protocol"] == "hf-strided" and values["protocol_version"] == 1
    assert values["tokens_scored"] == values["tokens"] - 1
    assert values["text_sha256"] == again.text_sha256
    assert values["parameters"] == 37_120 and values["against"] is None


def test_evaluate_measures_last_words(folder, capsys):
    path = folder / "rows.jsonl"
    path.write_text('{"text": "The quick brown fox"}\n{"text": "A thousand miles"}\n')
    command = ("evaluate", folder / "small", "--text", path, "--protocol", "lambada")
    code, out, err = run(capsys, *command, "--json")
    assert code == 0, err
    values = json.loads(out)
    assert values["rows"] == 2 and 0 <= values["accuracy"] <= 1
    code, out, _ = run(capsys, *command)
    assert code == 0 and "accuracy" in out


def test_generate_continues_a_prompt(folder, capsys):
    command = ("generate", folder / "dense", "--prompt", "The quick")
    code, out, err = run(capsys, *command, "--max-new-tokens", "5")
    assert code == 0, err
    model = lm.load(folder / "dense")
    expected = lm.generate(model, "The quick", max_new_tokens=5)
    assert out == f"The quick{expected}\n"
    code, out, _ = run(capsys, *command, "--max-new-tokens", "5", "--json")
    values = json.loads(out)
    assert values["text"] == expected and len(values["tokens"]) == 5


def test_export_multiplies_out_and_replaces_only_with_force(folder, capsys):
    command = ("export", folder / "small", folder / "out")
    code, out, err = run(capsys, *command)
    assert code == 0, err
    assert "8 linear layers, 1 of them multiplied out" in out
    tokens = np.arange(10, dtype=np.int32)[None]
    small, dense = (lm.load(folder / name) for name in ("small", "out"))
    np.testing.assert_allclose(small(tokens), dense(tokens), atol=1e-4)
    assert all(isinstance(x, nnx.Linear) for x in nn.linear_layers(dense).values())
    code, _, err = run(capsys, *command)
    assert code == 2 and "--force" in err
    assert run(capsys, *command, "--force")[0] == 0


def test_latency_says_which_model_is_faster(folder, capsys):
    command = ("latency", folder / "small", "--context", "32", "--new-tokens", "4")
    code, out, err = run(capsys, *command)
    assert code == 0, err
    assert "Reading the prompt" in out and "whole model" in out
    code, out, _ = run(capsys, *command, "--json")
    assert code == 0 and json.loads(out)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["evaluate", "no/such", "--text", "none.txt"], "no such file: none.txt"),
        (["evaluate", "{dense}", "--text", "{text}", "--protocol", "x"], "no protocol"),
        (["evaluate", "{dense}", "--text", "{dense}"], "folder"),
        (["generate", "./nowhere", "--prompt", "x"], "no folder ./nowhere"),
        (["generate", "{dense}", "--prompt", ""], "without tokens"),
        (["generate", "{dense}", "--prompt", "a", "--top-p", "2"], "top_p is 2"),
        (["export", "{text}", "{dense}2"], "neither a folder nor a .gguf file"),
    ],
)
def test_an_error_is_one_line(folder, capsys, args, words):
    names = {"dense": folder / "dense", "text": folder / "text.txt"}
    code, out, err = run(capsys, *(arg.format(**names) for arg in args))
    assert code == 2
    assert err.startswith("kronjax: error: ") and err.count("\n") == 1
    assert words in err


def test_a_note_is_one_line_on_standard_error(folder, capsys):
    path = folder / "dense/model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors = {f"module.{name}": x for name, x in tensors.items()}
    safetensors.numpy.save_file(tensors, path)
    code, out, err = run(capsys, "export", folder / "dense", folder / "out")
    assert code == 0 and "prefix" not in out
    assert err == "kronjax: the prefix module. of the names of tensors is removed\n"
