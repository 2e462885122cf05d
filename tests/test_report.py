import dataclasses

import numpy as np
import pytest

from kronjax import report
from kronjax.approximation import Approximation
from kronjax.kronecker import KroneckerTerms
from kronjax.linalg.residuals import ResidualNorms
from kronjax.solver.continuation import Trace


def approximation(ours, van_loan, **changes):
    """Return an approximation that has the given spectral errors only."""
    ours, van_loan = np.asarray(ours, float), np.asarray(van_loan, float)
    line = np.zeros((*ours.shape, 2), int)
    result = Approximation(
        terms=(KroneckerTerms(np.zeros((1, 2, 2)), np.zeros((1, 3, 3))),),
        error=ResidualNorms(ours, ours),
        relative=ResidualNorms(ours, ours),
        van_loan=ResidualNorms(van_loan, van_loan),
        trace=Trace(line, line, line, line, line + 20),
        status=np.zeros(ours.shape, int),
        seconds=0.5,
        compile_seconds=1.5,
        notes=(),
    )
    return dataclasses.replace(result, **changes)


def baseline(errors):
    errors = np.asarray(errors, float)
    return report.Baseline(1, 12, errors, errors, np.ones_like(errors))


@pytest.mark.parametrize("shape", [(6, 6), (8, 5), (3, 4, 7)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_baseline_is_truncated_svd(shape, scale):
    matrix = scale * np.random.default_rng(0).normal(size=shape)
    m, n = shape[-2:]
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    kept = (u[..., :2] * s[..., None, :2]) @ vt[..., :2, :]
    found = report.svd_baseline(matrix, 2 * (m + n) + 1)
    assert (found.rank, found.num_parameters) == (2, 2 * (m + n))
    axes = (-2, -1)
    expected = np.linalg.norm(matrix - kept, 2, axis=axes)
    np.testing.assert_allclose(found.spectral, expected, rtol=1e-10)
    expected = np.linalg.norm((matrix - kept) / scale, axis=axes) * scale
    np.testing.assert_allclose(found.frobenius, expected, rtol=1e-10)
    np.testing.assert_allclose(found.spectral_norm, s[..., 0], rtol=1e-10)


@pytest.mark.parametrize("dtype", ["int8", "uint16", "float16", "float32", "float64"])
def test_baseline_takes_float64_of_the_matrix_as_given(dtype):
    # 1 + 1e-10 is 1 in float32, and -128 is its own absolute value in int8.
    lowest = -128 if np.dtype(dtype).kind != "u" else 3
    matrix = np.diag([lowest, 1 + 1e-10]).astype(dtype)
    kept = matrix.copy()
    found = report.svd_baseline(matrix, 4)
    assert found.rank == 1
    assert found.spectral.dtype == np.float64
    np.testing.assert_allclose(found.spectral, np.float64(matrix[1, 1]), rtol=1e-14)
    np.testing.assert_allclose(found.spectral_norm, abs(lowest), rtol=1e-14)
    np.testing.assert_array_equal(matrix, kept)


@pytest.mark.parametrize("shape", [(6, 6), (2, 8, 5), (4, 7)])
def test_large_baselines_agree_with_small_ones(shape, monkeypatch):
    matrix = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    small = report.svd_baseline(matrix, 30)
    monkeypatch.setattr(report, "LARGE", 1)
    large = report.svd_baseline(matrix, 30)
    for name in ("spectral", "frobenius", "spectral_norm"):
        np.testing.assert_allclose(getattr(large, name), getattr(small, name))


def test_baseline_at_both_ends():
    matrix = np.diag([3.0, 4.0])
    nothing = report.svd_baseline(matrix, 3)
    assert (nothing.rank, nothing.spectral, nothing.frobenius) == (0, 4, 5)
    everything = report.svd_baseline(matrix, 1000)
    assert (everything.rank, everything.spectral, everything.frobenius) == (2, 0, 0)
    assert report.svd_baseline(np.zeros((2, 2)), 4).spectral == 0


@pytest.mark.parametrize(
    ("ours", "van_loan", "svd", "expected"),
    [
        (1, 2, 4, "kronjax is 75 % below truncated SVD and 50 % below Van Loan."),
        (2, 2, 1, "Truncated SVD wins: its spectral error is 50 % below"),
        (2, 1, 2, "Van Loan wins: its spectral error is 50 % below"),
        (1, 1, 2, "50 % below truncated SVD and equal to Van Loan."),
        (1e-9, 0, 0, "equal to truncated SVD and equal to Van Loan."),
        ([1, 1, 2], [3, 3, 3], [2, 2, 1], "On 1 of 3 matrices truncated SVD wins."),
    ],
)
def test_verdict_names_the_winner(ours, van_loan, svd, expected):
    assert expected in report.verdict(approximation(ours, van_loan), baseline(svd))


def test_effort_counts_statuses():
    line = report.effort(approximation(1, 1))
    assert line == "Status: converged; 40 products; 0.50 s, and 1.50 s to compile."
    batch = approximation([1, 1, 1], [1, 1, 1], status=np.array([0, 2, 0]))
    line = report.effort(batch)
    assert "converged (2), max_steps (1); 40 products per matrix" in line


def test_summary_is_plain_and_contains_no_nan():
    batch = approximation([1, np.nan], [1, np.inf], status=np.array([0, 4]))
    found = report.summary(batch, baseline([1, 1]))
    assert found["spectral_error"] == [1.0, None]
    assert found["van_loan_spectral_error"] == [1.0, None]
    assert found["status"] == ["converged", "nonfinite"]
    assert found["trace"]["products"] == [[20, 20], [20, 20]]
