import json
import os
import re
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from helpers import kronecker_sum_reference

import kronjax
from kronjax.cli.main import main
from kronjax.io import atomic, matrices

SHAPE = ["--a-shape", "3", "4"]
ASKED = [*SHAPE, "--rank", "2"]
FIELDS = {
    "shape": list,
    "a_shape": list,
    "b_shape": list,
    "rank": int,
    "num_parameters": int,
    "spectral_error": float,
    "frobenius_error": float,
    "relative_spectral_error": float,
    "van_loan_spectral_error": float,
    "svd_rank": int,
    "svd_spectral_error": float,
    "status": str,
    "products": int,
    "seconds": float,
    "compile_seconds": float,
    "notes": list,
    "norm": str,
    "dtype": str,
    "seed": int,
    "tensor": str,
    "trace": dict,
}


def random_matrix(*batch):
    return np.random.default_rng(3).normal(size=(*batch, 12, 12)).astype(np.float32)


@pytest.fixture
def run(capsys):
    """Run the command line: exit code, standard output, standard error."""

    def run(*args):
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def solve(run):
    """Run `kronjax approximate --json` and return the object."""

    def solve(*args):
        code, out, err = run("approximate", *args, "--json")
        assert code == 0, err
        return json.loads(out)

    return solve


@pytest.fixture
def fails(run):
    """Run what must fail and return the one line that says why."""

    def fails(*args):
        code, out, err = run("approximate", *args)
        assert (code, out) == (2, "")
        assert re.fullmatch(r"kronjax: error: [^\n]+\n", err), err
        return err

    return fails


@pytest.fixture
def weights(tmp_path):
    """A file of two matrices and a vector."""
    path = tmp_path / "weights.safetensors"
    tensors = {
        "query": random_matrix(),
        "value": random_matrix()[:6],
        "bias": np.ones(12, np.float32),
    }
    safetensors.numpy.save_file(tensors, path)
    return path


@pytest.fixture
def npy(tmp_path):
    """Save an array and return its path."""

    def save(array):
        path = tmp_path / "matrix.npy"
        np.save(path, array)
        return path

    return save


def singular_values(matrix):
    return np.linalg.svd(matrix.astype(np.float64), compute_uv=False)


def test_json_is_one_object_with_the_promised_fields(weights, solve):
    found = solve(weights, "--tensor", "query", *ASKED)
    for name, kind in FIELDS.items():
        assert type(found[name]) is kind, name
    assert (found["shape"], found["a_shape"], found["b_shape"]) == (
        [12, 12],
        [3, 4],
        [4, 3],
    )
    assert (found["num_parameters"], found["svd_rank"]) == (48, 2)
    assert found["svd_spectral_error"] == pytest.approx(
        singular_values(random_matrix())[2]
    )
    assert found["spectral_error"] < found["van_loan_spectral_error"]
    assert len({len(column) for column in found["trace"].values()}) == 1


def test_written_factors_have_the_error_that_was_reported(weights, solve, tmp_path):
    out = tmp_path / "factors.safetensors"
    found = solve(weights, "--tensor", "query", *ASKED, "--out", out)
    with safetensors.safe_open(out, framework="np") as file:
        a, b = file.get_tensor("a"), file.get_tensor("b")
        metadata = file.metadata()
    assert (a.shape, b.shape) == ((2, 3, 4), (2, 4, 3))
    error = random_matrix() - kronecker_sum_reference(a, b)
    assert singular_values(error)[0] == pytest.approx(found["spectral_error"])
    assert (metadata["format"], metadata["tensor"]) == ("kronjax", "query")
    assert json.loads(metadata["a_shape"]) == [3, 4]
    assert float(metadata["spectral_error"]) == found["spectral_error"]
    # The reconstruction brings its own configuration and is recovered.
    again = solve(out)
    assert (again["a_shape"], again["rank"]) == ([3, 4], 2)
    assert again["relative_spectral_error"] < 1e-5


