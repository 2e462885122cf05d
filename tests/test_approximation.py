import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import kronecker_sum_reference

import kronjax
from kronjax import Configuration, Status, approximate, approximation
from kronjax.linalg.dense import multiply_out
from kronjax.proof import certificate
from kronjax.runs import pool_programs

SMALL = Configuration((3, 4), rank=2)


def draw(seed, *batch):
    return np.random.default_rng(seed).standard_normal((*batch, 12, 12))


def test_reports_what_it_returns():
    matrix = draw(0)
    approx = approximate(matrix, SMALL)
    assert approx.terms[0].a.shape == (2, 3, 4)
    assert approx.terms[0].b.shape == (2, 4, 3)
    dense = kronecker_sum_reference(approx.terms[0].a, approx.terms[0].b)
    np.testing.assert_allclose(approx.matrix(), dense, atol=1e-13)
    rest = matrix - dense
    assert approx.error.spectral == pytest.approx(np.linalg.norm(rest, 2), rel=1e-12)
    assert approx.error.frobenius == pytest.approx(np.linalg.norm(rest), rel=1e-12)
    size = np.linalg.norm(matrix, 2)
    assert approx.relative.spectral == pytest.approx(approx.error.spectral / size)
    assert approx.error.spectral < approx.van_loan.spectral
    assert approx.error.frobenius > approx.van_loan.frobenius
    assert approx.num_parameters == 2 * 24
    assert approx.shape == (12, 12)
    assert approx.products == approx.trace.products.sum() > 0
    assert approx.status == Status.CONVERGED
    assert approx.notes == ()
    assert approx.seconds > 0
    assert approx.terms[0].a.dtype == np.float64


def test_agrees_with_solve():
    matrix = draw(1)
    approx = approximate(matrix, SMALL)
    solution = jax.jit(lambda x: kronjax.solve(x, SMALL))(jnp.asarray(matrix))
    np.testing.assert_allclose(
        approx.error.spectral, solution.spectral_error, rtol=2e-4
    )


def test_batches_keep_their_axes():
    matrices = draw(2, 2, 3)
    approx = approximate(matrices, SMALL)
    assert approx.terms[0].a.shape == (2, 3, 2, 3, 4)
    assert approx.matrix().shape == (2, 3, 12, 12)
    assert approx.error.spectral.shape == approx.status.shape == (2, 3)
    assert approx.products.shape == (2, 3)
    assert approx.trace.p.shape == approx.trace.products.shape
    assert approx.trace.p.shape[:2] == (2, 3)
    rest = matrices[1, 2] - approx.matrix()[1, 2]
    assert approx.error.spectral[1, 2] == pytest.approx(np.linalg.norm(rest, 2))


def test_the_second_call_does_not_compile():
    approximate(draw(3), SMALL, tolerance=1e-3)
    again = approximate(draw(4), SMALL, tolerance=1e-4, seed=2**40 + 3)
    assert again.compile_seconds == 0


@pytest.mark.parametrize(
    ("dtype", "note"),
    [
        ("int32", "int32 input computed in float32"),
        ("bool", "bool input computed in float32"),
        ("float16", "float16 input computed in float32"),
        ("bfloat16", "bfloat16 input computed in float32"),
        ("float32", None),
    ],
)
def test_short_numbers_are_computed_in_float32(dtype, note):
    matrix = jnp.asarray(3 * draw(5)).astype(dtype)
    approx = approximate(matrix, SMALL)
    assert approx.terms[0].a.dtype == np.float32
    assert approx.notes == ((note,) if note else ())
    rest = np.asarray(matrix).astype(float) - approx.matrix()
    assert approx.error.spectral == pytest.approx(
        np.linalg.norm(rest, 2), rel=1e-5, abs=1e-6
    )


def test_the_dtype_can_be_chosen():
    for dtype in ("float32", np.float32, jnp.float32, np.dtype("float32")):
        assert approximate(draw(5), SMALL, dtype=dtype).terms[0].a.dtype == np.float32
    wide = approximate(draw(5).astype(np.float32), SMALL, dtype="float64")
    assert wide.terms[0].a.dtype == np.float64
    with pytest.raises(ValueError, match='"float32" or "float64"; got \'float16\''):
        approximate(draw(5), SMALL, dtype="float16")


