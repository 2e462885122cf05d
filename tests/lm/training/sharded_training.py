"""Script run by test_sharding.py in a separate process with eight simulated devices."""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from kronjax import nn
from kronjax.kronecker import KroneckerTerms
from kronjax.lm.models import gpt2
from kronjax.lm.training import step, trainer
from kronjax.lm.training.settings import Optimizer, Settings

STEPS, CRASH = 12, 6


class Crashing:
    """A hook that raises at a step, like a crash."""

    def __repr__(self):
        return "Crashing()"

    def __init__(self, at):
        self.at = at

    def due(self, step):
        return step == self.at

    def __call__(self, step, model):
        raise KeyboardInterrupt

    def state(self):
        return None

    def restore(self, state):
        pass


def build():
    config = gpt2.Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = gpt2.Model(config, rngs=nnx.Rngs(0))
    draw = 0.3 * np.random.default_rng(0).normal(size=(2, 96)).astype(np.float32)
    a, b = draw[:, :32].reshape(2, 4, 8), draw[:, 32:].reshape(2, 8, 8)[:, :4]
    terms = KroneckerTerms(jax.numpy.asarray(a), jax.numpy.asarray(b))
    nn.replace(model, "h.0.mlp.c_fc", nn.KroneckerLinear([terms]))
    return model


def main():
    assert jax.device_count() == 8
    step.COMPILER["xla_backend_optimization_level"] = 0
    model, tokens = build(), np.tile(np.arange(48, dtype=np.int32), 12)
    settings = Settings(
        steps=STEPS,
        batch=8,
        held_out=0.0,
        optimizer=Optimizer(rate=1e-2, warmup=2),
        checkpoint_every=CRASH,
    )

    def losses(shard, **keywords):
        own = dataclasses.replace(settings, shard=shard)
        result = trainer.train(model, tokens, own, progress=False, **keywords)
        return [line["loss"] for line in result.history.steps]

    curves = {shard: losses(shard) for shard in ("none", "data", "full")}
    with tempfile.TemporaryDirectory() as folder:
        try:
            losses("full", folder=Path(folder), hook=Crashing(CRASH + 1))
        except KeyboardInterrupt:
            curves["resumed"] = losses("none", folder=Path(folder), hook=Crashing(-1))
    _, carry, _, _ = trainer._begin(
        model, None, dataclasses.replace(settings, shard="full")
    )
    parts = {
        name: x.addressable_shards[0].data.size / x.size
        for name, x in carry.parameters.items()
    }
    json.dump({"curves": curves, "parts": parts}, sys.stdout)


if __name__ == "__main__":
    main()
