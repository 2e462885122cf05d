r"""Text from local files, and from datasets by name.

A perplexity depends on how rows are joined into one text. `"none"` does not change a
text file, and joins rows of other files by blank lines. `"blank-lines"` treats each
line of a text file as a row, like Hugging Face's `wikitext`: a line keeps its newline,
a blank line becomes the empty string, and rows are joined by blank lines. The published
figures of GPT-2 and OPT on WikiText use the second way.

>>> from_rows(["One.\n", "", "Two.\n"]).text
'One.\n\n\n\n\nTwo.\n'
"""

import dataclasses
import functools
import gzip
import hashlib
import importlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

SUFFIXES = (".txt", ".raw", ".jsonl", ".jsonl.gz", ".parquet")
"""Suffixes of the files that `read_text` recognises."""

DATASET = "dataset:"
"""Prefix of the name of a dataset."""

Join = Literal["none", "blank-lines"]

_SYNTAX = f"{DATASET}OWNER/NAME:SPLIT or {DATASET}OWNER/NAME:CONFIG:SPLIT"


@dataclasses.dataclass(frozen=True)
class Text:
    """Rows, and the text that they form together.

    Attributes:
        rows: The rows; for a text file its lines, joined as in the description of the
            module, or without joining those that are not blank.
        text: The whole text, which is tokenised at once.
        join: Method of joining the rows.
        source: File or name of the dataset.
    """

    rows: tuple[str, ...] = dataclasses.field(repr=False)
    text: str = dataclasses.field(repr=False)
    join: str
    source: str

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the text in UTF-8, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def from_rows(rows: Iterable[str], *, source: str = "rows") -> Text:
    """Return rows joined by blank lines."""
    rows = tuple(rows)
    return Text(rows, "\n\n".join(rows), "blank-lines", source)


def read_text(
    path_or_name: str | Path, *, column: str = "text", join: Join = "none"
) -> Text:
    """Read a text.

    Args:
        path_or_name: A `.txt`, `.raw`, `.jsonl`, `.jsonl.gz` or `.parquet` file (any
            other is read as text), or the name of a dataset,
            `dataset:OWNER/NAME:SPLIT` or `dataset:OWNER/NAME:CONFIG:SPLIT`, which may
            need a network.
        column: The field with the text, where rows have several.
        join: `"none"` or `"blank-lines"`, as described in the module; they differ only
            for text files.

    Returns:
        `Text`.

    Raises:
        ValueError: If the content is malformed; the message says where.
        OSError: If the file cannot be read.
        ImportError: If a library is missing; the message names the extra to install.
    """
    if join not in ("none", "blank-lines"):
        raise ValueError(f"join is {join!r}; write none or blank-lines")
    name = str(path_or_name)
    rows = _rows(path_or_name, column)
    if rows is not None:
        return _filled(from_rows(rows, source=name))
    path = Path(path_or_name)
    content = _decode(path, path.read_bytes())
    # Python's splitlines also splits at characters that end no line of a file.
    lines = list(io.StringIO(content, newline=None))
    if join == "blank-lines":
        joined = (line if line.strip() else "" for line in lines)
        return _filled(from_rows(joined, source=name))
    kept = tuple(line.rstrip("\n") for line in lines if line.strip())
    return _filled(Text(kept, content, join, name))


def stream(
    path_or_name: str | Path, *, column: str = "text", size: int = 2**20
) -> Iterator[Iterator[str]]:
    """Yield the documents of a text in pieces, without reading all of it at once.

    Args:
        path_or_name: As for `read_text`.
        column: The field with the text, where rows have several.
        size: Number of characters after which a piece ends with the next paragraph.

    Yields:
        An iterator over the pieces of each document: of each row that is not blank, or
        of a whole text file.

    Raises:
        ValueError, OSError, ImportError: As for `read_text`; a text without words is
            refused at its end.
    """
    has_words = False

    def watched(lines):
        nonlocal has_words
        for piece in _pieces(lines, size):
            has_words = has_words or bool(piece.strip())
            yield piece

    rows = _rows(path_or_name, column)
    if rows is None:
        yield watched(_lines(Path(path_or_name)))
    for row in rows or ():
        if row.strip():
            yield watched(iter(row.splitlines(keepends=True)))
    if not has_words:
        raise ValueError(f"{path_or_name} is empty")


