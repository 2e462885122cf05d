"""The cache: entries come back as they were computed, and damaged ones are absent."""

import ml_dtypes
import numpy as np
import pytest

from kronjax.io.cache import Cache, digest


@pytest.fixture(params=["memory", "folder"])
def cache(request, tmp_path):
    return Cache(tmp_path / "new" if request.param == "folder" else None)


def entry(number):
    return {"x": np.full(3, number, ml_dtypes.bfloat16)}, {"number": number}


def test_an_entry_is_computed_once(cache):
    calls = []

    def compute(missing):
        calls.append(missing)
        return [entry(i) for i in missing]

    cache.get_or_compute("kind", lambda: entry(1), "b")
    keys = [("a",), ("b",), ("c",)]
    for _ in range(2):
        entries = cache.get_or_compute_many("kind", compute, keys)
        assert [facts["number"] for _, facts in entries] == [0, 1, 2]
        np.testing.assert_array_equal(entries[2][0]["x"], np.full(3, 2))
    assert calls == [[0, 2]]
    assert cache.get_or_compute("other kind", lambda: entry(5), "b")[1]["number"] == 5


def test_a_cleared_cache_computes_again(cache):
    cache.get_or_compute("kind", lambda: entry(1), "key")
    cache.clear()
    if cache.folder is not None:
        assert not cache.folder.exists()
        cache = Cache(cache.folder)
    assert cache.get_or_compute("kind", lambda: entry(2), "key")[1]["number"] == 2


def test_a_truncated_file_counts_as_absent(tmp_path):
    Cache(tmp_path).get_or_compute("kind", lambda: entry(1), "key")
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    facts = Cache(tmp_path).get_or_compute("kind", lambda: entry(2), "key")[1]
    assert facts["number"] == 2


def test_digests_distinguish_shape_dtype_and_values():
    arrays = [
        np.zeros((2, 3)),
        np.zeros((3, 2)),
        np.zeros((2, 3), np.int64),
        np.ones((2, 3)),
        np.zeros((2, 3), ml_dtypes.bfloat16),
    ]
    assert len({digest(x) for x in arrays}) == len(arrays)
    assert digest(arrays[0].T) == digest(np.ascontiguousarray(arrays[0].T))
