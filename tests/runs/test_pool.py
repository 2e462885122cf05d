import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from kronjax import Configuration, Status, approximate, cpu_threads
from kronjax.linalg.dense import multiply_out
from kronjax.linalg.residuals import measure
from kronjax.proof import bounds
from kronjax.runs import pool as pools
from kronjax.runs.pool import Matrix, Pool
from kronjax.runs.pool_programs import Kind
from kronjax.solver.problem import Problem

SHAPE, ONE, LANES = (12, 18), Configuration((3, 6), 2), 3

EIGHT = """
import json
import numpy as np
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from kronjax import Configuration
from kronjax.runs import pool_programs
from kronjax.runs.pool import Pool
from kronjax.runs.pool_programs import Kind
from kronjax.solver.problem import Problem

dtype = np.dtype(np.float32)
rng = np.random.default_rng(0)
matrices = rng.standard_normal((20, 12, 18)).astype(dtype)
low, high = (
    Problem.of((12, 18), Configuration((3, 6), rank), num_starts=1) for rank in (2, 6)
)
found = {}
for count in (1, 8):
    kind = Kind(low, dtype)
    pool = Pool(kind, lanes=3, slots=6, devices=jax.devices()[:count])
    given = ((i, x, 0) for i, x in enumerate(matrices))
    found[count] = {
        one.key: [one.spectral_error, one.local_bound, *map(float, one.terms[0].a.flat)]
        for one in pool.solve(given)
    }

# What devices say to each other, and that in a sum over all of them they are heard.
words = ["all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-"]
words += [" send(", " recv("]
own = NamedSharding(pool.mesh, PartitionSpec(pool_programs.AXIS))
programs = {
    f"{name} of {rank} rank": program
    for rank, problem in (("low", low), ("high", high))
    for name, program in pool_programs.compiled(
        Kind(problem, dtype), pool.mesh, pool.lanes, pool.slots
    ).items()
}
programs["sum"] = (
    jax.jit(jnp.sum).lower(jax.ShapeDtypeStruct((8,), dtype, sharding=own)).compile()
)
texts = {name: program.as_text() for name, program in programs.items()}
told = {
    "devices": len(jax.devices()),
    "found": len(found[1]),
    "same": found[1] == found[8],
    "factored": [low.is_factored, high.is_factored],
    "said": {name: [x for x in words if x in text] for name, text in texts.items()},
    "divided": ["num_partitions=8" in text for text in texts.values()],
    "loops": [name for name, text in texts.items() if "while" in text],
}
print(json.dumps(told))
"""


def draw(count, shape=SHAPE):
    rng = np.random.default_rng(0)
    return rng.standard_normal((count, *shape)).astype(np.float32)


def given(matrices, order=None):
    order = range(len(matrices)) if order is None else order
    return (Matrix(i, matrices[i], i) for i in order)


def make_pool(problem, **options):
    return Pool(Kind(problem, np.dtype(np.float32)), **options)


@pytest.fixture(scope="module")
def problem():
    return Problem.of(SHAPE, ONE, num_starts=2)


@pytest.fixture(scope="module")
def pool(problem):
    return make_pool(problem, lanes=LANES, slots=7)


def test_every_matrix_is_solved_as_by_itself(pool):
    matrices = draw(11)
    found = {one.key: one for one in pool.solve(given(matrices))}
    assert sorted(found) == list(range(11))
    for i, matrix in enumerate(matrices):
        alone = approximate(matrix, ONE, num_starts=2, seed=i)
        one = found[i]
        assert one.status == alone.status
        # Rounding leads both on different ways to within their tolerance, or about it.
        assert one.spectral_error == pytest.approx(alone.error.spectral, rel=5e-3)
        a, b = (np.float64(x) for x in (one.terms[0].a, one.terms[0].b))
        error = np.float64(matrix) - multiply_out(a, b)
        norm = np.linalg.norm(error, 2)
        assert norm <= one.spectral_error <= norm * (1 + 1e-4)
        assert 0 <= one.local_bound <= norm
        trace = one.trace
        assert trace.spectral_error[0] >= norm * (1 - 1e-4)  # of Van Loan's sum
        assert one.products > one.steps > 0 and trace.p[0] == 2 < trace.p[-1]
        assert one.frobenius is None


