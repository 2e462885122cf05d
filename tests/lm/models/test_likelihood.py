"""Losses of next tokens, compared with full logits in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import losses_reference

from kronjax.lm.models import gpt2, likelihood
from kronjax.lm.models.base import parameter_dtype


def draw(rng, count, model):
    return rng.integers(0, model.config.vocab_size, count).astype(np.int32)


def test_losses_equal_those_of_the_full_logits(tiny, monkeypatch):
    # Chunks of 7 positions, which do not divide the number of positions.
    monkeypatch.setitem(likelihood._LOGITS, "cpu", 7 * 300)
    monkeypatch.setattr(likelihood, "_LOGITS_ELSEWHERE", 7 * 300)
    tokens = draw(np.random.default_rng(0), (3, 20), tiny)
    losses = jax.jit(lambda x: likelihood.token_losses(tiny, x))(tokens)
    assert losses.shape == (3, 19) and losses.dtype == jnp.float32
    for row, text in zip(losses, tokens, strict=True):
        np.testing.assert_allclose(
            row, losses_reference(tiny, text)[0], rtol=2e-5, atol=2e-5
        )


@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.parametrize("shape", [None, (64, 30)])
def test_scores_have_the_order_of_the_requests(tiny, batch, shape):
    rng = np.random.default_rng(1)
    lengths = (40, 2, 65, 17, 33, 40, 18)
    counts = (30, 1, 30, 9, 8, 1, 17)
    requests = [
        likelihood.Request(draw(rng, n, tiny), k)
        for n, k in zip(lengths, counts, strict=True)
    ]
    # One target is the token that the model predicts.
    best = int(tiny(jnp.asarray(requests[0].tokens)[None])[0, -2].argmax())
    requests[0].tokens[-1] = best
    scores = likelihood.run(tiny, requests, batch=batch, shape=shape, greedy=True)
    assert any(np.any(hits) for hits in scores.greedy)
    for i, request in enumerate(requests):
        expected, hits = losses_reference(tiny, request.tokens[-65:])
        np.testing.assert_allclose(
            scores.losses[i], expected[-request.scored :], rtol=2e-5, atol=2e-5
        )
        np.testing.assert_array_equal(scores.greedy[i], hits[-request.scored :])


def test_models_of_one_architecture_share_compiled_programs(tiny):
    tokens = draw(np.random.default_rng(2), 50, tiny)
    other = gpt2.Model(tiny.config, rngs=nnx.Rngs(1))
    other.tokenizer = tiny.tokenizer
    requests = [likelihood.Request(tokens[i:], 5) for i in range(5)]
    first = likelihood.run(tiny, requests)
    compiled = likelihood._program.cache_info().misses
    second = likelihood.run(other, requests)
    assert likelihood._program.cache_info().misses == compiled
    assert second.compile_seconds == 0 and second.seconds > 0
    assert not np.allclose(first.losses[0], second.losses[0])
    assert first.greedy == []


def test_losses_of_16_bit_models_are_float32(tiny):
    tokens = draw(np.random.default_rng(3), 40, tiny)
    exact = likelihood.run(tiny, [likelihood.Request(tokens, 39)]).losses[0]
    graphdef, state = nnx.split(tiny)
    small = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    assert parameter_dtype(tiny) == np.float32
    assert parameter_dtype(small) == jnp.bfloat16
    losses = likelihood.run(small, [likelihood.Request(tokens, 39)]).losses[0]
    assert losses.dtype == np.float32
    np.testing.assert_allclose(losses, exact, rtol=0.1, atol=0.5)


def test_padded_lengths_are_few_and_at_most_half_longer():
    lengths = {likelihood.padded_length(n, most=10**6) for n in range(1, 1025)}
    assert len(lengths) == 13 and max(lengths) == 1024
    for n in range(16, 1025):
        assert n <= likelihood.padded_length(n, most=10**6) <= 1.5 * n
        assert likelihood.padded_length(n, most=1000) <= 1000


def test_batches_have_about_equal_sizes():
    requests = [likelihood.Request(np.zeros(10, np.int32), 9)] * 5
    batches = list(likelihood._batches(requests, 64, (9, 9), 4))
    assert batches == [((3, 9, 9), [0, 1, 2]), ((3, 9, 9), [3, 4])]


def test_no_requests_give_no_losses(tiny):
    assert likelihood.run(tiny, []).losses == []


def test_a_batch_of_zero_raises_an_error(tiny):
    with pytest.raises(ValueError, match="batch is 0"):
        likelihood.run(tiny, [], batch=0)


def test_the_bar_is_drawn_on_standard_error(tiny, capfd):
    tokens = draw(np.random.default_rng(4), 40, tiny)
    likelihood.run(
        tiny, [likelihood.Request(tokens, 39)] * 3, text="reading", progress=True
    )
    assert "reading" in capfd.readouterr().err
    likelihood.run(
        tiny, [likelihood.Request(tokens, 39)], text="reading", progress=False
    )
    assert capfd.readouterr().err == ""
