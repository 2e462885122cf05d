"""Perplexities of texts, and accuracies of the last words of LAMBADA.

    perplexity = exp(mean of nll)

`perplexity` follows one of the `PROTOCOLS`, and `lambada` predicts the last word of
each row. `log_likelihoods` scores the continuations of other tasks. Results are frozen
dataclasses, which `summary` turns into values for JSON.

LAMBADA, version 1, is the task `lambada_openai` of lm-evaluation-harness 0.4.13: the
target is a space and the last word, and the context is the text before it, with the
tokens that the tokenizer puts before a text. A row is correct if each token of the
target is the most likely one. The perplexity is the exponential of the mean over rows
of the nll of the whole target.

References: Paperno et al. (2016) for LAMBADA; `kronjax.lm.evaluation.protocols` for
perplexities.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kronjax import __version__
from kronjax.io.json_values import jsonable
from kronjax.lm.evaluation.protocols import PROTOCOLS, Protocol, Window, find
from kronjax.lm.models import likelihood
from kronjax.lm.models.base import (
    LanguageModel,
    check_vocabulary,
    parameter_dtype,
    tokenizer_of,
)
from kronjax.lm.models.finite import cause
from kronjax.lm.models.likelihood import log_likelihoods
from kronjax.lm.text import documents as texts
from kronjax.lm.text.documents import Text
from kronjax.lm.text.tokenizer import Tokenizer

__all__ = [
    "PROTOCOLS",
    "Lambada",
    "Perplexity",
    "Protocol",
    "lambada",
    "log_likelihoods",
    "perplexity",
    "summary",
]


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """A perplexity, and everything that is needed to reproduce it.

    Attributes:
        perplexity: `exp(nll)`.
        nll: Mean loss as the protocol defines it, in nats per token.
        protocol: The protocol, with the context and the stride that fit the model.
        tokens: Number of tokens in the text.
        tokens_scored: Number of tokens that are scored.
        windows: Number of windows.
        seconds: Time for running the model, without compilation.
        compile_seconds: Time for tracing and compiling; 0 if the programs existed.
        source: Name of the text's file or data set, or None.
        join: How the rows of the text were joined, or None if tokens were given.
        text_sha256: SHA-256 of the text in UTF-8; None if tokens were given.
        tokens_sha256: SHA-256 of the tokens as little-endian int32.
        tokenizer_sha256: Digest of the tokenizer; None if tokens were given.
        vocab_size: Size of the model's vocabulary.
        dtype: The dtype of the parameters.
    """

    perplexity: float
    nll: float
    protocol: Protocol
    tokens: int
    tokens_scored: int
    windows: int
    seconds: float
    compile_seconds: float = dataclasses.field(repr=False)
    source: str | None
    join: str | None
    text_sha256: str | None = dataclasses.field(repr=False)
    tokens_sha256: str = dataclasses.field(repr=False)
    tokenizer_sha256: str | None = dataclasses.field(repr=False)
    vocab_size: int = dataclasses.field(repr=False)
    dtype: str

    @property
    def tokens_per_second(self) -> float:
        """Number of tokens scored per second, without compilation."""
        return self.tokens_scored / max(self.seconds, 1e-9)


@dataclasses.dataclass(frozen=True)
class Lambada:
    """Accuracy and perplexity of the last words of texts.

    Attributes:
        accuracy: Fraction of the rows whose last word the model predicts.
        perplexity: Perplexity of the last words, `exp` of the mean nll of whole words.
        rows: Number of rows.
        tokens_scored: Number of tokens in the last words.
        full_text: Perplexity of the rows joined by blank lines, protocol `krony-pt`,
            or None.
        seconds: Time for running the model on the last words, without compilation.
        compile_seconds: Time for tracing and compiling the programs for them.
        source: Name of the rows' file or data set, or None.
        text_sha256: SHA-256 of the rows joined by blank lines.
        tokenizer_sha256: Digest of the tokenizer.
        vocab_size: Size of the model's vocabulary.
        dtype: The dtype of the parameters.
        version: Version of the protocol.
    """

    accuracy: float
    perplexity: float
    rows: int
    tokens_scored: int
    full_text: Perplexity | None
    seconds: float
    compile_seconds: float = dataclasses.field(repr=False)
    source: str | None
    text_sha256: str = dataclasses.field(repr=False)
    tokenizer_sha256: str = dataclasses.field(repr=False)
    vocab_size: int = dataclasses.field(repr=False)
    dtype: str
    version: int = 1


def perplexity(
    model: LanguageModel,
    text: str | Text | Path | np.ndarray | Sequence[int],
    protocol: str | Protocol = "gptq-2048",
    *,
    tokenizer: Tokenizer | None = None,
    batch: int | None = None,
    progress: bool | None = None,
) -> Perplexity:
    """Return the perplexity of a model on a text.

    Args:
        model: Any language model.
        text: A string, the result of `kronjax.lm.read_text`, the path of a file, which
            is then read without joining its lines, or tokens `[n]`.
        protocol: One of `PROTOCOLS`, or its name.
        tokenizer: The tokenizer; by default that of the model.
        batch: Number of windows at a time; by default enough to keep the device busy.
        progress: Whether to draw a bar; by default on a terminal, after two seconds.

    Returns:
        The perplexity and its circumstances. The cost is a forward pass for each
        window, with the head only at the tokens that are scored.

    Raises:
        ValueError: If the text has fewer than two tokens or no window, the tokenizer
            is missing or does not belong to the model, or the protocol is unknown.
    """
    protocol = find(protocol) if isinstance(protocol, str) else protocol
    read: Text | None = None
    if isinstance(text, str | Text | Path):
        tokenizer = tokenizer_of(model, tokenizer)
        read = _text(text)
        tokens = tokenizer.encode(read.text)
    else:
        tokenizer, tokens = None, np.asarray(text)
        if tokens.ndim != 1 or not (tokens.dtype.kind in "iu" or not tokens.size):
            raise ValueError(
                f"tokens must be integers [n]; got {tokens.dtype} {list(tokens.shape)}"
            )
    if len(tokens) < 2:
        raise ValueError(
            f"a perplexity needs two tokens or more; the text has {len(tokens)}"
        )
    check_vocabulary(model, tokens, tokenizer)
    protocol = protocol.fitted(model.config.context)
    windows = protocol.windows(len(tokens), model.config.context)
    if not windows:
        raise ValueError(
            f"the text has {len(tokens)} tokens, but {protocol.name} takes whole "
            f"windows of {protocol.context}; use krony-pt or hf-strided, which take "
            "shorter ones"
        )
    means, scores = _score(model, tokens, windows, protocol.stride, batch, progress)
    counts = np.array([window.scored for window in windows])
    weights = counts if protocol.average == "tokens" else np.ones(len(windows))
    nll = float(np.average(means, weights=weights))
    return Perplexity(
        perplexity=_exp(nll),
        nll=nll,
        protocol=protocol,
        tokens=len(tokens),
        tokens_scored=int(counts.sum()),
        windows=len(windows),
        seconds=scores.seconds,
        compile_seconds=scores.compile_seconds,
        source=None if read is None else read.source,
        join=None if read is None else read.join,
        text_sha256=None if read is None else read.sha256,
        tokens_sha256=hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest(),
        tokenizer_sha256=None if tokenizer is None else tokenizer.digest,
        vocab_size=model.config.vocab_size,
        dtype=str(parameter_dtype(model)),
    )


def lambada(
    model: LanguageModel,
    rows: Text | Sequence[str],
    *,
    tokenizer: Tokenizer | None = None,
    full_text: bool = True,
    batch: int | None = None,
    progress: bool | None = None,
) -> Lambada:
    """Measure how well a model predicts the last word of each row.

    Args:
        model: Any language model.
        rows: Rows of at least two words, or a `Text`, whose rows are taken.
        tokenizer: The tokenizer; by default that of the model.
        full_text: Whether to compute the perplexity of all rows, too.
        batch: Number of rows at a time; by default enough to keep the device busy.
        progress: Whether to draw a bar; by default on a terminal, after two seconds.

    Raises:
        ValueError: If there are no rows, a row has fewer than two words, or the
            tokenizer is missing or does not belong to the model.
    """
    if isinstance(rows, str):
        raise ValueError("lambada takes rows, a list of strings; got one string")
    source = rows.source if isinstance(rows, Text) else None
    rows = rows.rows if isinstance(rows, Text) else rows
    if not rows:
        raise ValueError("lambada needs rows; there are none")
    tokenizer = tokenizer_of(model, tokenizer)
    pairs = [_last_word(row, i, tokenizer) for i, row in enumerate(rows, 1)]
    whole = np.concatenate([x for pair in pairs for x in pair])
    check_vocabulary(model, whole, tokenizer)
    scores = likelihood.score_pairs(model, pairs, batch=batch, progress=progress)
    totals = [float(np.sum(nll, dtype=np.float64)) for nll in scores.losses]
    joined = texts.from_rows(rows, source=source or "rows")
    full = None
    if full_text:
        full = perplexity(
            model, joined, "krony-pt", tokenizer=tokenizer, progress=progress
        )
    return Lambada(
        accuracy=float(np.mean([np.all(hits) for hits in scores.greedy])),
        perplexity=_exp(float(np.mean(totals))),
        rows=len(rows),
        tokens_scored=sum(len(nll) for nll in scores.losses),
        full_text=full,
        seconds=scores.seconds,
        compile_seconds=scores.compile_seconds,
        source=source,
        text_sha256=joined.sha256,
        tokenizer_sha256=tokenizer.digest,
        vocab_size=model.config.vocab_size,
        dtype=str(parameter_dtype(model)),
    )


def summary(result: Perplexity | Lambada) -> dict[str, Any]:
    """Return a result as values for JSON, with None in place of NaN and infinity.

    The versions of kronjax and jax and the device are added to the fields.
    """
    fields = dataclasses.asdict(result)
    if isinstance(result, Perplexity):
        protocol = fields.pop("protocol")
        fields = {
            "protocol": protocol.pop("name"),
            "protocol_version": protocol.pop("version"),
            **protocol,
            **fields,
            "tokens_per_second": result.tokens_per_second,
        }
    else:
        whole = result.full_text
        fields["full_text"] = None if whole is None else summary(whole)
        version = fields.pop("version")
        fields = {"protocol": "lambada", "protocol_version": version, **fields}
    device = jax.devices()[0].device_kind
    versions = {"kronjax": __version__, "jax": jax.__version__, "device": device}
    return jsonable({**fields, **versions})


def _score(model, tokens, windows, stride, batch, progress):
    """Return the mean nll of each window, float64 `[windows]`, and the scores."""
    parts = []
    for number, window in enumerate(windows):
        # Where windows overlap, the first one scores more tokens than the others. It
        # is split: the context of each token is the same, and one shape serves all.
        for first in range(window.first, window.end, stride):
            end = min(first + stride, window.end)
            parts.append((number, Window(window.begin, first, end)))
    requests = [
        likelihood.Request(tokens[part.begin : part.end], part.scored)
        for _, part in parts
    ]
    shape = (
        max(len(request.tokens) - 1 for request in requests),
        max(request.scored for request in requests),
    )
    scores = likelihood.run(
        model, requests, batch=batch, shape=shape, progress=progress
    )
    sums = np.zeros(len(windows))
    for (number, _), nll in zip(parts, scores.losses, strict=True):
        sums[number] += np.sum(nll, dtype=np.float64)
    bad = np.count_nonzero(np.isnan(sums))
    if bad:
        why = cause(model, "its numbers are too large for their dtype; try float32")
        raise ValueError(
            f"the model returns NaN in {bad} of {len(windows)} windows: {why}"
        )
    return sums / [window.scored for window in windows], scores


def _last_word(row, number, tokenizer):
    """Return the tokens of a row's context and of its last word."""
    context, _, word = row.rstrip().rpartition(" ")
    context = context.rstrip(" ")
    if not context or not word:
        raise ValueError(f"row {number} has fewer than two words: {row!r:.60}")
    whole = tokenizer.encode(row.rstrip())
    before = tokenizer.encode(context)
    return before, whole[len(before) :]


def _text(text):
    """Return a text, a path or a string as a `Text`."""
    if isinstance(text, Text):
        return text
    if isinstance(text, Path):
        return texts.read_text(text)
    # The name of a file is refused: its own perplexity can hardly be meant.
    if len(text) < 1024 and "\n" not in text and "\0" not in text:
        try:
            named = Path(text).is_file()
        except OSError:  # too long a name
            named = False
        if named:
            raise ValueError(
                f"{text} is the name of a file; give pathlib.Path({text!r}) or what "
                "kronjax.lm.text.documents.read_text returns"
            )
    return Text((text,), text, "given", "text")


def _exp(nll):
    with np.errstate(over="ignore"):
        return float(np.exp(np.float64(nll)))
