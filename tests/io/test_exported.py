"""Exported programs: traced once, and again only if something may have changed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kronjax.io import exported
from kronjax.kronecker import KroneckerTerms

exported.register(KroneckerTerms)
SHAPE = jax.ShapeDtypeStruct((3, 3), np.float32)

PROCESS = """
import json, sys
import jax, numpy as np
traced = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, _, **facts: traced.append(facts.get("fun_name"))
    if "jaxpr_trace" in name else None
)
from kronjax import Configuration, approximate
matrix = np.random.default_rng(0).standard_normal((12, 12)).astype(np.float32)
found = approximate(matrix, Configuration((3, 3), 2), certify=True)
facts = {
    "traced": traced,
    "terms": [x.tolist() for x in (found.terms[0].a, found.terms[0].b)],
    "certificate": [float(x) for x in (found.certificate.error,
        found.certificate.local_bound, found.certificate.global_bound)],
    "trace": found.trace.value.tolist(),
}
print(json.dumps(facts))
"""


def run(**variables):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    done = subprocess.run(
        [sys.executable, "-c", PROCESS],
        env=kept | variables,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(exported, "_folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def count():
    """The number of times that `build` was called."""
    return []


def build(count):
    def terms(x):
        return KroneckerTerms(x[None] + 1, x[None]), jnp.sum(x)

    count.append(1)
    return {"terms": (jax.jit(terms), (SHAPE,))}


def test_programs_are_traced_once_and_compute_the_same(folder, count):
    x = np.arange(9, dtype=np.float32).reshape(3, 3)
    for _ in range(3):
        programs = exported.programs(lambda: build(count), "cpu", "a fact")
        found, total = jax.jit(programs["terms"].call)(x)
        np.testing.assert_array_equal(found.a, x[None] + 1)
        assert total == 36
    assert len(count) == 1


@pytest.mark.parametrize("what", ["fact", "setting", "source", "platform"])
def test_a_change_of_anything_is_traced_anew(folder, count, what, monkeypatch):
    exported.programs(lambda: build(count), "cpu", "a fact")
    if what == "source":
        monkeypatch.setattr(exported, "_sources", lambda: "other")
    precision = "float32" if what == "setting" else None
    platform = "other" if what == "platform" else "cpu"
    with jax.default_matmul_precision(precision):
        fact = "another" if what == "fact" else "a fact"
        assert exported.programs(lambda: build(count), platform, fact)
    assert len(count) == 2


def test_a_truncated_entry_is_traced_anew(folder, count):
    exported.programs(lambda: build(count), "cpu")
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    assert exported.programs(lambda: build(count), "cpu")
    assert len(count) == 2


def test_an_entry_that_is_no_program_is_not_used(folder, count):
    exported.programs(lambda: build(count), "cpu")
    (path,) = folder.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:2000] + bytes(len(content) - 2000))
    assert exported.programs(lambda: build(count), "cpu") is None


def test_a_folder_that_cannot_be_used_stores_nothing(tmp_path, count, monkeypatch):
    path = tmp_path / "file"
    path.write_text("")
    for folder in (None, path):
        monkeypatch.setattr(exported, "_folder", lambda folder=folder: folder)
        assert exported.programs(lambda: build(count), "cpu") is None
    assert not count


def test_the_oldest_entries_are_deleted(folder, count, monkeypatch):
    for i in range(3):
        exported.programs(lambda: build(count), "cpu", i)
        (new,) = (x for x in folder.iterdir() if x.stat().st_mtime > 1e6)
        os.utime(new, (i, i))
        size = new.stat().st_size
    # Entries hold the places in the source, and differ by some bytes.
    monkeypatch.setattr(exported, "LIMIT", int(2.5 * size))
    exported.programs(lambda: build(count), "cpu", 3)
    assert len(list(folder.iterdir())) == 2
    exported.programs(lambda: build(count), "cpu", 2)
    assert len(count) == 4


@pytest.mark.parametrize(
    ("folder", "is_enabled", "expected"),
    [
        ("/a/folder", True, Path("/a/folder") / exported.FOLDER),
        ("/a/folder", False, None),
        (None, True, None),
        ("gs://bucket/folder", True, None),
    ],
)
def test_the_folder_is_that_of_jax(monkeypatch, folder, is_enabled, expected):
    config = SimpleNamespace(
        jax_compilation_cache_dir=folder, jax_enable_compilation_cache=is_enabled
    )
    monkeypatch.setattr(exported.jax, "config", config)
    assert exported._folder() == expected


def test_a_second_process_traces_nothing_and_gets_the_same_digits(tmp_path):
    cold, warm = (run(JAX_COMPILATION_CACHE_DIR=str(tmp_path)) for _ in range(2))
    without = run()
    assert {"flat", "certify"} <= set(cold.pop("traced"))
    assert not {"flat", "certify", "start"} & set(warm.pop("traced"))
    without.pop("traced")
    assert warm == cold == without
