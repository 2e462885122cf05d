"""Fixtures for the tests of language models and of the command line.

These tests use the settings of users: 32 bits, and promotion of dtypes.
"""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from helpers import SENTENCES, as_users_run_it

from kronjax.lm.models import gpt2, llama
from kronjax.lm.text.tokenizer import train
from kronjax.lm.training import step


@pytest.fixture(autouse=True)
def settings():
    with as_users_run_it():
        yield


@pytest.fixture(scope="session", autouse=True)
def quickly_compiled():
    """Compile training without optimisation, in a third of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "COMPILER", {"xla_backend_optimization_level": 0})
        yield


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of 300 tokens, of the kind of GPT-2's."""
    return train(SENTENCES, 300, context=64)


@pytest.fixture(scope="session")
def dense():
    """An even smaller GPT-2 with 40 tokens, which no test may change."""
    config = gpt2.Config(vocab_size=40, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    with as_users_run_it():
        return gpt2.Model(config, rngs=nnx.Rngs(0))


def make_llama(**changes):
    """A Llama of two blocks with 30 tokens, or with other settings."""
    config = llama.Config(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    return llama.Model(dataclasses.replace(config, **changes), rngs=nnx.Rngs(0))


@pytest.fixture(scope="session")
def tokens():
    """A text of 400 tokens for `dense`."""
    return np.random.default_rng(0).integers(0, 40, 400).astype(np.int32)


@pytest.fixture
def tiny(tokenizer):
    """A GPT-2 of two blocks with a context of 64, and a tokenizer."""
    config = gpt2.Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = gpt2.Model(config, rngs=nnx.Rngs(0))
    # With the usual scale, all tokens would be about equally likely.
    model.wte.embedding[...] = 3 * model.wte.embedding[...]
    model.tokenizer = tokenizer
    return model
