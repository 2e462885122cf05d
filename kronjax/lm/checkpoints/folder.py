"""Folders of tensors: what a checkpoint of Hugging Face stores, read and replaced.

Tensors are mapped into memory, so that a model is never held twice. A pickle is never
opened: it can run any code.

A model is replaced as a whole. The new files are completed in a folder inside of the
one that is saved to; renaming that folder to `.saved` is the moment at which the new
model is there. Its files are then moved to their places, and whoever comes after an
interruption, to read or to write, finishes the moving.

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
from typing import Any, TypeVar

import numpy as np

from kronjax.io import matrices, tensors
from kronjax.lm.text import tokenizer

WEIGHTS = "model.safetensors"
"""The file that `save` and `export` put the tensors in."""

INDEX = "model.safetensors.index.json"
"""The file that says which shard holds which tensor."""

MSGPACK = "flax_model.msgpack"
"""What older Flax models were stored in; all that OPT-125M offers beside a pickle."""

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
"""Suffixes of files that are, or may be, pickles."""

REFUSAL = (
    "{where} holds its weights only as a pickle ({file}), which could run any code and "
    "is never opened; convert it where you trust it: "
    "transformers.AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
)
"""What is said of a model that was stored as nothing else."""

SAVED = ".saved"
"""The folder of a model that is complete, but not yet in its place."""

STAGING = ".saving-"
"""What the names of folders begin with in which a model is not yet complete."""

STALE = 3600.0
"""Seconds after which such a folder is taken for one that was left behind."""

_SHARD = r"model-\d{5}-of-\d{5}\.safetensors"

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
        return tensors.open_indexed(folder / INDEX)
    if (folder / WEIGHTS).is_file():
        return matrices.map_tensors(folder / WEIGHTS)
    if (folder / MSGPACK).is_file():
        return _open_msgpack(folder / MSGPACK)
    pickles = sorted(x.name for x in folder.iterdir() if x.suffix in PICKLES)
    if pickles:
        raise ValueError(REFUSAL.format(where=folder, file=pickles[0]))
    raise FileNotFoundError(
        f"{folder} holds no weights: no {WEIGHTS}, no {INDEX}, no {MSGPACK}"
    )


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
    """Yield an empty folder whose files replace those of a model when the block ends.

    What is not of a model stays in `folder`, and so does a tokenizer where the new
    model brings none.

    Args:
        folder: Made if it is not there.

    Raises:
        OSError: If something cannot be written; the model is as it was.
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
        for path in staging.iterdir():
            with open(path, "rb") as file:
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
    """Move the files of a complete model to their places, if a save could not.

    Args:
        folder: Of a model; left as it is if there is nothing to move.

    Raises:
        OSError: If something cannot be moved.
    """
    saved = folder / SAVED
    if not saved.is_dir():
        return
    new = {path.name for path in saved.iterdir()}
    # config.json moves first: once it is gone, nothing of the old model is left, and
    # what has its name is new.
    if "config.json" in new:
        for path in folder.iterdir():
            if path.name not in new and _replaced(path.name, new):
                path.unlink(missing_ok=True)
    for name in sorted(new, key=lambda name: name != "config.json"):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.replace(saved / name, folder / name)
    with contextlib.suppress(OSError):
        saved.rmdir()


def _replaced(name: str, new: set[str]) -> bool:
    """Say whether a file belongs to the model that `new` takes the place of."""
    if name in tokenizer.FILES:
        return not new.isdisjoint(tokenizer.FILES)
    ours = (WEIGHTS, INDEX, MSGPACK, "recipe.yaml")
    return name in ours or bool(re.fullmatch(_SHARD, name))


def _commit(staging: Path, folder: Path) -> None:
    """Make the new model the one that counts."""
    for _ in range(100):
        try:
            os.rename(staging, folder / SAVED)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            settle(folder)  # of someone else, who saves here at the same time
            time.sleep(0.01)
    raise OSError(errno.EBUSY, "others save to this folder all the time")


def _sweep(folder: Path) -> None:
    """Remove what interrupted saves left behind long ago."""
    for path in folder.glob(f"{STAGING}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE:
                shutil.rmtree(path, ignore_errors=True)


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
        if not isinstance(value, np.ndarray) or not keys:
            name = ".".join(keys) or "what it holds"
            raise ValueError(f"{path}: {name} is no array, or has no name")
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
