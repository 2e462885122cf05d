import numpy as np
import pytest
from helpers import total, van_loan

from kronjax.proof import barrier, newton
from kronjax.proof.cluster import ClusterProblem


def normal(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape)


def norm_of(inner):
    """Return the norm of the error of a point, at the scale of the matrix."""
    return np.linalg.norm(inner.error, 2) * inner.space.scale


@pytest.mark.parametrize("shape", [(6, 8), (8, 6), (4, 12)])
def test_the_path_ends_stationary_from_a_distant_start(shape):
    matrix = normal(shape, 4)
    begun = van_loan(matrix, (2, 2), 2)
    found = barrier.descend(ClusterProblem.of(matrix, (begun,)))
    assert found.gap < 2 * barrier.END
    assert found.residual < 1e-12
    assert np.linalg.eigvalsh(found.x)[0] > 0
    assert np.trace(found.x) == pytest.approx(1, abs=1e-9)
    # So much a change of all left, or of all right, factors could gain.
    nuclear = np.linalg.svd(found.dual, compute_uv=False).sum()
    assert nuclear <= 1 + 1e-9
    assert np.sum(found.dual * found.error) == pytest.approx(
        norm_of(found) / found.space.scale, rel=1e-7
    )
    assert norm_of(found) < np.linalg.norm(matrix - total((begun,)), 2)


def test_a_flat_end_of_the_path_is_reached_up_to_rounding():
    """One singular value leads alone, and the last search for a step may fail.

    For matrices that differ by one rounding the gap is from 1e-8 to 5e-8, the trace
    within 3e-8 of one, and the residual from 2e-10 to 7e-5.
    """
    matrix = normal((4, 12), 3)
    begun = van_loan(matrix, (2, 2), 2)
    found = barrier.descend(ClusterProblem.of(matrix, (begun,)))
    assert found.gap < 20 * barrier.END
    # As far as a step of decrement μ changes a gradient.
    assert found.residual < 10 * barrier.END**0.5
    assert np.linalg.eigvalsh(found.x)[0] > 0
    trace = np.trace(found.x)
    assert trace == pytest.approx(1, abs=20 * barrier.END)
    nuclear = np.linalg.svd(found.dual, compute_uv=False).sum()
    assert nuclear <= trace * (1 + 1e-12)
    norm = norm_of(found) / found.space.scale
    assert 0 < 1 - np.sum(found.dual * found.error) / norm / trace < 20 * barrier.END
    closer = newton.finish(matrix, (begun,))
    assert norm_of(found) == pytest.approx(closer.spectral_error, rel=20 * barrier.END)


def test_numerically_singular_systems_are_solved(monkeypatch):
    solve, calls = np.linalg.solve, []

    def sometimes(matrix, right):
        calls.append(len(right))
        if len(calls) % 3 == 0:
            raise np.linalg.LinAlgError("Singular matrix")
        return solve(matrix, right)

    monkeypatch.setattr(barrier.np.linalg, "solve", sometimes)
    matrix = normal((6, 8), 4)
    found = barrier.descend(ClusterProblem.of(matrix, (van_loan(matrix, (2, 2), 2),)))
    assert len(calls) > 3
    assert found.gap < 2 * barrier.END
    assert found.residual < 1e-9


def test_the_form_agrees_with_its_products():
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


def test_conjugate_gradients_reach_the_same_gap(monkeypatch):
    matrix = normal((8, 9), 1)
    space = ClusterProblem.of(matrix, (van_loan(matrix, (2, 3), 1),))
    dense = barrier.descend(space, end=1e-4)
    monkeypatch.setattr(barrier, "LARGEST", 0)
    free = barrier.descend(space, end=1e-4)
    assert free.gap < 2e-4
    assert norm_of(free) == pytest.approx(norm_of(dense), rel=1e-3)


def test_large_problems_end_lower_with_a_certificate(monkeypatch):
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
