r"""Atomic writes of files, and text that is safe to print; without jax.

Every write goes to a temporary file in the same folder, which is renamed when it is
complete, so that an interruption leaves the old file.

>>> readable(Path("demo.png"))
'demo.png'
>>> printable("a\x1b[31m b")
'a\\x1b[31m b'
"""

import os
from pathlib import Path


def check_output(path: Path, suffix: str, source: Path | None = None) -> None:
    """Check in advance that `path` can be written.

    Args:
        path: The output file.
        suffix: Required suffix of its name.
        source: The input file, which must not be overwritten.

    Raises:
        ValueError: If the suffix is wrong or `path` is the input.
        OSError: If the folder is missing or not writable.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    if path.suffix != suffix:
        raise ValueError(f"cannot write {path}: its name must end in {suffix}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no such folder")
    if path.exists():
        if source is not None and source.exists() and path.samefile(source):
            raise ValueError(f"cannot write {path}: it is the input")
        if not os.access(path, os.W_OK):
            raise PermissionError(f"cannot write {path}: it is read-only")
    _try(path, path)


def check_folder(path: Path) -> None:
    """Check in advance that files can be written into a folder.

    Raises:
        OSError: If the folder is not writable.
    """
    _try(path / "trial", path)


def _try(path, output):
    # Access bits are unreliable on network and read-only file systems.
    probe = _temporary_name(path)
    try:
        probe.touch(exist_ok=False)
    except OSError as error:
        raise type(error)(f"cannot write {output}: {error.strerror}") from error
    probe.unlink()


def write(path: Path, content: bytes) -> None:
    """Write a file completely or not at all.

    Args:
        path: The file, replaced if it exists.
        content: The content.

    Raises:
        OSError: If the file cannot be written; the message names it.
    """
    path = Path(path)
    temporary = _temporary_name(path)
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # the error of a full disk names no file
        temporary.unlink(missing_ok=True)
        raise type(error)(f"cannot write {path}: {error.strerror or error}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def readable(path: Path) -> str:
    """Return the name of a file as text that can be encoded.

    Names are bytes for the system; Python decodes bytes that are not UTF-8 to lone
    surrogates, which neither a terminal nor the metadata of safetensors can encode.
    """
    return os.fsencode(path).decode(errors="replace")


def printable(name: str) -> str:
    """Return a name with control characters escaped."""
    return "".join(
        x if x.isprintable() else x.encode("unicode_escape").decode() for x in name
    )


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
