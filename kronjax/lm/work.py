"""Finished layers, kept until the whole model is: what makes a run resumable.

A layer lies under a digest of everything that it depends on, so that what is found
there is what would have been computed. Files that were cut off count as absent.

>>> digest("one") != digest("two")
True
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from kronjax import output
from kronjax.kronecker import KroneckerTerms
from kronjax.lm import fit

VERSION = b"1"
"""Of what is kept; to be raised when the same parts would give something else."""


def place(work: Path | None, kind: str, *parts: Any) -> Path | None:
    """Return where something of a kind is kept that depends on `parts` alone.

    Args:
        work: The folder, or None if nothing is kept: then so is the result.
        kind: What it is called.
        parts: As for `digest`.
    """
    if work is None:
        return None
    return work / f"{kind}-{digest(*parts)}.safetensors"


def digest(*parts) -> str:
    """Return a short digest of arrays, and of anything whose `repr` says it all."""
    found = hashlib.sha256(VERSION)
    for part in parts:
        if isinstance(part, fit.Target):
            for array in (part.kernel, part.left, part.right):
                found.update(b"-" if array is None else array.tobytes())
        elif isinstance(part, np.ndarray):
            found.update(part.tobytes())
        else:
            found.update(repr(part).encode())
    return found.hexdigest()[:16]


def store(path: Path, found: tuple[Any, dict[str, Any]]) -> None:
    """Write the factors of a layer, and what there is to say about them."""
    terms, facts = found
    tensors = {}
    for i, one in enumerate(terms):
        tensors |= {f"{i}.a": np.ascontiguousarray(one.a)}
        tensors |= {f"{i}.b": np.ascontiguousarray(one.b)}
    output.write(path, safetensors.numpy.save(tensors, {"facts": json.dumps(facts)}))


def stored(path: Path | None):
    """Return what `store` wrote, or None if there is nothing that can be read."""
    if path is None or not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="np") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            count = len(file.keys()) // 2
            terms = tuple(
                KroneckerTerms(file.get_tensor(f"{i}.a"), file.get_tensor(f"{i}.b"))
                for i in range(count)
            )
    except (safetensors.SafetensorError, KeyError, ValueError):
        path.unlink()
        return None
    return terms, facts


def clear(work: Path) -> None:
    """Remove a folder of finished work."""
    shutil.rmtree(work, ignore_errors=True)
