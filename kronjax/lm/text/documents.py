r"""Text from local files, and from datasets when their names are asked for.

A perplexity depends on how rows became one text. `"none"` leaves a text file as it
stands, and joins rows of other files by blank lines. `"blank-lines"` takes each line of
a text file as a row, the way Hugging Face's `wikitext` does: a line keeps its newline,
a blank one becomes the empty string, and a blank line is put between all of them. The
published figures of GPT-2 and OPT on WikiText were made in the second way.

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
"""What `read` understands."""

DATASET = "dataset:"
"""What stands before the name of a dataset."""

Join = Literal["none", "blank-lines"]

_SYNTAX = f"{DATASET}OWNER/NAME:SPLIT or {DATASET}OWNER/NAME:CONFIG:SPLIT"


@dataclasses.dataclass(frozen=True)
class Text:
    """Rows, and the one text that they make.

    Attributes:
        rows: Of a text file the lines, as `join` says; without joining, those that are
            not blank.
        text: What is tokenised as a whole.
        join: How `text` came from the file.
        source: Where it comes from.
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
        column: Where rows have several fields, the one with the text.
        join: `"none"` or `"blank-lines"`; see the module. Of a `.txt` file alone they
            differ.

    Returns:
        `Text`.

    Raises:
        ValueError: If the content is not what it should be; says where.
        OSError: If the file cannot be read.
        ImportError: If a library is missing; says which extra brings it.
    """
    if join not in ("none", "blank-lines"):
        raise ValueError(f"join is {join!r}; write none or blank-lines")
    name = str(path_or_name)
    rows = _rows(path_or_name, column)
    if rows is not None:
        return _filled(from_rows(rows, source=name))
    path = Path(path_or_name)
    content = _decode(path, path.read_bytes())
    # Other characters may end a line to Python's splitlines, but not in a file.
    lines = list(io.StringIO(content, newline=None))
    if join == "blank-lines":
        joined = (line if line.strip() else "" for line in lines)
        return _filled(from_rows(joined, source=name))
    kept = tuple(line.rstrip("\n") for line in lines if line.strip())
    return _filled(Text(kept, content, join, name))


def stream(
    path_or_name: str | Path, *, column: str = "text", size: int = 2**20
) -> Iterator[Iterator[str]]:
    """Yield the documents of a text in pieces, without holding all of it.

    Args:
        path_or_name: As for `read`.
        column: Where rows have several fields, the one with the text.
        size: Characters after which a piece ends with the next paragraph.

    Yields:
        Each row that is not blank, or a text file as the one document that it is: the
        pieces that make it.

    Raises:
        ValueError, OSError, ImportError: As `read`; for a text without any word once
            all of it is read.
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
    """Yield lines joined to pieces that end with a blank one, but for the last."""
    held: list[str] = []
    length = 0
    for line in lines:
        held.append(line)
        length += len(line)
        if length >= size and not line.strip():
            yield "".join(held)
            held, length = [], 0
    if held:
        yield "".join(held)


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
        # A mark of the byte order is no text.
        return content.decode("utf-8" if begin else "utf-8-sig")
    except UnicodeDecodeError as error:
        place, byte = begin + error.start, content[error.start]
        raise ValueError(
            f"{path} is not UTF-8: byte {place} is {byte:#04x}; "
            "convert it first, for example with iconv"
        ) from error


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file, gzipped or not, each with the newline that ends it."""
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
        raise ValueError(f"{name} is no name of a dataset; write {_SYNTAX}")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(_missing("datasets by name", "datasets")) from error
    *path, split = parts
    try:
        found = datasets.load_dataset(*path, split=split)
    except Exception as error:  # of the network, of the hub, or of the library
        raise ValueError(
            f"{name} cannot be loaded ({type(error).__name__}: {error}); without a "
            f"network, give a local file: {', '.join(SUFFIXES)}"
        ) from error
    if column not in found.column_names:
        raise ValueError(f"{name}: no column {column!r}{_instead(found.column_names)}")
    return [
        _string(value, f"{name}, row {number}", column)
        for number, value in enumerate(found[column], 1)
    ]


def _string(value: object, place: str, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: {column!r} is {value!r:.40}, not a string")
    try:
        value.encode()  # JSON can escape half of a pair, which is no character
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: {column!r} is no Unicode ({error})") from error
    return value


def _instead(names: object) -> str:
    """Say which names there are, if there are any."""
    if not isinstance(names, Sequence | dict) or isinstance(names, str) or not names:
        return ""
    return f"; there are {', '.join(map(str, names))}"


def _missing(what: str, library: str) -> str:
    return f"reading {what} needs {library}: pip install 'kronjax[data]'"
