"""How well a model predicts text.

`log_likelihoods` is what everything asks that compares continuations of a text.
"""

from collections.abc import Sequence

import numpy as np

from kronjax.lm import losses
from kronjax.lm.architecture import LanguageModel


def log_likelihoods(
    model: LanguageModel,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch: int | None = 8,
    progress: bool | None = None,
) -> list[tuple[float, bool]]:
    """Return how likely continuations are, and whether the model would choose them.

    Args:
        model: Any port.
        pairs: For each one the tokens of the context, of which the last are taken
            that fit the model, and those of the continuation.
        batch: Pairs at a time; None for what keeps the device busy.
        progress: Whether to draw a bar; by default on a terminal, after two seconds.

    Returns:
        For each pair the sum of the log-likelihoods of the tokens of the continuation,
        in nats, and whether each of them had the largest logit.

    Raises:
        ValueError: If a context or a continuation has no tokens, a continuation has
            more than the model's context, or a token is not in its vocabulary.
    """
    context = model.config.context
    requests = []
    for i, (before, after) in enumerate(pairs):
        if not len(before) or not len(after):
            part = "continuation" if len(before) else "context"
            raise ValueError(
                f"pair {i}: the {part} has no tokens; where there is no context, give "
                "the token that ends texts"
            )
        if len(after) > context:
            raise ValueError(
                f"pair {i}: the continuation has {len(after)} tokens, the model a "
                f"context of {context}"
            )
        tokens = np.array([*before, *after], np.int64)
        check_vocabulary(model, tokens)
        requests.append(losses.Request(tokens[-(context + 1) :], len(after)))
    found = losses.run(model, requests, batch=batch, greedy=True, progress=progress)
    return [
        (-float(np.sum(values, dtype=np.float64)), bool(np.all(hits)))
        for values, hits in zip(found.losses, found.greedy, strict=True)
    ]


def check_vocabulary(model: LanguageModel, tokens: np.ndarray) -> None:
    """Refuse tokens that the model does not know, which jax would clip in silence.

    Raises:
        ValueError: If there are any; names the sizes.
    """
    size = model.config.vocab_size
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= size:
        raise ValueError(
            f"token {low if low < 0 else high} is not in the vocabulary of the model, "
            f"which has {size} tokens"
        )
