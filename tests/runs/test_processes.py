"""Processes that share a plan: they agree, part, and wait for who is alive."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy
from helpers import free_port

from kronjax.io import storage
from kronjax.runs import processes
from kronjax.runs.processes import Hosts


def test_who_is_alone_agrees_with_itself():
    alone = Hosts(0, 1)
    assert alone.exchange([1, 2**31 - 1]) == [[1, 2**31 - 1]]
    alone.part()


@pytest.mark.parametrize("fault", ["there", "here", None])
def test_process_0_goes_first_and_nobody_goes_on_alone(monkeypatch, fault):
    """What a second of two processes does, whose first one is told of by `exchange`."""
    done, words = [], []

    def exchange(self, given):
        words.append(list(given))
        first = fault != "there" or len(words) > 1
        return [[first, *given[1:]], list(given)]

    def work():
        assert len(words) == 1  # process 0 has been
        done.append(1)
        if fault == "here":
            raise ImportError("no such library")
        return "found"

    monkeypatch.setattr(Hosts, "exchange", exchange)
    if fault == "there":
        with pytest.raises(ValueError, match="process 0 has failed"):
            Hosts(1, 2).in_turn(work)
        assert not done
    elif fault == "here":
        with pytest.raises(ImportError, match="no such library"):
            Hosts(1, 2).in_turn(work)
        assert [one[0] for one in words] == [1, 0]  # the other one hears of it
    else:
        assert Hosts(1, 2).in_turn(work) == "found"


def test_a_process_waits_for_the_living_and_names_the_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "POLL", 0)
    place, left = storage.find(str(tmp_path)), [[5, 4], [5], []]
    with place.hold(1):
        processes.wait(place, Hosts(0, 2), lambda: left.pop(0) if 5 in left[0] else [])
    assert left == [[]]
    with place.hold(1), pytest.raises(OSError, match="2 matrices .* process 2, which"):
        # Process 1 lives, and owns nothing of what is missing.
        processes.wait(place, Hosts(0, 3), lambda: [2, 5])
    with pytest.raises(OSError, match="process 0, which has ended"):
        processes.wait(place, Hosts(0, 1), lambda: [3])


def test_of_others_no_more_is_asked_than_is_needed(monkeypatch):
    class Slow:
        """To see whether one lives takes a while."""

        asked = []

        def is_held(self, number):
            self.asked.append(number)
            return number == 1

    monkeypatch.setattr(processes, "POLL", 0)
    left = [[5, 6, 7], [9], []]
    processes.wait(Slow(), Hosts(0, 4), lambda: left.pop(0))
    assert Slow.asked == [1, 1] and not left
    processes.wait(Slow(), Hosts(0, 4), list)
    assert Slow.asked == [1, 1]


def test_who_finishes_before_it_lets_go_is_not_taken_for_dead(tmp_path):
    """Between two looks process 1 writes its last record, and ends."""
    place, order = storage.find(str(tmp_path)), []
    held = place.hold(1)
    held.__enter__()

    def missing():
        order.append("looked")
        if len(order) == 1:
            held.__exit__(None, None, None)
            return [1]
        return []

    processes.wait(place, Hosts(0, 2), missing)
    assert len(order) == 2


def test_processes_that_do_not_meet_say_how_to(monkeypatch):
    def fail(*_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr("jax.distributed.initialize", fail)
    with pytest.raises(ValueError, match="should be defined.*--coordinator HOST:PORT"):
        processes.join()


def line(folder, process, port):
    given = ["factorize", "bag.safetensors", "--recipe", "bag.yaml", "--out", "out"]
    given += ["--distributed", "--coordinator", f"127.0.0.1:{port}"]
    given += ["--processes", "2", "--process", str(process)]
    command = [sys.executable, "-m", "kronjax", *given]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("dead", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_who_is_killed_ends_nobody_else_and_the_same_line_goes_on(tmp_path, dead):
    rng = np.random.default_rng(0)
    bag = {f"w.{i}": rng.standard_normal((40, 30)) for i in range(600)}
    safetensors.numpy.save_file(bag, tmp_path / "bag.safetensors")
    rule = "{match: '*', method: low-rank, rank: 2, weighting: none}"
    (tmp_path / "bag.yaml").write_text(f"rules: [{rule}]")
    records, port = tmp_path / "out" / "matrices", free_port()
    runs = [line(tmp_path, i, port) for i in range(2)]
    own = [f"{i:05d}.json" for i in range(dead, 40, 2)]
    while runs[dead].poll() is None and not all((records / x).exists() for x in own):
        time.sleep(0.001)
    runs[dead].send_signal(signal.SIGKILL)
    ended = [run.communicate(timeout=300) for run in runs]
    assert runs[dead].returncode == -signal.SIGKILL
    finished = {int(x[:5]) for x in os.listdir(records) if x.endswith(".json")}
    other = {i for i in range(600) if i % 2 != dead}
    assert other <= finished < set(range(600))
    if dead == 1:
        assert runs[0].returncode == 2
        assert "of process 1, which has ended: run the same command" in ended[0][1]
    else:
        assert runs[1].returncode == 0, ended[1][1]
    written = {x: (records / f"{x:05d}.json").read_bytes() for x in finished}
    port = free_port()
    runs = [line(tmp_path, i, port) for i in range(2)]
    ended = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], ended
    assert "600 of 600 matrices are finished" in ended[0][0]
    for index, content in written.items():  # and none was solved twice
        assert (records / f"{index:05d}.json").read_bytes() == content
        assert json.loads(content)["index"] == index
