"""Tests that the benchmarks run and that the peers solve known problems."""

import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import threadpoolctl

from bench import peers, products, script, timing, whole_models
from kronjax import KroneckerTerms
from kronjax.proof import multipliers
from kronjax.proof.tangent_map import TangentMap

ROOT = Path(__file__).resolve().parents[1]

KEYS = {
    "accelerator": {"targets", "on_gpu", "large", "small"},
    "against_peers": {"met_by", "ranks", "shape", "a_shape", "target"},
    "certificates": {"targets", "cases", "regression", "large"},
    "continuation": {"targets", "tolerance", "random", "gpt2"},
    "compression": {"targets", "points books", "books 0.8", "uniform 0.8"},
    "distributions": {"targets", "regression", "cases", "num_starts"},
    "first_answer": {"targets", "rows"},
    "forward": {"targets", "seconds", "batch", "length"},
    "gpt2_values": {"targets", "cases", "rate", "a_shape"},
    "heterogeneous": {"targets", "planted_sums", "planted_orders", "search_time"},
    "preconditioners": {"targets", "rows", "conjugate_gradients"},
    "precision": {"targets", "on_gpu", "errors", "proven"},
    "scaling": {"targets", "batches", "compilations", "startups"},
    "smollm2": {"targets", "continuation", "summary", "windows"},
    "training": {"targets", "cases"},
    "spectral_norms": {"targets", "ratios", "seconds", "matrices", "failure"},
    "training_study": {"targets", "rows", "runs", "tokens", "seen"},
    "whole_models": {"targets", "counts", "tolerance", "model", "kills", "devices"},
}

SCRIPTS = sorted(
    path.stem
    for path in (ROOT / "bench").glob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)


