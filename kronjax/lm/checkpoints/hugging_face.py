"""Models from Hugging Face folders, and back into them.

`load` takes a folder, the name of a model on the hub or a GGUF file. `save` writes a
folder that `load` opens as exactly the same model: `config.json` says which layers are
factored or masked, `model.safetensors` holds the numbers. `export` multiplies every
such layer out and writes what any other program opens.

The path of a parameter, `h.0.mlp.c_fc.kernel`, is its name in the file but for the
prefix of the port, the word `weight`, and the orientation. A folder with layers of
kronjax says `"model_type": "kronjax"`, so that nobody takes it for a dense model.

>>> from kronjax.lm.models import gpt2
>>> tensor_name(gpt2, "h.0.mlp.c_fc.kernel")
'transformer.h.0.mlp.c_fc.weight'
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from kronjax import nn
from kronjax.io import storage
from kronjax.io.json_values import read_json
from kronjax.lm.checkpoints import sources
from kronjax.lm.checkpoints.folder import (
    WEIGHTS,
    canonical,
    open_tensors,
    replacing,
    settle,
)
from kronjax.lm.models.base import LanguageModel, parameter_dtype
from kronjax.lm.models.registry import PORTS, port_of
from kronjax.lm.text.tokenizer import Tokenizer, read_tokenizer

MODEL_TYPE = "kronjax"
"""The `model_type` of a folder whose layers only kronjax knows."""

FORMAT = 1
"""Version of such folders; a reader refuses those of a later one."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
"""What parameters may be stored and computed in."""


def load(source: str | Path, *, dtype: str | None = None) -> LanguageModel:
    """Read a language model.

    Args:
        source: A folder of Hugging Face or of `save`, a GGUF file of Llama type, or a
            name on the hub, `owner/name`: only such a name reaches for the network.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; by default that of every
            tensor in the file.

    Returns:
        The model, with its tokenizer and recipe if there are such.

    Raises:
        ValueError: If the architecture is unknown, tensors are missing, left over or
            of the wrong shape, or a file is damaged; names them.
        OSError: If there is nothing to read, or the hub cannot be reached.
    """
    wanted = None if dtype is None else _dtype(dtype)
    path = sources.find(source)
    if path.is_dir():
        settle(path)
    if path.is_file():
        from kronjax.lm.checkpoints import gguf

        values, tensors, tokenizer = gguf.read(path)
        recipe = None
    else:
        values = read_json(_config_of(path))
        tensors, tokenizer = open_tensors(path), read_tokenizer(path)
        recipe_path = path / "recipe.yaml"
        recipe = _text(recipe_path) if recipe_path.is_file() else None
    try:
        model = _assemble(values, tensors, wanted)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    model.tokenizer, model.recipe = tokenizer, recipe
    return model


def outline(source: str | Path) -> LanguageModel:
    """Return a dense model with abstract arrays, from its `config.json` alone.

    Args:
        source: A folder, whose weights are not read, the file itself, or what `load`
            takes.

    Raises:
        ValueError: If the architecture is unknown, or layers are compressed already.
        OSError: If there is nothing to read.
    """
    path = storage.expanded(source)
    if path.is_file() and path.suffix == ".json":
        values = read_json(path)
    elif path.is_dir():
        values = read_json(_config_of(path))
    else:
        graph, state = nnx.split(load(source))
        return nnx.merge(graph, jax.eval_shape(lambda: state))
    if values.get("model_type") == MODEL_TYPE:
        raise ValueError(f"{path} is compressed already; outline the dense model")
    port = port_of(values)
    config = port.Config.from_hugging_face(values)
    return nnx.eval_shape(lambda: port.Model(config, rngs=nnx.Rngs(0)))


def opened(folder: Path) -> tuple[LanguageModel, dict[str, np.ndarray]]:
    """Return a model with abstract arrays, and its numbers, not read yet.

    Args:
        folder: As for `load`.

    Returns:
        The outline, and arrays by the paths of parameters, `h.0.mlp.c_fc.kernel`,
        mapped into memory, in the orientation of the model.

    Raises:
        ValueError: As `load` does.
        OSError: If there is nothing to read.
    """
    settle(folder)
    values, tensors = (
        read_json(_config_of(folder)),
        open_tensors(folder),
    )
    try:
        port, graph, flat, stored = _described(values, tensors)
        arrays = {
            _dotted(path): _oriented(port, name, stored[name], variable)
            for path, name, variable in flat
        }
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    variables = [(path, variable) for path, _, variable in flat]
    return nnx.merge(graph, nnx.from_flat_state(variables)), arrays


