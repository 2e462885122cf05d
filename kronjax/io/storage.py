"""Where results are kept: a local folder, or a URL that fsspec opens.

A file is there as a whole or not at all. Whoever works in a place holds it, so that a
second run is refused: on a local file system by a lock that the system drops when its
holder dies, elsewhere by a file whose content changes as long as its holder lives.
Nothing asks what time it is.

>>> place = find("memory://doctest")
>>> with place.hold(0):
...     place.write("some.json", b"{}")
>>> expanded("runs/small").name
'small'
>>> place.read("some.json"), place.read("other.json")
(b'{}', None)
"""

import contextlib
import errno
import json
import os
import re
import stat
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from kronjax.io import atomic

try:
    import fcntl
except ImportError:  # Windows
    fcntl: Any = None

BEAT = 10.0
"""Seconds between two changes of the file that says that a holder lives."""

PATIENCE = 3
"""Beats without a change after which it is taken for dead."""

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def find(where: str) -> "Storage":
    """Return the place that a path or a URL means; nothing is made yet."""
    if where.startswith("file://"):
        return LocalFolder(Path(where.removeprefix("file://")))
    return RemoteFolder(where) if "://" in where else LocalFolder(expanded(where))


def expanded(path: str | Path) -> Path:
    """Return a path with the home folder in the place of `~`.

    Raises:
        OSError: If it names a user who is not there.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"{path}: there is no such user") from error


class Storage(Protocol):
    """A place for files by relative names, such as `matrices/00007.json`."""

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None if there is none."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Write a file as a whole or not at all."""
        ...

    def names(self, folder: str) -> list[str]:
        """Return the names of the files in a folder."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        ...

    def hold(self, number: int) -> contextlib.AbstractContextManager[None]:
        """Hold the place for process `number` while the context lasts."""
        ...

    def is_held(self, number: int) -> bool:
        """Return whether process `number` holds the place."""
        ...


class MemoryFolder:
    """A place in the memory of this process."""

    def __init__(self) -> None:
        """Begin with no files."""
        self._files: dict[str, bytes] = {}

    def __str__(self) -> str:
        """Return a name for messages."""
        return "memory"

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None if there is none."""
        return self._files.get(name)

    def write(self, name: str, content: bytes) -> None:
        """Write a file."""
        self._files[name] = bytes(content)

    def names(self, folder: str) -> list[str]:
        """Return the names of the files in a folder, sorted."""
        pairs = (name.rpartition("/") for name in self._files)
        return sorted(last for parent, _, last in pairs if parent == folder)

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        self._files.pop(name, None)

    @contextlib.contextmanager
    def hold(self, number: int) -> Iterator[None]:
        """Hold the place: no other process can reach it."""
        yield

    def is_held(self, number: int) -> bool:
        """Return whether process `number` holds the place, which only this one can."""
        return number == 0


