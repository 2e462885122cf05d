import json

import numpy as np
import pytest
from helpers import as_users_run_it

from kronjax import demo
from kronjax.cli.main import main
from kronjax.demo import language, matrices
from kronjax.lm.compression import record


@pytest.fixture(autouse=True)
def settings():
    with as_users_run_it():
        yield


@pytest.fixture
def small(monkeypatch):
    """Reduce the demo to 9×9 matrices with 3×3 factors, one rank and little text."""
    monkeypatch.setattr(matrices, "SIZE", 9)
    monkeypatch.setattr(matrices, "FACTOR", 3)
    monkeypatch.setattr(matrices, "RANKS", (2,))
    ways = language.ways()
    only = {name: ways[name] for name in ("SVD", "Kronecker, Van Loan")}
    monkeypatch.setattr(language, "ways", lambda: only)
    monkeypatch.setattr(language, "CHARACTERS", 8000)
    monkeypatch.setattr(language, "TOKENS", 2048)


def test_demo_shows_matrices_and_the_model_and_writes_its_files(
    small, tmp_path, capsys
):
    out = tmp_path / "shown"
    assert main(["demo", "--out", str(out), "--matrices", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (errors,) = found["matrices"]
    assert errors["wins"] == errors["matrices"] == 2
    dense, svd, van_loan, planned = found["language"]
    assert [row["name"] for row in found["language"]] == [
        language.DENSE,
        "SVD",
        "Kronecker, Van Loan",
        language.PLANNED,
    ]
    assert planned["parameters"] <= svd["parameters"] < 0.6 * dense["parameters"]
    assert dense["perplexity"] < planned["perplexity"] < svd["perplexity"]
    assert svd["perplexity"] < van_loan["perplexity"]
    for name in ("matrices.png", "language.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert "<html" in (out / "report.html").read_text(encoding="utf-8")
    assert record.read(out)["after"]["parameters"] == planned["parameters"]


def test_tables_name_the_winner_by_numbers():
    rows = [language.Row("dense", 100, 20.0), language.Row("SVD", 50, 40.0)]
    table = language.table(rows)
    assert list(table.columns[-1].cells) == ["", "+0.693"]
    assert language.figure(rows).startswith(b"\x89PNG")


def test_all_ways_have_nearly_the_same_size():
    sizes = {
        name: sum(term.rank * factors for term, factors in terms(rules))
        for name, rules in language.ways().items()
        if name != "SVD"
    }
    assert len(set(sizes.values())) == 1


def terms(rules):
    shapes = {"h.*.mlp.c_fc": (192, 768), "h.*.mlp.c_proj": (768, 192)}
    for rule in rules.rules:
        for term in rule.terms or ():
            m, n = shapes[rule.match]
            size = term.a_shape[0] * term.a_shape[1]
            yield term, size + m * n // size


def test_demo_checks_first_that_it_can_write(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert main(["demo", "--out", str(tmp_path / "taken")]) == 2
    assert "taken" in capsys.readouterr().err
    assert main(["demo", "--matrices", "0", "--out", str(tmp_path)]) == 2
    assert "at least 1" in capsys.readouterr().err


def test_title_states_the_outcome():
    ours, theirs = np.array([1.0, 3.0]), np.array([2.0, 2.0])
    errors = matrices.Errors(1, ours, theirs, theirs, 0.0, 0.0)
    assert errors.wins == 1
    assert "nearest in 1 of 2 cases" in matrices._title([errors])
    errors = matrices.Errors(1, ours, 2 * theirs, 2 * theirs, 0.0, 0.0)
    assert "nearest in every case" in matrices._title([errors])
    assert demo.MODEL.is_dir()