def test_errors_are_those_of_the_matrix_as_given():
    matrix = 2**24 + np.arange(144).reshape(12, 12)
    approx = approximate(matrix, Configuration((3, 4), rank=99))
    rest = matrix - kronecker_sum_reference(approx.terms[0].a, approx.terms[0].b)
    assert approx.error.spectral == pytest.approx(np.linalg.norm(rest, 2), rel=1e-6)
    assert approx.error.spectral > 1


@pytest.mark.parametrize(("dtype", "size"), [("float32", 1e38), ("float64", 1e308)])
def test_a_norm_that_overflows_is_refused_or_reported(dtype, size):
    matrices = (draw(17, 3) * 0.1).astype(dtype)
    matrices[1] = size
    with pytest.raises(ValueError, match=f"a Frobenius norm overflows {dtype}"):
        approximate(matrices, SMALL)
    solution = jax.jit(jax.vmap(lambda x: kronjax.solve(x, SMALL)))(
        jnp.asarray(matrices)
    )
    assert solution.status[1] == Status.NONFINITE
    assert np.isfinite(solution.terms[0].a).all()
    assert np.isfinite(solution.spectral_error[2])


def test_float64_needs_no_global_switch():
    with jax.enable_x64(False):
        approx = approximate(draw(0), SMALL)
        assert not jax.config.jax_enable_x64
    assert approx.error.spectral == pytest.approx(
        approximate(draw(0), SMALL).error.spectral, rel=1e-9
    )


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.zeros(12), r"got shape \(12,\). Reshape a vector"),
        (np.zeros((0, 12)), "with entries"),
        (np.zeros((12, 12), complex), "real numbers; got dtype complex128"),
        (np.array([["a", "b"]]), "real numbers; got dtype <U1"),
        (np.zeros((12, 11)), "4 is not a divisor of its 11 columns"),
        (np.array([[None]]), "real numbers; got dtype object"),
        (np.full((12, 12), 1e200), None),
    ],
)
def test_bad_matrices_are_named(matrix, message):
    if message is None:
        with pytest.raises(ValueError, match='overflow float32.*pass dtype="float64"'):
            approximate(matrix, SMALL, dtype="float32")
        return
    with pytest.raises(ValueError, match=message):
        approximate(matrix, SMALL)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_entries_that_are_not_finite_are_located(bad):
    matrices = draw(6, 2)
    matrices[1, 3, 5] = bad
    with pytest.raises(ValueError, match=re.escape(f"first at (1, 3, 5): {bad}")):
        approximate(matrices, SMALL)


def test_zero_and_rank_deficient_matrices():
    left = draw(7)[:, :2]
    matrices = np.stack([np.zeros((12, 12)), left @ left.T, np.ones((12, 12))])
    approx = approximate(matrices, SMALL)
    assert approx.error.spectral[0] == approx.relative.spectral[0] == 0
    assert approx.error.spectral[2] < 1e-12
    assert np.isfinite(approx.matrix()).all()
    assert (approx.status == Status.CONVERGED).all()


def test_a_rank_above_the_maximum_is_capped_with_a_note():
    approx = approximate(draw(8), Configuration((3, 4), rank=99))
    assert approx.terms[0].rank == 12
    assert approx.error.spectral < 1e-12
    assert approx.notes == (
        "rank 99 capped at 12, the largest Kronecker rank with factors (3, 4): the "
        "solution is exact",
    )


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales(scale):
    reference = approximate(draw(9), SMALL)
    for dtype in ("float32", "float64"):
        approx = approximate(draw(9) * scale, SMALL, dtype=dtype)
        assert approx.error.spectral / scale == pytest.approx(
            reference.error.spectral, rel=2e-3
        )


