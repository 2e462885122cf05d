"""Results print in a few lines, without arrays."""

from kronjax import lm
from kronjax.lm.evaluation import spectra
from kronjax.lm.models import likelihood
from kronjax.lm.text import documents

ROWS = ["The quick brown fox jumps", "She sells sea shells"] * 9


def results(model):
    """Return a result of every kind, by the name of its class."""
    text = documents.from_rows(ROWS)
    requests = [likelihood.Request(model.tokenizer.encode(row), 2) for row in ROWS]
    values = [
        model,
        text,
        lm.perplexity(model, text, "hf-strided"),
        lm.lambada(model, text),
        lm.measure_latency(model, context=8, new_tokens=2, repeats=2),
        spectra.compare(model, model),
        model.empty_cache(2, 8),
        requests[0],
        likelihood.run(model, requests),
    ]
    return {type(value).__name__: value for value in values}


def test_a_result_prints_in_at_most_ten_lines_without_arrays(tiny):
    printed = {name: repr(value) for name, value in results(tiny).items()}
    assert len(printed) == 9
    for name, text in printed.items():
        assert len(text) <= 10 * 80 and text.count("\n") < 10, name
        assert "rray([" not in text, name
    assert printed["Model"] == (
        "<gpt2 model: 2 blocks, 37,120 parameters, float32, 0 compressed layers>"
    )
    for word in ("perplexity=", "name='hf-strided'", "tokens_scored=", "dtype="):
        assert word in printed["Perplexity"]
    for word in ("prefill=Times(seconds=", "ratio=1", "turns=2", "device="):
        assert word in printed["Latency"]