def test_table_compares_and_names_the_effort(weights, run):
    code, out, _ = run("approximate", weights, "--tensor", "query", *ASKED)
    assert code == 0
    for word in ("kronjax", "SVD, rank 2", "Van Loan", "parameters", "48"):
        assert word in out
    assert "below Van Loan" in out
    assert "products" in out
    assert "to compile" in out


def test_batches_are_lists_in_json_and_means_in_the_table(npy, solve, run):
    path = npy(random_matrix(2))
    found = solve(path, *ASKED)
    assert (found["batch"], found["shape"]) == ([2], [12, 12])
    expected = singular_values(random_matrix(2))[:, 2]
    np.testing.assert_allclose(found["svd_spectral_error"], expected)
    for name in ("spectral_error", "products", "status", "relative_spectral_error"):
        assert len(found[name]) == 2, name
    code, out, _ = run("approximate", path, *ASKED)
    assert code == 0
    assert "means over 2 matrices" in out


def test_rows_columns_and_transpose_reach_the_solver(npy, solve):
    wide = np.concatenate([np.zeros((12, 5), np.float32), random_matrix().T], axis=1)
    plain = solve(npy(random_matrix()), *ASKED)
    part = solve(npy(wide), *ASKED, "--columns", "-12:", "--transpose")
    for name in ("spectral_error", "svd_spectral_error"):
        assert part[name] == pytest.approx(plain[name])


@pytest.mark.parametrize("dtype", [np.int16, np.float16, ml_dtypes.bfloat16])
def test_short_dtypes_are_computed_in_float32_and_said_so(tmp_path, solve, dtype):
    path = tmp_path / "short.safetensors"
    matrix = (4 * random_matrix()).astype(dtype)
    safetensors.numpy.save_file({"w": matrix}, path)
    found = solve(path, *ASKED)
    assert found["dtype"] == "float32"
    assert any("float32" in note for note in found["notes"])


def test_dtype_and_norm_are_handed_on(npy, solve):
    found = solve(
        npy(random_matrix()), *ASKED, "--dtype", "float64", "--norm=frobenius"
    )
    assert (found["dtype"], found["norm"]) == ("float64", "frobenius")
    assert found["spectral_error"] == pytest.approx(found["van_loan_spectral_error"])


def test_a_rank_above_the_largest_is_capped_with_a_note(npy, solve):
    found = solve(npy(random_matrix()), *SHAPE, "--rank", "40")
    assert found["rank"] == 12
    assert any("12" in note for note in found["notes"])
    assert found["relative_spectral_error"] < 1e-5


def test_a_zero_matrix_has_finite_json(npy, solve):
    found = solve(npy(np.zeros((12, 12), np.float32)), *ASKED)
    assert found["spectral_error"] == 0
    assert found["relative_spectral_error"] == 0


def test_mistakes_in_the_input_end_with_one_line(weights, fails, tmp_path):
    assert "no such file" in fails(tmp_path / "none.npy", *ASKED)
    assert "did you mean query" in fails(weights, "--tensor", "qery", *ASKED)
    assert "query, value" in fails(weights, *ASKED)
    assert "a vector" in fails(weights, "--tensor", "bias", *ASKED)
    chosen = weights, "--tensor", "query"
    assert "there are 12 rows" in fails(*chosen, "--rows", "3:20", *ASKED)
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(weights.read_bytes()[:-20])
    message = fails(truncated, "--tensor", "query", *ASKED)
    assert "file is truncated or not a safetensors file" in message


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[1, None], [2, 3]], object), "never unpickled"),
        (np.ones((12, 12), complex), "complex"),
        (np.ones(12), "a vector"),
        (np.ones((0, 12)), "empty"),
        (np.where(np.eye(12) * np.arange(12) == 5, np.nan, 1), r"\(5, 5\)"),
    ],
)
def test_arrays_that_are_no_matrix_end_with_one_line(npy, fails, array, message):
    assert re.search(message, fails(npy(array), *ASKED))