def test_van_loan_is_the_answer_for_the_frobenius_norm():
    approx = approximate(draw(10), SMALL, norm="frobenius")
    assert approx.error.frobenius == approx.van_loan.frobenius
    assert approx.products == 0


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_drawn_when_wanted_and_only_then(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for wanted, drawn in ((True, True), (False, False), (None, False)):
        terminal = Terminal()
        monkeypatch.setattr("sys.stderr", terminal)
        approximate(draw(11), SMALL, progress=wanted)
        assert (" products" in terminal.getvalue()) == drawn


def test_an_approximation_can_be_approximated_exactly():
    approx = approximate(draw(12), SMALL)
    again = approximate(approx.matrix(), SMALL)
    assert again.error.spectral < 1e-12


def test_parity_of_names():
    assert set(kronjax.__all__) <= set(dir(kronjax))
    with pytest.raises(AttributeError, match="no attribute 'aproximate'"):
        kronjax.aproximate  # noqa: B018


def test_other_starts_leave_a_critical_point():
    corner, rest = np.zeros((3, 3)), np.eye(3)
    corner[0, 0], rest[0, 0] = 1, 0
    matrix = np.kron(corner, corner) + 1.05 / 2 * np.kron(rest, rest)
    alone, raced = (
        approximate(
            matrix, Configuration((3, 3), 1), num_starts=num_starts
        ).error.spectral
        for num_starts in (1, 4)
    )
    assert alone == pytest.approx(1, abs=1e-6)
    assert raced < 0.5


def test_more_starts_share_what_was_compiled():
    matrix = np.float32(draw(0))
    options = {"norm": "schatten:6", "progress": False}
    approximate(matrix, SMALL, num_starts=1, max_products=30, **options)
    compiled = pool_programs.started.cache_info().misses
    again = approximate(matrix, SMALL, num_starts=3, max_products=60, **options)
    assert pool_programs.started.cache_info().misses == compiled
    assert again.compile_seconds == 0


def test_the_tolerance_is_a_gap_that_can_be_proven():
    matrices = draw(5, 4)
    for tolerance in (2e-2, 2e-3):
        found = approximate(
            np.float64(matrices), SMALL, tolerance=tolerance, certify=True
        )
        assert (found.certificate.local_gap <= tolerance).all()
        assert (found.trace.products[..., 1:].max(axis=0) > 0).all()
    with pytest.raises(ValueError, match="certify is for"):
        approximate(matrices, SMALL, norm="frobenius", certify=True)
    for schedule in ("doubling", [6, 4], [4, 5], []):
        with pytest.raises(ValueError, match="schedule|p = 5"):
            approximate(matrices, SMALL, schedule=schedule)
    own = approximate(matrices, SMALL, schedule=[4, 18, 130], num_starts=1)
    assert own.trace.p[0].tolist() == [2, 4, 18, 130]


def test_what_misses_the_tolerance_is_solved_again(monkeypatch):
    # The first matrix misses the tolerance: it alone is solved and proven again.
    gaps = iter([[1.0, 0.0], [0.0]])

    def prove(given, *_):
        gap = np.array(next(gaps))
        assert len(given) == len(gap)
        return certificate.Certificate(gap, gap, gap, gap, gap, gap)

    monkeypatch.setattr(approximation, "certificate_of", prove)
    matrices = np.float64(draw(5, 4))[:2]
    found = approximate(matrices, SMALL, tolerance=2e-2, certify=True)
    plain = approximate(matrices, SMALL, tolerance=2e-2)
    assert found.error.spectral[0] < plain.error.spectral[0]
    assert found.error.spectral[1] == plain.error.spectral[1]
    assert found.notes == ("1 solved again, with tolerance / 4",)
    # What has been proven is not proven again: there are no more gaps.
    assert found.certificate.local_gap.tolist() == [0, 0]


def test_gaps_are_those_of_the_matrix_as_given():
    matrix = draw(6) * 1e3
    found = approximate(matrix, SMALL, dtype="float32", certify=True, tolerance=2e-2)
    error = np.linalg.norm(matrix - np.float64(found.matrix()), 2)
    assert float(found.certificate.error) == pytest.approx(error, rel=1e-6)
    assert found.certificate.local_gap.shape == found.error.spectral.shape == ()
    terms = [jax.tree.map(np.float64, one) for one in found.terms]
    exact = sum(kronecker_sum_reference(one.a, one.b) for one in terms)
    error = np.linalg.norm(matrix - exact, 2)
    assert float(found.certificate.error) == pytest.approx(error, rel=1e-12)


def test_a_tolerance_out_of_reach_is_reported():
    found = approximate(
        np.float64(draw(5, 4)), SMALL, tolerance=1e-12, certify=True, num_starts=1
    )
    assert "above the tolerance 1e-12" in found.notes[-1]
    assert np.isfinite(found.error.spectral).all()


def test_large_sums_that_are_exact_are_found():
    # By eigenvectors of a Gram matrix: values fall below what is trusted of those.
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 100, 16, 16))
    for decay in (1.0, 0.97, 0.93):
        falling = decay ** np.arange(100)
        exact = multiply_out(a * falling[:, None, None], b).astype(np.float32)
        found = approximate(exact, Configuration((16, 16), 100), num_starts=1)
        assert found.relative.spectral < 100 * np.finfo(np.float32).eps
