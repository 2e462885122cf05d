r"""Files written as a whole or not at all, and text that is safe to print; without jax.

Every write goes to a temporary name in the same folder and is renamed when complete, so
that an interruption leaves what was there.

>>> readable(Path("demo.png"))
'demo.png'
>>> printable("a\x1b[31m b")
'a\\x1b[31m b'
"""

import os
from pathlib import Path


def check_output(path: Path, suffix: str, source: Path | None = None) -> None:
    """Find out now whether `path` can be written later.

    Args:
        path: The file to come.
        suffix: What its name must end in.
        source: The input, which must not be overwritten.

    Raises:
        ValueError: If the suffix is wrong or `path` is the input.
        OSError: If the folder is missing or nothing can be written there.
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
    """Find out now whether files can be written into a folder later.

    Raises:
        OSError: If not.
    """
    _try(path / "trial", path)


def _try(path, what):
    # Access bits say little on network and read-only file systems; a trial does.
    probe = _temporary_name(path)
    try:
        probe.touch(exist_ok=False)
    except OSError as error:
        raise type(error)(f"cannot write {what}: {error.strerror}") from error
    probe.unlink()


def write(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all.

    Args:
        path: The file, replaced if it is there.
        content: All of it.

    Raises:
        OSError: If it cannot be written; names the file.
    """
    path = Path(path)
    temporary = _temporary_name(path)
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk does not say by itself which file is meant
        temporary.unlink(missing_ok=True)
        raise type(error)(f"cannot write {path}: {error.strerror or error}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def readable(path: Path) -> str:
    """Return the name of a file as text that any output takes.

    Names are bytes to the system; Python turns those that are no UTF-8 into lone
    surrogates, which neither a terminal nor the metadata of safetensors can encode.
    """
    return os.fsencode(path).decode(errors="replace")


def printable(name: str) -> str:
    """Return a name with everything that a terminal would obey spelt out."""
    return "".join(
        x if x.isprintable() else x.encode("unicode_escape").decode() for x in name
    )


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
