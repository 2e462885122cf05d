"""Storage of results: a local folder, a URL that fsspec opens, or memory.

A file exists either completely or not at all. A running process holds its storage, so
that a second run is refused: on a local file system by a lock that the system releases
when the process ends, elsewhere by a heartbeat, which is a file whose content changes
as long as the process lives. No decision depends on a clock.

>>> storage = find("memory://doctest")
>>> with storage.hold(0):
...     storage.write("some.json", b"{}")
>>> storage.read("some.json"), storage.read("other.json")
(b'{}', None)
>>> expanded("runs/small").name
'small'
"""

import contextlib
import errno
import os
import re
import stat
import threading
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from kronjax.io import atomic, heartbeat

try:
    import fcntl
except ImportError:  # Windows
    fcntl: Any = None

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class Storage(heartbeat.Files, Protocol):
    """Named files, held by at most one process for each number.

    `str` gives the location, for messages.
    """

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of all files in a subfolder."""
        ...

    def hold(self, number: int) -> AbstractContextManager[None]:
        """Hold the storage as process `number` of those that share it.

        Raises:
            BlockingIOError: If another process holds it under this number.
            OSError: If the storage is not writable.
        """
        ...

    def is_held(self, number: int) -> bool:
        """Return whether a process holds the storage under a number."""
        ...


def find(where: str) -> Storage:
    """Return the storage at a path or URL, without creating anything."""
    if where.startswith("file://"):
        return LocalFolder(Path(where.removeprefix("file://")))
    return RemoteFolder(where) if "://" in where else LocalFolder(expanded(where))


def expanded(path: str | Path) -> Path:
    """Return a path with `~` replaced by the home folder.

    Raises:
        OSError: If the path names a user who does not exist.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"{path}: there is no such user") from error