def test_coarse_answers_of_high_rank_by_one_lane():
    problem = Problem.of(SHAPE, Configuration((3, 6), 6), num_starts=1)
    assert problem.is_factored
    one_slot, two_slots = (
        make_pool(problem, lanes=1, slots=slots, tolerance=0.03) for slots in (1, 2)
    )
    matrices = draw(3)
    found = list(one_slot.solve(given(matrices)))
    assert len(found) == len(matrices)
    others = {one.key: one for one in two_slots.solve(given(matrices))}
    for one in found:  # what stays where it is comes to the same, but for rounding
        other = others[one.key]
        np.testing.assert_array_equal(one.trace.p, other.trace.p)
        assert one.spectral_error == pytest.approx(other.spectral_error, rel=1e-4)
        assert one.local_bound == pytest.approx(other.local_bound, rel=1e-3)
        for name in ("a", "b"):
            ours, theirs = (getattr(x.terms[0], name) for x in (one, other))
            np.testing.assert_allclose(ours, theirs, atol=1e-2)
    assert one_slot.memory < two_slots.memory
    # At high rank it is half of the last p that proves, and not that itself.
    prove = jax.jit(bounds.certify_stage)
    for one in found:
        half, last = (
            prove(matrices[one.key], one.terms, np.float32(p), np.int32(6)).local_bound
            for p in (one.trace.p[-1] / 2, one.trace.p[-1])
        )
        assert float(half) == pytest.approx(one.local_bound, rel=1e-5)
        assert abs(float(last) - one.local_bound) > 1e-4 * one.local_bound
    for one in found:
        a, b = (np.float64(x) for x in (one.terms[0].a, one.terms[0].b))
        norm = np.linalg.norm(np.float64(matrices[one.key]) - multiply_out(a, b), 2)
        assert norm <= one.spectral_error <= norm * (1 + 1e-4)
        assert norm < 0.9 * one.trace.spectral_error[0] and 0 < one.local_gap < 0.1
        assert one.status == Status.CONVERGED and one.trace.p[-1] < 4098


def test_what_comes_of_a_matrix_depends_on_nobody_else(problem, pool):
    matrices = draw(11)
    other = make_pool(problem, lanes=LANES, slots=LANES)
    runs = [
        {one.key: one for one in which.solve(given(matrices, order))}
        for which, order in (
            (pool, None),
            (pool, range(10, -1, -1)),
            (other, [4, 1]),
        )
    ]
    for run in runs[1:]:
        for key, one in run.items():
            same = runs[0][key]
            np.testing.assert_array_equal(one.trace.p, same.trace.p)
            assert one.products == same.products
            assert one.spectral_error == same.spectral_error
            np.testing.assert_array_equal(one.terms[0].a, same.terms[0].a)
            np.testing.assert_array_equal(one.terms[0].b, same.terms[0].b)


def test_how_the_work_is_cut_changes_nothing(problem, pool, monkeypatch):
    matrices = draw(5)
    monkeypatch.setattr(pools, "SLICE", 1000)
    other = make_pool(problem, lanes=LANES, slots=7)
    calls, runs = [], []
    for which in (pool, other):
        told = []

        def tick(products, turned, told=told):
            told.append(products)

        runs.append({one.key: one for one in which.solve(given(matrices), tick)})
        calls.append(len(told))
    assert calls[1] < calls[0]
    for key, one in runs[0].items():
        assert one.products == runs[1][key].products
        np.testing.assert_array_equal(one.terms[0].a, runs[1][key].terms[0].a)


def test_a_matrix_with_nan_does_no_harm(pool):
    matrices = draw(4)
    good = {one.key: one for one in pool.solve(given(matrices))}
    matrices[2, 3, 4] = np.nan
    found = {one.key: one for one in pool.solve(given(matrices))}
    assert found[2].status == Status.NONFINITE
    assert np.isnan(found[2].spectral_error) and np.isnan(found[2].local_gap)
    for i in (0, 1, 3):
        np.testing.assert_array_equal(found[i].terms[0].a, good[i].terms[0].a)


def test_nothing_comes_of_nothing_and_zero_of_zero(pool):
    assert list(pool.solve(iter(()))) == []
    (found,) = pool.solve(iter([Matrix("zero", np.zeros(SHAPE, np.float32))]))
    assert found.spectral_error == found.local_gap == 0
    assert found.status == Status.CONVERGED


