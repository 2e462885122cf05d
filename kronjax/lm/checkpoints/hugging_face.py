"""Reading and writing of language models as folders of Hugging Face.

`load` takes a folder, the name of a model on the hub or a GGUF file. `save` writes a
folder from which `load` returns exactly the same model: `config.json` lists the layers
that are factored or masked, `model.safetensors` holds the arrays. `export` multiplies
every such layer out, so that any other program can open the folder.

A folder with compressed layers has `"model_type": "kronjax"` in its `config.json`, so
that no other program takes it for a dense model. `kronjax.lm.checkpoints.tensor_names`
describes the names and the orientation of the tensors.
"""

import contextlib
import json
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
from kronjax.lm.checkpoints import dtypes, sources
from kronjax.lm.checkpoints.folder import (
    WEIGHTS,
    canonical,
    open_tensors,
    replacing,
    settle,
)
from kronjax.lm.checkpoints.tensor_names import (
    check_names,
    is_transposed,
    short_name,
    tensor_name,
    unwrapped,
    without_extras,
)
from kronjax.lm.models.base import LanguageModel
from kronjax.lm.models.registry import PORTS, Port, port_of
from kronjax.lm.text.tokenizer import Tokenizer, read_tokenizer

MODEL_TYPE = "kronjax"
"""The `model_type` of a folder with layers that only kronjax can read."""

FORMAT = 1
"""Version of the format of such folders; other versions are refused."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
"""The dtypes in which parameters may be stored and computed, by name."""

_FLOATS = [np.dtype(known) for known in DTYPES.values()]


def load(source: str | Path, *, dtype: str | None = None) -> LanguageModel:
    """Read a language model.

    Args:
        source: A folder written by Hugging Face or by `save`, a GGUF file of Llama
            type, or a name on the hub, `owner/name`. Only such a name uses the network.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; by default every parameter
            keeps the dtype of its tensor in the file.

    Returns:
        The model, with its tokenizer and its recipe if the source has them.

    Raises:
        ValueError: If the architecture is unknown, tensors are missing, left over or
            of the wrong shape, or a file is damaged; the message names them.
        OSError: If the source does not exist, or the hub cannot be reached.
    """
    chosen = None if dtype is None else _dtype(dtype)
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
        model = _assemble(values, tensors, chosen)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    model.tokenizer, model.recipe = tokenizer, recipe
    return model


def outline(source: str | Path) -> LanguageModel:
    """Return a dense model with abstract arrays; its `config.json` is enough.

    Args:
        source: A folder, whose weights are not read but for their dtypes, a
            `config.json`, or any other source that `load` accepts.

    Raises:
        ValueError: If the architecture is unknown, or layers are compressed already.
        OSError: If the source does not exist.
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
        raise ValueError(f"{path} is compressed already; give the dense model")
    tensors = None
    if path.is_dir():
        with contextlib.suppress(ValueError, OSError):  # config.json is enough
            tensors = open_tensors(path)
    if tensors is not None:
        try:
            port, graph, flat, stored = _described(values, tensors)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return nnx.merge(
            graph, nnx.from_flat_state([_stored_as(x, stored) for x in flat])
        )
    port = port_of(values)
    config = port.Config.from_hugging_face(values)
    model = nnx.eval_shape(lambda: port.Model(config, rngs=nnx.Rngs(0)))
    dtype = values.get("dtype") or values.get("torch_dtype")
    return cast(model, dtype) if dtype in [*DTYPES] else model


def _stored_as(item, stored):
    """Return the path and the abstract variable of a parameter, in its stored dtype."""
    path, variable = item
    value, dtype = variable.get_value(), stored[short_name(_dotted(path))].dtype
    if dtype not in _FLOATS:
        return path, variable
    return path, variable.replace(jax.ShapeDtypeStruct(value.shape, dtype))


def opened(folder: Path) -> tuple[LanguageModel, dict[str, np.ndarray]]:
    """Return a model with abstract arrays, and its parameters mapped into memory.

    Args:
        folder: A folder that `load` accepts.

    Returns:
        The model, and its arrays by path, such as `h.0.mlp.c_fc.kernel`, in the
        orientation of the model. They are not read yet.

    Raises:
        ValueError: As `load` does.
        OSError: If the folder is incomplete.
    """
    settle(folder)
    values, tensors = read_json(_config_of(folder)), open_tensors(folder)
    try:
        port, graph, flat, stored = _described(values, tensors)
        arrays = {
            _dotted(path): _oriented(port, _dotted(path), stored, variable)
            for path, variable in flat
        }
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return nnx.merge(graph, nnx.from_flat_state(flat)), arrays


def save(model: LanguageModel, folder: str | Path) -> None:
    """Write a model so that `load` returns exactly the same one.

    Args:
        model: A model with layers of any kind. If none is factored or masked, the
            result is an ordinary folder of Hugging Face.
        folder: The folder to write. Its checkpoint is replaced completely or not at
            all; other files stay.

    Raises:
        OSError: If the folder cannot be written.
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

    Every parameter keeps its dtype, so an export is as large as the dense model.

    Args:
        model: The model, which is not changed.
        folder: The folder to write. Its checkpoint is replaced completely or not at
            all; other files stay.

    Raises:
        OSError: If the folder cannot be written.
    """
    dense = nn.multiplied_out(model)
    dense.recipe = None
    _write(dense, _hugging_face_config(dense), _tensors(dense), folder)


