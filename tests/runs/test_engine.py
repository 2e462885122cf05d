"""Many matrices, solved and kept one by one: interrupted, damaged, failing, shared."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import safetensors.numpy

from kronjax import approximate, cpu_threads, recipe
from kronjax.io import atomic, storage
from kronjax.kronecker import from_arrays
from kronjax.linalg.dense import multiply_out
from kronjax.linalg.residuals import measure
from kronjax.runs import (
    engine,
    estimate,
    factorize,
    plan,
    store,
    workers,
)
from kronjax.runs.engine import Inputs
from kronjax.runs.settings import SolveSettings
from kronjax.runs.store import Store
from kronjax.runs.summary import Factorization, failures

LOW_RANK = "rules: [{match: '*', method: low-rank, rank: 2, weighting: none}]"

# p = 4 alone: one program for all tests that need a pool.
POOLED = """
rules:
- match: "k.*"
  method: kronecker
  terms: [{a_shape: [3, 2], rank: 2}]
  norm: schatten:4
  weighting: none
- {match: "*", method: low-rank, fraction: 0.5, weighting: none}
"""

# Of a process that is killed and begun again until it ends.
RUN = """
import sys
from kronjax.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def draw(count, shape=(9, 8), name="w", dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {
        f"{name}.{i}": rng.standard_normal(shape).astype(dtype) for i in range(count)
    }


def planned(matrices, rules=LOW_RANK, **settings):
    settings = {"tolerance": 2e-4, "num_starts": 4, **settings}
    given = recipe.loads(rules), SolveSettings(**settings)
    return factorize.planned(matrices, *given)[0]


def begin(folder, matrices, rules=LOW_RANK, **settings):
    plan = planned(matrices, rules, **settings)
    kept = Store(storage.find(str(folder)), plan)
    kept.agree(engine.lanes_of(kept, jax.local_devices()[:1]))
    return kept


def solve(folder, matrices, rules=LOW_RANK, **keywords):
    kept = begin(folder, matrices, rules)
    engine.run(Inputs(matrices), kept, devices=jax.local_devices()[:1], **keywords)
    return kept


def contents(kept):
    """All factors as bytes, by name."""
    folder = kept.place.path / "matrices"
    return {x.name: x.read_bytes() for x in sorted(folder.glob("*.safetensors"))}


def records(kept):
    return kept.records(kept.plan.tasks)


@pytest.fixture(scope="module")
def matrices():
    """Seven for a pool, two of low rank."""
    return {**draw(7, (6, 8), "k"), **draw(2, seed=1)}


@pytest.fixture(scope="module")
def whole(matrices, tmp_path_factory):
    """A run without an interruption."""
    return solve(tmp_path_factory.mktemp("whole"), matrices, POOLED)


def test_every_matrix_has_the_factors_that_its_record_speaks_of(whole, matrices):
    found = records(whole)
    assert sorted(found) == list(range(9))
    for task in whole.plan.tasks:
        told, matrix = found[task.index], np.float64(matrices[task.name])
        (terms,) = from_arrays(whole.factors(task))
        assert terms.a.shape[0] + terms.b.shape[0] == 4
        left = matrix - multiply_out(np.float64(terms.a), np.float64(terms.b))
        norm = np.linalg.norm(left, 2)
        assert told["errors"]["spectral"] == pytest.approx(norm, rel=1e-9)
        assert told["errors"]["frobenius"] == pytest.approx(np.linalg.norm(left))
        relative = norm / np.linalg.norm(matrix, 2)
        assert told["errors"]["relative_spectral"] == pytest.approx(relative)
        assert 0 <= told["bounds"]["local"] <= norm
        assert told["plan"] == whole.plan.hash
        assert told["precision"] == {"dtype": "float32", "products": "highest"}
        assert told["versions"]["jax"] == jax.__version__
        if task.is_low_rank:
            s = np.linalg.svd(matrix, compute_uv=False)
            assert norm == pytest.approx(s[2], rel=1e-5)
            assert 0 <= told["bounds"]["gap"] < 1e-4
        else:
            assert told["products"] > 0 and told["p"][-1] == 4
            assert told["start_spectral_error"] > 0


def test_what_is_finished_is_not_solved_again(whole, matrices, monkeypatch):
    before = contents(whole)
    monkeypatch.setattr(Inputs, "read", None)
    again = solve(whole.place.path, matrices, POOLED)
    assert contents(again) == before


@pytest.mark.parametrize("order", [[0, 5, 8], [6], [0, 1, 2, 3, 4, 5, 6]])
def test_a_resumed_run_is_bit_identical(whole, matrices, tmp_path, order):
    """Whatever is missing, and whoever is solved beside what is missing."""
    kept = begin(tmp_path, matrices, POOLED)
    for path in (whole.place.path / "matrices").iterdir():
        if int(path.name[:5]) not in order:
            kept.place.write(f"matrices/{path.name}", path.read_bytes())
    kept.agree({})
    told = []
    engine.run(
        Inputs(matrices),
        kept,
        devices=jax.local_devices()[:1],
        tell=lambda text, count: told.append(count),
    )
    assert told[0] == 9 - len(order) and sum(told) == 9
    assert contents(kept) == contents(whole)


def test_processes_solve_what_they_own_and_no_more(whole, matrices, tmp_path):
    for process in (1, 0, 2):
        kept = solve(tmp_path, matrices, POOLED, process=process, processes=3)
        own = [
            i for i in range(9) if i % 3 in {1, process} | {0} & {process, 2 - process}
        ]
        found = set(records(kept))
        assert {i for i in range(9) if i % 3 == process} <= found
        assert process != 1 or found == {1, 4, 7}, own
    assert contents(kept) == contents(whole)


def test_what_holds_nan_stays_dense_and_harms_nobody(whole, matrices, tmp_path):
    ill = {name: x.copy() for name, x in matrices.items()}
    ill["k.3"][2, 2], ill["w.1"][0, 0] = np.nan, np.inf
    kept = solve(tmp_path, ill, POOLED)
    found = Factorization.of(kept)
    assert [task.name for task, _ in found.failed] == ["k.3", "w.1"]
    assert {reason for _, reason in found.failed} == {
        "it holds NaN or infinite entries"
    }
    good = contents(whole)
    del good["00003.safetensors"], good["00008.safetensors"]
    assert contents(kept) == good
    assert found.parameters == found.plan.parameters - sum(
        task.size - task.parameters for task, _ in found.solved
    )
    assert failures(found).row_count == 2
    # Nor are they tried again.
    assert records(solve(tmp_path, ill, POOLED)) == records(kept)


def test_a_solver_that_diverges_leaves_a_record(matrices, tmp_path, monkeypatch):
    class Diverging(workers.Pool):
        def solve(self, *given):
            for one in super().solve(*given):
                if one.key.name == "k.1":
                    one.terms[0].a[...] = np.inf
                yield one

    monkeypatch.setattr(workers, "Pool", Diverging)
    found = Factorization.of(solve(tmp_path, matrices, POOLED))
    assert [(x.name, y) for x, y in found.failed] == [("k.1", "the solver diverged")]


def test_what_overflows_is_recorded_and_harms_nobody(tmp_path):
    matrices = draw(3)
    matrices["w.1"] = np.full((9, 8), 3e38, np.float32)
    found = Factorization.of(solve(tmp_path, matrices))
    assert [task.name for task, _ in found.failed] == ["w.1"]
    assert "out of range" in found.failed[0][1]
    assert len(found.solved) == 2


def test_what_underflows_has_no_gap_of_zero(tmp_path):
    tiny = {"k.0": np.full((6, 8), 1e-44, np.float32), **draw(1)}
    tiny["k.0"][::2, ::3] = 3e-44
    (_, one), _ = Factorization.of(solve(tmp_path, tiny, POOLED)).solved
    assert one["errors"]["relative_spectral"] == 1
    assert one["bounds"] == {"local": 0, "gap": 1}


def test_a_full_disk_leaves_what_is_finished(tmp_path, monkeypatch):
    matrices, calls = draw(9), []
    write = atomic.write

    def full(path, content):
        calls.append(path)
        if len(calls) == 10:
            raise OSError(errno.ENOSPC, f"cannot write {path}: No space left on device")
        write(path, content)

    monkeypatch.setattr(atomic, "write", full)
    with pytest.raises(OSError, match="cannot write .* No space left"):
        solve(tmp_path, matrices)
    monkeypatch.undo()
    kept = begin(tmp_path, matrices)
    assert sorted(records(kept)) == [0, 1, 2, 3]
    assert not [x for x in os.listdir(tmp_path / "matrices") if x.endswith(".tmp")]
    assert len(records(solve(tmp_path, matrices))) == 9


def test_a_tensor_that_changes_meanwhile_is_noticed(tmp_path):
    matrices = draw(3)
    kept = begin(tmp_path, matrices)
    matrices["w.1"] = matrices["w.1"] + 1
    with pytest.raises(ValueError, match="w.1 has changed since the plan"):
        engine.run(Inputs(matrices), kept)
    assert sorted(records(kept)) == [0]


def test_the_largest_matrices_come_first(matrices):
    plan = planned({**matrices, **draw(1, (6, 80), "x")}, POOLED)
    found = engine.groups(plan.tasks, plan.settings)
    assert [one.tasks[0].size for one in found] == [480, 72, 48]
    assert [one.problem is None for one in found] == [True, True, False]


def test_wide_matrices_are_solved_as_tall_ones_and_turned_back(matrices, tmp_path):
    given = {"k.0": matrices["k.0"], "k.1": matrices["k.0"].T}
    rule = POOLED.split("- {")[0]
    turned = rule.replace("rules:", "").replace("k.*", "k.1").replace("3, 2", "2, 3")
    # One start: others are drawn by the number of the matrix.
    kept = begin(tmp_path, given, rule.replace("k.*", "k.0") + turned, num_starts=1)
    engine.run(Inputs(given), kept, devices=jax.local_devices()[:1])
    (group,) = engine.groups(kept.plan.tasks, kept.plan.settings)
    assert group.problem.shape == (8, 6) and "8x6 (2x3, 2)" in group.key
    (wide,), (tall,) = (from_arrays(kept.factors(x)) for x in kept.plan.tasks)
    assert wide.a.shape == (2, 3, 2) and tall.a.shape == (2, 2, 3)
    dense = [multiply_out(x.a, x.b) for x in (wide, tall)]
    np.testing.assert_array_equal(dense[0], dense[1].T)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_precision_follows_the_tensors(dtype, tmp_path):
    kept = solve(tmp_path, draw(1, dtype=dtype))
    (terms,) = from_arrays(kept.factors(kept.plan.tasks[0]))
    wanted = "float64" if dtype == np.float64 else "float32"
    assert records(kept)[0]["precision"]["dtype"] == wanted
    assert terms.a.dtype == dtype


def test_a_row_of_low_rank_is_a_column(tmp_path):
    rules = """
rules:
- match: "*"
  method: kronecker
  terms: [{a_shape: [1, 8], rank: 2}]
  weighting: none
"""
    matrices = draw(1)
    kept = solve(tmp_path, matrices, rules)
    (terms,) = from_arrays(kept.factors(kept.plan.tasks[0]))
    assert terms.a.shape == (2, 1, 8) and terms.b.shape == (2, 9, 1)
    left = matrices["w.0"] - multiply_out(terms.a, terms.b)
    s = np.linalg.svd(matrices["w.0"], compute_uv=False)
    assert np.linalg.norm(left, 2) == pytest.approx(s[2], rel=1e-5)


WEIGHTED = """
rules:
- {match: "s.*", method: kronecker, terms: [{a_shape: [3, 2], rank: 2}], norm: spectral}
- {match: "f.*", method: kronecker, terms: [{a_shape: [3, 2], rank: 2}]}
- {match: "w.*", method: low-rank, rank: 2}
"""


@pytest.fixture(scope="module")
def weighted(tmp_path_factory):
    """A run with weights: by a pool, by joint fits and by the closed form."""
    given = {**draw(2, (6, 8), "s"), **draw(3, (6, 8), "f"), **draw(2, name="w")}
    given["f.2"] = np.ascontiguousarray(given["f.1"].T)
    rng = np.random.default_rng(5)

    def moment(n):
        return np.cov(rng.standard_normal((n, 3 * n))).astype(np.float32)

    sides = {name: tuple(map(moment, x.shape)) for name, x in given.items()}
    sides["f.2"] = sides["f.1"][::-1]
    rules = WEIGHTED.replace("[3, 2], rank: 2}]}", "[3, 2], rank: 2}], ignore: f.2}")
    turned = "- {match: f.2, method: kronecker, terms: [{a_shape: [2, 3], rank: 2}]}"
    shapes = {name: x.shape for name, x in given.items()}
    assigned = recipe.resolve(recipe.loads(rules + turned), shapes)
    made = plan.make(
        assigned, given, weights=sides, settings=SolveSettings(tolerance=1e-3)
    )
    kept = Store(storage.find(str(tmp_path_factory.mktemp("weighted"))), made)
    kept.agree(engine.lanes_of(kept, jax.local_devices()[:1]))
    engine.run(Inputs(given, sides), kept, devices=jax.local_devices()[:1])
    return kept, given, sides


def test_weighted_errors_are_recorded_as_they_are(weighted):
    kept, given, sides = weighted
    for task in kept.plan.tasks:
        record = records(kept)[task.index]
        terms = from_arrays(kept.factors(task))
        error = measure(given[task.name], terms, *sides[task.name])
        whole = measure(given[task.name], (), *sides[task.name])
        relative = error.frobenius / whole.frobenius
        assert record["errors"]["relative_weighted"] == pytest.approx(
            relative, rel=1e-2
        )
        if task.norm == "spectral":
            assert record["errors"]["weighted_spectral"] == pytest.approx(
                error.spectral
            )
            assert 0 < record["bounds"]["local"] <= error.spectral
            assert 0 <= record["bounds"]["gap"] < 0.05
        else:
            assert record["bounds"]["gap"] == (0 if task.is_low_rank else None)


def test_weighted_solutions_are_those_of_approximate(weighted):
    kept, given, sides = weighted
    for task in kept.plan.tasks:
        left, right = sides[task.name]
        alone = approximate(
            given[task.name],
            task.configurations,
            norm="frobenius" if task.is_low_rank else task.norm,
            left_weight=left,
            right_weight=right,
            tolerance=1e-3,
            num_starts=1,
        )
        record = records(kept)[task.index]
        name, key = "relative_weighted", "frobenius"
        if task.norm == "spectral":
            name, key = "weighted_spectral", "spectral"
        wanted = alone.weighted_relative if key == "frobenius" else alone.weighted
        found = record["errors"][name]
        assert found == pytest.approx(float(getattr(wanted, key)), rel=2e-2)


def test_a_joint_fit_of_the_transpose_is_the_transpose(weighted):
    kept, _, _ = weighted
    found = {x.name: from_arrays(kept.factors(x)) for x in kept.plan.tasks}
    (first,), (second,) = found["f.1"], found["f.2"]
    dense = [multiply_out(x.a, x.b) for x in (first, second)]
    np.testing.assert_allclose(dense[0], dense[1].T, atol=1e-6)
    groups = engine.groups(kept.plan.tasks, kept.plan.settings)
    (joint,) = (x for x in groups if "frobenius" in x.key and x.count == 3)
    assert joint.problem is None


def test_a_forecast_knows_memory_and_time_and_writes_nothing(matrices, tmp_path):
    kept = Store(storage.find(str(tmp_path / "out")), planned(matrices, POOLED))
    estimates = estimate.of(Inputs(matrices), kept, jax.devices()[:1])
    found = {x.group.count: x for x in estimates}
    assert found[2].memory == 0 and found[7].memory > 7 * 48 * 4
    assert found[7].lanes == 7 and all(one.seconds > 0 for one in found.values())
    assert not (tmp_path / "out").exists()


def test_lanes_shrink_where_memory_does_not_suffice(matrices, tmp_path, monkeypatch):
    kept = begin(tmp_path, matrices, POOLED)
    (key,) = kept.plan.lanes
    assert kept.plan.lanes[key] == 7
    monkeypatch.setattr(workers, "memory_limit", lambda devices: 1)
    assert set(engine.lanes_of(kept, jax.devices()[:1]).values()) == {7}

    class Small(workers.Pool):  # compiled for seven in any case
        def __init__(self, *given, lanes, slots, **more):
            super().__init__(*given, lanes=7, slots=7, **more)
            self.lanes, self.memory = 7, lanes  # what it would take

    monkeypatch.setattr(workers, "Pool", Small)
    engine.run(Inputs(matrices), kept, devices=jax.devices()[:1])
    assert store.read_plan(kept.place).lanes[key] == 1


def model(folder, count, shape=(48, 40)):
    """A safetensors file, the rules for it, and the command that factorizes it."""
    some = {**draw(count, shape), **draw(6, (6, 8), "k")}
    safetensors.numpy.save_file(some, folder / "model.safetensors")
    (folder / "rules.yaml").write_text(POOLED)
    line = ["factorize", "model.safetensors", "--recipe", "rules.yaml", "--out"]
    return [sys.executable, "-c", RUN, *line]


def finish(command, folder, kills, rng):
    """Run a line until it ends by itself; kill it `kills` times before."""
    for _ in range(kills):
        run = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)
        # Not before it has begun, most of the time: that takes seconds.
        deadline = time.monotonic() + rng.uniform(1, 60)
        started = len(list(folder.glob("out/matrices/*.json")))
        more = rng.integers(1, 30)
        while time.monotonic() < deadline and run.poll() is None:
            time.sleep(0.002)
            if len(list(folder.glob("out/matrices/*.json"))) >= started + more:
                break
        run.send_signal(signal.SIGKILL)
        run.wait()
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_a_run_that_is_killed_goes_on(tmp_path):
    kills, count = 3, 126  # `bench.whole_models` kills twenty times
    rng = np.random.default_rng(kills)
    command = model(tmp_path, count - 6)
    ended = finish([*command, "out"], tmp_path, kills, rng)
    assert ended.returncode == 0, ended.stderr
    assert f"{count} of {count} matrices are finished" in ended.stdout
    whole = subprocess.run([*command, "whole"], cwd=tmp_path, capture_output=True)
    assert whole.returncode == 0
    solved, wanted = (
        {
            x.name: x.read_bytes()
            for x in (tmp_path / place / "matrices").iterdir()
            if x.suffix == ".safetensors"
        }
        for place in ("out", "whole")
    )
    assert solved == wanted and len(solved) == count
    names = os.listdir(tmp_path / "out" / "matrices")
    assert not [x for x in names if x.startswith(".")]


