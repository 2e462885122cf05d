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
from collections.abc import Mapping
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from kronjax.io import notes
from kronjax.lm.models.base import BaseConfig
from kronjax.lm.models.registry import Port

WRAPPERS = (
    "_orig_mod.",
    "module.",
    "base_model.model.",
    "_forward_module.",
    "_fsdp_wrapped_module.",
)
"""Prefixes by which wrappers of PyTorch mark all tensors of a model: `torch.compile`,
`DataParallel`, peft, Lightning and FSDP."""

_INNER = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

_QUANTISED = (
    r"\.(qweight|qzeros|scales|g_idx|weight_scale(_inv|_2)?|input_scale|weight_packed|"
    r"weight_zero_point|weight_shape|SCB|absmax|quant_state\..*|quant_map|blocks)$"
)
"""Tensors that only quantised checkpoints have: those of GPTQ and AWQ, FP8 and
compressed-tensors, bitsandbytes."""

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


def unwrapped(tensors: Mapping[str, T], prefix: str) -> dict[str, T]:
    """Return tensors without the prefixes of wrappers around the model, which are told.

    A prefix is removed if all names have it, however they are nested: a known one, or
    any part before the prefix of the port. The marks of wrappers around single blocks
    are removed wherever they are.

    Args:
        tensors: Tensors by their names in a file.
        prefix: The prefix of the port, such as `model.` or `transformer.`.

    Raises:
        ValueError: If two names become equal, or the tensors are those of an adapter.
    """
    for name in tensors:
        if re.search(r"\.(lora_[AB]|lora_embedding_[AB]|base_layer)\.", name):
            raise ValueError(
                f"tensor {name} belongs to an adapter that is not merged: merge it "
                "with merge_and_unload of peft, and save the result"
            )
    names, removed = list(tensors), []
    while names:
        part = re.match(r"\w+\.|", names[0])[0]  # type: ignore[index]
        inner = any(f".{prefix}" in name for name in names)
        known = [x for x in (*WRAPPERS, *[part] * inner) if x and _all_begin(names, x)]
        if not known:
            break
        names = [name.removeprefix(known[0]) for name in names]
        removed.append(known[0])
    plain = [_INNER.sub("", name) for name in names]
    removed += sorted({x[0] for name in names for x in _INNER.finditer(name)})
    if not removed:
        return dict(tensors)
    twice = next((name for name in plain if plain.count(name) > 1), None)
    if twice is not None:
        raise ValueError(
            f"the tensor {twice} is stored twice, with a prefix and without"
        )
    notes.tell(f"the prefix {''.join(removed)} of the names of tensors is removed")
    return dict(zip(plain, tensors.values(), strict=True))


def _all_begin(names, prefix):
    return all(name.startswith(prefix) for name in names)


def without_extras(
    port: Port, config: BaseConfig, stored: dict[str, T]
) -> dict[str, T]:
    """Remove buffers, and store a tied head once, as the embedding.

    Args:
        port: The module of the architecture.
        config: The configuration of the model.
        stored: Tensors by their names without prefix.

    Raises:
        ValueError: If a head that should equal the embedding differs from it.
    """
    kept = {k: v for k, v in stored.items() if not re.fullmatch(port.BUFFERS, k)}
    head, embedding = (
        f"{name}.weight" for name in (port.Model.HEAD, port.Model.EMBEDDING)
    )
    if config.tie_word_embeddings and head in kept:
        copy = kept.pop(head)
        if embedding not in kept:
            kept[embedding] = copy
        elif not are_copies(copy, kept[embedding]):
            raise ValueError(
                f"config.json says that the head is the embedding, yet {head} differs "
                "from it; set tie_word_embeddings to false"
            )
    return kept


def are_copies(x: Any, y: Any) -> bool:
    """Return whether arrays are equal in the less precise of their dtypes.

    NaN equals NaN: a damaged tensor equals its copy.

    >>> are_copies(np.float32([0.1, np.nan]), np.array([0.1, np.nan], np.float16))
    True
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.dtype != y.dtype:
        dtype = min((x.dtype, y.dtype), key=lambda dtype: ml_dtypes.finfo(dtype).nmant)
        with np.errstate(over="ignore"):
            x, y = x.astype(dtype), y.astype(dtype)
    # The comparison of NumPy does not know NaN of bfloat16.
    same = (x == y) | ((x != x) & (y != y)) if x.shape == y.shape else False
    return bool(np.all(same))


def check_names(expected: set[str], stored: set[str], head: str = "") -> None:
    """Check that a file holds exactly the expected tensors.

    Args:
        expected: Names of the parameters of the model.
        stored: Names in the file, without prefix.
        head: Name of the weight of a separate head.

    Raises:
        ValueError: If some are missing or left over; the message names them.
    """
    missing, extra = sorted(expected - stored), sorted(stored - expected)
    parts = [
        f"{len(names)} {word} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
        for names, word in ((missing, "missing"), (extra, "left over"))
        if names
    ]
    if not parts:
        return
    quantised = [name for name in extra if re.search(_QUANTISED, name)]
    if quantised:
        raise ValueError(
            f"the weights are quantised (tensor {quantised[0]}), which is not "
            "supported; give the model before quantisation"
        )
    remedy = ""
    if missing == [head] and not extra:
        remedy = "; if the head is the embedding, set tie_word_embeddings to true"
    raise ValueError(f"tensors do not fit config.json: {' and '.join(parts)}{remedy}")
