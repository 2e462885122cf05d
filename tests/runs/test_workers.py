"""Pools side by side: what they find, and how they stop."""

import os
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from kronjax import Configuration, cpu_threads
from kronjax.runs import workers
from kronjax.runs.pool import Matrix, Pool
from kronjax.runs.pool_programs import Kind
from kronjax.solver.problem import Problem


@pytest.fixture(scope="module")
def pools():
    problem = Problem.of((12, 18), Configuration((3, 6), 2), num_starts=2)
    return [
        Pool(Kind(problem, np.dtype(np.float32)), lanes=3, slots=7) for _ in range(3)
    ]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def draw(count):
    rng = np.random.default_rng(0)
    return rng.standard_normal((count, 12, 18)).astype(np.float32)


def given(matrices, read=None):
    """Matrices as a pool takes them; `read` gets the numbers of those that it took."""
    for i, one in enumerate(matrices):
        if read is not None:
            read.append(i)
        yield Matrix(i, one, i)


def test_a_crew_finds_what_one_pool_does(pools):
    ticks: dict[int, list[tuple[int, int]]] = {1: [], 3: []}
    runs = {
        count: {
            one.key: one
            for one in workers.solve(
                pools[:count],
                given(draw(20)),
                lambda *spent, told=told: told.append(spent),
            )
        }
        for count, told in ticks.items()
    }
    assert np.sum(ticks[1], axis=0).tolist() == np.sum(ticks[3], axis=0).tolist()
    assert sorted(runs[3]) == list(range(20))
    for key, one in runs[1].items():
        other = runs[3][key]
        assert (one.spectral_error, one.products) == (
            other.spectral_error,
            other.products,
        )
        np.testing.assert_array_equal(one.terms[0].a, other.terms[0].a)


def test_nothing_comes_of_nothing(pools):
    assert list(workers.solve(pools, iter(()))) == []


@pytest.mark.parametrize("by", ["matrices", "tick"])
def test_a_mistake_ends_all(pools, by):
    read = []

    def broken(*_):
        raise OSError("the disk is full")

    def matrices():
        for one in given(draw(90), read):
            yield one
            if by == "matrices" and len(read) == 4:
                broken()

    with pytest.raises(OSError, match="the disk is full"):
        list(
            workers.solve(
                pools, matrices(), broken if by == "tick" else lambda *_: None
            )
        )
    assert len(read) < 90
    # They can be used again.
    assert len(list(workers.solve(pools, given(draw(5))))) == 5


def test_who_has_seen_enough_may_leave(pools):
    read = []
    found = workers.solve(pools, given(draw(90), read))
    next(found)
    found.close()
    assert len(read) < 90


def test_what_has_no_stages_stops_as_well():
    problem = Problem.of((12, 18), Configuration((3, 6), 2), "frobenius", num_starts=1)
    pools = [
        Pool(Kind(problem, np.dtype(np.float32)), lanes=1, slots=1) for _ in range(2)
    ]
    read = []
    for _ in workers.solve(pools, given(draw(90), read)):
        break
    assert len(read) < 90


def test_threads_compute_in_the_precision_of_who_calls():
    problem = Problem.of((12, 18), Configuration((3, 6), 2), "schatten:4", num_starts=1)
    jax.config.update("jax_enable_x64", False)
    try:
        with jax.enable_x64(True):
            pools = [
                Pool(Kind(problem, np.dtype(np.float64)), lanes=1, slots=1)
                for _ in range(2)
            ]
            matrices = draw(4).astype(np.float64)
            found = list(workers.solve(pools, given(matrices)))
    finally:
        jax.config.update("jax_enable_x64", True)
    assert len(found) == 4
    assert all(one.terms[0].a.dtype == np.float64 for one in found)


def test_there_are_as_many_pools_as_are_useful(monkeypatch):
    monkeypatch.setattr(workers, "size", lambda devices: 2)
    problem = Problem.of((12, 18), Configuration((3, 6), 2), "schatten:4", num_starts=1)
    kind = Kind(problem, np.dtype(np.float32))
    for number, lanes, count in ((90, 3, 2), (90, 1, 2), (3, 3, 1)):
        pools, chosen = workers.pools_of(kind, number, lanes, jax.devices()[:1], 1e-2)
        assert (len(pools), chosen) == (count, lanes)


def test_one_pool_where_there_are_no_threads_or_many_devices(monkeypatch):
    (device,) = jax.devices()
    assert workers.size([device]) >= 1
    assert workers.size([device, device]) == 1
    monkeypatch.setattr(cpu_threads, "cores", lambda: 4)
    for number, programs in (("2", 1), ("4", 2), ("9", 4), ("64", 4)):
        monkeypatch.setenv(cpu_threads.VARIABLE, number)
        assert cpu_threads.programs() == programs
    monkeypatch.delenv(cpu_threads.VARIABLE)
    assert cpu_threads.programs() == 2
    monkeypatch.setenv("NPROC", "3")
    assert cpu_threads.programs() == 1


def test_threads_are_asked_for_before_jax_is_there(monkeypatch):
    code = """
import sys
from kronjax import cpu_threads
cpu_threads.cores = lambda: int(sys.argv[1])
cpu_threads.reserve()
assert "jax" not in sys.modules
print(cpu_threads.count(), cpu_threads.programs())
"""
    monkeypatch.delenv(cpu_threads.VARIABLE)
    for cores, told in (("1", "2 1"), ("2", "4 2"), ("64", "64 16")):
        run = [sys.executable, "-c", code, cores]
        assert subprocess.check_output(run, text=True).strip() == told
    # jax is here already: whether threads can still be had nobody knows.
    cpu_threads.reserve()
    assert cpu_threads.VARIABLE not in os.environ
