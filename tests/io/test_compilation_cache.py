import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kronjax
from kronjax.io import compilation_cache

PROGRAM = """
import json, sys, kronjax
early = len(sys.argv) > 1
if early:
    place = kronjax.cache()
import jax
if not early:
    place = kronjax.cache()
hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None
)
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((5, 5))).block_until_ready()
print(json.dumps([str(place), len(hits)]))
"""

posix = pytest.mark.skipif(os.name != "posix", reason="folders have POSIX modes there")


def run(*arguments, **variables):
    """Run the program in a process of its own; return the folder and the hits."""
    unset = compilation_cache.VARIABLE, "JAX_COMPILATION_CACHE_DIR"
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=environment | variables,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    place, hits = json.loads(done.stdout)
    return Path(place), hits


def test_a_second_process_loads_what_the_first_compiled(tmp_path):
    place, hits = run(XDG_CACHE_HOME=str(tmp_path), HOME=str(tmp_path))
    assert place.parent.name == "kronjax" and tmp_path in place.parents
    assert hits == 0 and list(place.glob("jit_*"))
    again, hits = run("early", XDG_CACHE_HOME=str(tmp_path), HOME=str(tmp_path))
    assert again == place and hits > 0


@posix
def test_the_folder_belongs_to_the_user_alone(tmp_path):
    previous = os.umask(0o002)
    try:
        place, _ = run(KRONJAX_CACHE=str(tmp_path / "mine"))
    finally:
        os.umask(previous)
    for folder in (place, place.parent):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_the_folder_of_jax_stays(tmp_path):
    for arguments in ([], ["early"]):
        theirs = tmp_path / f"jax{len(arguments)}"
        place, _ = run(*arguments, JAX_COMPILATION_CACHE_DIR=str(theirs))
        assert place == theirs


@pytest.fixture
def untold(monkeypatch):
    """JAX has no folder of its own, unlike in the other tests."""
    monkeypatch.setattr(compilation_cache, "_setting_of_jax", lambda: None)


def test_off_is_off(untold, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(compilation_cache.VARIABLE, "OFF")
    assert kronjax.cache() is None
    assert compilation_cache.cache_if_possible() == "off: KRONJAX_CACHE=off"
    assert not list(tmp_path.iterdir())


@posix
def test_a_folder_that_others_may_write_to_is_refused(untold, tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(ValueError, match="others may write to .* chmod go-w"):
        kronjax.cache(tmp_path)


@posix
def test_a_folder_below_one_that_others_may_change_is_refused(untold, tmp_path):
    tmp_path.chmod(0o777)
    inside = tmp_path / "team" / "cache"
    with pytest.raises(ValueError, match=f"others may write to {tmp_path},"):
        kronjax.cache(inside)
    assert not inside.exists()
    link = tmp_path.parent / f"{tmp_path.name}-link"
    link.symlink_to(inside)
    with pytest.raises(ValueError, match="others may write to"):
        kronjax.cache(link)


@posix
def test_without_a_home_folder_the_cache_is_off(untold, monkeypatch):
    monkeypatch.setenv(compilation_cache.VARIABLE, "~nobody-of-this-name/cache")
    assert compilation_cache.cache_if_possible().startswith("off: ")


def test_a_limit_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="max_bytes must be at least 1; got 0"):
        kronjax.cache(tmp_path, max_bytes=0)


@posix
def test_the_reason_is_named_where_the_cache_is_off(untold, monkeypatch, tmp_path):
    tmp_path.chmod(0o777)
    monkeypatch.setenv(compilation_cache.VARIABLE, str(tmp_path))
    assert compilation_cache.cache_if_possible().startswith("off: others may write")
