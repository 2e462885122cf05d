import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kronjax.approximation import approximate
from kronjax.kronecker import Configuration
from kronjax.solver import least_squares
from kronjax.solver.descent import Status
from kronjax.solver.problem import Problem
from kronjax.solver.whitened import prepare

SHAPE = (12, 12)
LARGEST = (Configuration((12, 1), 2), Configuration((3, 4), 3))
PROBLEM = Problem.of(SHAPE, LARGEST, 2)


def moment(rng, n):
    x = rng.standard_normal((3 * n, n)) @ np.diag(np.linspace(0.2, 3, n))
    return x.T @ x / len(x)


def draw(seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(SHAPE), moment(rng, 12), moment(rng, 12)


@jax.jit
def fit(matrix, left, right, ranks, evaluations=400, tolerance=1e-12):
    setting, inverses = prepare(PROBLEM, matrix, left, right)
    return least_squares.fit(PROBLEM, setting, inverses, ranks, evaluations, tolerance)


def weighted_norm(error, left, right):
    return np.sqrt(np.trace(left @ error @ right @ error.T))


@pytest.mark.parametrize("ranks", [(1, 2), (0, 3), (2, 3)])
def test_the_error_is_that_of_the_terms_and_the_ranks_are_kept(ranks):
    matrix, left, right = draw(0)
    found = fit(matrix, left, right, jnp.array(ranks))
    for terms, rank in zip(found.terms, ranks, strict=True):
        assert not np.any(terms.a[rank:]) and not np.any(terms.b[rank:])
    total = sum(one.to_matrix() for one in found.terms)
    relative = weighted_norm(matrix - total, left, right)
    relative /= weighted_norm(matrix, left, right)
    # A ridge of a millionth is part of the weights.
    np.testing.assert_allclose(found.relative, relative, rtol=1e-4)
    assert found.relative <= found.start * (1 + 1e-12)


def test_one_program_for_all_ranks_agrees_with_separate_solves():
    matrix, left, right = draw(1)
    for ranks in ((1, 2), (2, 1)):
        found = fit(matrix, left, right, jnp.array(ranks))
        wanted = [
            Configuration(one.a_shape, rank)
            for one, rank in zip(LARGEST, ranks, strict=True)
        ]
        alone = approximate(
            matrix,
            wanted,
            norm=2,
            left_weight=left,
            right_weight=right,
            num_starts=1,
            tolerance=1e-12,
        )
        # The same start; neighbouring minima are a few per cent apart.
        np.testing.assert_allclose(
            found.relative, alone.weighted_relative.frobenius, rtol=0.1
        )
    assert fit._cache_size() <= 2


def test_low_rank_alone_is_the_truncated_whitened_matrix():
    matrix, left, right = draw(2)
    found = fit(matrix, left, right, jnp.array([2, 0]))
    half = np.linalg.cholesky(left).T @ matrix @ np.linalg.cholesky(right)
    s = np.linalg.svd(half, compute_uv=False)
    wanted = np.sqrt(np.sum(s[2:] ** 2) / np.sum(s**2))
    np.testing.assert_allclose(found.relative, wanted, rtol=1e-4)
    assert found.status == Status.CONVERGED


def test_the_exact_sum_is_found_in_float32():
    rng = np.random.default_rng(3)
    matrix = np.kron(rng.standard_normal((3, 4)), rng.standard_normal((4, 3)))
    found = fit(
        *(jnp.asarray(x, jnp.float32) for x in (matrix, np.eye(12), np.eye(12))),
        jnp.array([0, 1]),
    )
    assert found.terms[0].a.dtype == jnp.float32
    assert found.relative < 1e-5
