"""What is kept of a run: whole, damaged, of another plan, of a later version."""

import json

import numpy as np
import pytest

from kronjax import recipe
from kronjax.io import storage
from kronjax.io.matrices import read
from kronjax.kronecker import KroneckerTerms, to_arrays
from kronjax.linalg.dense import multiply_out
from kronjax.runs import factorize, store
from kronjax.runs.settings import SolveSettings
from kronjax.runs.store import Store

RULES = "rules: [{match: '*', method: low-rank, rank: 1, weighting: none}]"


def make_plan(count=3, seed=0):
    rng = np.random.default_rng(seed)
    some = {f"../w{i}": rng.standard_normal((4, 6)) for i in range(count)}
    return factorize.planned(some, recipe.loads(RULES), SolveSettings())[0]


def terms(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((1, 4, 1)), rng.standard_normal((1, 1, 6))
    return to_arrays((KroneckerTerms(a, b),))


@pytest.fixture
def kept(tmp_path):
    """A store of three matrices: two are solved, one failed."""
    made = Store(storage.find(str(tmp_path / "out")), make_plan())
    made.agree({"cpu: group": 4})
    for task in made.plan.tasks[:2]:
        facts = {"status": store.SOLVED, "seconds": np.float32(1), "gap": float("nan")}
        made.put(task, terms(task.index), facts)
    made.put(made.plan.tasks[2], {}, {"status": store.FAILED, "reason": "it is odd"})
    return made


def records(kept):
    return kept.records(kept.plan.tasks)


def test_what_was_put_is_there(kept):
    found = records(kept)
    assert sorted(found) == [0, 1, 2]
    assert found[0]["seconds"] == 1 and found[0]["gap"] is None
    assert found[2]["reason"] == "it is odd" and "digest" not in found[2]
    for task in kept.plan.tasks[:2]:
        ours, theirs = kept.factors(task), terms(task.index)
        assert sorted(ours) == ["a", "b"]
        np.testing.assert_array_equal(ours["a"], theirs["a"])
        np.testing.assert_array_equal(ours["b"], theirs["b"])
        # Any file of factors can be read as the matrix that it stands for.
        path = kept.place.path / store.file_names(task.index)[0]
        np.testing.assert_allclose(
            read(path).matrix, multiply_out(ours["a"], ours["b"])[...]
        )
    names = sorted(x.name for x in kept.place.path.rglob("*") if x.is_file())
    numbers = ["00000", "00001"]
    expected = [f"{x}.{y}" for x in numbers for y in ("json", "safetensors")]
    assert names == [*expected, "00002.json", "plan.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
        lambda content: b"\x00" * len(content),
        lambda content: None,
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_damaged_counts_as_absent(kept, damage, which):
    path = kept.place.path / store.file_names(0)[which]
    content = damage(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert sorted(records(kept)) == [1, 2]


@pytest.mark.parametrize("change", [{"status": "failed"}, {"format": "x"}, {"p": 2}])
def test_a_record_is_sealed(kept, change):
    path = kept.place.path / store.file_names(0)[1]
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert sorted(records(kept)) == [1, 2]


def test_a_record_has_to_be_of_this_plan(kept):
    other = Store(kept.place, make_plan(seed=1))
    assert records(other) == {}
    first, second = (kept.place.path / store.file_names(i)[1] for i in (0, 1))
    first.write_bytes(second.read_bytes())  # sealed, but of another matrix
    assert sorted(records(kept)) == [1, 2]


def test_a_later_record_is_refused(kept):
    path = kept.place.path / store.file_names(1)[1]
    path.write_text(json.dumps({"format": 3, "new": True}))
    with pytest.raises(ValueError, match=r"00001.json is of format 3.*update kronjax"):
        records(kept)


def test_a_place_belongs_to_one_plan(kept):
    again = Store(kept.place, make_plan())
    again.agree({"cpu: group": 8, "gpu: group": 2})
    assert again.plan.lanes == {"cpu: group": 4, "gpu: group": 2}
    assert store.read_plan(kept.place).lanes == again.plan.lanes
    other = Store(kept.place, make_plan(seed=1))
    with pytest.raises(ValueError, match=r"another plan \(../w0 holds other numbers"):
        other.agree()
    assert sorted(records(kept)) == [0, 1, 2]


def test_a_place_is_cleared_of_ours_alone(kept):
    folder = kept.place.path
    for name in ("notes.txt", "matrices/notes.txt", "matrices/00001.png"):
        (folder / name).write_text("mine")
    (folder / "matrices" / ".00007.json.123.tmp").write_text("")
    kept.clear()
    left = sorted(x.name for x in folder.rglob("*") if x.is_file())
    assert left == ["00001.png", "notes.txt", "notes.txt"]


def test_only_what_a_process_owns_is_swept(kept):
    folder = kept.place.path / "matrices"
    for name in (".00000.json.1.tmp", ".00001.safetensors.2.tmp", ".hidden"):
        (folder / name).write_text("")
    kept.sweep(kept.plan.tasks[:1])
    left = {x.name for x in folder.iterdir() if x.name.startswith(".")}
    assert left == {".00001.safetensors.2.tmp", ".hidden"}


def test_damaged_factors_are_named(kept):
    task = kept.plan.tasks[0]
    (kept.place.path / store.file_names(0)[0]).write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match=r"00000.safetensors is damaged"):
        kept.factors(task)


def test_the_same_factors_make_the_same_file(kept, tmp_path):
    other = Store(storage.find(str(tmp_path / "other")), kept.plan)
    other.put(kept.plan.tasks[0], terms(0), {"status": store.SOLVED})
    name, _ = store.file_names(0)
    ours, theirs = (x.place.read(name) for x in (kept, other))
    assert ours == theirs
