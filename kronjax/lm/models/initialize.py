"""Models that have learnt nothing yet: a GPT-2 of any size.

What `kronjax train` trains from the beginning, to know how far a compressed model is
from one that was as small all along.

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
    """Return a model with weights drawn for training, and a tokenizer.

    Args:
        config: Its sizes; the vocabulary becomes that of the tokenizer.
        tokenizer: What it speaks.
        seed: Of the weights.
    """
    # Without these, other programs take the settings of the published GPT-2.
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
    """Return a model with weights drawn for training.

    Embeddings are small, that all tokens be about equally likely, and so are the maps
    into the residual stream, to which every block adds.
    """
    model = gpt2.Model(config, rngs=nnx.Rngs(seed))
    for table in (model.wte, model.wpe):
        table.embedding[...] *= 0.02 * math.sqrt(config.n_embd)
    for block in model.h:
        for layer in (block.attn.c_proj, block.mlp.c_proj):
            layer.kernel[...] /= math.sqrt(2 * config.n_layer)
    return model
