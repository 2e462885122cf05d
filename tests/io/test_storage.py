"""Storage: complete files, no symbolic links, one run at a time."""

import os
import subprocess
import sys
import threading
import time
import uuid

import pytest

from kronjax.io import heartbeat, storage

HOLDER = """
import sys, time
from kronjax.io import storage
with storage.find(sys.argv[1]).hold(0):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["local", "remote", "memory"])
def place(request, tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT", 0.05)
    if request.param == "memory":
        return storage.MemoryFolder()
    if request.param == "local":
        return storage.find(str(tmp_path / "new" / "out"))
    return storage.find(f"memory://{uuid.uuid4().hex}/out")


def test_files_come_back_and_are_listed(place):
    assert place.read("x.json") is None
    assert place.names("inside") == []
    place.write("x.json", b"1")
    place.write("inside/00001.json", b"2")
    place.write("inside/00001.json", b"3")
    assert place.read("inside/00001.json") == b"3"
    assert place.names("inside") == ["00001.json"]  # nothing temporary is left
    place.remove("x.json")
    place.remove("x.json")
    assert place.read("x.json") is None


def test_a_second_run_is_refused_and_the_next_is_not(place):
    with place.hold(0):
        assert place.is_held(0) and not place.is_held(1)
        with (
            pytest.raises(BlockingIOError, match="another run works in"),
            place.hold(0),
        ):
            pass
        with place.hold(1):  # another process of the same run
            pass
    assert not place.is_held(0)
    with place.hold(0):
        pass


def test_surplus_processes_of_a_larger_run_are_refused(place):
    with place.hold(3), place.hold(0):
        storage.refuse_others(place, 4)
        with pytest.raises(BlockingIOError, match="another run works in"):
            storage.refuse_others(place, 1)
    storage.refuse_others(place, 1)


def test_a_lock_ends_with_its_holder(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(BlockingIOError),
            storage.find(str(tmp_path)).hold(0),
        ):
            pass
        holder.kill()
    with storage.find(str(tmp_path)).hold(0):
        pass


def test_without_locks_a_folder_is_held_by_a_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT", 0.05)
    monkeypatch.setattr(storage, "fcntl", None)
    place = storage.find(str(tmp_path))
    with place.hold(0), pytest.raises(BlockingIOError), place.hold(0):
        pass
    # A killed process leaves its file, which no longer changes.
    place.write(heartbeat.lock_name(0), b'{"holder": "x", "beat": 3}')
    with place.hold(0):
        assert b"beat" in place.read(heartbeat.lock_name(0))


def test_clocks_have_no_influence(place, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: -1e9)
    with place.hold(0):
        place.write("x", b"1")
        assert place.is_held(0)
        with pytest.raises(BlockingIOError), place.hold(0):
            pass
    if isinstance(place, storage.LocalFolder):
        os.utime(place.path / "x", (2**33, 2**33))
    with place.hold(0):
        assert place.read("x") == b"1"


def test_of_two_simultaneous_runs_at_most_one_is_accepted(monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT", 0.2)
    place, results = storage.find(f"memory://{uuid.uuid4().hex}"), []
    barrier = threading.Barrier(2)

    def begin():
        barrier.wait()
        try:
            with place.hold(0):
                results.append("held")
                time.sleep(1)
        except BlockingIOError:
            results.append("refused")

    threads = [threading.Thread(target=begin) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count("held") <= 1 and "refused" in results


@pytest.mark.parametrize(
    "name", ["plan.json", "matrices/1.json", "matrices", ".lock-0"]
)
def test_links_are_neither_followed_nor_replaced(tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "1.json").write_text("theirs")
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    is_folder = name == "matrices"
    (out / name).symlink_to(elsewhere if is_folder else elsewhere / "1.json")
    place = storage.find(str(out))
    inside = "matrices/1.json" if is_folder else name
    for touch in (
        lambda: place.read(inside),
        lambda: place.write(inside, b"ours"),
        lambda: place.hold(0).__enter__() if name == ".lock-0" else place.read(inside),
    ):
        with pytest.raises(ValueError, match="is a symbolic link"):
            touch()
    assert (elsewhere / "1.json").read_text() == "theirs"


def test_a_pipe_where_a_file_should_be_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="something else"):
        storage.find(str(tmp_path)).read("plan.json")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x"])
def test_names_outside_of_the_folder_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="outside"):
        storage.find(str(tmp_path / "out")).write(name, b"")


def test_a_storage_that_is_not_writable_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    place = storage.find(str(tmp_path / "file" / "out"))
    with pytest.raises(OSError, match="cannot write"), place.hold(0):
        pass
    with pytest.raises(OSError, match="there is no such user"):
        storage.find("~nobody-of-this-name/x")
    with pytest.raises((ValueError, OSError)):
        place.write("x", b"")
    with pytest.raises((ValueError, ImportError)):
        storage.find("nosuchprotocol://x")


def test_exceptions_of_services_become_os_errors(monkeypatch):
    place = storage.find("memory://some/out")

    def fail(*_, **__):
        raise RuntimeError("quota\nexceeded")

    monkeypatch.setattr(type(place._system), "pipe_file", fail)
    with pytest.raises(
        OSError, match="cannot write memory://some/out/x: quota exceeded"
    ):
        place.write("x", b"")
