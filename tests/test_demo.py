import numpy as np
import pytest

from kronjax import cli, demo


@pytest.fixture
def small(monkeypatch):
    """Matrices 9×9 with 3×3 factors instead of 36×36, and one rank."""
    monkeypatch.setattr(demo, "SIZE", 9)
    monkeypatch.setattr(demo, "FACTOR", 3)
    monkeypatch.setattr(demo, "RANKS", (2,))


def test_demo_draws_a_figure_and_prints_a_table(small, tmp_path, capsys):
    out = tmp_path / "demo.png"
    assert cli.main(["demo", "--out", str(out), "--matrices", "2"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "2 matrices 9×9" in printed
    assert "2/2" in printed


def test_demo_finds_out_first_that_it_cannot_write(tmp_path, capsys):
    assert cli.main(["demo", "--out", str(tmp_path / "demo.pdf")]) == 2
    assert "must end in .png" in capsys.readouterr().err
    assert cli.main(["demo", "--matrices", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err


def test_title_says_what_is_seen():
    ours, theirs = np.array([1.0, 3.0]), np.array([2.0, 2.0])
    errors = demo.Errors(1, ours, theirs, theirs, 0.0, 0.0)
    assert errors.wins == 1
    assert "nearest in 1 of 2 cases" in demo._title([errors])
    errors = demo.Errors(1, ours, 2 * theirs, 2 * theirs, 0.0, 0.0)
    assert "nearest in every case" in demo._title([errors])
