import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kronjax.lm.compression.budget import Budget, share


@pytest.mark.parametrize(
    ("text", "measure", "amount"),
    [
        ("0.8", "fraction", 0.8),
        (1, "fraction", 1.0),
        ("81M", "parameters", 81e6),
        ("81_000_000", None, None),
        ("81000000", "parameters", 81e6),
        ("1.5B", "parameters", 1.5e9),
        ("160MB", "bytes", 160e6),
        ("150 MiB", "bytes", 150 * 2**20),
        ("170MFLOP", "flops", 170e6),
        ("2gflops", "flops", 2e9),
        ("0", None, None),
        ("-3", None, None),
        ("lots", None, None),
        ("1.2.3", None, None),
        ("nan", None, None),
    ],
)
def test_budgets_are_parsed_or_refused(text, measure, amount):
    if measure is None:
        with pytest.raises(ValueError, match="write a fraction"):
            Budget.parse(text)
    else:
        assert Budget.parse(text) == Budget(measure, amount)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.floats(0, 1))
def test_sharing_respects_the_budget_and_is_nearly_optimal(seed, layers, where):
    rng = np.random.default_rng(seed)
    offers = []
    for _ in range(layers):
        costs = rng.choice(np.arange(1, 30), 4, replace=False)
        damages = np.sort(rng.random(4))[::-1] * rng.choice([1, 10])
        offers.append(list(zip(np.sort(costs).tolist(), damages.tolist(), strict=True)))
    low = sum(min(c for c, _ in of) for of in offers)
    high = sum(max(c for c, _ in of) for of in offers)
    budget = low + where * (high - low)
    chosen = share(offers, budget)
    cost, damage = (
        sum(of[i][k] for of, i in zip(offers, chosen, strict=True)) for k in (0, 1)
    )
    assert cost <= budget * (1 + 1e-9)
    best = min(
        sum(o[1] for o in combination)
        for combination in itertools.product(*offers)
        if sum(o[0] for o in combination) <= budget * (1 + 1e-12)
    )
    # The gap is at most the gain of a single step of a layer.
    step = max(a[1] - b[1] for of in offers for a, b in itertools.combinations(of, 2))
    assert best - 1e-12 <= damage <= best + step


def test_a_large_budget_takes_the_best_and_a_small_one_is_refused():
    offers = [[(3, 0.5), (9, 0.0), (5, 0.4)], [(2, 1.0), (4, 0.9), (6, 0.0)]]
    assert share(offers, 15) == [1, 2]
    assert share(offers, 5) == [0, 0]
    with pytest.raises(ValueError, match="smallest possible, 5"):
        share(offers, 4.9)


def test_offers_above_the_convex_hull_are_never_chosen():
    # (4, 0.9) lies above the line between its neighbours.
    assert share([[(2, 1.0), (4, 0.9), (6, 0.0)]], 5) == [0]
    # Of two offers at the same cost, the one with less damage.
    assert share([[(2, 1.0), (2, 0.5)]], 2) == [1]
