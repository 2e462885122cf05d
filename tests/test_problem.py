import pytest

from kronjax import Configuration, descent
from kronjax.problem import Problem, default_budget


@pytest.mark.parametrize(
    ("shape", "rank", "memory"),
    [
        ((768, 768), 192, 4),
        ((768, 768), 32, descent.MEMORY),
        ((48, 48), 12, descent.MEMORY),  # nothing is heavy there
    ],
)
def test_few_pairs_are_kept_where_they_cost_more_than_they_save(shape, rank, memory):
    a_shape = (24, 32) if shape[0] > 48 else (6, 8)
    assert Problem.of(shape, Configuration(a_shape, rank)).memory == memory


def test_a_longer_schedule_has_less_to_spend_on_every_stage():
    one = Configuration((24, 32), 4)
    budgets = [
        Problem.of((768, 768), one, schedule=schedule).budget
        for schedule in ("adaptive", "fixed")
    ]
    assert budgets == [130, 165]
    assert default_budget((12, 12), adaptive=True) == default_budget((12, 12)) == 1000
    assert default_budget((4096, 4096), adaptive=True) == 100
