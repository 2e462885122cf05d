import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from kronjax import Configuration, greedy
from kronjax.linalg.dense import multiply_out


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def planted(seed, configurations, shape=(24, 24), noise=1e-3):
    """Return a sum of unit sums of the given configurations, plus noise."""
    rng = np.random.default_rng(seed)
    matrix = np.zeros(shape)
    for c in configurations:
        a = rng.standard_normal((c.rank, *c.a_shape))
        part = multiply_out(a, rng.standard_normal((c.rank, *c.b_shape(shape))))
        matrix += part / np.linalg.norm(part)
    error = rng.standard_normal(shape)
    return matrix + noise * error / np.linalg.norm(error)


def test_candidates_express_different_sums():
    found = [c.a_shape for c in greedy.candidates((4, 6))]
    assert found[0] == (4, 1)
    assert len(set(found)) == len(found) == 3 * 4 - 3
    assert not {(1, 1), (4, 6), (1, 6)} & set(found)
    assert [c.a_shape for c in greedy.candidates((7, 5))] == [(7, 1)]
    narrow = greedy.candidates((36, 36), spread=1.2)
    assert [c.a_shape for c in narrow][0] == (36, 1)
    assert {c.num_parameters((36, 36)) for c in narrow} == {72, 75, 78}
    assert len(greedy.candidates((1, 6))) == 3  # with factors of one row


@pytest.mark.parametrize(
    "pair",
    [
        (Configuration((4, 6), 2), Configuration((24, 1), 1)),
        (Configuration((6, 4), 1), Configuration((3, 8), 2)),
        (Configuration((12, 8), 1), Configuration((4, 6), 2)),
        (Configuration((2, 4), 1), Configuration((24, 1), 2)),
    ],
)
@pytest.mark.parametrize("is_told", [True, False])
def test_planted_sums_are_recovered(pair, is_told):
    matrix = planted(1, pair)
    budget = sum(c.num_parameters((24, 24)) for c in pair) if is_told else None
    found = greedy.choose(matrix, budget, greedy.candidates((24, 24)))
    assert set(found) == set(pair)
    assert found == greedy.choose(matrix, budget, greedy.candidates((24, 24)))


def test_the_criterion_selects_no_terms_from_noise():
    assert greedy.choose(draw(2, 24, 24), None, greedy.candidates((24, 24))) == ()


@hypothesis.settings(max_examples=8)
@hypothesis.given(seed=st.integers(0, 2**20), parameters=st.integers(48, 300))
def test_the_budget_is_kept_and_used(seed, parameters):
    among = greedy.candidates((24, 24), spread=2)
    found = greedy.choose(draw(seed, 24, 24), parameters, among)
    spent = sum(c.num_parameters((24, 24)) for c in found)
    assert parameters - 48 < spent <= parameters
    assert all(c.rank <= c.max_rank((24, 24)) for c in found)


@pytest.mark.parametrize("is_weighted", [False, True])
def test_tails_agree_with_the_rearrangement(is_weighted):
    matrix, configuration = draw(3, 12, 12), Configuration((3, 4), 2)
    roots = [np.eye(12), np.eye(12)]
    weights = ()
    if is_weighted:
        factors = [np.linalg.cholesky(x @ x.T + np.eye(k)) for k, x in _squares()]
        roots = [np.kron(factors[0], factors[1]), np.kron(factors[2], factors[3])]
        weights = [root @ root.T for root in roots]
    blocks = (roots[0].T @ matrix @ roots[1]).reshape(3, 4, 4, 3).swapaxes(1, 2)
    s = np.linalg.svd(blocks.reshape(12, 12), compute_uv=False)
    [tail] = greedy.tails(matrix, [configuration], *weights)
    assert tail == pytest.approx(np.sum(s[2:] ** 2) / np.sum(s**2), rel=1e-4)


def _squares():
    return [(k, draw(k + i, k, k)) for i, k in enumerate((3, 4, 4, 3))]


def test_weights_change_the_choice():
    # The weight makes the second half of the columns negligible.
    pair = Configuration((4, 6), 1), Configuration((3, 8), 1)
    matrix = planted(4, pair[:1], noise=1e-6)
    matrix[:, 12:] += 5 * planted(5, pair[1:], (24, 24), 1e-6)[:, 12:]
    weight = np.diag(np.repeat([1.0, 1e-6], 12))
    among = [Configuration(c.a_shape, 1) for c in pair]
    budget = among[0].num_parameters((24, 24))
    plain = greedy.choose(matrix, budget, among)
    aware = greedy.choose(matrix, budget, among, None, weight)
    assert plain[0].a_shape != aware[0].a_shape == (4, 6)


def test_large_matrices_are_sketched():
    shape = (96, 80)
    pair = Configuration((12, 8), 3), Configuration((96, 1), 2)
    matrix = planted(6, pair, shape, 1e-2).astype(np.float32)
    budget = sum(c.num_parameters(shape) for c in pair)
    among = greedy.candidates(shape, greedy.SPREAD)
    assert set(greedy.choose(matrix, budget, among)) == set(pair)
    s = np.linalg.svd(matrix, compute_uv=False)
    [tail] = greedy.tails(matrix, [Configuration((96, 1), 2)])
    assert tail == pytest.approx(np.sum(s[2:] ** 2) / np.sum(s**2), rel=1e-3)


def test_planted_sums_are_recovered_under_weights():
    """The noise is white only after whitening by weights that are not products."""
    pair = (Configuration((4, 6), 2), Configuration((24, 1), 1))
    matrix, weights, roots = planted(1, pair, noise=0), [], []
    for seed in (7, 8):
        mixing = draw(seed, 24, 24)
        weights.append(mixing @ mixing.T + np.eye(24))
        roots.append(np.linalg.cholesky(weights[-1]))
    noise = draw(9, 24, 24)
    noise *= 1e-3 * np.linalg.norm(roots[0].T @ matrix @ roots[1])
    noise /= np.linalg.norm(noise)
    noisy = matrix + np.linalg.solve(roots[0].T, noise) @ np.linalg.inv(roots[1])
    budget = sum(c.num_parameters((24, 24)) for c in pair)
    found = greedy.choose(noisy, budget, greedy.candidates((24, 24)), *weights)
    assert set(found) == set(pair)