def run_script(name, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"bench.{name}", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def numbers_in(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from numbers_in(entry)
    elif isinstance(value, float):
        yield value


def test_flops_leave_out_half_of_symmetric_products(monkeypatch):
    monkeypatch.setattr(whole_models.jax, "default_backend", lambda: "cpu")
    assert whole_models.halved(383) == 383**2
    # 768 is halved twice, which leaves out six of sixteen blocks.
    assert whole_models.halved(768) == 10 * 192**2
    record = {"shape": [3072, 768], "configurations": [{"rank": 4}], "products": 8}
    record |= {"steps": 1, "p": [2, 4], "tolerance": 3e-2}
    large, thin, proof, left_out = whole_models.flops_of(record)
    # Two evaluations with two tall products each, of which one is symmetric, and four
    # small squares in all.
    assert large == 2 * 768**2 * (2 * 2 * (3072 - 768) + 8 * 768)
    assert thin == 2 * 6 * 4 * 3072 * 768
    gram = 2 * 768**2 * (2 * 3072 + 4 * 768)
    assert left_out == pytest.approx(0.375 * gram)
    monkeypatch.setattr(whole_models.jax, "default_backend", lambda: "gpu")
    assert whole_models.flops_of(record)[3] == 0
    # A gradient takes four products with singular vectors and four with factors. There
    # are six rounds and the first gradient, a last pair of products with multipliers,
    # and a sweep.
    weighted, thin = 2 * 768**2 * (3072 + 768), 2 * 4 * 3072 * 768
    assert proof == 7 * (2 * weighted + 4 * thin) + weighted + 8 * thin
    finer = whole_models.flops_of({**record, "tolerance": 1e-3})[2]
    assert finer - proof == 6 * (2 * weighted + 4 * thin)


def test_every_script_is_tested():
    assert set(KEYS) == set(SCRIPTS)


# Scripts that compare kronjax with torch.
BESIDE_TORCH = {"forward"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.parity] * (name in BESIDE_TORCH))
        for name in SCRIPTS
    ],
)
def test_script(name, tmp_path):
    if name in BESIDE_TORCH:
        pytest.importorskip("torch")
    done = run_script(name, "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert results["machine"]["jax"]
    assert results["quick"] is True
    assert set(results) >= KEYS[name]
    figures = list(numbers_in(results))
    assert figures
    assert all(map(math.isfinite, figures))
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "met" in done.stdout or name in ("gpt2_values", "smollm2")
    CHECKS[name](results)


def check_accelerator(results):
    assert results["on_gpu"] or results["note"].startswith("NOT RUN ON A GPU")
    for result in (results["large"], results["small"]):
        pool, alone = result["pool"], result["loop"]["errors"]
        assert set(pool["parts"]) == {"start", "work", "turn", "finish"}
        assert sum(pool["parts"].values()) <= pool["seconds"]
        assert 0 < pool["median_gap"] <= pool["gap"] < 1
        assert all(0 < gap < 1 for gap in result["loop"]["gaps"])
        parts = [np.mean(result["loop"][key]) for key in ("runs", "proofs")]
        spent = np.cumsum(parts) * len(pool["errors"]) / pool["seconds"]
        ratios = result["loop_over_pool"]
        assert [ratios["the pool proves"], ratios["both prove"]] == pytest.approx(spent)
        # Both are within the tolerance of their minimum.
        for ours, theirs in zip(pool["errors"], alone, strict=False):
            assert ours == pytest.approx(theirs, rel=results["tolerance"])


def check_against_peers(results):
    [result] = results["ranks"]
    assert len(result["kronjax"]) * 3 <= len(result["comparisons"])
    for row in result["kronjax"]:
        assert row["seconds"] > 0
        assert np.all(np.diff(row["trace"]["mean_products"]) > 0)
    for each in result["comparisons"]:
        wanted = each["times_faster"] >= 50 and each["lower_error_on"] == each["of"]
        assert each["met"] == wanted
    # Every method begins at Van Loan's solution or has a lower error.
    worst = np.array(result["peers"]["Van Loan"]["errors"])
    for row in [*result["kronjax"], *result["peers"].values()]:
        errors = np.array(row["errors"])
        if row is not result["peers"]["SVD"]:
            assert np.all(errors <= worst[: errors.size] * (1 + 1e-6))


def check_compression(results):
    planned, uniform = results["books 0.8"], results["uniform 0.8"]
    assert planned["parameters"] == pytest.approx(uniform["parameters"], rel=0.02)
    assert planned["predicted"] < uniform["predicted"]
    for row in results["points books"]:
        assert row["predicted"] > 0


def check_continuation(results):
    assert len(results["random"]) == 3 * 6
    for row in results["random"]:
        assert 0 < row["products"] < row["products_doubling"]
        assert row["excess"] > -1 and -1e-12 < row["gap"] < 1


def check_certificates(results):
    assert len(results["cases"]) == 6
    for case in results["cases"]:
        assert case["error_finished"] <= case["error"] * (1 + 1e-12)
        assert 0 < case["global_bound"] < case["error_finished"]
        assert case["gap_finished"] < 1e-2


def check_distributions(results):
    assert all(target["met"] for target in results["targets"])
    for row in results["cases"]:
        assert np.all(np.array(row["best_of_starts"]) < row["van_loan"])


def check_forward(results):
    assert set(results["seconds"]) == {"kronjax", "torch"}
    [target] = results["targets"]
    assert target["met"] == (target["value"] <= target["limit"])


def check_gpt2_values(results):
    for row in results["cases"]:
        assert row["error"] < min(row["svd_error"], row["van_loan_error"])
        assert row["products"] == row["trace"]["products"][-1]
    assert 0 < results["rate"]["fraction"] < 1.5


def check_heterogeneous(results):
    assert len(results["planted_sums"]) == 3
    for row in results["spectral_random"] + results["spectral_structured"]:
        assert row["below_best_alone"] >= 0
    for row in results["planted_orders"]["one term"]:
        assert row["ratio"] > 0.5
    assert results["search_time"]["ratio"] > 0


def check_precision(results):
    assert results["emulated"] is not results["on_gpu"]
    assert results["on_gpu"] or results["note"].startswith("NOT RUN ON A GPU")
    errors = {
        (row["mode"], row["p"]): row["gradient"]
        for row in results["errors"]
        if row["kind"] == "solved"
    }
    assert len(errors) == 6 * 12
    for p in (4, 66, 4098):
        exact, *others = (
            errors[mode, p] for mode in ("float32", "bf16 x3", "tf32", "bf16")
        )
        assert exact < results["needed"]["gradient"]
        assert all(x > 2 * exact for x in others)
        assert others == sorted(others)
    for row in results["proven"]:
        assert row["products"] > 0
        assert row["within"] == sum(gap <= 2e-4 for gap in row["gaps"])


def check_first_answer(results):
    (row,) = results["rows"]
    for kind in ("cold", "warm"):
        parts = row[kind]
        assert parts["import"] < parts["seconds"]
        assert parts["trace"] > 0 and parts["error"] > 0
    # Loading what the first process compiled is not compiling.
    assert row["warm"]["compile"] < row["cold"]["compile"]


def check_scaling(results):
    assert [row["batch"] for row in results["batches"]] == [1, 2]
    assert all(x["seconds"] > 0 for x in results["compilations"])
    for target in results["targets"]:
        assert target["met"] == (target["value"] <= target["limit"])


def check_smollm2(results):
    assert results["tokens_scored"] == 31 * len(results["windows"]) > 0
    assert results["summary"]["kronjax_perplexity"] > 1
    for target in results["targets"]:  # none where torch is not installed
        assert target["met"]


def check_spectral_norms(results):
    assert len(results["matrices"]) == 7
    for row in results["matrices"]:
        for kind in ("certain", "probable"):
            assert row[f"lower_{kind}"] <= row["norm"] <= row[f"upper_{kind}"]
            assert row[f"width_{kind}"] <= 1e-3


def check_training(results):
    (case,) = results["cases"].values()
    pairs = list(zip(case["loop"], case["by_hand"], strict=True))
    assert len(pairs) == 3 and all(x > 0 for pair in pairs for x in pair)
    assert case["overhead"] == pytest.approx(sorted(a / b - 1 for a, b in pairs)[1])
    (target,) = results["targets"]
    assert target["met"] == (case["overhead"] <= target["limit"])


def check_training_study(results):
    assert results["complete"]
    runs = results["runs"]
    sizes = {
        name: row["linear_parameters"]
        for name, row in runs.items()
        if not name.startswith("dense")
    }
    # All have half of the kernels' parameters; biases are not pruned.
    assert max(sizes.values()) < 1.05 * min(sizes.values())
    trained = [row for row in results["rows"] if row["way"] != "none"]
    assert {row["way"] for row in trained} >= {"vanilla", "distillation"}
    for row in trained:
        if row["method"] in {
            x["method"] for x in results["rows"] if x["way"] == "none"
        }:
            lost = runs[f"{row['method']}|none|0"]["loss"]
            gain = lost - row["loss"]
            wanted = gain / (lost - runs["dense"]["loss"])
            assert row["recovered"] == pytest.approx(wanted)


def check_whole_models(results):
    model, kills = results["model"], results["kills"]
    assert len(model["matrices"]) == 2 and 0 < model["gap"] < 1
    assert 0 < model["computed"] <= model["descent"] < model["share"]
    loop, batch = model["loop"], model["batch_seconds"]
    # The loop solves both squares, so that nothing is extrapolated.
    spent = np.cumsum([sum(loop["runs"]), sum(loop["proofs"])]) / batch
    ratios = [model["loop_ratio"], model["loop_ratio_both_proven"]]
    assert ratios == pytest.approx(spent)
    assert all(0 < gap < 1 for gap in loop["gaps"])
    for ours, theirs in zip(model["matrices"], loop["errors"], strict=True):
        # Both are within the tolerance of their minimum.
        assert ours["errors"]["spectral"] == pytest.approx(theirs, rel=2e-2)
    assert kills["complete"] and kills["identical"]
    assert kills["lost"] == kills["solved_twice"] == 0
    assert results["devices"]["identical"]


def check_preconditioners(results):
    for row in results["rows"]:
        assert 1 <= row["kronjax"] <= row["bound"] <= 1.01 * row["kronjax"]
        assert row["kronjax"] < row["condition"]
        assert row["frobenius"] is None or row["kronjax"] <= 1.001 * row["frobenius"]
    plain, *others = results["conjugate_gradients"]
    assert all(row["iterations"] < plain["iterations"] for row in others)


CHECKS = {
    "accelerator": check_accelerator,
    "against_peers": check_against_peers,
    "certificates": check_certificates,
    "continuation": check_continuation,
    "compression": check_compression,
    "distributions": check_distributions,
    "first_answer": check_first_answer,
    "forward": check_forward,
    "gpt2_values": check_gpt2_values,
    "heterogeneous": check_heterogeneous,
    "preconditioners": check_preconditioners,
    "precision": check_precision,
    "scaling": check_scaling,
    "smollm2": check_smollm2,
    "spectral_norms": check_spectral_norms,
    "training": check_training,
    "training_study": check_training_study,
    "whole_models": check_whole_models,
}


def test_gpt2_values_asks_for_the_weights():
    done = run_script("gpt2_values")
    assert done.returncode == 2
    assert "--weights" in done.stderr


def matrix_of(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 10)])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_truncated_svd_is_eckart_young(shape, rank):
    matrix = matrix_of(0, shape)
    s = np.linalg.svd(matrix, compute_uv=False)
    result = peers.truncated_svd(matrix, rank * sum(shape) + sum(shape) - 1)
    assert result.num_parameters == rank * sum(shape)
    assert np.linalg.matrix_rank(result.matrix) == rank
    assert result.spectral_error == pytest.approx(s[rank], rel=1e-12)
    assert result.frobenius_error == pytest.approx(np.linalg.norm(s[rank:]), rel=1e-12)


