"""Timing of models and layers, and the verdicts about the times."""

import dataclasses
import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from kronjax import nn
from kronjax.kronecker import KroneckerTerms
from kronjax.lm.evaluation import latency
from kronjax.lm.evaluation.turns import Times, take_turns


@pytest.fixture
def mixed(tiny):
    """A model with factored, masked and dense layers."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32) / 10

    for i in (0, 1):
        terms = KroneckerTerms(draw(2, 4, 8), draw(2, 8, 16))
        nn.replace(tiny, f"h.{i}.mlp.c_fc", nn.KroneckerLinear([terms], draw(128)))
    old = tiny.h[0].mlp.c_proj
    mask = jnp.asarray(rng.random((128, 32)) < 0.5)
    layer = nn.MaskedLinear(old.kernel[...], mask, old.bias[...])
    nn.replace(tiny, "h.0.mlp.c_proj", layer)
    return tiny


def printed(table):
    console = Console(file=io.StringIO(), width=140)
    console.print(table)
    return console.file.getvalue()


def test_a_multiplied_out_model_computes_the_same_function(mixed):
    tokens = np.random.default_rng(1).integers(0, 300, (1, 64)).astype(np.int32)
    other = nn.multiplied_out(mixed)
    layers = nn.linear_layers(other).values()
    assert all(isinstance(layer, nnx.Linear) for layer in layers)
    assert isinstance(mixed.h[0].mlp.c_fc, nn.KroneckerLinear)
    call = nnx.jit(lambda model, tokens: model(tokens))
    np.testing.assert_allclose(call(other, tokens), call(mixed, tokens), atol=2e-4)


def test_both_models_and_every_kind_of_layer_are_timed(mixed):
    result = latency.measure_latency(mixed, batch=2, context=8, new_tokens=3, repeats=3)
    assert (result.batch, result.context, result.new_tokens) == (2, 8, 3)
    assert result.factored == 3 and result.compile_seconds > 0
    counts = {(x.kind, x.shape): x.names for x in result.layers}
    assert counts[("2 × 4x8 ⊗ 8x16", (32, 128))] == ("h.0.mlp.c_fc", "h.1.mlp.c_fc")
    assert counts[("masked", (128, 32))] == ("h.0.mlp.c_proj",)
    assert sum(map(len, counts.values())) == 8
    for times in (result.prefill, result.decode, result.layers[0].prefill):
        assert len(times.samples) == len(times.dense_samples) == 3
        assert min(times.samples + times.dense_samples) > 0
    assert result.decode_rate == pytest.approx(6 / result.decode.seconds)
    assert result.dense_prefill_rate == pytest.approx(16 / result.prefill.dense_seconds)
    fields = json.loads(json.dumps(latency.summary(result), allow_nan=False))
    assert fields["decode"]["seconds"] == result.decode.seconds
    assert len(fields["layers"]) == len(result.layers)
    text = printed(latency.table(result))
    assert "2 of 32x128" in text and "masked" in text and "whole model" in text


def test_a_dense_model_is_timed_alone(tiny):
    result = latency.measure_latency(tiny, new_tokens=2, repeats=1)
    assert result.factored == 0 and result.context == 62
    assert result.decode.samples == result.decode.dense_samples
    assert "nothing to compare" in latency.verdict(result)
    assert "whole model" in printed(latency.table(result))


def test_the_verdict_says_which_is_faster():
    slow, fast = (2.0, 2.2, 2.1, 2.0), (1.0, 1.0, 1.1, 1.0)
    result = latency.Latency(
        batch=1,
        context=10,
        new_tokens=20,
        prefill=Times(fast, slow),
        decode=Times(slow, fast),
        layers=(),
        factored=1,
        compile_seconds=0.0,
        dtype="float32",
        device="cpu",
    )
    assert latency.verdict(result) == (
        "Reading the prompt, the model is 2.00 times as fast as dense (10.0 against "
        "4.9 tokens/s). Writing, dense is 2.00 times as fast (9.8 against 20.0 "
        "tokens/s)."
    )
    noisy = Times((1.0, 2.0, 1.0, 2.0), (2.0, 1.0, 2.0, 1.0))
    same = dataclasses.replace(result, prefill=noisy, decode=Times(fast, fast))
    assert latency.verdict(same).count("neither is faster beyond the noise") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch is 0; it must be positive"),
        ({"new_tokens": 0, "context": 4}, "new_tokens is 0"),
        ({"repeats": 0}, "repeats is 0"),
        ({"context": 60, "new_tokens": 5}, "60 tokens .* 5 new ones exceed the 64"),
    ],
)
def test_wrong_sizes_raise_an_error(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        latency.measure_latency(tiny, **options)


def test_turns_alternate_and_short_samples_are_repeated():
    order = []

    def way(name, seconds):
        def call(calls=1):
            order.append((name, calls))
            return seconds

        return call

    times = take_turns([way("ours", 1e-3), way("dense", 2e-3)], 3, least=1e-2)
    assert times == Times((1e-3,) * 3, (2e-3,) * 3) and times.winner == "model"
    names = "".join(name[0] for name, _ in order)
    assert names == "od" + "od" + "do" + "od"
    assert [calls for _, calls in order] == [1, 1] + [5] * 6
