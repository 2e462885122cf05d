"""Files written as a whole or not at all, without jax.

Every write goes to a temporary name in the same folder and is renamed when complete, so
that an interruption leaves what was there.

>>> readable(Path("demo.png"))
'demo.png'
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
    # Access bits say little on network and read-only file systems; a trial does.
    probe = _temporary_name(path)
    try:
        probe.touch(exist_ok=False)
    except OSError as error:
        raise type(error)(f"cannot write {path}: {error.strerror}") from error
    finally:
        probe.unlink(missing_ok=True)


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


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