def cast(model: LanguageModel, dtype: str) -> LanguageModel:
    """Return a model with its parameters in one dtype.

    Args:
        model: The model, which is not changed; arrays may be abstract.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.

    Raises:
        ValueError: If the dtype is a different one.
    """
    chosen = _dtype(dtype)
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    parameters = jax.tree.map(lambda x: dtypes.cast(x, chosen), parameters)
    return nnx.merge(graph, parameters, rest)


def _assemble(
    values: Mapping[str, Any], tensors: Mapping[str, Any], dtype: Any
) -> LanguageModel:
    """Return the model that `config.json` describes, with the values of the tensors."""
    port, graph, flat, stored = _described(values, tensors)
    filled = [
        (path, variable.replace(_fit(port, _dotted(path), stored, variable, dtype)))
        for path, variable in flat
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _described(values: Mapping[str, Any], tensors: Mapping[str, Any]):
    """Return the port of a model, its graph and variables, and its stored tensors."""
    layers: Mapping[str, Any] = {}
    if values.get("model_type") == MODEL_TYPE:
        if values.get("format") != FORMAT:
            raise ValueError(
                f"the folder has format {values.get('format')}, but this version of "
                f"kronjax reads format {FORMAT}; update kronjax"
            )
        values, layers = _mapping(values, "base"), _mapping(values, "layers")
    port = port_of(values)
    config = port.Config.from_hugging_face(values)
    if config.num_layers > len(tensors):  # a false size must not exhaust the memory
        raise ValueError(
            f"config.json says {config.num_layers} blocks, but there are only "
            f"{len(tensors)} tensors"
        )
    model = nnx.eval_shape(lambda: port.Model(config, rngs=nnx.Rngs(0)))
    for name, description in layers.items():
        nn.replace(model, name, nn.from_description(description))
    graph, state = nnx.split(model)
    stored = canonical(unwrapped(tensors, port.PREFIXES[0]), port.PREFIXES)
    stored = without_extras(port, config, stored)
    flat = list(nnx.to_flat_state(state))
    expected = {short_name(_dotted(path)) for path, _ in flat}
    check_names(expected, set(stored), f"{port.Model.HEAD}.weight")
    return port, graph, flat, stored


def _mapping(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if not isinstance(values.get(name), dict):
        raise ValueError(f"config.json: {name} is not a mapping")
    return values[name]


def _fit(
    port: Port, path: str, stored: Mapping[str, Any], variable: Any, dtype: Any
) -> jax.Array:
    """Return a stored tensor in the orientation and the dtype of its variable."""
    array, name = _oriented(port, path, stored, variable), short_name(path)
    if isinstance(variable, nn.Mask):
        return jnp.asarray(np.asarray(array, bool))
    if isinstance(variable, nn.Order):
        order = np.asarray(array)
        if not np.array_equal(np.sort(order), np.arange(order.size)):
            raise ValueError(f"tensor {name} is not a permutation")
        return jnp.asarray(order, jnp.int32)
    if array.dtype not in _FLOATS:
        if str(array.dtype).startswith("float8"):
            if dtype is None:
                raise ValueError(
                    f"tensor {name} has dtype {array.dtype}, in which no model can "
                    "compute; load the model with dtype bfloat16 (--dtype bfloat16)"
                )
        elif array.dtype != np.float64:
            raise ValueError(
                f"tensor {name} has dtype {array.dtype}; parameters are floats"
            )
        dtype = dtype or jnp.float32
    return jnp.asarray(np.ascontiguousarray(array, dtype=dtype))


def _oriented(
    port: Port, path: str, stored: Mapping[str, Any], variable: Any
) -> np.ndarray:
    """Return a stored tensor in the orientation of its variable, without a copy."""
    name = short_name(path)
    array, shape = stored[name], variable.get_value().shape
    transposed = is_transposed(port, path, len(shape))
    expected = shape[::-1] if transposed else shape
    if array.shape != expected:
        raise ValueError(
            f"tensor {name} has shape {array.shape}, config.json asks for {expected}"
        )
    return array.T if transposed else array


def _tensors(model: LanguageModel) -> dict[str, np.ndarray]:
    """Return the tensors of a model by their names in a file."""
    port = PORTS[model.config.model_type]
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        array = np.asarray(variable.get_value())
        dotted = _dotted(path)
        if is_transposed(port, dotted, array.ndim):
            array = array.T
        tensors[tensor_name(port, dotted)] = np.ascontiguousarray(array)
    return tensors


def _hugging_face_config(model: LanguageModel) -> dict[str, Any]:
    config = model.config.to_hugging_face()
    port = PORTS[model.config.model_type]
    config.pop("torch_dtype", None)  # the older name
    dtype = str(dtypes.main_dtype(model))
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
        path = new / WEIGHTS
        try:
            safetensors.numpy.save_file(tensors, path, dtypes.METADATA)
        except safetensors.SafetensorError as error:  # such as a full disk
            raise OSError(str(error)) from error
        text = json.dumps(config, indent=2, allow_nan=False)
        (new / "config.json").write_text(text + "\n", encoding="utf-8")
        shutil.copymode(new / "config.json", path)  # safetensors makes it private
        for name, content in (tokenizer.files if tokenizer else {}).items():
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_bytes(content)
        if model.recipe is not None:
            (new / "recipe.yaml").write_text(model.recipe, encoding="utf-8")


def _dtype(name: str) -> Any:
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; it must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8") from error


def _config_of(folder: Path) -> Path:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no model: it has no config.json")
    return path


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
