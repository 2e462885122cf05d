"""Folders with the tensors of a model: reading, and atomic replacement.

Tensors are mapped into memory, so that a model is never held twice. A pickle is never
opened, because it can run any code.

A model is replaced completely or not at all. The new files are written to a staging
folder inside the target; renaming it to `.saved` commits the new model. Then its files
are moved into the target. After an interruption, the next process that reads or writes
the folder completes these moves.

>>> sorted(canonical({"transformer.wte.weight": 1}, ("transformer.",)))
['wte.weight']
"""

import contextlib
import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from kronjax.io import matrices, notes, stand_ins, tensors
from kronjax.lm.text import chat, tokenizer

WEIGHTS = "model.safetensors"
"""Name of the file in which `save` and `export` store the tensors."""

INDEX = "model.safetensors.index.json"
"""Name of the file that lists the tensors of each shard."""

MSGPACK = "flax_model.msgpack"
"""Name of the file of older Flax models; OPT-125M has only this one and a pickle."""

ADAPTER = "adapter_model.safetensors"
"""Name of the file of a LoRA adapter, which is no model."""

SAVED = ".saved"
"""Name of the folder of a complete model whose files are not moved yet."""

STAGING = ".saving-"
"""Prefix of the names of staging folders, in which a model is not complete yet."""

STALE = 3600.0
"""Age in seconds after which a staging folder counts as abandoned."""

_ABOUT = ("recipe.yaml", "report.json", "report.html", "finished.json")
"""Files about the weights beside them, which say nothing about others."""

_SHARD = r"model-\d{5}-of-\d{5}\.safetensors"

T = TypeVar("T")