@pytest.mark.slow  # compiles for eight devices
def test_what_one_device_began_eight_end_bit_by_bit(matrices, whole, tmp_path):
    safetensors.numpy.save_file(matrices, tmp_path / "model.safetensors")
    (tmp_path / "rules.yaml").write_text(POOLED)
    (tmp_path / "out" / "matrices").mkdir(parents=True)
    plan = dataclasses.replace(whole.plan, source="model.safetensors")
    (tmp_path / "out" / "plan.json").write_bytes(plan.to_json())
    for name in ("00001.json", "00001.safetensors"):
        content = whole.place.read(f"matrices/{name}")
        (tmp_path / "out" / "matrices" / name).write_bytes(content)
    line = ["factorize", "model.safetensors", "--recipe", "rules.yaml", "--out", "out"]
    settings = ["--tolerance", "2e-4", "--num-starts", "4"]
    flags = os.environ["XLA_FLAGS"]
    run = subprocess.run(
        [sys.executable, "-m", "kronjax", *line, *settings],
        cwd=tmp_path,
        env={
            **os.environ,
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8",
            cpu_threads.VARIABLE: "16",
        },
        timeout=400,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    kept = Store(storage.find(str(tmp_path / "out")), whole.plan)
    assert contents(kept) == contents(whole)


def test_a_quota_ends_a_run_with_a_clear_word(tmp_path):
    """No file may grow beyond 12 KiB; the factors are larger, the plan is not."""
    command = model(tmp_path, 3, (400, 40))
    run = subprocess.run(
        ["bash", "-c", 'ulimit -f 12; exec "$@"', "-", *command, "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert run.returncode == 2, run.stderr
    assert "cannot write out/matrices/00006.safetensors: File too large" in run.stderr
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["tasks"]
    assert os.listdir(tmp_path / "out" / "matrices") == []