def _pieces(lines: Iterator[str], size: int) -> Iterator[str]:
    """Yield pieces of joined lines; all but the last end with a blank line."""
    piece: list[str] = []
    length = 0
    for line in lines:
        piece.append(line)
        length += len(line)
        if length >= size and not line.strip():
            yield "".join(piece)
            piece, length = [], 0
    if piece:
        yield "".join(piece)


def _rows(path_or_name: str | Path, column: str) -> Iterator[str] | None:
    """Return the rows of a file or of a dataset, or None for a text file."""
    name, path = str(path_or_name), Path(path_or_name)
    if name.startswith(DATASET):
        return iter(_dataset_rows(name, column))
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a text file")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}; a dataset is written {_SYNTAX}")
    if path.suffix == ".parquet":
        return _parquet_rows(path, column)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _json_rows(path, column)
    return None


def _filled(text: Text) -> Text:
    if not text.text.strip():
        raise ValueError(f"{text.source} is empty")
    return text


def _decode(path: Path, content: bytes, begin: int = 0) -> str:
    try:
        # The byte order mark is not a part of the text.
        return content.decode("utf-8" if begin else "utf-8-sig")
    except UnicodeDecodeError as error:
        place, byte = begin + error.start, content[error.start]
        raise ValueError(
            f"{path} is not UTF-8: byte {place} is {byte:#04x}; "
            "convert it first, for example with iconv"
        ) from error


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file, gzipped or not, with their newlines."""
    begin = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for line in file:
                yield _decode(path, line, begin)
                begin += len(line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}: the file is truncated or not a gzip file ({error})"
        ) from error


def _json_rows(path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: not JSON ({error})") from error
        if not isinstance(fields, dict) or column not in fields:
            raise ValueError(
                f"{path}, row {number}: no field {column!r}{_instead(fields)}"
            )
        yield _string(fields[column], f"{path}, row {number}", column)


def _parquet_rows(path: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(_missing("Parquet files", "pyarrow")) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise KeyError(column)
            number = 0
            for batch in file.iter_batches(columns=[column]):
                for value in batch[column].to_pylist():
                    number += 1
                    yield _string(value, f"{path}, row {number}", column)
    except KeyError as error:
        raise ValueError(f"{path}: no column {column!r}{_instead(names)}") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: the file is truncated or not a Parquet file ({error})"
        ) from error


def _dataset_rows(name: str, column: str) -> list[str]:
    parts = name.removeprefix(DATASET).split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise ValueError(f"{name} is not the name of a dataset; write {_SYNTAX}")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(_missing("datasets by name", "datasets")) from error
    *path, split = parts
    try:
        dataset = datasets.load_dataset(*path, split=split)
    except Exception as error:  # from the network, the hub, or the library
        raise ValueError(
            f"{name} cannot be loaded ({type(error).__name__}: {error}); without a "
            f"network, give a local file: {', '.join(SUFFIXES)}"
        ) from error
    if column not in dataset.column_names:
        raise ValueError(
            f"{name}: no column {column!r}{_instead(dataset.column_names)}"
        )
    return [
        _string(value, f"{name}, row {number}", column)
        for number, value in enumerate(dataset[column], 1)
    ]


def _string(value: object, place: str, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: {column!r} is {value!r:.40}, not a string")
    try:
        value.encode()  # JSON can escape a lone surrogate, which is not a character
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: {column!r} is not Unicode ({error})") from error
    return value


def _instead(names: object) -> str:
    """Return a list of the existing names for a message, or an empty string."""
    if not isinstance(names, Sequence | dict) or isinstance(names, str) or not names:
        return ""
    return f"; there are {', '.join(map(str, names))}"


def _missing(what: str, library: str) -> str:
    return f"reading {what} needs {library}: pip install 'kronjax[data]'"