def save(model: LanguageModel, folder: str | Path) -> None:
    """Write a model so that `load` returns exactly the same one.

    Args:
        model: With layers of any kind; without factored or masked ones the folder is
            an ordinary one of Hugging Face.
        folder: Replaced as a whole or not at all; what is not of a checkpoint stays.

    Raises:
        OSError: If it cannot be written.
    """
    config = _hugging_face_config(model)
    special = {
        name: nn.describe(layer)
        for name, layer in {**nn.linear_layers(model), **nn.tables(model)}.items()
        if not nn.is_dense(layer)
    }
    if special:
        config = {
            "model_type": MODEL_TYPE,
            "format": FORMAT,
            "base": config,
            "layers": special,
        }
    _write(model, config, _tensors(model), folder)


def export(model: LanguageModel, folder: str | Path) -> None:
    """Write a model with every layer multiplied out, for any program to open.

    Args:
        model: Left as it is.
        folder: Replaced as a whole or not at all; what is not of a checkpoint stays.

    Raises:
        OSError: If it cannot be written.
    """
    dense = nn.multiplied_out(model)
    dense.recipe = None
    # One dtype, as any other program takes them to have.
    dense = cast(dense, str(parameter_dtype(dense)))
    _write(dense, _hugging_face_config(dense), _tensors(dense), folder)


def cast(model: LanguageModel, dtype: str) -> LanguageModel:
    """Return a model with its parameters in one dtype.

    Args:
        model: Left as it is.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.

    Raises:
        ValueError: If the dtype is another one.
    """
    wanted = _dtype(dtype)
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graph, jax.tree.map(lambda x: x.astype(wanted), parameters), rest)


def tensor_name(port: Any, path: str) -> str:
    """Return the name in a file of the parameter at `path` of a model.

    Args:
        port: Its module, such as `kronjax.lm.models.gpt2`.
        path: Such as `h.0.mlp.c_fc.kernel`.
    """
    prefix = "" if path.startswith("lm_head.") else port.PREFIXES[0]
    return prefix + _short(path)