def test_mistakes_in_the_configuration_end_with_one_line(weights, fails):
    chosen = weights, "--tensor", "query"
    assert "M1 divides 12 (1, 2, 3, 4, 6, 12)" in fails(*chosen)
    assert "--rank R is needed: from 1 to 12" in fails(*chosen, *SHAPE)
    wrong = fails(*chosen, "--a-shape", "3", "5", "--rank", "1")
    assert "1, 2, 3, 4, 6, 12" in wrong
    assert "rank" in fails(*chosen, *SHAPE, "--rank", "0")
    assert "nuclear" in fails(*chosen, *ASKED, "--norm", "nuclear")


def test_output_is_checked_before_the_solve(weights, fails, tmp_path, monkeypatch):
    monkeypatch.setattr(kronjax, "approximate", None)
    chosen = weights, "--tensor", "query", *ASKED, "--out"
    assert "no such folder" in fails(*chosen, tmp_path / "none" / "out.safetensors")
    assert "must end in .safetensors" in fails(*chosen, tmp_path / "out.npz")
    assert "it is the input" in fails(*chosen, weights)
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    assert "it is a folder" in fails(*chosen, folder)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 80.0 GiB for an array\nof some shape"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 80 bytes."),
    ],
)
def test_too_little_memory_ends_with_one_line(weights, fails, monkeypatch, error):
    def exhaust(*args, **options):
        raise error

    monkeypatch.setattr(kronjax, "approximate", exhaust)
    message = fails(weights, "--tensor", "query", *ASKED)
    assert "not enough memory" in message
    assert "--rows" in message


