"""Perplexities and last words, compared with slow and simple loops."""

import hashlib
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import SENTENCES, losses_reference

from kronjax.lm.checkpoints import hugging_face
from kronjax.lm.evaluation import perplexity
from kronjax.lm.models import attention, gpt2
from kronjax.lm.text import documents


def loop(model, tokens, context, stride, average, drop):
    """Return the perplexity, the number of scored tokens and that of windows."""
    means, counts, before = [], [], 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + context, len(tokens))
        new = end - max(before, begin + 1)
        if end - begin < context and drop:
            break
        if new > 0:
            losses, _ = losses_reference(model, tokens[begin:end])
            means.append(losses[-new:].mean())
            counts.append(new)
        before = end
        if end == len(tokens):
            break
    weights = counts if average == "tokens" else None
    return math.exp(np.average(means, weights=weights)), sum(counts), len(counts)


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize(
    ("protocol", "settings"),
    [
        ("krony-pt", (64, 64, "windows", False)),
        ("gptq-2048", (64, 64, "tokens", True)),
        ("hf-strided", (64, 32, "tokens", False)),
    ],
)
def test_protocols_equal_the_reference(tiny, protocol, settings, batch):
    tokens = np.random.default_rng(0).integers(0, 300, 203)
    result = perplexity.perplexity(tiny, tokens, protocol, batch=batch)
    expected, scored, windows = loop(tiny, tokens, *settings)
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert result.nll == pytest.approx(math.log(expected), rel=1e-5)
    assert (result.tokens, result.tokens_scored, result.windows) == (
        203,
        scored,
        windows,
    )
    assert (result.protocol.context, result.protocol.stride) == settings[:2]
    assert (result.vocab_size, result.dtype) == (300, "float32")
    assert result.text_sha256 is None and result.tokenizer_sha256 is None
    raw = tokens.astype("<i4").tobytes()
    assert result.tokens_sha256 == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize("protocol", ["krony-pt", "hf-strided"])
@pytest.mark.parametrize("count", [2, 33, 64, 65])
def test_short_texts_equal_the_reference(tiny, protocol, count):
    tokens = np.random.default_rng(1).integers(0, 300, count)
    average = "windows" if protocol == "krony-pt" else "tokens"
    stride = 64 if protocol == "krony-pt" else 32
    expected, scored, _ = loop(tiny, tokens, 64, stride, average, False)
    result = perplexity.perplexity(tiny, tokens, protocol)
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert result.tokens_scored == scored


def test_a_text_may_be_given_in_any_form(tiny, tmp_path):
    content = "\n".join(SENTENCES) + "\n"
    path = tmp_path / "fox.txt"
    path.write_text(content)
    plain = perplexity.perplexity(tiny, content, "krony-pt")
    for given in (
        path,
        documents.read_text(path),
        tiny.tokenizer.encode(content).tolist(),
    ):
        other = perplexity.perplexity(tiny, given, "krony-pt")
        assert (other.perplexity, other.tokens) == (plain.perplexity, plain.tokens)
        assert other.tokens_sha256 == plain.tokens_sha256
    assert plain.text_sha256 == hashlib.sha256(content.encode()).hexdigest()
    assert plain.tokenizer_sha256 == tiny.tokenizer.digest
    assert (plain.source, plain.join) == ("text", "given")
    joined = perplexity.perplexity(
        tiny, documents.read_text(path, join="blank-lines"), "krony-pt"
    )
    assert joined.tokens > plain.tokens
    assert (joined.source, joined.join) == (str(path), "blank-lines")
    with pytest.raises(ValueError, match="the name of a file; give pathlib.Path"):
        perplexity.perplexity(tiny, str(path))


def test_wrong_arguments_raise_an_error(tiny, tokenizer):
    with pytest.raises(ValueError, match="two tokens or more; the text has 1"):
        perplexity.perplexity(tiny, "A")
    with pytest.raises(ValueError, match="the text has 0"):
        perplexity.perplexity(tiny, [])
    with pytest.raises(ValueError, match="no protocol 'ptb'; there are krony-pt"):
        perplexity.perplexity(tiny, "A fox", "ptb")
    with pytest.raises(ValueError, match=r"whole windows of 64; use krony-pt or hf"):
        perplexity.perplexity(tiny, "A fox")
    with pytest.raises(ValueError, match=r"integers \[n\]; got float64 \[2\]"):
        perplexity.perplexity(tiny, [1.0, 2.0])
    with pytest.raises(ValueError, match=r"integers \[n\]"):
        perplexity.perplexity(tiny, [[1, 2]])
    with pytest.raises(ValueError, match="token 300 is not in the vocabulary"):
        perplexity.perplexity(tiny, [1, 300])
    tiny.tokenizer = None
    with pytest.raises(ValueError, match=r"no tokenizer; put tokenizer.json"):
        perplexity.perplexity(tiny, "A fox")
    assert perplexity.perplexity(tiny, "A fox", "krony-pt", tokenizer=tokenizer)
    small = gpt2.Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1, n_positions=8)
    other = gpt2.Model(small, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"mismatch.* 50 tokens, the tokenizer 300"):
        perplexity.perplexity(other, "A fox", tokenizer=tokenizer)


