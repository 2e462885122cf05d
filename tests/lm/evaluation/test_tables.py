"""Tables and sentences that compare evaluated models."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from kronjax.lm.evaluation import harness, perplexity, tables
from kronjax.lm.models import sizes
from kronjax.lm.text.tokenizer import Tokenizer

ROWS = ["The quick brown fox", "A journey of a thousand miles", "sea shells"]


@pytest.fixture
def row(tiny):
    result = perplexity.perplexity(tiny, "The quick brown fox. " * 9, "hf-strided")
    return "runs/small", sizes.count(tiny), result


def test_two_models_are_compared_by_factor_and_nats(row):
    name, size, result = row
    worse = dataclasses.replace(result, nll=result.nll + 0.5, perplexity=7.0)
    better = dataclasses.replace(result, perplexity=3.5)
    smaller = dataclasses.replace(size, parameters=size.parameters // 2)
    line = tables.difference([(name, smaller, worse), (name, size, better)])
    assert line == (
        "50.0 % of the parameters, perplexity times 2.000 (+0.5000 nats per token)."
    )


def test_incomparable_results_are_reported_as_such(row):
    name, size, result = row
    shorter = dataclasses.replace(result, protocol=result.protocol.fitted(32))
    line = tables.difference([(name, size, shorter), (name, size, result)])
    assert line == "Not comparable: the contexts of the models differ, 32 and 64."
    other = dataclasses.replace(result, tokens_sha256="0")
    line = tables.difference([(name, size, other), (name, size, result)])
    assert "different tokens" in line


def test_a_table_fits_a_terminal(row):
    console = Console(width=80, file=io.StringIO())
    console.print(tables.evaluation([row, row]))
    text = console.file.getvalue()
    for word in ("runs/small", "hf-strided v1", f"{row[2].nll:.4f}"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 80


def test_both_counts_of_masked_models_are_shown(row):
    name, size, result = row
    masked = dataclasses.replace(size, held=2 * size.parameters)
    console = Console(width=80, file=io.StringIO())
    console.print(tables.evaluation([(name, masked, result), row]))
    text = console.file.getvalue()
    counts = tables.millions(size.parameters), tables.millions(2 * size.parameters)
    assert "held" in text and all(count in text for count in counts)
    assert max(map(len, text.splitlines())) <= 80


def test_lambada_equals_the_harness_for_a_tokenizer_with_a_first_token(tiny, tokenizer):
    """The tokenizer puts a token before every text, as that of OPT does."""
    model = json.loads(tokenizer.files["tokenizer.json"])["model"]
    merges = [x if isinstance(x, str) else " ".join(x) for x in model["merges"]]
    config = {"bos_token": "<|endoftext|>", "add_bos_token": True}
    tiny.tokenizer = Tokenizer(
        {
            "vocab.json": json.dumps(model["vocab"]).encode(),
            "merges.txt": "\n".join(merges).encode(),
            "tokenizer_config.json": json.dumps(config).encode(),
        }
    )
    assert tiny.tokenizer.encode("a")[0] == tiny.tokenizer.bos
    ours = perplexity.lambada(tiny, ROWS, full_text=False)
    pairs = [(row.rpartition(" ")[0], f" {row.rpartition(' ')[2]}") for row in ROWS]
    theirs = harness.Adapter(tiny).loglikelihood(pairs)
    mean = np.mean([value for value, _ in theirs])
    assert ours.perplexity == pytest.approx(np.exp(-mean), rel=1e-5)