class LocalFolder:
    """A folder of a file system.

    Attributes:
        path: Path of the folder.
    """

    def __init__(self, path: Path) -> None:
        """Store the path without accessing it."""
        self.path = path

    def __str__(self) -> str:
        """Return the path."""
        return str(self.path)

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None if it does not exist.

        Raises:
            ValueError: If the name is that of a symbolic link or not of a file.
            OSError: If the file cannot be read.
        """
        path = self._checked(name)
        return path.read_bytes() if path.exists() else None

    def write(self, name: str, content: bytes) -> None:
        """Write a file completely or not at all.

        Raises:
            ValueError: If the name is that of a symbolic link or not of a file.
            OSError: If the file cannot be written; the message names it.
        """
        path = self._checked(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise type(error)(f"cannot write {path}: {reason}") from error
        atomic.write(path, content)

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of all files in a subfolder."""
        path = self._checked(folder, stat.S_ISDIR)
        return sorted(x.name for x in path.iterdir()) if path.exists() else []

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        (self.path / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def hold(self, number: int) -> Iterator[None]:
        """Hold the folder as process `number` of those that share it.

        Raises:
            BlockingIOError: If another process holds it under this number.
            OSError: If the folder is not writable.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise type(error)(f"cannot write {self.path}: {reason}") from error
        atomic.check_folder(self.path)
        try:
            handle = self._locked(number)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            handle = None
        if handle is None:  # locks are not supported
            with heartbeat.hold(self, number):
                yield
            return
        try:
            yield
        finally:
            os.close(handle)

    def is_held(self, number: int) -> bool:
        """Return whether a process holds the folder under a number."""
        try:
            handle = self._locked(number)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            handle = None
        if handle is None:
            return heartbeat.is_held(self, number)
        os.close(handle)
        return False

    def _locked(self, number: int) -> int | None:
        """Return a file handle that holds the lock while it is open."""
        if fcntl is None:
            return None
        path = self._checked(heartbeat.lock_name(number))
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        handle = os.open(path, flags, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise BlockingIOError(heartbeat.refusal(self)) from error
        except OSError:
            os.close(handle)
            raise
        return handle

    def _checked(self, name: str, kind: Any = stat.S_ISREG) -> Path:
        """Return the path of `name`, after refusing links and paths outside."""
        path = self.path / name
        inside = () if ".." in path.parts[len(self.path.parts) :] else path.parents
        for part in (path, *inside):
            if part == self.path:
                return path
            wanted = kind if part == path else stat.S_ISDIR
            with contextlib.suppress(FileNotFoundError):
                mode = os.lstat(part).st_mode
                if not wanted(mode):
                    what = "a symbolic link" if stat.S_ISLNK(mode) else "something else"
                    raise ValueError(
                        f"{part} is {what}, where kronjax keeps files of its own: "
                        "remove it, or give --out another folder"
                    )
        raise ValueError(f"{name} is outside of {self.path}")


class RemoteFolder:
    """A folder behind a URL that fsspec opens: `gs://`, `s3://`, `memory://`, etc.

    Attributes:
        url: URL of the folder.
    """

    def __init__(self, url: str) -> None:
        """Open the file system.

        Raises:
            ImportError: If fsspec needs a package that is not installed.
            ValueError: If fsspec does not know the protocol.
        """
        import fsspec

        self.url = url.rstrip("/")
        self._system: Any
        self._system, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        self._root = root.rstrip("/")

    def __str__(self) -> str:
        """Return the URL."""
        return self.url

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None if it does not exist."""
        with self._errors("read", name):
            try:
                return bytes(self._system.cat_file(self._path(name)))
            except FileNotFoundError:
                return None
        return None

    def write(self, name: str, content: bytes) -> None:
        """Write a file completely or not at all."""
        path = self._path(name)
        folder, _, last = path.rpartition("/")
        temporary = f"{folder}/.{last}.{uuid.uuid4().hex}.tmp"
        with self._errors("write", name):
            self._system.makedirs(folder, exist_ok=True)
            self._system.pipe_file(temporary, content)
            self._system.mv(temporary, path)

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of all files in a subfolder."""
        with self._errors("read", folder):
            try:
                paths = self._system.ls(self._path(folder), detail=False)
            except FileNotFoundError:
                return []
            return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)
        return []

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        with self._errors("remove", name), contextlib.suppress(FileNotFoundError):
            self._system.rm_file(self._path(name))

    @contextlib.contextmanager
    def hold(self, number: int) -> Iterator[None]:
        """Hold the folder as process `number` of those that share it.

        Raises:
            BlockingIOError: If another process holds it under this number.
        """
        with heartbeat.hold(self, number):
            yield

    def is_held(self, number: int) -> bool:
        """Return whether a process holds the folder; waits for some heartbeats."""
        return heartbeat.is_held(self, number)

    def _path(self, name):
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _errors(self, verb, name):
        """Convert the exceptions of a service's client into `OSError`."""
        try:
            yield
        except (FileNotFoundError, MemoryError):
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise OSError(f"cannot {verb} {self.url}/{name}: {reason}") from error


class MemoryFolder:
    """Files in the memory of this process, for runs that store nothing on disk."""

    def __init__(self) -> None:
        """Create an empty folder."""
        self._files: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def __str__(self) -> str:
        """Return a name for messages."""
        return "memory"

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None if it does not exist."""
        return self._files.get(name)

    def write(self, name: str, content: bytes) -> None:
        """Store a file."""
        self._files[name] = content

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of all files in a subfolder."""
        paths = (name.rpartition("/") for name in list(self._files))
        return sorted(last for parent, _, last in paths if parent == folder)

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        self._files.pop(name, None)

    @contextlib.contextmanager
    def hold(self, number: int) -> Iterator[None]:
        """Hold the files under a number.

        Raises:
            BlockingIOError: If another thread holds them under this number.
        """
        name = heartbeat.lock_name(number)
        with self._lock:
            if name in self._files:
                raise BlockingIOError(heartbeat.refusal(self))
            self._files[name] = b""
        try:
            yield
        finally:
            self.remove(name)

    def is_held(self, number: int) -> bool:
        """Return whether the files are held under a number."""
        return heartbeat.lock_name(number) in self._files


def refuse_others(storage: Storage, processes: int) -> None:
    """Refuse a storage that a surplus process of an earlier, larger run still holds.

    Raises:
        BlockingIOError: If it is held under any number from `processes` on.
    """
    for name in storage.names(""):
        match = re.fullmatch(r"\.lock-(\d+)", name)
        if match and int(match[1]) >= processes and storage.is_held(int(match[1])):
            raise BlockingIOError(heartbeat.refusal(storage))


def is_source(storage: Storage, source: str | Path) -> bool:
    """Return whether a storage is the folder of a model, or the folder of its file."""
    path = expanded(source)
    if not isinstance(storage, LocalFolder) or not path.exists():
        return False
    folder = path if path.is_dir() else path.parent
    return storage.path.exists() and storage.path.samefile(folder)
