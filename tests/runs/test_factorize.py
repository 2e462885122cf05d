"""`factorize`: any tensors in, factors and records out."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import kronjax
from kronjax import methods, recipe
from kronjax.runs.processes import Hosts
from kronjax.runs.store import Store

RULES = recipe.loads("""
rules:
- {match: "low.*", method: low-rank, rank: 2, weighting: none}
- {match: "*", method: kronecker, terms: [{a_shape: [2, 3]}], weighting: none}
""")
LOW_RANK = recipe.loads(
    "rules: [{match: '*', method: low-rank, rank: 2, weighting: none}]"
)


@pytest.fixture(scope="module")
def tensors():
    """Two wide and two tall matrices, and a vector."""
    rng = np.random.default_rng(0)
    shapes = {"low.0": (6, 9), "low.1": (9, 6), "sum.2": (6, 9), "sum.10": (6, 9)}
    found = {k: rng.standard_normal(x).astype(np.float32) for k, x in shapes.items()}
    return {**found, "bias": np.ones(9, np.float32)}


@pytest.fixture(scope="module")
def whole(tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    return kronjax.factorize(tensors, RULES, folder, progress=False), folder


def stored(folder):
    files = (folder / "matrices").glob("*.safetensors")
    return {path.name: path.read_bytes() for path in files}


def test_factors_have_the_errors_and_gaps_of_their_records(tensors, whole):
    done, _ = whole
    assert done.names == ["low.0", "low.1", "sum.2", "sum.10"]
    for name in done.names:
        matrix, record = np.float64(tensors[name]), done.record(name)
        approximation = sum(np.float64(x.to_matrix()) for x in done.terms(name))
        spectral = np.linalg.norm(matrix - approximation, 2)
        assert record["errors"]["spectral"] == pytest.approx(spectral, rel=1e-5)
        assert 0 <= record["bounds"]["gap"] <= 1
        assert set(done.factors(name)) == {"a", "b"}
    assert max(done.record(name)["bounds"]["gap"] for name in done.names[:2]) < 1e-4
    factors = [x for name in done.names for x in done.factors(name).values()]
    assert done.parameters == sum(x.size for x in factors) + tensors["bias"].size
    with pytest.raises(KeyError, match="no rule changes bias"):
        done.factors("bias")


def test_a_factorization_is_printed_in_few_lines(tensors, whole):
    done, _ = whole
    lines = repr(done).splitlines()
    assert len(lines) <= 10 and "array" not in repr(done)
    assert "4 of 4 matrices are finished" in lines[0]
    assert "<pre" in done._repr_html_()
    many = {f"w.{i}": np.full((6, 9), np.nan, np.float32) for i in range(12)}
    failed = kronjax.factorize(many, LOW_RANK, progress=False)
    assert len(failed.failed) == 12 and failed.names == []
    lines = repr(failed).splitlines()
    assert len(lines) <= 10 and "and 7 more" in lines[-1] and "NaN" in repr(failed)
    with pytest.raises(KeyError, match="has failed"):
        failed.factors("w.3")


def test_finished_matrices_are_not_solved_again(tensors, whole, monkeypatch):
    done, folder = whole
    monkeypatch.setattr(Store, "put", lambda *_: pytest.fail("solved again"))
    again = kronjax.factorize(tensors, RULES, folder, progress=False)
    assert again.records == done.records


def test_an_interrupted_run_resumes_bit_by_bit(tensors, whole, tmp_path, monkeypatch):
    _, folder = whole
    put, names = Store.put, []

    def interrupted(self, task, *rest):
        if len(names) == 3:
            raise KeyboardInterrupt
        names.append(task.name)
        put(self, task, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Store, "put", interrupted)
        kronjax.factorize(tensors, RULES, tmp_path, progress=False)
    assert len(stored(tmp_path)) == 3
    kronjax.factorize(tensors, RULES, tmp_path, progress=False)
    assert stored(tmp_path) == stored(folder)


def test_files_and_arrays_give_the_same_factors(tensors, whole, tmp_path):
    _, folder = whole
    (tmp_path / "model").mkdir()
    first, second = (dict(list(tensors.items())[i::2]) for i in range(2))
    for i, part in enumerate((first, second)):
        safetensors.numpy.save_file(part, tmp_path / "model" / f"{i}.safetensors")
    (tmp_path / "rules.yaml").write_text(recipe.dumps(RULES))
    source, rules = tmp_path / "model", tmp_path / "rules.yaml"
    done = kronjax.factorize(source, str(rules), tmp_path / "out", progress=False)
    assert done.plan.source == str(source)
    assert stored(tmp_path / "out") == stored(folder)


def test_results_of_other_rules_are_refused_or_replaced(tensors, tmp_path):
    kronjax.factorize(tensors, LOW_RANK, tmp_path, progress=False)
    before = stored(tmp_path)
    other = recipe.loads(
        "rules: [{match: '*', method: low-rank, rank: 1, weighting: none}]"
    )
    with pytest.raises(ValueError, match="another plan .* --force"):
        kronjax.factorize(tensors, other, tmp_path, progress=False)
    assert stored(tmp_path) == before
    done = kronjax.factorize(tensors, other, tmp_path, force=True, progress=False)
    assert len(stored(tmp_path)) == 4 and len(done.names) == 4
    plan = tmp_path / "plan.json"
    former = plan.read_text().replace('"format": 3', '"format": 1')
    plan.write_text(former)
    with pytest.raises(ValueError, match="earlier version .* start anew"):
        kronjax.factorize(tensors, other, tmp_path, progress=False)
    assert plan.read_text() == former and len(stored(tmp_path)) == 4
    kronjax.factorize(tensors, other, tmp_path, force=True, progress=False)
    assert '"format": 3' in plan.read_text()


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("match: '*', method: low-rank, rank: 2", {}, "weighting: none"),
        (
            "match: '*', method: low-rank, rank: 2, weighting: none, start: random",
            {},
            "no start",
        ),
        ("match: bias, method: low-rank, rank: 2, weighting: none", {}, "no matrix"),
        ("match: h.*, method: low-rank, rank: 2, weighting: none", {}, "no layer"),
        ("match: '*', method: low-rank, rank: 7, weighting: none", {}, "more than"),
        (
            "match: sum.2, method: kronecker, norm: frobenius, weighting: none, "
            "terms: [{a_shape: [2, 3]}, {a_shape: [6, 1], rank: 1}]",
            {"num_starts": 2},
            "from one start",
        ),
    ],
)
def test_mistakes_leave_nothing_behind(tensors, tmp_path, rule, options, message):
    rules = recipe.loads(f"rules: [{{{rule}}}]")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        kronjax.factorize(tensors, rules, out, **options, progress=False)
    assert not out.exists()


def test_a_closed_form_takes_any_settings(tensors):
    options = {"num_starts": 3, "seed": 5, "max_products": 10, "tolerance": 1e-4}
    done = kronjax.factorize(tensors, LOW_RANK, **options, progress=False)
    assert done.names and dataclasses.asdict(done.plan.settings)["seed"] == 5


def test_several_processes_need_a_folder(tensors):
    with pytest.raises(ValueError, match="give out"):
        kronjax.factorize(tensors, LOW_RANK, hosts=Hosts(0, 2))


class Signs(methods.Method):
    """The signs of a matrix times the mean of its absolute values."""

    name = "signs"

    def num_parameters(self, rule, shape):
        return 1

    def fit(self, kernel, left, right, rule):
        return {"mean": np.abs(kernel).mean(), "signs": np.sign(kernel)}

    def matrix(self, factors):
        return np.asarray(factors["mean"] * factors["signs"], np.float64)


def test_a_method_of_its_own_is_stored_with_its_scalars(tensors, monkeypatch):
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))
    methods.register(Signs())
    rules = recipe.loads("rules: [{match: 'low.*', method: signs, weighting: none}]")
    done = kronjax.factorize(tensors, rules, progress=False)
    factors, record = done.factors("low.0"), done.record("low.0")
    assert factors["mean"].shape == ()
    error = np.linalg.norm(tensors["low.0"] - Signs().matrix(factors))
    assert record["errors"]["frobenius"] == pytest.approx(error, rel=1e-5)
    assert record["bounds"]["gap"] is None and record["method"] == "signs"


def test_factors_have_the_dtype_of_their_matrix(tensors, tmp_path):
    """In float32, factors of a bfloat16 matrix may take more bytes than the matrix."""
    half = {k: x.astype(ml_dtypes.bfloat16) for k, x in tensors.items()}
    done = kronjax.factorize(half, RULES, tmp_path, progress=False)
    for name in done.names:
        factors = done.factors(name)
        assert {str(x.dtype) for x in factors.values()} == {"bfloat16"}
        record, matrix = done.record(name), np.float64(half[name])
        approximation = methods.find("kronecker").matrix(factors)
        spectral = np.linalg.norm(matrix - approximation, 2)
        assert record["errors"]["spectral"] == pytest.approx(spectral, rel=1e-6)


def test_a_matrix_that_would_not_shrink_stays_dense_and_is_listed(tensors, tmp_path):
    rules = recipe.loads("""
