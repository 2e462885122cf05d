"""Names and orientations of a model's parameters in the files of Hugging Face.

The path of a parameter, `h.0.mlp.c_fc.kernel`, becomes its name in a file by three
rules: the port's prefix stands before it, its last part is the word `weight`, and the
array is transposed where the port says so. The head has no prefix.

>>> from kronjax.lm.models import gpt2
>>> tensor_name(gpt2, "h.0.mlp.c_fc.kernel")
'transformer.h.0.mlp.c_fc.weight'
>>> is_transposed(gpt2, "h.0.mlp.c_fc.kernel"), is_transposed(gpt2, "lm_head.kernel")
(False, True)
"""

import re
from typing import TypeVar

import numpy as np

from kronjax.lm.models.base import BaseConfig
from kronjax.lm.models.registry import Port

T = TypeVar("T")


def tensor_name(port: Port, path: str) -> str:
    """Return the name in a file of the parameter at `path` of a model.

    Args:
        port: The module of the architecture, such as `kronjax.lm.models.gpt2`.
        path: The path of the parameter, such as `h.0.mlp.c_fc.kernel`.
    """
    prefix = "" if path.startswith(f"{port.Model.HEAD}.") else port.PREFIXES[0]
    return prefix + short_name(path)


def short_name(path: str) -> str:
    """Return the name of the parameter at `path` without the prefix of the port."""
    *place, leaf = path.split(".")
    leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    return ".".join([*place, leaf])


def is_transposed(port: Port, path: str, ndim: int = 2) -> bool:
    """Return whether files hold the transpose of the parameter at `path`.

    Only kernels `[n_in, n_out]` and their masks may be stored so; tables of embeddings,
    factors and vectors never are.
    """
    layer, _, leaf = path.rpartition(".")
    is_kernel = ndim == 2 and leaf in ("kernel", "mask")
    return is_kernel and re.fullmatch(port.TRANSPOSED, layer) is not None


def without_extras(
    port: Port, config: BaseConfig, stored: dict[str, T]
) -> dict[str, T]:
    """Remove buffers, and a head that repeats the embedding.

    Args:
        port: The module of the architecture.
        config: The configuration of the model.
        stored: Tensors by their names without prefix.

    Raises:
        ValueError: If a head that should equal the embedding differs from it.
    """
    kept = {k: v for k, v in stored.items() if not re.fullmatch(port.BUFFERS, k)}
    name = f"{port.Model.HEAD}.weight"
    if config.tie_word_embeddings and name in kept:
        head = kept.pop(name)
        embedding = kept.get(f"{port.Model.EMBEDDING}.weight", head)
        if not np.array_equal(np.asarray(head), np.asarray(embedding)):
            raise ValueError(
                f"config.json says that the head is the embedding, yet {name} differs "
                "from it; set tie_word_embeddings to false"
            )
    return kept


def check_names(expected: set[str], stored: set[str]) -> None:
    """Check that a file holds exactly the expected tensors.

    Raises:
        ValueError: If some are missing or left over; the message names them.
    """
    missing, extra = sorted(expected - stored), sorted(stored - expected)
    parts = [
        f"{len(names)} {word} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
        for names, word in ((missing, "missing"), (extra, "left over"))
        if names
    ]
    if parts:
        raise ValueError(f"tensors do not fit config.json: {' and '.join(parts)}")
