"""Joint fits at p = 2, alone and as one batch, against each other and their start."""

import numpy as np
import pytest

from kronjax import Configuration, approximate
from kronjax.runs import joint
from kronjax.runs.joint import Prepared, Target

MIXTURE = (Configuration((12, 1), 2), Configuration((3, 2), 2))


def targets(count):
    rng = np.random.default_rng(0)
    weights = [np.cov(rng.standard_normal((n, 3 * n))) for n in (12, 8)]
    draws = rng.standard_normal((count, 12, 8))
    return [Target(f"w{i}", matrix, *weights) for i, matrix in enumerate(draws)]


def test_a_batch_finds_what_each_fit_finds_alone():
    prepared = [Prepared(target) for target in targets(3)]
    # Two sizes that share a program.
    wanted = [MIXTURE, (MIXTURE[0], Configuration((3, 2), 1)), MIXTURE]
    together = joint.fit_all(prepared, wanted, tolerance=1e-6, max_products=400)
    for one, configurations, other in zip(prepared, wanted, together, strict=True):
        alone = one.fit(configurations, tolerance=1e-6, max_products=400)
        assert [x.rank for x in other.terms] == [x.rank for x in configurations]
        assert other.relative == pytest.approx(alone.relative, rel=1e-3)


def test_a_fit_is_no_worse_than_that_of_approximate():
    (target,) = targets(1)
    found = Prepared(target).fit(MIXTURE, tolerance=1e-6, max_products=800)
    alone = approximate(
        target.matrix,
        MIXTURE,
        norm="frobenius",
        left_weight=target.left,
        right_weight=target.right,
        num_starts=1,
    )
    assert found.relative <= alone.weighted_relative.frobenius * (1 + 1e-2)


def test_sizes_of_a_tier_share_a_program():
    def rank_of(rank):
        wanted = (Configuration((6, 4), rank),)
        return joint.program((24, 16), wanted, (True, False)).configurations[0].rank

    # A term has 40 parameters, the matrix 384: tiers end at three, six and nine terms.
    assert [rank_of(rank) for rank in (1, 3, 4, 6, 7, 9)] == [3, 3, 6, 6, 9, 9]
    assert rank_of(16) == 16  # larger than the matrix, and exact