def _assemble(
    values: Mapping[str, Any], tensors: Mapping[str, Any], dtype: Any
) -> LanguageModel:
    """Return the model that `config.json` describes, filled with the tensors."""
    port, graph, flat, stored = _described(values, tensors)
    filled = [
        (path, variable.replace(_fit(port, name, stored[name], variable, dtype)))
        for path, name, variable in flat
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _described(values: Mapping[str, Any], tensors: Mapping[str, Any]):
    """Return the port of a model, its graph and variables, and the tensors of these."""
    layers: Mapping[str, Any] = {}
    if values.get("model_type") == MODEL_TYPE:
        if values.get("format") != FORMAT:
            raise ValueError(
                f"written in format {values.get('format')}, and this kronjax reads "
                f"format {FORMAT}: update kronjax"
            )
        values, layers = _mapping(values, "base"), _mapping(values, "layers")
    port = port_of(values)
    config = port.Config.from_hugging_face(values)
    if config.num_layers > len(tensors):  # before anything of that length is built
        raise ValueError(
            f"config.json says {config.num_layers} blocks, there are {len(tensors)} "
            "tensors"
        )
    model = nnx.eval_shape(lambda: port.Model(config, rngs=nnx.Rngs(0)))
    for name, description in layers.items():
        nn.replace(model, name, nn.from_description(description))
    graph, state = nnx.split(model)
    stored = _without_extras(port, config, canonical(tensors, port.PREFIXES))
    flat = [
        (path, _short(_dotted(path)), variable)
        for path, variable in nnx.to_flat_state(state)
    ]
    _check_names({name for _, name, _ in flat}, set(stored))
    return port, graph, flat, stored


def _mapping(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if not isinstance(values.get(name), dict):
        raise ValueError(f"config.json: {name} is no mapping")
    return values[name]


def _without_extras(
    port: Any, config: Any, stored: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Leave out what is no parameter, and a head that repeats the embedding."""
    kept = {k: v for k, v in stored.items() if not re.fullmatch(port.BUFFERS, k)}
    if config.tie_word_embeddings and "lm_head.weight" in kept:
        head = kept.pop("lm_head.weight")
        embedding = kept.get(port.EMBEDDING, head)
        if not np.array_equal(head, embedding):
            raise ValueError(
                "config.json says that the head is the embedding, yet lm_head.weight "
                "differs from it; set tie_word_embeddings to false"
            )
    return kept


def _check_names(wanted: set[str], there: set[str]) -> None:
    missing, extra = sorted(wanted - there), sorted(there - wanted)
    parts = [
        f"{len(names)} {word} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
        for names, word in ((missing, "missing"), (extra, "left over"))
        if names
    ]
    if parts:
        raise ValueError(f"tensors do not fit config.json: {' and '.join(parts)}")


def _fit(
    port: Any, name: str, array: np.ndarray, variable: Any, dtype: Any
) -> jax.Array:
    """Return a stored tensor in the orientation and the dtype of its variable."""
    array = _oriented(port, name, array, variable)
    if isinstance(variable, nn.Mask):
        return jnp.asarray(np.asarray(array, bool))
    if isinstance(variable, nn.Order):
        order = np.asarray(array)
        if not np.array_equal(np.sort(order), np.arange(order.size)):
            raise ValueError(f"tensor {name} is no permutation")
        return jnp.asarray(order, jnp.int32)
    if array.dtype not in [np.dtype(one) for one in DTYPES.values()]:
        if array.dtype != np.float64:
            raise ValueError(f"tensor {name} has dtype {array.dtype}, no parameter's")
        dtype = dtype or jnp.float32
    return jnp.asarray(np.ascontiguousarray(array, dtype=dtype))


def _oriented(port: Any, name: str, array: np.ndarray, variable: Any) -> np.ndarray:
    """Return a stored tensor in the orientation of its variable, not copied."""
    shape = variable.get_value().shape
    turned = _is_turned(port, name, len(shape))
    expected = shape[::-1] if turned else shape
    if array.shape != expected:
        raise ValueError(
            f"tensor {name} has shape {array.shape}, config.json asks for {expected}"
        )
    return array.T if turned else array


def _is_turned(port: Any, name: str, ndim: int) -> bool:
    """Say whether the file holds the transpose: of matrices, but not of embeddings."""
    if ndim != 2 or not name.endswith((".weight", ".mask")):
        return False
    return name == "lm_head.weight" or (port.OUT_IN and "embed" not in name)


def _tensors(model: LanguageModel) -> dict[str, np.ndarray]:
    """Return what a file holds of a model, by name."""
    port = PORTS[model.config.model_type]
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        array = np.asarray(variable.get_value())
        dotted = _dotted(path)
        if _is_turned(port, _short(dotted), array.ndim):
            array = array.T
        tensors[tensor_name(port, dotted)] = np.ascontiguousarray(array)
    return tensors


def _hugging_face_config(model: LanguageModel) -> dict[str, Any]:
    config = model.config.to_hugging_face()
    port = PORTS[model.config.model_type]
    dtype = str(parameter_dtype(model))
    config.pop("torch_dtype", None)  # the older word
    return {"architectures": [port.ARCHITECTURE], **config, "dtype": dtype}


def _write(
    model: LanguageModel,
    config: Mapping[str, Any],
    tensors: dict[str, np.ndarray],
    folder: str | Path,
) -> None:
    folder = storage.expanded(folder)
    tokenizer: Tokenizer | None = model.tokenizer
    with replacing(folder) as new:
        # The word "pt" is what transformers asks for, whoever wrote the file.
        path = new / WEIGHTS
        try:
            safetensors.numpy.save_file(tensors, path, {"format": "pt"})
        except safetensors.SafetensorError as error:  # such as a full disk
            raise OSError(str(error)) from error
        text = json.dumps(config, indent=2, allow_nan=False)
        (new / "config.json").write_text(text + "\n", encoding="utf-8")
        shutil.copymode(new / "config.json", path)  # the library makes it private
        for name, content in (tokenizer.files if tokenizer else {}).items():
            (new / name).write_bytes(content)
        if model.recipe is not None:
            (new / "recipe.yaml").write_text(model.recipe, encoding="utf-8")


def _dtype(name: str) -> Any:
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r}; write one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8") from error


def _config_of(folder: Path) -> Path:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is no model")
    return path


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _short(path: str) -> str:
    """Return the name of the parameter at `path` without the prefix of the port."""
    *place, leaf = path.split(".")
    leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    return ".".join([*place, leaf])
