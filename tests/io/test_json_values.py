"""JSON: what is not finite becomes null, and NumPy's types become Python's."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kronjax.io.json_values import jsonable, parse_json, read_json


@pytest.mark.parametrize(
    "value, expected",
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (ml_dtypes.bfloat16(2), 2.0),
        (float("nan"), None),
        (np.float64("inf"), None),
        (-np.inf, None),
        (np.array([[1.0, np.nan]]), [[1.0, None]]),
        (np.array(7), 7),
        (jnp.arange(2), [0, 1]),
        ((1, "a", None, True), [1, "a", None, True]),
        ({1: {"x": (np.inf,)}}, {"1": {"x": [None]}}),
    ],
)
def test_values_become_plain_ones(value, expected):
    plain = jsonable(value)
    assert plain == expected and type(plain) is type(expected)
    assert json.loads(json.dumps(plain, allow_nan=False)) == expected


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "Expecting"),
        (b'{"x": NaN}', "NaN is not a JSON number"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff", "utf-8"),
    ],
)
def test_invalid_json_is_refused(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse_json(content)
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x.json is not JSON"):
        read_json(path)


def test_a_file_must_hold_a_mapping(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match="holds a list, not a mapping"):
        read_json(path)
