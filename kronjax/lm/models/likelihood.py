"""Losses of next tokens: as a pure function of arrays, and for many texts at once.

    nll_i = log Σ_v exp(logit_iv) − logit_i,target

The logits of a whole batch would be by far the largest array: 1.6 GB in float32 for 8
times 1024 tokens of GPT-2. So the head is applied to a part of the positions at a time,
and only to those that are scored. The logarithm of the sum is float32 whatever the
dtype of the weights.

`score` is a pure function. `run` does the work of the host: it sorts texts into few
shapes, pads them on the right (which no earlier token can read), compiles one program
for each shape and architecture, and keeps the device busy while it fetches results.
`log_likelihoods` sums the scores of continuations.

>>> [padded_length(n, most=100) for n in (3, 17, 65, 99)]
[16, 24, 96, 100]
"""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kronjax.io.progress import bar
from kronjax.lm.models import attention
from kronjax.lm.models.base import LanguageModel, check_vocabulary

# Number of logits computed at a time, and of tokens in a batch. On a CPU, logits that
# fit into the caches make the head a fifth faster; an accelerator needs large products.
_LOGITS = {"cpu": 2**24}
_LOGITS_ELSEWHERE = 2**27
_TOKENS = {"cpu": 2**12}
_TOKENS_ELSEWHERE = 2**15


