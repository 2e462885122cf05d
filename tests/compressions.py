"""A saved model, its rules, and how tests of the command line compress it."""

import functools

import pytest

from kronjax import lm
from kronjax.cli.main import main
from kronjax.lm.compression import candidates, record

TEXT = "The quick brown fox jumps over the lazy dog, and she sells sea shells.\n" * 90

RULES = """
rules:
- {match: "*.c_fc", method: interpolative, fraction: 0.5, weighting: none}
- match: "wte"
  method: kronecker
  terms: [{a_shape: [300, 1], rank: 6}]
  weighting: none
- match: "h.1.attn.c_proj"
  method: kronecker
  terms: [{a_shape: [32, 1], rank: 3}]
  scalars: true
  weighting: none
- {match: "*", method: low-rank, rank: 4, weighting: none}
"""
SPECTRAL = """
rules:
- match: "h.*.attn.c_proj"
  method: kronecker
  terms: [{a_shape: [8, 8]}]
  norm: spectral
  weighting: none
- {match: "*", method: keep}
"""


@pytest.fixture
def untimed(monkeypatch):
    """Records without speeds, whose programs take long to compile."""
    monkeypatch.setattr(record, "of", functools.partial(record.of, timed=False))


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


def compress(folder, *more, rules=RULES, out="out"):
    """The arguments of a compression by rules, which are written to a file."""
    (folder / "rules.yaml").write_text(rules)
    given = ("compress", folder / "dense", "--recipe", folder / "rules.yaml")
    return (*given, "--out", folder / out, *more)
