"""Reading of matrices and writing of factors, without jax.

`read` reads one matrix (or one stack of matrices) from a `.npy`, `.npz` or
`.safetensors` file. From `.npy` and `.safetensors` files only the selected rows and
columns are read. Nothing is ever unpickled. A file of `write_terms` is read as the
matrix that its factors multiply out to.

>>> select("-2:", 8)
slice(6, 8, None)
"""

import contextlib
import dataclasses
import difflib
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from kronjax.io import atomic, stand_ins
from kronjax.linalg import dense

FORMAT = "kronjax"
"""Value of the metadata entry `format` in the files of `write_terms`."""

SUFFIXES = (".npy", ".npz", ".safetensors")
"""Suffixes of the files that `read` accepts."""

# Not the loader of safetensors, whose support of bfloat16 depends on its version.
SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}

KEPT_DTYPES = {
    "C64": np.complex64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}
"""Dtypes of tensors that can be kept as they are, but not be computed with."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A matrix and its origin.

    Attributes:
        matrix: `[..., m, n]`, the selected part, transposed if requested.
        name: Name of the tensor, or None for an array without a name.
        a_shape: `(m1, n1)` of the factors that were multiplied out.
        rank: Number of terms; both are None for an ordinary matrix.
        rest: `((m1, n1), rank)` of the further configurations of a heterogeneous sum.
    """

    matrix: np.ndarray
    name: str | None = None
    a_shape: tuple[int, int] | None = None
    rank: int | None = None
    rest: tuple[tuple[tuple[int, int], int], ...] = ()


