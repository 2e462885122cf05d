import numpy as np
import pytest
from helpers import total, van_loan

from kronjax.proof import barrier, newton
from kronjax.proof.cluster import ClusterProblem


def normal(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape)


def norm_of(inner):
    """The norm of the error of a point, at the scale of the matrix."""
    return np.linalg.norm(inner.error, 2) * inner.space.scale


@pytest.mark.parametrize(
    ("shape", "seed", "residual"),
    [
        ((6, 8), 4, 1e-12),
        ((8, 6), 4, 1e-12),
        ((4, 12), 4, 1e-12),
        ((4, 12), 3, 1e-4),  # flat, and one singular value leads alone
    ],
)
def test_the_end_of_the_path_is_stationary_from_far_away(shape, seed, residual):
    matrix = normal(shape, seed)
    begun = van_loan(matrix, (2, 2), 2)
    found = barrier.descend(ClusterProblem.of(matrix, (begun,)))
    assert found.gap < 2 * barrier.END
    assert found.residual < residual
    assert np.linalg.eigvalsh(found.x)[0] > 0
    assert np.trace(found.x) == pytest.approx(1, abs=1e-9)
    # So much a change of all left, or of all right, factors could gain.
    nuclear = np.linalg.svd(found.dual, compute_uv=False).sum()
    assert nuclear <= 1 + 1e-9
    assert np.sum(found.dual * found.error) == pytest.approx(
        norm_of(found) / found.space.scale, rel=1e-7
    )
    assert norm_of(found) < np.linalg.norm(matrix - total((begun,)), 2)


def test_columns_and_products_are_those_of_the_form():
    matrix = normal((8, 9), 6)
    square = van_loan(matrix, (2, 3), 1)
    low = van_loan(matrix - total((square,)), (8, 1), 1)
    draws = np.random.default_rng(1)
    left, right = (x @ x.T for x in (draws.standard_normal((n, 20)) for n in (8, 9)))
    for terms in ((square,), (square, low)):
        space = ClusterProblem.of(matrix, terms, left, right)
        inner = barrier.descend(space, steps=1)
        args = inner.sheets, inner.multipliers, inner.inverse
        form = space.form(*args)
        xi = draws.standard_normal(space.dimension)
        scale = np.abs(form).max()
        assert np.allclose(form @ xi, space.curve(*args, xi), atol=1e-9 * scale)
        d = space.push(inner.sheets, xi)
        j = np.block([[np.zeros((8, 8)), d], [d.T, np.zeros((9, 9))]])
        z = np.linalg.inv(
            inner.t * np.eye(17)
            - np.block(
                [[np.zeros((8, 8)), inner.error], [inner.error.T, np.zeros((9, 9))]]
            )
        )
        wanted = np.trace(inner.x @ j @ z @ j)
        assert xi @ form @ xi == pytest.approx(wanted, rel=1e-8)


def test_without_a_matrix_it_gets_as_far(monkeypatch):
    matrix = normal((8, 9), 1)
    space = ClusterProblem.of(matrix, (van_loan(matrix, (2, 3), 1),))
    dense = barrier.descend(space, end=1e-4)
    monkeypatch.setattr(barrier, "LARGEST", 0)
    free = barrier.descend(space, end=1e-4)
    assert free.gap < 2e-4
    assert norm_of(free) == pytest.approx(norm_of(dense), rel=1e-3)


def test_large_problems_come_back_lower_and_with_a_certificate(monkeypatch):
    matrix = normal((8, 9), 2)
    begun = van_loan(matrix, (2, 3), 1)
    monkeypatch.setattr(barrier, "LARGEST", 0)
    monkeypatch.setattr(newton, "QUICK", 0)
    told = []
    found = newton.finish(matrix, (begun,), tell=told.append)
    assert found.spectral_error < np.linalg.norm(matrix - total((begun,)), 2)
    assert found.status == "stalled"
    assert not found.is_strict_minimum
    assert found.path_steps == len(told) > 0
    bound = np.sum(found.dual * (matrix - total(found.terms)))
    assert bound > 0.99 * found.spectral_error
