import numpy as np
import pytest
from test_greedy import planted

import kronjax
from kronjax import Configuration, search, selection
from kronjax.norm import Norm

FAST = {"norm": "frobenius", "num_starts": 1, "progress": False}


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def test_planted_sums_are_found_and_trials_are_listed():
    pair = Configuration((4, 3), 1), Configuration((12, 1), 1)
    found = search(planted(0, pair, (12, 12)), 48, **FAST)
    assert set(found.configurations) == set(pair)
    assert found.approximation.relative.frobenius < 2e-3
    assert found.approximation.num_parameters == 48
    best, *others = found.trials
    assert best.kind == "heterogeneous"
    assert best.error == found.approximation.error.frobenius
    assert {"low rank", "homogeneous"} <= {trial.kind for trial in others}
    assert all(best.error <= trial.error for trial in others)
    assert all(trial.num_parameters <= 48 for trial in found.trials)
    low_rank = next(trial for trial in others if trial.kind == "low rank")
    assert low_rank.multiply_adds == low_rank.num_parameters  # of x @ K
    assert best.is_efficient


@pytest.mark.parametrize(("seed", "parameters"), [(0, 48), (1, 48)])
def test_never_worse_than_low_rank_and_homogeneous(seed, parameters):
    matrix = draw(seed, 12, 12)
    found = search(matrix, parameters, **FAST)
    error = found.approximation.error.frobenius
    s = np.linalg.svd(matrix, compute_uv=False)
    assert error <= np.linalg.norm(s[parameters // 24 :]) * (1 + 1e-9)
    blocks = matrix.reshape(3, 4, 4, 3).swapaxes(1, 2).reshape(12, 12)
    s = np.linalg.svd(blocks, compute_uv=False)
    assert error <= np.linalg.norm(s[parameters // 24 :]) * (1 + 1e-9)


def test_mixing_pays_in_the_spectral_norm():
    matrix = draw(1, 6, 6)
    found = search(matrix, 24, num_starts=1, dtype="float32", progress=False)
    assert len(found.configurations) > 1
    alone = [t.error for t in found.trials if t.kind in ("low rank", "homogeneous")]
    assert found.trials[0].error < 0.99 * min(alone)


def test_weights_reach_every_trial():
    matrix, right = draw(2, 6, 6), np.diag(np.arange(1, 7.0) ** 4)
    found = search(matrix, 24, right_weight=right, **FAST)
    whitened = (matrix - found.approximation.matrix()) @ np.sqrt(right)
    assert found.trials[0].error == pytest.approx(np.linalg.norm(whitened))
    plain = search(matrix, 24, **FAST).approximation
    unaware = (matrix - plain.matrix()) @ np.sqrt(right)
    assert found.trials[0].error < 0.9 * np.linalg.norm(unaware)


def test_the_criterion_finds_the_number_of_terms():
    pair = Configuration((3, 4), 1), Configuration((12, 1), 1)
    found = search(planted(3, pair, (12, 12), 1e-4), **FAST)
    assert set(found.configurations) == set(pair)


def test_a_budget_of_the_dense_matrix_returns_it():
    matrix = draw(4, 12, 12)
    found = search(matrix, 144, **FAST)
    np.testing.assert_allclose(found.approximation.matrix(), matrix, atol=1e-12)
    assert found.trials[0].kind == "dense"
    assert "144 parameters reach the 144 of the dense" in found.notes[0]


def test_prime_dimensions_leave_low_rank():
    found = search(draw(5, 7, 5), 24, **FAST)
    assert found.configurations == (Configuration((7, 1), 2),)
    assert "no other Kronecker products than low rank" in found.notes[0]


@pytest.mark.parametrize(
    ("shape", "parameters", "message"),
    [
        ((12, 12), 23, "less than one term.*smallest possible is 24, with"),
        ((12, 12), 0, "smallest possible is 24"),
        ((12, 12), 30.5, "whole number; got 30.5"),
        ((2, 12, 12), 48, "one matrix.*pass its configurations to"),
    ],
)
def test_impossible_budgets_are_named(shape, parameters, message):
    with pytest.raises(ValueError, match=message):
        kronjax.search(draw(6, *shape), parameters, **FAST)


@pytest.mark.parametrize(
    "parameters", [float("inf"), float("nan"), "x", [30], True, 30.5]
)
def test_a_budget_is_a_whole_number(parameters):
    with pytest.raises(ValueError, match="whole number"):
        search(draw(4, 12, 12), parameters, **FAST)


def test_one_product_of_expensive_terms_is_proposed():
    """One term of the most expensive configuration is exact."""
    rng = np.random.default_rng(0)
    matrix = np.kron(rng.normal(size=(2, 2)), rng.normal(size=(36, 36)))
    proposed = selection._proposals(matrix, 1300, (None, None), Norm(2))
    assert ("homogeneous", (Configuration((2, 2), 1),)) in proposed


def test_large_matrices_are_tried_quickly_and_the_best_solved_fully(monkeypatch):
    monkeypatch.setattr(selection.greedy, "THOROUGH", 40)
    options = {
        "norm": "schatten:4",
        "num_starts": 2,
        "max_products": 40,
        "dtype": "float32",
    }
    found = search(draw(7, 8, 8), 32, progress=False, **options)
    best, *others = found.trials
    assert best.is_full
    assert not all(trial.is_full for trial in others)
    alone = [trial for trial in found.trials if trial.kind == "homogeneous"]
    assert alone[0].is_full
    assert best.error <= min(trial.error for trial in others)
    assert best.error == pytest.approx(float(found.approximation.trace.value[-1]))
    # All sums were compiled ahead, for both budgets.
    assert found.compile_seconds > 0 and found.approximation.compile_seconds == 0


def test_the_closed_form_is_solved_once_where_the_tails_are_the_errors():
    found = search(draw(8, 12, 12), 72, **FAST)
    alone = [trial for trial in found.trials if trial.kind == "homogeneous"]
    assert len(alone) == 1
    for c in selection.greedy.candidates((12, 12)):
        count = 72 // c.num_parameters((12, 12))
        if count:
            one = Configuration(c.a_shape, min(count, c.max_rank((12, 12))))
            [tail] = selection.greedy.tails(draw(8, 12, 12), [one])
            assert found.trials[0].relative ** 2 <= tail * (1 + 1e-9)