def read(
    path: Path,
    *,
    tensor: str | None = None,
    rows: str | None = None,
    columns: str | None = None,
    transpose: bool = False,
) -> Source:
    """Read one matrix, or one stack of matrices with leading batch axes.

    Args:
        path: A `.npy`, `.npz` or `.safetensors` file.
        tensor: Name of the array, needed if the file has several matrices.
        rows: `"a:b"`, the rows to select, as in Python; all by default.
        columns: `"a:b"`, the columns to select.
        transpose: Whether to transpose the selected part.

    Returns:
        The matrix in the dtype of the file, and its name.

    Raises:
        ValueError: If the file or the tensor is unsuitable; the message says why.
        OSError: If the file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix in stand_ins.PICKLES:
        raise ValueError(
            f"{path} is a pickle, or may be one, which could run any code and is never "
            "opened: store the matrix by numpy.save or safetensors"
        )
    openers = {".npy": _open_npy, ".npz": _open_npz, ".safetensors": _open_safetensors}
    if path.suffix not in openers:
        raise ValueError(
            f"{path} is not one of the files that can be read: {', '.join(SUFFIXES)}"
        )
    source = openers[path.suffix](path, tensor)
    array = source.matrix
    _check_numbers(array, f"{path}: {source.name}" if source.name else str(path))
    row_slice = select(rows, array.shape[-2], "rows")
    column_slice = select(columns, array.shape[-1], "columns")
    array = array[..., row_slice, column_slice]
    if transpose:
        array = array.swapaxes(-1, -2)
    if rows or columns or transpose:  # no longer the product of the factors
        source = dataclasses.replace(source, a_shape=None, rank=None, rest=())
    # A copy, because the file may change or vanish while the solver works.
    native = array.dtype.newbyteorder("=")
    return dataclasses.replace(source, matrix=np.array(array, native, order="C"))


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """Map every tensor of a `.safetensors` file into memory, without reading it.

    Args:
        path: The file, which must not change while the arrays are in use.

    Returns:
        Read-only arrays by name, in the dtype of the file.

    Raises:
        ValueError: If the file is truncated, not a safetensors file, or has a tensor of
            a dtype that NumPy lacks.
        OSError: If the file cannot be read.
    """
    names, _ = _safetensors_names(path)
    header, offset = _safetensors_header(path)
    return {name: _map_tensor(path, header, offset, name) for name in names}


def load(content: bytes) -> dict[str, np.ndarray]:
    """Return the tensors of the content of a safetensors file, by name.

    Raises:
        SafetensorError: If it is truncated, or no such file.
    """
    return {
        name: np.frombuffer(entry["data"], SAFETENSORS_DTYPES[entry["dtype"]]).reshape(
            entry["shape"]
        )
        for name, entry in safetensors.deserialize(content)
    }


def select(text: str | None, size: int, axis: str = "rows") -> slice:
    """Return the slice `"a:b"` of an axis of `size` entries.

    Raises:
        ValueError: If `text` is not a slice, selects nothing or exceeds the axis.
    """
    if text is None:
        return slice(0, size)
    match = re.fullmatch(r"\s*(-?\d+)?\s*:\s*(-?\d+)?\s*", text)
    if not match:
        raise ValueError(f"--{axis} {text}: write a:b, for example 0:{size}")
    start, stop = (
        default if end is None else int(end)
        for end, default in zip(match.groups(), (0, size), strict=True)
    )
    if not (-size <= start <= size and -size <= stop <= size):
        raise ValueError(f"--{axis} {text}: there are {size} {axis}, 0:{size}")
    start, stop = (end + size if end < 0 else end for end in (start, stop))
    if start >= stop:
        raise ValueError(f"--{axis} {text} selects none of the {size} {axis}")
    return slice(start, stop)


def write_terms(
    path: Path,
    a: np.ndarray,
    b: np.ndarray,
    metadata: Mapping[str, str],
    rest: Sequence[tuple[np.ndarray, np.ndarray]] = (),
) -> None:
    """Write the factors of a Kronecker sum as safetensors, with metadata.

    Args:
        path: The file, replaced completely or not at all.
        a: `[..., r, m1, n1]`, the left factors.
        b: `[..., r, m2, n2]`, the right factors.
        metadata: Strings about the factors.
        rest: Factors of further configurations, written as `a1`, `b1`, `a2`, …
    """
    atomic.write(path, terms_bytes([(a, b), *rest], metadata))


def terms_bytes(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], metadata: Mapping[str, str]
) -> bytes:
    """Return the content of the file of `write_terms`.

    Args:
        pairs: The factors `a` and `b` of every configuration.
        metadata: Strings about the factors.
    """
    tensors = {
        f"{name}{number or ''}": np.ascontiguousarray(x)
        for number, pair in enumerate(pairs)
        for name, x in zip("ab", pair, strict=True)
    }
    return safetensors.numpy.save(tensors, {"format": FORMAT, **metadata})


def _open_npy(path: Path, tensor: str | None) -> Source:
    if tensor is not None:
        raise ValueError(f"{path} holds one array without a name; leave out --tensor")
    with _numpy_errors(path):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            array.close()
            raise ValueError("a zip archive; should it end in .npz?")
        return Source(array)


def _open_npz(path: Path, tensor: str | None) -> Source:
    # np.load leaves a file open that it opened itself and could not read.
    with _numpy_errors(path), open(path, "rb") as file:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("not a zip archive")
        names = archive.files
        wanted = names if tensor is None else {tensor} & set(names)
        arrays = {name: archive[name] for name in wanted}
    # A zip archive may contain other files, say a README.txt, which come as bytes.
    other = [name for name, array in arrays.items() if isinstance(array, bytes)]
    if tensor in other:
        raise ValueError(f"{path}: {tensor} is a file in the archive, but no array")
    names = [name for name in names if name not in other]
    matrices = [name for name in names if name in arrays and arrays[name].ndim >= 2]
    name = _choose(path, tensor, matrices, names)
    return Source(arrays[name], name)


@contextlib.contextmanager
def _numpy_errors(path: Path) -> Iterator[None]:
    """Replace the messages of NumPy, some of which advise to unpickle.

    Any exception of a damaged file is caught. NumPy parses a header as Python and does
    not validate it, so that a truncated header raises a TokenError, a shape (10**30, 2)
    an OverflowError and a shape (True, True) a TypeError.
    """
    try:
        # NumPy refuses a shape of 2**62 by 2**62, but warns before.
        with warnings.catch_warnings(action="ignore"):
            yield
    except RuntimeError as error:  # encrypted, or of an unsupported compression
        raise ValueError(f"{path} cannot be read: {error}") from error
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # from the system; errors of bz2 about its data have no errno
        reason = str(error)
        if "Object arrays" in reason or "Python objects" in reason:
            raise ValueError(
                f"{path} holds Python objects, which are refused: they are never "
                "unpickled; store plain numbers"
            ) from error
        other = stand_ins.describe_file(path)
        # NumPy's own files are archives, and the remedy for a pickle is for models.
        if other not in (None, stand_ins.ARCHIVE, stand_ins.PICKLED):
            raise ValueError(f"{path}: {other}") from error
        if "pickle" in reason:  # the guess of NumPy for any unknown format
            reason = "pickles are never unpickled"
        raise ValueError(
            f"{path}: the file is truncated or not an {path.suffix[1:]} file ({reason})"
        ) from error


def _safetensors_names(path: Path) -> tuple[list[str], dict[str, str]]:
    """Return the names and the metadata of a file, after validation."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return list(file.keys()), file.metadata() or {}
    except safetensors.SafetensorError as error:
        other = stand_ins.describe_file(path)
        raise ValueError(
            f"{path}: "
            + (other or f"the file is truncated or not a safetensors file ({error})")
        ) from error


def _open_safetensors(path: Path, tensor: str | None) -> Source:
    names, metadata = _safetensors_names(path)
    if metadata.get("format") == FORMAT and tensor is None:
        return _multiply_out(path, names)
    header, offset = _safetensors_header(path)
    matrices = [name for name in names if len(header[name]["shape"]) >= 2]
    name = _choose(path, tensor, matrices, names)
    return Source(_map_tensor(path, header, offset, name), name)