def test_other_runtime_errors_are_not_hidden(weights, run, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(kronjax, "approximate", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run("approximate", weights, "--tensor", "query", *ASKED)


def test_archives_that_cannot_be_read_end_with_one_line(tmp_path, fails):
    path = tmp_path / "weights.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("README.txt", "Weights of a model.")
    assert "holds no matrix" in fails(path, *ASKED)
    assert "but no array" in fails(path, "--tensor", "README.txt", *ASKED)


FROBENIUS = ["--tensor", "query", *ASKED, "--norm", "frobenius"]


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_full_disk_loses_no_result(weights, run, tmp_path, monkeypatch, form):
    out = tmp_path / "out.safetensors"

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(matrices.os, "fsync", refuse)
    code, printed, err = run("approximate", weights, *FROBENIUS, "--out", out, *form)
    assert code == 2
    assert err == f"kronjax: error: cannot write {out}: No space left on device\n"
    if form:
        assert json.loads(printed)["rank"] == 2
    else:
        assert "products" in printed
        assert "Factors written" not in printed
    assert list(tmp_path.iterdir()) == [weights]


def test_a_closed_pipe_loses_no_factors(weights, run, tmp_path, monkeypatch):
    out = tmp_path / "out.safetensors"

    def refuse(*args):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("kronjax.cli.approximate._print_result", refuse)
    code, _, err = run("approximate", weights, *FROBENIUS, "--out", out)
    assert (code, err) == (2, "kronjax: error: Broken pipe\n")
    assert matrices.read(out).rank == 2


def test_names_that_are_no_text_are_served(weights, run, tmp_path):
    given = tmp_path / os.fsdecode(b"gr\xf6\xdfe.safetensors")
    out = tmp_path / os.fsdecode(b"\xff.safetensors")
    try:
        weights.rename(given)
    except OSError:
        pytest.skip("this file system takes only names that are text")
    code, printed, err = run("approximate", given, *FROBENIUS, "--out", out)
    assert (code, err) == (0, "")
    assert f"Factors written to {atomic.readable(out)}." in printed
    with safetensors.safe_open(out, framework="np") as file:
        assert file.metadata()["file"] == atomic.readable(given)
    code, printed, _ = run("approximate", given, *FROBENIUS, "--json")
    assert json.loads(printed)["file"] == atomic.readable(given)


def test_an_interruption_leaves_the_old_output(weights, run, tmp_path, monkeypatch):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(matrices.os, "replace", interrupt)
    asked = weights, "--tensor", "query", *ASKED, "--norm", "frobenius"
    code, _, err = run("approximate", *asked, "--out", out)
    assert (code, err) == (130, "kronjax: interrupted\n")
    assert out.read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == [out, weights]


def test_what_the_command_line_does_not_know_is_refused(run):
    for args in (["aproximate"], ["approximate"], ["doctor", "--frobnicate"]):
        code, out, err = run(*args)
        assert (code, out) == (2, "")
        assert err


def test_version(run):
    assert run("--version") == (0, f"kronjax {kronjax.__version__}\n", "")


def test_doctor_checks_itself(run):
    code, out, _ = run("doctor", "--json")
    facts = json.loads(out)
    assert (code, facts["self_check"]) == (0, "ok")
    names = {"kronjax", "python", "jax", "jaxlib", "flax", "numpy", "devices", "x64"}
    assert names <= set(facts)
    code, out, _ = run("doctor")
    assert code == 0
    assert "JAX_PLATFORMS" in out
    assert "self check" in out


def test_a_mixture_is_written_and_read_again(weights, solve, tmp_path):
    out = tmp_path / "mixed.safetensors"
    asked = weights, "--tensor", "query", *ASKED, "--low-rank", "1", "--norm=frobenius"
    found = solve(*asked, "--num-starts", "1", "--out", out)
    ranks = [(one["a_shape"], one["rank"]) for one in found["configurations"]]
    assert ranks == [([3, 4], 2), ([12, 1], 1)]
    assert found["num_parameters"] == 72
    error = random_matrix() - matrices.read(out).matrix
    assert np.linalg.norm(error) == pytest.approx(found["frobenius_error"], rel=1e-5)
    again = solve(out, "--norm=frobenius", "--num-starts", "1")
    assert again["configurations"] == found["configurations"]
    assert again["relative_frobenius_error"] < 1e-2
    more = solve(out, "--low-rank", "2", "--norm=frobenius", "--num-starts", "1")
    ranks = [(one["a_shape"], one["rank"]) for one in more["configurations"]]
    assert ranks == [([3, 4], 2), ([12, 1], 2)]
    alone = solve(*asked[:3], "--low-rank", "2", "--norm=frobenius")
    assert (alone["a_shape"], alone["rank"]) == ([12, 1], 2)


def test_a_budget_is_searched_with_weights(weights, run, tmp_path):
    moment = tmp_path / "moment.npy"
    np.save(moment, np.diag(np.arange(1.0, 13)))
    asked = weights, "--tensor", "query", "--parameters", 48, "--right-weight", moment
    asked = "approximate", *asked, "--norm", "frobenius", "--num-starts", 1
    code, out, err = run(*asked, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    kinds = {trial["kind"] for trial in found["trials"]}
    assert {"low rank", "homogeneous", "heterogeneous"} <= kinds
    assert found["num_parameters"] <= 48
    assert found["weighted_frobenius_error"] == pytest.approx(
        found["trials"][0]["error"]
    )
    assert found["weighted_frobenius_error"] <= found["svd_frobenius_error"] * 1.00001
    code, out, _ = run(*asked)
    assert code == 0
    for word in ("heterogeneous", "multiply-adds", "weighted", "Without the weights"):
        assert word in out


def test_mistakes_in_weights_and_budgets_end_with_one_line(weights, fails, tmp_path):
    chosen = weights, "--tensor", "query"
    moment = tmp_path / "moment.npy"
    np.save(moment, np.triu(np.ones((12, 12))))
    weighted = *chosen, *ASKED, "--left-weight", moment
    assert "left_weight is not symmetric" in fails(*weighted)
    wanted = *chosen, "--parameters", "48", "--rank", "2"
    assert "leave out --rank, or leave out --parameters" in fails(*wanted)
    assert "smallest possible is 24" in fails(*chosen, "--parameters", "5")