def test_matrices_are_read_only_when_there_is_room(pool):
    read = []

    def lazily():
        for one in given(draw(15)):
            read.append(one[0])
            yield one

    found = pool.solve(lazily())
    next(found)
    assert len(read) <= pool.slots + pool.lanes < 15
    assert len(list(found)) == 14


def test_weighted_matrices_are_proven_in_the_weighted_norm(problem):
    matrices, rng = draw(4), np.random.default_rng(1)
    matrices = matrices.astype(np.float64)
    weights = [np.cov(rng.standard_normal((n, 3 * n))) for n in SHAPE]
    kind = Kind(problem, np.dtype(np.float64), (True, True), traces=True)
    weighted = Pool(kind, lanes=2, slots=4)
    several = (Matrix(i, x, i, *weights) for i, x in enumerate(matrices))
    for one in weighted.solve(several):
        error = measure(matrices[one.key], one.terms, *weights).spectral
        # The solver adds a ridge to singular weights, which these hardly have.
        assert one.spectral_error == pytest.approx(error, rel=1e-4)
        assert 0.9 * error < one.local_bound <= error
        start = measure(matrices[one.key], one.frobenius, *weights).spectral
        assert error < start
        assert one.trace.spectral_error[0] == pytest.approx(start, rel=1e-2)


def test_a_closed_form_needs_no_stage():
    problem = Problem.of(SHAPE, ONE, "frobenius", num_starts=1)
    pool = make_pool(problem, lanes=2, slots=2)
    found = {one.key: one for one in pool.solve(given(draw(3)))}
    for i, matrix in enumerate(draw(3)):
        alone = approximate(matrix, ONE, norm="frobenius")
        assert found[i].products == 0 and found[i].trace.p.tolist() == [2]
        assert found[i].spectral_error == pytest.approx(alone.error.spectral, rel=1e-4)
        # What is left is orthogonal to the tangent space, and proves this as it is.
        (terms,) = alone.terms
        rest = matrix - multiply_out(np.float64(terms.a), np.float64(terms.b))
        s = np.linalg.svd(rest, compute_uv=False)
        wanted = np.sum(s**2) / np.sum(s)
        assert found[i].local_bound == pytest.approx(wanted, rel=1e-3)


def test_products_are_told_as_they_are_spent(pool):
    told = []
    found = list(pool.solve(given(draw(5)), lambda *spent: told.append(spent)))
    products, turned = np.sum(told, axis=0)
    assert products == sum(one.products for one in found) > 0
    # Both starts take part in the race; later stages are run by the better one.
    stages = len(pool.kind.problem.schedule())
    assert 5 < turned <= 5 * stages


def test_the_memory_has_room_for_all_slots(pool):
    assert pool.memory > 4 * pool.slots * np.prod(SHAPE)


def test_simulated_devices_without_threads_are_refused(problem, monkeypatch):
    monkeypatch.setenv(cpu_threads.VARIABLE, "2")
    (one,) = jax.devices()
    with pytest.raises(ValueError, match="set PJRT_NPROC=4 before"):
        make_pool(problem, lanes=1, slots=1, devices=[one, one])


@pytest.fixture(scope="module")
def eight():
    """What a process with eight simulated devices tells."""
    flags = os.environ["XLA_FLAGS"]
    run = subprocess.run(
        [sys.executable, "-c", EIGHT],
        env={
            **os.environ,
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8",
            cpu_threads.VARIABLE: "16",
        },
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert told["devices"] == 8
    return told


def test_eight_devices_find_what_one_does(eight):
    assert eight["found"] == 20 and eight["same"]


def test_no_device_talks_to_another_one(eight):
    assert eight["factored"] == [False, True]
    names = {
        f"{name} of {rank} rank"
        for name in ("start", "work", "turn", "finish", "empty")
        for rank in ("low", "high")
    }
    # A sum over all devices shows that talk would be noticed.
    assert eight["said"] == {"sum": ["all-reduce"], **{name: [] for name in names}}
    assert all(eight["divided"])
    assert {"work of low rank", "work of high rank"} <= set(eight["loops"])
