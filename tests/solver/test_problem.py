from kronjax import Configuration
from kronjax.solver.problem import Problem, default_max_products


def test_a_longer_schedule_has_less_to_spend_on_every_stage():
    one = Configuration((24, 32), 4)
    budgets = [
        Problem.of((768, 768), one, schedule=schedule).max_products
        for schedule in ("adaptive", "fixed")
    ]
    assert budgets == [130, 165]
    assert (
        default_max_products((12, 12), adaptive=True)
        == default_max_products((12, 12))
        == 1000
    )
    assert default_max_products((4096, 4096), adaptive=True) == 100
