import numpy as np
import pytest
from helpers import total, van_loan
from hypothesis import given
from hypothesis import strategies as st

from kronjax.kronecker import KroneckerTerms
from kronjax.proof import newton
from kronjax.proof.cluster import ClusterProblem
from kronjax.proof.newton import finish

REGRESSION = {1: 9.267008995043, 3: 7.419063837001, 6: 5.953099929932}
"""Local minima reached from Van Loan's start for the 36x36 normal matrix of seed 0."""


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("rank", REGRESSION)
def test_regression_values_to_ten_digits_within_eight_steps(rank):
    import kronjax

    matrix = normal((36, 36))
    near = kronjax.approximate(
        matrix, kronjax.Configuration((6, 6), rank), num_starts=1, progress=False
    )
    found = finish(matrix, near.terms)
    assert found.spectral_error == pytest.approx(REGRESSION[rank], rel=1e-12)
    assert found.steps + found.path_steps <= 8
    assert found.kkt_residual <= 1e-12
    assert found.is_strict_minimum
    measured = np.linalg.norm(matrix - total(found.terms), 2)
    assert found.spectral_error == pytest.approx(measured, rel=1e-12)


SHAPES = [((6, 6), (2, 3)), ((6, 8), (3, 2)), ((8, 6), (2, 3)), ((4, 12), (2, 3))]


@given(st.sampled_from(SHAPES), st.integers(1, 2), st.integers(0, 10_000))
def test_a_finish_never_raises_the_error(shapes, rank, seed):
    shape, a_shape = shapes
    matrix = normal(shape, seed)
    begun = van_loan(matrix, a_shape, rank)
    found = finish(matrix, (begun,), rounds=10)
    before = np.linalg.norm(matrix - total((begun,)), 2)
    after = np.linalg.norm(matrix - total(found.terms), 2)
    assert after <= before * (1 + 1e-12)
    assert found.spectral_error == pytest.approx(after, rel=1e-10)


def test_strict_minima_are_minima():
    matrix, draws = normal((8, 9), 0), np.random.default_rng(4)
    found = finish(matrix, (van_loan(matrix, (2, 3), 1),))
    assert found.is_strict_minimum
    (one,) = found.terms
    for size in (1e-6, 1e-4, 1e-2):
        for _ in range(20):
            a = one.a + size * draws.standard_normal(one.a.shape)
            b = one.b + size * draws.standard_normal(one.b.shape)
            other = matrix - total((KroneckerTerms(a, b),))
            assert np.linalg.norm(other, 2) > found.spectral_error


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_errors_have_the_scale_of_the_matrix(scale):
    matrix = normal((6, 8), 1)
    begun = van_loan(matrix, (3, 2), 1)
    scaled = KroneckerTerms(begun.a * scale, begun.b)
    one, other = finish(matrix, (begun,)), finish(scale * matrix, (scaled,))
    assert other.spectral_error / scale == pytest.approx(one.spectral_error, rel=1e-9)


def test_weighted_errors_are_those_of_the_weighted_problem():
    matrix, draws = normal((6, 8), 2), np.random.default_rng(5)
    left, right = (x @ x.T for x in (draws.standard_normal((n, 20)) for n in (6, 8)))
    begun = van_loan(matrix, (3, 2), 1)
    found = finish(matrix, (begun,), left, right)
    g, f = np.linalg.cholesky(left), np.linalg.cholesky(right)

    def error(terms):
        return np.linalg.norm(g.T @ (matrix - total(terms)) @ f, 2)

    # The ridge that makes weights regular accounts for the difference.
    assert found.spectral_error == pytest.approx(error(found.terms), rel=1e-4)
    assert error(found.terms) < error((begun,))
    assert found.status == "converged"


def test_a_sum_of_two_configurations_is_finished_jointly():
    matrix = normal((8, 9), 6)
    square = van_loan(matrix, (2, 3), 1)
    low = van_loan(matrix - total((square,)), (8, 1), 1)
    before = np.linalg.norm(matrix - total((square, low)), 2)
    found = finish(matrix, (square, low))
    assert len(found.terms) == 2
    assert found.spectral_error < before
    measured = np.linalg.norm(matrix - total(found.terms), 2)
    assert found.spectral_error == pytest.approx(measured, rel=1e-12)


def test_an_exact_sum_is_returned_unchanged():
    one = KroneckerTerms(normal((2, 2, 3)), normal((2, 3, 2), 1))
    found = finish(total((one,)), (one,))
    assert (found.status, found.steps) == ("exact", 0)
    assert found.spectral_error < 1e-13


def test_linearly_dependent_terms_are_returned_unchanged():
    one = KroneckerTerms(np.ones((2, 2, 3)), np.ones((2, 3, 2)))
    found = finish(normal((6, 6)), (one,))
    assert found.status == "rank_deficient"
    np.testing.assert_array_equal(found.terms[0].a, one.a)


def test_the_hessian_and_the_constraints_are_the_derivatives():
    matrix = normal((6, 8), 7)
    here = ClusterProblem.of(matrix, (van_loan(matrix, (3, 2), 1),)).cluster()
    view, draws = here.view(1), np.random.default_rng(8)
    # A cluster of one: its singular value is smooth.
    for _ in range(3):
        xi = draws.standard_normal(here.space.dimension)
        step = 1e-4
        s = [here.moved(x * step * xi).s[0] for x in (-1, 0, 1)]
        slope = view._rows[0] @ xi
        assert slope == pytest.approx((s[2] - s[0]) / (2 * step), rel=1e-5, abs=1e-8)
        bend = (s[2] - 2 * s[1] + s[0]) / step**2
        assert xi @ view.hessian @ xi == pytest.approx(bend, rel=1e-3, abs=1e-5)


def test_rounds_limit_the_steps():
    matrix = normal((6, 8), 1)
    begun = van_loan(matrix, (3, 2), 1)
    runs = [finish(matrix, (begun,), rounds=rounds) for rounds in (0, 1)]
    assert runs[0].steps == runs[0].path_steps == 0
    before = np.linalg.norm(matrix - total((begun,)), 2)
    assert runs[0].spectral_error == pytest.approx(before)
    assert runs[1].path_steps == 0 or runs[1].status != "max_steps"


@pytest.mark.parametrize("seed", range(3))
def test_the_central_path_converges_without_newton_first(seed, monkeypatch):
    matrix = normal((8, 9), seed)
    begun = van_loan(matrix, (2, 3), 2)
    monkeypatch.setattr(newton, "QUICK", 0)
    found = finish(matrix, (begun,))
    assert found.path_steps > 0
    assert found.kkt_residual < 1e-9
    assert found.multipliers_min > -1e-12
