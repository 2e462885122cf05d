"""Finished work, kept until all is done: what makes a run resumable.

Every piece lies under a digest of everything that it depends on, so that what is found
there is what would have been computed. Files that were cut off count as absent. Without
a folder pieces are kept in memory: what one stage decomposed, the next one needs again.

>>> work = Work()
>>> arrays, facts = work.once("sum", lambda: ({"x": np.ones(2)}, {"n": 2}), "a key")
>>> work.once("sum", None, "a key")[1]
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

VERSION = b"2"
"""Of what is kept; to be raised when the same parts would give something else."""

Piece = tuple[Mapping[str, np.ndarray], Mapping[str, Any]]
"""Arrays by name, and facts that JSON can hold."""


class Work:
    """Pieces by their kind and a digest.

    Attributes:
        folder: Where they lie, or None if they are kept in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Make the folder if it is missing.

        Raises:
            OSError: If nothing can be written there.
        """
        self.folder = folder
        self._held: dict[str, Piece] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            atomic.check_output(folder / "any.safetensors", ".safetensors")

    def once(self, kind: str, make: Callable[[], Piece] | None, *parts: Any) -> Piece:
        """Return a piece: as it was kept, or made now and kept.

        Args:
            kind: What it is called.
            make: Makes it.
            parts: What it depends on; as for `digest`.
        """
        (found,) = self.together(kind, make and (lambda _: [make()]), [parts])
        return found

    def together(
        self,
        kind: str,
        make: Callable[[list[int]], Sequence[Piece]] | None,
        parts: Sequence[Sequence[Any]],
    ) -> list[Piece]:
        """Return several pieces; those that are not there are made in one go.

        Args:
            kind: What they are called.
            make: Makes those whose places in `parts` it is given.
            parts: What each of them depends on; as for `digest`.
        """
        names = [f"{kind}-{digest(*one)}" for one in parts]
        read = self._held.get if self.folder is None else self._read
        found = dict(enumerate(map(read, names)))
        missing = [i for i, piece in found.items() if piece is None]
        if missing:
            assert make is not None
            for i, piece in zip(missing, make(missing), strict=True):
                self._keep(names[i], piece)
                found[i] = piece
        return [piece for piece in found.values() if piece is not None]

    def clear(self) -> None:
        """Forget everything, and remove the folder."""
        self._held.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _keep(self, name, piece):
        if self.folder is None:
            self._held[name] = piece
            return
        arrays, facts = piece
        tensors = {key: np.ascontiguousarray(x) for key, x in arrays.items()}
        content = safetensors.numpy.save(tensors, {"facts": json.dumps(facts)})
        atomic.write(self._path(name), content)

    def _read(self, name) -> Piece | None:
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
    """Return a short digest of arrays, and of anything whose `repr` says it all."""
    found = hashlib.sha256(VERSION)
    for part in parts:
        if isinstance(part, np.ndarray):
            found.update(repr((part.shape, part.dtype)).encode())
            # As bytes: a buffer cannot say that it holds bfloat16.
            found.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        else:
            found.update(repr(part).encode())
    return found.hexdigest()[:16]
