"""Models that have learnt nothing yet: a GPT-2 of any size, and a tokenizer for a text.

What `kronjax train` trains from the beginning, to know how far a compressed model is
from one that was as small all along.

>>> config = gpt2.Config(vocab_size=300, n_positions=8, n_embd=8, n_layer=1, n_head=1)
>>> draw(config, 0).wte.embedding.shape
(300, 8)
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

from flax import nnx

from kronjax.lm import gpt2, sources, tokenizer
from kronjax.lm import text as texts
from kronjax.lm.checkpoint import load

PIECE = 2**20
"""Characters of a text that are read at a time, and then to the end of a paragraph."""


def begin(
    config: gpt2.Config,
    *,
    text: str | Path | None = None,
    given: str | Path | None = None,
    column: str = "text",
    seed: int = 0,
) -> gpt2.Model:
    """Return a model with weights drawn for training, and its tokenizer.

    Args:
        config: Its sizes; the vocabulary becomes that of the tokenizer, which is
            smaller where the text is short.
        text: What `kronjax.lm.text.read` takes, to make a tokenizer of; it is not held
            in memory. Or
        given: A model by its folder or name, to take the tokenizer of.
        column: Where rows have several fields, the one with the text.
        seed: Of the weights.

    Raises:
        ValueError: If there is no tokenizer, or nothing to make it of.
        OSError: If a file cannot be read.
    """
    if (text is None) == (given is None):
        raise ValueError("a tokenizer is made of a text, or given with a model")
    if given is not None:
        path = sources.find(given)
        is_folder = path.is_dir()
        found = tokenizer.read_tokenizer(path) if is_folder else load(path).tokenizer
        if found is None:
            raise ValueError(f"{given} has no tokenizer")
    else:
        assert text is not None
        pieces = _filled(texts.stream(text, column=column, size=PIECE), str(text))
        context = config.n_positions
        found = tokenizer.train(pieces, config.vocab_size, context=context)
    # Without these, other programs take the settings of the published GPT-2.
    origin = {
        "bos_token_id": found.bos,
        "eos_token_id": found.eos,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }
    config = dataclasses.replace(
        config, vocab_size=found.size, origin=json.dumps(origin)
    )
    model = draw(config, seed)
    model.tokenizer = found
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


def _filled(documents: Iterator[Iterator[str]], source: str) -> Iterator[str]:
    """Yield the pieces of documents; refuse those without a word."""
    is_empty = True
    for document in documents:
        for piece in document:
            is_empty = is_empty and not piece.strip()
            yield piece
    if is_empty:
        raise ValueError(f"{source} is empty")