@dataclasses.dataclass(frozen=True)
class Request:
    """A sequence of tokens of which the last ones are scored.

    Attributes:
        tokens: Tokens, `[n]`, integers, `n` at least 2.
        scored: Number of last tokens that are scored, from 1 to `n - 1`.
    """

    tokens: np.ndarray = dataclasses.field(repr=False)
    scored: int


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of several requests.

    Attributes:
        losses: Losses of each request, float32 `[scored]`, in nats.
        greedy: For each request, bool `[scored]`, whether each token had the largest
            logit; an empty list unless requested.
        seconds: Time for running, without compilation.
        compile_seconds: Time for tracing and compiling; 0 if the programs existed.
    """

    losses: list[np.ndarray] = dataclasses.field(repr=False)
    greedy: list[np.ndarray] = dataclasses.field(repr=False)
    seconds: float
    compile_seconds: float


def score(
    model: LanguageModel,
    tokens: jax.Array,
    targets: jax.Array,
    rows: jax.Array,
    *,
    greedy: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Return the losses of selected next tokens.

    Args:
        model: Any language model.
        tokens: Tokens that the model reads, `[b, t]`.
        targets: Tokens that are scored, `[b, c]`.
        rows: Index in `tokens` of the token before each target, `[b, c]`.
        greedy: Whether to return if the targets had the largest logits.

    Returns:
        The losses `[b, c]`, float32 or wider, and whether each target had the largest
        logit, bool `[b, c]`, or None. The cost is one forward pass with the head at
        `b c` positions, and memory for the logits of a part of them.
    """
    b, t = tokens.shape
    places = attention.locate((b, t))
    x = model.hidden(tokens, places)[0]
    x = jnp.take_along_axis(x, rows[:, :, None], axis=1)
    total, width = rows.size, x.shape[-1]
    budget = _LOGITS.get(jax.default_backend(), _LOGITS_ELSEWHERE)
    chunk = min(max(budget // model.config.vocab_size, 1), total)
    rest = -total % chunk
    flat = (
        jnp.pad(x.reshape(total, width), ((0, rest), (0, 0))).reshape(-1, chunk, width),
        jnp.pad(targets.reshape(total), (0, rest)).reshape(-1, chunk),
    )

    def score_chunk(part):
        x, target = part
        logits = model.head(x)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        chosen = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
        losses = jax.nn.logsumexp(logits, axis=1) - chosen
        # No comparison with the largest logit: in 16 bits, several may be equal to it.
        best = jnp.argmax(logits, axis=1) == target if greedy else None
        return losses, best

    return jax.tree.map(
        lambda y: y.reshape(-1)[:total].reshape(rows.shape),
        jax.lax.map(score_chunk, flat),
    )


def token_losses(model: LanguageModel, tokens: jax.Array) -> jax.Array:
    """Return the loss of every token except the first.

    Args:
        model: Any language model.
        tokens: Tokens without padding, `[b, t]`.

    Returns:
        Losses `[b, t - 1]`, float32 or wider, in nats.
    """
    b, t = tokens.shape
    rows = jnp.broadcast_to(jnp.arange(t - 1, dtype=jnp.int32), (b, t - 1))
    return score(model, tokens[:, :-1], tokens[:, 1:], rows)[0]


def padded_length(length: int, *, most: int, least: int = 16) -> int:
    """Round a length up to the list 16, 24, 32, 48, 64, 96, ..., and at most `most`."""
    size = least
    while size < length:
        # From a power of two to 1.5 times it, and from there to the next power.
        size += size // 2 if size & (size - 1) == 0 else size // 3
    return min(size, most)


def run(
    model: LanguageModel,
    requests: Sequence[Request],
    *,
    batch: int | None = None,
    shape: tuple[int, int] | None = None,
    greedy: bool = False,
    text: str = "scoring",
    progress: bool | None = None,
) -> Scores:
    """Score many sequences in batches of few shapes.

    Products have the precision of float32, unless the parameters have 16 bits.

    Args:
        model: Any language model. The caller must check the tokens.
        requests: Sequences of at most `context + 1` tokens; the last token of each is
            not read.
        batch: Largest number of sequences at a time; by default enough to keep the
            device busy.
        shape: Numbers of tokens to read and to score, to which all requests are padded;
            by default there are several shapes, not much longer than the requests.
        greedy: Whether to return if tokens had the largest logits.
        text: Text before the progress bar.
        progress: Whether to draw a bar; by default on a terminal, after two seconds.

    Raises:
        ValueError: If `batch` is not positive.
    """
    if batch is not None and batch < 1:
        raise ValueError(f"batch is {batch}; it must be positive")
    graphdef, state = nnx.split(model)
    state = jax.tree.map(jnp.asarray, state)
    losses: list[np.ndarray] = [np.empty(0)] * len(requests)
    best: list[np.ndarray] = [np.empty(0)] * len(requests) if greedy else []
    compile_seconds, begun = 0.0, time.perf_counter()
    pending: list[tuple[Any, list[int]]] = []
    total = sum(request.scored for request in requests)

    def fetch():
        (values, hits), members = pending.pop(0)
        for row, i in enumerate(members):
            count = requests[i].scored
            losses[i] = np.asarray(values)[row, :count]
            if greedy:
                best[i] = np.asarray(hits)[row, :count]
        advance(sum(requests[i].scored for i in members))

    with bar(total, text, wanted=progress) as advance:
        for size, members in _batches(requests, model.config.context, shape, batch):
            arrays = _stack([requests[i] for i in members], size)
            program, spent = _compile(graphdef, state, size, greedy)
            compile_seconds += spent
            pending.append((program(state, *arrays), members))
            if len(pending) > 1:
                fetch()
        while pending:
            fetch()
    seconds = time.perf_counter() - begun - compile_seconds
    return Scores(losses, best, seconds, compile_seconds)


def log_likelihoods(
    model: LanguageModel,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch: int | None = 8,
    progress: bool | None = None,
) -> list[tuple[float, bool]]:
    """Return the log-likelihoods of continuations, and whether each is the greedy one.

    Args:
        model: Any language model.
        pairs: Pairs of the tokens of a context and of its continuation. If both exceed
            the model's context, the first tokens of the context are dropped.
        batch: Number of pairs at a time; None for enough to keep the device busy.
        progress: Whether to draw a bar; by default on a terminal, after two seconds.

    Returns:
        For each pair the sum of the log-likelihoods of the continuation's tokens, in
        nats, and whether each of these tokens had the largest logit.

    Raises:
        ValueError: If a context or a continuation is empty, a continuation is longer
            than the model's context, or a token is not in the vocabulary.
    """
    arrays = [(np.asarray(x), np.asarray(y)) for x, y in pairs]
    scores = score_pairs(model, arrays, batch=batch, progress=progress)
    return [
        (-float(np.sum(nll, dtype=np.float64)), bool(np.all(hits)))
        for nll, hits in zip(scores.losses, scores.greedy, strict=True)
    ]


def score_pairs(
    model: LanguageModel,
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    batch: int | None = None,
    progress: bool | None = None,
) -> Scores:
    """Return the scores of the tokens of continuations; see `log_likelihoods`."""
    context = model.config.context
    requests = []
    for i, (before, after) in enumerate(pairs):
        if not len(before) or not len(after):
            part = "continuation" if len(before) else "context"
            raise ValueError(
                f"pair {i}: the {part} has no tokens; for an empty context, give the "
                "token that ends texts"
            )
        if len(after) > context:
            raise ValueError(
                f"pair {i}: the continuation has {len(after)} tokens, but the model "
                f"has a context of {context}"
            )
        tokens = np.concatenate([before, after])
        check_vocabulary(model, tokens)
        # The last token is not read.
        requests.append(Request(tokens[-(context + 1) :], len(after)))
    return run(model, requests, batch=batch, greedy=True, progress=progress)


def _batches(
    requests: Sequence[Request],
    context: int,
    shape: tuple[int, int] | None,
    batch: int | None,
) -> Iterator[tuple[tuple[int, int, int], list[int]]]:
    """Yield shapes `(b, t, c)` and the indices of their requests, the longest first.

    With this order, a batch that does not fit into memory fails at once.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for i, request in enumerate(requests):
        if shape is None:
            t = padded_length(len(request.tokens) - 1, most=context)
            c = padded_length(request.scored, most=t, least=8)
        else:
            t, c = shape
        groups.setdefault((t, c), []).append(i)
    budget = _TOKENS.get(jax.default_backend(), _TOKENS_ELSEWHERE)
    for (t, c), members in sorted(groups.items(), reverse=True):
        # Batches of about equal size: 5 sequences are 3 and 2, not 4 and 1 padded to 4.
        count = -(-len(members) // (batch or max(budget // t, 1)))
        b = -(-len(members) // count)
        for first in range(0, len(members), b):
            yield (b, t, c), members[first : first + b]


def _stack(requests: Sequence[Request], size: tuple[int, int, int]):
    """Return the arrays of `score` for requests: `[b, t]`, `[b, c]`, `[b, c]`."""
    b, t, c = size
    tokens, targets, rows = (np.zeros((b, n), np.int32) for n in (t, c, c))
    for row, request in enumerate(requests):
        read, count = len(request.tokens) - 1, request.scored
        tokens[row, :read] = request.tokens[:-1]
        targets[row, :count] = request.tokens[-count:]
        rows[row, :count] = np.arange(read - count, read)
    return tokens, targets, rows


def _compile(graphdef, state, size, greedy):
    """Return the program for a shape, and the seconds that its compilation took."""
    begun = time.perf_counter()
    leaves, tree = jax.tree.flatten(state)
    kinds = tuple(
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves
    )
    misses = _program.cache_info().misses
    program = _program(graphdef, tree, kinds, size, greedy)
    is_new = _program.cache_info().misses > misses
    return program, time.perf_counter() - begun if is_new else 0.0


@functools.lru_cache(maxsize=64)
def _program(graphdef, tree, kinds, size, greedy):
    def of_state(state, tokens, targets, rows):
        model = nnx.merge(graphdef, state)
        return score(model, tokens, targets, rows, greedy=greedy)

    b, t, c = size
    arrays = (jax.ShapeDtypeStruct((b, n), jnp.int32) for n in (t, c, c))
    precise = any(
        jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 2 for x in kinds
    )
    with jax.default_matmul_precision("highest" if precise else "default"):
        return jax.jit(of_state).lower(tree.unflatten(kinds), *arrays).compile()
