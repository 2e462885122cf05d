"""Headers of GGUF files: the settings, and the positions of the tensors.

    "GGUF" version counts | (key kind value)* | (name shape kind offset)* | data

The file is mapped, not read. Every count and length in it is compared with the number
of remaining bytes before it is used: a file of a hundred bytes may claim to hold 10^18
tokens. The package `gguf` decodes the blocks of quantised numbers.

References: the specification of the format, ggml-org/ggml, docs/gguf.md, versions 2, 3.

>>> import io, numpy as np
>>> read_header(np.frombuffer(b"GGUF" + bytes([3] + 19 * [0]), np.uint8)).settings
{}
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
"""Supported versions of the format; both have the same layout."""

MAX_AXES = 4

_STRING, _ARRAY = 8, 9
_NUMBERS = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file, which `np.asarray` reads.

    Attributes:
        shape: Shape as in files of Hugging Face, `[n_out, n_in]` for a matrix.
        load: Function that returns the entries, float32, in that shape.
    """

    shape: tuple[int, ...]
    load: Callable[[], np.ndarray] = dataclasses.field(repr=False)

    dtype = np.dtype(np.float32)

    @property
    def T(self) -> np.ndarray:
        """The transposed entries."""
        return self.load().T

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """Return the entries, which are dequantised at every call."""
        return self.load().astype(dtype or self.dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class Header:
    """The settings of a file, and its tensors under their names in the file.

    Attributes:
        settings: Values by key; arrays are lists of strings, or NumPy arrays.
        tensors: Tensors by name, with shapes in NumPy's order, the reverse of the
            file's.
    """

    settings: dict[str, Any]
    tensors: dict[str, Tensor]


def read_header(data: np.ndarray) -> Header:
    """Return the header of a GGUF file.

    Args:
        data: The complete file, best mapped into memory, `[n]`, uint8.

    Raises:
        ValueError: If it is not a GGUF file, is cut short, or contradicts itself.
    """
    reader = _Reader(data)
    if bytes(data[:4]) != MAGIC:
        raise ValueError("it is not a GGUF file: it does not begin with GGUF")
    reader.offset = 4
    version = int(reader.number(4))
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        kind = "big-endian" if swapped in VERSIONS else f"version {version}"
        raise ValueError(
            f"it is a {kind} GGUF file; supported are versions 2 and 3, little-endian"
        )
    num_tensors, num_settings = int(reader.number(10)), int(reader.number(10))
    settings = {}
    for _ in range(num_settings):
        key = reader.string()
        if key in settings:
            raise ValueError(f"it holds the setting {key} twice")
        settings[key] = reader.value(int(reader.number(4)))
    entries = [reader.entry() for _ in range(num_tensors)]
    align = settings.get("general.alignment", 32)
    if not isinstance(align, int) or align < 1 or align & (align - 1):
        raise ValueError(f"general.alignment is {align!r}; it must be a power of two")
    start = -(-reader.offset // align) * align
    tensors = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise ValueError(f"it holds the tensor {name} twice")
        tensors[name] = _tensor(data, name, shape, kind, start + offset)
    return Header(settings, tensors)


class _Reader:
    """A position in the header; every step is checked against the end of the file."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.offset = data, 0

    def take(self, count: int, size: int = 1) -> np.ndarray:
        """Return the next `count * size` bytes."""
        stop = self.offset + count * size
        if stop > self.data.size:
            raise ValueError(
                f"it is cut short, or not a GGUF file: byte {self.offset} says that "
                f"{count * size} bytes follow, but the file has only {self.data.size}"
            )
        taken = self.data[self.offset : stop]
        self.offset = stop
        return taken

    def number(self, kind: int) -> int | float | bool:
        dtype = _NUMBERS[kind]
        return self.take(dtype.itemsize).view(dtype)[0].item()

    def string(self) -> str:
        length = int.from_bytes(self.take(8).tobytes(), "little")
        return str(self.take(length).tobytes(), "utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _NUMBERS:
            return self.number(kind)
        if kind != _ARRAY:
            raise ValueError(f"a setting is of the unknown kind {kind}")
        kind, count = int(self.number(4)), int(self.number(10))
        if kind in _NUMBERS:
            dtype = _NUMBERS[kind]
            return np.array(self.take(count, dtype.itemsize).view(dtype))
        if kind != _STRING:
            raise ValueError(f"a setting is an array of the kind {kind}")
        return [self.string() for _ in range(count)]

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return the name, shape, kind of numbers and offset of a tensor."""
        name, axes = self.string(), int(self.number(4))
        if not 1 <= axes <= MAX_AXES:
            raise ValueError(
                f"tensor {name} has {axes} axes; it must have 1 to {MAX_AXES}"
            )
        shape = tuple(int(self.number(10)) for _ in range(axes))[::-1]
        return name, shape, int(self.number(4)), int(self.number(10))


def _tensor(data, name, shape, kind, start) -> Tensor:
    """Return a tensor, after a check that its entries lie within the file."""
    constants = backend().constants
    try:
        quantization = constants.GGMLQuantizationType(kind)
        block, size = constants.GGML_QUANT_SIZES[quantization]
    except (KeyError, ValueError):
        raise ValueError(f"tensor {name} is of the unknown kind {kind}") from None
    if min(shape) < 1 or shape[-1] % block:
        raise ValueError(
            f"tensor {name} has shape {shape}, whose rows are not positive multiples "
            f"of the {block} numbers in a block of {quantization.name}"
        )
    stop = start + math.prod(shape) // block * size
    if stop > data.size:
        raise ValueError(
            f"it is cut short: tensor {name} ends at byte {stop}, the file at "
            f"{data.size}"
        )

    def load() -> np.ndarray:
        rows = data[start:stop].reshape(-1, shape[-1] // block * size)
        try:
            numbers = backend().quants.dequantize(rows, quantization)
        except NotImplementedError as error:
            raise ValueError(
                f"tensor {name} is stored as {quantization.name}, which the package "
                "gguf cannot decode"
            ) from error
        # A tensor stored as float32 is a view of the file, which may be replaced.
        if np.may_share_memory(numbers, data):
            numbers = numbers.copy()
        return numbers.reshape(shape)

    return Tensor(shape, load)


def backend() -> Any:
    """Return the package `gguf`.

    Raises:
        ImportError: If it is missing; the message names the extra to install.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "GGUF files need the package gguf: pip install 'kronjax[gguf]'"
        ) from error
    return gguf
