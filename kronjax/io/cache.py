"""A cache of computed results, which makes an interrupted run resumable.

Every entry is stored under a digest of everything that it depends on, so a stored entry
equals what would be computed now. A truncated file counts as absent. Without a folder
the entries stay in memory, where a later stage of the same run finds them.

>>> cache = Cache()
>>> compute = lambda: ({"x": np.ones(2)}, {"n": 2})
>>> arrays, facts = cache.get_or_compute("sum", compute, "a key")
>>> cache.get_or_compute("sum", None, "a key")[1]
{'n': 2}
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from kronjax.io import atomic

VERSION = b"3"
"""Version of the entries; raise it when the same key would give another result."""

Entry = tuple[Mapping[str, np.ndarray], Mapping[str, Any]]
"""Arrays by name, and facts that JSON can represent."""


class Cache:
    """Entries by kind and digest.

    Attributes:
        folder: Folder of the entries, or None if they are kept in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Create the folder if it is missing.

        Raises:
            OSError: If the folder is not writable.
        """
        self.folder = folder
        self._entries: dict[str, Entry] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            atomic.check_output(folder / "any.safetensors", ".safetensors")

    def get_or_compute(
        self, kind: str, compute: Callable[[], Entry] | None, *key: Any
    ) -> Entry:
        """Return the stored entry, or compute and store it.

        Args:
            kind: Name of the kind of entry.
            compute: Function that computes the entry; None if it must be stored.
            key: Everything that the entry depends on, as for `digest`.
        """
        (entry,) = self.get_or_compute_many(
            kind, compute and (lambda _: [compute()]), [key]
        )
        return entry

    def get_or_compute_many(
        self,
        kind: str,
        compute: Callable[[list[int]], Sequence[Entry]] | None,
        keys: Sequence[Sequence[Any]],
    ) -> list[Entry]:
        """Return several entries, and compute all missing ones in one call.

        Args:
            kind: Name of the kind of entry.
            compute: Function that computes the entries at given positions in `keys`;
                None if all of them must be stored.
            keys: Everything that each entry depends on, as for `digest`.
        """
        names = [f"{kind}-{digest(*key)}" for key in keys]
        read = self._entries.get if self.folder is None else self._read
        entries = list(map(read, names))
        missing = [i for i, entry in enumerate(entries) if entry is None]
        if missing:
            assert compute is not None
            for i, entry in zip(missing, compute(missing), strict=True):
                self._store(names[i], entry)
                entries[i] = entry
        return [entry for entry in entries if entry is not None]

    def clear(self) -> None:
        """Remove all entries, and the folder."""
        self._entries.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def shrink(self, limit: int) -> None:
        """Delete the oldest entries of a folder until the others take `limit` bytes."""
        if self.folder is None:
            return
        kept = 0
        facts = [(path.stat(), path) for path in self.folder.glob("*.safetensors")]
        for fact, path in sorted(facts, key=lambda x: x[0].st_mtime, reverse=True):
            kept += fact.st_size
            if kept > limit:
                path.unlink(missing_ok=True)

    def _store(self, name, entry):
        if self.folder is None:
            self._entries[name] = entry
            return
        arrays, facts = entry
        tensors = {key: np.ascontiguousarray(x) for key, x in arrays.items()}
        content = safetensors.numpy.save(tensors, {"facts": json.dumps(facts)})
        atomic.write(self._path(name), content)

    def _read(self, name) -> Entry | None:
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            with safetensors.safe_open(path, framework="np") as file:
                facts = json.loads((file.metadata() or {})["facts"])
                names = list(file.keys())
                return {name: file.get_tensor(name) for name in names}, facts
        except (safetensors.SafetensorError, KeyError, ValueError):
            path.unlink()
            return None

    def _path(self, name):
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"


def digest(*parts: Any) -> str:
    """Return a short digest of arrays, and of objects with an unambiguous `repr`."""
    sha = hashlib.sha256(VERSION)
    for part in parts:
        if isinstance(part, np.ndarray):
            sha.update(repr((part.shape, part.dtype)).encode())
            # As bytes: the buffer protocol does not support bfloat16.
            sha.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        else:
            sha.update(repr(part).encode())
    return sha.hexdigest()[:16]