@pytest.mark.parametrize(
    ("a_shape", "b_shape", "rank"), [((2, 2), (3, 3), 2), ((2, 3), (3, 2), 1)]
)
def test_peers_find_a_sum_of_kronecker_products(a_shape, b_shape, rank):
    a, b = matrix_of(1, (rank, *a_shape)), matrix_of(2, (rank, *b_shape))
    matrix = sum(map(np.kron, a, b))
    for method in (
        peers.van_loan,
        peers.pymanopt_fixed_rank,
        peers.alternating_sdp,
    ):
        result = method(matrix, a_shape, rank)
        assert result.spectral_error < 1e-12 * np.linalg.norm(matrix)
        assert result.num_parameters == a.size + b.size


def test_van_loan_error_is_the_tail_of_the_rearrangement():
    matrix = matrix_of(3, (6, 8))
    blocks = matrix.reshape(2, 3, 4, 2).transpose(0, 2, 1, 3).reshape(8, 6)
    s = np.linalg.svd(blocks, compute_uv=False)
    result = peers.van_loan(matrix, (2, 4), 2)
    assert result.frobenius_error == pytest.approx(np.linalg.norm(s[2:]), rel=1e-12)


@pytest.mark.parametrize("solver", ["SCS", "CLARABEL"])
def test_half_sweeps_never_raise_the_error(solver):
    matrix = matrix_of(4, (6, 6))
    errors = [
        peers.alternating_sdp(matrix, (2, 3), 1, solver, count).spectral_error
        for count in range(4)
    ]
    start = peers.van_loan(matrix, (2, 3), 1).spectral_error
    assert errors[0] == pytest.approx(start, rel=1e-12)
    assert errors[1] < 0.995 * errors[0]
    assert np.all(np.diff(errors) <= 0)