rules:
- {match: "low.*", method: low-rank, rank: 4, weighting: none}
- {match: "*", method: kronecker, terms: [{a_shape: [2, 3]}], weighting: none}
""")
    done = kronjax.factorize(tensors, rules, tmp_path, progress=False)
    assert done.names == ["sum.2", "sum.10"]
    assert dict(done.dense) == {
        f"low.{i}": "60 parameters would replace 54" for i in (0, 1)
    }
    assert "2 would not shrink and stay dense" in repr(done)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "stays dense: 60 parameters would replace 54" in page
    assert done.plain()["dense"] == dict(done.dense)
    again = kronjax.factorize(tensors, rules, tmp_path, progress=False)
    assert dict(again.dense) == dict(done.dense)
    rule = recipe.Rule(match="*", method="low-rank", rank=5, weighting="none")
    done = kronjax.factorize(tensors, recipe.Recipe(rules=(rule,)), progress=False)
    assert done.names == [] and len(done.dense) == 4
    assert done.parameters == sum(x.size for x in tensors.values())


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_only_what_is_exact_up_to_the_rounding_of_solves_has_gap_zero(dtype):
    rng = np.random.default_rng(0)
    a, b, u, v = (rng.integers(-3, 4, x) for x in ((2, 3), (6, 6), (12, 1), (1, 18)))
    exact = {"sum.0": np.kron(a, b).astype(dtype), "low.0": (u @ v).astype(dtype)}
    done = kronjax.factorize(exact, RULES, progress=False)
    for name in done.names:
        record = done.record(name)
        assert record["errors"]["relative_spectral"] < 0.01
        # Factors in half precision are rounded more than a solve is.
        assert (record["bounds"]["gap"] > 0) == (dtype is ml_dtypes.bfloat16)


def test_tensors_of_eight_bits_are_kept_and_never_compressed(tensors):
    content = {**tensors, "low.8": tensors["low.0"].astype(ml_dtypes.float8_e4m3fn)}
    with pytest.raises(ValueError, match="low.8 has dtype float8_e4m3fn.*method: keep"):
        kronjax.factorize(content, RULES, progress=False)
    keep = recipe.Rule(match="low.8", method="keep")
    rules = RULES.model_copy(update={"rules": (keep, *RULES.rules)})
    done = kronjax.factorize(content, rules, progress=False)
    assert done.names == ["low.0", "low.1", "sum.2", "sum.10"]
    rule = recipe.Rule(match="sum.2", method="low-rank", rank=1, weighting="none")
    done = kronjax.factorize(content, recipe.Recipe(rules=(rule,)), progress=False)
    assert done.names == ["sum.2"]
