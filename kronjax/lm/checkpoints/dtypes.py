"""Dtypes of the parameters of a model, and the size of the file that holds them.

Every tensor of a checkpoint keeps its dtype: bfloat16 weights beside float32 norms, for
example. New parameters, such as factors, take the dtype of the kernel they replace.

>>> entry = _entry("a", np.dtype(np.float32), (2, 3), 0)
>>> entry
'"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}'
"""

import json
import math
from collections import Counter
from typing import Any

import jax
import numpy as np
from flax import nnx

from kronjax import nn
from kronjax.io.matrices import SAFETENSORS_DTYPES
from kronjax.lm.checkpoints.tensor_names import is_transposed, tensor_name
from kronjax.lm.models.base import LanguageModel
from kronjax.lm.models.registry import PORTS

METADATA = {"format": "pt"}
"""Metadata of the files; transformers opens no file whose format is another."""

_CODES = {np.dtype(dtype): code for code, dtype in SAFETENSORS_DTYPES.items()}

_ORDER = ("BOOL", "U8", "I8", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64")
"""Dtypes in the order of safetensors, which stores the last ones first."""


def restored(model: LanguageModel, like: LanguageModel) -> LanguageModel:
    """Return a model with its parameters in the dtypes of another one.

    Args:
        model: The model, which is not changed; arrays may be abstract.
        like: A model of the same architecture. Parameters that it lacks get the dtype
            of its kernel, or table, in the same layer.
    """
    known = {path: x.dtype for path, x in _parameters(like)}
    layers = {**nn.tables(like), **nn.linear_layers(like)}
    kernels = {
        tuple(name.split(".")): jax.tree.leaves(nnx.state(layer, nnx.Param))
        for name, layer in layers.items()
    }
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    flat = []
    for path, variable in nnx.to_flat_state(parameters):
        text = tuple(map(str, path))
        dtype = known.get(text)
        if dtype is None:
            ends = range(len(text), 0, -1)
            layer = next((text[:end] for end in ends if text[:end] in kernels), ())
            # The largest one is the kernel; the other one is the bias.
            held = kernels.get(layer, [])
            kernel = max(held, key=lambda x: math.prod(x.shape), default=None)
            dtype = main_dtype(like) if kernel is None else kernel.dtype
        flat.append((path, variable.replace(cast(variable.get_value(), dtype))))
    return nnx.merge(graph, nnx.from_flat_state(flat), rest)


def main_dtype(model: LanguageModel) -> np.dtype:
    """Return the dtype of most of the parameters."""
    counts: Counter[Any] = Counter()
    for _, x in _parameters(model):
        counts[np.dtype(x.dtype)] += math.prod(x.shape)
    return counts.most_common(1)[0][0]


def file_size(model: LanguageModel) -> int:
    """Return the number of bytes of the `model.safetensors` that `save` writes.

    Args:
        model: A model with layers of any kind; arrays may be abstract.
    """
    port = PORTS[model.config.model_type]
    tensors = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        dotted, value = ".".join(map(str, path)), variable.get_value()
        transposed = is_transposed(port, dotted, len(value.shape))
        shape = value.shape[::-1] if transposed else value.shape
        tensors.append((tensor_name(port, dotted), np.dtype(value.dtype), shape))
    tensors.sort(key=lambda x: (-_ORDER.index(_CODES[x[1]]), x[0]))
    entries, offset = [f'"__metadata__":{_compact(METADATA)}'], 0
    for name, dtype, shape in tensors:
        entries.append(_entry(name, dtype, shape, offset))
        offset += math.prod(shape) * dtype.itemsize
    header = len(("{" + ",".join(entries) + "}").encode())
    return 8 + -(-header // 8) * 8 + offset


def cast(value: Any, dtype: Any) -> Any:
    """Return an array, which may be abstract, in another dtype."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape, dtype)
    return value.astype(dtype)


def _entry(name: str, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> str:
    """Return the entry of a tensor in the header of a safetensors file."""
    end = offset + math.prod(shape) * dtype.itemsize
    facts = {
        "dtype": _CODES[dtype],
        "shape": list(shape),
        "data_offsets": [offset, end],
    }
    return f"{json.dumps(name, ensure_ascii=False)}:{_compact(facts)}"


def _compact(facts: Any) -> str:
    return json.dumps(facts, separators=(",", ":"))


def _parameters(model):
    """Return paths of text and values of all parameters."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return [(tuple(map(str, path)), x.get_value()) for path, x in flat]
