"""Losses of the next token, against the full logits in float64 NumPy."""

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


def test_losses_are_those_of_the_full_logits(tiny, monkeypatch):
    # 7 positions at a time: no divisor of the number of positions.
    monkeypatch.setitem(likelihood._LOGITS, "cpu", 7 * 300)
    monkeypatch.setattr(likelihood, "_LOGITS_ELSEWHERE", 7 * 300)
    tokens = draw(np.random.default_rng(0), (3, 20), tiny)
    found = jax.jit(lambda x: likelihood.token_losses(tiny, x))(tokens)
    assert found.shape == (3, 19) and found.dtype == jnp.float32
    for row, one in zip(found, tokens, strict=True):
        np.testing.assert_allclose(
            row, losses_reference(tiny, one)[0], rtol=2e-5, atol=2e-5
        )


@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.parametrize("shape", [None, (64, 30)])
def test_requests_of_any_length_come_back_in_order(tiny, batch, shape):
    rng = np.random.default_rng(1)
    lengths = (40, 2, 65, 17, 33, 40, 18)
    counts = (30, 1, 30, 9, 8, 1, 17)
    requests = [
        likelihood.Request(draw(rng, n, tiny), k)
        for n, k in zip(lengths, counts, strict=True)
    ]
    # Some tokens that the model would choose.
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


def test_another_model_of_the_same_architecture_compiles_nothing(tiny):
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


def test_sixteen_bits_are_summed_in_thirty_two(tiny):
    tokens = draw(np.random.default_rng(3), 40, tiny)
    exact = likelihood.run(tiny, [likelihood.Request(tokens, 39)]).losses[0]
    graphdef, state = nnx.split(tiny)
    small = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    assert parameter_dtype(tiny) == np.float32
    assert parameter_dtype(small) == jnp.bfloat16
    found = likelihood.run(small, [likelihood.Request(tokens, 39)]).losses[0]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, rtol=0.1, atol=0.5)


def test_lengths_are_few_and_not_much_longer():
    lengths = {likelihood.padded_length(n, most=10**6) for n in range(1, 1025)}
    assert len(lengths) == 13 and max(lengths) == 1024
    for n in range(16, 1025):
        assert n <= likelihood.padded_length(n, most=10**6) <= 1.5 * n
        assert likelihood.padded_length(n, most=1000) <= 1000


def test_batches_are_of_about_one_size():
    requests = [likelihood.Request(np.zeros(10, np.int32), 9)] * 5
    batches = list(likelihood._batches(requests, 64, (9, 9), 4))
    assert batches == [((3, 9, 9), [0, 1, 2]), ((3, 9, 9), [3, 4])]


def test_no_requests_need_no_program(tiny):
    assert likelihood.run(tiny, []).losses == []


def test_a_batch_of_none_is_refused(tiny):
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