@pytest.mark.parametrize("solver", ["SCS", "CLARABEL"])
def test_sdp_solves_the_known_case(solver):
    # diag(1, 0, 0, 1) with 2 x 2 factors: 1/2, and Van Loan's start has error 1.
    matrix = np.diag([1.0, 0.0, 0.0, 1.0])
    result = peers.alternating_sdp(matrix, (2, 2), 1, solver, 4)
    assert 0.5 - 1e-9 <= result.spectral_error <= 1


def test_pymanopt_lowers_the_error():
    matrix = matrix_of(5, (6, 6))
    start = peers.van_loan(matrix, (2, 3), 1).spectral_error
    result = peers.pymanopt_fixed_rank(matrix, (2, 3), 1, max_iterations=30)
    again = peers.pymanopt_fixed_rank(matrix, (2, 3), 1, max_iterations=30)
    assert result.spectral_error < 0.95 * start
    assert np.array_equal(result.matrix, again.matrix)


def test_an_unknown_solver_is_refused():
    with pytest.raises(ValueError, match="SCS"):
        peers.alternating_sdp(np.eye(4), (2, 2), 1, solver="MOSEK")


def test_results_are_written_atomically(tmp_path):
    path = timing.write_results(
        "x", {"a": np.arange(2), "b": np.float32(0.5)}, tmp_path
    )
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [0, 1], "b": 0.5}
    with pytest.raises(TypeError, match="object"):
        timing.write_results("x", {"a": object()}, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]
    assert json.loads(path.read_text(encoding="utf-8"))["a"] == [0, 1]