class LocalFolder:
    """A folder of a file system.

    Attributes:
        path: Of the folder.
    """

    def __init__(self, path: Path) -> None:
        """Look at nothing yet."""
        self.path = path

    def __str__(self) -> str:
        """Return the path."""
        return str(self.path)

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None if it is not there.

        Raises:
            ValueError: If it is a symbolic link, or no file.
            OSError: If it cannot be read.
        """
        path = self._checked(name)
        return path.read_bytes() if path.exists() else None

    def write(self, name: str, content: bytes) -> None:
        """Write a file as a whole or not at all.

        Raises:
            ValueError: If it is a symbolic link, or no file.
            OSError: If it cannot be written; names it.
        """
        path = self._checked(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise type(error)(f"cannot write {path}: {reason}") from error
        atomic.write(path, content)

    def names(self, folder: str) -> list[str]:
        """Return the names of all files in a folder inside, sorted."""
        path = self._checked(folder, stat.S_ISDIR)
        return sorted(x.name for x in path.iterdir()) if path.exists() else []

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.path / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def hold(self, number: int) -> Iterator[None]:
        """Hold the place as one of several processes that share it.

        Raises:
            BlockingIOError: If someone else does.
            OSError: If nothing can be written there.
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
        if handle is None:  # no such locks here
            with beating(self, number):
                yield
            return
        try:
            yield
        finally:
            os.close(handle)

    def is_held(self, number: int) -> bool:
        """Say whether someone holds the place under a number."""
        try:
            handle = self._locked(number)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            handle = None
        if handle is None:
            return is_beating(self, number)
        os.close(handle)
        return False

    def _locked(self, number: int) -> int | None:
        """Return a handle that holds the lock as long as it is open."""
        if fcntl is None:
            return None
        path = self._checked(lock_name(number))
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        handle = os.open(path, flags, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise BlockingIOError(_refusal(self)) from error
        except OSError:
            os.close(handle)
            raise
        return handle

    def _checked(self, name: str, kind: Any = stat.S_ISREG) -> Path:
        """Return a path inside, at which there is nothing, or no link."""
        path = self.path / name
        inside = () if ".." in path.parts[len(self.path.parts) :] else path.parents
        for one in (path, *inside):
            if one == self.path:
                return path
            wanted = kind if one == path else stat.S_ISDIR
            with contextlib.suppress(FileNotFoundError):
                mode = os.lstat(one).st_mode
                if not wanted(mode):
                    what = "a symbolic link" if stat.S_ISLNK(mode) else "something else"
                    raise ValueError(
                        f"{one} is {what}, where kronjax keeps files of its own: "
                        "remove it, or give --out another folder"
                    )
        raise ValueError(f"{name} is outside of {self.path}")


class RemoteFolder:
    """What fsspec finds behind a URL: `gs://`, `s3://`, `memory://` and so on.

    Attributes:
        url: As it was given.
    """

    def __init__(self, url: str) -> None:
        """Find the file system.

        Raises:
            ImportError: If fsspec asks for a package that is not installed.
            ValueError: If it does not know such URLs.
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
        """Return the content of a file, or None if it is not there."""
        with self._errors("read", name):
            try:
                return bytes(self._system.cat_file(self._path(name)))
            except FileNotFoundError:
                return None
        return None

    def write(self, name: str, content: bytes) -> None:
        """Write a file as a whole or not at all."""
        path = self._path(name)
        folder, _, last = path.rpartition("/")
        temporary = f"{folder}/.{last}.{uuid.uuid4().hex}.tmp"
        with self._errors("write", name):
            self._system.makedirs(folder, exist_ok=True)
            self._system.pipe_file(temporary, content)
            self._system.mv(temporary, path)

    def names(self, folder: str) -> list[str]:
        """Return the names of all files in a folder inside, sorted."""
        with self._errors("read", folder):
            try:
                found = self._system.ls(self._path(folder), detail=False)
            except FileNotFoundError:
                return []
            return sorted(one.rstrip("/").rpartition("/")[2] for one in found)
        return []

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with self._errors("remove", name), contextlib.suppress(FileNotFoundError):
            self._system.rm_file(self._path(name))

    @contextlib.contextmanager
    def hold(self, number: int) -> Iterator[None]:
        """Hold the place as one of several processes that share it.

        Raises:
            BlockingIOError: If someone else does.
        """
        with beating(self, number):
            yield

    def is_held(self, number: int) -> bool:
        """Say whether someone holds the place under a number: takes some beats."""
        return is_beating(self, number)

    def _path(self, name):
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _errors(self, verb, name):
        """Turn what a client of some service raises into errors of the system."""
        try:
            yield
        except (FileNotFoundError, MemoryError):
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise OSError(f"cannot {verb} {self.url}/{name}: {reason}") from error


@contextlib.contextmanager
def beating(place: Storage, number: int) -> Iterator[None]:
    """Hold a place by a file that changes as long as this lives.

    Raises:
        BlockingIOError: If someone else changes it.
    """
    name, token = lock_name(number), uuid.uuid4().hex
    if is_beating(place, number):
        raise BlockingIOError(_refusal(place))

    def beat(count):
        place.write(name, json.dumps({"holder": token, "beat": count}).encode())

    beat(0)
    time.sleep(min(BEAT / 10, 1))
    if token.encode() not in (place.read(name) or b""):  # two came at the same time
        raise BlockingIOError(_refusal(place))
    over = threading.Event()

    def go_on():
        count = 0
        while not over.wait(BEAT):
            count += 1
            with contextlib.suppress(OSError):  # whoever writes results will tell
                beat(count)

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        place.remove(name)


def is_beating(place: Storage, number: int) -> bool:
    """Say whether the holder of a place, if there is one, lives."""
    name = lock_name(number)
    first = place.read(name)
    if first is None:
        return False
    for _ in range(PATIENCE):
        time.sleep(BEAT)
        if place.read(name) not in (None, first):
            return True
    return False


def refuse_others(place: Storage, processes: int) -> None:
    """Refuse a place that processes of an earlier run hold, of which there were more.

    Raises:
        BlockingIOError: If one with a number from `processes` on does.
    """
    for name in place.names(""):
        found = re.fullmatch(r"\.lock-(\d+)", name)
        if found and int(found[1]) >= processes and place.is_held(int(found[1])):
            raise BlockingIOError(_refusal(place))


def lock_name(number: int) -> str:
    """Return the name of the file by which a process holds its place."""
    return f".lock-{number}"


def _refusal(place):
    return (
        f"another run works in {place}: wait until it has ended, or give --out another "
        "folder"
    )


def is_source(place: Storage, source: str | Path) -> bool:
    """Return whether a place is the folder of a model, or the folder of its file."""
    path = expanded(source)
    if not isinstance(place, LocalFolder) or not path.exists():
        return False
    folder = path if path.is_dir() else path.parent
    return place.path.exists() and place.path.samefile(folder)