def _multiply_out(path: Path, names: Sequence[str]) -> Source:
    """Return the matrix of a file of `write_terms`."""
    if {"a", "b"} - set(names):
        raise ValueError(f"{path} says that it is a kronjax file but has no a and b")
    header, offset = _safetensors_header(path)
    count = len(names) // 2
    pairs = [
        [_map_tensor(path, header, offset, f"{x}{number or ''}") for x in "ab"]
        for number in range(count)
        if f"a{number or ''}" in names and f"b{number or ''}" in names
    ]
    shapes = {_multiplied_shape(path, *pair) for pair in pairs}
    if len(shapes) > 1:
        raise ValueError(f"{path}: the sums have different shapes: {sorted(shapes)}")
    [shape] = shapes
    # Factors of 100000 by 1 and 1 by 100000 are small, but their product has 80 GB, and
    # there are three copies in float64 at a time.
    needed, memory = 3 * 8 * math.prod(shape), physical_memory()
    if needed > memory:
        raise ValueError(
            f"{path} multiplies out to a matrix of shape {shape}: that takes "
            f"{needed / 1e9:,.0f} GB of memory, of {memory / 1e9:,.0f} GB in all"
        )
    # In float64, so that the matrix is rounded only once.
    matrix = sum(
        dense.multiply_out(*(np.asarray(x, np.float64) for x in pair)) for pair in pairs
    )
    (a_shape, rank), *rest = ((a.shape[-2:], a.shape[-3]) for a, _ in pairs)
    matrix = np.asarray(matrix).astype(pairs[0][0].dtype)
    return Source(matrix, None, a_shape, rank, tuple(rest))


def _multiplied_shape(path, a, b):
    if a.ndim < 3 or b.ndim != a.ndim or a.shape[:-2] != b.shape[:-2]:
        raise ValueError(
            f"{path}: factors of shapes {a.shape} and {b.shape} do not belong together"
        )
    (m1, n1), (m2, n2) = a.shape[-2:], b.shape[-2:]
    return *a.shape[:-3], m1 * m2, n1 * n2


def physical_memory() -> int:
    """Return the bytes of physical memory, or 64 GiB if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return 2**36


def _safetensors_header(path: Path) -> tuple[dict, int]:
    """Return the entries of the header and the offset of the data, for a valid file."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def _map_tensor(path: Path, header: dict, offset: int, name: str) -> np.ndarray:
    entry = header[name]
    shape = tuple(entry["shape"])
    known = {**SAFETENSORS_DTYPES, **KEPT_DTYPES}
    if entry["dtype"] not in known:
        raise ValueError(
            f"{path}: tensor {name} has dtype {entry['dtype']}; real numbers are "
            f"needed: {', '.join(SAFETENSORS_DTYPES)}"
        )
    dtype = np.dtype(known[entry["dtype"]])
    if math.prod(shape) == 0:  # nothing to map; the caller refuses it
        return np.empty(shape, dtype)
    start = offset + entry["data_offsets"][0]
    # Not the subclass, whose views keep a reference to the file.
    return np.asarray(np.memmap(path, dtype, mode="r", offset=start, shape=shape))


def _choose(
    path: Path, tensor: str | None, matrices: Sequence[str], names: Sequence[str]
) -> str:
    """Return the name of the tensor to read, or refuse with a list of names."""
    if tensor is None:
        candidates = matrices or names
        if len(candidates) == 1:
            return candidates[0]
        if not matrices:
            raise ValueError(f"{path} holds no matrix; it holds {_listing(names)}")
        raise ValueError(
            f"{path} holds {len(matrices)} matrices; choose one by --tensor: "
            f"{_listing(matrices)}"
        )
    if tensor in names:
        return tensor
    close = difflib.get_close_matches(tensor, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else _listing(names)
    raise ValueError(f"{path} has no tensor {tensor}; {hint}")


def _listing(names: Sequence[str], most: int = 12) -> str:
    rest = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *rest]) or "nothing"


def _check_numbers(array: np.ndarray, name: str) -> None:
    dtype = array.dtype
    if dtype.kind == "c":
        raise ValueError(
            f"{name} is complex ({dtype}); only real matrices are supported"
        )
    if dtype.kind not in "fiu" and dtype != ml_dtypes.bfloat16:
        # NumPy stores the bytes of a bfloat16 array without its dtype.
        hint = "; store bfloat16 as .safetensors" if dtype.str == "|V2" else ""
        raise ValueError(f"{name} has dtype {dtype}, not real numbers{hint}")
    if array.ndim < 2:
        kind = "a vector" if array.ndim else "a single number"
        raise ValueError(f"{name} is {kind} of shape {array.shape}, not a matrix")
    if array.size == 0:
        raise ValueError(f"{name} is empty: its shape is {array.shape}")
