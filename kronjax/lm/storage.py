"""Folders of tensors: what a checkpoint of Hugging Face stores, read and replaced.

Tensors are mapped into memory, so that a model is never held twice. A pickle is never
opened: it can run any code. A folder is replaced as a whole: the new one is completed
under a temporary name beside it, then the two are renamed.

>>> sorted(canonical({"transformer.wte.weight": 1}, ("transformer.",)))
['wte.weight']
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from kronjax import files
from kronjax.lm import tokenizer

WEIGHTS = "model.safetensors"
"""The file that `save` and `export` put the tensors in."""

INDEX = "model.safetensors.index.json"
"""The file that says which shard holds which tensor."""

MSGPACK = "flax_model.msgpack"
"""What older Flax models were stored in; all that OPT-125M offers beside a pickle."""

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
"""Suffixes of files that are, or may be, pickles."""

OWN = {"config.json", "recipe.yaml", "generation_config.json", WEIGHTS, INDEX}
"""Names that `save` may replace or remove, beside shards and a tokenizer's files."""

T = TypeVar("T")


def open_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a checkpoint by the names in its files.

    Args:
        folder: With `model.safetensors`, its shards and their index, or
            `flax_model.msgpack`.

    Returns:
        Arrays, mapped into memory where the format allows. Matrices from a msgpack
        file are turned into the orientation of safetensors.

    Raises:
        ValueError: If the folder has a pickle only, a file is truncated, or the index
            names a file outside of the folder or a tensor that is not there.
        OSError: If there is nothing to read.
    """
    if (folder / INDEX).is_file():
        return _open_shards(folder)
    if (folder / WEIGHTS).is_file():
        return files.map_tensors(folder / WEIGHTS)
    if (folder / MSGPACK).is_file():
        return _open_msgpack(folder / MSGPACK)
    pickles = sorted(x.name for x in folder.iterdir() if x.suffix in PICKLES)
    if pickles:
        raise ValueError(
            f"{folder} holds its weights only as a pickle ({pickles[0]}), which could "
            "run any code and is never opened; convert it where you trust it: "
            "transformers.AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    raise FileNotFoundError(
        f"{folder} holds no weights: no {WEIGHTS}, no {INDEX}, no {MSGPACK}"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file.

    Raises:
        ValueError: If it is not JSON or no mapping.
        OSError: If it cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not a mapping")
    return values


def canonical(tensors: Mapping[str, T], prefixes: tuple[str, ...]) -> dict[str, T]:
    """Return the tensors under names without the prefix that files may or may not use.

    Raises:
        ValueError: If two names become one.
    """
    short: dict[str, T] = {}
    for name, tensor in tensors.items():
        prefix = next((one for one in prefixes if name.startswith(one)), "")
        key = name.removeprefix(prefix)
        if key in short:
            raise ValueError(
                f"the tensor {key} is there twice, with a prefix and without"
            )
        short[key] = tensor
    return short


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder` when the block succeeds.

    Files in `folder` that are not of a checkpoint, such as logs, stay in it.

    Raises:
        OSError: If something cannot be written; `folder` is as it was.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"cannot write {folder}: it is a file")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (
        folder.with_name(f".{folder.name}.{os.getpid()}.{kind}")
        for kind in ("new", "old")
    )
    try:
        new.mkdir()
        yield new
        _flush(new)
        if folder.exists():
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except BaseException:
            if old.exists():
                os.rename(old, folder)
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(f"cannot write {folder}: {reason}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if folder.exists() and old.exists():
            _keep_others(old, folder)


def _keep_others(old: Path, folder: Path) -> None:
    """Move what is not of a checkpoint to the new folder, and remove the old one."""
    for entry in old.iterdir():
        ours = entry.name in OWN or entry.name in tokenizer.FILES
        shard = entry.match("model-*.safetensors")
        if not ours and not shard and not (folder / entry.name).exists():
            os.rename(entry, folder / entry.name)
    shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Bring the content of the files to the disk before their folder gets its name."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _open_shards(folder: Path) -> dict[str, np.ndarray]:
    where = read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(
        isinstance(x, str) for x in where.values()
    ):
        raise ValueError(f"{folder / INDEX} has no weight_map of names and files")
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(where.values())):
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise ValueError(f"{folder / INDEX} names {shard!r}, outside of its folder")
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder} lacks {shard}, which its index names")
        held = files.map_tensors(folder / shard)
        wanted = [name for name, place in where.items() if place == shard]
        missing = sorted(set(wanted) - set(held))
        if missing:
            raise ValueError(
                f"{folder / shard} lacks {missing[0]}, which the index names"
            )
        tensors |= {name: held[name] for name in wanted}
    return tensors


def _open_msgpack(path: Path) -> dict[str, np.ndarray]:
    """Return the parameters of a Flax model under the names of safetensors.

    Flax stores kernels transposed, and calls weights by what they are for.
    """
    from flax import serialization

    try:
        nested = serialization.msgpack_restore(path.read_bytes())
    except (OSError, MemoryError):
        raise
    except Exception as error:  # msgpack has a dozen of its own
        raise ValueError(
            f"{path}: the file is truncated or not a msgpack file ({error})"
        ) from error
    names = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    tensors = {}
    for keys, value in _leaves(nested, ()):
        if not isinstance(value, np.ndarray):
            raise ValueError(f"{path}: {'.'.join(keys)} is no array")
        *place, last = keys
        turned = value.T if last == "kernel" else value
        tensors[".".join([*place, names.get(last, last)])] = turned
    return tensors


def _leaves(tree: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(tree, dict):
        yield keys, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, (*keys, str(key)))