def test_a_model_that_returns_nan_raises_an_error(tiny):
    large = hugging_face.cast(tiny, "float16")
    large.ln_f.scale[...] = jnp.full_like(large.ln_f.scale[...], 6e4)
    with pytest.raises(ValueError, match="NaN in 1 of 1 windows.*try float32"):
        perplexity.perplexity(large, np.arange(20), "krony-pt")
    tiny.ln_f.scale[...] = jnp.full_like(tiny.ln_f.scale[...], jnp.nan)
    with pytest.raises(ValueError, match=r"1 of 1 windows: ln_f\.scale holds NaN"):
        perplexity.perplexity(tiny, np.arange(20), "krony-pt")


def test_a_summary_holds_what_reproduces_the_number(tiny):
    result = perplexity.perplexity(tiny, " ".join(SENTENCES), "hf-strided")
    fields = json.loads(json.dumps(perplexity.summary(result)))
    assert fields["protocol"] == "hf-strided" and fields["protocol_version"] == 1
    assert fields["context"] == 64 and fields["stride"] == 32
    assert fields["perplexity"] == result.perplexity
    assert fields["seconds"] > 0 and fields["tokens_per_second"] > 0
    assert {"text_sha256", "tokens_sha256", "kronjax", "device"} <= set(fields)


def last_words(model, rows):
    """Return the accuracy and the perplexity of last words."""
    hits, totals = [], []
    for row in rows:
        cut = row.rindex(" ")
        tokens = model.tokenizer.encode(row, special=False)
        count = len(tokens) - len(model.tokenizer.encode(row[:cut], special=False))
        losses, greedy = losses_reference(model, tokens)
        totals.append(losses[-count:].sum())
        hits.append(greedy[-count:].all())
    return np.mean(hits), math.exp(np.mean(totals))


def test_lambada_scores_the_whole_last_word(tiny):
    # The model predicts the last word of one row: the embedding of this word becomes a
    # multiple of the state before it, with which the head is multiplied.
    tokens = tiny.tokenizer.encode("She sells", special=False)
    places = attention.locate((1, len(tokens)))
    state = tiny.hidden(jnp.asarray(tokens)[None], places)[0][0, -1]
    (word,) = tiny.tokenizer.encode(" shells", special=False)
    tiny.wte.embedding[...] = tiny.wte.embedding[...].at[word].set(3 * state)
    rows = [*SENTENCES, "She sells shells"]
    accuracy, expected = last_words(tiny, rows)
    assert accuracy == 0.25
    result = perplexity.lambada(tiny, rows)
    assert result.accuracy == accuracy and result.rows == 4
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    whole = perplexity.perplexity(tiny, "\n\n".join(rows), "krony-pt")
    assert result.full_text is not None
    assert result.full_text.perplexity == whole.perplexity
    assert result.text_sha256 == whole.text_sha256
    fields = json.loads(json.dumps(perplexity.summary(result)))
    assert (fields["protocol"], fields["protocol_version"]) == ("lambada", 1)
    assert fields["full_text"]["protocol"] == "krony-pt"
    alone = perplexity.lambada(
        tiny, documents.from_rows(rows), full_text=False, batch=3
    )
    assert alone.full_text is None and alone.source == "rows"
    assert alone.accuracy == accuracy


def test_lambada_raises_an_error_that_names_the_row(tiny):
    with pytest.raises(ValueError, match="row 2 has fewer than two words: 'word'"):
        perplexity.lambada(tiny, ["Two words", "word"])
    with pytest.raises(ValueError, match="there are none"):
        perplexity.lambada(tiny, [])
    with pytest.raises(ValueError, match="got one string"):
        perplexity.lambada(tiny, "Two words")


def test_log_likelihoods_are_sums_over_the_continuation(tiny):
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(0, 300, n).tolist(), rng.integers(0, 300, k).tolist())
        for n, k in ((5, 2), (60, 5), (100, 3), (1, 64), (9, 1))
    ]
    context = pairs[0][0]
    best = int(tiny(jnp.array([context]))[0, -1].argmax())
    pairs.append((context, [best]))
    results = perplexity.log_likelihoods(tiny, pairs, batch=2)
    assert len(results) == len(pairs)
    for (before, after), (value, greedy) in zip(pairs, results, strict=True):
        # The model reads all but the last token, so 65 of them fit a context of 64.
        tokens = np.array([*before, *after])[-65:]
        losses, hits = losses_reference(tiny, tokens)
        assert value == pytest.approx(-losses[-len(after) :].sum(), rel=1e-5)
        assert greedy == hits[-len(after) :].all()
    assert results[-1][1] and not results[0][1]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([], [1]), "pair 1: the context has no tokens"),
        (([1], []), "pair 1: the continuation has no tokens"),
        (([1], [1] * 65), "65 tokens, but the model has a context of 64"),
        (([1], [300]), "token 300 is not in the vocabulary of the model.* 300 tokens"),
        (([-1], [1]), "token -1"),
    ],
)
def test_pairs_that_cannot_be_scored_raise_an_error(tiny, pair, message):
    with pytest.raises(ValueError, match=message):
        perplexity.log_likelihoods(tiny, [([1], [2]), pair])
