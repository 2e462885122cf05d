"""Perplexities and likelihoods, against loops that are slow and obvious."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import losses_reference

from kronjax.lm import evaluate


def test_log_likelihoods_are_sums_over_the_continuation(tiny):
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(0, 300, n).tolist(), rng.integers(0, 300, k).tolist())
        for n, k in ((5, 2), (60, 5), (100, 3), (1, 64), (9, 1))
    ]
    context = pairs[0][0]
    best = int(tiny(jnp.array([context]))[0, -1].argmax())
    pairs.append((context, [best]))
    found = evaluate.log_likelihoods(tiny, pairs, batch=2)
    assert len(found) == len(pairs)
    for (before, after), (value, greedy) in zip(pairs, found, strict=True):
        # The model reads all but the last token, so 65 of them fit a context of 64.
        tokens = np.array([*before, *after])[-65:]
        losses, hits = losses_reference(tiny, tokens)
        assert value == pytest.approx(-losses[-len(after) :].sum(), rel=1e-5)
        assert greedy == hits[-len(after) :].all()
    assert found[-1][1] and not found[0][1]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([], [1]), "pair 1: the context has no tokens"),
        (([1], []), "pair 1: the continuation has no tokens"),
        (([1], [1] * 65), "65 tokens, the model a context of 64"),
        (([1], [300]), "token 300 is not in the vocabulary of the model.* 300 tokens"),
        (([-1], [1]), "token -1"),
    ],
)
def test_pairs_that_cannot_be_scored_are_named(tiny, pair, message):
    with pytest.raises(ValueError, match=message):
        evaluate.log_likelihoods(tiny, [([1], [2]), pair])
