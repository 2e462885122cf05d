"""Random initialization of a GPT-2 of any size, for training from scratch.

A model trained from scratch shows how far a compressed model of the same size is from
one that was small from the beginning.

>>> config = gpt2.Config(vocab_size=300, n_positions=8, n_embd=8, n_layer=1, n_head=1)
>>> draw(config, 0).wte.embedding.shape
(300, 8)
"""

import dataclasses
import json
import math

from flax import nnx

from kronjax.lm.models import gpt2
from kronjax.lm.text.tokenizer import Tokenizer


def begin(config: gpt2.Config, tokenizer: Tokenizer, seed: int = 0) -> gpt2.Model:
    """Return a model with random weights and a tokenizer.

    Args:
        config: The sizes; `vocab_size` is replaced by the size of the tokenizer.
        tokenizer: The tokenizer of the model.
        seed: Seed of the weights.
    """
    # Without these, other programs use the settings of the published GPT-2.
    origin = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }
    config = dataclasses.replace(
        config, vocab_size=tokenizer.size, origin=json.dumps(origin)
    )
    model = draw(config, seed)
    model.tokenizer = tokenizer
    return model


def draw(config: gpt2.Config, seed: int) -> gpt2.Model:
    """Return a model with random weights, scaled for training.

    The embeddings are small, so that all tokens are about equally likely. The layers
    that write to the residual stream are divided by `√(2 n_layer)`, because every block
    adds to it twice.
    """
    model = gpt2.Model(config, rngs=nnx.Rngs(seed))
    for table in (model.wte, model.wpe):
        table.embedding[...] *= 0.02 * math.sqrt(config.n_embd)
    for block in model.h:
        for layer in (block.attn.c_proj, block.mlp.c_proj):
            layer.kernel[...] /= math.sqrt(2 * config.n_layer)
    return model