def test_best_threads_runs_with_each_number_of_threads():
    limits = []

    def run():
        info = threadpoolctl.threadpool_info()
        limits.append({x["num_threads"] for x in info if x["user_api"] == "blas"})

    assert timing.best_threads(run) in (1, None)
    assert limits[0] == limits[1] == {1}
    assert limits[2] == limits[3]


def test_timing_separates_compiling_from_running():
    measured = timing.measure(lambda x: x @ x, np.eye(8), repeats=3)
    assert 0 < measured.best <= measured.median
    assert measured.compile > 0
    assert timing.product_rate(8, np.float32, batch=2, repeats=1) > 0


def test_three_bfloat16_parts_add_up_to_the_float32():
    x = matrix_of(6, (9, 9)).astype(np.float32)
    parts = products.split(jnp.asarray(x), products.MODES["bf16 x6"])
    assert len(parts) == 3
    np.testing.assert_array_equal(sum(parts), x)
    # Each has eight bits, of which one is implicit.
    for part in parts:
        np.testing.assert_array_equal(part.astype(jnp.bfloat16), part)


@pytest.mark.parametrize(
    ("mode", "bits"),
    [("bf16 x6", 23), ("tf32 x3", 21), ("bf16 x3", 16), ("tf32", 11), ("bf16", 8)],
)
def test_emulated_products_are_as_precise_as_their_parts(mode, bits):
    x, y = matrix_of(7, (2, 30, 30)).astype(np.float32)
    found = products.emulated(jnp.asarray(x), jnp.asarray(y), products.MODES[mode])
    exact = x.astype(np.float64) @ y.astype(np.float64)
    size = np.abs(x).astype(np.float64) @ np.abs(y)
    off = np.max(np.abs(np.asarray(found, np.float64) - exact) / size)
    # Two factors are rounded, and at most three of nine products of parts left out.
    assert 2.0**-bits / 100 < off < 4 * 2.0**-bits


@pytest.mark.parametrize("m", [384, 768])
def test_proof_flops_agree_with_those_of_the_compiled_program(m):
    n, a, b = 384, (48, m // 16, 16), (48, 16, 24)
    shapes = (m, n), (n, n), (n,), a, b
    given = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]

    def balance(u, vt, diagonal, a, b):
        space = TangentMap.of((m, n), (KroneckerTerms(a, b),))
        return multipliers.balance(space, u, vt, diagonal)

    # The rounds are a loop, of which the analysis counts one pass.
    analysis = jax.jit(balance).lower(*given).cost_analysis()
    assert analysis is not None
    compiled = analysis["flops"]
    sweep = 4 * 4 * 48 * m * n
    counted = whole_models.proof_flops(m, n, 48, rounds=1) - sweep
    assert 1 <= compiled / counted < 1.03


@pytest.mark.parametrize(
    ("value", "at_least", "met"),
    [(1.0, False, True), (2.0, False, False), (2.0, True, True), (0.5, True, False)],
)
def test_a_target_is_met_on_its_side_of_the_limit(value, at_least, met):
    target = script.Target("x", value, 1.0, at_least)
    assert target.met is met
    assert target.plain()["met"] is met
    assert not script.Target("x", math.nan, 1.0, at_least).met