def open_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a checkpoint by their names in its files.

    If a folder has several checkpoints, the first that is complete is read, in the
    order of transformers: `model.safetensors`, shards, and then `flax_model.msgpack`.

    Args:
        folder: A folder with `model.safetensors`, with its shards and their index, or
            with `flax_model.msgpack`.

    Returns:
        Arrays, mapped into memory where the format allows. Kernels from a msgpack file
        are transposed into the orientation of safetensors files.

    Raises:
        ValueError: If the folder has only a pickle or an adapter, a file is truncated
            or a Git LFS pointer, or the index names a file outside the folder or a
            missing tensor.
        OSError: If the folder has no weights, or lacks a shard.
    """
    openers = {
        WEIGHTS: matrices.map_tensors,
        INDEX: tensors.open_indexed,
        MSGPACK: _open_msgpack,
    }
    held = [name for name in openers if (folder / name).is_file()]
    if not held:
        shards = tensors.map_shards(folder)
        if shards is None:
            _refuse_without_weights(folder)
        return shards
    lacks = {}
    for name in held:
        lacks[name] = _what_is_missing(folder, name)
        if lacks[name] is None:
            break
    chosen = next((name for name in lacks if lacks[name] is None), held[0])
    if len(held) > 1:
        why = "in the order of transformers"
        if chosen != held[0]:
            why = f"for {lacks[held[0]]}"
        names = " and ".join([", ".join(held[:-1]), held[-1]])
        notes.tell(f"{folder} holds {names}: {chosen} is read, {why}")
    return openers[chosen](folder / chosen)


def _what_is_missing(folder: Path, name: str) -> str | None:
    """Return what a checkpoint lacks, or None if all of its files are there."""
    if stand_ins.is_lfs_pointer(folder / name):
        return f"{name} is a Git LFS pointer"
    for shard in tensors.shards_of(folder / name) if name == INDEX else ():
        if not (folder / shard).is_file():
            return f"{shard} is missing"
        if stand_ins.is_lfs_pointer(folder / shard):
            return f"{shard} is a Git LFS pointer"
    return None


def _refuse_without_weights(folder: Path) -> NoReturn:
    """Raise the error for a folder without weights, which says what it holds."""
    names = sorted(path.name for path in folder.iterdir())
    if ADAPTER in names:
        raise ValueError(
            f"{folder} holds only an adapter ({ADAPTER}): merge it into its base model "
            "with merge_and_unload of peft, and save the result"
        )
    pickles = [name for name in names if Path(name).suffix in stand_ins.PICKLES]
    if pickles:
        raise ValueError(stand_ins.PICKLE.format(where=folder, file=pickles[0]))
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        raise FileNotFoundError(
            f"{folder} holds no weights but {ggufs[0]}: give the path of that file"
        )
    raise FileNotFoundError(
        f"{folder} holds no weights: no {WEIGHTS}, no {INDEX}, no {MSGPACK}"
    )


def canonical(tensors: Mapping[str, T], prefixes: tuple[str, ...]) -> dict[str, T]:
    """Return the tensors by their names without prefix.

    Args:
        tensors: Tensors by name; a name may have one of the prefixes or none.
        prefixes: Prefixes to remove.

    Raises:
        ValueError: If two names become equal.
    """
    short: dict[str, T] = {}
    for name, tensor in tensors.items():
        prefix = next((x for x in prefixes if name.startswith(x)), "")
        key = name.removeprefix(prefix)
        if key in short:
            raise ValueError(
                f"the tensor {key} is stored twice, with a prefix and without"
            )
        short[key] = tensor
    return short


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder whose files replace those of a model when the block ends.

    Files that do not belong to a model stay in `folder`, and so does a tokenizer if the
    new model has none.

    Args:
        folder: The folder of the model, which is created if it does not exist.

    Raises:
        OSError: If a file cannot be written; the old model is then unchanged.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"cannot write {folder}: it is a file")
    staging: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        settle(folder)
        _sweep(folder)
        staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=folder))
        yield staging
        for name in _files(staging):
            with open(staging / name, "rb") as file:
                os.fsync(file.fileno())
        _commit(staging, folder)
        settle(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(f"cannot write {folder}: {reason}") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def settle(folder: Path) -> None:
    """Complete a save that was interrupted after its commit.

    Args:
        folder: The folder of a model, which is unchanged if no save was interrupted.

    Raises:
        OSError: If a file cannot be moved.
    """
    saved = folder / SAVED
    if not saved.is_dir():
        return
    new = set(_files(saved))
    # config.json moves first: once it is moved, all files of the old model are removed,
    # and files with their names are new.
    if "config.json" in new:
        for name in _files(folder):
            if name not in new and _replaced(name, new):
                (folder / name).unlink(missing_ok=True)
    for name in sorted(new, key=lambda name: name != "config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.replace(saved / name, folder / name)
    for path in (saved / chat.FOLDER, saved):
        with contextlib.suppress(OSError):
            path.rmdir()


def _files(folder: Path) -> list[str]:
    """Return the names of files in a folder and in that of its chat templates."""
    paths = [*folder.iterdir(), *folder.glob(chat.PATTERN)]
    return [path.relative_to(folder).as_posix() for path in paths if path.is_file()]


def _replaced(name: str, new: set[str]) -> bool:
    """Return whether a file belongs to the old model and the files `new` replace it."""
    if tokenizer.belongs(name):
        return any(map(tokenizer.belongs, new))
    ours = (WEIGHTS, INDEX, MSGPACK, *_ABOUT)
    return name in ours or bool(re.fullmatch(_SHARD, name))


def _commit(staging: Path, folder: Path) -> None:
    """Rename the staging folder to `.saved`, which commits the new model."""
    for _ in range(100):
        try:
            os.rename(staging, folder / SAVED)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            settle(folder)  # another process is saving to the same folder
            time.sleep(0.01)
    raise OSError(errno.EBUSY, "other processes keep saving to this folder")


def _sweep(folder: Path) -> None:
    """Remove old staging folders of interrupted saves."""
    for path in folder.glob(f"{STAGING}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE:
                shutil.rmtree(path, ignore_errors=True)


def _open_msgpack(path: Path) -> dict[str, np.ndarray]:
    """Return the parameters of a Flax model under their names in safetensors files.

    Flax stores kernels `[n_in, n_out]`, and weights under the names of their roles.
    """
    from flax import serialization

    try:
        nested = serialization.msgpack_restore(path.read_bytes())
    except (OSError, MemoryError):
        raise
    except Exception as error:  # msgpack raises a dozen classes of its own
        other = stand_ins.describe_file(path)
        raise ValueError(
            f"{path}: "
            + (other or f"the file is truncated or not a msgpack file ({error})")
        ) from error
    names = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    tensors = {}
    for keys, value in _leaves(nested, ()):
        if not isinstance(value, np.ndarray) or not keys:
            name = ".".join(keys) or "the content"
            raise ValueError(f"{path}: {name} is not an array, or has no name")
        *place, last = keys
        tensor = value.T if last == "kernel" else value
        tensors[".".join([*place, names.get(last, last)])] = tensor
    return tensors


def _leaves(tree: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(tree, dict):
        yield keys, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, (*keys, str(key)))
