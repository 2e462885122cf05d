"""The progress bar: drawn on terminals, printed in lines or silent elsewhere."""

import io
import time

import pytest

from kronjax.io import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal_of(monkeypatch):
    """Replace standard error; in the test itself, as pytest replaces it before."""
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    return stream


def test_a_wanted_bar_shows_text_share_and_rate(monkeypatch):
    terminal = terminal_of(monkeypatch)
    with progress.bar(4, "solving", unit="matrices", wanted=True) as advance:
        advance(1)
        advance(0.5, "p = 10")
        advance(0.5)
        advance(0, "p = 18")
    drawn = terminal.getvalue()
    assert "p = 18" in drawn and "50%" in drawn and "matrices/s" in drawn


def test_a_bar_without_a_unit_shows_no_rate(monkeypatch):
    terminal = terminal_of(monkeypatch)
    with progress.bar(4, "solving", unit=None, wanted=True) as advance:
        advance(1)
        advance(1)
    assert "solving" in terminal.getvalue() and "/s" not in terminal.getvalue()


def test_on_a_terminal_a_bar_is_drawn_after_a_delay(monkeypatch):
    terminal = terminal_of(monkeypatch)
    with progress.bar(4, "short") as advance:
        advance(1)
    assert terminal.getvalue() == ""
    monkeypatch.setattr(progress, "DELAY", 0)
    with progress.bar(4, "long") as advance:
        advance(1)
        time.sleep(0.1)
    assert "long" in terminal.getvalue()


def test_without_a_terminal_lines_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SILENCE", 0)
    with progress.bar(4, "scoring") as advance:
        advance(1)
        advance(1.5, "training")
    with progress.bar(2000, "solving", unit=None) as advance:
        advance(1000)
    assert capsys.readouterr().err == (
        "scoring; 1 of 4 tokens\ntraining; 2.5 of 4 tokens\nsolving; 1,000 of 2,000\n"
    )


@pytest.mark.parametrize("options", [{"lines": False}, {"wanted": False}])
def test_a_silent_bar_prints_nothing(options, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SILENCE", 0)
    with progress.bar(4, "scoring", **options) as advance:
        advance(4, "done")
    assert capsys.readouterr().err == ""
