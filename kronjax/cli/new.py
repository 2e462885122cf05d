"""The command `new`.

Modules that load jax are imported inside, so that `kronjax --help` loads no jax.
"""

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from kronjax.cli.options import Flag, Json, Seed, option


def new(
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")],
    *,
    data: Annotated[str | None, option("FILE")] = None,
    tokenizer: Annotated[str | None, option("MODEL")] = None,
    vocabulary: Annotated[int | None, option("N")] = None,
    layers: Annotated[int, option("N")] = 4,
    width: Annotated[int, option("N")] = 256,
    heads: Annotated[int, option("N")] = 4,
    context: Annotated[int, option("N")] = 256,
    column: Annotated[str, option("NAME")] = "text",
    seed: Seed = 0,
    force: Flag = False,
    as_json: Json = False,
) -> int:
    """Create a GPT-2 with random weights and a tokenizer trained on a text.

    `kronjax train FOLDER` trains the model.

    Args:
        folder: The output folder.
        data: The text, as for train.
        tokenizer: A model whose tokenizer is used instead.
        vocabulary: Largest number of tokens of a new tokenizer; 8192 by default.
        layers: Number of blocks.
        width: Width of the residual stream.
        heads: Number of attention heads in each block.
        context: Largest number of tokens of an input.
        column: The field with the text, where rows have several.
        seed: Seed of the weights.
        force: Replace the model in FOLDER.
        as_json: Print one JSON object.
    """
    from kronjax.io import storage
    from kronjax.lm.checkpoints import hugging_face
    from kronjax.lm.models import gpt2, initialize, sizes
    from kronjax.lm.text import documents as texts
    from kronjax.lm.text import tokenizer as tokenizers

    if (data is None) == (tokenizer is None):
        raise ValueError(
            "give --data FILE to train a tokenizer on, or --tokenizer MODEL"
        )
    if tokenizer is not None and vocabulary is not None:
        raise ValueError("--tokenizer has its own vocabulary; leave out --vocabulary")
    for name, value in (("layers", layers), ("heads", heads), ("context", context)):
        if value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")
    if width < 1 or width % heads:
        raise ValueError(f"--width {width} is not a multiple of --heads {heads}")
    folder = storage.expanded(folder)
    if (folder / "config.json").exists() and not force:
        raise ValueError(f"{folder} already holds a model; --force replaces it")
    config = gpt2.Config(
        n_positions=context,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
    )
    if tokenizer is not None:
        chosen = _tokenizer_of(tokenizer)
    else:
        pieces = itertools.chain.from_iterable(texts.stream(data or "", column=column))
        most = 8192 if vocabulary is None else vocabulary
        chosen = tokenizers.train(pieces, most, context=context)
    model = initialize.begin(config, chosen, seed)
    hugging_face.save(model, folder)
    count, tokens = sizes.count(model).parameters, model.config.vocab_size
    if as_json:
        print(json.dumps({"parameters": count, "vocabulary": tokens}))
    else:
        print(
            f"{folder} contains a GPT-2 with {count:,} random parameters and a "
            f"tokenizer of {tokens:,} tokens."
        )
    return 0


def _tokenizer_of(name: str) -> Any:
    """Return the tokenizer of a model, given by folder, file or name."""
    from kronjax.lm.checkpoints import hugging_face, sources
    from kronjax.lm.text.tokenizer import read_tokenizer

    path = sources.find(name)
    if path.is_dir():
        tokenizer = read_tokenizer(path)
    else:
        tokenizer = hugging_face.load(path).tokenizer
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer")
    return tokenizer
