"""A lock for storage without locks: a file that changes as long as its holder lives.

A process holds files by writing a counter every `BEAT` seconds; it is considered dead
when the counter stands still for `PATIENCE` beats. No decision depends on a clock.
"""

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Protocol

BEAT = 10.0
"""Seconds between two heartbeats."""

PATIENCE = 3
"""Number of missed heartbeats after which a process is considered dead."""


class Files(Protocol):
    """Named files; `str` gives their location, for messages."""

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None if it does not exist."""

    def write(self, name: str, content: bytes) -> None:
        """Write a file completely or not at all.

        Raises:
            OSError: If the file cannot be written.
        """

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""


@contextlib.contextmanager
def hold(files: Files, number: int) -> Iterator[None]:
    """Hold files by a heartbeat while this context is open.

    Raises:
        BlockingIOError: If another process holds them.
    """
    name, token = lock_name(number), uuid.uuid4().hex
    if is_held(files, number):
        raise BlockingIOError(refusal(files))

    def beat(count):
        files.write(name, json.dumps({"holder": token, "beat": count}).encode())

    beat(0)
    time.sleep(min(BEAT / 10, 1))
    if token.encode() not in (files.read(name) or b""):  # two began simultaneously
        raise BlockingIOError(refusal(files))
    stopped = threading.Event()

    def keep_beating():
        count = 0
        while not stopped.wait(BEAT):
            count += 1
            with contextlib.suppress(OSError):  # writing results will report it
                beat(count)

    thread = threading.Thread(target=keep_beating, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        files.remove(name)


def is_held(files: Files, number: int) -> bool:
    """Return whether a living process holds files by a heartbeat."""
    name = lock_name(number)
    first = files.read(name)
    if first is None:
        return False
    for _ in range(PATIENCE):
        time.sleep(BEAT)
        if files.read(name) not in (None, first):
            return True
    return False


def lock_name(number: int) -> str:
    """Return the name of the lock file of a process."""
    return f".lock-{number}"


def refusal(files: Files) -> str:
    """Return the message for a run that is refused."""
    return (
        f"another run works in {files}: wait until it has ended, or give --out "
        "another folder"
    )
