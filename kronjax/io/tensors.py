"""Memory maps of all tensors of a safetensors file or folder.

A folder contains shards with an index, or any safetensors files with distinct names of
tensors. A single file comes before its shards, as in transformers: `model.safetensors`
before `model.safetensors.index.json`. The meaning of the tensors does not matter here.

>>> is_matrix(np.ones((2, 3))), is_matrix(np.ones(3)), is_matrix(np.ones((2, 3), int))
(True, False, False)
"""

import re
from pathlib import Path

import ml_dtypes
import numpy as np

from kronjax.io import matrices, notes, stand_ins
from kronjax.io.json_values import read_json

SUFFIX = ".safetensors"
INDEX = ".safetensors.index.json"
"""Suffix of the name of the index, which maps tensors to shards."""

_SHARD = r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors"


def map_all(path: Path) -> dict[str, np.ndarray]:
    """Map every tensor of a file or folder.

    Args:
        path: A `.safetensors` file, or a folder of them.

    Returns:
        Read-only arrays by name, in the dtypes of the files.

    Raises:
        ValueError: If a name occurs twice, an index does not fit its shards, or a file
            is truncated.
        OSError: If there is nothing to read.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if not path.is_dir():
        if path.suffix in stand_ins.PICKLES:
            raise ValueError(stand_ins.PICKLE.format(where=path, file=path.name))
        if path.suffix != SUFFIX:
            raise ValueError(f"{path} is neither a {SUFFIX} file nor a folder of them")
        return matrices.map_tensors(path)
    indices = sorted(path.glob(f"*{INDEX}"))
    if len(indices) > 1:
        names = ", ".join(index.name for index in indices)
        raise ValueError(f"{path} holds {len(indices)} indices of shards: {names}")
    files = sorted(path.glob(f"*{SUFFIX}"))
    for whole in files:
        index = path / f"{whole.name.removesuffix(SUFFIX)}{INDEX}"
        others = [index] * index.is_file() + _shards(files, whole.stem)
        if others:
            notes.tell(
                f"{path} holds {whole.name} and {others[0].name}: {whole.name} is "
                "read, in the order of transformers"
            )
            return matrices.map_tensors(whole)
    if indices:
        return open_indexed(indices[0])
    if not files:
        pickles = [x.name for x in path.iterdir() if x.suffix in stand_ins.PICKLES]
        if pickles:
            raise ValueError(stand_ins.PICKLE.format(where=path, file=min(pickles)))
        raise FileNotFoundError(f"{path} holds no {SUFFIX} files")
    return _merged(path, files)


def _merged(path: Path, files: list[Path]) -> dict[str, np.ndarray]:
    """Map the tensors of files without an index, which must have distinct names."""
    tensors: dict[str, np.ndarray] = {}
    where: dict[str, str] = {}
    for file in files:
        for name in _siblings(file.name):
            if not (path / name).is_file():
                raise FileNotFoundError(f"{path} lacks {name}: download it")
        for name, tensor in matrices.map_tensors(file).items():
            if name in tensors:
                raise ValueError(
                    f"{path}: the tensor {name} is in both {where[name]} and "
                    f"{file.name}"
                )
            tensors[name], where[name] = tensor, file.name
    return tensors


def map_shards(folder: Path, stem: str = "model") -> dict[str, np.ndarray] | None:
    """Map the tensors of shards whose index is missing, or return None without any.

    Args:
        folder: A folder.
        stem: Beginning of the names `stem-00001-of-00002.safetensors`.

    Raises:
        ValueError: As `map_all` does.
        OSError: If a shard is missing.
    """
    shards = _shards(sorted(folder.glob(f"*{SUFFIX}")), stem)
    return _merged(folder, shards) if shards else None


def _siblings(name: str) -> list[str]:
    """Return the names of all shards of the checkpoint that a shard belongs to."""
    shard = re.fullmatch(_SHARD, name)
    if shard is None:
        return []
    stem, count = shard["stem"], shard["count"]
    numbers = range(1, int(count) + 1)
    return [f"{stem}-{number:05}-of-{count}{SUFFIX}" for number in numbers]


def _shards(files: list[Path], stem: str) -> list[Path]:
    """Return the shards of a checkpoint among files."""
    matched = ((file, re.fullmatch(_SHARD, file.name)) for file in files)
    return [file for file, match in matched if match and match["stem"] == stem]


def open_indexed(index: Path) -> dict[str, np.ndarray]:
    """Map the tensors of all shards of an index.

    Raises:
        ValueError: If the index names a file outside of its folder, or does not fit
            the shards.
        OSError: If a shard is missing.
    """
    folder, where = index.parent, _weight_map(index)
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(where.values())):
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise ValueError(f"{index} names {shard!r}, outside of its folder")
        if not (folder / shard).is_file():
            raise FileNotFoundError(
                f"{folder} lacks {shard}, which its index names: download it"
            )
        held = matrices.map_tensors(folder / shard)
        wanted = [name for name, place in where.items() if place == shard]
        missing = sorted(set(wanted) - set(held))
        if missing:
            raise ValueError(
                f"{folder / shard} lacks {missing[0]}, which the index names"
            )
        extra = sorted(set(held) - set(wanted))
        if extra and extra[0] in where:
            raise ValueError(
                f"{folder}: the tensor {extra[0]} is in both {where[extra[0]]} and "
                f"{shard}"
            )
        if extra:
            raise ValueError(f"{folder / shard} has {extra[0]}, which the index lacks")
        tensors |= {name: held[name] for name in wanted}
    return tensors


def shards_of(index: Path) -> list[str]:
    """Return the names of the shards of an index.

    Raises:
        ValueError: If it is no index.
    """
    return sorted(set(_weight_map(index).values()))


def _weight_map(index: Path) -> dict[str, str]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(
        isinstance(x, str) for x in where.values()
    ):
        raise ValueError(f"{index} has no weight_map of names and files")
    return where


def is_matrix(array: np.ndarray) -> bool:
    """Return whether a tensor is a single real matrix that is not empty."""
    is_real = array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16
    return is_real and array.ndim == 2 and array.size > 0


def is_float8(array: np.ndarray) -> bool:
    """Return whether a tensor is a matrix of eight-bit floats.

    Such numbers mean nothing without their scales, which are other tensors.

    >>> is_float8(np.ones((2, 3), ml_dtypes.float8_e4m3fn)), is_float8(np.ones((2, 3)))
    (True, False)
    """
    return array.ndim == 2 and str(array.dtype).startswith("float8")
