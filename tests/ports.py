"""The table of test models: at least one small variant of every port.

A variant is a `config.json`, so that transformers, too, can make a model from it. A new
port needs a row here; tests/lm/models/test_ports.py fails without one.
"""

import numpy as np
from flax import nnx
from helpers import as_users_run_it

from kronjax.lm.models import registry

GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 60,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 32,
}
OPT = {
    "model_type": "opt",
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "ffn_dim": 40,
    "num_attention_heads": 3,
    "max_position_embeddings": 32,
    "word_embed_proj_dim": 24,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

VARIANTS = {
    "gpt2": GPT2,
    "gpt2-inner": GPT2 | {"n_inner": 30, "activation_function": "relu"},
    "gpt2-untied": GPT2 | {"tie_word_embeddings": False},
    "opt": OPT,
    "opt-post-norm": OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 12},
    "opt-untied": OPT | {"tie_word_embeddings": False, "enable_bias": False},
    "llama": LLAMA,
    "llama-bias": LLAMA
    | {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    "llama-tied": LLAMA
    | {"tie_word_embeddings": True, "num_key_value_heads": 6, "head_dim": 6},
}


def make(variant, seed=0, **changes):
    """Return a random model of a variant, with some settings changed."""
    values = VARIANTS[variant] | changes
    port = registry.port_of(values)
    config = port.Config.from_hugging_face(values)
    with as_users_run_it():
        return port.Model(config, rngs=nnx.Rngs(seed))


def tokens_for(model, *shape):
    """Return random tokens for a model."""
    size = model.config.vocab_size
    return np.random.default_rng(0).integers(0, size, shape).astype(np.int32)
