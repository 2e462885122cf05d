"""Values as JSON represents them: conversion from NumPy, and strict parsing.

>>> import numpy as np
>>> jsonable({"error": np.float32(0.5), "bound": np.inf, "shape": (2, np.int64(3))})
{'error': 0.5, 'bound': None, 'shape': [2, 3]}
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kronjax.io import stand_ins


def jsonable(value: Any) -> Any:
    """Return `value` with only types that JSON can represent.

    Numbers that are not finite become None, arrays and tuples become lists, NumPy
    scalars become Python numbers, and keys become strings.
    """
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file.

    Raises:
        ValueError: If the content is not JSON, or not a mapping.
        OSError: If the file cannot be read.
    """
    content = path.read_bytes()
    try:
        values = parse_json(content)
    except ValueError as error:
        other = stand_ins.describe(content)
        reason = f"{path}: {other}" if other else f"{path} is not JSON: {error}"
        raise ValueError(reason) from error
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} holds a {type(values).__name__}, not a mapping")
    return dict(values)


def parse_json(content: bytes) -> Any:
    """Return the value of a JSON text in UTF-8.

    Raises:
        ValueError: If the content is not valid JSON, contains NaN or Infinity, or is
            nested too deeply.
    """
    try:
        return json.loads(content.decode(), parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is not a JSON number")
