"""Plan, compress and report, as a user types them."""

import json

import numpy as np
import pytest
from helpers import KRONY_PT

from kronjax import lm, nn, recipe
from kronjax.cli.main import main
from kronjax.lm.compression import candidates

TEXT = "The quick brown fox jumps over the lazy dog, and she sells sea shells.\n" * 90


@pytest.fixture
def folder(tiny, tmp_path, monkeypatch):
    """A saved model and a text; mixtures, which take long to compile, are left out."""
    monkeypatch.setattr(candidates, "probe", lambda *_: [])
    lm.save(tiny, tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def run(capsys, *args):
    code = main([str(x) for x in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_budget_and_a_text_make_a_smaller_model_with_a_report(folder, capsys):
    given = ("compress", folder / "dense", "--budget", "0.6")
    given += ("--calibrate", folder / "text.txt", "--tokens", "600")
    code, out, err = run(capsys, *given, "--out", folder / "small")
    assert code == 0, err
    assert "Moments of inputs and gradients take up to" in err
    assert "report.html shows every layer" in out
    found = json.loads((folder / "small" / "report.json").read_text())
    assert found["after"]["linear_parameters"] < found["before"]["linear_parameters"]
    assert found["perplexity"]["compressed"]["tokens_scored"] > 0
    assert len(found["analysis"]["layers"]) == 8
    page = (folder / "small" / "report.html").read_text()
    assert "Norms and ranks" in page and "mean stable rank" in page
    names = {path.name for path in (folder / "small").iterdir()}
    assert {"config.json", "model.safetensors", "recipe.yaml", "report.html"} <= names
    assert not [name for name in names if name.startswith(".kronjax")]
    small = lm.load(folder / "small")
    kinds = {nn.describe(x)["kind"] for x in nn.linear_layers(small).values()}
    assert "interpolative" in kinds
    assert recipe.loads(small.recipe).rules
    # Twice the same line would replace it.
    code, _, err = run(capsys, *given, "--out", folder / "small")
    assert code == 2 and "--force" in err
    code, out, err = run(capsys, "report", folder / "small", "--json")
    assert code == 0 and json.loads(out) == found
    lm.export(small, folder / "export")
    again = lm.load(folder / "export")
    tokens = np.arange(12)[None]
    np.testing.assert_allclose(again(tokens), small(tokens), atol=1e-4)


def test_plans_are_printed_written_and_carried_out(folder, capsys):
    plan = folder / "plan.yaml"
    given = ("plan", folder / "dense", "--budget", "0.5", "--out", plan, "--json")
    code, out, err = run(capsys, *given)
    assert code == 0, err
    values = json.loads(out)
    assert values["weighting"] == "none"
    assert all("reason" in one for one in values["layers"])
    given = ("compress", folder / "dense", "--recipe", plan, "--out", folder / "small")
    code, out, err = run(capsys, *given, "--json")
    assert code == 0, err
    after = json.loads(out)["after"]
    assert after["parameters"] == values["after"]["parameters"]
    # For rules the config.json is enough.
    (folder / "bare").mkdir()
    (folder / "bare" / "config.json").write_bytes(
        (folder / "dense" / "config.json").read_bytes()
    )
    code, out, err = run(capsys, "plan", folder / "bare", "--recipe", plan)
    assert code == 0, err
    assert f"{values['after']['parameters']:,} of" in out


def test_plans_of_gpt2_count_what_the_literature_counts(tmp_path, capsys):
    config = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
    config |= {"n_embd": 768, "n_layer": 12, "n_head": 12}
    (tmp_path / "config.json").write_text(json.dumps(config))
    # All of them: see test_nn.
    for a_shape, total in list(KRONY_PT.items())[::7]:
        rules = [
            {"match": f"h.*.mlp.{name}", "method": "kronecker", "terms": [term]}
            for name, term in (
                ("c_proj", {"a_shape": a_shape}),
                ("c_fc", {"a_shape": a_shape[::-1]}),
            )
        ]
        path = tmp_path / "rules.yaml"
        path.write_text(json.dumps({"rules": rules}))  # which is YAML, too
        code, out, err = run(capsys, "plan", tmp_path, "--recipe", path, "--json")
        assert code == 0, err
        assert json.loads(out)["after"]["parameters"] == total


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "either --budget or --recipe"),
        (("--budget", "80%"), "write a fraction"),
        (("--budget", "100"), "leaves nothing for the linear layers"),
        (("--recipe", "kronypt-81"), "did you mean kronypt-81m"),
        (("--recipe", "svd-half", "--weighting", "none"), "says itself"),
    ],
)
def test_mistakes_leave_nothing_behind(folder, capsys, given, message):
    out = folder / "small"
    code, _, err = run(capsys, "compress", folder / "dense", *given, "--out", out)
    assert code == 2
    assert message in err
    assert not (out / "config.json").exists()


def test_a_folder_that_cannot_be_made_is_told_before_the_work(folder, capsys):
    given = ("compress", folder / "dense", "--budget", "0.5")
    code, _, err = run(capsys, *given, "--out", folder / "text.txt" / "small")
    assert code == 2
    assert "text.txt" in err
